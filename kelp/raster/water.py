"""What clear water looks like in a scene, and the scene as if its water looked as it mostly does.

Haze, sun glint and the atmosphere's correction lift or lower the water of a whole scene, or of a
part of it, by more than kelp differs from water. So the optical bands are shifted to where the
scene's own clear water has fixed levels: in training, in prediction, in every comparison alike.

The levels are estimated once a scene, on a coarse grid: medians of clear-water pixels in cells
about as large as a competition image. They come from counts of whole numbers, so they do not
depend on the windows in which the scene is read, and reading needs a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.raster.bands import DEM, NODATA, OPTICAL, QA, Anchoring
from kelp.raster.window import RasterSource, Shape, Tile

WATER_LEVELS: Final = (7574.0, 7794.0, 7828.0, 8136.0, 8162.0)
"""DN of clear water that scenes are shifted to: means over 3,000 tiles of the competition (Team
Epoch, drivendataorg/kelp-wanted, 1st-place, feature notebook)."""

CELL: Final = 350
"""Side of a cell in pixels: a competition image is one, so that large scenes are treated alike."""

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
"""Clear-water pixels that a cell's median takes (in small ones: a hundredth of them)."""
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
        levels: DN of clear water in each cell, `(rows, columns, 5)`, bands in `OPTICAL` order;
            empty (0 rows) where nothing is known, and nothing is shifted.
        clear: clear-water pixels that were found in each cell, `(rows, columns)`.
        target: levels that the water is shifted to.
        knows_elevation: whether the DEM is known anywhere.
        origin: `(y, x)` in the scene of the upper left pixel of what is read: of a file that was
            cut out of it.
    """

    shape: Shape
    levels: NDArray[np.float64]
    clear: NDArray[np.int64]
    target: tuple[float, ...] = WATER_LEVELS
    knows_elevation: bool = True
    origin: tuple[int, int] = (0, 0)

    @classmethod
    def estimate(
        cls,
        source: RasterSource,
        anchoring: Anchoring = "local",
        target: Sequence[float] = WATER_LEVELS,
    ) -> Self:
        """Find the clear water of a scene, reading it once, some rows at a time.

        Clear water: DEM <= 0 or unknown, QA 0, all optical bands there and not saturated, dark in
        SWIR, and not much brighter in NIR. A cell with too little of it takes the levels of those
        around it. Where the whole scene has too little, it is left as it is (see `fallback`).

        Args:
            source: the scene; values in DN of Landsat Collection 2 Level 2.
            anchoring: one cell for all the scene, or cells of about `CELL` px, or none.
            target: DN that clear water is to have, of each optical band.
        """
        height, width = source.shape
        side = CELL if anchoring == "local" else max(height, width)
        down, right = _edges(height, side), _edges(width, side)
        grid = (len(down) - 1, len(right) - 1)
        levels = np.full((*grid, len(OPTICAL)), np.nan)
        clear = np.zeros(grid, dtype=np.int64)
        knows = False
        if anchoring != "none":
            for row, (top, bottom) in enumerate(pairwise(down)):
                kind = np.int32 if anchoring == "local" else np.int64  # of cells, of a scene
                counts = np.zeros((grid[1], len(OPTICAL), _LEVELS), dtype=kind)
                for y in range(top, bottom, _ROWS):
                    for x in range(0, width, _COLUMNS):
                        rows, columns = min(_ROWS, bottom - y), min(_COLUMNS, width - x)
                        pixels = source.read(Tile(y, x, rows, columns))
                        knows = knows or bool(np.isfinite(pixels[DEM]).any())
                        _count(pixels, [max(0, edge - x) for edge in right], counts)
                clear[row] = counts[:, 0].sum(axis=1)
                for column in range(grid[1]):
                    area = (bottom - top) * (right[column + 1] - right[column])
                    if clear[row, column] >= max(1, min(_ENOUGH, area // 100)):
                        levels[row, column] = _medians(counts[column])
        return cls((height, width), _filled(levels, clear), clear, tuple(target), knows)

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
        cells = self.levels.reshape(-1, len(OPTICAL))
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
        for y in range(0, tile.height, _ROWS):  # some rows at a time: shifts take more than pixels
            rows = min(_ROWS, tile.height - y)
            part = Tile(tile.y + y, tile.x, rows, tile.width)
            for band, (goal, levels) in enumerate(
                zip(self.target, self._levels(part), strict=True)
            ):
                plane = out[band, y : y + rows]
                # Whole numbers, so that integers stay integers in every number format.
                shift = np.rint(goal - levels).astype(np.float32)
                np.add(plane, shift, out=plane, where=(plane != NODATA) & (plane < _SATURATED))
        return out

    def cut(self, y: int, x: int) -> Self:
        """The same reference for a file that was cut out of the scene at `(y, x)`."""
        return replace(self, origin=(self.origin[0] + y, self.origin[1] + x))

    def to_json(self) -> dict[str, Any]:
        """For records; `from_json` gives it back."""
        return {
            "shape": list(self.shape),
            "levels": self.levels.tolist(),
            "clear": self.clear.tolist(),
            "target": list(self.target),
            "knows_elevation": self.knows_elevation,
            "origin": list(self.origin),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Raises `InputError` where it is not what `to_json` wrote."""
        try:
            height, width = (int(size) for size in content["shape"])
            levels = np.array(content["levels"], dtype=np.float64)
            levels = levels.reshape(-1, levels.shape[1] if levels.size else 1, len(OPTICAL))
            clear = np.array(content["clear"], dtype=np.int64)
            target = tuple(float(value) for value in content["target"])
            y, x = (int(start) for start in content["origin"])
            known = bool(content["knows_elevation"])
            return cls((height, width), levels, clear, target, known, (y, x))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError("not a water reference as kelp writes it") from error

    def _levels(self, tile: Tile) -> NDArray[np.float64]:
        """Levels at each pixel of a window, `(5, height, width)`: bilinear between cells.

        Each pixel by itself, from its place in the scene: windows do not matter to the last bit.
        """
        rows, columns = self.levels.shape[:2]
        y, x = tile.y + self.origin[0], tile.x + self.origin[1]
        up, down, t = _between(np.arange(y, y + tile.height), self.shape[0], rows)
        left, right, u = _between(np.arange(x, x + tile.width), self.shape[1], columns)
        grid = np.moveaxis(self.levels, 2, 0)
        upper = grid[:, up][:, :, left] * (1 - u) + grid[:, up][:, :, right] * u
        lower = grid[:, down][:, :, left] * (1 - u) + grid[:, down][:, :, right] * u
        t = t[:, np.newaxis]
        values: NDArray[np.float64] = upper * (1 - t) + lower * t
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


def _filled(levels: NDArray[np.float64], clear: NDArray[np.int64]) -> NDArray[np.float64]:
    """Levels of all cells: each the mean of all known, weighted by their water and nearness.

    Inverse distances to the sixth power (Shepard 1968): a cell's own water weighs 27 times what
    its neighbour's does, and holes take what lies around them. No row where none is known.
    """
    known = np.isfinite(levels[..., 0])
    if not known.any():
        return levels[:0]
    places = np.argwhere(known).astype(np.float64)
    values, water = levels[known], clear[known].astype(np.float64)
    out = np.empty_like(levels)
    for row in range(levels.shape[0]):
        for column in range(levels.shape[1]):
            distance = ((places - (row, column)) ** 2).sum(axis=1)
            weight = water / (_NEAR + distance) ** 3
            out[row, column] = (weight[:, np.newaxis] * values).sum(axis=0) / weight.sum()
    return out


def _between(
    at: NDArray[np.int_], size: int, cells: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """The cells before and after each pixel, and how far it is on its way between their middles."""
    where = np.clip((at + 0.5) * cells / size - 0.5, 0, cells - 1)
    before = np.minimum(where.astype(np.intp), max(0, cells - 2))
    return before, np.minimum(before + 1, cells - 1), where - before
