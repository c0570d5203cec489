"""Boosted trees that judge each pixel on its own, as `kelp baseline` makes them: another runtime.

LightGBM comes with `pip install "kelp-slicer[baseline]"` and is imported on first use.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kelp import __version__
from kelp.config.choices import Precision
from kelp.errors import BundleError, KelpError
from kelp.inference.backends import DeviceName, Pixels, Processor, cpu_threads, viewed
from kelp.inference.backends.treetext import checked_model
from kelp.inference.preprocess import channels_of, normalised, stored_numbers
from kelp.inference.spec import NetworkSpec

log = logging.getLogger("kelp")

MODEL_FILE: Final = "model.txt"


def lightgbm() -> Any:
    """LightGBM; without it a `KelpError` that says how to get it."""
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError) as error:  # OSError: the system lacks libgomp
        raise KelpError(
            f"boosted trees need the package lightgbm ({' '.join(str(error).split())}): "
            'pip install "kelp-slicer[baseline]"'
        ) from error


class PixelTrees:
    """Preprocessing and boosted trees, on the CPU.

    A pixel's probability depends on that pixel alone, not even in its last bit on its neighbours,
    the batch, or the number of threads.
    """

    runtime = "trees"

    def __init__(self, text: str, spec: NetworkSpec, name: str) -> None:
        """Load the text of a model; `name` is what messages call it.

        Raises:
            BundleError: it is no model of that many channels.
            KelpError: LightGBM is missing.
        """
        library = lightgbm()
        try:
            sound = checked_model(text, len(spec.channels))
            self._trees = library.Booster(model_str=sound)
        except (ValueError, library.basic.LightGBMError) as error:
            reason = " ".join(str(error).split())
            raise BundleError(
                f"{name}: not a model of {len(spec.channels)} channels ({reason}); "
                "copy the bundle again"
            ) from error
        self.text = text
        self.version: str = library.__version__
        self.spec = spec
        self._name = name
        self._threads = cpu_threads(None)

    def processor(
        self, device: DeviceName, precision: Precision | None, threads: int | None
    ) -> Processor:
        """The CPU; where a GPU was asked for, one line says that it is not used."""
        if device == "cuda":
            log.info("%s: boosted trees are computed on the CPU", self._name)
        versions = (__version__, f"LightGBM {self.version}")
        return Processor("cpu", "32-true", cpu_threads(threads), versions)

    def on(self, processor: Processor) -> Self:
        """The same trees with that number of threads."""
        model = copy.copy(self)
        model._threads = processor.threads
        return model

    def described(self, spec: NetworkSpec) -> Self:
        """The same trees with another temperature."""
        model = copy.copy(self)
        model.spec = spec
        return model

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """Zeros."""
        return np.zeros(shape, dtype=np.float32)

    def probabilities(self, raw: Pixels, symmetries: Sequence[int] = (0,)) -> Pixels:
        """Raw DN `(n, 7, h, w)` to probabilities `(len(symmetries), n, h, w)`, both float32."""
        return viewed(self._run, raw, symmetries)

    def _run(self, raw: Pixels) -> Pixels:
        from scipy.special import expit

        count, _, height, width = raw.shape
        p = np.empty((count, height * width), dtype=np.float32)
        for row, crop in zip(p, raw, strict=True):  # one at a time: they are large
            logits: NDArray[np.float64] = self._trees.predict(
                features(self.spec, crop), raw_score=True, num_threads=self._threads
            )
            row[:] = expit(logits / self.spec.temperature)
        return p.reshape(count, height, width)


def features(spec: NetworkSpec, raw: Pixels) -> Pixels:
    """What trees see of raw DN `(7, h, w)`: a row for each pixel, `(h * w, channels)`."""
    numbers = [np.array(n, dtype=np.float32)[:, None, None] for n in stored_numbers(spec)]
    with np.errstate(all="ignore"):  # indices divide by what may be 0; that is missing, then
        fill, offset, divisor = numbers
        x = normalised(channels_of(raw[None], spec, np)[0], fill, offset, divisor, np)
    return np.ascontiguousarray(x.reshape(len(x), -1).T)
