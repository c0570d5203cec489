"""How well two masks agree: counts and figures of arrays, no files.

Rules, for every figure: truth 255 is left out; a prediction of 255 (not observed) counts as no
kelp, as it does in a submission; with `observed_only` such pixels are left out, too. An
undefined figure (a ratio 0 / 0) is `None`, never NaN; only the mean over images scores an image
without kelp, in truth and in prediction, as 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.raster.bands import MASK_NODATA

Mask = NDArray[np.uint8]

PATCH_SIZES: Final = ("1-4", "5-16", "17-64", "65+")
"""Sizes of kelp patches in pixels, by which recall is told."""

_LARGEST: Final = (4, 16, 64)  # last size of each class but the open one
_EIGHT_NEIGHBOURS: Final = np.ones((3, 3), dtype=bool)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; `None` where `whole` is 0."""
    return part / whole if whole else None


class Counts(NamedTuple):
    """Pixels by truth and prediction; kelp is the positive class."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def plus(self, other: Counts) -> Counts:
        """Counts of both sets of pixels together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def dice(self) -> float | None:
        """2TP / (2TP + FP + FN), the competition's score; `None` without kelp in either."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float | None:
        """TP / (TP + FP + FN)."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float | None:
        """Share of the predicted kelp that is kelp."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """Share of the kelp that is predicted."""
        return ratio(self.tp, self.tp + self.fn)


class PatchCounts(NamedTuple):
    """Kelp patches of one size in the truth, and how many of them were found."""

    patches: int = 0
    found: int = 0


def count(truth: Mask, prediction: Mask, observed_only: bool = False) -> Counts:
    """Count pixels of two masks of one shape `(height, width)`; 255 as the module tells."""
    scored = truth != MASK_NODATA
    if observed_only:
        scored &= prediction != MASK_NODATA
    # 2 x truth + prediction: tn, fp, fn, tp.
    cells = np.bincount(2 * (truth[scored] == 1) + (prediction[scored] == 1), minlength=4)
    tn, fp, fn, tp = (int(n) for n in cells)
    return Counts(tp, fp, fn, tn)


def count_patches(
    truth: Mask, prediction: Mask, observed_only: bool = False
) -> tuple[PatchCounts, ...]:
    """Patches of the truth and those found, for each class of `PATCH_SIZES`.

    Patches are 8-connected; one is found when at least half of its pixels are predicted. With
    `observed_only` half of its observed pixels is enough, and a patch that nobody could see is
    left out; its class is that of its full size all the same.
    """
    labels, patches = ndimage.label(truth == 1, structure=_EIGHT_NEIGHBOURS)
    kelp = labels > 0
    of_patch, said = labels[kelp], prediction[kelp]

    def pixels(chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        return np.bincount(of_patch[chosen], minlength=patches + 1)[1:]

    size = pixels(np.ones_like(said, dtype=bool))
    judged = pixels(said != MASK_NODATA) if observed_only else size
    found = (judged > 0) & (2 * pixels(said == 1) >= judged)
    size_class = np.searchsorted(_LARGEST, size)
    return tuple(
        PatchCounts(
            int(((size_class == k) & (judged > 0)).sum()), int(((size_class == k) & found).sum())
        )
        for k in range(len(PATCH_SIZES))
    )


_NOTHING: Final = Counts()
_NO_PATCHES: Final = (PatchCounts(),) * len(PATCH_SIZES)


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of any number of images. `plus` adds them up, so memory does not grow."""

    images: int = 0
    counts: Counts = _NOTHING
    dice_sum: float = 0.0
    patches: tuple[PatchCounts, ...] = _NO_PATCHES

    @classmethod
    def of(cls, truth: Mask, prediction: Mask, observed_only: bool = False) -> Figures:
        """Figures of one image: two masks of one shape `(height, width)`."""
        counts = count(truth, prediction, observed_only)
        dice = counts.dice
        patches = count_patches(truth, prediction, observed_only)
        return cls(1, counts, 1.0 if dice is None else dice, patches)

    def plus(self, other: Figures) -> Figures:
        """Figures of both sets of images together."""
        return Figures(
            self.images + other.images,
            self.counts.plus(other.counts),
            self.dice_sum + other.dice_sum,
            tuple(
                PatchCounts(a.patches + b.patches, a.found + b.found)
                for a, b in zip(self.patches, other.patches, strict=True)
            ),
        )

    @property
    def pooled_dice(self) -> float | None:
        """Dice over the pixels of all images together, the competition's score."""
        return self.counts.dice

    @property
    def mean_image_dice(self) -> float | None:
        """Mean of the images' own Dice; one without kelp, true or predicted, scores 1."""
        return ratio(self.dice_sum, self.images)

    def to_json(self) -> dict[str, Any]:
        """All figures by name; `None` where undefined."""
        return {
            "pooled_dice": self.pooled_dice,
            "mean_image_dice": self.mean_image_dice,
            "iou": self.counts.iou,
            "precision": self.counts.precision,
            "recall": self.counts.recall,
            **self.counts._asdict(),
            "recall_by_patch_size": {
                name: {**patch._asdict(), "recall": ratio(patch.found, patch.patches)}
                for name, patch in zip(PATCH_SIZES, self.patches, strict=True)
            },
        }
