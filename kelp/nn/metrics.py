"""Scores of the kelp class, pooled over all observed pixels of an epoch, from exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryConfusionMatrix, BinaryPrecisionRecallCurve

from kelp.evaluation.confusion import Confusion
from kelp.raster.bands import MASK_NODATA

THRESHOLD: Final = 0.5
"""The decision threshold of `val/…` scores."""

_MORE_THRESHOLDS: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
"""Where else a network is looked at before it is said to have found nothing; 0 marks everything."""


def monitored(confusion: Confusion) -> dict[str, float]:
    """The scores of an epoch, each a number, as schedulers and loggers need it.

    Where a score is undefined (0 / 0) it is 1 when there is neither kelp nor predicted kelp, as in
    means over images, else 0.
    """
    empty = 0.0 if confusion.fp + confusion.fn else 1.0
    scores = confusion.scores()
    return {name: empty if value is None else value for name, value in scores.items()}


def from_matrix(cells: Sequence[int]) -> Confusion:
    """From the cells of torchmetrics' matrix: true and false negatives and positives."""
    tn, fp, fn, tp = (int(cell) for cell in cells)
    return Confusion(tp, fp, fn, tn)


def to_matrix(confusion: Confusion) -> dict[str, int]:
    """The cells by name, in the order of torchmetrics' matrix."""
    return {
        "true_negative": confusion.tn,
        "false_positive": confusion.fp,
        "false_negative": confusion.fn,
        "true_positive": confusion.tp,
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
        return from_matrix(counts)

    def found(self) -> Found:
        """What there is to find, and the best that any of a few thresholds makes of it."""
        with self._curve.sync_context():
            tables: Tensor = self._curve.confmat  # (thresholds, truth, prediction)
            counts = [from_matrix(table.flatten().tolist()) for table in tables]
        everything, *others = [*counts, self.confusion()]
        return Found(
            kelp=everything.tp,
            everything=monitored(everything)["dice"],
            best=max(monitored(one)["dice"] for one in others),
        )

    def reset(self) -> None:
        """Forget all counts."""
        self._matrix.reset()
        self._curve.reset()
