"""Whether two rasters lie on one grid: what every command asks before it lays one on the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.warp import transform as reproject

from kelp.errors import InputError
from kelp.io.location import Url
from kelp.raster.masks import Georeference, georeference_from, is_gdal_error, open_dataset
from kelp.raster.window import Shape

TOLERANCE_PX: Final = 0.01
"""Two grids are one where the corners of the rasters are no farther apart than this, in pixels."""

_WAY_OUT: Final = (
    "warp one onto the grid of the other (gdalwarp -t_srs -te -tr), or give "
    "--ignore_georeference to lay them on each other pixel by pixel"
)


class Corners(NamedTuple):
    """The corners of a raster in pixels of another one, each `(x, y)`."""

    top_left: tuple[float, float]
    top_right: tuple[float, float]
    bottom_left: tuple[float, float]
    bottom_right: tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """Size and georeference of a raster."""

    shape: Shape
    georeference: Georeference

    @property
    def located(self) -> bool:
        """Whether it says where it lies; an identity transform says nothing."""
        transform = self.georeference.transform
        return transform is not None and transform != Affine.identity()

    def difference(self, other: Grid) -> str | None:
        """What is different about `other`, in words; `None` where both lie on one grid.

        Where one of them has no georeference only sizes are compared; where one has no CRS, sizes
        and transforms. Rotated and south-up rasters are compared like all others. Two spellings
        of one CRS are one CRS: corners decide.
        """
        if other.shape != self.shape:
            return f"{_size(other.shape)} against {_size(self.shape)} (height x width)"
        if not (self.located and other.located):
            return None
        crs, others_crs = self.georeference.crs, other.georeference.crs
        same_crs = crs is None or others_crs is None or crs == others_crs
        corners = self._corners_of(other, None if same_crs else crs)
        if corners is None:
            return f"{crs_words(others_crs)} against {crs_words(crs)}"
        height, width = self.shape
        shifts = np.array(corners) - [(0, 0), (width, 0), (0, height), (width, height)]
        if np.abs(shifts).max() <= TOLERANCE_PX:
            return None
        if not same_crs:
            return f"{crs_words(others_crs)} against {crs_words(crs)}"
        return _words(corners, shifts, self.shape)

    def _corners_of(self, other: Grid, crs: Any) -> Corners | None:
        """The corners of `other` in pixels of this raster; `None` where they have no place in it.

        Args:
            other: the raster.
            crs: of this raster where that of the other one differs, else None.
        """
        height, width = other.shape
        to_map, to_pixels = other.georeference.transform, self.georeference.transform
        assert to_map is not None
        assert to_pixels is not None
        if to_pixels.is_degenerate:
            return None
        points = [to_map @ at for at in ((0, 0), (width, 0), (0, height), (width, height))]
        if crs is not None:
            xs, ys = zip(*points, strict=True)
            try:
                found = reproject(other.georeference.crs, crs, xs, ys)
            except Exception as error:
                if not is_gdal_error(error):
                    raise
                return None
            points = list(zip(found[0], found[1], strict=True))
        if not np.isfinite(points).all():
            return None
        return Corners(*(~to_pixels @ point for point in points))


def grid_of(path: Path | Url) -> Grid:
    """The grid of a raster file. Raises `InputError` where it cannot be read."""
    with open_dataset(path) as dataset:
        return Grid(Shape(dataset.height, dataset.width), georeference_from(dataset))


def require_same_grid(
    path: Path | Url,
    other: Path | Url,
    ignore_georeference: bool = False,
    known: Grid | None = None,
) -> Grid:
    """Raise `InputError` unless two rasters lie on one grid; give the grid of `path`.

    Args:
        path: the raster that is right.
        other: the one that is laid on it.
        ignore_georeference: compare sizes only.
        known: the grid of `path`, where that is no raster.

    Raises:
        InputError: sizes, CRS, pixel size, orientation or position differ; it says which.
    """
    grid, others = known or grid_of(path), grid_of(other)
    if ignore_georeference:
        grid, others = (Grid(one.shape, Georeference()) for one in (grid, others))
    if difference := grid.difference(others):
        way_out = "" if grid.shape != others.shape else f"; {_WAY_OUT}"
        raise InputError(f"{other} does not lie on the grid of {path}: {difference}{way_out}")
    return grid


def _size(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} pixels"


def crs_words(crs: Any) -> str:
    """A CRS in few words."""
    if crs is None:
        return "no CRS"
    code = crs.to_epsg()
    if code is not None:
        return f"EPSG:{code}"
    text = str(crs.to_wkt())
    return text.split('"')[1] if '"' in text else text[:40]


def _words(corners: Corners, shifts: NDArray[np.float64], shape: Shape) -> str:
    """What differs between two grids of one size and one CRS, most telling first."""
    height, width = shape
    down = np.subtract(corners.bottom_left, corners.top_left)
    right = np.subtract(corners.top_right, corners.top_left)
    if down[1] < 0 < right[0]:
        return "its rows run the other way (one of them is south-up)"
    if right[0] < 0 < down[1]:
        return "its columns run the other way"
    scale = right[0] / width, down[1] / height
    tilt = max(abs(right[1]), abs(down[0]))
    if tilt > TOLERANCE_PX:
        return f"it is rotated or sheared, by {tilt:.3g} pixels across the raster"
    if np.ptp(shifts, axis=0).max() > TOLERANCE_PX:
        return f"its pixels are {scale[0]:.4g} x {scale[1]:.4g} times as large (width x height)"
    x, y = shifts[0]
    return f"it is shifted by {x:+.4g} columns and {y:+.4g} rows"
