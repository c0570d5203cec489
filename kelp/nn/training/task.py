"""What one step and one epoch of training are, and their optimizers and learning rates.

Lightning does the loop around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from kelp.config import TrainConfig
from kelp.inference.spec import NetworkSpec
from kelp.nn import symmetry
from kelp.nn.data.augmentation import Radiometry
from kelp.nn.data.dataset import Sample
from kelp.nn.device import Float32Depthwise
from kelp.nn.losses import LossSettings, build_loss
from kelp.nn.metrics import KelpScores, monitored
from kelp.nn.model import KelpNet
from kelp.raster.bands import OPTICAL
from kelp.raster.indices import needed_bands
from kelp.raster.window import Shape

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

TRAIN_LOSS: Final = "train/loss"
VAL_LOSS: Final = "val/loss"
LEARNING_RATE: Final = "lr"

NORM_BATCHES: Final = 100
"""Batches, at most, that the statistics of batch normalisation are computed again from."""

_Tensors = tuple[Tensor, ...] | list[Tensor]


class KelpTask(LightningModule):
    """Network, loss, scores, optimizer. Everything random follows from seed, epoch and batch.

    Where several processes train, each makes random draws of its own, and the losses, the counts
    of pixels and the statistics of batch normalisation of all are put together.
    """

    def __init__(self, net: KelpNet, config: TrainConfig) -> None:
        super().__init__()
        self.net = net
        self.config = config
        background, kelp = config.ce_class_weights
        self.loss = build_loss(
            config.loss, LossSettings(config.ce_smooth_factor, (background, kelp))
        )
        self.radiometry = Radiometry(
            config.augment_offset,
            config.augment_gain,
            config.augment_noise,
            config.augment_dropout,
            _optical(net.spec),
        )
        self.scores = KelpScores()
        # A module of this one: so it is moved, kept in checkpoints and resumed with it.
        self.average = build_average(net, config)

    @property
    def scored(self) -> KelpNet:
        """The network that is validated and kept: the average, once there is one."""
        if self.average is None or not self.average.n_averaged:
            return self.net
        return cast(KelpNet, self.average.module)

    @torch.no_grad()
    def setup(self, stage: str) -> None:
        """Take over what only the first process knows: the numbers that normalise, pretrained ones.

        DDP brings the others the parameters, but not the buffers, which it is to leave alone.
        """
        if self.trainer.world_size > 1:
            first = self.trainer.strategy.broadcast(list(self.buffers()))
            for buffer, value in zip(self.buffers(), first, strict=True):
                buffer.copy_(value)

    def on_train_epoch_start(self) -> None:
        """Start the network's own random numbers (dropout) again, so that a run can be resumed."""
        torch.manual_seed(self._seed(self.current_epoch))

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """The loss of a batch, its crops turned and mirrored, and their light changed."""
        raw, target = batch.raw, batch.target
        generator = torch.Generator().manual_seed(self._seed(self.current_epoch, batch_idx))
        if self.config.augment:
            raw, target = symmetry.augment((raw, target), generator)
        raw = self.radiometry(raw, generator)
        with Float32Depthwise():
            logits = self.net(raw)
        loss = self.loss(logits, self.net.resize_target(target))
        self._log_loss(TRAIN_LOSS, loss, len(raw))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step, and one of the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None and self.config.ema_decay:
            self.average.update_parameters(self.net)

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_idx: int) -> None:
        """After the last batch of an epoch, before its validation: one more into the average."""
        is_last = batch_idx + 1 == self.trainer.num_training_batches
        if self.average is not None and self.averages_epochs and is_last:
            self.average.update_parameters(self.net)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            most = -(-NORM_BATCHES // self.trainer.world_size)
            batches = islice(data.norm_dataloader(self.current_epoch), most)
            with self.trainer.precision_plugin.forward_context():
                renew_norms(self.average.module, batches, self.device)

    @property
    def averages_epochs(self) -> bool:
        """Whether `--swa` averages the current epoch."""
        return self.config.swa and self.current_epoch >= self.config.first_averaged_epoch

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the epoch before; one network for all processes."""
        self.scores.reset()
        share_norms(self, self.trainer.strategy)

    def validation_step(self, batch: Sample | None, batch_idx: int) -> Tensor | None:
        """Loss at the network's resolution, scores at that of the input; the probabilities."""
        if batch is None:  # batches did not go round; all the same it takes part in the mean
            self._log_loss(VAL_LOSS, torch.zeros((), device=self.device), 0)
            return None
        logits = self.scored(batch.raw)
        loss = self.loss(logits, self.net.resize_target(batch.target))
        self._log_loss(VAL_LOSS, loss, len(batch.raw))
        probabilities = self.net.to_input(logits.sigmoid(), Shape.of(batch.target))
        self.scores.update(probabilities, batch.target, batch.observed)
        return probabilities

    def on_validation_epoch_end(self) -> None:
        """Log the scores, pooled over the fold."""
        scores = monitored(self.scores.confusion())
        self.log_dict({f"val/{name}": value for name, value in scores.items()})

    def on_train_epoch_end(self) -> None:
        """Log the learning rate that the epoch ended with."""
        self.log(LEARNING_RATE, self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedulers where there are any."""
        optimizer = build_optimizer(self.net.parameters(), self.config)
        steps = int(self.trainer.estimated_stepping_batches)
        schedulers = build_schedulers(optimizer, self.config, steps)
        return [optimizer], [
            {
                "scheduler": scheduler,
                "interval": "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step",
                "monitor": self.config.monitor_metric,
            }
            for scheduler in schedulers
        ]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """After an optimizer step: on with the schedulers that go by steps."""
        by_scores = isinstance(scheduler, ReduceLROnPlateau)
        if not by_scores and isinstance(scheduler, SWALR) == self.averages_epochs:
            scheduler.step()

    def _log_loss(self, name: str, loss: Tensor, size: int) -> None:
        """Add the loss of a batch to the mean over the samples of an epoch, of all processes."""
        # A fraction, as Lightning would round the mean of whole numbers over processes down.
        weight: Any = float(size)
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def _seed(self, *parts: int) -> int:
        """A seed of this process: the first has those of one that is alone."""
        rank = (self.global_rank,) if self.global_rank else ()
        return _seed(self.config.seed, *parts, rank=rank)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """After an epoch's validation, before its checkpoint: on with those that go by scores.

        Lightning would do this after the checkpoint, and not at all where a run is resumed.
        """
        for course in self.trainer.lr_scheduler_configs:
            if isinstance(course.scheduler, ReduceLROnPlateau) and not self.averages_epochs:
                course.scheduler.step(metrics[self.config.monitor_metric])


def _optical(spec: NetworkSpec) -> tuple[int, ...]:
    """Positions of the optical bands that a network looks at, itself or by its indices."""
    needed = needed_bands(spec.bands, spec.spectral_indices, spec.index_settings)
    return tuple(k for k, name in enumerate(OPTICAL) if name in needed)


def _seed(*parts: int, rank: tuple[int, ...]) -> int:
    """One seed out of several numbers, without the collisions of adding them."""
    sequence = np.random.SeedSequence(parts, spawn_key=rank)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def build_average(net: KelpNet, config: TrainConfig) -> AveragedModel | None:
    """A copy of the network that will hold the average of its weights, if one is asked for.

    `--ema_decay` averages the running statistics of batch normalisation as the weights; for
    `--swa`, whose weights lie far apart, they must be computed again (`renew_norms`).
    """
    if config.ema_decay:
        average = AveragedModel(net, multi_avg_fn=_Ema(config.ema_decay), use_buffers=True)
    elif config.swa:
        average = AveragedModel(net)
    else:
        return None
    return average.requires_grad_(False)


class _Ema:
    """Exponential moving average whose decay grows with the steps: the start is soon forgotten."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, average: _Tensors, current: _Tensors, steps: Tensor | int) -> None:
        done = float(steps)
        decay = min(self.decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(average, current, steps)  # type: ignore[no-untyped-call]


@torch.no_grad()
def renew_norms(net: nn.Module, batches: Iterable[Sample], device: torch.device) -> None:
    """Compute the running statistics of batch normalisation again, from batches as they come."""
    update_bn((batch.raw for batch in batches), net, device)


@torch.no_grad()
def share_norms(net: nn.Module, strategy: Strategy) -> None:
    """Give all processes the mean of their running statistics of batch normalisation.

    Each has seen other batches. Alone, the network stays as it is.
    """
    names = ("running_mean", "running_var")
    own = [b for name, b in net.named_buffers() if name.rpartition(".")[2] in names]
    if not own or not torch.distributed.is_initialized():
        return
    flat = torch.cat([buffer.float().flatten() for buffer in own])
    mean = strategy.reduce(flat, reduce_op="mean")
    for buffer, values in zip(own, mean.split([b.numel() for b in own]), strict=True):
        buffer.copy_(values.view_as(buffer))


_MOMENTUM: Final = 0.9  # of sgd
_CYCLIC_DEPTH: Final = 10.0  # cyclic swings between lr and lr divided by this


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer of `--optimizer`."""
    match config.optimizer:
        case "adamw":
            return AdamW(parameters, config.lr, weight_decay=config.weight_decay)
        case "adam":
            return Adam(parameters, config.lr, weight_decay=config.weight_decay)
        case "sgd":
            return SGD(parameters, config.lr, _MOMENTUM, weight_decay=config.weight_decay)


def build_schedulers(
    optimizer: Optimizer, config: TrainConfig, steps: int
) -> list[LRScheduler | ReduceLROnPlateau]:
    """Those of `--lr_scheduler` and of `--swa`, over a run of `steps` optimizer steps.

    The second takes over from the first where averaging begins, from the rate it finds.
    """
    schedulers: list[LRScheduler | ReduceLROnPlateau] = []
    if config.lr_scheduler != "none":
        schedulers.append(build_scheduler(optimizer, config, steps))
    if config.swa:
        annealing = config.swa_annealing_epochs * max(1, steps // config.epochs)
        schedulers.append(SWALR(optimizer, config.swa_lr, anneal_epochs=annealing))
    return schedulers


def build_scheduler(
    optimizer: Optimizer, config: TrainConfig, steps: int
) -> LRScheduler | ReduceLROnPlateau:
    """The scheduler of `--lr_scheduler` over a run of `steps` optimizer steps.

    All go by steps, but for `reduce_lr_on_plateau`, which goes by the score of each epoch.
    """
    cycle = config.lr_cycle_epochs * max(1, steps // config.epochs)
    match config.lr_scheduler:
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        case "cosine_with_warm_restarts":
            return CosineAnnealingWarmRestarts(optimizer, T_0=cycle, T_mult=config.lr_cycle_factor)
        case "cyclic":
            return CyclicLR(
                optimizer,
                base_lr=config.lr / _CYCLIC_DEPTH,
                max_lr=config.lr,
                step_size_up=max(1, cycle // 2),
                cycle_momentum=False,
            )
        case "reduce_lr_on_plateau":
            return ReduceLROnPlateau(
                optimizer,
                mode=config.monitor_mode,
                factor=config.lr_plateau_factor,
                patience=config.lr_plateau_patience,
            )
        case "onecycle":
            return OneCycleLR(
                optimizer,
                max_lr=config.lr,
                total_steps=steps,
                pct_start=config.onecycle_pct_start,
                div_factor=config.onecycle_div_factor,
                final_div_factor=config.onecycle_final_div_factor,
            )
    raise ValueError(f"no scheduler: {config.lr_scheduler}")
