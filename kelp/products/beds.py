"""`kelp beds`: the kelp of maps as polygons, one a bed, with figures.

A bed is a connected patch of kelp pixels. Rasters are read by strips: memory grows with the width
of a map and the number of its beds, not with its height.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import rasterio
import rasterio.features
from numpy.typing import NDArray
from rasterio.windows import Window
from scipy import ndimage, sparse

from kelp.config.products import BedsConfig
from kelp.errors import ConfigError, InputError
from kelp.io.files import atomic, output_folder, scratch_folder
from kelp.products.maps import Map, find_maps, require, require_comparable, trusted
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import decoding, quietly, read_probability
from kelp.raster.window import Tile

AROUND: Final = 3
"""`observed_share` looks at pixels this near to a bed."""

_CACHE: Final = 64_000_000
"""Bytes of blocks that GDAL keeps; its own default is a share of the machine's memory."""

_METRES_PER_DEGREE: Final = 111_700
"""Of latitude, where they are longest."""

DRIVERS: Final = {".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".geojson": "GeoJSON", ".parquet": ""}

COLUMNS: Final = (
    "bed_id",
    "scene_id",
    "acquired",
    "sensor",
    "pixels",
    "presence_area_m2",
    "expected_area_m2",
    "mean_p",
    "max_p",
    "spread",
    "observed_share",
    "touches_edge",
    "touches_unobserved",
    "threshold",
    "network",
)


@dataclass(frozen=True)
class Beds:
    """What `beds` wrote: the file, how many maps and beds, and their areas in square metres."""

    path: Path
    maps: int
    beds: int
    pixels: int
    presence_area_m2: float

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"wrote {self.path}: {self.beds} bed{'s' * (self.beds != 1)} of "
            f"{self.maps} map{'s' * (self.maps != 1)}, "
            f"{self.presence_area_m2 / 1e6:.3f} km2 ({self.pixels} pixels, an upper bound)"
        )


def beds(config: BedsConfig, progress: Progress = silent) -> Beds:
    """Write the beds of a map or a folder of maps as polygons.

    Raises:
        ConfigError: the ending of `output` is unknown, or geopandas is not installed.
        InputError: a map is unreadable or has no CRS; maps do not go together.
    """
    suffix = config.output.suffix.lower()
    if suffix not in DRIVERS:
        raise ConfigError(
            f"--output {config.output}: beds are written as .gpkg, .parquet, .fgb or .geojson"
        )
    geopandas = require("geopandas", "geo", "writing polygons")
    maps = trusted(find_maps(config.predictions_dir), config.allow_distrusted)
    require_comparable(maps, config.allow_mixed)
    _require_crs(maps, suffix)
    output_folder(config.output.parent)
    frames = []
    for done, entry in enumerate(maps):
        progress("finding beds", done, len(maps))
        frame = beds_of(entry, config.min_pixels, int(config.connectivity), config.output.parent)
        if config.smooth:
            frame = frame.set_geometry(smoothed(frame.geometry, config.smooth))
        frames.append(frame.to_crs(4326) if suffix == ".geojson" else frame)
    progress("finding beds", len(maps), len(maps))
    # Empty frames would take the types of the others' columns with them.
    full = [frame for frame in frames if len(frame)] or frames[:1]
    table = geopandas.GeoDataFrame(pd.concat(full, ignore_index=True), crs=full[0].crs)
    _write(table, config.output, suffix)
    config.record(config.output.parent)
    return Beds(
        config.output,
        len(maps),
        len(table),
        int(table["pixels"].sum()),
        float(table["presence_area_m2"].sum()),
    )


def beds_of(
    entry: Map, min_pixels: int = 1, connectivity: int = 8, scratch: Path | None = None
) -> Any:
    """The beds of one map as a GeoDataFrame in the map's CRS, from the top down.

    Args:
        entry: the map.
        min_pixels: smaller beds are left out.
        connectivity: 8: pixels that touch at a corner are of one bed; 4: only at a side.
        scratch: folder for a temporary raster; default: beside the map.

    Raises:
        InputError: the map has no CRS, or lacks a probability where it shows kelp.
    """
    geopandas = require("geopandas", "geo", "polygons")
    if not entry.georeference.on_earth:
        raise _no_crs(entry)
    folder = entry.mask.parent if scratch is None else scratch
    ids, count = _number(entry, min_pixels, connectivity)
    with scratch_folder(folder) as temporary:
        labels = temporary / "labels.tif"
        _write_labels(entry, ids, connectivity, labels)
        figures = _figures(entry, labels, count)
        shapes = _polygons(labels, count)
    columns: dict[str, Any] = {
        "bed_id": [f"{entry.scene_id}/{n}" for n in range(1, count + 1)],
        "scene_id": entry.scene_id,
        "acquired": entry.acquired_text,
        "sensor": entry.sensor,
        **figures,
        "threshold": entry.threshold,
        "network": entry.network,
    }
    texts = ("bed_id", "scene_id", "acquired", "sensor", "network")
    frame = pd.DataFrame(columns, index=range(count))[list(COLUMNS)]
    kinds = dict.fromkeys(texts, "string") | {"threshold": "float64"}
    return geopandas.GeoDataFrame(
        frame.astype(kinds), geometry=shapes, crs=entry.georeference.crs.to_wkt()
    )


def smoothed(shapes: Any, metres: float) -> Any:
    """Polygons with simpler outlines, for display; none vanishes, splits or loses a hole.

    Args:
        shapes: a GeoSeries with a CRS.
        metres: corners this near to a straight line go (where a ring begins, a little farther);
            less where a unit of the CRS is shorter on the ground, as degrees of longitude are.
    """
    shapely = require("shapely", "geo", "polygons")
    crs = shapes.crs
    unit = _METRES_PER_DEGREE if crs.is_geographic else crs.axis_info[0].unit_conversion_factor
    simple = shapes.simplify(metres / unit, preserve_topology=True)
    return simple.where(shapely.is_valid(simple), shapes)


def _require_crs(maps: list[Map], suffix: str) -> None:
    for entry in maps:
        if not entry.georeference.on_earth:
            raise _no_crs(entry)
        if suffix != ".geojson" and entry.georeference.crs != maps[0].georeference.crs:
            raise InputError(
                f"{entry.mask}: lies in another CRS than {maps[0].mask.name}; write .geojson, "
                "which has one for all, or a file for each CRS"
            )


def _no_crs(entry: Map) -> InputError:
    return InputError(
        f"{entry.mask}: has no CRS, or a local one, so its beds have no position; give it one "
        "(gdal_edit.py -a_srs … -a_ullr …)"
    )


def _labelled(entry: Map, connectivity: int) -> Iterator[tuple[Tile, NDArray[np.int64], int]]:
    """Strips of a map, the patches in each numbered on from those of the strips above."""
    structure = np.ones((3, 3)) if connectivity == 8 else None
    before = 0
    for tile in entry.strips():
        found_here, found = ndimage.label(entry.read(tile) == 1, structure)
        labels: NDArray[np.int64] = found_here.astype(np.int64)
        labels[labels > 0] += before
        before += found
        yield tile, labels, before


def _number(entry: Map, min_pixels: int, connectivity: int) -> tuple[NDArray[np.int32], int]:
    """The bed of each patch of a strip, 0 = none, and the number of beds.

    Beds count from 1 in the order in which a reader of rows meets them.
    """
    sizes = [np.zeros(1, np.int64)]
    pairs = [np.zeros((2, 0), np.int64)]
    last: NDArray[np.int64] | None = None
    total = 0
    for _, labels, after in _labelled(entry, connectivity):
        kelp = labels[labels > 0]
        sizes.append(np.bincount(kelp - total - 1, minlength=after - total))
        if last is not None:
            pairs.extend(_touching(last, labels[0], connectivity))
        last, total = labels[-1], after
    edges = np.concatenate(pairs, axis=1)
    graph = sparse.coo_array(
        (np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(total + 1, total + 1)
    )
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    pixels = np.bincount(component, weights=np.concatenate(sizes))
    _, first = np.unique(component, return_index=True)  # of each component, its first patch
    wanted = np.flatnonzero(pixels >= max(1, min_pixels))
    wanted = wanted[np.argsort(first[wanted])]
    number = np.zeros(len(pixels), np.int32)
    number[wanted] = np.arange(1, len(wanted) + 1)
    return number[component], len(wanted)


def _touching(
    above: NDArray[np.int64], below: NDArray[np.int64], connectivity: int
) -> Iterator[NDArray[np.int64]]:
    """Pairs of patches that meet across the border of two strips."""
    width = len(above)
    for shift in (-1, 0, 1) if connectivity == 8 else (0,):
        one = above[max(0, -shift) : width - max(0, shift)]
        two = below[max(0, shift) : width - max(0, -shift)]
        both = (one > 0) & (two > 0)
        yield np.unique(np.stack([one[both], two[both]]), axis=1)


def _write_labels(entry: Map, ids: NDArray[np.int32], connectivity: int, path: Path) -> None:
    """Write a raster of bed numbers, and one of where there are any."""
    height, width = entry.shape
    profile = {"driver": "GTiff", "count": 1, "compress": "lzw", "bigtiff": "if_safer"}
    profile |= {"height": height, "width": width, "blockysize": 64, **entry.georeference.profile}
    with (
        decoding(_CACHE),
        quietly(path, writing=True),
        rasterio.open(path, "w", dtype="int32", **profile) as out,
        rasterio.open(_where(path), "w", dtype="uint8", **profile) as where,
    ):
        for tile, labels, _ in _labelled(entry, connectivity):
            numbers = ids[labels]
            out.write(numbers, 1, window=tile.window)
            where.write((numbers > 0).astype(np.uint8), 1, window=tile.window)


def _where(labels: Path) -> Path:
    return labels.with_name("where.tif")


def _polygons(labels: Path, count: int) -> NDArray[np.object_]:
    """A valid multipolygon for each bed.

    Its parts are connected by sides: as one ring, pixels that touch at a corner would make it
    touch itself, which is not valid. Parts of a multipolygon may touch at points.
    """
    shapely = require("shapely", "geo", "polygons")
    parts: list[tuple[int, list[NDArray[np.float64]]]] = []
    with (
        decoding(_CACHE),
        quietly(labels),
        rasterio.open(labels) as source,
        rasterio.open(_where(labels)) as where,
    ):
        shapes = rasterio.features.shapes(
            rasterio.band(source, 1),
            mask=rasterio.band(where, 1),
            connectivity=4,
            transform=source.transform,
        )
        for shape, number in shapes:
            parts.append((int(number), [np.array(ring) for ring in shape["coordinates"]]))
    parts.sort(key=lambda part: part[0])
    if not parts:
        return np.empty(0, dtype=object)
    rings = [ring for _, found in parts for ring in found]
    offsets = (
        np.cumsum([0, *(len(ring) for ring in rings)]),
        np.cumsum([0, *(len(found) for _, found in parts)]),
        np.searchsorted([number for number, _ in parts], np.arange(1, count + 2)),
    )
    out: NDArray[np.object_] = shapely.from_ragged_array(
        shapely.GeometryType.MULTIPOLYGON, np.concatenate(rings), offsets
    )
    wrong = np.flatnonzero(~shapely.is_valid(out))
    out[wrong] = shapely.make_valid(out[wrong])
    return out


def _figures(entry: Map, labels: Path, count: int) -> dict[str, NDArray[Any]]:
    """Figures of each bed, by column."""
    sums = _Sums(count)
    for tile in entry.strips():
        sums.add(entry, labels, tile)
    return sums.columns(entry)


class _Sums:
    """Running sums over strips, one for each bed; number 0 is what is no bed."""

    def __init__(self, count: int) -> None:
        self.size = count + 1
        self.pixels = np.zeros(self.size, np.int64)
        self.presence, self.expected, self.p, self.spread = np.zeros((4, self.size))
        self.highest = np.zeros(self.size, np.float32)
        self.near, self.near_observed = np.zeros((2, self.size), np.int64)
        self.edge, self.unobserved = np.zeros((2, self.size), bool)

    def add(self, entry: Map, labels: Path, tile: Tile) -> None:
        """Add the beds' pixels of a strip, and the pixels around them that lie in it."""
        height, width = entry.shape
        top, bottom = max(0, tile.y - AROUND), min(height, tile.bottom + AROUND)
        with quietly(labels), rasterio.open(labels) as source:
            window = source.read(1, window=Window(0, top, width, bottom - top))
        numbers = window[tile.y - top : tile.bottom - top]
        if not window.any():
            return
        y, x = np.nonzero(numbers)
        beds = numbers[y, x]
        area = np.broadcast_to(entry.area.pixels(tile), numbers.shape)[y, x]
        self.pixels += self._count(beds)
        self.presence += self._sum(beds, area)
        self.edge[beds[(y + tile.y == 0) | (y + tile.y == height - 1)]] = True
        self.edge[beds[(x == 0) | (x == width - 1)]] = True
        p = entry.read_probability(tile)
        if p is not None:
            chosen = p[y, x]
            if np.isnan(chosen).any():
                raise InputError(
                    f"{entry.probability}: no probability where {entry.mask.name} shows kelp; "
                    "make both again"
                )
            self.p += self._sum(beds, chosen)
            self.expected += self._sum(beds, chosen * area)
            np.maximum.at(self.highest, beds, chosen)
        if entry.spread:
            self.spread += self._sum(beds, read_probability(entry.spread, tile)[y, x])
        self._look_around(window, entry.read(tile), tile.y - top)

    def _look_around(
        self, window: NDArray[np.int32], mask: NDArray[np.uint8], skipped: int
    ) -> None:
        """Count pixels of the strip near each bed, each once for a bed."""
        height, width = mask.shape
        inner = np.zeros(window.shape, bool)
        core = window[1:-1, 1:-1]
        inner[1:-1, 1:-1] = (
            (core == window[:-2, 1:-1])
            & (core == window[2:, 1:-1])
            & (core == window[1:-1, :-2])
            & (core == window[1:-1, 2:])
        )
        rim_y, rim_x = np.nonzero((window > 0) & ~inner)
        rim = window[rim_y, rim_x].astype(np.int64)
        keys = []
        steps = range(-AROUND, AROUND + 1)
        for dy, dx in ((dy, dx) for dy in steps for dx in steps if dy or dx):
            y, x = rim_y + dy - skipped, rim_x + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            y, x, bed = y[inside], x[inside], rim[inside]
            other = window[y + skipped, x] != bed
            y, x, bed = y[other], x[other], bed[other]
            keys.append(bed * (height * width) + y * width + x)
            if max(abs(dy), abs(dx)) == 1:
                self.unobserved[bed[mask[y, x] == MASK_NODATA]] = True
        pairs = np.sort(np.concatenate(keys))
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        bed, pixel = np.divmod(pairs, height * width)
        self.near += self._count(bed)
        self.near_observed += self._count(bed[mask.ravel()[pixel] != MASK_NODATA])

    def _count(self, beds: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(beds, minlength=self.size)

    def _sum(self, beds: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(beds, weights=values, minlength=self.size).astype(np.float64)

    def columns(self, entry: Map) -> dict[str, NDArray[Any]]:
        """The figures by column, without number 0."""
        unknown = np.full(self.size, np.nan)
        has_p = entry.probability is not None
        with np.errstate(invalid="ignore"):
            shares = {
                "mean_p": self.p / self.pixels if has_p else unknown,
                "max_p": self.highest.astype(np.float64) if has_p else unknown,
                "spread": self.spread / self.pixels if entry.spread else unknown,
                "observed_share": self.near_observed / self.near,
            }
        columns: dict[str, NDArray[Any]] = {
            "pixels": self.pixels,
            "presence_area_m2": self.presence,
            "expected_area_m2": unknown if entry.no_expected_area else self.expected,
            **shares,
            "touches_edge": self.edge,
            "touches_unobserved": self.unobserved,
        }
        return {name: values[1:] for name, values in columns.items()}


def _write(table: Any, path: Path, suffix: str) -> None:
    with atomic(path) as partial:
        if suffix == ".parquet":
            table.to_parquet(partial, index=False, schema_version="1.1.0", write_covering_bbox=True)
            return
        options: dict[str, Any] = {"RFC7946": "YES"} if suffix == ".geojson" else {}
        pyogrio = require("pyogrio", "geo", f"writing {suffix} files")
        pyogrio.write_dataframe(
            table,
            partial,
            layer="beds",
            driver=DRIVERS[suffix],
            geometry_type="MultiPolygon",
            layer_options=options,
        )
