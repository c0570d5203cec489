"""Whether a map of probabilities shows where its tiles met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.tiling.grid import TileGrid

_NEAR: Final = 4
"""Pixels on either side of a border with which it is compared."""
_FLOOR: Final = np.float32(1e-6)
"""Added to every step, so that equal neighbours have a logarithm."""


class Steps(NamedTuple):
    """Sums of the logarithms of steps between neighbouring pixels, and how many they are."""

    border: float = 0.0
    borders: int = 0
    elsewhere: float = 0.0
    others: int = 0

    @property
    def score(self) -> float | None:
        """Geometric mean of the steps across borders of tiles by that elsewhere; 1 = no seam.

        A few edges of kelp hold most of a plain mean, which so differs by a tenth between any two
        sets of columns; the geometric mean weighs all pixels alike. `None` without steps.
        """
        if not (self.borders and self.others):
            return None
        return math.exp(self.border / self.borders - self.elsewhere / self.others)


def steps(probabilities: NDArray[np.float32], grid: TileGrid) -> Steps:
    """Steps of a map `(height, width)`; pairs with NaN are left out.

    Borders lie where a tile of the grid begins or ends inside the scene. Elsewhere is some pixels
    beside them: the same shores and the same open sea on both sides of the comparison.
    """
    sums, numbers = np.zeros(2), np.zeros(2, dtype=np.int64)
    for axis, starts in enumerate((grid.rows, grid.columns)):
        at_border = _borders(starts, grid.tile[axis], grid.shape[axis])
        difference = np.abs(np.diff(probabilities, axis=axis))
        seen = np.isfinite(difference)
        logs = np.log(np.where(seen, difference, 1) + _FLOOR)
        by_line = np.where(seen, logs, 0).sum(axis=1 - axis, dtype=np.float64)
        counts = seen.sum(axis=1 - axis)
        near = ndimage.binary_dilation(at_border, iterations=_NEAR) & ~at_border
        for k, lines in enumerate((at_border, near)):
            sums[k] += by_line[lines].sum()
            numbers[k] += counts[lines].sum()
    return Steps(float(sums[0]), int(numbers[0]), float(sums[1]), int(numbers[1]))


def _borders(starts: Sequence[int], tile: int, size: int) -> NDArray[np.bool_]:
    """Which steps between pixel k and k + 1 cross a border of tiles, `size - 1` of them."""
    edges = {edge for start in starts for edge in (start, start + tile) if 0 < edge < size}
    crossed = np.zeros(max(size - 1, 0), dtype=np.bool_)
    crossed[[edge - 1 for edge in sorted(edges)]] = True
    return crossed
