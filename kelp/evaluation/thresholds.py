"""The threshold at which masks agree best with truth, counted in steps of probability."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.raster.bands import MASK_NODATA
from kelp.raster.probability import CODES

Mask = NDArray[np.uint8]

_PARTS: Final = 10


def parts_of(places: int, seed: int) -> NDArray[np.intp]:
    """The part of each place, numbered from 0; what is fitted for a part is fitted on the others.

    Up to ten parts. With two, a threshold would hang on which of the few large beds fell into
    which half.
    """
    order = np.random.default_rng(seed).permutation(places)
    part = np.empty(places, dtype=np.intp)
    part[order] = np.arange(places) % min(_PARTS, places)
    return part


def best_threshold(by_code: NDArray[np.int64]) -> int:
    """The code at which pooled Dice is highest.

    Args:
        by_code: pixels without and with kelp for each code, `(2, CODES + 1)`.
    """
    false, true = _at_or_above(by_code)
    dice = _divide(2.0 * true, true + false + float(by_code[1].sum()))
    return 1 + int(np.argmax(np.nan_to_num(dice[1:])))


def precision_by_code(by_code: NDArray[np.int64]) -> NDArray[np.float64]:
    """Precision where kelp is at or above each code, `(CODES + 1,)`; NaN where nothing is.

    Args:
        by_code: pixels without and with kelp for each code, `(2, CODES + 1)`.
    """
    false, true = _at_or_above(by_code)
    return _divide(1.0 * true, 1.0 * (true + false))


def _at_or_above(by_code: NDArray[np.int64]) -> NDArray[np.int64]:
    return by_code[:, ::-1].cumsum(axis=1)[:, ::-1]


def pixels_by_code(truth: Mask, codes: Mask) -> NDArray[np.int64]:
    """Pixels without and with kelp for each code, `(2, CODES + 1)`; not observed counts as 0."""
    p = np.where(codes == MASK_NODATA, 0, codes)
    return np.stack([np.bincount(p[truth == k], minlength=CODES + 1) for k in (0, 1)])


def _divide(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)
