"""Loss functions on logits `(B, H, W)` against uint8 targets: 0, 1, and 255 = left out.

All are computed in float32, whatever the network's number format: sums over a hundred thousand
pixels do not fit into 16 bits. A batch without any valid pixel costs 0, with zero gradients.

The region losses (dice, jaccard, tversky) pool the whole batch, as the score pools all images,
and are smoothed by one pixel. So false kelp costs something also where a batch holds no kelp at
all; the usual implementations give such batches no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from kelp.config.choices import Loss
from kelp.raster.bands import MASK_NODATA

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits, target)`: a float32 scalar."""

_SMOOTH_PIXELS: Final = 1.0
_TINY: Final = 1e-6
_LOVASZ: Final = LovaszLoss("binary", per_image=False, ignore_index=MASK_NODATA)


@dataclass(frozen=True)
class LossSettings:
    """What the options of `kelp train` say about the loss."""

    smooth_factor: float = 0.0
    """Label smoothing of ce, soft_ce, bce and combo."""
    class_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of background and kelp in ce, bce and combo."""


def build_loss(name: Loss, settings: LossSettings = LossSettings()) -> LossFunction:
    """The loss of `--loss`."""
    return _BUILDERS[name](settings)


@dataclass(frozen=True)
class Overlap:
    """1 - Tversky index: TP / (TP + α FP + β FN) on soft counts (Salehi et al. 2017).

    α = β = 1/2 is the Dice coefficient, α = β = 1 the Jaccard index (IoU).
    """

    false_positive: float
    false_negative: float

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, between 0 and 1."""
        logits, truth, valid = _prepare(logits, target)
        probability = logits.sigmoid() * valid
        hit = (probability * truth).sum()
        wrong = self.false_positive * (probability.sum() - hit)
        missed = self.false_negative * (truth.sum() - hit)
        # Half a pixel on both sides is "+ 1" in the usual form of Dice, 2TP / (2TP + FP + FN).
        smooth = _SMOOTH_PIXELS / 2
        return 1 - (hit + smooth) / (hit + wrong + missed + smooth)


@dataclass(frozen=True)
class FocalOverlap:
    """A region loss to a power below 1: what is nearly right still pulls (Abraham & Khan 2019)."""

    overlap: Overlap
    power: float = 0.75

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, between 0 and 1."""
        # The root of 0 has no slope to follow.
        raised = torch.pow(self.overlap(logits, target) + _TINY, self.power)
        return raised - float(_TINY**self.power)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the two classes; class weights are normalised over the batch."""

    settings: LossSettings

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, at least 0."""
        logits, truth, valid = _prepare(logits, target)
        classes = torch.stack((torch.zeros_like(logits), logits), dim=1)
        weight = logits.new_tensor(self.settings.class_weights)
        total = functional.cross_entropy(
            classes,
            torch.where(valid, truth.long(), MASK_NODATA),
            weight=weight,
            ignore_index=MASK_NODATA,
            reduction="sum",
            label_smoothing=self.settings.smooth_factor,
        )
        # cross_entropy's own mean would be 0 / 0 without valid pixels.
        weights = torch.where(truth > 0, weight[1], weight[0]) * valid
        return total / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy, a mean over valid pixels; smoothing moves 0 to s and 1 to 1 - s."""

    settings: LossSettings

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, at least 0."""
        logits, truth, valid = _prepare(logits, target)
        background, kelp = self.settings.class_weights
        smooth = self.settings.smooth_factor
        loss = functional.binary_cross_entropy_with_logits(
            logits,
            truth * (1 - 2 * smooth) + smooth,
            weight=torch.where(truth > 0, kelp, background),
            reduction="none",
        )
        return _mean(loss, valid)


@dataclass(frozen=True)
class Combo:
    """The sum of two losses."""

    first: LossFunction
    second: LossFunction

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, at least 0."""
        return self.first(logits, target) + self.second(logits, target)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss with α = 0.25 and γ = 2 (Lin et al. 2017), a mean over valid pixels."""
    logits, truth, valid = _prepare(logits, target)
    return _mean(sigmoid_focal_loss(logits, truth), valid)


def matthews(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Matthews correlation coefficient on soft counts of the batch (Abhishek & Hamarneh 2021).

    Half a pixel more is right of either class, so that batches of one class have a gradient.
    """
    logits, truth, valid = _prepare(logits, target)
    probability = logits.sigmoid() * valid
    hit = (probability * truth).sum()
    wrong = probability.sum() - hit
    missed = truth.sum() - hit
    rejected = valid.sum() - hit - wrong - missed + _SMOOTH_PIXELS / 2
    hit = hit + _SMOOTH_PIXELS / 2
    spread = ((hit + wrong) * (hit + missed)).sqrt() * (
        (rejected + wrong) * (rejected + missed)
    ).sqrt()
    return 1 - (hit * rejected - wrong * missed) / spread


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász hinge: the Jaccard index itself, made convex (Berman et al. 2018)."""
    logits, truth, valid = _prepare(logits, target)
    loss: Tensor = _LOVASZ(logits, torch.where(valid, truth, MASK_NODATA))
    return loss


def _prepare(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and truth in float32, 0 where the target is left out; and where it is not."""
    valid = target != MASK_NODATA
    # Replaced before anything is computed: masking a NaN afterwards leaves NaN in its gradient.
    logits = torch.where(valid, logits.float(), 0.0)
    return logits, torch.where(valid, target, 0).float(), valid


def _mean(loss: Tensor, valid: Tensor) -> Tensor:
    return (loss * valid).sum() / valid.sum().clamp(min=1)


_BUILDERS: Final[Mapping[str, Callable[[LossSettings], LossFunction]]] = {
    "dice": lambda settings: Overlap(0.5, 0.5),
    "jaccard": lambda settings: Overlap(1.0, 1.0),
    "tversky": lambda settings: Overlap(0.3, 0.7),  # the source's best: missing costs more
    "focal_tversky": lambda settings: FocalOverlap(Overlap(0.3, 0.7)),
    "lovasz": lambda settings: lovasz,
    "mcc": lambda settings: matthews,
    "soft_ce": lambda settings: CrossEntropy(LossSettings(settings.smooth_factor)),
    "ce": CrossEntropy,
    "bce": BinaryCrossEntropy,
    "focal": lambda settings: focal,
    "combo": lambda settings: Combo(Overlap(0.5, 0.5), BinaryCrossEntropy(settings)),
}
