"""Prediction of arrays: the same engine and laws, without files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kelp import bands
from kelp.bands import BANDS
from kelp.config.train import Precision
from kelp.errors import BundleError, ConfigError
from kelp.grid import Shape, Tile, TileGrid
from kelp.merge import Blend
from kelp.nn.bundle import Bundle
from kelp.nn.device import resolve_device, resolve_precision
from kelp.nn.inference.checks import needed_bands
from kelp.nn.inference.engine import Engine, Slicing
from kelp.nn.inference.network import Network
from kelp.progress import Progress, silent


def predict_array(
    bundle: Bundle | Sequence[Bundle],
    scene: NDArray[np.generic],
    *,
    names: Sequence[str] = BANDS,
    tile: int | None = None,
    overlap: int | None = None,
    blend: Blend = "mean",
    batch_size: int = 8,
    precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    qa_as_nodata: bool = True,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Probabilities of an array of raw values.

    Args:
        bundle: a loaded bundle, or several that are averaged.
        scene: raw DN `(len(names), height, width)`; NaN and -32768 mean missing.
        names: the array's bands, in its order.
        tile: side of a tile in pixels; default: as trained.
        overlap: of neighbouring tiles in pixels; default: half a tile.
        blend: window of a tile's vote.
        batch_size: crops in a batch.
        precision: number format; default: bf16-mixed where the device has it.
        device: where the network runs.
        qa_as_nodata: whether QA = 1 means not observed.
        progress: told of tiles.

    Returns:
        Probabilities `(height, width)`, float32 in [0, 1]; NaN = not observed.
    """
    bundles = [bundle] if isinstance(bundle, Bundle) else list(bundle)
    pixels = bands.canonical(scene, names)
    absent = {name for b in bundles for name in needed_bands(b.spec)} - set(names) - {"DEM"}
    if absent:
        raise BundleError(f"the array lacks the bands {', '.join(sorted(absent))}")
    where = resolve_device(device)
    network = Network(bundles, where, resolve_precision(precision, where))
    shape, shared = tile_shape(bundles, tile, overlap)
    slicing = Slicing(shape, shared, blend, batch_size, qa_as_nodata)
    source = _ArraySource(pixels)
    sink = _ArraySink(np.full(source.shape, np.nan, dtype=np.float32))
    total, done = len(TileGrid(source.shape, shape, shared)), 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress("predicting", done, total)

    engine = Engine(network, slicing, advance)
    engine.run(source, sink)
    engine.finish()
    return sink.probabilities


@dataclass
class _ArraySource:
    pixels: NDArray[np.float32]

    @property
    def shape(self) -> Shape:
        return self.pixels.shape[1], self.pixels.shape[2]

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        rows, columns = tile.slices
        return self.pixels[:, rows, columns]


@dataclass
class _ArraySink:
    probabilities: NDArray[np.float32]

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        self.probabilities[y : y + len(rows)] = rows

    def close(self) -> None:
        """Nothing to do: the array is the product."""


def tile_shape(
    bundles: Sequence[Bundle], tile: int | None, overlap: int | None
) -> tuple[Shape, Shape]:
    """Tile and overlap, `(height, width)` each: the wish, else as trained and half of it."""
    trained = {bundle.spec.tile_size for bundle in bundles}
    if tile is None and len(trained) > 1:
        raise ConfigError("the bundles were trained on different tiles; give --sahi_tile_size")
    shape = (tile, tile) if tile is not None else next(iter(trained))
    if overlap is None:
        return shape, (shape[0] // 2, shape[1] // 2)
    return shape, (overlap, overlap)
