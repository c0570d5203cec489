"""How well two masks agree: counts of pixels and of patches, and every ratio made of them.

One rule for all of kelp: truth 255 is left out; a prediction of 255 (not observed) counts as no
kelp, as it does in a submission, and a second figure leaves such pixels out, too. A ratio 0 / 0 is
undefined: `None` (NaN in arrays, null in files), never 0 or 1. Only the mean over images scores an
image without kelp, in truth and in prediction, as 1, so that every image has a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from kelp.raster.bands import MASK_NODATA

Mask = NDArray[np.uint8]

PATCH_SIZES: Final = ("1-4", "5-16", "17-64", "65+")
"""Sizes of kelp patches in pixels, for which recall is given."""

_LARGEST: Final = (4, 16, 64)  # last size of each class but the open one
_EIGHT_NEIGHBOURS: Final = np.ones((3, 3), dtype=bool)


def ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """`part / whole` of arrays or numbers; NaN where `whole` is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    out = np.full(np.broadcast(part, whole).shape, np.nan)
    quotient: NDArray[np.float64] = np.divide(part, whole, out=out, where=whole != 0)
    return quotient


def dice(tp: Any, fp: Any, fn: Any) -> NDArray[np.float64]:
    """2TP / (2TP + FP + FN) of arrays or numbers; NaN without kelp in either."""
    return ratio(2 * tp, 2 * tp + fp + fn)


def defined(value: Any) -> float | None:
    """A number; `None` for NaN."""
    return float(value) if np.isfinite(value) else None


def mean_dice(values: Any) -> float | None:
    """Mean of the Dice of images or sites, where one without any kelp scores 1; `None` of none."""
    scores = np.nan_to_num(np.array(values, dtype=np.float64), nan=1.0)
    return defined(ratio(scores.sum(), scores.size))


class Confusion(NamedTuple):
    """Labelled pixels by truth and prediction; kelp is the positive class.

    A prediction of 255 counts as no kelp: it is part of `fn` or `tn`.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0
    unobserved_kelp: int = 0
    """Of `fn`, those that the prediction did not observe."""
    unobserved_other: int = 0
    """Of `tn`, those that the prediction did not observe."""

    @classmethod
    def of(cls, truth: Mask, prediction: Mask) -> Confusion:
        """Count two masks of one shape."""
        column = np.where(prediction == MASK_NODATA, 2, prediction == 1)
        cells = np.bincount(
            (3 * (truth == 1) + column)[truth != MASK_NODATA].astype(np.intp), minlength=6
        )
        tn, fp, unobserved_other, fn, tp, unobserved_kelp = (int(n) for n in cells)
        return cls(
            tp, fp, fn + unobserved_kelp, tn + unobserved_other, unobserved_kelp, unobserved_other
        )

    def plus(self, other: Confusion) -> Confusion:
        """Counts of both sets of pixels together."""
        return Confusion(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def observed(self) -> Confusion:
        """Counts of the pixels that the prediction observed."""
        return Confusion(
            self.tp, self.fp, self.fn - self.unobserved_kelp, self.tn - self.unobserved_other
        )

    @property
    def pixels(self) -> int:
        """All labelled pixels."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def dice(self) -> float | None:
        """2TP / (2TP + FP + FN), the competition's score."""
        return defined(dice(self.tp, self.fp, self.fn))

    @property
    def iou(self) -> float | None:
        """TP / (TP + FP + FN)."""
        return defined(ratio(self.tp, self.tp + self.fp + self.fn))

    @property
    def precision(self) -> float | None:
        """Share of the predicted kelp that is kelp."""
        return defined(ratio(self.tp, self.tp + self.fp))

    @property
    def recall(self) -> float | None:
        """Share of the kelp that is predicted."""
        return defined(ratio(self.tp, self.tp + self.fn))

    def scores(self) -> dict[str, float | None]:
        """The four ratios by name."""
        return {name: getattr(self, name) for name in ("dice", "iou", "precision", "recall")}


class PatchCounts(NamedTuple):
    """Kelp patches of one size in the truth, and how many of them were found."""

    patches: int = 0
    found: int = 0

    def plus(self, other: PatchCounts) -> PatchCounts:
        """Of both sets of images."""
        return PatchCounts(self.patches + other.patches, self.found + other.found)

    @property
    def recall(self) -> float | None:
        """Share of the patches that were found."""
        return defined(ratio(self.found, self.patches))


Patches = tuple[PatchCounts, ...]
"""One for each class of `PATCH_SIZES`."""

_NOTHING: Final = Confusion()
_NO_PATCHES: Final = (PatchCounts(),) * len(PATCH_SIZES)


class PatchCounter:
    """Finds the patches of an image that comes in strips of rows, from the top to the bottom.

    Patches are 8-connected; one is found when at least half of its pixels are predicted. Where
    unobserved pixels are left out half of its observed pixels is enough, and a patch that was not
    observed at all is left out; its class is that of its full size all the same.

    Law: the counts do not depend on the strips. Memory grows with their width and height only.
    """

    def __init__(self) -> None:
        self._all = np.zeros((len(PATCH_SIZES), 2), dtype=np.int64)
        self._observed = self._all.copy()
        self._last: NDArray[np.intp] | None = None  # labels of the row above, 0 = no kelp
        self._open = np.zeros((0, 3), dtype=np.int64)  # their patches' pixels, marked, observed

    def add(self, truth: Mask, prediction: Mask) -> None:
        """Add the next strip, two masks of one shape."""
        if not truth.size:
            return
        labels, count = ndimage.label(truth == 1, structure=_EIGHT_NEIGHBOURS)
        kelp = labels > 0
        of_patch, marked = labels[kelp] - 1, prediction[kelp]
        pixels = np.stack(
            [
                np.bincount(of_patch[chosen], minlength=count)
                for chosen in (slice(None), marked == 1, marked != MASK_NODATA)
            ],
            axis=1,
        )
        known = len(self._open)
        members = np.concatenate([self._open, pixels])
        groups, group_of = sparse.csgraph.connected_components(
            self._edges(labels[0], known, len(members)), directed=False
        )
        sums = np.zeros((groups, 3), dtype=np.int64)
        np.add.at(sums, group_of, members)
        last = np.where(labels[-1] > 0, labels[-1] - 1 + known, -1)
        open_groups, renumbered = np.unique(group_of[last[last >= 0]], return_inverse=True)
        self._last = np.zeros(len(last), dtype=np.intp)
        self._last[last >= 0] = renumbered + 1
        self._open = sums[open_groups]
        self._close(np.delete(sums, open_groups, axis=0))

    def _edges(self, row: NDArray[Any], known: int, members: int) -> Any:
        """Which open patches the patches of the first row of a strip belong to."""
        pairs = []
        if self._last is not None:
            width = len(row)
            for shift in (-1, 0, 1):
                above = self._last[max(0, shift) : width + min(0, shift)]
                below = row[max(0, -shift) : width + min(0, -shift)]
                touching = (above > 0) & (below > 0)
                pairs.append(np.stack([above[touching] - 1, below[touching] - 1 + known]))
        start, end = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.intp)
        ones = np.ones(len(start), dtype=np.int8)
        return sparse.coo_array((ones, (start, end)), shape=(members, members))

    def _close(self, patches: NDArray[np.int64]) -> None:
        """Count patches that are complete."""
        size, marked, observed = patches.T
        size_class = np.searchsorted(_LARGEST, size)
        for table, of in ((self._all, size), (self._observed, observed)):
            counted = of > 0
            np.add.at(table, (size_class[counted], 0), 1)
            np.add.at(table, (size_class[counted & (2 * marked >= of)], 1), 1)

    def counts(self) -> tuple[Patches, Patches]:
        """Patches of all pixels, and of those that the prediction observed. Ends the image."""
        self._close(self._open)
        self._open, self._last = self._open[:0], None
        return tuple(
            tuple(PatchCounts(int(n), int(found)) for n, found in table)
            for table in (self._all, self._observed)
        )  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of any number of images. `plus` adds them up, so memory does not grow."""

    images: int = 0
    confusion: Confusion = _NOTHING
    dice_sum: float = 0.0
    patches: Patches = _NO_PATCHES

    @classmethod
    def of(cls, truth: Mask, prediction: Mask, observed_only: bool = False) -> Figures:
        """Figures of one image: two masks of one shape `(height, width)`."""
        image = ImageFigures()
        image.add(truth, prediction)
        return image.figures()[observed_only]

    def plus(self, other: Figures) -> Figures:
        """Figures of both sets of images together."""
        return Figures(
            self.images + other.images,
            self.confusion.plus(other.confusion),
            self.dice_sum + other.dice_sum,
            tuple(a.plus(b) for a, b in zip(self.patches, other.patches, strict=True)),
        )

    @property
    def pooled_dice(self) -> float | None:
        """Dice over the pixels of all images together, the competition's score."""
        return self.confusion.dice

    @property
    def mean_image_dice(self) -> float | None:
        """Mean of the images' own Dice; one without kelp, true or predicted, scores 1."""
        return defined(ratio(self.dice_sum, self.images))

    def to_json(self) -> dict[str, Any]:
        """All figures by name; `None` where undefined."""
        confusion = self.confusion
        return {
            "pooled_dice": self.pooled_dice,
            "mean_image_dice": self.mean_image_dice,
            "iou": confusion.iou,
            "precision": confusion.precision,
            "recall": confusion.recall,
            **{name: getattr(confusion, name) for name in ("tp", "fp", "fn", "tn")},
            "recall_by_patch_size": {
                name: {**patch._asdict(), "recall": patch.recall}
                for name, patch in zip(PATCH_SIZES, self.patches, strict=True)
            },
        }


class ImageFigures:
    """Counts one image that comes in strips of rows, from the top to the bottom."""

    def __init__(self) -> None:
        self.confusion = Confusion()
        self._patches = PatchCounter()

    def add(self, truth: Mask, prediction: Mask) -> None:
        """Add the next strip, two masks of one shape."""
        self.confusion = self.confusion.plus(Confusion.of(truth, prediction))
        self._patches.add(truth, prediction)

    def figures(self) -> tuple[Figures, Figures]:
        """Of all labelled pixels, and of those that the prediction observed. Ends the image."""
        both = (self.confusion, self.confusion.observed)
        return tuple(
            Figures(1, confusion, mean_dice([dice(*confusion[:3])]) or 0.0, patches)
            for confusion, patches in zip(both, self._patches.counts(), strict=True)
        )  # type: ignore[return-value]
