"""MONAI, pytorch-toolbelt and tiler, each driven the quickest way it offers, on the same tiles.

    pip install monai pytorch-toolbelt tiler opencv-python-headless

A driver takes a scene in the layout its library likes and gives float32 probabilities `(h, w)`.
Their networks get and give torch tensors, as those libraries expect. Those that are not installed
are skipped.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.float32]
Predict = Callable[[Tensor], Tensor]
"""Raw DN `(n, 7, h, w)` to probabilities `(n, h, w)`."""


@dataclass(frozen=True)
class Peer:
    """A library that slices."""

    library: str
    batch: int
    mode: str
    prepare: Callable[[Pixels], Any]
    """A canonical array in the layout it likes; not part of what is timed."""
    run: Callable[[Any, Predict], Pixels]

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.library}, batch {self.batch}{self.mode}"


def installed(
    tile: int, overlap: int, batches: tuple[int, ...] = (8,), only: str = ""
) -> list[Peer]:
    """The peers that can be imported, one for each batch size and mode.

    `only` names one of them; other libraries are then not loaded.
    """
    peers: list[Peer] = []
    for library, maker in (("MONAI", _monai), ("toolbelt", _toolbelt), ("tiler", _tiler)):
        if only and not only.startswith(library):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peers += maker(tile, overlap, batches)
        except ImportError as error:
            print(f"skipped: {error}; pip install monai pytorch-toolbelt tiler opencv-python")
    return peers


def _monai(tile: int, overlap: int, batches: tuple[int, ...]) -> list[Peer]:
    slide = importlib.import_module("monai.inferers").sliding_window_inference

    def make(batch: int, buffered: bool) -> Peer:
        # Buffered along rows: fewer visits of the whole map. Needs more than one window in a row.
        extra = {"buffer_steps": 4, "buffer_dim": 0} if buffered else {}

        def run(scene: Tensor, predict: Predict) -> Pixels:
            with torch.inference_mode():
                p = slide(
                    scene,
                    (tile, tile),
                    batch,
                    lambda x: predict(x)[:, None],
                    overlap=overlap / tile,
                    mode="constant",
                    **extra,
                )
            result: Pixels = p[0, 0].numpy()
            return result

        mode = ", buffered" if buffered else ""
        return Peer("MONAI", batch, mode, lambda x: torch.from_numpy(x)[None], run)

    return [make(batch, buffered) for batch in batches for buffered in (False, True)]


def _toolbelt(tile: int, overlap: int, batches: tuple[int, ...]) -> list[Peer]:
    tiles = importlib.import_module("pytorch_toolbelt.inference.tiles")

    def make(batch: int) -> Peer:
        def run(scene: Pixels, predict: Predict) -> Pixels:
            slicer = tiles.ImageSlicer(scene.shape[:2], tile, tile - overlap)
            merger = tiles.TileMerger(slicer.target_shape, 1, slicer.weight)
            waiting: list[tuple[Pixels, Any]] = []

            def flush() -> None:
                crops = np.stack([crop for crop, _ in waiting])
                p = predict(torch.from_numpy(crops).permute(0, 3, 1, 2))
                merger.integrate_batch(p[:, None], [place for _, place in waiting])
                waiting.clear()

            with torch.inference_mode():
                # Mirrored: OpenCV pads no more than four bands with a constant.
                for waited in slicer.iter_split(scene, border_type=4):
                    waiting.append(waited)
                    if len(waiting) == batch:
                        flush()
                if waiting:
                    flush()
                merged = merger.merge_()[0].numpy()
            result: Pixels = slicer.crop_to_orignal_size(merged)
            return result

        def by_pixel(scene: Pixels) -> Pixels:
            return np.ascontiguousarray(scene.transpose(1, 2, 0))

        return Peer("toolbelt", batch, "", by_pixel, run)

    return [make(batch) for batch in batches]


def _tiler(tile: int, overlap: int, batches: tuple[int, ...]) -> list[Peer]:
    library = importlib.import_module("tiler")

    def make(batch: int) -> Peer:
        def run(scene: Pixels, predict: Predict) -> Pixels:
            bands, height, width = scene.shape
            cut = library.Tiler(
                (bands, height, width),
                (bands, tile, tile),
                (0, overlap, overlap),
                channel_dimension=0,
                mode="reflect",
            )
            out = library.Tiler((height, width), (tile, tile), (overlap, overlap))
            merger = library.Merger(out, save_visits=False)
            with torch.inference_mode():
                for number, crops in cut.iterate(scene, batch_size=batch):
                    p = predict(torch.from_numpy(np.ascontiguousarray(crops)))
                    merger.add_batch(number, batch, p.numpy())
            result: Pixels = merger.merge(unpad=True, dtype=np.float32)
            return result

        return Peer("tiler", batch, "", lambda x: x, run)

    return [make(batch) for batch in batches]
