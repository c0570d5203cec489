"""Probabilities in one byte: how `kelp predict --probability_dtype uint8` stores them.

Every count over probabilities (thresholds, calibration, comparison) rounds them in this way, so
that figures of stored maps and of maps in memory are the same.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.raster.bands import MASK_NODATA

CODES: Final = 250
"""A stored unit is 1/250 = 0.004, which decimal scale factors can say; 255 = not observed."""


def quantise(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Probabilities 0-1 as the nearest whole number of 1/250; NaN becomes 255."""
    codes = np.rint(np.nan_to_num(probabilities) * CODES)
    return np.where(np.isnan(probabilities), MASK_NODATA, codes).astype(np.uint8)


def dequantise(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities of codes; 255 becomes NaN. `quantise(dequantise(codes))` gives `codes`."""
    p = codes.astype(np.float32) / np.float32(CODES)
    p[codes == MASK_NODATA] = np.nan
    return p


def code_of(threshold: float) -> int:
    """The lowest code whose probability is at least `threshold`; 1 at least."""
    return max(1, int(np.ceil(round(threshold * CODES, 6))))
