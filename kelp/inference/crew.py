"""Who does the work of a prediction: this process, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kelp.config import PredictConfig
from kelp.errors import KelpError
from kelp.inference.inputs import Task, sorted_out, survey
from kelp.inference.processor import Processor
from kelp.inference.remote import Setting, digest_of, perform_there, processor_of, survey_there
from kelp.inference.run import Run
from kelp.inference.units import Outcome
from kelp.inference.work import Work
from kelp.io.executors import gather
from kelp.io.files import amount
from kelp.io.location import Url
from kelp.nn.bundle import Bundle

if TYPE_CHECKING:
    from distributed import Client

    from kelp.io.cluster import Cluster


Outputs = Mapping[Path | Url, Path | Url]
"""The mask of each scene."""


@dataclass
class Share:
    """What a process did."""

    scenes: int = 0
    """Begun, in one go or in sections."""
    tiles: int = 0
    """That its network saw."""
    reading: float = 0.0
    """Seconds; reading, the network and writing run beside one another."""
    network: float = 0.0
    writing: float = 0.0
    peak_memory: int = 0

    def __str__(self) -> str:
        return (
            f"{self.tiles:,} tiles, {self.reading:.0f} s of reading, {self.network:.0f} s in the "
            f"network, {self.writing:.0f} s of writing, at most {amount(self.peak_memory)}"
        )

    def add(self, outcome: Outcome) -> None:
        """Count in what it made of a unit."""
        counts = outcome.counts
        self.scenes += len(outcome.unit.tasks)
        self.tiles += counts.predicted
        self.reading += counts.reading
        self.network += counts.network
        self.writing += counts.writing
        self.peak_memory = max(self.peak_memory, outcome.peak_memory)


class Crew(Protocol):
    """What `kelp predict` needs of those that do the work."""

    processor: Processor
    """What all of them compute with."""
    shares: dict[str, Share]
    """What each has done, by name."""

    def require_shared(self, folder: Path) -> None:
        """Raise `KelpError` naming one that does not see this folder."""

    def survey(self, outputs: Outputs) -> tuple[list[Task], dict[Path | Url, str]]:
        """Open and check scenes, given with their masks: see `kelp.inference.inputs.survey`."""

    def perform(
        self, run: Run, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[Outcome]:
        """Do all the work, and give what became of it."""


class _Here:
    """This process alone."""

    def __init__(self, config: PredictConfig, bundles: Sequence[Bundle]) -> None:
        self.processor = Processor.here(config)
        self.shares: dict[str, Share] = {}
        self._config = config
        self._bundles = bundles

    def require_shared(self, folder: Path) -> None:
        pass  # nobody else is to see it

    def survey(self, outputs: Outputs) -> tuple[list[Task], dict[Path | Url, str]]:
        return survey(outputs, self._config.band_order, [one.spec for one in self._bundles])

    def perform(
        self, run: Run, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[Outcome]:
        work = Work(run, todo)
        share = self.shares.setdefault("this process", Share())
        while unit := work.draw():
            outcome = run.perform(unit, tiles_done)
            share.add(outcome)
            work.took(outcome)
            yield outcome


class _There:
    """Workers of a cluster."""

    def __init__(self, config: PredictConfig, bundles: Sequence[Bundle], cluster: Cluster) -> None:
        self.shares: dict[str, Share] = {}
        self._cluster = cluster
        self._setting = Setting(config.model_dump_json(), digest_of(bundles))
        threads = config.threads or min(cluster.threads.values())
        found = cluster.ask(processor_of, self._setting, threads)
        first, self.processor = next(iter(found.items()))
        for worker, other in found.items():
            if other != self.processor:
                raise KelpError(
                    f"worker {worker} computes with {other}, {first} with {self.processor}: maps "
                    "would depend on who made them; make them alike, or give --device, --precision"
                )

    def require_shared(self, folder: Path) -> None:
        self._cluster.require_shared(folder)

    def survey(self, outputs: Outputs) -> tuple[list[Task], dict[Path | Url, str]]:
        there = partial(survey_there, self._setting)
        return sorted_out(outputs, self._cluster.map(there, list(outputs.items())))

    def perform(
        self, run: Run, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[Outcome]:
        work = Work(run, todo, lambda: len(self._cluster.threads))
        setting = replace(
            self._setting,
            processor=self.processor,
            batch_size=run.slicing.batch_size,
            cache=run.cache,
        )
        for done in self._cluster.run(partial(perform_there, setting), work.draw):
            outcome = done.result
            self.shares.setdefault(done.worker, Share()).add(outcome)
            work.took(outcome)
            tiles_done(outcome.counts.tiles)
            yield outcome


@contextmanager
def gather_crew(
    config: PredictConfig, bundles: Sequence[Bundle], client: Client | None = None
) -> Iterator[Crew]:
    """The crew that a configuration wishes; a cluster of this machine ends with the block.

    Args:
        config: the options.
        bundles: the networks.
        client: of the cluster to use; it stays the caller's.

    Raises:
        KelpError: there is no such cluster, or its workers would not make the same maps.
    """
    if client is not None:
        from kelp.io.cluster import Cluster

        yield _There(config, bundles, Cluster(client))
        return
    with gather(1, config.scheduler) as workers:
        if isinstance(workers, int):
            yield _Here(config, bundles)
        else:
            yield _There(config, bundles, workers)
