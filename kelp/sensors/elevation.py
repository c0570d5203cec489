"""Elevation from elsewhere, warped onto the grid of a scene as its windows are read."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.features import rasterize
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform

from kelp.errors import InputError
from kelp.raster.bands import NODATA
from kelp.raster.masks import Georeference, georeference_from, quietly, require_one_band
from kelp.raster.validity import masked_as
from kelp.raster.window import Shape, Tile
from kelp.sensors.record import ElevationFacts, Source

_SUFFIXES: Final = (".tif", ".tiff", ".vrt", ".hgt", ".img", ".dt1", ".dt2")
_CORNER: Final = re.compile(
    r"(?<![A-Za-z])([NS])(\d{2})(?:_00)?_?([EW])(\d{3})(?!\d)", re.IGNORECASE
)
"""The south-west corner that names of one-degree tiles hold: GLO-30, SRTM, ASTER."""
_CELL: Final = (128, 512)
"""Rows and columns that are warped at a time, always at the same places: GDAL interpolates between
the corners of what it warps, and a pixel must not depend on which window was asked for. It warps no
less than a block of this size."""
_MOST: Final = 1 << 28
"""Bytes of warped cells in a temporary file; of larger scenes the rest is warped again."""
_GRID: Final = 5
"""Points a side at which the place of a cell in a file is looked at."""
_SAMPLES: Final = 64
"""Points a side at which the scene's cover is looked at."""


@dataclass(frozen=True)
class _Tile:
    """A file of elevations on the scene's grid."""

    path: Path
    source: Any
    void: float
    warped: Any
    whole: Any
    """The same for where no pixel of it is void, which is a third faster; None = never."""
    box: tuple[float, float, float, float]
    """Rows and columns of the scene that it may reach: top, left, bottom, right."""
    outline: dict[str, Any]
    """Its border in the scene's CRS."""


class Elevation:
    """A raster, a VRT or a folder of tiles, read by windows on a scene's grid, in whole metres.

    Between the pixels of the source it is interpolated (bilinear); where a source is void it is
    unknown. Of tiles that overlap the first by name counts. Warping takes longer than all other
    reading, and a prediction reads a scene twice: of what is out of memory a temporary file keeps
    what was warped, where there is room for one. Threads may share it. A context of open files:
    `close` it, once for itself and once for each `shared`.

    Args:
        path: the raster or the folder.
        shape: of the scene.
        crs: of the scene.
        affine: the scene's transform.
        sea_where_absent: 0 outside all tiles, else unknown there.

    Raises:
        InputError: nothing readable, no georeference, or no tile touches the scene.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        crs: Any,
        affine: Affine | None,
        sea_where_absent: bool = False,
    ) -> None:
        if affine is None or not Georeference(crs, affine).on_earth:
            raise InputError(
                f"--dem {path}: the scene has no georeference, or a local one; stack the elevation "
                "as its band DEM"
            )
        self.path, self.shape = path, shape
        self._crs, self._affine = CRS.from_user_input(crs), affine
        self.sea_where_absent = sea_where_absent
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._users = 1
        self._cells: dict[Tile, NDArray[np.float32]] = {}
        self._file: FileIO | None = None
        self._stored: dict[Tile, int] = {}
        """Where cells lie in the temporary file, one after the other."""
        try:
            opened = [self._open(file) for file in self._candidates()]
            self._tiles = [tile for tile in opened if tile is not None]
            self.known_share = self._cover()
        except BaseException:
            self._stack.close()
            raise
        if not self._tiles or not self.known_share:
            self._stack.close()
            raise InputError(
                f"--dem {path}: does not cover the scene; fetch the tiles of its place"
            )

    def shared(self) -> Self:
        """The same for one more user: what was warped for one is not warped for the other."""
        with self._lock:
            self._users += 1
        return self

    def close(self) -> None:
        """Close all files, if no one else uses them."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()

    def read(self, tile: Tile) -> NDArray[np.float32]:
        """A window inside the scene: metres, NaN = unknown, shape `(height, width)`."""
        with self._lock:
            return self._read(tile)

    def _read(self, tile: Tile) -> NDArray[np.float32]:
        out = np.empty((tile.height, tile.width), dtype=np.float32)
        rows, columns = _CELL
        for y in range(tile.y // rows * rows, tile.bottom, rows):
            for x in range(tile.x // columns * columns, tile.right, columns):
                cell = Tile(y, x, rows, columns).clipped(self.shape)
                if part := cell.intersection(tile):
                    out[part.slices_in(tile)] = self._cell(cell)[part.slices_in(cell)]
        return out

    def _cell(self, cell: Tile) -> NDArray[np.float32]:
        """A cell of the scene's grid, in memory until the rows below are read."""
        if cell not in self._cells:
            across = -(-self.shape[1] // _CELL[1])
            while len(self._cells) > 2 * across:
                oldest = next(iter(self._cells))
                self._store(oldest, self._cells.pop(oldest))
            known = self._restored(cell)
            self._cells[cell] = self._warped(cell) if known is None else known
        return self._cells[cell]

    def _store(self, cell: Tile, values: NDArray[np.float32]) -> None:
        """Put a cell into the temporary file, unless it is there or does not fit."""
        if cell in self._stored:
            return
        known = np.where(np.isnan(values), np.float32(NODATA), values)
        if known.min() < NODATA or known.max() >= -NODATA:
            return
        whole = known.astype(np.int16)
        try:
            if self._file is None:
                self._file = self._stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            place = self._file.seek(0, os.SEEK_END)
            if (
                place + whole.nbytes <= _MOST
                and self._file.write(whole.data.cast("B")) == whole.nbytes
            ):
                self._stored[cell] = place
        except OSError:  # no room: it is warped again
            pass

    def _restored(self, cell: Tile) -> NDArray[np.float32] | None:
        """What the temporary file holds of a cell."""
        if self._file is None or cell not in self._stored:
            return None
        whole = np.empty((cell.height, cell.width), dtype=np.int16)
        self._file.seek(self._stored[cell])
        if self._file.readinto(whole.data.cast("B")) != whole.nbytes:
            return None
        return np.where(whole == NODATA, np.float32(np.nan), whole.astype(np.float32))

    def _warped(self, tile: Tile) -> NDArray[np.float32]:
        out = np.full((tile.height, tile.width), np.nan, dtype=np.float32)
        near = [one for one in self._tiles if _meets(one.box, tile)]
        for one in near:
            with quietly(one.path):
                dataset = one.whole if self._is_whole(one, tile) else one.warped
                values = dataset.read(1, window=tile.window)
            known = (values != NODATA) & np.isfinite(values)
            np.copyto(out, values, where=known & np.isnan(out))
        if self.sea_where_absent:
            out[~self._covered(near, tile)] = 0
        # Whole metres, as competition files and stacked scenes have them: a shore pixel between
        # sea and land is not land for a few centimetres.
        out += np.float32(0.5)
        return np.floor(out, out=out)

    def _is_whole(self, one: _Tile, tile: Tile) -> bool:
        """Whether a file has all pixels that a window is interpolated from, none of them void."""
        if one.whole is None:
            return False
        ys, xs = np.linspace(tile.y, tile.bottom, _GRID), np.linspace(tile.x, tile.right, _GRID)
        places: Any = [axis.ravel() for axis in np.meshgrid(xs, ys)]
        x, y = self._affine @ places
        x, y = transform(self._crs, one.source.crs, x.tolist(), y.tolist())
        there = np.array(~one.source.transform @ (np.array(x), np.array(y)))
        if not np.isfinite(there).all():
            return False
        there = there.reshape(2, _GRID, _GRID)  # columns and rows of the file
        # Two of the larger of a pixel of the scene and of the file, and by how much lines bend.
        margin = 3.0
        for axis, pixels in ((1, tile.height), (2, tile.width)):
            steps = np.diff(there, axis=axis)
            margin += 2 * np.abs(steps).max() * (_GRID - 1) / pixels
            margin += np.abs(np.diff(steps, axis=axis)).max()
        left, top = np.floor(there.min(axis=(1, 2)) - margin).astype(int).tolist()
        right, bottom = np.ceil(there.max(axis=(1, 2)) + margin).astype(int).tolist()
        if min(left, top) < 0 or right > one.source.width or bottom > one.source.height:
            return False
        part = Tile(top, left, bottom - top, right - left)
        values = one.source.read(1, window=part.window)
        return bool(((values != one.void) & np.isfinite(values)).all())

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files that it is read from."""
        return tuple(Source.of_file("DEM", one.path) for one in self._tiles)

    @property
    def facts(self) -> ElevationFacts:
        """What the record says of it."""
        return ElevationFacts(
            sources=self.sources,
            sea_where_absent=self.sea_where_absent,
            known_share=self.known_share,
        )

    def _covered(self, near: Sequence[_Tile], tile: Tile) -> NDArray[np.bool_]:
        if not near:
            return np.zeros((tile.height, tile.width), dtype=np.bool_)
        burnt = rasterize(
            [one.outline for one in near],
            out_shape=(tile.height, tile.width),
            dtype="uint8",
            transform=self._affine @ Affine.translation(tile.x, tile.y),
            default_value=1,
        )
        return np.asarray(burnt, dtype=np.bool_)

    def _candidates(self) -> list[Path]:
        """Files that may touch the scene."""
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise InputError(f"--dem {self.path}: no such file or folder; check the path")
        files = sorted(
            file
            for file in self.path.rglob("*")
            if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
        )
        if not files:
            raise InputError(f"--dem {self.path}: holds no raster")
        longitude, latitude, reach = self._centre()
        return [file for file in files if _may_touch(file.name, longitude, latitude, reach)]

    def _centre(self) -> tuple[float, float, float]:
        """Longitude, latitude and, in degrees of longitude and latitude, half the scene's size."""
        height, width = self.shape
        spots = [(width / 2, height / 2), (0, 0), (width, 0), (0, height), (width, height)]
        places = [self._affine @ spot for spot in spots]
        xs, ys = transform(self._crs, "EPSG:4326", [p[0] for p in places], [p[1] for p in places])
        x, y = np.array(xs), np.array(ys)
        if not np.isfinite([x, y]).all():
            return 0.0, 0.0, 360.0
        wrapped = np.abs((x - x[0] + 180) % 360 - 180)
        return float(x[0]), float(y[0]), float(max(wrapped.max(), np.abs(y - y[0]).max()))

    def _open(self, file: Path) -> _Tile | None:
        """Open one file; None where it does not touch the scene."""
        with quietly(file):
            source = self._stack.enter_context(rasterio.open(file))
        require_one_band(source, f"--dem {file}", "a raster of elevation")
        if not georeference_from(source).on_earth:
            raise InputError(
                f"--dem {file}: has no CRS, or a local one; set it (gdal_edit.py -a_srs)"
            )
        left, bottom, right, top = source.bounds
        xs, ys = _border(left, bottom, right, top)
        with quietly(file):
            x, y = transform(source.crs, self._crs, xs, ys)
        columns, rows = ~self._affine @ (np.array(x), np.array(y))
        if np.isfinite([columns, rows]).all():
            box = (
                float(rows.min()) - 2,
                float(columns.min()) - 2,
                float(rows.max()) + 2,
                float(columns.max()) + 2,
            )
        else:  # a raster of the whole world, which no projection shows as a whole
            box = (-np.inf, -np.inf, np.inf, np.inf)
            x, y = _outer(self.shape, self._affine)
        if not _meets(box, Tile(0, 0, *self.shape)):
            source.close()
            return None
        void = NODATA if source.nodata is None else source.nodata
        if (masked := masked_as(source, void)) is not None:
            with quietly(file):
                source = self._stack.enter_context(rasterio.open(masked))
        grid: dict[str, Any] = {"height": self.shape[0], "width": self.shape[1]}
        grid |= {"crs": self._crs, "transform": self._affine, "dtype": "float32"}
        grid["resampling"] = Resampling.bilinear

        def opened(**voids: float | None) -> Any:
            return self._stack.enter_context(WarpedVRT(source, **grid, **voids))

        warped = opened(src_nodata=void, nodata=NODATA)
        whole = opened(src_nodata=None, nodata=None) if masked is None else None
        ring = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
        outline = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        return _Tile(file, source, void, warped, whole, box, outline)

    def _cover(self) -> float:
        """Share of the scene that the tiles cover, seen at points spread over it."""
        height, width = self.shape
        rows = (np.arange(_SAMPLES) + 0.5) * height / _SAMPLES
        columns = (np.arange(_SAMPLES) + 0.5) * width / _SAMPLES
        scale = Affine.scale(width / _SAMPLES, height / _SAMPLES)
        if not self._tiles or not len(rows) or not len(columns):
            return 0.0
        burnt = rasterize(
            [one.outline for one in self._tiles],
            out_shape=(_SAMPLES, _SAMPLES),
            dtype="uint8",
            transform=self._affine @ scale,
            default_value=1,
        )
        return float(np.asarray(burnt, dtype=np.float64).mean())


def _meets(box: tuple[float, float, float, float], tile: Tile) -> bool:
    top, left, bottom, right = box
    return top < tile.y + tile.height and bottom > tile.y and left < tile.right and right > tile.x


def _may_touch(name: str, longitude: float, latitude: float, reach: float) -> bool:
    """Whether a tile may lie near the scene, by its name; True where that does not say."""
    corner = _CORNER.search(name)
    if corner is None:
        return True
    south = int(corner[2]) * (-1 if corner[1].upper() == "S" else 1)
    west = int(corner[4]) * (-1 if corner[3].upper() == "W" else 1)
    across = abs((west + 0.5 - longitude + 180) % 360 - 180)
    return abs(south + 0.5 - latitude) <= reach + 1 and across <= reach + 1


def _border(
    left: float, bottom: float, right: float, top: float
) -> tuple[list[float], list[float]]:
    """Points along the border of a box, 50 a side: straight lines bend in another CRS."""
    steps = np.arange(50) / 50
    xs = [left + steps * (right - left), np.full(50, right)]
    xs += [right - steps * (right - left), np.full(50, left)]
    ys = [np.full(50, top), top - steps * (top - bottom)]
    ys += [np.full(50, bottom), bottom + steps * (top - bottom)]
    return np.concatenate(xs).tolist(), np.concatenate(ys).tolist()


def _outer(shape: Shape, affine: Affine) -> tuple[list[float], list[float]]:
    """The corners of the scene."""
    height, width = shape
    corners = [affine @ spot for spot in ((0, 0), (width, 0), (width, height), (0, height))]
    return [corner[0] for corner in corners], [corner[1] for corner in corners]
