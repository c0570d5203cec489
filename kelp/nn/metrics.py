"""Scores of the kelp class, pooled over all observed pixels of an epoch, from exact counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryConfusionMatrix, BinaryPrecisionRecallCurve

from kelp.raster.bands import MASK_NODATA

THRESHOLD: Final = 0.5
"""The decision threshold of `val/…` scores."""

_MORE_THRESHOLDS: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
"""Where else a network is looked at before it is said to have found nothing; 0 marks everything."""


@dataclass(frozen=True)
class Confusion:
    """Counts of pixels, and the scores that follow from them.

    A score without anything to score (0 / 0) is 1 when there is neither kelp nor predicted
    kelp, else 0: no score is ever NaN.
    """

    true_negative: int
    false_positive: int
    false_negative: int
    true_positive: int

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 0.0 if self.false_positive + self.false_negative else 1.0

    @property
    def dice(self) -> float:
        """2TP / (2TP + FP + FN)."""
        part = 2 * self.true_positive
        return self._ratio(part, part + self.false_positive + self.false_negative)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN)."""
        part = self.true_positive
        return self._ratio(part, part + self.false_positive + self.false_negative)

    @property
    def precision(self) -> float:
        """TP / (TP + FP)."""
        return self._ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        """TP / (TP + FN)."""
        return self._ratio(self.true_positive, self.true_positive + self.false_negative)

    def scores(self) -> dict[str, float]:
        """All four scores by name."""
        return {
            "dice": self.dice,
            "iou": self.iou,
            "precision": self.precision,
            "recall": self.recall,
        }


@dataclass(frozen=True)
class Found:
    """Whether a network tells kelp from the rest at all, at whatever threshold."""

    kelp: int
    """Pixels of kelp that were to be found."""
    everything: float
    """Dice of marking every pixel."""
    best: float
    """Dice at the best of a few thresholds."""

    def enough(self, least: float) -> bool:
        """Whether kelp was found, with a Dice of at least `least`; also where there is none."""
        return not self.kelp or (self.best >= least and self.best > self.everything)


class KelpScores(nn.Module):
    """Accumulates the confusion matrix of an epoch on the network's device, in int64."""

    def __init__(self) -> None:
        super().__init__()
        # Fed with decided 0/1 only. With probabilities it would decide by "> 0.5" where kelp's
        # rule is ">=", and take numbers outside 0-1 for logits.
        self._matrix = BinaryConfusionMatrix(ignore_index=MASK_NODATA, validate_args=False)
        thresholds = torch.tensor(_MORE_THRESHOLDS)
        self._curve = BinaryPrecisionRecallCurve(thresholds, MASK_NODATA, validate_args=False)

    def update(self, probabilities: Tensor, target: Tensor, observed: Tensor) -> None:
        """Count a batch.

        Args:
            probabilities: `(B, h, w)`, any float type.
            target: `(B, h, w)` uint8; 255 is left out.
            observed: `(B, h, w)` bool; False is left out.
        """
        truth = torch.where(observed, target, MASK_NODATA).long()
        self._matrix.update((probabilities >= THRESHOLD).long(), truth)
        self._curve.update(probabilities.float(), truth)

    def confusion(self) -> Confusion:
        """The counts since the last reset; where several processes count, the sum of theirs."""
        with self._matrix.sync_context():
            matrix: Tensor = self._matrix.confmat
            counts = matrix.flatten().tolist()
        return Confusion(*(int(count) for count in counts))

    def found(self) -> Found:
        """What there is to find, and the best that any of a few thresholds makes of it."""
        with self._curve.sync_context():
            tables: Tensor = self._curve.confmat  # (thresholds, truth, prediction)
            counts = [Confusion(*(int(n) for n in table.flatten())) for table in tables]
        everything, *others = [*counts, self.confusion()]
        return Found(
            kelp=everything.true_positive,
            everything=everything.dice,
            best=max(one.dice for one in others),
        )

    def reset(self) -> None:
        """Forget all counts."""
        self._matrix.reset()
        self._curve.reset()
