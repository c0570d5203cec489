"""The rows of a scene that one row of tiles needs, read so that no row is fetched twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError
from kelp.raster.bands import BANDS, DEM, reflected
from kelp.raster.validity import observed
from kelp.raster.window import Blend, RasterSource, Shape, Tile
from kelp.tiling.grid import TileGrid

Pixels = NDArray[np.float32]

PIECE: Final = 1 << 20
"""Pixels that are read, or written, at a time."""


class Area(Protocol):
    """The part of a scene that is wanted, as its `area` (a source without one is wanted whole).

    Only tiles that touch it are read and run, and what lies outside is not observed. Inside, the
    map is that of the whole scene: a tile sees its own pixels, also those outside.
    """

    def mask(self, tile: Tile, /) -> NDArray[np.bool_]:
        """Where a window is wanted: bool, shape `(height, width)`."""


@dataclass(frozen=True)
class Slicing:
    """How scenes are cut into tiles and merged.

    Raises:
        ConfigError: an overlap that is not below the tile, or nothing in a batch.
    """

    tile: Shape
    """Height and width of a tile, px."""
    overlap: Shape
    """Pixels that neighbouring tiles share, vertically and horizontally."""
    blend: Blend = "mean"
    batch_size: int = 8
    """Tiles that the network gets at a time."""
    qa_as_nodata: bool = True
    skip_land: bool = False
    """Do not run tiles that are all land (DEM > 0); their pixels are 0."""
    land_tolerance: int = 3
    """Only where all is land this many pixels around them too: DEMs are misaligned."""

    def __post_init__(self) -> None:
        for side, shared in zip(self.tile, self.overlap, strict=True):
            if not 0 <= shared < side:
                raise ConfigError(
                    f"--sahi_overlap {shared}: must be 0 or more and smaller than the tile, "
                    f"{side} px"
                )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: a batch holds at least 1 tile")

    @property
    def stride(self) -> Shape:
        """From tile to tile, down and across, px."""
        return Shape(self.tile[0] - self.overlap[0], self.tile[1] - self.overlap[1])

    def grid(self, shape: Shape) -> TileGrid:
        """The tiles of a scene."""
        return TileGrid(shape, self.tile, self.overlap)

    def windows(self, shape: Shape, area: Area) -> list[Tile]:
        """What tiles that touch an area see of a scene: a window for each run of them in a row."""
        grid, found = self.grid(shape), list[Tile]()
        for y in grid.rows:
            rows, right = min(self.tile[0], shape[0] - y), 0
            for x in np.array(grid.columns)[_touching(grid, area, y)].tolist():
                left = found.pop().x if found and x <= right else x
                right = min(x + self.tile[1], shape[1])
                found.append(Tile(y, left, rows, right - left))
        return found


def strip_rows(slicing: Slicing) -> int:
    """Rows that a strip holds at most."""
    if not slicing.skip_land or not slicing.land_tolerance:
        return slicing.tile[0]
    return slicing.tile[0] + 2 * slicing.land_tolerance + slicing.stride[0]


def pieces(window: Tile, block: Shape) -> Iterator[Tile]:
    """A window in pieces of about `PIECE` pixels: what copies them needs no more memory.

    They are of whole rows, or of columns where the file is stored in blocks `(height, width)`
    narrower than that: a block would otherwise be decoded for every piece.
    """
    height, width = window.height, window.width
    if block[1] >= width:
        height = max(1, PIECE // width)
    else:
        width = max(1, PIECE // height // block[1]) * block[1]
    for y in range(window.y, window.bottom, height):
        for x in range(window.x, window.right, width):
            yield Tile(y, x, min(height, window.bottom - y), min(width, window.right - x))


class Strip:
    """A row of tiles of a scene, with the rows around it that decide what is land.

    Args:
        source: the scene.
        slicing: how it is cut.
        top: the row from which on it is predicted.
    """

    def __init__(self, source: RasterSource, slicing: Slicing, top: int = 0) -> None:
        self._source = source
        self._block: Shape = getattr(source, "block", Shape(1, source.shape[1]))
        self._tile = slicing.tile
        self._stride = slicing.stride[0]
        self._qa_as_nodata = slicing.qa_as_nodata
        self._skip_land = slicing.skip_land
        self._margin = slicing.land_tolerance if slicing.skip_land else 0
        height, width = source.shape
        rows = min(strip_rows(slicing), height)
        self._pixels = np.empty((len(BANDS), rows, width), dtype=np.float32)
        self._seen = np.empty((rows, width), dtype=np.bool_)
        self._top = self._bottom = self._fetched(top)
        self._reported = top
        self._area: Area | None = getattr(source, "area", None)
        self._grid = slicing.grid(source.shape)
        self._inside = np.empty((rows if self._area else 0, width), dtype=np.bool_)
        self._wanted: dict[int, NDArray[np.bool_]] = {}
        """By first row of a row of tiles: which of its tiles touch the area."""
        self._view: Pixels = self._pixels
        self._seen_before = self._water_before = np.zeros(0, dtype=np.int64)
        self._inside_before = self._seen_before

    def advance(self, y: int) -> NDArray[np.bool_]:
        """Go to the tiles that begin at row `y`; observed planes of the rows that are new."""
        height, width = self._source.shape
        top = self._fetched(y)
        end = y + self._tile[0] + self._margin
        if self._margin:  # on a multiple of the stride, as without: rows of blocks end there, too
            end = -(-end // self._stride) * self._stride
        end = min(end, height)
        kept = self._bottom - top
        if top > self._top:
            planes = (*self._pixels, self._seen, *([self._inside] if self._area else []))
            for plane in planes:  # one at a time: where they overlap they are copied aside
                plane[:kept] = plane[top - self._top : self._bottom - self._top]
        for first in range(self._bottom, end, self._stride):
            self._read(Tile(first, 0, min(self._stride, end - first), width), top)
        self._top, self._bottom = top, end
        shown = self._inside if self._area else self._seen
        unreported = shown[max(self._reported, top) - top : end - top].copy()
        self._reported = max(self._reported, end)
        self._survey(y)
        return unreported

    def _read(self, rows: Tile, top: int) -> None:
        """Read rows of the scene into the strip, which begins at row `top`."""
        new = slice(rows.y - top, rows.bottom - top)
        self._seen[new] = False
        if self._area:
            self._inside[new] = False
        for part in self._needed(rows):
            for piece in pieces(part, self._block):  # what is read at once is held twice
                window = slice(piece.y - top, piece.bottom - top), slice(piece.x, piece.right)
                pixels = self._pixels[:, *window]
                pixels[...] = self._source.read(piece)
                self._seen[window] = observed(pixels, self._qa_as_nodata)
                if self._area:
                    self._inside[window] = self._area.mask(piece) & self._seen[window]

    def pixels(self, tile: Tile) -> Pixels:
        """A tile of the present row of tiles, shape `(7, *tile)`, a view."""
        return self._view[:, :, tile.x : tile.right]

    def validity(self, tile: Tile) -> float:
        """The share of a tile's pixels that are observed; 0 where none of them is wanted."""
        if self._area and self._inside_before[tile.right] == self._inside_before[tile.x]:
            return 0.0
        seen = self._seen_before[tile.right] - self._seen_before[tile.x]
        return float(seen) / (tile.height * tile.width)

    def is_land(self, tile: Tile) -> bool:
        """Whether a tile and the margin around it are all land (DEM > 0; unknown is not)."""
        left = max(0, tile.x - self._margin)
        right = min(tile.right + self._margin, self._source.shape[1])
        return bool(self._water_before[right] == self._water_before[left])

    def _needed(self, rows: Tile) -> list[Tile]:
        """Whole rows of the scene; of an area only what tiles that touch it lie in."""
        if not self._area:
            return [rows]
        needed = np.zeros(rows.width + 1, dtype=np.int64)  # +1 where needed columns begin, -1 after
        tile, margin = self._tile, self._margin
        top, bottom = rows.bottom, rows.y
        for y in self._grid.rows:
            first, end = max(y - margin, rows.y), min(y + tile[0] + margin, rows.bottom)
            if first < end and self._touching(y).any():
                top, bottom = min(top, first), max(bottom, end)
                columns = np.array(self._grid.columns)[self._touching(y)]
                np.add.at(needed, np.maximum(columns - margin, 0), 1)
                np.add.at(needed, np.minimum(columns + tile[1] + margin, rows.width), -1)
        edges = np.flatnonzero(np.diff(np.cumsum(needed) > 0, prepend=False)).tolist()
        return [
            Tile(top, left, bottom - top, right - left)
            for left, right in zip(edges[::2], edges[1::2], strict=True)
        ]

    def _touching(self, y: int) -> NDArray[np.bool_]:
        """Which tiles of the row that begins at `y` touch the area."""
        if y not in self._wanted and self._area:
            self._wanted[y] = _touching(self._grid, self._area, y)
        return self._wanted[y]

    def _fetched(self, y: int) -> int:
        """The first row that tiles beginning at row `y` need."""
        return max(0, y - self._margin)

    def _survey(self, y: int) -> None:
        """Look at the row of tiles as a whole: running sums make each tile's share one subtraction.

        `_seen_before[x]` counts the observed pixels left of column x, `_water_before[x]` those
        that are not land, margin included.
        """
        held = self._bottom - self._top
        rows = slice(y - self._top, min(y - self._top + self._tile[0], held))
        around = slice(0, min(rows.stop + self._margin, held))
        self._view = reflected(self._pixels[:, rows], *self._tile)
        self._seen_before = _running(reflected(self._seen[rows], *self._tile))
        if self._area:
            self._inside_before = _running(reflected(self._inside[rows], *self._tile))
        if self._skip_land:
            self._water_before = _running(~(self._pixels[DEM, around] > 0))


def _touching(grid: TileGrid, area: Area, y: int) -> NDArray[np.bool_]:
    """Which tiles of the row that begins at `y` touch an area."""
    height, width = grid.shape
    columns = np.array(grid.columns)
    inside = area.mask(Tile(y, 0, min(grid.tile[0], height - y), width))
    if not inside.any():  # most rows, where an area is small
        return np.zeros(len(columns), dtype=np.bool_)
    before = _running(inside)
    right = np.minimum(columns + grid.tile[1], width)
    touching: NDArray[np.bool_] = before[right] > before[columns]
    return touching


def _running(plane: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many pixels of the plane are true left of each column, `width + 1` numbers."""
    columns = plane.view(np.uint8).sum(axis=0, dtype=np.uint32)
    return np.concatenate([[0], np.cumsum(columns, dtype=np.int64)])
