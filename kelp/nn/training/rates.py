"""Optimizers and the course of their learning rate: torch's own, from a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

from kelp.config import TrainConfig

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
