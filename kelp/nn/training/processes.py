"""The processes that train one network together, and which of them this one is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from kelp.config import TrainConfig
from kelp.errors import ConfigError, ProcessError
from kelp.nn.data.sampling import Share
from kelp.nn.model import KelpNet
from kelp.raster.bands import BANDS

Launcher = SLURMEnvironment | TorchElasticEnvironment

_TIMEOUT: Final = timedelta(hours=2)
"""The others wait this long for the first process, which makes the statistics."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    local: int = 1
    """Processes on each machine."""
    nodes: int = 1
    """Machines."""
    ddp: bool = False
    """Whether they train by DDP; one alone need not."""
    launcher: Launcher | None = None
    """Lightning's view of what has started the processes; none: nothing has yet."""

    @property
    def world_size(self) -> int:
        """Processes of all machines."""
        return self.local * self.nodes

    @property
    def share(self) -> Share:
        """The part of the samples that is this process's."""
        return Share(self.rank, self.world_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    @property
    def must_launch(self) -> bool:
        """Whether the processes are still to be started."""
        return self.world_size > 1 and self.launcher is None

    @property
    def environment(self) -> LightningEnvironment | Launcher:
        """Where Lightning runs; one process alone is alone inside a SLURM job, too."""
        return self.launcher or LightningEnvironment()

    def strategy(self, device: torch.device, idle: bool = False) -> DDPStrategy | str:
        """Lightning's strategy; `idle`: some parameters take no part in the loss."""
        if not self.ddp:
            return "auto"
        # Not from the first process to the others at each step: they are averaged where they are
        # looked at, and validation batches may differ in number.
        return DDPStrategy(
            cluster_environment=self.environment,
            process_group_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=_TIMEOUT,
            broadcast_buffers=False,
            find_unused_parameters=idle,
        )


def broadcast(value: str) -> str:
    """What the first process says, as soon as it says it; alone, the value itself."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def connection(processes: Processes, run_dir: Path | None) -> Iterator[None]:
    """The others may be lost while it lasts; at its end they are left, so that a run can follow.

    Raises:
        ProcessError: the connection broke.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.world_size == 1 or not _is_broken_connection(error):
            raise
        raise ProcessError(
            f"process {processes.rank + 1} of {processes.world_size} lost the others; see what "
            f"they say, then resume with --resume_from {run_dir or 'the run folder'}"
        ) from error
    finally:
        if distributed.is_initialized():
            with suppress(RuntimeError):  # the others may be gone
                distributed.destroy_process_group()


def _is_broken_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset")
    )


class PlainSignals(Callback):
    """SIGTERM ends training as Ctrl-C does.

    Lightning's own answer is to tell the other processes, which listen for something else by then.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After Lightning has set its own handler, and before the first batch."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, interrupt_once)


def interrupt_once(*_: object) -> None:
    """A signal handler: KeyboardInterrupt, which a second signal does not disturb."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


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


def find_processes(config: TrainConfig, device: torch.device) -> Processes:
    """Who trains, from the options and from what has started this process.

    Raises:
        ConfigError: the options do not go with the machine, or with what torchrun or srun started.
    """
    local = count_devices(config, device)
    wanted = local * config.num_nodes
    launcher = _launcher(wanted)
    if launcher is None:
        if config.num_nodes > 1:
            raise ConfigError(
                f"--num_nodes {config.num_nodes}: kelp starts processes on its own machine only; "
                "start it on each with torchrun or srun"
            )
        return Processes(local=local, ddp=wanted > 1 or config.strategy == "ddp")
    started = launcher.world_size()
    if started != wanted or launcher.local_rank() >= local:
        name = "srun" if isinstance(launcher, SLURMEnvironment) else "torchrun"
        raise ConfigError(
            f"--devices {config.devices} --num_nodes {config.num_nodes}: {name} has started "
            f"{started} processes; give as --devices those of each machine, as --num_nodes the "
            "machines"
        )
    if config.cv_split == "all":
        raise ConfigError(
            "--cv_split all: torchrun and srun start the processes of one run; train fold after "
            "fold (--cv_split 0, 1, …), or let kelp start them (--devices on one machine)"
        )
    return Processes(launcher.global_rank(), local, config.num_nodes, True, launcher)


def count_devices(config: TrainConfig, device: torch.device) -> int:
    """Processes on each machine.

    Raises:
        ConfigError: there are not as many GPUs.
    """
    if device.type != "cuda":
        return 1 if config.devices == "auto" else config.devices
    present = torch.cuda.device_count()
    if config.devices == "auto":
        return present
    if config.devices > present:
        raise ConfigError(
            f"--devices {config.devices}: torch sees {present} GPUs here; give at most that, or "
            "--device cpu"
        )
    return config.devices


def _launcher(wanted: int) -> Launcher | None:
    """What has started several processes of this run, if anything has."""
    if TorchElasticEnvironment.detect():
        torchrun = TorchElasticEnvironment()
        return torchrun if torchrun.world_size() > 1 else None
    # In a batch script, outside of srun, there is one process whatever the job may start.
    in_step = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if wanted == 1 or not in_step or not SLURMEnvironment.detect():
        return None
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(
            "srun: give --ntasks-per-node, as many as --devices, in place of --ntasks"
        )
    return SLURMEnvironment(auto_requeue=False)
