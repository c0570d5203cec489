"""Windows of a raster.

Positions are `(y, x)`, shapes `(height, width)`, always in pixels, never the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rasterio.windows import Window

Blend = Literal["mean", "hann"]
"""Window function of a tile's vote where tiles overlap: uniform, or Hann."""


class Shape(NamedTuple):
    """Height and width in pixels; equal to the plain tuple."""

    height: int
    width: int

    def __repr__(self) -> str:
        return repr(tuple(self))  # numpy writes it into the header of a file

    @classmethod
    def of(cls, array: Any) -> Shape:
        """Of the last two axes of an array or tensor."""
        return cls(*array.shape[-2:])


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of a scene: rows `y … y+height`, columns `x … x+width`."""

    y: int
    x: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """First row below the tile."""
        return self.y + self.height

    @property
    def right(self) -> int:
        """First column right of the tile."""
        return self.x + self.width

    @property
    def shape(self) -> Shape:
        """Height and width."""
        return Shape(self.height, self.width)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the tile in an array of shape `(height, width)`."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    @property
    def window(self) -> Window:
        """The tile as rasterio takes it."""
        from rasterio.windows import Window

        return Window(self.x, self.y, self.width, self.height)

    def slices_in(self, outer: Tile) -> tuple[slice, slice]:
        """Index of the tile in an array of the pixels of `outer`, inside which it lies."""
        return self.moved(-outer.y, -outer.x).slices

    def moved(self, down: int, right: int) -> Tile:
        """The tile some pixels farther down and right."""
        return Tile(self.y + down, self.x + right, self.height, self.width)

    def clipped(self, shape: Shape) -> Tile:
        """The part of the tile that lies inside a scene of `shape`; empty for one outside."""
        height, width = shape
        return Tile(
            self.y,
            self.x,
            max(0, min(self.bottom, height) - self.y),
            max(0, min(self.right, width) - self.x),
        )

    def intersection(self, other: Tile) -> Tile | None:
        """What lies in both tiles; None for nothing."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        height, width = min(self.bottom, other.bottom) - y, min(self.right, other.right) - x
        return Tile(y, x, height, width) if height > 0 and width > 0 else None

    def strips(self, rows: int) -> Iterator[Tile]:
        """Parts of its full width and at most so many rows, from the top."""
        for y in range(self.y, self.bottom, rows):
            yield Tile(y, self.x, min(rows, self.bottom - y), self.width)


class RasterSource(Protocol):
    """A scene that is read by windows: a file, a product of a satellite, an array."""

    @property
    def shape(self) -> Shape:
        """Height and width."""

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        """A window inside the scene as a canonical array `(7, height, width)`."""
