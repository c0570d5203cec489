"""Averages of a network's weights over steps (EMA) or epochs (SWA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from kelp.config import TrainConfig
from kelp.nn.data.dataset import Sample
from kelp.nn.model import KelpNet

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

Tensors = tuple[Tensor, ...] | list[Tensor]

NORM_BATCHES: Final = 100
"""Batches, at most, that the statistics of batch normalisation are computed again from."""


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

    def __call__(self, average: Tensors, current: Tensors, steps: Tensor | int) -> None:
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
