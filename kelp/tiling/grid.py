"""Where tiles lie. Pure geometry: no pixels, no files.

Positions are `(y, x)`, shapes `(height, width)`, always in pixels, never the other way round.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final, Literal, overload

from kelp.errors import ConfigError
from kelp.raster.window import Shape, Tile

Edge = Literal["clamp", "pad"]
"""What happens to the last tiles: they are moved back, or stick out."""

MOST_TILES: Final = 1024
"""Tiles that may lie on a pixel: the merger's sums are exact for no more."""


def origins(size: int, tile: int, stride: int, edge: Edge) -> tuple[int, ...]:
    """First pixels of the tiles along one axis of `size` pixels.

    0, stride, 2·stride … until the axis is covered. `clamp` moves the last tile back so that
    it ends at the edge (an axis shorter than a tile has one tile); `pad` lets it stick out.
    """
    steps = max(0, -(-(size - tile) // stride))
    starts = [i * stride for i in range(steps + 1)]
    match edge:
        case "clamp":
            starts[-1] = max(0, size - tile)
        case "pad":
            pass
        case _:
            raise ConfigError(f"edge: choose clamp or pad, not {edge!r}")
    return tuple(starts)


def _most_on_a_pixel(starts: Sequence[int], tile: int) -> int:
    """How many tiles along an axis lie on one pixel, at most."""
    return max(bisect_right(starts, y) - bisect_right(starts, y - tile) for y in starts)


class TileGrid(Sequence[Tile]):
    """All tiles of a scene, row by row.

    Law: every pixel of `shape` lies in at least one tile. With `edge="clamp"` (prediction) no
    tile leaves the scene when the scene is at least one tile large: the last row and column
    are moved back. 350 x 350 with tile 128 and overlap 64 gives 25 tiles. With `edge="pad"`
    (slicing a dataset) the last ones stick out and their reader pads them.

    Args:
        shape: `(height, width)` of the scene.
        tile: side of a tile, or its `(height, width)`.
        overlap: pixels that neighbouring tiles share, or `(vertical, horizontal)`.
        edge: what happens to the last row and column.

    Raises:
        ConfigError: an empty scene, a tile below 1 px, an overlap not below the tile, or one that
            lays more than 1,024 tiles on a pixel; an unknown `edge`.
    """

    def __init__(
        self,
        shape: Shape,
        tile: int | Shape,
        overlap: int | Shape = 0,
        edge: Edge = "clamp",
    ) -> None:
        if min(shape) < 1:
            raise ConfigError(f"a scene of {shape[0]} x {shape[1]} pixels has no pixel to tile")
        self.shape = Shape(*shape)
        self.tile, self.overlap = (
            Shape(sides, sides) if isinstance(sides, int) else Shape(*sides)
            for sides in (tile, overlap)
        )
        for side, shared in zip(self.tile, self.overlap, strict=True):
            if side < 1:
                raise ConfigError(f"the tile size must be at least 1 pixel, not {side}")
            if not 0 <= shared < side:
                raise ConfigError(
                    f"the overlap must lie between 0 and tile size - 1 = {side - 1} px, "
                    f"not {shared}"
                )
        strides = tuple(side - shared for side, shared in zip(self.tile, self.overlap, strict=True))
        self.rows = origins(self.shape.height, self.tile.height, strides[0], edge)
        self.columns = origins(self.shape.width, self.tile.width, strides[1], edge)
        axes = zip((self.rows, self.columns), self.tile, strict=True)
        most = math.prod(_most_on_a_pixel(starts, side) for starts, side in axes)
        if most > MOST_TILES:
            raise ConfigError(
                f"tiles of {self.tile[0]} x {self.tile[1]} px with an overlap of "
                f"{self.overlap[0]} x {self.overlap[1]} px lay {most:,} of them on a pixel; "
                f"at most {MOST_TILES:,} are merged exactly: choose a smaller overlap"
            )

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @overload
    def __getitem__(self, index: int) -> Tile: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tile]: ...
    def __getitem__(self, index: int | slice) -> Tile | Sequence[Tile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, column = divmod(index % len(self), len(self.columns))
        return Tile(self.rows[row], self.columns[column], *self.tile)

    def __iter__(self) -> Iterator[Tile]:
        for y in self.rows:
            yield from self.row(y)

    def row(self, y: int) -> tuple[Tile, ...]:
        """The tiles whose first row is `y`, from left to right."""
        return tuple(Tile(y, x, *self.tile) for x in self.columns)
