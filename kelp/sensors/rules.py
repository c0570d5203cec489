"""Pixels that are "no kelp" whatever a network says: excluded polygons, and land."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kelp.raster.window import Shape, Tile
from kelp.sensors.aoi import Polygons
from kelp.sensors.record import Removed

ReadElevation = Callable[[Tile], NDArray[np.float32]]
"""A window's elevation in metres, NaN = unknown."""


@dataclass
class Rules:
    """Sets finished probabilities to 0; what is not observed stays so.

    Args:
        shape: of the scene.
        threshold: kelp where p is at least this, for the counts.
        excluded: polygons without kelp.
        elevation: where it is above 0, farther than `tolerance` from water, there is no kelp.
        tolerance: pixels, also diagonally; unknown elevation counts as water.
        close: frees what `elevation` reads from.
    """

    shape: Shape
    threshold: float
    excluded: Polygons | None = None
    elevation: ReadElevation | None = None
    tolerance: int = 3
    close: Callable[[], None] = lambda: None
    counts: dict[str, int] = field(default_factory=dict)
    """Observed pixels that a rule covers, and kelp among them; resumed runs restore them."""

    def apply(self, y: int, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows `(n, width)` of probabilities from row `y` on, with 0 where there is no kelp."""
        observed = np.isfinite(rows)
        seen = np.flatnonzero(observed.any(axis=0))
        if not len(seen):  # most rows, where an area of interest is small
            return rows
        columns = slice(int(seen[0]), int(seen[-1]) + 1)
        out, part = rows.copy(), rows[:, columns]
        tile = Tile(y, columns.start, *part.shape)
        for name, covered in self._covered(tile):
            covered &= observed[:, columns]
            kelp = covered & (part >= self.threshold)
            for kind, where in (("pixels", covered), ("kelp_pixels", kelp)):
                key = f"{name}_{kind}"
                self.counts[key] = self.counts.get(key, 0) + int(np.count_nonzero(where))
            out[:, columns][covered] = 0
        return out

    def removed(self, name: str) -> Removed | None:
        """What a rule (`excluded` or `land`) took away, for the record; None = no such rule."""
        if (self.excluded if name == "excluded" else self.elevation) is None:
            return None
        return Removed(
            source=self.excluded.source if name == "excluded" and self.excluded else None,
            tolerance=self.tolerance if name == "land" else None,
            pixels=self.counts.get(f"{name}_pixels", 0),
            kelp_pixels=self.counts.get(f"{name}_kelp_pixels", 0),
        )

    def _covered(self, tile: Tile) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        if self.excluded is not None:
            yield "excluded", self.excluded.mask(tile)
        if self.elevation is not None:
            yield "land", self._inland(tile, self.elevation)

    def _inland(self, tile: Tile, elevation: ReadElevation) -> NDArray[np.bool_]:
        """Land with no water within the tolerance."""
        from scipy.ndimage import maximum_filter

        top, left = max(0, tile.y - self.tolerance), max(0, tile.x - self.tolerance)
        bottom = min(self.shape[0], tile.bottom + self.tolerance)
        right = min(self.shape[1], tile.right + self.tolerance)
        water = ~(elevation(Tile(top, left, bottom - top, right - left)) > 0)
        near = maximum_filter(water, size=2 * self.tolerance + 1, mode="constant", cval=0)
        rows, columns = Tile(tile.y - top, tile.x - left, tile.height, tile.width).slices
        inland: NDArray[np.bool_] = ~near[rows, columns]
        return inland
