"""Polygons of the user on the grid of a scene: areas of interest, areas to leave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.features import rasterize
from rasterio.warp import transform, transform_bounds

from kelp.errors import InputError
from kelp.io.files import parse_json
from kelp.raster.masks import Georeference
from kelp.raster.window import Shape, Tile
from kelp.sensors.record import Source

Ring = NDArray[np.float64]
"""Corners `(n, 2)`: x, y."""
Polygon = list[Ring]
"""The outer ring, then holes."""

_LONGEST_EDGE: Final = {True: 0.01, False: 1000.0}
"""Degrees, or metres: longer edges get corners between, as straight lines bend in another CRS."""


class Polygons:
    """Polygons of a vector file on the grid of a scene, burnt by windows.

    A pixel belongs to them when its centre does.

    Args:
        path: the file: GeoJSON, or with the extra `geo` all that pyogrio reads.
        shape: of the scene.
        crs: of the scene.
        affine: the scene's transform.
        option: the flag that named the file, for messages.
        touching: whether one of them must touch the scene.

    Raises:
        InputError: no polygons, no CRS, or none of them touches the scene.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        crs: Any,
        affine: Affine | None,
        option: str,
        touching: bool = True,
    ) -> None:
        if affine is None or not Georeference(crs, affine).on_earth:
            raise InputError(
                f"{option} {path}: the scene has no georeference, or a local one; polygons cannot "
                "be laid on it"
            )
        self.path = path
        self.shape = shape
        self._affine = affine
        polygons, source_crs = read_polygons(path, option)
        self._source_crs = source_crs
        self._shapes: list[tuple[dict[str, Any], tuple[float, float, float, float]]] = []
        for polygon in polygons:
            moved = _moved(polygon, source_crs, CRS.from_user_input(crs))
            if moved:
                corners = moved[0]
                box = (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())
                self._shapes.append((_geojson(moved), box))
        reach = [_in_pixels(affine, box) for _, box in self._shapes]
        self._reach = np.array(reach, dtype=np.int64).reshape(-1, 4)
        if touching and not self.pixels:
            raise InputError(
                f"{option} {path}: does not touch the scene ({self._where(crs)}); check the CRS of "
                "the polygons, or leave the scene out"
            )

    @cached_property
    def pixels(self) -> int:
        """How many of the scene lie inside."""
        return sum(int(self.mask(tile).sum()) for tile in self.reached.strips(512))

    @cached_property
    def reached(self) -> Tile:
        """The window of the scene that they may touch; of 0 rows where there is none."""
        return self._near(Tile(0, 0, *self.shape))[1]

    @property
    def share(self) -> float:
        """Share of the scene's pixels, 0-1."""
        return self.pixels / (self.shape[0] * self.shape[1])

    @cached_property
    def source(self) -> Source:
        """What the record says of the file."""
        return Source.of_file("polygons", self.path)

    def mask(self, tile: Tile) -> NDArray[np.bool_]:
        """Where a window lies inside the polygons: bool, shape `(height, width)`."""
        inside = np.zeros((tile.height, tile.width), dtype=np.bool_)
        near, part = self._near(tile)
        if near:  # burnt no farther than they reach: most of a scene is far from a coast
            inside[part.slices_in(tile)] = rasterize(
                near,
                out_shape=(part.height, part.width),
                transform=self._affine @ Affine.translation(part.x, part.y),
                default_value=1,
                dtype="uint8",
            )
        return inside

    def _near(self, tile: Tile) -> tuple[list[dict[str, Any]], Tile]:
        """The polygons that may touch a window, and the part of it that they may touch."""
        left, top, right, bottom = self._reach.T
        near = (left < tile.right) & (right > tile.x) & (top < tile.bottom) & (bottom > tile.y)
        if not near.any():
            return [], Tile(tile.y, tile.x, 0, 0)
        y, x = max(int(top[near].min()), tile.y), max(int(left[near].min()), tile.x)
        height = min(int(bottom[near].max()), tile.bottom) - y
        width = min(int(right[near].max()), tile.right) - x
        polygons = [self._shapes[number][0] for number in np.flatnonzero(near).tolist()]
        return polygons, Tile(y, x, height, width)

    def _where(self, crs: Any) -> str:
        height, width = self.shape
        corners = np.array([self._affine @ (x, y) for x in (0, width) for y in (0, height)])
        low, high = corners.min(axis=0), corners.max(axis=0)
        scene = _degrees(crs, (*low.tolist(), *high.tolist()))
        boxes = np.array([box for _, box in self._shapes])
        if not len(boxes):
            return f"the scene lies at {scene}"
        ours = _degrees(
            crs, (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
        )
        return f"they lie at {ours}, the scene at {scene}"


def _in_pixels(affine: Affine, box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that a box of the map may touch."""
    corners = np.array([~affine @ (x, y) for x in box[::2] for y in box[1::2]])
    low, high = np.floor(corners.min(axis=0)) - 1, np.ceil(corners.max(axis=0)) + 1
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _degrees(crs: Any, box: tuple[float, ...]) -> str:
    try:
        west, south, east, north = transform_bounds(crs, "EPSG:4326", *box)
    except RasterioError:
        return "an unknown place"
    if not np.isfinite([west, south, east, north]).all():
        return "an unknown place"

    def words(value: float, letters: str) -> str:
        return f"{abs(value):.1f}°{letters[value < 0]}"

    return f"{words(south, 'NS')}-{words(north, 'NS')} {words(west, 'EW')}-{words(east, 'EW')}"


def read_polygons(path: Path, option: str = "") -> tuple[list[Polygon], CRS]:
    """All polygons of a vector file, and their CRS.

    Raises:
        InputError: the file cannot be read, names no CRS, or holds no polygon.
    """
    label = f"{option} {path}".strip()
    if not path.exists():
        raise InputError(f"{label}: no such file; check the path")
    if path.suffix.lower() in (".geojson", ".json"):
        geometries, crs = _of_geojson(path, label)
    else:
        geometries, crs = _of_ogr(path, label)
    polygons = [polygon for geometry in geometries for polygon in _polygons_of(geometry)]
    if not polygons:
        raise InputError(f"{label}: holds no polygon")
    return polygons, crs


def _of_geojson(path: Path, label: str) -> tuple[list[Any], CRS]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no GeoJSON object")
        crs = CRS.from_epsg(4326)  # RFC 7946
        if name := ((value.get("crs") or {}).get("properties") or {}).get("name"):  # before it
            crs = CRS.from_user_input(name)
        kind = value.get("type")
        if kind == "FeatureCollection":
            return [feature.get("geometry") for feature in value["features"]], crs
        return [value.get("geometry") if kind == "Feature" else value], crs
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RasterioError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{label}: not a GeoJSON file ({reason})") from error


def _of_ogr(path: Path, label: str) -> tuple[list[Any], CRS]:
    try:
        import pyogrio.raw
        import shapely
    except ImportError as error:
        raise InputError(
            f'{label}: reading this format needs pyogrio; pip install "kelp-slicer[geo]", or give '
            "GeoJSON"
        ) from error
    try:
        about, _, geometry, _ = pyogrio.raw.read(path, columns=[])
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{label}: not a readable vector file ({reason})") from error
    if not about["crs"]:
        raise InputError(f"{label}: names no CRS; set it (ogr2ogr -a_srs)")
    shapes = [shapely.geometry.mapping(g) for g in shapely.from_wkb(geometry) if g is not None]
    return shapes, CRS.from_user_input(about["crs"])


def _polygons_of(geometry: Any) -> Iterator[Polygon]:
    if not isinstance(geometry, dict):
        return
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for part in geometry.get("geometries", ()):
            yield from _polygons_of(part)
        return
    coordinates = geometry.get("coordinates") or ()
    if kind == "Polygon":
        coordinates = (coordinates,)
    elif kind != "MultiPolygon":
        return
    for rings in coordinates:
        polygon = [np.array([corner[:2] for corner in ring], dtype=np.float64) for ring in rings]
        if polygon and len(polygon[0]) >= 4:
            yield polygon


def _moved(polygon: Polygon, source: CRS, target: CRS) -> Polygon | None:
    """A polygon in another CRS; None where it lies outside what that CRS can say."""
    out: Polygon = []
    for ring in polygon:
        dense = ring if source == target else _densified(ring, _LONGEST_EDGE[source.is_geographic])
        if source != target:
            xs, ys = transform(source, target, dense[:, 0].tolist(), dense[:, 1].tolist())
            dense = np.column_stack([xs, ys])
        if not np.isfinite(dense).all():
            return None
        out.append(dense)
    return out


def _densified(ring: Ring, longest: float) -> Ring:
    pieces = []
    for start, end in pairwise(ring):
        count = min(max(1, int(np.ceil(np.abs(end - start).max() / longest))), 10_000)
        steps = np.arange(count)[:, np.newaxis] / count
        pieces.append(start + steps * (end - start))
    return np.concatenate([*pieces, ring[-1:]])


def _geojson(polygon: Sequence[Ring]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [ring.tolist() for ring in polygon]}


def bounds_in_degrees(path: Path) -> tuple[float, float, float, float]:
    """West, south, east and north of the polygons of a file."""
    polygons, crs = read_polygons(path, "--aoi")
    moved = [
        ring for polygon in polygons for ring in _moved(polygon, crs, CRS.from_epsg(4326)) or ()
    ]
    if not moved:
        raise InputError(f"--aoi {path}: lies outside what its CRS can say")
    corners = np.concatenate(moved)
    west, south = corners.min(axis=0).tolist()
    east, north = corners.max(axis=0).tolist()
    return west, south, east, north
