"""The Python API of prediction: any source, any sink, the same engine and laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kelp.config.base import parse_bytes
from kelp.config.choices import MergeMode, Precision
from kelp.errors import BundleError, ConfigError
from kelp.inference.checks import needed_bands
from kelp.inference.network import Network
from kelp.inference.outputs import Outputs
from kelp.inference.plan import NetworkMemory, fit_memory, make_plan
from kelp.nn.bundle import Bundle
from kelp.nn.device import resolve_device, resolve_precision
from kelp.progress import Progress, silent
from kelp.raster import bands, validity
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference, decoding
from kelp.raster.scene import Scene, SceneSize
from kelp.raster.window import Blend, Shape, Tile
from kelp.tiling.engine import Engine
from kelp.tiling.jobs import Counts, Job, Sink, WriteRows
from kelp.tiling.strip import Slicing, Source

_BATCH: Final = 8
_SIDE: Final = 224  # px of the network, of crops that the batch is meant for


def predict(
    bundle: Bundle | Sequence[Bundle],
    source: Source | Path | str,
    sink: Sink | Path | str,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    blend: Blend = "hann",
    batch_size: int | None = None,
    precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tta: MergeMode | None = None,
    qa_as_nodata: bool = True,
    skip_land: bool = False,
    threshold: float | None = None,
    max_memory: int | str | None = None,
    spread: WriteRows | None = None,
    progress: Progress = silent,
) -> Counts:
    """Predict one scene, streaming from `source` to `sink`.

    Args:
        bundle: a loaded bundle, or several that are averaged.
        source: a raster file, or anything with `shape` and `read(tile)` (see `engine.Source`).
        sink: the mask's file, or anything with `write(y, rows)` and `close()`.
        tile: side of a tile in pixels, brought to the network's size as in training; default:
            the tile of the bundle's recipe, at the training's scale.
        overlap: of neighbouring tiles in pixels; default: the recipe's, or half a given tile.
        blend: window of a tile's vote.
        batch_size: crops in a batch; default: see `fitting_batch`.
        precision: number format; default: bf16-mixed where the device has it.
        device: where the network runs.
        tta: average the symmetries of the square, merged in this way (8 times the cost).
        qa_as_nodata: whether QA = 1 means not observed.
        skip_land: leave tiles out that are all land, as `--land skip` does.
        threshold: kelp where p is at least this, for a mask file; default: the bundle's.
        max_memory: bytes, or a size as in "2GB", that the process may take.
        spread: takes rows of the standard deviation of the overlapping tiles' probabilities, as
            the sink's `write` takes those of their mean.
        progress: told of tiles.

    Raises:
        KelpError: the file cannot be read, or lacks bands that the bundle needs.
    """
    if isinstance(source, Path | str):
        with Scene(Path(source)) as scene:
            return predict(
                bundle,
                scene,
                sink,
                tile=tile,
                overlap=overlap,
                blend=blend,
                batch_size=batch_size,
                precision=precision,
                device=device,
                tta=tta,
                qa_as_nodata=qa_as_nodata,
                skip_land=skip_land,
                threshold=threshold,
                max_memory=max_memory,
                spread=spread,
                progress=progress,
            )
    bundles = [bundle] if isinstance(bundle, Bundle) else list(bundle)
    if isinstance(source, Scene):
        for one in bundles:
            source.require(needed_bands(one.spec))
    where = resolve_device(device)
    bundles, shape, shared = cut(bundles, tile, overlap)
    network = Network(bundles, where, resolve_precision(precision, where), tta)
    most = batch_size or fitting_batch(bundles, shape, where.type)
    slicing = Slicing(shape, shared, blend, most, qa_as_nodata, skip_land)
    size = source.size if isinstance(source, Scene) else SceneSize(source.shape, (1, 1), 0)
    plan = make_plan([size], slicing, 0, 0)
    # Batches have one shape: filled up, the last of few tiles would cost as much as a full one.
    slicing = replace(slicing, batch_size=even_batch(plan.tiles, most))
    plan = make_plan([size], slicing, 0, 0)
    if max_memory is not None:
        try:
            budget = parse_bytes(max_memory)
        except ValueError as wrong:
            raise ConfigError(f"max_memory={max_memory!r}: {wrong}") from None
        measured = NetworkMemory.measure(network, slicing.tile, budget)
        plan = fit_memory(plan, budget, [size], slicing, measured, spread is not None)
    done = 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress("predicting", done, plan.tiles)

    slicing = replace(slicing, batch_size=plan.batch_size)
    engine = Engine(network, slicing, advance, network.allocate)
    outputs = None
    if isinstance(sink, Path | str):
        place = source.georeference if isinstance(source, Scene) else Georeference()
        kelp_from = joint_threshold(bundles, threshold)
        sink = outputs = Outputs(source.shape, place, Path(sink), kelp_from, {})
    try:
        with decoding(plan.cache):
            engine.run([Job(source, sink, spread=spread)])
        for _, error in engine.failures:
            raise error
    finally:
        if outputs:
            outputs.abandon()
    return engine.counts


def predict_array(
    bundle: Bundle | Sequence[Bundle],
    scene: NDArray[np.generic],
    *,
    names: Sequence[str] = BANDS,
    tile: int | None = None,
    overlap: int | None = None,
    blend: Blend = "hann",
    batch_size: int | None = None,
    precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tta: MergeMode | None = None,
    qa_as_nodata: bool = True,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Probabilities of an array of raw values; options as in `predict`.

    Args:
        bundle: a loaded bundle, or several that are averaged.
        scene: raw DN `(len(names), height, width)`; NaN and -32768 mean missing.
        names: the array's bands, in its order.
        tile: see `predict`, as all that follow.
        overlap: see `predict`.
        blend: see `predict`.
        batch_size: see `predict`.
        precision: see `predict`.
        device: see `predict`.
        tta: see `predict`.
        qa_as_nodata: see `predict`.
        progress: see `predict`.

    Returns:
        Probabilities `(height, width)`, float32 in [0, 1]; NaN = not observed.
    """
    bundles = [bundle] if isinstance(bundle, Bundle) else list(bundle)
    names = bands.parse_bands(names)
    absent = {name for one in bundles for name in needed_bands(one.spec)} - {*names, "DEM"}
    if absent:
        raise BundleError(f"the array lacks the bands {', '.join(sorted(absent))}")
    array = _Array(validity.canonical(scene, names))
    predict(
        bundles,
        array,
        array,
        tile=tile,
        overlap=overlap,
        blend=blend,
        batch_size=batch_size,
        precision=precision,
        device=device,
        tta=tta,
        qa_as_nodata=qa_as_nodata,
        progress=progress,
    )
    return array.probabilities


class _Array:
    """An array as a source, and as a sink of its probabilities."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self._pixels = pixels
        self.shape: Shape = (pixels.shape[1], pixels.shape[2])
        self.probabilities = np.full(self.shape, np.nan, dtype=np.float32)

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        rows, columns = tile.slices
        return self._pixels[:, rows, columns]

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        self.probabilities[y : y + len(rows)] = rows

    def close(self) -> None:
        """Nothing to do: the array is the product."""


def fitting_batch(bundles: Sequence[Bundle], tile: Shape, device: str) -> int:
    """Crops in a batch where none are wished: 8, on a CPU as many as have the pixels of that many.

    Of larger crops fewer are faster there: their activations outgrow its caches.
    """
    if device != "cpu":
        return _BATCH
    sides = [bundle.spec.network_shape(tile) for bundle in bundles]
    return max(1, min(_BATCH, _BATCH * _SIDE**2 // max(h * w for h, w in sides)))


def even_batch(tiles: int, most: int) -> int:
    """Crops in a batch, `most` at most, so that as many batches as needed are filled evenly."""
    batches = -(-tiles // most)
    return -(-tiles // batches) if batches else most


def joint_threshold(
    bundles: Sequence[Bundle], wish: float | None, weights: Sequence[float] = ()
) -> float:
    """The wish, else the (weighted) mean of the bundles' thresholds."""
    if wish is not None:
        return wish
    return float(np.average([bundle.spec.threshold for bundle in bundles], weights=weights or None))


def cut(
    bundles: Sequence[Bundle], tile: int | None, overlap: int | None
) -> tuple[list[Bundle], Shape, Shape]:
    """The networks as they are applied, and tile and overlap, `(height, width)` each.

    A wished tile is brought to the network's size as in training; without a wish, tile and
    overlap are those of the bundle's recipe, at the training's scale.
    """
    if tile is not None:
        return list(bundles), *_shapes((tile, tile), tile // 2 if overlap is None else overlap)
    shown = [
        bundle.described(bundle.spec.at_scale(bundle.spec.prediction_tile))
        if bundle.spec.prediction_tile
        else bundle
        for bundle in bundles
    ]
    # Tiles make no difference to a pixel-wise one: it goes with any.
    tiled = [bundle for bundle in shown if not bundle.spec.is_pixelwise] or shown[:1]
    ways = {(bundle.spec.tile_size, bundle.spec.prediction_overlap) for bundle in tiled}
    if len(ways) > 1:
        raise ConfigError("the bundles were trained on different tiles; give --sahi_tile_size")
    shape, shared = next(iter(ways))
    return shown, *_shapes(shape, shared if overlap is None else overlap)


def _shapes(tile: Shape, overlap: int | None) -> tuple[Shape, Shape]:
    if overlap is None:
        return tile, (tile[0] // 2, tile[1] // 2)
    if overlap >= min(tile):
        raise ConfigError(
            f"--sahi_overlap {overlap} px must be smaller than the tile, {min(tile)} px"
        )
    return tile, (overlap, overlap)
