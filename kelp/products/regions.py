"""Regions: the polygons that areas are asked for, and which pixels lie in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import rasterio.features
from affine import Affine
from numpy.typing import NDArray
from pyarrow import parquet

from kelp.errors import InputError
from kelp.products.maps import STRIP_ROWS, require
from kelp.raster.masks import Georeference
from kelp.raster.window import Shape, Tile

ID_COLUMNS: Final = ("aoi_id", "id", "name", "Segment_ID")
"""Looked for, in this order and whatever case, where no column is named."""

_EDGE_PARTS: Final = 64
"""Edges are cut this often before they go to another CRS, where they are curves."""


@dataclass(frozen=True)
class Region:
    """One polygon, named, in the CRS of its file."""

    id: str
    geometry: Any
    crs: Any
    _seen: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def within(self, crs: Any) -> Any:
        """The polygon in another CRS."""
        key = crs.to_wkt()
        if key not in self._seen:
            geopandas = require("geopandas", "geo", "regions")
            series = geopandas.GeoSeries([self.geometry], crs=self.crs)
            if series.crs != key:
                x1, y1, x2, y2 = series.total_bounds
                series = series.segmentize(max(x2 - x1, y2 - y1) / _EDGE_PARTS).to_crs(key)
            if not np.isfinite(series.total_bounds).all():
                raise InputError(f"region {self.id}: lies outside the domain of the maps' CRS")
            self._seen[key] = series.iloc[0]
        return self._seen[key]


def read_regions(path: Path, id_column: str | None = None) -> list[Region]:
    """The polygons of a vector file.

    Args:
        path: whatever GDAL reads (GeoPackage, GeoJSON, shapefile …), or GeoParquet.
        id_column: column of the names; default: the first of `aoi_id`, `id`, `name`.

    Raises:
        InputError: the file cannot be read; a polygon has no name or that of another one,
            touches or crosses itself, or has no area.
    """
    geopandas = require("geopandas", "geo", "reading regions")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        is_parquet = path.suffix.lower() == ".parquet"
        if is_parquet:  # a text that is not UTF-8 would show where it is used
            parquet.read_table(path, partitioning=None).validate(full=True)
        table = geopandas.read_parquet(path) if is_parquet else geopandas.read_file(path)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable vector file ({reason})") from error
    if not len(table) or table.geometry is None:
        raise InputError(f"{path}: holds no polygon")
    if table.crs is None or not (table.crs.is_projected or table.crs.is_geographic):
        raise InputError(f"{path}: has no CRS, or a local one; give it one (ogr2ogr -a_srs EPSG:…)")
    names = _names(path, table, id_column)
    return [
        _checked(path, Region(name, geometry, table.crs))
        for name, geometry in zip(names, table.geometry, strict=True)
    ]


def _names(path: Path, table: Any, id_column: str | None) -> list[str]:
    columns = [str(c) for c in table.columns if c != table.geometry.name]
    by_case = {column.lower(): column for column in reversed(columns)}
    if id_column is None:
        found = [by_case[name.lower()] for name in ID_COLUMNS if name.lower() in by_case]
        column = found[0] if found else None
    else:
        column = id_column if id_column in columns else None
    if column is None:
        there = ", ".join(columns) or "none"
        wanted = id_column or ", ".join(ID_COLUMNS[:3])
        raise InputError(
            f"{path}: no column {wanted} to name its polygons by; name one with --aoi_id "
            f"(columns: {there})"
        )
    if table[column].isna().any():
        raise InputError(f"{path}: a polygon has no {column}; every one needs an id of its own")
    names = [str(name) for name in table[column]]
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise InputError(
            f"{path}: two polygons have the {column} {twice[0]}; make them one multipolygon, or "
            "name another column with --aoi_id"
        )
    return names


def _checked(path: Path, region: Region) -> Region:
    shapely = require("shapely", "geo", "regions")
    shape = region.geometry
    if shape is not None and shape.geom_type not in ("Polygon", "MultiPolygon"):
        raise InputError(f"{path}: region {region.id} is a {shape.geom_type}, not a polygon")
    # The hull's area: the two halves of a bow tie may cancel out.
    if shape is None or shape.convex_hull.area == 0:
        raise InputError(f"{path}: region {region.id} has no area; draw it again or remove it")
    if not shape.is_valid:
        raise InputError(
            f"{path}: region {region.id} is not a valid polygon "
            f"({shapely.is_valid_reason(shape)}); repair it (QGIS: Fix geometries)"
        )
    return region


@dataclass(frozen=True)
class Cover:
    """Which pixels of a raster lie in a region: those whose centre does.

    Attributes:
        geometry: the region in the raster's CRS.
        georeference: where the raster lies.
        window: the raster's part that the region's bounds cover; None where they do not meet.
        outside: how many pixels of the region lie outside the raster.
    """

    geometry: Any
    georeference: Georeference
    window: Tile | None
    outside: float

    @classmethod
    def of(cls, region: Region, georeference: Georeference, shape: Shape) -> Cover:
        """Lay a region over a raster of `shape`."""
        shapely = require("shapely", "geo", "regions")
        transform = georeference.transform
        assert transform is not None
        geometry = region.within(georeference.crs)
        height, width = shape
        corners = [
            transform @ (x, y) for x, y in ((0, 0), (width, 0), (width, height), (0, height))
        ]
        beyond = geometry.difference(shapely.Polygon(corners)).area
        window = _window(geometry.bounds, transform, shape)
        return cls(geometry, georeference, window, beyond / abs(transform.determinant))

    def strips(self, rows: int = STRIP_ROWS) -> Iterator[tuple[Tile, NDArray[np.bool_]]]:
        """Windows of the raster and which of their pixels lie in the region, from the top."""
        for tile in self.window.strips(rows) if self.window else ():
            yield tile, self.inside(tile)

    def inside(self, tile: Tile) -> NDArray[np.bool_]:
        """Which pixels of a window lie in the region."""
        found: NDArray[np.bool_] = rasterio.features.geometry_mask(
            [self.geometry],
            (tile.height, tile.width),
            self.georeference.shifted(tile).transform,
            invert=True,
        )
        return found


def _window(bounds: tuple[float, ...], transform: Affine, shape: Shape) -> Tile | None:
    x1, y1, x2, y2 = bounds
    back = ~transform
    points = np.array([back @ (x, y) for x in (x1, x2) for y in (y1, y2)])
    low = np.floor(points.min(axis=0)).astype(int)
    high = np.ceil(points.max(axis=0)).astype(int)
    left, top = (max(0, int(v)) for v in low)
    right, bottom = min(int(high[0]), shape[1]), min(int(high[1]), shape[0])
    return Tile(top, left, bottom - top, right - left) if right > left and bottom > top else None
