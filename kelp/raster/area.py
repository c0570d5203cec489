"""Ground area of pixels, right in every CRS.

A pixel of a UTM or an equal-area map covers what its sides say. In Web Mercator, in degrees and
in most continental projections it does not: at 51.7 S a Web Mercator pixel of 30 "metres" covers
346 m2. There the area is measured on the ellipsoid: corners of pixels go to the authalic sphere,
which keeps areas (Snyder, Map Projections: A Working Manual, USGS PP 1395, eq. 3-11 to 3-13).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform as reproject

from kelp.errors import InputError
from kelp.raster.bands import PIXEL_SIZE_M
from kelp.raster.georeference import crs_words
from kelp.raster.masks import Georeference, is_gdal_error
from kelp.raster.window import Shape, Tile

AreaSource = Literal["affine", "geodesic", "assumed"]

UTM_TOLERANCE: Final = 0.0025
"""The affine counts where it is this near to the ground area, relatively, all over the raster.

UTM within its zone stays below 0.002 (scale 0.9996 in the middle, 1.001 at the zone's edge); an
equal-area projection has 0 but for its ellipsoid.
"""

_A: Final = 6378137.0
_F: Final = 1 / 298.257223563
_E2: Final = _F * (2 - _F)
_E: Final = float(np.sqrt(_E2))
_SPAN_M: Final = 20_000.0
"""Between nodes this far apart the area is interpolated; it is wrong by less than 1e-5."""
_NODES_MOST: Final = 64


def _authalic_q(sine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Snyder's q (3-12) of the sine of a latitude."""
    log = np.log((1 - _E * sine) / (1 + _E * sine))
    q: NDArray[np.float64] = (1 - _E2) * (sine / (1 - _E2 * sine**2) - log / (2 * _E))
    return q


_Q_POLE: Final = float(_authalic_q(np.array(1.0)))
_RADIUS: Final = _A * float(np.sqrt(_Q_POLE / 2))


def _on_sphere(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of the authalic sphere in metres, shape `(3, …)`, of degrees of WGS 84."""
    sine = np.clip(_authalic_q(np.sin(np.radians(lat))) / _Q_POLE, -1, 1)
    cosine = np.sqrt(1 - sine**2)
    angle = np.radians(lon)
    return _RADIUS * np.stack([cosine * np.cos(angle), cosine * np.sin(angle), sine])


@dataclass(frozen=True)
class GroundArea:
    """Ground area of each pixel of a raster, in square metres.

    Attributes:
        source: `affine` (the sides of a pixel), `geodesic` (measured on the ellipsoid), or
            `assumed` (a raster without CRS).
        pixel_m2: area of every pixel; None where it varies.
        pixel_size_m: the side that was assumed; None where the CRS says it.
    """

    source: AreaSource
    pixel_m2: float | None
    pixel_size_m: float | None = None
    _nodes: tuple[NDArray[np.float64], ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(
        cls, georeference: Georeference, shape: Shape, pixel_size: float = PIXEL_SIZE_M
    ) -> GroundArea:
        """The areas of a raster of `shape` that lies at `georeference`.

        Args:
            georeference: CRS and transform of the raster.
            shape: `(height, width)`.
            pixel_size: side of a pixel in metres where there is no CRS.

        Raises:
            InputError: the CRS is known but the raster cannot be placed on the Earth with it.
        """
        crs, transform = georeference.crs, georeference.transform
        if crs is None or transform is None:
            return cls("assumed", pixel_size**2, pixel_size)
        metres = linear_unit(crs)
        flat = None if metres is None else abs(float(transform.determinant)) * metres**2
        if not (crs.is_projected or crs.is_geographic):
            if flat is None:
                return cls("assumed", pixel_size**2, pixel_size)
            return cls("affine", flat)  # a local CRS: lengths, but no place on the Earth
        rows, columns, areas = _measure(crs, transform, shape)
        if flat is not None and np.abs(areas / flat - 1).max() <= UTM_TOLERANCE:
            return cls("affine", flat)
        return cls("geodesic", None, None, (rows, columns, areas))

    @classmethod
    def of_file(
        cls, path: Path, georeference: Georeference, shape: Shape, pixel_size: float = PIXEL_SIZE_M
    ) -> GroundArea:
        """`of` a raster file, which errors name."""
        try:
            return cls.of(georeference, shape, pixel_size)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def pixels(self, tile: Tile) -> NDArray[np.float64]:
        """Area of the pixels of a window: broadcasts to `(tile.height, tile.width)`."""
        if self.pixel_m2 is not None:
            return np.full((1, 1), self.pixel_m2)
        rows, columns, areas = self._nodes
        # Linear along rows, then along columns.
        at, share = _between(tile.y, tile.bottom, rows)
        lines = areas[at] + share[:, None] * (areas[at + 1] - areas[at])
        at, share = _between(tile.x, tile.right, columns)
        between = np.diff(lines, axis=1)[:, at]
        between *= share
        between += lines[:, at]
        return between

    def total(self, chosen: NDArray[Any], tile: Tile) -> float:
        """Area of the pixels of a window, each counted `chosen` times (bool, or a share)."""
        if self.pixel_m2 is not None:
            return float(chosen.sum(dtype=np.float64)) * self.pixel_m2
        return float((self.pixels(tile) * chosen).sum())

    @property
    def words(self) -> str:
        """Where the area of a pixel comes from, for tables and messages."""
        if self.source == "assumed":
            return f"{self.pixel_size_m:g} m pixels assumed, no CRS"
        if self.source == "affine":
            return "pixel size from the CRS"
        return "measured on the ellipsoid"


def linear_unit(crs: Any) -> float | None:
    """Metres in a unit of the CRS; None for degrees and unknown units."""
    if crs.is_geographic:
        return None
    try:
        return float(crs.linear_units_factor[1])
    except (CRSError, ValueError):
        return None


def _measure(
    crs: Any, transform: Affine, shape: Shape
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Pixel area at nodes of a lattice: their rows, their columns (of centres), the areas."""
    whole = _areas_at(crs, transform, np.array([shape[0] / 2]), np.array([shape[1] / 2]), shape)
    step = max(1, min(_NODES_MOST, int(_SPAN_M / max(1.0, float(np.sqrt(whole[0, 0]))))))
    rows, columns = (_nodes(size, step) for size in shape)
    return rows, columns, _areas_at(crs, transform, rows, columns, shape)


def _nodes(size: int, step: int) -> NDArray[np.float64]:
    """Centres of pixels from the first to the last, at most `step` apart."""
    return np.linspace(0.5, max(1.5, size - 0.5), max(2, -(-size // step) + 1))


def _areas_at(
    crs: Any,
    transform: Affine,
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    shape: Shape,
) -> NDArray[np.float64]:
    """Area of the pixels whose centres lie at `rows` x `columns`."""
    corners = []
    for down, right in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)):
        y, x = np.meshgrid(rows + down, columns + right, indexing="ij")
        a, b, c, d, e, f = tuple(transform)[:6]
        east, north = a * x.ravel() + b * y.ravel() + c, d * x.ravel() + e * y.ravel() + f
        try:
            lon, lat = reproject(crs, CRS.from_epsg(4326), east, north)
        except Exception as error:
            if not is_gdal_error(error):
                raise
            raise InputError(
                f"its CRS ({crs_words(crs)}) cannot be placed on the Earth; warp it "
                "(gdalwarp -t_srs)"
            ) from error
        points = np.array([lon, lat], dtype=np.float64)
        if not np.isfinite(points).all() or np.abs(points[1]).max() > 90.000001:
            raise InputError(
                "part of the raster lies outside its CRS's domain; check its transform"
            )
        corners.append(_on_sphere(points[0], points[1]))
    # Half the cross product of the diagonals: the area of a small quadrangle in space.
    cross = np.cross(corners[2] - corners[0], corners[3] - corners[1], axis=0)
    areas: NDArray[np.float64] = np.linalg.norm(cross, axis=0) / 2
    return areas.reshape(len(rows), len(columns))


def _between(
    begin: int, end: int, nodes: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Of centres of pixels: the node before each, and the share of the way to the next."""
    at = np.arange(begin, end, dtype=np.float64) + 0.5
    left = np.clip(np.searchsorted(nodes, at, side="right") - 1, 0, len(nodes) - 2)
    return left, (at - nodes[left]) / (nodes[left + 1] - nodes[left])
