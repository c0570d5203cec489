"""The threshold at which masks agree best with truth, found on a histogram of probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.evaluation.confusion import dice, ratio
from kelp.raster.bands import MASK_NODATA
from kelp.raster.probability import CODES

Mask = NDArray[np.uint8]

_PARTS: Final = 10


def parts_of(sites: int, seed: int) -> NDArray[np.intp]:
    """The part of each site, numbered from 0; what is fitted for a part is fitted on the others.

    Up to ten parts. With two, a threshold would depend on which of the few large beds fell into
    which half.
    """
    order = np.random.default_rng(seed).permutation(sites)
    part = np.empty(sites, dtype=np.intp)
    part[order] = np.arange(sites) % min(_PARTS, sites)
    return part


@dataclass(frozen=True)
class Histogram:
    """Labelled pixels by class of probability.

    Attributes:
        pixels: observed pixels without and with kelp in each class, `(…, 2, classes)`.
        unobserved_kelp: pixels of kelp that were not observed, `(…,)`: missed at any threshold.
    """

    pixels: NDArray[np.int64]
    unobserved_kelp: NDArray[np.int64]

    @classmethod
    def empty(cls, shape: Sequence[int], classes: int = CODES + 1) -> Histogram:
        """One to add to, for each of `shape` (parts, sites); of codes unless told otherwise."""
        return cls(np.zeros((*shape, 2, classes), np.int64), np.zeros(tuple(shape), np.int64))

    def add(self, at: int | tuple[int, ...], truth: Mask, codes: Mask) -> None:
        """Count pixels by code (`kelp.raster.probability`) at a position of `shape`."""
        observed = codes != MASK_NODATA
        for k in (0, 1):
            chosen = codes[observed & (truth == k)]
            self.pixels[at][k] += np.bincount(chosen, minlength=CODES + 1)
        self.unobserved_kelp[at] += np.count_nonzero(~observed & (truth == 1))

    def plus(self, other: Histogram) -> Histogram:
        """Of both sets of pixels."""
        return Histogram(self.pixels + other.pixels, self.unobserved_kelp + other.unobserved_kelp)

    def total(self) -> Histogram:
        """Of all positions together."""
        axes = tuple(range(self.unobserved_kelp.ndim))
        return Histogram(self.pixels.sum(axis=axes), self.unobserved_kelp.sum(axis=axes))

    def others(self) -> Histogram:
        """For each position of the first axis, the sum of the other ones."""
        return Histogram(
            self.pixels.sum(axis=0) - self.pixels,
            self.unobserved_kelp.sum(axis=0) - self.unobserved_kelp,
        )

    def grouped(self, groups: NDArray[np.intp]) -> Histogram:
        """Sums of the positions of the first axis that are in one group."""
        found = Histogram.empty(
            (int(groups.max()) + 1, *self.unobserved_kelp.shape[1:]), self.pixels.shape[-1]
        )
        np.add.at(found.pixels, groups, self.pixels)
        np.add.at(found.unobserved_kelp, groups, self.unobserved_kelp)
        return found

    def counts(self) -> NDArray[np.int64]:
        """TP, FP and FN where kelp begins with each class, `(…, 3, classes)`."""
        above = self.pixels[..., ::-1].cumsum(axis=-1)[..., ::-1]
        kelp = self.pixels[..., 1, :].sum(axis=-1) + self.unobserved_kelp
        false, true = above[..., 0, :], above[..., 1, :]
        return np.stack([true, false, kelp[..., np.newaxis] - true], axis=-2)

    def dice(self) -> NDArray[np.float64]:
        """Pooled Dice where kelp begins with each class, `(…, classes)`; NaN without kelp."""
        counts = self.counts()
        return dice(*(counts[..., k, :] for k in range(3)))

    def precision(self) -> NDArray[np.float64]:
        """Precision where kelp begins with each class; NaN where nothing does."""
        counts = self.counts()
        return ratio(counts[..., 0, :], counts[..., 0, :] + counts[..., 1, :])

    def recall(self) -> NDArray[np.float64]:
        """Recall where kelp begins with each class; NaN without kelp in the truth."""
        counts = self.counts()
        return ratio(counts[..., 0, :], counts[..., 0, :] + counts[..., 2, :])


def best_threshold(
    scores: NDArray[np.float64], allowed: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """The class to begin kelp with: where a score is highest, the lowest such class.

    Args:
        scores: of each class, `(…, classes)`; NaN = undefined, which counts as 0.
        allowed: classes to choose from; default: all but the first, which would mark everything.
    """
    classes = np.arange(1, scores.shape[-1]) if allowed is None else allowed
    best: NDArray[np.intp] = classes[np.nan_to_num(scores[..., classes]).argmax(axis=-1)]
    return best
