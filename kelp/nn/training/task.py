"""What one step and one epoch of training are; Lightning does the loop around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kelp.config import TrainConfig
from kelp.nn import symmetry
from kelp.nn.dataset import Sample
from kelp.nn.losses import LossSettings, build_loss
from kelp.nn.metrics import KelpScores
from kelp.nn.model import KelpNet
from kelp.nn.training.rates import build_optimizer, build_scheduler

TRAIN_LOSS: Final = "train/loss"
VAL_LOSS: Final = "val/loss"
LEARNING_RATE: Final = "lr"


class KelpTask(LightningModule):
    """Network, loss, scores, optimizer. Everything random follows from seed, epoch and batch."""

    def __init__(self, net: KelpNet, config: TrainConfig) -> None:
        super().__init__()
        self.net = net
        self.config = config
        background, kelp = config.ce_class_weights
        self.loss = build_loss(
            config.loss, LossSettings(config.ce_smooth_factor, (background, kelp))
        )
        self.scores = KelpScores()

    def on_train_epoch_start(self) -> None:
        """Start the network's own random numbers (dropout) anew, so that a run can be resumed."""
        torch.manual_seed(_seed(self.config.seed, self.current_epoch))

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """The loss of a batch, its crops turned and mirrored."""
        raw, target = batch.raw, batch.target
        if self.config.augment:
            seed = _seed(self.config.seed, self.current_epoch, batch_idx)
            raw, target = symmetry.augment((raw, target), torch.Generator().manual_seed(seed))
        loss = self.loss(self.net(raw), self.net.resize_target(target))
        self.log(TRAIN_LOSS, loss, on_step=False, on_epoch=True, batch_size=len(raw))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the epoch before."""
        self.scores.reset()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Loss at the network's resolution, scores at that of the input."""
        logits = self.net(batch.raw)
        loss = self.loss(logits, self.net.resize_target(batch.target))
        self.log(VAL_LOSS, loss, batch_size=len(batch.raw))
        probabilities = self.net.to_input(logits.sigmoid(), batch.target.shape[-2:])
        self.scores.update(probabilities, batch.target, batch.observed)

    def on_validation_epoch_end(self) -> None:
        """Log the scores, pooled over the fold."""
        scores = self.scores.confusion().scores()
        self.log_dict({f"val/{name}": value for name, value in scores.items()})

    def on_train_epoch_end(self) -> None:
        """Log the learning rate that the epoch ended with."""
        self.log(LEARNING_RATE, self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """The optimizer, and its scheduler where there is one."""
        optimizer = build_optimizer(self.net.parameters(), self.config)
        if self.config.lr_scheduler == "none":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, self.config, steps)
        by_scores = isinstance(scheduler, ReduceLROnPlateau)
        course = {
            "scheduler": scheduler,
            "interval": "epoch" if by_scores else "step",
            "monitor": self.config.monitor_metric,
        }
        return {"optimizer": optimizer, "lr_scheduler": course}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """After an optimizer step: on with the schedulers that go by steps."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """After an epoch's validation, before its checkpoint: on with those that go by scores.

        Lightning would do this after the checkpoint, and not at all where a run is resumed.
        """
        schedulers = self.lr_schedulers()
        if isinstance(schedulers, ReduceLROnPlateau):
            schedulers.step(metrics[self.config.monitor_metric])


def _seed(*parts: int) -> int:
    """One seed out of several numbers, without the collisions of adding them."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
