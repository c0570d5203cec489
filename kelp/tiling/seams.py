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
_ROWS: Final = 512
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
    beside them: the same shores and the same open sea on both sides of the comparison. The map may
    be a file mapped into memory: it is looked at in strips of rows.
    """
    height, width = grid.shape
    logs = [np.zeros(max(size - 1, 0)) for size in (height, width)]
    counts = [np.zeros(len(line), dtype=np.int64) for line in logs]
    for top in range(0, height, _ROWS):
        rows = np.asarray(probabilities[top : top + _ROWS + 1])
        for axis, block in ((0, rows), (1, rows[:_ROWS])):
            difference = np.abs(np.diff(block, axis=axis))
            seen = np.isfinite(difference)
            values = np.where(seen, np.log(np.where(seen, difference, 1) + _FLOOR), 0)
            at = slice(top, top + len(difference)) if axis == 0 else slice(None)
            logs[axis][at] += values.sum(axis=1 - axis, dtype=np.float64)
            counts[axis][at] += seen.sum(axis=1 - axis)
    sums, numbers = np.zeros(2), np.zeros(2, dtype=np.int64)
    for axis, starts in enumerate((grid.rows, grid.columns)):
        at_border = _borders(starts, grid.tile[axis], grid.shape[axis])
        near = ndimage.binary_dilation(at_border, iterations=_NEAR) & ~at_border
        for k, lines in enumerate((at_border, near)):
            sums[k] += logs[axis][lines].sum()
            numbers[k] += counts[axis][lines].sum()
    return Steps(float(sums[0]), int(numbers[0]), float(sums[1]), int(numbers[1]))


def _borders(starts: Sequence[int], tile: int, size: int) -> NDArray[np.bool_]:
    """Which steps between pixel k and k + 1 cross a border of tiles, `size - 1` of them."""
    edges = {edge for start in starts for edge in (start, start + tile) if 0 < edge < size}
    crossed = np.zeros(max(size - 1, 0), dtype=np.bool_)
    crossed[[edge - 1 for edge in sorted(edges)]] = True
    return crossed
