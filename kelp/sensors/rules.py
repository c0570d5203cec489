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
        tile = Tile(y, 0, len(rows), self.shape[1])
        out = rows
        for name, covered in self._covered(tile):
            covered &= np.isfinite(rows)
            kelp = covered & (rows >= self.threshold)
            for kind, where in (("pixels", covered), ("kelp_pixels", kelp)):
                key = f"{name}_{kind}"
                self.counts[key] = self.counts.get(key, 0) + int(np.count_nonzero(where))
            out = np.where(covered, np.float32(0), out)
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

        top = max(0, tile.y - self.tolerance)
        bottom = min(self.shape[0], tile.bottom + self.tolerance)
        water = ~(elevation(Tile(top, 0, bottom - top, tile.width)) > 0)
        near = maximum_filter(water, size=2 * self.tolerance + 1, mode="constant", cval=0)
        inland: NDArray[np.bool_] = ~near[tile.y - top : tile.bottom - top]
        return inland
