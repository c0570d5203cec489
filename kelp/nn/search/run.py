"""`kelp sweep`: runs of `kelp train` with other options each, chosen by Optuna."""

from __future__ import annotations

import gc
import importlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from kelp.config import SweepConfig, TrainConfig
from kelp.errors import ConfigError, InputError, KelpError, TrainingError, WeightsError
from kelp.io.files import discard_partials, locked, output_folder
from kelp.nn.search.record import BEST, Standing
from kelp.nn.search.space import Base, Space
from kelp.nn.training.fit import train
from kelp.nn.training.tracking import (
    ARTIFACTS,
    Part,
    Pruned,
    Tracking,
    quiet_libraries,
    reopen_run,
    start_run,
)
from kelp.progress import Progress, silent

# Optuna is an extra, and takes half a second to import.
if TYPE_CHECKING:
    from optuna.trial import Trial

    from kelp.nn.search.study import Memory, Outcome

log = logging.getLogger("kelp")

_LOCK: Final = ".sweep.lock"
_REFUSED_AT_FIRST: Final = 5
"""Refused trials, before any is complete, after which the fault is that of all of them."""


@dataclass(frozen=True)
class SweepResult:
    """How a sweep stands."""

    output_dir: Path
    trials: tuple[Outcome, ...]
    """All that ended, in the order of their numbers."""
    best: Outcome | None
    """The best of the complete ones."""
    best_config: Path | None
    """Its config file for `kelp train`."""
    text: str
    """What `summary.txt` holds."""
    seconds: float
    """Wall time of this session."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        return self.text


def sweep(config: SweepConfig, progress: Progress = silent) -> SweepResult:
    """Search for better options of `kelp train`.

    A sweep that was stopped goes on: the same call trains what is missing of `trials`.

    Args:
        config: the options.
        progress: told of trials, and of the batches of each.

    Raises:
        KelpError: Optuna is missing; the config file or the space cannot be used, or is another
            than that of the sweep in the folder; the data cannot be read.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The sweep can go on.
    """
    started = time.monotonic()
    _require_optuna()
    base = Base.read(config.train_config, config.output_dir)
    space = Space.read(config.space, base)
    folder = output_folder(config.output_dir)
    with _alone(folder), quiet_libraries():
        from kelp.nn.search.study import open_memory

        discard_partials(folder)
        with open_memory(config, base, space) as memory:
            config.record(folder)
            session = _Session(config, base, space, memory, progress, started)
            standing = session.run()
    best = standing.best
    return SweepResult(
        output_dir=folder,
        trials=tuple(standing.outcomes),
        best=best,
        best_config=folder / BEST if best else None,
        text=standing.text(),
        seconds=time.monotonic() - started,
    )


def _require_optuna() -> None:
    try:
        importlib.import_module("optuna")
        importlib.import_module("sklearn")
    except ImportError as error:
        raise KelpError(
            f'kelp sweep needs the package {error.name}: pip install "kelp-slicer[sweep]"'
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes off a sweep: they would take our trial for an abandoned one."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK))
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is at work on this sweep; wait for it, or choose "
                "another --output_dir"
            ) from error
        yield


@dataclass(frozen=True)
class _Session:
    """The trials of one call."""

    config: SweepConfig
    base: Base
    space: Space
    memory: Memory
    progress: Progress
    started: float

    @property
    def metric(self) -> str:
        return self.base.configured({}).monitor_metric

    def run(self) -> Standing:
        """Train what is missing."""
        memory = self.memory
        abandoned = memory.fail_abandoned()
        if memory.finished >= memory.wanted and not abandoned:
            return self._write()
        parent = self._open_parent()
        for outcome in abandoned:
            log.info("trial %d was stopped; it is done again", outcome.number)
            if outcome.run:
                replace(parent, run_id=outcome.run).finish("KILLED")
        try:
            self._train_all(parent)
            standing = self._write()
        except KeyboardInterrupt:
            parent.finish("KILLED")
            log.info("stopped; the same command goes on with the sweep in %s", self.base.output_dir)
            raise
        except BaseException:
            parent.finish("FAILED")
            raise
        standing.write(parent.artifacts)
        parent.log_files(*(path.name for path in sorted(parent.artifacts.iterdir())))
        parent.finish("FINISHED")
        return standing

    def _open_parent(self) -> Tracking:
        """The run in MLflow that all trials are part of."""
        shared = self.base.configured({})
        if self.memory.parent is not None:
            folder = shared.output_dir.resolve() / shared.experiment / self.memory.parent
            output_folder(folder / ARTIFACTS)
            return reopen_run(folder, shared)
        parent = start_run(shared, name="sweep")
        self.memory.parent = parent.run_id
        return parent

    def _train_all(self, parent: Tracking) -> None:
        memory = self.memory
        while memory.finished < memory.wanted:
            if self.config.timeout and time.monotonic() - self.started > self.config.timeout:
                log.info("--timeout: no more trials; the same command goes on")
                return
            self.progress("trials", memory.finished, memory.wanted)
            trial = memory.begin()
            log.info(
                "trial %d (%d of %d): %s",
                trial.number,
                memory.finished + 1,
                memory.wanted,
                ", ".join(f"{name} {value}" for name, value in trial.params.items()),
            )
            try:
                self._train(trial, parent)
            except BaseException:
                memory.fail(trial)
                raise
            if torch.cuda.is_available():
                gc.collect()  # a network in a cycle of references would keep the GPU's memory
            self._tell(self._write(), parent)
        self.progress("trials", memory.wanted, memory.wanted)

    def _train(self, trial: Trial, parent: Tracking) -> None:
        memory = self.memory
        try:
            config = self.base.configured(trial.params)
            part = _part(trial, config, memory, parent)
            result = train(config, self.progress, part)
        except Pruned as reason:
            memory.prune(trial, str(reason))
        except (ConfigError, TrainingError, WeightsError) as error:
            # Another trial may do: one that diverged, found nothing, or was too large for the GPU.
            memory.prune(trial, f"refused: {' '.join(str(error).split())}")
        else:
            memory.complete(trial, result.score)

    def _tell(self, standing: Standing, parent: Tracking) -> None:
        """Say how the last trial did; stop where none can be trained."""
        last = standing.outcomes[-1]
        if last.value is not None:
            parent.log_point(last.number, {self.metric: last.value})
        if last.state == "complete":
            words = f"{self.metric} {last.value:.4f}"
            words += " (best so far)" if standing.best == last else ""
        else:
            words = f"pruned {last.reason}" if last.run else last.reason
        log.info("trial %d: %s", last.number, words)
        refused = [one for one in standing.of("pruned") if one.value is None]
        if not standing.of("complete") and len(refused) >= _REFUSED_AT_FIRST:
            raise ConfigError(
                f"{len(refused)} trials were refused and none is complete, the last with: "
                f"{last.reason.removeprefix('refused: ')}; change {self.base.path} or "
                f"{self.config.space}, and choose another --output_dir"
            )

    def _write(self) -> Standing:
        """Write how the sweep stands."""
        memory = self.memory
        standing = Standing(
            self.base.output_dir,
            self.base,
            self.space,
            memory.wanted,
            memory.outcomes(),
            memory.importances(),
        )
        standing.write(self.base.output_dir)
        return standing


def _part(trial: Trial, config: TrainConfig, memory: Memory, parent: Tracking) -> Part:
    """What a trial's run is part of; it hears whether to go on after each epoch."""

    def begin(run_id: str) -> None:
        memory.opened(trial, run_id)

    def end_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        trial.report(metrics[config.monitor_metric], epoch)
        # After the last one there is nothing to save.
        if epoch < config.epochs and trial.should_prune():
            raise Pruned(f"after epoch {epoch} of {config.epochs}: worse than the median")

    return Part(parent.run_id, f"trial {trial.number}", begin, end_epoch)
