"""Boosted trees that judge each pixel on its own, as `kelp baseline` makes them: another runtime.

LightGBM comes with `pip install "kelp-slicer[baseline]"` and is imported on first use.
"""

from __future__ import annotations

import copy
import importlib
import logging
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from kelp.config.choices import Precision
from kelp.errors import BundleError, KelpError
from kelp.inference.backends.treetext import checked_model
from kelp.inference.spec import NetworkSpec
from kelp.nn.preprocess import Preprocess

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
    the batch, or the number of threads (as many as torch uses).
    """

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
        self.preprocess = Preprocess(spec)
        self._name = name

    def on(self, device: torch.device, precision: Precision) -> Self:
        """This model itself; where a GPU was wished for, one line says that it is not used."""
        if device.type != "cpu":
            log.info("%s: boosted trees are computed on the CPU", self._name)
        return self

    def described(self, spec: NetworkSpec) -> Self:
        """The same trees with another temperature."""
        model = copy.copy(self)
        model.spec = spec
        return model

    def probabilities(self, raw: Tensor) -> Tensor:
        """Raw DN `(n, 7, h, w)` to float32 probabilities `(n, h, w)` on the same device."""
        count, _, height, width = raw.shape
        p = np.empty((count, height * width), dtype=np.float32)
        for row, crop in zip(p, raw.float().cpu(), strict=True):  # one at a time: they are large
            logits = self._logits(features(self.preprocess, crop))
            row[:] = special.expit(logits / self.spec.temperature)
        return torch.from_numpy(p).view(count, height, width).to(raw.device)

    def _logits(self, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
        logits: NDArray[np.float64] = self._trees.predict(
            pixels, raw_score=True, num_threads=torch.get_num_threads()
        )
        return logits


def features(preprocess: Preprocess, raw: Tensor) -> NDArray[np.float32]:
    """What trees see of raw DN `(7, h, w)`: a row for each pixel, `(h * w, channels)`."""
    with torch.inference_mode():
        planes: NDArray[np.float32] = preprocess(raw[None])[0].flatten(1).numpy()
    return np.ascontiguousarray(planes.T)
