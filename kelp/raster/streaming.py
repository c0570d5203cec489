"""Streaming statistics of one channel: seen once, in parts, merged in any grouping.

Quantiles are those of a DDSketch (Masson, Rim & Lee 2019, doi:10.14778/3352063.3352135): a
histogram whose classes have a bounded relative width. Ours are the exponent and the first ten bits
of a float32, which needs no logarithm. Mean and deviation are Chan, Golub & LeVeque's.

Memory does not grow with the number of pixels. Whole numbers from -32768 to 65535 (everything a
competition band holds) are counted one by one, so that their quantiles are exact. Any other value
is counted with the `1 / 2048` nearest to it, relative to its size (`TOLERANCE`), whatever its
range: no bounds have to be known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

LARGEST: Final = 1e300
"""No channel holds a larger number; `abs(x) <= LARGEST` is false for NaN as well."""
_FIRST, _LAST = -32768, 65535

# A float32 without its last 13 bits: sign, exponent and 10 bits of mantissa, 2^19 classes.
_DROPPED_BITS: Final = 13
_CLASSES: Final = 1 << (32 - _DROPPED_BITS)

TOLERANCE: Final = 2.0**-11
"""Greatest relative error of a quantile of values that are not whole numbers; the middle of a
class is at most half its width away, and a class is at most 2^-10 of its values wide."""


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of the valid pixels of one channel; finite numbers only."""

    min: float
    """Least value."""
    max: float
    """Greatest value."""
    mean: float
    """Mean."""
    std: float
    """Population standard deviation."""
    q01: float
    """1 % quantile (linear interpolation, as `numpy.quantile`)."""
    q99: float
    """99 % quantile."""
    count: int
    """Valid pixels."""
    nan_count: int
    """Missing pixels: nodata, padding, and what the masks leave out of an index."""

    def wrong(self) -> str:
        """What cannot be true of any channel, in words; empty where nothing speaks against it."""
        if not all(abs(value) <= LARGEST for value in astuple(self)):
            return "a number is not finite"
        ordered = self.min <= self.max and self.q01 <= self.q99
        if not ordered or min(self.std, self.count, self.nan_count) < 0:
            return "the numbers contradict each other"
        return ""


def unit_stats(count: int, nan_count: int) -> ChannelStats:
    """What a channel without statistics of its own gets: normalising leaves 0-1 as it is."""
    return ChannelStats(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, count, nan_count)


class ChannelSummary:
    """Everything needed for `ChannelStats`, of the values added so far.

    Law: `a.merge(b)` equals adding b's values to a, exactly for counts, extremes and quantiles,
    to rounding (float64) for mean and deviation. The order of additions and merges fixes the
    last bit of those two, so work in parallel merges in the order of the files.
    """

    def __init__(self) -> None:
        self.count = 0
        self.nan_count = 0
        self.min = math.inf
        self.max = -math.inf
        self.mean = 0.0
        self.squares = 0.0  # sum of squared deviations from the mean
        self._whole: NDArray[np.int64] | None = None
        self._classes: NDArray[np.int64] | None = None

    def add(self, values: NDArray[np.float32]) -> Self:
        """Count a plane of any shape; NaN and infinite values count as missing."""
        values = np.asarray(values, np.float32)
        valid = values[np.isfinite(values)]
        part = ChannelSummary()
        part.count = valid.size
        part.nan_count = values.size - valid.size
        if valid.size:
            part.min, part.max = float(valid.min()), float(valid.max())
            exact = valid.astype(np.float64)
            part.mean = float(exact.mean())
            part.squares = float(np.square(exact - part.mean).sum())
            self._tally(valid)
        return self.merge(part)

    def merge(self, other: ChannelSummary) -> Self:
        """Take over another summary's values (Chan, Golub & LeVeque 1983)."""
        total = self.count + other.count
        if other.count:
            step = other.mean - self.mean
            self.squares += other.squares + step * step * (self.count * other.count / total)
            self.mean += step * (other.count / total)
        self.count = total
        self.nan_count += other.nan_count
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self._whole = _sum(self._whole, other._whole)
        self._classes = _sum(self._classes, other._classes)
        return self

    def stats(self) -> ChannelStats:
        """The statistics; min 0, max 1 and so on for a channel without a valid pixel."""
        if not self.count:
            return unit_stats(0, self.nan_count)
        q01, q99 = self.quantiles((0.01, 0.99))
        std = math.sqrt(self.squares / self.count)
        mean = min(max(self.mean, self.min), self.max)  # rounding may step over by one bit
        return ChannelStats(self.min, self.max, mean, std, q01, q99, self.count, self.nan_count)

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """Quantiles by linear interpolation, of at least one value.

        Exact for whole numbers, else within `TOLERANCE` of the value, and inside [min, max].
        """
        values, counts = self._distinct()
        ends = np.cumsum(counts)
        result = []
        for level in levels:
            position = level * (self.count - 1)
            lower = math.floor(position)
            low, high = values[
                np.searchsorted(ends, (lower, min(lower + 1, self.count - 1)), side="right")
            ]
            value = float(low + (high - low) * (position - lower))
            result.append(min(max(value, self.min), self.max))
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Between processes only the counts that are not zero travel: kilobytes, not megabytes.
        state = dict(self.__dict__)
        for name in ("_whole", "_classes"):
            counts = state[name]
            if counts is not None:
                present = np.flatnonzero(counts)
                state[name] = (counts.size, present.astype(np.int32), counts[present])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("_whole", "_classes"):
            if state[name] is not None:
                size, present, counts = state[name]
                dense = np.zeros(size, np.int64)
                dense[present] = counts
                setattr(self, name, dense)

    def _tally(self, valid: NDArray[np.float32]) -> None:
        whole = (valid == np.rint(valid)) & (valid >= _FIRST) & (valid <= _LAST)
        if whole.any():
            if self._whole is None:
                self._whole = np.zeros(_LAST - _FIRST + 1, np.int64)
            np.add.at(self._whole, valid[whole].astype(np.int32) - _FIRST, 1)
        if not whole.all():
            if self._classes is None:
                self._classes = np.zeros(_CLASSES, np.int64)
            np.add.at(self._classes, valid[~whole].view(np.uint32) >> _DROPPED_BITS, 1)

    def _distinct(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The distinct values that were counted, ascending, and how often."""
        values: list[NDArray[np.float64]] = []
        counts: list[NDArray[np.int64]] = []
        if self._whole is not None:
            present = np.flatnonzero(self._whole)
            values.append((present + _FIRST).astype(np.float64))
            counts.append(self._whole[present])
        if self._classes is not None:
            present = np.flatnonzero(self._classes)
            bits = (present.astype(np.uint32) << _DROPPED_BITS) | (1 << (_DROPPED_BITS - 1))
            values.append(bits.view(np.float32).astype(np.float64))
            counts.append(self._classes[present])
        merged = np.concatenate(values)
        order = np.argsort(merged)
        return merged[order], np.concatenate(counts)[order]


def _sum(a: NDArray[np.int64] | None, b: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    if b is None:
        return a
    return b.copy() if a is None else np.add(a, b, out=a)
