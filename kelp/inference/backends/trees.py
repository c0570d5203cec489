"""Boosted trees that judge each pixel on its own, as `kelp baseline` makes them: another runtime.

LightGBM comes with `pip install "kelp-slicer[baseline]"` and is imported on first use.
"""

from __future__ import annotations

import copy
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kelp import __version__
from kelp.config.choices import Precision
from kelp.errors import BundleError, KelpError
from kelp.inference.backends import DeviceName, Pixels, Processor, cpu_threads, viewed
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


_HEAD: Final = (
    "version",
    "num_class",
    "num_tree_per_iteration",
    "label_index",
    "max_feature_idx",
    "objective",
    "feature_names",
    "feature_infos",
)
_NODES: Final = ("split_feature", "threshold", "decision_type", "left_child", "right_child")
_MOST_LEAVES: Final = 1 << 16
_NUMERIC: Final = (0, 2, 4, 6, 8, 10)
"""Decision types of splits by size: an odd one would be by category."""


def checked_model(text: str, channels: int) -> str:
    """LightGBM's text model, reduced to what prediction needs.

    LightGBM trusts its model files: a truncated one ends the whole process, and one with a wrong
    number reads memory of others. So every number that it will follow is checked first, and it is
    given only lines that were.

    Args:
        text: as LightGBM writes it.
        channels: numbers that it takes of each pixel.

    Raises:
        ValueError: the text is no such model of trees for one probability.
    """
    body, end, _ = text.partition("\nend of trees\n")
    head, *trees = re.split(r"^Tree=\d+\n", body, flags=re.MULTILINE)
    if not (end and trees and head.startswith("tree\n")):
        raise ValueError("it is incomplete")
    facts = _fields(head)
    wanted = {
        "version": "v4",
        "num_class": "1",
        "num_tree_per_iteration": "1",
        "max_feature_idx": str(channels - 1),
        "label_index": "0",
    }
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise ValueError(f"{name} is {facts.get(name)}, not {value}")
    if facts.get("objective") != "binary sigmoid:1":
        raise ValueError("it does not give probabilities")
    for name in ("feature_names", "feature_infos"):
        if len(facts.get(name, "").split(" ")) != channels:
            raise ValueError(f"{name} are not {channels}")
    lines = ["tree", *(f"{name}={facts[name]}" for name in _HEAD)]
    for number, tree in enumerate(trees):
        # LightGBM finds a tree's end by an empty line.
        lines += ["", f"Tree={number}", *_checked_tree(_fields(tree), channels), "", ""]
    return "\n".join([*lines, "end of trees", "", ""])


def _fields(block: str) -> dict[str, str]:
    """What stands behind the names of a block's lines."""
    pairs = (line.partition("=") for line in block.splitlines())
    return {name: value for name, _, value in pairs}


def _checked_tree(fields: Mapping[str, str], channels: int) -> list[str]:
    leaves = int(fields.get("num_leaves", "0"))
    if not 1 <= leaves <= _MOST_LEAVES or fields.get("num_cat") != "0":
        raise ValueError("a tree has no leaves, or categories")
    if fields.get("is_linear", "0") != "0":
        raise ValueError("a tree is a linear one")
    lines = [f"num_leaves={leaves}", "num_cat=0"]
    names = _NODES if leaves > 1 else ()
    for name in names:
        kind = np.float64 if name == "threshold" else np.int64
        _numbers(fields, name, leaves - 1, kind)
        lines.append(f"{name}={fields[name]}")
    _numbers(fields, "leaf_value", leaves, np.float64)
    if names:
        _check_nodes(fields, leaves, channels)
    return [*lines, f"leaf_value={fields['leaf_value']}", "is_linear=0", "shrinkage=1"]


def _numbers(fields: Mapping[str, str], name: str, count: int, kind: Any) -> NDArray[Any]:
    try:
        numbers = np.array(fields.get(name, "").split(), dtype=kind)
    except OverflowError as error:
        raise ValueError(f"{name} has too large a number") from error
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"a tree has not {count} times {name}")
    return numbers


def _check_nodes(fields: Mapping[str, str], leaves: int, channels: int) -> None:
    """Every node and leaf must be met just once on the ways down, and only known things asked."""
    nodes = leaves - 1
    number = np.arange(nodes)
    children = []
    for name in ("left_child", "right_child"):
        child = _numbers(fields, name, nodes, np.int64)
        # A node comes after its parent, so that no way leads in a circle.
        if ((child >= 0) & (child <= number)).any():
            raise ValueError("a tree has a circle")
        children.append(child)
    met = np.sort(np.concatenate(children))
    if not np.array_equal(met, np.concatenate([np.arange(-leaves, 0), number[1:]])):
        raise ValueError("the nodes of a tree do not hang together")
    if not np.isin(_numbers(fields, "decision_type", nodes, np.int64), _NUMERIC).all():
        raise ValueError("a tree asks for categories")
    asked = _numbers(fields, "split_feature", nodes, np.int64)
    if not ((asked >= 0) & (asked < channels)).all():
        raise ValueError("a tree asks for a channel that is not there")
