"""The processes that train one network together, and which of them this one is."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kelp.config import TrainConfig
from kelp.errors import ConfigError
from kelp.nn.data.sampling import Share

HOST: Final = "127.0.0.1"
Outside = SLURMEnvironment | TorchElasticEnvironment


class LocalEnvironment(LightningEnvironment):
    """Processes of this machine that kelp itself has started, on no cluster."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        """So that Lightning starts none: it would run the caller's whole program again."""
        return True

    def local_rank(self) -> int:
        """Number of this process."""
        return self._rank

    def node_rank(self) -> int:
        """Number of this machine: the only one."""
        return 0


@dataclass
class Team:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    local: int = 1
    """Processes on each machine."""
    nodes: int = 1
    ddp: bool = False
    """Whether they train by DDP; one alone need not."""
    outside: Outside | None = None
    """The cluster that has started the processes; none: the first process starts the others."""
    store: TCPStore | None = field(default=None, repr=False)
    """Where processes of this machine find each other."""

    @property
    def count(self) -> int:
        """Processes of all machines."""
        return self.local * self.nodes

    @property
    def share(self) -> Share:
        """The part of the samples that is this process's."""
        return Share(self.rank, self.count)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def starts(self) -> bool:
        """Whether this process has others to start."""
        return self.leads and self.count > 1 and self.outside is None

    def environment(self) -> LightningEnvironment | Outside:
        """What Lightning is told about where it runs."""
        return self.outside or LocalEnvironment(self.rank)

    def strategy(self, device: torch.device, idle: bool = False) -> DDPStrategy | str:
        """Lightning's strategy; `idle`: some parameters take no part in the loss."""
        if not self.ddp:
            return "auto"
        # Not from the first process to the others at each step: they are averaged where they are
        # looked at, and validation batches may differ in number.
        return DDPStrategy(
            cluster_environment=self.environment(),
            process_group_backend=_backend(device),
            broadcast_buffers=False,
            find_unused_parameters=idle,
        )

    def meet(self, device: torch.device) -> None:
        """Join the other processes of this machine; on a cluster Lightning does that."""
        if self.ddp and self.outside is None:
            store = self.store or open_store(self.count)
            distributed.init_process_group(
                _backend(device), store=store, rank=self.rank, world_size=self.count
            )

    def agree(self, value: str) -> str:
        """What the first process says, as soon as it says it; on a cluster."""
        if self.outside is None or not distributed.is_initialized():
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def part(self) -> None:
        """Leave the others, so that another run can begin."""
        if distributed.is_initialized():
            with suppress(RuntimeError):  # they may be gone
                distributed.destroy_process_group()


def open_store(count: int, port: int = 0) -> TCPStore:
    """The meeting point of `count` processes: a new one, or that behind `port`."""
    return TCPStore(HOST, port, count, is_master=not port, wait_for_workers=False)


def form_team(config: TrainConfig, device: torch.device) -> Team:
    """Who trains, from the options and from who has started this process.

    Raises:
        ConfigError: the options do not go with the machine, or with what torchrun or srun started.
    """
    local = count_devices(config, device)
    wanted = local * config.num_nodes
    outside = _cluster(wanted)
    if outside is None:
        if config.num_nodes > 1:
            raise ConfigError(
                f"--num_nodes {config.num_nodes}: kelp starts processes on its own machine only; "
                "start it on each with torchrun or srun"
            )
        return Team(local=local, ddp=wanted > 1 or config.strategy == "ddp")
    started = outside.world_size()
    if started != wanted or outside.local_rank() >= local:
        name = "srun" if isinstance(outside, SLURMEnvironment) else "torchrun"
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
    return Team(outside.global_rank(), local, config.num_nodes, True, outside)


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


def _cluster(wanted: int) -> Outside | None:
    """Who has started several processes of this run, if anybody has."""
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


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
