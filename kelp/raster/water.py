"""What clear water looks like in a scene, and the scene as if its water looked as it mostly does.

Haze, sun glint and the atmosphere's correction lift or lower the water of a whole scene, or of a
part of it, by more than kelp differs from water. So the optical bands are shifted to where the
scene's own clear water has fixed levels: in training, in prediction, in every comparison alike.

The levels are estimated once a scene, on a coarse grid: medians of clear-water pixels in cells
about as large as a competition image. They come from counts of whole numbers, so they do not
depend on the windows in which the scene is read, and reading needs a few rows at a time. Of a
scene of many cells one row in `EVERY` is read, the same ones whatever part of it is wanted. A cell
looks at its neighbours only, so a part of a scene needs no more than the cells around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kelp.raster.bands import DEM, NODATA, OPTICAL, QA, Anchoring
from kelp.raster.window import RasterSource, Shape, Tile

WATER_LEVELS: Final = (7574.0, 7794.0, 7828.0, 8136.0, 8162.0)
"""DN of clear water that scenes are shifted to: means over 3,000 tiles of the competition (Team
Epoch, drivendataorg/kelp-wanted, 1st-place, feature notebook)."""

CELL: Final = 350
"""Side of a cell in pixels: a competition image is one, so that large scenes are treated alike."""

EVERY: Final = 17
"""Of scenes of several cells one row in so many is looked at. A prime: scanners have 16 detectors,
whose bands along the scan lines must not fall into step with it."""

_SWIR, _NIR = 0, 1
_SATURATED: Final = 65_535
_LEVELS: Final = 16_384
"""DN counted, from 0 on; water is far below."""
_DARK_SEA: Final = 10_500
"""Brightest SWIR of water where the DEM knows it to be sea; land and clouds are brighter."""
_DARK: Final = 9500
"""The same where the DEM is unknown."""
_LEAF: Final = 1500
"""NIR above SWIR by more is kelp or plants."""
_ENOUGH: Final = 500
"""Clear-water pixels that a cell's median takes, or a hundredth of those that were looked at."""
_ROWS: Final = 64
"""Rows read at a time."""
_COLUMNS: Final = 4096
"""Columns read at a time: of wide scenes full rows would fill the memory."""
_NEAR: Final = 0.5
"""In squared cells: how little neighbours weigh beside a cell's own water."""


@dataclass(frozen=True)
class WaterReference:
    """Levels of clear water over a scene.

    Attributes:
        shape: height and width of the scene, px.
        levels: DN of clear water in each cell, `(rows, columns, 5)`, bands in `OPTICAL` order; NaN
            in cells that nobody asked for; empty (0 rows) where nothing is known, and nothing is
            shifted.
        clear: clear-water pixels that were found in the rows read of each cell, `(rows, columns)`.
        target: levels that the water is shifted to.
        knows_elevation: whether the DEM is known anywhere.
        origin: `(y, x)` in the scene of the upper left pixel of what is read: of a file that was
            cut out of it.
        read_share: share of the scene's pixels that were read for it, 0-1.
    """

    shape: Shape
    levels: NDArray[np.float64]
    clear: NDArray[np.int64]
    target: tuple[float, ...] = WATER_LEVELS
    knows_elevation: bool = True
    origin: tuple[int, int] = (0, 0)
    read_share: float = 1.0

    @classmethod
    def estimate(
        cls,
        source: RasterSource,
        anchoring: Anchoring = "local",
        target: Sequence[float] = WATER_LEVELS,
        windows: Sequence[Tile] | None = None,
    ) -> Self:
        """Find the clear water of a scene, reading some of its rows, or all of a small one, once.

        Clear water: DEM <= 0 or unknown, QA 0, all optical bands there and not saturated, dark in
        SWIR, and not much brighter in NIR. A cell with too little of it takes the levels of those
        around it. Where the whole scene has too little, it is left as it is (see `fallback`).

        Args:
            source: the scene; values in DN of Landsat Collection 2 Level 2.
            anchoring: one cell for all the scene, or cells of about `CELL` px, or none.
            target: DN that clear water is to have, of each optical band.
            windows: the only ones that will be shifted: as all of the scene would shift them, from
                the cells that they lie in and those around, which alone are read. None = all.
        """
        cells = _Cells(source, CELL if anchoring == "local" else max(source.shape))
        levels = cells.levels[:0]
        if anchoring != "none":
            levels = cells.fill(_between_which(windows, source.shape, Shape.of(cells.clear)))
        return cls(
            source.shape,
            levels,
            cells.clear,
            tuple(target),
            cells.knows_elevation,
            read_share=cells.pixels / (source.shape[0] * source.shape[1]),
        )

    @classmethod
    def constant(
        cls, shape: Shape, levels: Sequence[float], target: Sequence[float] = WATER_LEVELS
    ) -> Self:
        """Known levels, the same all over; NaN where nothing is known."""
        known = np.array(levels, dtype=np.float64).reshape(1, 1, len(OPTICAL))
        if not np.isfinite(known).all():
            known = known[:0]
        return cls(shape, known, np.zeros((1, 1), dtype=np.int64), tuple(target))

    @property
    def fallback(self) -> str | None:
        """Why the scene is left as it is, in words; `None` where its water is known."""
        if len(self.levels):
            return None
        return f"no clear water found ({int(self.clear.sum())} px); optical bands are not shifted"

    def level(self, tile: Tile | None = None) -> tuple[float, ...]:
        """DN of clear water in the middle of a window (default: of the scene); NaN if unknown."""
        if not len(self.levels):
            return (np.nan,) * len(OPTICAL)
        tile = tile or Tile(0, 0, *self.shape)
        middle = Tile(tile.y + tile.height // 2, tile.x + tile.width // 2, 1, 1)
        return tuple(self._levels(middle)[:, 0, 0].tolist())

    def extremes(self) -> tuple[list[float], list[float]]:
        """Lowest and highest DN of clear water over the scene, of each band; empty if unknown."""
        if not len(self.levels):
            return [], []
        cells = self.levels[np.isfinite(self.levels[..., 0])]
        return cells.min(axis=0).tolist(), cells.max(axis=0).tolist()

    def apply(self, pixels: NDArray[np.float32], tile: Tile) -> NDArray[np.float32]:
        """A canonical window of the scene with its optical bands shifted; a new array.

        Missing values, saturated ones (65535), QA and DEM stay as they are.

        Args:
            pixels: `(7, height, width)`.
            tile: where in the scene it is from.
        """
        if not len(self.levels):
            return pixels
        out = pixels.copy()
        for part in tile.strips(_ROWS):  # some rows at a time: shifts take more than pixels
            for band, (goal, levels) in enumerate(
                zip(self.target, self._levels(part), strict=True)
            ):
                plane = out[band][part.slices_in(tile)]
                # Whole numbers, so that integers stay integers in every number format.
                shift = np.rint(goal - levels).astype(np.float32)
                np.add(plane, shift, out=plane, where=(plane != NODATA) & (plane < _SATURATED))
        return out

    def cut(self, y: int, x: int) -> Self:
        """The same reference for a file that was cut out of the scene at `(y, x)`."""
        return replace(self, origin=(self.origin[0] + y, self.origin[1] + x))

    def _levels(self, tile: Tile) -> NDArray[np.float64]:
        """Levels at each pixel of a window, `(5, height, width)`: bilinear between cells.

        Each pixel by itself, from its place in the scene: windows do not matter to the last bit.
        """
        rows, columns = self.levels.shape[:2]
        y, x = tile.y + self.origin[0], tile.x + self.origin[1]
        up, down, t = _between(np.arange(y, y + tile.height), self.shape[0], rows)
        left, right, u = _between(np.arange(x, x + tile.width), self.shape[1], columns)
        first = up[0]
        grid = np.moveaxis(self.levels[first : down[-1] + 1], 2, 0)
        across = grid[:, :, left] * (1 - u) + grid[:, :, right] * u  # once a row of cells
        t = t[:, np.newaxis]
        values: NDArray[np.float64] = across[:, up - first] * (1 - t) + across[:, down - first] * t
        return values


@dataclass(frozen=True)
class Anchored:
    """A scene whose windows come with their water at the reference's target."""

    source: RasterSource
    reference: WaterReference

    @property
    def shape(self) -> Shape:
        """Height and width."""
        return self.source.shape

    @property
    def area(self) -> Any:
        """The part of the scene that is wanted (`kelp.tiling.strip.Area`); None = all of it."""
        return getattr(self.source, "area", None)

    @property
    def block(self) -> Shape:
        """Height and width of the blocks in which the scene is stored."""
        block: Shape = getattr(self.source, "block", Shape(1, self.shape[1]))
        return block

    def read(self, tile: Tile | None = None) -> NDArray[np.float32]:
        """A window inside the scene (default: all) as a canonical array."""
        tile = tile or Tile(0, 0, *self.shape)
        return self.reference.apply(self.source.read(tile), tile)


def is_clear_water(pixels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a canonical array shows clear water: bool `(height, width)`."""
    optical = pixels[: len(OPTICAL)]
    elevation = pixels[DEM]
    unknown = ~np.isfinite(elevation)
    dark = np.where(unknown, np.float32(_DARK), np.float32(_DARK_SEA))
    clear: NDArray[np.bool_] = pixels[QA] == 0
    clear &= unknown | (elevation <= 0)
    for band in optical:
        clear &= np.isfinite(band) & (band >= 0) & (band < _LEVELS - 0.5)
    with np.errstate(invalid="ignore"):
        clear &= (optical[_SWIR] < dark) & (optical[_NIR] < optical[_SWIR] + _LEAF)
    return clear


class _Cells:
    """The cells of a scene, read when they are asked for.

    Args:
        source: the scene.
        side: of a cell, about, in px.
    """

    def __init__(self, source: RasterSource, side: int) -> None:
        height, width = source.shape
        self._source = source
        self._down, self._right = _edges(height, side), _edges(width, side)
        grid = (len(self._down) - 1, len(self._right) - 1)
        self._wide = np.int32 if side == CELL else np.int64  # counts of cells, of a scene
        self._read = np.zeros(grid, dtype=np.bool_)
        self.levels = np.full((*grid, len(OPTICAL)), np.nan)
        """Of each cell's own water; NaN where there is too little, or it was not read."""
        self.clear = np.zeros(grid, dtype=np.int64)
        self.knows_elevation = False
        self.pixels = 0
        """How many were read."""

    def fill(self, wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Levels of the wanted cells, NaN in the others; no row where no cell's water is known.

        Each is the mean of those around it, itself included, weighted by their water and nearness:
        inverse distances to the sixth power (Shepard 1968), so a cell's own water weighs 27 times
        what its neighbour's does. Around it are its eight neighbours, and where none of them is
        known the smallest larger square of cells in which one is.
        """
        out = np.full_like(self.levels, np.nan)
        left, reach = wanted.copy(), 1
        while left.any() and reach <= max(wanted.shape):
            squares = {(row, column): _square(row, column, reach) for row, column in _true(left)}
            around = np.zeros_like(left)
            for square in squares.values():
                around[square] = True
            self._look(around)
            for cell, square in squares.items():
                known = np.isfinite(self.levels[square][..., 0])
                if known.any():
                    rows, columns = square
                    at = np.argwhere(known) - (cell[0] - rows.start, cell[1] - columns.start)
                    distance = (at.astype(np.float64) ** 2).sum(axis=1)
                    weight = self.clear[square][known] / (_NEAR + distance) ** 3
                    values = self.levels[square][known]
                    out[cell] = (weight[:, np.newaxis] * values).sum(axis=0) / weight.sum()
                    left[cell] = False
            reach += 1
        return out if np.isfinite(out).any() or not wanted.any() else out[:0]

    def _look(self, chosen: NDArray[np.bool_]) -> None:
        """Find the water of those cells that were not read yet."""
        new = chosen & ~self._read
        self._read |= chosen
        # From the bottom up: what decoded blocks are kept is of the top, which is read next.
        for row in np.flatnonzero(new.any(axis=1))[::-1].tolist():
            changes = np.flatnonzero(np.diff(new[row], prepend=False, append=False)).tolist()
            for first, end in zip(changes[::2], changes[1::2], strict=True):
                self._look_at(row, first, end)

    def _look_at(self, row: int, first: int, end: int) -> None:
        """Cells side by side: those of a row from the column `first` to before `end`."""
        (top, bottom), edges = self._down[row : row + 2], self._right[first : end + 1]
        counts = np.zeros((end - first, len(OPTICAL), _LEVELS), dtype=self._wide)
        looked_at = 0
        for rows in self._rows(top, bottom):
            looked_at += sum(count for _, count in rows)
            for x in range(edges[0], edges[-1], _COLUMNS):
                columns = min(_COLUMNS, edges[-1] - x)
                parts = [self._source.read(Tile(y, x, count, columns)) for y, count in rows]
                pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
                self.pixels += pixels[0].size
                self.knows_elevation |= bool(np.isfinite(pixels[DEM]).any())
                _count(pixels, [max(0, edge - x) for edge in edges], counts)
        self.clear[row, first:end] = counts[:, 0].sum(axis=1)
        for column in range(first, end):
            area = looked_at * (self._right[column + 1] - self._right[column])
            if self.clear[row, column] >= max(1, min(_ENOUGH, area // 100)):
                self.levels[row, column] = _medians(counts[column - first])

    def _rows(self, top: int, bottom: int) -> list[list[tuple[int, int]]]:
        """Which rows of a row of cells are read, each a first one and a count, a list at a time."""
        if self.clear.size > 1:
            return [[(y, 1) for y in range(top + EVERY // 2, bottom, EVERY)]]
        return [[(y, min(_ROWS, bottom - y))] for y in range(top, bottom, _ROWS)]


def _true(cells: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return [(int(row), int(column)) for row, column in np.argwhere(cells)]


def _square(row: int, column: int, reach: int) -> tuple[slice, slice]:
    """The cells around one, itself included; beyond the grid there are none."""
    return (
        slice(max(0, row - reach), row + reach + 1),
        slice(max(0, column - reach), column + reach + 1),
    )


def _between_which(windows: Sequence[Tile] | None, shape: Shape, grid: Shape) -> NDArray[np.bool_]:
    """The cells between which levels of windows are interpolated; of None, all."""
    chosen = np.full(grid, windows is None)
    for one in windows or ():
        up, down, _ = _between(np.array([one.y, one.bottom - 1]), shape[0], grid[0])
        left, right, _ = _between(np.array([one.x, one.right - 1]), shape[1], grid[1])
        chosen[up[0] : down[1] + 1, left[0] : right[1] + 1] = True
    return chosen


def _edges(size: int, side: int) -> list[int]:
    """Where cells begin, and the end: as even as whole pixels allow, each about `side` px."""
    count = max(1, round(size / side))
    return [size * k // count for k in range(count + 1)]


def _count(
    pixels: NDArray[np.float32], right: Sequence[int], counts: NDArray[np.signedinteger[Any]]
) -> None:
    """Add clear-water pixels to the counts `(columns, 5, DN)` of a row of cells.

    `right` are the edges of the cells in the window; what lies beyond it is empty.
    """
    clear = is_clear_water(pixels)
    for column, (start, stop) in enumerate(pairwise(right)):
        chosen = clear[:, start:stop]
        if not chosen.any():
            continue
        for band in range(len(OPTICAL)):
            values = np.rint(pixels[band, :, start:stop][chosen]).astype(np.int64)
            counts[column, band] += np.bincount(values, minlength=_LEVELS).astype(counts.dtype)


def _medians(counts: NDArray[np.signedinteger[Any]]) -> NDArray[np.float64]:
    """Median DN of each band, `(5,)`, from `(5, DN)` counts; of an even number the lower one."""
    half = (counts.sum(axis=1, keepdims=True) + 1) // 2
    medians: NDArray[np.float64] = np.argmax(counts.cumsum(axis=1) >= half, axis=1).astype(float)
    return medians


def _between(
    at: NDArray[np.int_], size: int, cells: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """The cells before and after each pixel, and how far it is on its way between their middles."""
    where = np.clip((at + 0.5) * cells / size - 0.5, 0, cells - 1)
    before = np.minimum(where.astype(np.intp), max(0, cells - 2))
    return before, np.minimum(before + 1, cells - 1), where - before
