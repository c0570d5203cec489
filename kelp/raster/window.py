"""Windows of a raster.

Positions are `(y, x)`, shapes `(height, width)`, always in pixels, never the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, int]
Blend = Literal["mean", "hann"]
"""Window function of a tile's vote where tiles overlap: uniform, or Hann."""


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
    def slices(self) -> tuple[slice, slice]:
        """Index of the tile in an array of shape `(height, width)`."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    def clipped(self, shape: Shape) -> Tile:
        """The part of the tile that lies inside a scene of `shape`."""
        height, width = shape
        return Tile(
            self.y, self.x, min(self.bottom, height) - self.y, min(self.right, width) - self.x
        )
