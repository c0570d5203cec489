"""Where the work of a prediction is done: in this process, or by the workers of a Dask cluster.

Items carry a setting and paths to the workers, not networks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from kelp.config import PredictConfig
from kelp.errors import BundleError, KelpError, fit_to_travel
from kelp.inference.backends import Processor
from kelp.inference.bundle import BackendName, Bundle, Which, load_bundles
from kelp.inference.inputs import Task, sorted_out, survey, survey_one
from kelp.inference.predictor import Predictor
from kelp.inference.work import Runner, WorkItem, WorkQueue, WorkResult
from kelp.io.executors import gather
from kelp.io.failures import Failure
from kelp.io.files import amount
from kelp.io.location import Url
from kelp.io.remote import check_reach

if TYPE_CHECKING:
    from distributed import Client

    from kelp.io.cluster import Cluster

_PATIENCE: Final = 600.0
"""Seconds to wait for a scene that another process is writing."""

Masks = Mapping[Path | Url, Path | Url]
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

    def add(self, result: WorkResult) -> None:
        """Count in what it made of an item."""
        counts = result.counts
        self.scenes += len(result.item.tasks)
        self.tiles += counts.predicted
        self.reading += counts.reading
        self.network += counts.network
        self.writing += counts.writing
        self.peak_memory = max(self.peak_memory, result.peak_memory)


class Executor(Protocol):
    """What `kelp predict` needs of those that do the work."""

    predictor: Predictor
    """What all of them compute with."""
    shares: dict[str, Share]
    """What each has done, by name."""

    def require_shared(self, folder: Path) -> None:
        """Raise `KelpError` naming one that does not see this folder."""

    def survey(self, masks: Masks) -> tuple[list[Task], dict[Path | Url, Failure]]:
        """Open and check scenes, given with their masks: see `kelp.inference.inputs.survey`."""

    def run(
        self, runner: Runner, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[WorkResult]:
        """Do all the work, and give what became of it."""


class LocalExecutor:
    """This process alone."""

    def __init__(self, config: PredictConfig, bundles: Sequence[Bundle]) -> None:
        self.predictor = Predictor.of(config, bundles)
        self.shares: dict[str, Share] = {}
        self._config = config

    def require_shared(self, folder: Path) -> None:
        """Nobody else is to see it."""

    def survey(self, masks: Masks) -> tuple[list[Task], dict[Path | Url, Failure]]:
        """Open and check scenes."""
        specs = [bundle.spec for bundle in self.predictor.bundles]
        return survey(masks, self._config, specs)

    def run(
        self, runner: Runner, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[WorkResult]:
        """Do all the work here."""
        queue = WorkQueue(runner, todo)
        share = self.shares.setdefault("this process", Share())
        while item := queue.next():
            result = runner.perform(item, tiles_done)
            share.add(result)
            queue.done(result)
            yield result


class DaskExecutor:
    """Workers of a cluster.

    Raises:
        KelpError: they would not make the same maps.
    """

    def __init__(self, config: PredictConfig, bundles: Sequence[Bundle], cluster: Cluster) -> None:
        self.shares: dict[str, Share] = {}
        self._cluster = cluster
        self._setting = Setting(config.model_dump_json(), digest_of(bundles))
        threads = config.threads or min(cluster.threads.values())
        found = cluster.ask(processor_of, self._setting, threads)
        first, processor = next(iter(found.items()))
        for worker, other in found.items():
            if other != processor:
                raise KelpError(
                    f"worker {worker} computes with {other}, {first} with {processor}: maps "
                    "would depend on who made them; make them alike, or give --device, --precision"
                )
        self.predictor = Predictor.of(config, bundles, processor)

    def require_shared(self, folder: Path) -> None:
        """Raise `KelpError` naming a worker that does not see this folder."""
        self._cluster.require_shared(folder)

    def survey(self, masks: Masks) -> tuple[list[Task], dict[Path | Url, Failure]]:
        """Open and check scenes, spread over the workers."""
        there = partial(survey_there, self._setting)
        return sorted_out(masks, self._cluster.map(there, list(masks.items())))

    def run(
        self, runner: Runner, todo: Sequence[Task], tiles_done: Callable[[int], None]
    ) -> Iterator[WorkResult]:
        """Hand the work out."""
        queue = WorkQueue(runner, todo, lambda: len(self._cluster.threads))
        setting = replace(
            self._setting,
            processor=self.predictor.processor,
            batch_size=self.predictor.slicing.batch_size,
            cache=self.predictor.cache,
        )
        for done in self._cluster.run(partial(perform_there, setting), queue.next):
            result = done.result
            self.shares.setdefault(done.worker, Share()).add(result)
            queue.done(result)
            tiles_done(result.counts.tiles)
            yield result


@contextmanager
def open_executor(
    config: PredictConfig, bundles: Sequence[Bundle], client: Client | None = None
) -> Iterator[Executor]:
    """The executor that a configuration asks for; a cluster of this machine ends with the block.

    Args:
        config: the options.
        bundles: the networks.
        client: of the cluster to use; it stays the caller's.

    Raises:
        KelpError: there is no such cluster, or its workers would not make the same maps.
    """
    if client is not None:
        from kelp.io.cluster import Cluster

        yield DaskExecutor(config, bundles, Cluster(client))
        return
    with gather(1, config.scheduler) as workers:
        if isinstance(workers, int):
            yield LocalExecutor(config, bundles)
        else:
            yield DaskExecutor(config, bundles, workers)


# What workers do


@dataclass(frozen=True)
class Setting:
    """What makes the runners of all workers alike."""

    config: str
    """A `PredictConfig` as JSON, its paths absolute."""
    bundles: str
    """Digest of the bundles that the planning process loaded."""
    processor: Processor | None = None
    batch_size: int = 1
    cache: int = 0


def digest_of(bundles: Sequence[Bundle]) -> str:
    """Stands for what bundles are, weights included."""
    specs = [bundle.spec.model_dump(mode="json") for bundle in bundles]
    return hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest()


def processor_of(setting: Setting, threads: int) -> Processor:
    """What a worker's network would run on; it loads the bundles, once.

    Raises `KelpError` where it cannot, or cannot speak with the stores of scenes and maps.
    """
    config = _config(setting.config)
    with fit_to_travel():
        for place in (config.data_dir, config.output_dir):
            if isinstance(place, Url):
                check_reach(place)
        bundles = _bundles(setting)
    return Predictor.of(config.model_copy(update={"threads": threads}), bundles).processor


def survey_there(setting: Setting, pair: tuple[Path | Url, Path | Url]) -> Task | Failure:
    """`survey_one` on a worker."""
    specs = [bundle.spec for bundle in _bundles(setting)]
    return survey_one(_config(setting.config), specs, pair)


def perform_there(setting: Setting, item: WorkItem) -> WorkResult:
    """Work on an item on a worker.

    A scene that another process is writing is waited for: a worker that was presumed dead may
    still be at it, and do it well.
    """
    runner = _runner(setting)
    result = runner.perform(item)
    deadline = time.monotonic() + _PATIENCE
    while result.busy and time.monotonic() < deadline:
        time.sleep(1)
        again = runner.perform(replace(item, tasks=result.busy))
        for task in result.busy:
            del result.failures[task.path]
        result.counts += again.counts
        result.failures |= again.failures
        result.busy = again.busy
    return result


@lru_cache(maxsize=1)
def _config(text: str) -> PredictConfig:
    return PredictConfig(**json.loads(text))


def _bundles(setting: Setting) -> list[Bundle]:
    config = _config(setting.config)
    return _loaded(config.run_dir, config.use_checkpoint, config.backend, setting.bundles)


@lru_cache(maxsize=1)
def _loaded(
    run_dir: tuple[Path, ...], which: Which, backend: BackendName, digest: str
) -> list[Bundle]:
    bundles = load_bundles(run_dir, which, backend)
    if digest_of(bundles) != digest:
        names = ", ".join(str(bundle.path) for bundle in bundles)
        raise BundleError(f"{names}: another bundle than the planning process has there")
    return bundles


@lru_cache(maxsize=1)
def _runner(setting: Setting) -> Runner:
    config = _config(setting.config)
    if setting.processor is None:
        raise ValueError("a runner needs a processor")
    predictor = Predictor.of(config, _bundles(setting), setting.processor)
    found = processor_of(setting, setting.processor.threads)
    if found != setting.processor:  # a worker that came later than the check of all
        raise KelpError(f"a worker computes with {found}, the others with {setting.processor}")
    if isinstance(config.output_dir, Path) and not config.output_dir.is_dir():  # late, too
        raise KelpError(f"{config.output_dir}: a worker that came later does not see it")
    predictor.plan(setting.batch_size, setting.cache)
    return Runner(config, predictor)
