"""Lightning's loop, without anything of its own on the screen or on the disk."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from kelp.config import TrainConfig
from kelp.config.choices import Precision
from kelp.errors import ConfigError, KelpError
from kelp.nn.data.dataset import as_raised
from kelp.nn.model import KelpNet
from kelp.nn.training.epochs import EpochJudge
from kelp.nn.training.team import Team
from kelp.raster.bands import BANDS


def build_trainer(
    config: TrainConfig,
    device: torch.device,
    precision: Precision,
    team: Team,
    judge: EpochJudge,
    validates_every: int,
    run_dir: Path | None,
    idle: bool = False,
) -> Trainer:
    """The loop of a run.

    Args:
        config: of the run.
        device: where this process computes.
        precision: that the device offers.
        team: the processes of the run.
        judge: ends the epochs.
        validates_every: training batches between validations.
        run_dir: folder of the run; not known to processes that write nothing.
        idle: whether some parameters take no part in the loss.
    """
    # One that is alone is so on a cluster, too.
    plugins = None if team.ddp else team.environment()
    signals = [_PlainSignals(team)] if team.count > 1 else []
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=team.local,
        num_nodes=team.nodes,
        strategy=team.strategy(device, idle),
        plugins=plugins,
        use_distributed_sampler=False,  # the loaders bring this process's share
        # In `*-true` Lightning would also round the raw numbers; KelpNet rounds after them.
        precision=precision if precision.endswith("-mixed") else "32-true",
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        limit_train_batches=config.limit_train_batches,
        limit_val_batches=config.limit_val_batches,
        val_check_interval=validates_every,
        num_sanity_val_steps=0,
        callbacks=[judge, *signals],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        benchmark=device.type == "cuda",  # nearly all batches have one shape
    )


def has_idle_parameters(net: KelpNet) -> bool:
    """Whether some of a network's parameters take no part in its output, as in a few encoders.

    Processes that add up gradients wait for each one, unless they are told.
    """
    training = net.training
    net.eval()(torch.zeros(1, len(BANDS), *net.spec.tile_size)).sum().backward()
    idle = any(p.grad is None for p in net.parameters() if p.requires_grad)
    net.zero_grad(set_to_none=True)
    net.train(training)
    return idle


class _PlainSignals(Callback):
    """SIGTERM ends training as Ctrl-C does.

    Lightning's own answer is to tell the other processes, which listen for something else by then.
    Processes that kelp has started leave both signals to the first one.
    """

    def __init__(self, team: Team) -> None:
        self.follows = not team.leads and team.outside is None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After Lightning has set its own handler, and before the first batch."""
        if threading.current_thread() is threading.main_thread():
            handler = signal.SIG_IGN if self.follows else signal.default_int_handler
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def plain_errors(config: TrainConfig) -> Iterator[None]:
    """What Lightning and torch make of Ctrl-C, SIGTERM and errors of workers, undone."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:  # Lightning's answer to both signals
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch_size {config.batch_size}: the GPU's memory is too small for it; lower it, "
            "and raise --accumulate_grad_batches as much"
        ) from error
    except KelpError as error:
        raise as_raised(error) from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, handler)
