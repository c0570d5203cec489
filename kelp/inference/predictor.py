"""One object that predicts: networks, slicing, guards, and the Python functions around it.

`kelp predict`, `kelp.predict`, `kelp.predict_array` and the workers of a cluster are loops around
`Predictor`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

import kelp
from kelp.config import PredictConfig
from kelp.config.base import parse_bytes
from kelp.config.choices import MergeMode, Precision
from kelp.config.scenes import SceneOptions
from kelp.errors import BundleError, ConfigError
from kelp.inference.backends import (
    SHAPE_KEEPING,
    SYMMETRIES,
    Backend,
    DeviceName,
    Pixels,
    Processor,
)
from kelp.inference.bundle import Bundle
from kelp.inference.checks import check_scale, needed_bands
from kelp.inference.guard import GuardLimits
from kelp.inference.outputs import Outputs
from kelp.inference.plan import NetworkMemory, fit_memory, make_plan
from kelp.progress import Progress, silent
from kelp.raster import bands, validity
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference, decoding
from kelp.raster.scene import Scene, SceneSize
from kelp.raster.water import Anchored
from kelp.raster.window import Blend, RasterSource, Shape, Tile
from kelp.sensors import open_scene
from kelp.tiling.engine import Counts, Engine, Job, Sink, WriteRows
from kelp.tiling.strip import Area, Slicing

log = logging.getLogger("kelp")

_BATCH: Final = 8
_SIDE: Final = 224  # px of the network, of crops that the batch is meant for
_LEAST: Final = np.float32(1e-12)


class Options(TypedDict, total=False):
    """How scenes are predicted: keywords of `kelp.predict` and `kelp.predict_array`."""

    tile: int | None
    """Side of a tile in pixels, brought to the network's size as in training; default: the tile
    of the bundle's recipe, at the training's scale."""
    overlap: int | None
    """Of neighbouring tiles in pixels; default: the recipe's, or half a given tile."""
    blend: Blend
    """Window of a tile's vote; default: `hann`."""
    batch_size: int | None
    """Crops in a batch; default: see `fitting_batch`."""
    precision: Precision | None
    """Number format; default: bf16-mixed where the device has it."""
    device: DeviceName
    """Where the network runs; default: `auto`."""
    threads: int | None
    """Of the network; default: as many as its runtime takes."""
    tta: MergeMode | None
    """Average the symmetries of the square, merged in this way (8 times the cost)."""
    weights: Sequence[float]
    """Of several bundles, in their order; default: equal."""
    qa_as_nodata: bool
    """Whether QA = 1 means not observed; default: it does."""
    skip_land: bool
    """Leave tiles out that are all land, as `--land skip` does."""
    land_tolerance: int
    """With `skip_land`: with water this near, px, a tile counts as water; default: 3."""


def _default(name: str) -> Any:
    """Of an option of `kelp predict`: declared there, once."""
    return PredictConfig.model_fields[name].default


class Predictor:
    """Networks with everything that their maps depend on, applied to any number of scenes.

    A callable on batches, as the sliced engine wants it: raw DN `(n, 7, h, w)` to probabilities
    `(n, h, w)`. Several bundles are averaged, by `weights` if given. With `tta` each sees the 8
    symmetries of the square (4 where tiles are not square), merged as probabilities.

    Args:
        bundles: the networks.
        threshold: kelp where p is at least this; default: the (weighted) mean of the bundles'.
        processor: what the networks run on, where that is settled.
        options: see `Options`.

    Raises:
        ConfigError: options that contradict each other or the bundles, or no such device.
    """

    def __init__(
        self,
        bundles: Bundle | Sequence[Bundle],
        *,
        threshold: float | None = None,
        processor: Processor | None = None,
        **options: Unpack[Options],
    ) -> None:
        given = [bundles] if isinstance(bundles, Bundle) else list(bundles)
        self.weights = tuple(options.get("weights", ()))
        if self.weights and len(self.weights) != len(given):
            raise ConfigError(f"--weights: {len(self.weights)} weights for {len(given)} networks")
        self.tta = options.get("tta")
        self.bundles, tile, overlap = sliced(given, options.get("tile"), options.get("overlap"))
        # torch, if one of them needs it, says for all what they run on.
        self._main = min(self.bundles, key=lambda bundle: bundle.net.runtime != "torch")
        self.processor = processor or self._main.net.processor(
            options.get("device", _default("device")),
            options.get("precision"),
            options.get("threads"),
        )
        self.threshold = float(
            np.average([b.spec.threshold for b in given], weights=self.weights or None)
            if threshold is None
            else threshold
        )
        self.slicing = Slicing(
            tile,
            overlap,
            options.get("blend", _default("blend")),
            options.get("batch_size") or fitting_batch(self.bundles, tile, self.processor.device),
            options.get("qa_as_nodata", _default("qa_as_nodata")),
            options.get("skip_land", False),
            options.get("land_tolerance", _default("land_tolerance")),
        )
        ways = {
            (b.spec.anchoring, b.spec.anchoring != "none" and b.spec.water_levels) for b in given
        }
        if len(ways) > 1:
            raise ConfigError(
                "the bundles expect scenes anchored in different ways (anchoring, water_levels of "
                "bundle.json); predict with each alone, and average the maps with kelp ensemble"
            )
        self.cache = 0
        """Bytes for decoded blocks of scenes; see `plan`."""

    @classmethod
    def of(
        cls,
        config: PredictConfig,
        bundles: Sequence[Bundle],
        processor: Processor | None = None,
    ) -> Self:
        """The predictor of a configuration."""
        return cls(
            bundles,
            threshold=config.decision_threshold,
            processor=processor,
            tile=config.sahi_tile_size,
            overlap=config.sahi_overlap,
            blend=config.blend,
            batch_size=config.batch_size,
            precision=config.precision,
            device=config.device,
            threads=config.threads,
            tta=config.tta_merge_mode if config.tta else None,
            weights=config.weights,
            qa_as_nodata=config.qa_as_nodata,
            skip_land=config.land != "keep",
            land_tolerance=config.land_tolerance,
        )

    # What is known before a scene is seen

    @property
    def passes(self) -> int:
        """How often a tile is run through each network."""
        return len(self._symmetries(self.slicing.tile))

    @property
    def network_pixels(self) -> int:
        """What all networks and symmetries see of a tile, in their own pixels."""
        shapes = [bundle.spec.network_shape(self.slicing.tile) for bundle in self.bundles]
        return self.passes * sum(height * width for height, width in shapes)

    def settings(self) -> dict[str, Any]:
        """What changes the pixels of a map, beside the scene and the threshold.

        Not the number of threads, the size of a batch or the device: they move the last bits of
        a probability only (see `exact_settings`).
        """
        slicing = self.slicing
        return {
            "version": kelp.__version__,
            "networks": [
                [bundle.net.runtime, bundle.spec.weights_sha256, bundle.spec.network()]
                for bundle in self.bundles
            ],
            "weights": self.weights,
            "precision": self.processor.precision,
            "tta": self.tta,
            "tile": slicing.tile,
            "overlap": slicing.overlap,
            "blend": slicing.blend,
            "qa_as_nodata": slicing.qa_as_nodata,
            "land": slicing.skip_land and slicing.land_tolerance,
        }

    def exact_settings(self) -> dict[str, Any]:
        """What changes a bit of a probability: parts of one scene must agree in it."""
        processor = self.processor
        return self.settings() | {
            "batch_size": self.slicing.batch_size,
            "processor": [processor.device, processor.threads, processor.versions],
        }

    def plan(self, batch_size: int, cache: int) -> None:
        """Take over what a plan decided, before the first scene."""
        self.slicing = replace(self.slicing, batch_size=batch_size)
        self.cache = cache
        vars(self).pop("_engine", None)

    # Guards

    def check_bands(self, scene: Scene) -> None:
        """Raise `InputError` where a scene lacks bands that a network needs."""
        for bundle in self.bundles:
            scene.require(needed_bands(bundle.spec))

    def check_scale(self, source: RasterSource, name: str) -> None:
        """Raise `InputError` where a scene's values are on another scale than the networks know."""
        check_scale(source, [bundle.spec for bundle in self.bundles], name)

    def anchored(self, source: RasterSource, name: str) -> RasterSource:
        """A scene as the networks know scenes: its clear water at the levels of their training.

        Where they are trained so, it is read once for that, some rows at a time; with an area of
        interest no more than what lies around its tiles. A scene without clear water is left as it
        is, which is one line of notice.
        """
        spec = self._main.spec
        if spec.anchoring == "none":
            return source
        area: Area | None = getattr(source, "area", None)
        windows = self.slicing.windows(source.shape, area) if area else None
        reference = spec.reference(source, windows)
        if reference.fallback:
            log.warning("%s: %s", name, reference.fallback)
        return Anchored(source, reference)

    @property
    def limits(self) -> GuardLimits | None:
        """What the maps look like elsewhere; of several networks nobody knows."""
        return self._main.spec.guard if len(self.bundles) == 1 else None

    # The networks

    @cached_property
    def _backends(self) -> list[Backend]:
        """Built when the first tile needs them."""
        return [bundle.on(self.processor) for bundle in self.bundles]

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """An array for a batch."""
        return self._main.on(self.processor).allocate(shape)

    def __call__(self, raw: Pixels) -> Pixels:
        """Probabilities of one batch."""
        symmetries = self._symmetries(raw.shape[-2:])
        share = np.array(self.weights or [1.0] * len(self.bundles))
        # In float64 any number of equal networks is one of them, to the last bit of float32.
        total = np.zeros((len(raw), *raw.shape[-2:]))
        for backend, weight in zip(self._backends, (share / share.sum()).tolist(), strict=True):
            total += weight * self._merged(backend.probabilities(raw, symmetries))
        return total.astype(np.float32)

    def _symmetries(self, tile: Sequence[int]) -> tuple[int, ...]:
        if self.tta is None:
            return SYMMETRIES[:1]
        return SYMMETRIES if tile[0] == tile[1] else SHAPE_KEEPING

    def _merged(self, views: Pixels) -> Pixels:
        """One answer of those to the symmetries."""
        merged: Pixels
        match self.tta:
            case None:
                merged = views[0]
            case "mean":
                merged = views.mean(axis=0)
            case "max":
                merged = views.max(axis=0)
            case "min":
                merged = views.min(axis=0)
            case "gmean":
                logs = np.log(np.maximum(views, _LEAST), dtype=np.float64)
                merged = np.exp(logs.mean(axis=0)).astype(np.float32)
        return merged

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self, self.slicing, allocate=self.allocate)

    def engine(self, tiles_done: Callable[[int], None] | None = None) -> Engine:
        """The engine, which has done nothing yet; its buffers are kept from scene to scene."""
        self._engine.reset(tiles_done)
        return self._engine

    def predict(
        self,
        source: RasterSource,
        sink: Sink | Path,
        *,
        max_memory: int | None = None,
        spread: WriteRows | None = None,
        progress: Progress = silent,
    ) -> Counts:
        """Predict one scene; see `kelp.predict`."""
        name = str(source.path) if isinstance(source, Scene) else "the array"
        if isinstance(source, Scene):
            self.check_bands(source)
        self.check_scale(source, name)
        size = source.size if isinstance(source, Scene) else SceneSize(source.shape, Shape(1, 1), 0)
        # Batches have one shape: filled up, the last of few tiles would cost as much as a full one.
        tiles = len(self.slicing.grid(source.shape))
        even = replace(self.slicing, batch_size=even_batch(tiles, self.slicing.batch_size))
        plan = make_plan([size], even, self.network_pixels, 0)
        if max_memory is not None:
            measured = NetworkMemory.measure(self, even.tile, max_memory)
            plan = fit_memory(plan, max_memory, [size], even, measured, spread is not None)
        done = 0

        def advance(tiles: int) -> None:
            nonlocal done
            done += tiles
            progress("predicting", done, plan.tiles)

        slicing = replace(even, batch_size=plan.batch_size)
        engine = Engine(self, slicing, advance, self.allocate)
        outputs = None
        if isinstance(sink, Path):
            place = source.georeference if isinstance(source, Scene) else Georeference()
            sink = outputs = Outputs(source.shape, place, sink, self.threshold, {})
        try:
            with decoding(plan.cache):
                engine.run([Job(self.anchored(source, name), sink, spread=spread)])
            for _, error in engine.failures:
                raise error
        finally:
            if outputs:
                outputs.abandon()
        return engine.counts


def predict(
    bundle: Bundle | Sequence[Bundle],
    source: RasterSource | Path | str,
    sink: Sink | Path | str,
    *,
    threshold: float | None = None,
    band_order: Sequence[str] = (),
    max_memory: int | str | None = None,
    spread: WriteRows | None = None,
    progress: Progress = silent,
    **options: Unpack[Options],
) -> Counts:
    """Predict one scene, streaming from `source` to `sink`.

    Args:
        bundle: a loaded bundle, or several that are averaged.
        source: a scene (see `kelp.sensors.open_scene`), or anything with `shape` and
            `read(tile)` (see `kelp.raster.window.RasterSource`).
        sink: the mask's file, or anything with `write(y, rows)` and `close()`.
        threshold: kelp where p is at least this, for a mask file; default: the bundle's.
        band_order: names of the file's bands, where it does not tell.
        max_memory: bytes, or a size as in "2GB", that the process may take.
        spread: takes rows of the standard deviation of the overlapping tiles' probabilities, as
            the sink's `write` takes those of their mean.
        progress: gets the number of tiles.
        options: tile, overlap, blend, device, precision … (see `Options`).

    Raises:
        KelpError: the file cannot be read, lacks bands that the bundle needs, or its values are on
            another scale than the bundle was trained on.
    """
    try:
        budget = None if max_memory is None else parse_bytes(max_memory)
    except ValueError as wrong:
        raise ConfigError(f"max_memory={max_memory!r}: {wrong}") from None
    predictor = Predictor(bundle, threshold=threshold, **options)
    target = Path(sink) if isinstance(sink, str) else sink
    run = partial(predictor.predict, max_memory=budget, spread=spread, progress=progress)
    if isinstance(source, Path | str):
        with open_scene(Path(source), SceneOptions(band_order=tuple(band_order))) as scene:
            return run(scene, target)
    return run(source, target)


def predict_array(
    bundle: Bundle | Sequence[Bundle],
    scene: NDArray[np.generic],
    *,
    names: Sequence[str] = BANDS,
    progress: Progress = silent,
    **options: Unpack[Options],
) -> NDArray[np.float32]:
    """Probabilities of an array of raw values.

    Args:
        bundle: a loaded bundle, or several that are averaged.
        scene: raw DN `(len(names), height, width)`; NaN and -32768 mean missing.
        names: the array's bands, in its order.
        progress: gets the number of tiles.
        options: tile, overlap, blend, device, precision … (see `Options`).

    Returns:
        Probabilities `(height, width)`, float32 in [0, 1]; NaN = not observed.

    Raises:
        KelpError: the array lacks bands that the bundle needs, or its values are on another scale
            than the bundle was trained on.
    """
    predictor = Predictor(bundle, **options)
    names = bands.parse_bands(names)
    needed = {name for one in predictor.bundles for name in needed_bands(one.spec)}
    if absent := needed - {*names, "DEM"}:
        raise BundleError(f"the array lacks the bands {', '.join(sorted(absent))}")
    array = _Array(validity.canonical(scene, names))
    predictor.predict(array, array, progress=progress)
    return array.probabilities


class _Array:
    """An array as a source, and as a sink of its probabilities."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self._pixels = pixels
        self.shape = Shape.of(pixels)
        self.probabilities = np.full(self.shape, np.nan, dtype=np.float32)

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        rows, columns = tile.slices
        return self._pixels[:, rows, columns]

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        self.probabilities[y : y + len(rows)] = rows

    def close(self) -> None:
        """Nothing to do: the array is the product."""


def fitting_batch(bundles: Sequence[Bundle], tile: Shape, device: str) -> int:
    """Crops in a batch by default: 8, on a CPU as many as have the pixels of that many.

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


def sliced(
    bundles: Sequence[Bundle], tile: int | None, overlap: int | None
) -> tuple[list[Bundle], Shape, Shape]:
    """The networks as they are applied, and tile and overlap, `(height, width)` each.

    A given tile is brought to the network's size as in training; without one, tile and overlap are
    those of the bundle's recipe, at the training's scale.
    """
    if tile is not None:
        return list(bundles), *_shapes(Shape(tile, tile), tile // 2 if overlap is None else overlap)
    shown = [
        bundle.described(bundle.spec.at_scale(bundle.spec.prediction_tile))
        if bundle.spec.prediction_tile
        else bundle
        for bundle in bundles
    ]
    # Tiles make no difference to a pixel-wise one: it goes with any.
    tiled = [bundle for bundle in shown if not bundle.spec.is_pixelwise] or shown[:1]
    recipes = {(bundle.spec.tile_size, bundle.spec.prediction_overlap) for bundle in tiled}
    if len(recipes) > 1:
        raise ConfigError("the bundles were trained on different tiles; give --sahi_tile_size")
    shape, shared = next(iter(recipes))
    return shown, *_shapes(Shape(*shape), shared if overlap is None else overlap)


def _shapes(tile: Shape, overlap: int | None) -> tuple[Shape, Shape]:
    if overlap is None:
        return tile, Shape(tile.height // 2, tile.width // 2)
    return tile, Shape(overlap, overlap)
