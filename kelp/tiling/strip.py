"""The rows of a scene that one row of tiles needs, read so that no row is fetched twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kelp.errors import ConfigError
from kelp.raster.bands import BANDS, DEM, reflected
from kelp.raster.validity import observed
from kelp.raster.window import Blend, RasterSource, Shape, Tile
from kelp.tiling.grid import TileGrid

Pixels = NDArray[np.float32]

PIECE: Final = 1 << 18
"""Pixels that are read, or written, at a time."""
WIDEST: Final = 1 << 14
"""Columns of a scene whose strip is held as a whole."""
PANEL: Final = 1 << 13
"""Columns of a wider scene whose pixels are held at a time."""


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


def panel_width(slicing: Slicing, shape: Shape, block: Shape) -> int:
    """Columns of tiles that a strip holds at most, without the margin.

    Not less than a block of the file: it would be decoded for every panel.
    """
    if shape[1] <= max(WIDEST, block[1]):
        return shape[1]
    return min(shape[1], max(PANEL, slicing.tile[1], block[1]))


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


class Run(NamedTuple):
    """Tiles side by side that are all run, or all left out."""

    tiles: tuple[Tile, ...]
    validity: list[float]
    """Share of observed pixels of each."""
    pixels: Pixels | None
    """Shape `(n, 7, *tile)`, a view, right until the next is asked for; None = not run."""
    land: bool
    """Left out as land: DEM > 0 in all of them and around; unknown is not."""


class Strip:
    """A row of tiles of a scene, with the rows around it that decide what is land.

    Rows that the next row of tiles shares are kept. Of a wide scene the pixels of one panel of
    columns are held at a time, and where its tiles are run the shared rows are read again.

    Args:
        source: the scene.
        slicing: how it is cut.
        top: the row from which on it is predicted.
    """

    def __init__(self, source: RasterSource, slicing: Slicing, top: int = 0) -> None:
        self._source = source
        self._block: Shape = getattr(source, "block", Shape(1, source.shape[1]))
        self._tile = slicing.tile
        self._stride, self._across = slicing.stride
        self._qa_as_nodata = slicing.qa_as_nodata
        self._skip_land = slicing.skip_land
        self._margin = slicing.land_tolerance if slicing.skip_land else 0
        height, width = source.shape
        rows = min(strip_rows(slicing), height)
        self._grid = slicing.grid(source.shape)
        self._panels = list(self._split(panel_width(slicing, source.shape, self._block)))
        self._panel = 0
        widest = max(right - left for left, right, _ in self._panels)
        self._pixels = np.empty((len(BANDS), rows, widest), dtype=np.float32)
        self._seen = np.empty((rows, width), dtype=np.bool_)
        self._top = self._bottom = self._fetched(top)
        self._known = self._bottom
        """First row whose observed pixels were not yet looked for."""
        self._reported = top
        self._unreported = self._seen
        self._area: Area | None = getattr(source, "area", None)
        self._inside = np.empty((rows if self._area else 0, width), dtype=np.bool_)
        self._wanted: dict[int, NDArray[np.bool_]] = {}
        """By first row of a row of tiles: which of its tiles touch the area."""
        self._y = top
        self._view: Pixels = self._pixels
        self._seen_before = self._water_before = np.zeros(0, dtype=np.int64)
        self._inside_before = self._seen_before

    def advance(self, y: int) -> NDArray[np.bool_]:
        """Go to the tiles that begin at row `y`; observed planes of the rows that are new.

        They are complete when all `runs` were asked for.
        """
        height, width = self._source.shape
        top = self._fetched(y)
        end = y + self._tile[0] + self._margin
        if self._margin:  # on a multiple of the stride, as without: rows of blocks end there, too
            end = -(-end // self._stride) * self._stride
        end = min(end, height)
        kept = self._bottom - top
        if top > self._top:
            planes = [self._seen, *([self._inside] if self._area else [])]
            if len(self._panels) == 1:
                planes.extend(self._pixels)
            for plane in planes:  # one at a time: where they overlap they are copied aside
                plane[:kept] = plane[top - self._top : self._bottom - self._top]
        self._known, self._top, self._bottom, self._y = self._bottom, top, end, y
        self._unreported = np.empty((max(end - max(self._reported, top), 0), width), np.bool_)
        self._reported = max(self._reported, end)
        self._load(0)
        return self._unreported

    def _split(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Panels: first column, the one after the last, and where the last tile begins."""
        columns, side, width = self._grid.columns, self._tile[1], self._source.shape[1]
        first = 0
        for i, x in enumerate(columns):
            if i + 1 == len(columns) or columns[i + 1] + side > columns[first] + most:
                left = max(0, columns[first] - self._margin)
                yield left, min(x + side + self._margin, width), x
                first = i + 1

    def _load(self, panel: int) -> None:
        """Read what is not yet held of a panel, and look for observed pixels in its new rows."""
        self._panel = panel
        left, right, _ = self._panels[panel]
        shown = (self._inside if self._area else self._seen)[: self._bottom - self._top]
        kept = shown[: self._known - self._top, left:right]
        shared = self._top if len(self._panels) > 1 else self._known
        first = shared if kept.any() else self._known
        self._read(first, self._bottom)
        if shared < first and shown[:, left:right].any():
            self._read(shared, first)
        count = len(self._unreported)
        self._unreported[:, left:right] = shown[len(shown) - count :, left:right]
        self._survey()

    def _read(self, begin: int, end: int) -> None:
        """Read rows of the scene, as far as the panel goes."""
        left, right, _ = self._panels[self._panel]
        step = self._stride if len(self._panels) == 1 else end - begin
        for first in range(begin, end, max(1, step)):
            rows = Tile(first, left, min(step, end - first), right - left)
            window = slice(rows.y - self._top, rows.bottom - self._top), slice(left, right)
            self._seen[window] = False
            if self._area:
                self._inside[window] = False
            for part in self._needed(rows):
                for piece in pieces(part, self._block):  # what is read at once is held twice
                    self._read_piece(piece, left)

    def _read_piece(self, piece: Tile, left: int) -> None:
        """Read a window into the panel, which begins at column `left`."""
        rows = slice(piece.y - self._top, piece.bottom - self._top)
        pixels = self._pixels[:, rows, piece.x - left : piece.right - left]
        pixels[...] = self._source.read(piece)
        window = rows, slice(piece.x, piece.right)
        self._seen[window] = observed(pixels, self._qa_as_nodata)
        if self._area:
            self._inside[window] = self._area.mask(piece) & self._seen[window]

    def runs(self) -> Iterator[Run]:
        """The tiles of the present row, from left to right."""
        for panel in range(len(self._panels)):
            if panel:
                self._load(panel)
            yield from self._runs()

    def _runs(self) -> Iterator[Run]:
        """The tiles of a panel."""
        left, right, last = self._panels[self._panel]
        height, width = self._tile
        before = self._panels[self._panel - 1][2] if self._panel else -1
        columns = np.array(self._grid.columns)
        columns = columns[(columns > before) & (columns <= last)]
        begins, ends = columns - left, columns - left + width
        seen = self._seen_before[ends] - self._seen_before[begins]
        wanted = seen > 0
        if self._area:
            wanted &= self._inside_before[ends] > self._inside_before[begins]
        land = np.zeros_like(wanted)
        if self._skip_land:
            around = np.maximum(begins - self._margin, 0), ends + self._margin
            water = self._water_before[np.minimum(around[1], right - left)]
            land = wanted & (water == self._water_before[around[0]])
            wanted &= ~land
        validity = (seen / (height * width)).tolist()
        steps = np.diff(columns, prepend=columns[0])
        cuts = (wanted[1:] != wanted[:-1]) | (land[1:] != land[:-1]) | (steps[1:] != self._across)
        edges = [0, *(1 + np.flatnonzero(cuts)).tolist(), len(columns)]
        for start, stop in pairwise(edges):
            tiles = tuple(Tile(self._y, x, height, width) for x in columns[start:stop].tolist())
            pixels = self._pixels_of(tiles, left) if wanted[start] else None
            yield Run(tiles, validity[start:stop], pixels, bool(land[start]))

    def _pixels_of(self, tiles: Sequence[Tile], left: int) -> Pixels:
        """Tiles side by side, a view."""
        planes = self._view[:, :, tiles[0].x - left :]
        shape = len(tiles), len(planes), *self._tile
        step = self._across * planes.strides[-1]
        return as_strided(planes, shape, (step, *planes.strides), writeable=False)

    def _needed(self, rows: Tile) -> list[Tile]:
        """A window of whole rows of a panel; of an area only what tiles that touch it lie in."""
        if not self._area:
            return [rows]
        width = self._source.shape[1]
        needed = np.zeros(width + 1, dtype=np.int64)  # +1 where needed columns begin, -1 after
        tile, margin = self._tile, self._margin
        top, bottom = rows.bottom, rows.y
        for y in self._grid.rows:
            first, end = max(y - margin, rows.y), min(y + tile[0] + margin, rows.bottom)
            if first < end and self._touching(y).any():
                top, bottom = min(top, first), max(bottom, end)
                columns = np.array(self._grid.columns)[self._touching(y)]
                np.add.at(needed, np.maximum(columns - margin, 0), 1)
                np.add.at(needed, np.minimum(columns + tile[1] + margin, width), -1)
        held = np.cumsum(needed)[rows.x : rows.right] > 0
        edges = (rows.x + np.flatnonzero(np.diff(held, prepend=False, append=False))).tolist()
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

    def _survey(self) -> None:
        """Look at the tiles of a panel as a whole: running sums make a share one subtraction.

        `_seen_before[x]` counts the observed pixels left of its column x, `_water_before[x]` those
        that are not land, margin included.
        """
        left, right, _ = self._panels[self._panel]
        held = self._bottom - self._top
        first = self._y - self._top
        rows = slice(first, min(first + self._tile[0], held))
        around = slice(0, min(rows.stop + self._margin, held))
        self._view = reflected(self._pixels[:, rows, : right - left], *self._tile)
        self._seen_before = _running(reflected(self._seen[rows, left:right], *self._tile))
        if self._area:
            self._inside_before = _running(reflected(self._inside[rows, left:right], *self._tile))
        if self._skip_land:
            self._water_before = _running(~(self._pixels[DEM, around, : right - left] > 0))


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
