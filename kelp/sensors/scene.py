"""Scenes with what lies beside their pixels: quality layers, masks, elevation, polygons, facts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.windows import Window

from kelp.errors import InputError
from kelp.io import remote
from kelp.io.location import Url
from kelp.raster import bands
from kelp.raster.bands import OPTICAL
from kelp.raster.masks import quietly
from kelp.raster.scene import Scene, SceneSize, Stored
from kelp.raster.validity import MaskBands
from kelp.raster.window import Shape, Tile
from kelp.sensors.aoi import Polygons
from kelp.sensors.elevation import Elevation
from kelp.sensors.parts import SceneFiles, digest_of, open_headers, vrt_of, without_secrets
from kelp.sensors.quality import CloudMask, Policy, Shares
from kelp.sensors.record import (
    AreaFacts,
    ElevationFacts,
    Grid,
    QualityFacts,
    SceneFacts,
    Source,
)

Layers = Mapping[str, NDArray[np.integer[Any]]]

_ROWS: Final = 64
_COLUMNS: Final = 4096


class SensorScene(Scene):
    """A scene as a canonical array, read by windows: a raster, or a product of a satellite.

    Made by `kelp.sensors.open_scene`. A context manager.

    Args:
        path: the raster, folder, archive or item.
        facts: what is known of it, without its sources.
        dataset: its pixels, opened.
        band_order: names of a raster's bands.
        files: of a product: which file holds what.
        policy: which quality flags count; None = the QA band of a raster decides.
        layers: the product's quality layers as one dataset, in the order of `files.layers`.
        given_bits: of a raster with Landsat's QA_PIXEL: the bits that count.
    """

    def __init__(
        self,
        path: Path | Url,
        facts: SceneFacts,
        dataset: Any = None,
        band_order: Sequence[str] = (),
        files: SceneFiles | None = None,
        policy: Policy | None = None,
        layers: Any = None,
        given_bits: int | None = bands.QA_PIXEL_BAD,
    ) -> None:
        super().__init__(path, band_order, dataset)
        self._stack = ExitStack()
        self.known = facts
        """What is known of the scene without reading its files."""
        self._files = files
        self._policy = policy
        self._layers = layers
        self._ignore_qa = given_bits is None
        self.qa_bits = given_bits or 0
        self._cloud_mask: CloudMask | None = None
        self._elevation: Elevation | None = None
        self.area: Polygons | None = None
        """The area of interest; None = all."""
        self._layer_masks: MaskBands | None = None
        if layers is not None and files is not None and policy is not None:
            self._stack.callback(layers.close)
            self.names = (*self.names, "QA")
            known = list(files.layers)
            self._layer_masks = MaskBands(layers, [known.index(n) + 1 for n in policy.layers])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        super().__exit__(kind, error, trace)

    @property
    def size(self) -> SceneSize:
        """What reading it will take."""
        size = super().size
        if self._layers is None:
            return size
        blocks = [size.block, *self._layers.block_shapes]
        block = Shape(*(max(sides) for sides in zip(*blocks, strict=True)))
        stored = sum(np.dtype(kind).itemsize for kind in self._layers.dtypes)
        return SceneSize(size.shape, block, size.stored + stored)

    @property
    def reading(self) -> dict[str, object]:
        """How the stored values are understood."""
        found: dict[str, object] = dict(super().reading)
        if self._policy is not None:
            found["quality"] = self._policy.bad
        elif self._ignore_qa or self.qa_bits != bands.QA_PIXEL_BAD:
            found["quality"] = None if self._ignore_qa else self.qa_bits
        if self._files is not None:
            found["scale"] = [self._files.gain, self._files.offset]
        if self._elevation is not None:
            found["sea_where_absent"] = self._elevation.sea_where_absent
        return found

    def add_elevation(self, elevation: Elevation) -> None:
        """Take the elevation from elsewhere."""
        self._elevation = elevation
        self._stack.callback(elevation.close)
        if "DEM" not in self.names:
            self.names = (*self.names, "DEM")

    def add_cloud_mask(self, mask: CloudMask) -> None:
        """Pixels that a mask takes for cloud are bad, too."""
        self._cloud_mask = mask
        self._stack.callback(mask.close)
        if "QA" not in self.names:
            self.names = (*self.names, "QA")

    def read(self, tile: Tile | None = None) -> NDArray[np.float32]:
        """Read a window that lies inside the scene (default: all) as a canonical array."""
        window = tile or Tile(0, 0, *self.shape)
        try:
            out = super().read(window)
            bad = self._bad(window)
        except InputError as error:
            raise self._named(window, error) from error
        if self._files is not None and (self._files.gain, self._files.offset) != (1.0, 0.0):
            optical = out[: len(OPTICAL)]
            optical *= np.float32(self._files.gain)
            optical += np.float32(self._files.offset)
        if self._ignore_qa:
            out[bands.QA] = 0
        if bad is not None:
            out[bands.QA] = np.maximum(out[bands.QA], bad)
        if self._elevation is not None:
            out[bands.DEM] = self._elevation.read(window)
        return out

    def sample(self, side: int) -> NDArray[np.float32]:
        """As of any scene, but for an elevation from elsewhere: a few windows of it take long."""
        elevation, self._elevation = self._elevation, None
        try:
            return super().sample(side)
        finally:
            self._elevation = elevation

    def read_elevation(self, tile: Tile) -> NDArray[np.float32]:
        """The elevation of a window: metres, NaN = unknown, shape `(height, width)`."""
        if self._elevation is not None:
            return self._elevation.read(tile)
        return super().read_elevation(tile)

    def share_elevation(self) -> Elevation | None:
        """The elevation from elsewhere, for another thread, also once this scene is closed."""
        return self._elevation.shared() if self._elevation else None

    def read_stored(self) -> Stored:
        """The whole scene as stored and as a canonical array; of a product both are the latter."""
        if self._files is None and self._elevation is None and self._cloud_mask is None:
            return super().read_stored()
        pixels = self.read()
        return Stored(pixels, None, pixels)

    def _bad(self, window: Tile) -> NDArray[np.bool_] | None:
        """Where the quality layers or a mask say that a pixel is bad; None = nothing says so."""
        bad = None
        if self._policy is not None and self._policy.layers:
            bad = self._policy.decide(self._read_layers(window, self._policy.layers))
        hidden = self._hidden(window)
        if bad is None or hidden is None:
            return hidden if bad is None else bad
        return bad | hidden

    def _hidden(self, window: Tile) -> NDArray[np.bool_] | None:
        """Where a cloud mask says bad, or a mask of a quality layer's own that it is unknown."""
        cloud = self._cloud_mask.read(window) if self._cloud_mask else None
        if self._layer_masks is None or not self._layer_masks.present:
            return cloud
        with quietly(self.path):
            planes = self._layer_masks.missing(window.window)
        unknown: NDArray[np.bool_] = np.any(planes, axis=0)
        return unknown if cloud is None else unknown | cloud

    def _read_layers(self, window: Tile, names: Sequence[str]) -> Layers:
        known = list(self._files.layers) if self._files else []
        indexes = [known.index(name) + 1 for name in names]
        with quietly(self.path):
            values = self._layers.read(indexes, window=window.window)
        return dict(zip(names, values, strict=True))

    def _named(self, window: Tile, error: InputError) -> InputError:
        """An error of reading by the file that could not be read."""
        if self._files is None:
            return error
        parts = {**self._files.bands, **self._files.layers}
        for part in parts.values():
            try:
                with rasterio.open(part.gdal) as opened:
                    scale = opened.height / self.shape[0], opened.width / self.shape[1]
                    opened.read(1, window=_scaled(window, scale))
            except RasterioError as reason:
                text = " ".join(str(reason).split())
                return InputError(
                    f"{self.path}: {part.href} cannot be read ({text}); the file may be truncated, "
                    "fetch it again"
                )
        return error

    @cached_property
    def digest(self) -> str:
        """Stands for the content of everything that pixels are read from."""
        extra = [*self._other_sources()]
        if self._files is None and not extra:
            return _only(self.sources)
        return digest_of([*self.sources, *extra])

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files of the scene, each with its hash. Reads them all, once."""
        if self._files is None:
            if isinstance(self.path, Url):
                found = remote.look(self.path)
                href, tag = without_secrets(str(self.path)), found.identity
                return (Source(role="scene", href=href, etag=tag, size=found.size),)
            return (Source.of_file("scene", self.path),)
        return tuple(part.source() for part in self._files.parts)

    def _other_sources(self) -> list[Source]:
        found = list(self._elevation.sources) if self._elevation else []
        if self._cloud_mask:
            found.append(self._cloud_mask.source)
        if self.area:
            found.append(self.area.source)
        return found

    @property
    def facts(self) -> SceneFacts:
        """What is known of the scene, its sources with their hashes."""
        return self.known.model_copy(update={"sources": self.sources})

    @property
    def grid(self) -> Grid:
        """The scene's pixels, for the record."""
        crs, affine = self.georeference.crs, self.georeference.transform
        code = crs.to_epsg() if crs else None
        text = f"EPSG:{code}" if code else crs.to_wkt() if crs else None
        return Grid(shape=self.shape, crs=text, transform=tuple(affine)[:6] if affine else None)

    @property
    def quality(self) -> QualityFacts:
        """What counts as bad, and, from a pass over the quality layers, how much of it there is.

        With an area of interest, how much of that; nothing is read outside.
        """
        shares = Shares()
        for window, inside in self._wanted():
            if self._layers is not None and self._policy is not None and self._files is not None:
                layers = self._read_layers(window, tuple(self._files.layers))
                hidden = self._hidden(window)
                self._policy.count(
                    {name: values[inside] for name, values in layers.items()},
                    shares,
                    None if hidden is None else hidden[inside],
                )
            else:
                bad = self.read(window)[bands.QA][inside] == 1
                shares.pixels += bad.size
                shares.bad += int(np.count_nonzero(bad))
        return QualityFacts(
            policy=self.policy,
            cloud_mask=self.cloud_mask,
            over="scene" if self.area is None else "area",
            share=shares.share,
            bad_share=shares.bad_share,
        )

    def _wanted(self) -> Iterator[tuple[Tile, Any]]:
        """The scene, or its area of interest, in windows, with the pixels that count in each."""
        for window in windows_of(self.area.reached if self.area else Tile(0, 0, *self.shape)):
            if self.area is None:
                yield window, ...
                continue
            inside = self.area.mask(window)
            columns = np.flatnonzero(inside.any(axis=0))
            if len(columns):
                left, right = int(columns[0]), int(columns[-1]) + 1
                part = Tile(window.y, window.x + left, window.height, right - left)
                yield part, inside[:, left:right]

    @property
    def cloud_mask(self) -> Source | None:
        """The mask that was given for it."""
        return self._cloud_mask.source if self._cloud_mask else None

    @property
    def policy(self) -> tuple[str, ...]:
        """Names of the quality bits that count."""
        if self._policy is not None:
            return self._policy.bad
        return ("QA",) if "QA" in self.names and not self._ignore_qa else ()

    @property
    def elevation(self) -> ElevationFacts | None:
        """Where the elevation comes from; None = from the scene's own band, or from nowhere."""
        return self._elevation.facts if self._elevation else None

    @property
    def area_facts(self) -> AreaFacts | None:
        """The area of interest."""
        return AreaFacts(source=self.area.source, share=self.area.share) if self.area else None


def _scaled(window: Tile, scale: tuple[float, float]) -> Window:
    down, across = scale
    return Window(window.x * across, window.y * down, window.width * across, window.height * down)


def _only(sources: Sequence[Source]) -> str:
    """The digest of a single raster, the same as that of kelp before it read products."""
    source = sources[0]
    return source.sha256 or hashlib.sha256((source.etag or "").encode()).hexdigest()


def windows_of(tile: Tile) -> Iterator[Tile]:
    """A window in smaller ones, row by row from the top: few of its rows are in memory at once."""
    for y in range(tile.y, tile.bottom, _ROWS):
        for x in range(tile.x, tile.right, _COLUMNS):
            yield Tile(y, x, min(_ROWS, tile.bottom - y), min(_COLUMNS, tile.right - x))


def open_product(files: SceneFiles, choose: Callable[[SceneFiles], Policy]) -> SensorScene:
    """Open a product of a satellite.

    Args:
        files: which file holds what.
        choose: the policy of quality for it.

    Raises:
        InputError: a file is missing, cannot be read, or lies on another grid.
    """
    policy = choose(files)
    headers = open_headers(files, tuple(files.layers))
    masks = {part.href: part for header in headers.values() for part in header.masks}
    files = replace(files, masks=tuple(masks.values()))
    pixels = vrt_of(files, OPTICAL, headers, files.nodata)
    with ExitStack() as stack, quietly(files.where):
        dataset = stack.enter_context(rasterio.open(pixels))
        layers = None
        if files.layers:
            layers = rasterio.open(vrt_of(files, tuple(files.layers), headers, None))
            stack.callback(layers.close)
        scene = SensorScene(files.where, files.facts, dataset, (), files, policy, layers)
        stack.pop_all()
    return scene
