"""`kelp sweep`: runs of `kelp train` with other options each, chosen by Optuna.

What is chosen for a trial follows from the seed, the number of trials finished before it, and
their scores alone: a sweep that is resumed chooses as one that was never stopped. That is why the
sampler is seeded for each trial, and why a stopped trial is queued again.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from kelp.config import SweepConfig, TrainConfig
from kelp.config.base import kinds, read_yaml
from kelp.errors import ConfigError, InputError, KelpError, TrainingError, WeightsError
from kelp.io.files import discard_partials, locked, output_folder, write_text
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
from kelp.plotting import style
from kelp.plotting.html import Report
from kelp.progress import Progress, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

try:  # an extra
    import optuna
    import sklearn  # type: ignore[import-untyped]  # noqa: F401  # its forests measure importance
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
        distribution_to_json,
    )
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise KelpError(
        f'kelp sweep needs the package {error.name}: pip install "kelp-slicer[sweep]"'
    ) from error

log = logging.getLogger("kelp")

STUDY: Final = "study.db"
TABLE: Final = "trials.csv"
BEST: Final = "best.yaml"
SUMMARY: Final = "summary.txt"
PAGE: Final = "report.html"

ENOUGH: Final = 10
"""Complete trials below which importances would be read out of noise."""
_SHUFFLES: Final = 5
_REFUSED_AT_FIRST: Final = 5
"""Refused trials, before any is complete, after which the fault is that of all of them."""
_COMBINATIONS: Final = 512
"""Tried for one that allows a value, before the first trial."""
_LARGEST_GRID: Final = 100_000
_DONE: Final = (TrialState.COMPLETE, TrialState.PRUNED)
_SHARED: Final = {
    *("data_dir", "metadata_fp", "output_dir", "cv_split", "experiment", "resume_from"),
    *("monitor_metric", "monitor_mode", "limit_val_batches", "limit_test_batches", "fast_dev_run"),
}
"""Options that say what the score is and where things lie: all trials share them."""
_OF_THE_LOSS: Final = frozenset({"loss", "ce_smooth_factor", "ce_class_weights"})

Entry = CategoricalDistribution | FloatDistribution | IntDistribution
Space = Mapping[str, Entry]


@dataclass(frozen=True)
class SweepResult:
    """The state of a sweep."""

    output_dir: Path
    trials: tuple[FrozenTrial, ...]
    """All that ended, in the order of their numbers."""
    best: FrozenTrial | None
    """The best of the complete ones."""
    best_config: Path | None
    """Its config file for `kelp train`."""
    text: str
    """What `summary.txt` holds."""

    def summary(self) -> str:
        """A few lines for the terminal."""
        return self.text


@dataclass(frozen=True)
class Base:
    """What all trials share: a config file of `kelp train`."""

    path: Path
    values: Mapping[str, Any]
    output_dir: Path

    def configured(self, params: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a trial. Raises `ConfigError` for options that do not fit."""
        values = {**self.values, **params, "output_dir": self.output_dir}
        return TrainConfig.model_validate(values)


def sweep(config: SweepConfig, progress: Progress = silent) -> SweepResult:
    """Search for better options of `kelp train`; resumes the sweep in the folder, if there is one.

    Args:
        config: the options.
        progress: called with trials, and with the batches of each.

    Raises:
        KelpError: the config file or the space cannot be used, or differ from those of the sweep
            in the folder; the data cannot be read.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The sweep can be resumed.
    """
    base = read_base(config)
    space = read_space(config.space, base)
    folder = output_folder(config.output_dir)
    with _alone(folder), quiet_libraries(), open_study(config, base, space) as study:
        discard_partials(folder)
        config.record(folder)
        return _Sweep(config, base, space, study, progress).run()


def read_base(config: SweepConfig) -> Base:
    """The config file of a sweep. Raises `ConfigError` unless it trains one fold from scratch."""
    base = Base(config.train_config, read_yaml(config.train_config), config.output_dir)
    try:
        shared = base.configured({})
    except ConfigError as error:
        raise ConfigError(f"{base.path}: {error}") from error
    if shared.cv_split == "all":
        raise ConfigError(f"{base.path}: cv_split all: a sweep scores one fold; give its number")
    if shared.resume_from is not None:
        raise ConfigError(f"{base.path}: resume_from: trials start from scratch; leave it out")
    return base


def read_space(path: Path, base: Base) -> Space:
    """Optuna's distributions, checked against the options of `kelp train`."""
    entries, space = read_yaml(path), {}
    if not entries:
        raise ConfigError(f"{path}: no option to search; add lr: {{low: 1e-4, high: 1e-2}}")
    for name, entry in entries.items():
        try:
            space[name] = _distribution(name, entry)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{path}: {name}: {first['msg']}, got {first['input']!r}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {name}: {' '.join(str(error).split())}") from error
    if base.configured({}).monitor_metric == "val/loss" and _OF_THE_LOSS & space.keys():
        raise ConfigError(f"{path}: values of two losses cannot be compared; monitor val/dice")
    for name in space:
        for value in _ends(space[name]):
            _check_value(path, base, space, name, value)
    return space


def _distribution(name: str, entry: Any) -> Entry:
    if name not in TrainConfig.model_fields:
        raise ValueError("kelp train has no such option; see kelp train --help")
    if name in _SHARED:
        raise ValueError("shared by all trials; set it in the config file")
    if not isinstance(entry, dict) or not ("values" in entry or {"low", "high"} <= entry.keys()):
        raise ValueError("give `low:` and `high:`, or `values:`")
    known = {"values"} if "values" in entry else {"low", "high", "log", "step"}
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"{unknown[0]}: there are low, high, log and step, or values")
    if "values" in entry:
        values = entry["values"] if isinstance(entry["values"], list) else []
        typed = [_typed(name, value) for value in values]
        if len(typed) < 2 or len(set(typed)) < len(typed):
            raise ValueError("values: give a list of two or more, each once")
        return CategoricalDistribution(typed)
    found = kinds(TrainConfig.model_fields[name].annotation)
    numbers = {key: _typed(name, entry[key]) for key in ("low", "high")}
    options = {key: entry[key] for key in ("log", "step") if key in entry}
    if not found & {int, float}:
        raise ValueError("not a number, so it has no range; give `values:`")
    with warnings.catch_warnings():
        # A high end that no step reaches is lowered: said in the documentation.
        warnings.simplefilter("ignore")
        if int in found:
            return IntDistribution(**numbers, **options)
        return FloatDistribution(**numbers, **options)


def _typed(name: str, value: Any) -> Any:
    """A value as `kelp train` reads it, and as Optuna and YAML keep it: lists as `a,b,c`."""
    field = TrainConfig.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    typed = TypeAdapter[Any](kind).validate_python(value)
    if isinstance(typed, tuple):
        return ",".join(map(str, typed))
    return str(typed) if isinstance(typed, Path) else typed


def _ends(entry: Entry) -> tuple[Any, ...]:
    if isinstance(entry, CategoricalDistribution):
        return tuple(entry.choices)
    return entry.low, entry.high


def _check_value(path: Path, base: Base, space: Space, name: str, value: Any) -> None:
    """Refuse a value that no combination with the others allows."""
    others = {key: _ends(entry) for key, entry in space.items() if key != name}
    refused: ConfigError | None = None
    for corner in itertools.islice(itertools.product(*others.values()), _COMBINATIONS):
        try:
            base.configured({**dict(zip(others, corner, strict=True)), name: value})
        except ConfigError as error:
            refused = refused or error
        else:
            return
    raise ConfigError(f"{path}: {refused}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes off a sweep: they would take our trial for an abandoned one."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".sweep.lock"))
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process runs this sweep; wait for it, or choose another "
                "--output_dir"
            ) from error
        yield


@contextmanager
def open_study(config: SweepConfig, base: Base, space: Space) -> Iterator[optuna.Study]:
    """Optuna's study in the output folder: a new one, or that of the same sweep."""
    path = config.output_dir.resolve() / STUDY
    maximize = base.configured({}).monitor_mode == "max"
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if config.pruner == "median":  # the score before the second epoch says little
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        with ExitStack() as stack:
            stack.callback(storage.engine.dispose)
            stack.callback(storage.remove_session)
            study = optuna.create_study(
                storage=storage,
                study_name="sweep",
                direction="maximize" if maximize else "minimize",
                load_if_exists=True,
                pruner=pruner,
            )
            _check_settings(study, config, base, space)
            yield study
    except (optuna.exceptions.OptunaError, SQLAlchemyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be used as Optuna's study ({reason}); check the disk, or choose "
            "another --output_dir"
        ) from error


def _check_settings(study: optuna.Study, config: SweepConfig, base: Base, space: Space) -> None:
    """Refuse to resume another sweep; a new study keeps what it is."""
    shared = base.configured({}).model_dump(mode="json", exclude={"output_dir"})
    now = {f"{config.train_config}: {name}": value for name, value in shared.items()}
    now |= {f"{config.space}: {name}": distribution_to_json(entry) for name, entry in space.items()}
    now |= {f"--{name}": getattr(config, name) for name in ("sampler", "pruner", "seed")}
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", now)
    for name in sorted(now.keys() | (before or now).keys()):
        old, new = (found.get(name, "nothing") for found in (before or now, now))
        if old != new:
            raise ConfigError(
                f"{name}: now {new}, but the sweep in {config.output_dir} was started with {old}; "
                "use that, or another --output_dir"
            )


@dataclass(frozen=True)
class _Sweep:
    """The trials of one call."""

    config: SweepConfig
    base: Base
    space: Space
    study: optuna.Study
    progress: Progress

    def run(self) -> SweepResult:
        """Train what is missing."""
        started, cells = time.monotonic(), self._cells()
        wanted = min(self.config.trials, len(cells) or self.config.trials)
        stopped = self.study.get_trials(states=(TrialState.RUNNING,))
        if self._done() >= wanted and not stopped:
            return self._write(wanted)
        parent = self._open_parent()
        for trial in stopped:  # by a killed process
            log.info("trial %d was stopped; its options are trained again", trial.number)
            self.study.tell(trial.number, state=TrialState.FAIL)
            if run := trial.user_attrs.get("run"):
                replace(parent, run_id=run).finish("KILLED")
        with parent:
            try:
                while self._done() < wanted:
                    if self.config.timeout and time.monotonic() - started > self.config.timeout:
                        log.info("--timeout: no more trials; the same command resumes the sweep")
                        break
                    self.progress("trials", self._done(), wanted)
                    self._try(self._ask(cells), parent)
                    self._write(wanted)
                    self._stop_if_hopeless()
                result = self._write(wanted)
                write_page(self.base.output_dir / PAGE, self.study, self._metric, result.text)
            except KeyboardInterrupt:
                log.info("stopped; the same command resumes the sweep in %s", self.base.output_dir)
                raise
            finally:
                for name in (TABLE, BEST, SUMMARY, PAGE):
                    if (path := self.base.output_dir / name).is_file():
                        write_text(parent.artifacts / name, path.read_text(encoding="utf-8"))
                        parent.log_files(name)
        return result

    def _open_parent(self) -> Tracking:
        """The run in MLflow that all trials are part of."""
        shared, run = self.base.configured({}), self.study.user_attrs.get("parent")
        if run is not None:
            folder = shared.output_dir.resolve() / shared.experiment / run
            output_folder(folder / ARTIFACTS)
            return reopen_run(folder, shared)
        parent = start_run(shared, name="sweep")
        self.study.set_user_attr("parent", parent.run_id)
        return parent

    def _done(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=_DONE))

    def _cells(self) -> list[dict[str, Any]]:
        """All combinations of a grid, shuffled."""
        if self.config.sampler != "grid":
            return []
        columns: list[list[Any]] = []
        for name, entry in self.space.items():
            if isinstance(entry, CategoricalDistribution):
                columns.append(list(entry.choices))
            elif entry.log or entry.step is None:
                raise ConfigError(f"--sampler grid: {name} needs `values:` or a `step:`, no log")
            else:
                low, high, step = (Decimal(str(n)) for n in (entry.low, entry.high, entry.step))
                kind = type(entry.low)
                columns.append([kind(low + k * step) for k in range(int((high - low) / step) + 1)])
        if (count := math.prod(map(len, columns))) > _LARGEST_GRID:
            raise ConfigError(f"--sampler grid: {count:,} combinations; give fewer values")
        cells = [dict(zip(self.space, cell, strict=True)) for cell in itertools.product(*columns)]
        np.random.default_rng(self.config.seed).shuffle(cells)
        return cells

    def _ask(self, cells: list[dict[str, Any]]) -> Trial:
        """A new trial, its options chosen."""
        done = self.study.get_trials(deepcopy=False, states=_DONE)
        seed = int(np.random.SeedSequence([self.config.seed, len(done)]).generate_state(1)[0])
        samplers = optuna.samplers
        chosen = samplers.TPESampler if self.config.sampler == "tpe" else samplers.RandomSampler
        self.study.sampler = chosen(seed=seed)
        # One that was queued when its process was killed is still there.
        if cells and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            tried = [trial.params for trial in done]
            self.study.enqueue_trial(next(cell for cell in cells if cell not in tried))
        return self.study.ask(dict(self.space))

    def _try(self, trial: Trial, parent: Tracking) -> None:
        """Train with the options of a trial, and report how it ended."""
        words = ", ".join(f"{name} {value}" for name, value in trial.params.items())
        log.info("trial %d: %s", trial.number, words)
        score, reason = None, ""
        try:
            config = self.base.configured(trial.params)
            score = train(config, self.progress, _part(trial, config, parent)).score
            if not math.isfinite(score):
                score, reason = None, f"its score is {score}"
        except Pruned as pruned:
            reason = str(pruned)
        except (ConfigError, TrainingError, WeightsError) as error:
            # Another trial may do: one that diverged, found nothing, or was too large for the GPU.
            reason = f"refused: {' '.join(error.message.split())}"
        except BaseException:  # stopped: it does not count
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        if reason:
            trial.set_user_attr("reason", reason)
        ended = self.study.tell(trial, score, TrialState.PRUNED if reason else None)
        if ended.value is not None:
            parent.log_point(trial.number, {self._metric: ended.value})
        log.info("trial %d: %s", trial.number, reason or f"{self._metric} {score:.4f}")
        if torch.cuda.is_available():
            gc.collect()  # a network in a cycle of references would keep the GPU's memory

    def _stop_if_hopeless(self) -> None:
        ended = self.study.get_trials(deepcopy=False, states=_DONE)
        refused = [trial for trial in ended if trial.value is None]
        if len(refused) == len(ended) >= _REFUSED_AT_FIRST:
            raise ConfigError(
                f"{len(refused)} trials were refused and none is complete, the last with: "
                f"{refused[-1].user_attrs['reason'].removeprefix('refused: ')}; change "
                f"{self.base.path} or {self.config.space}, and choose another --output_dir"
            )

    @property
    def _metric(self) -> str:
        return self.base.configured({}).monitor_metric

    def _write(self, wanted: int) -> SweepResult:
        """Write the table of trials, the best one's config file and the summary."""
        folder, study = self.base.output_dir, self.study
        trials = [trial for trial in study.get_trials() if trial.state.is_finished()]
        write_text(folder / TABLE, _table(trials, self.space))
        states = [trial.state for trial in trials]
        complete, pruned, failed = (states.count(state) for state in (*_DONE, TrialState.FAIL))
        lines = [
            f"{complete + pruned} of {wanted} trials: {complete} complete, {pruned} pruned"
            + (f"; {failed} stopped, which do not count" if failed else "")
        ]
        best = study.best_trial if complete else None
        if best is not None:
            shared = self.base.configured(best.params)
            words = f"trial {best.number}, {self._metric} {best.value:.4f}"
            again = shared.model_copy(
                update={"output_dir": Path(self.base.values.get("output_dir") or folder)}
            )
            write_text(
                folder / BEST,
                f"# kelp train --config {BEST}\n# Best of {complete}: {words} on fold "
                f"{shared.cv_split}, run {best.user_attrs.get('run')}.\n{again.to_yaml()}",
            )
            lines += [f"best: {words}, run {best.user_attrs.get('run')}"]
            lines += [f"  {name}: {value}" for name, value in best.params.items()]
            lines += [
                _importances(study),
                f"The best score of {complete} is optimistic: fold {shared.cv_split} also picked "
                f"it. Score it on another: kelp train --config {folder / BEST} --cv_split K",
            ]
        text = "\n".join(lines)
        write_text(folder / SUMMARY, text + "\n")
        return SweepResult(folder, tuple(trials), best, folder / BEST if best else None, text)


def _part(trial: Trial, config: TrainConfig, parent: Tracking) -> Part:
    """What a trial's run is part of; after each epoch it may be pruned."""

    def end_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        trial.report(metrics[config.monitor_metric], epoch)
        # After the last one there is nothing to save.
        if epoch < config.epochs and trial.should_prune():
            raise Pruned(f"after epoch {epoch} of {config.epochs}: worse than the median")

    def begin(run: str) -> None:
        trial.set_user_attr("run", run)

    return Part(parent.run_id, f"trial {trial.number}", begin, end_epoch)


def _table(trials: Sequence[FrozenTrial], space: Space) -> str:
    rows = [
        {
            "trial": trial.number,
            "state": "failed" if trial.state == TrialState.FAIL else trial.state.name.lower(),
            "value": trial.value,
            **{name: trial.params.get(name) for name in space},
            "run_id": trial.user_attrs.get("run"),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "reason": trial.user_attrs.get("reason", ""),
        }
        for trial in trials
    ]
    text: str = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
    return text


def _importances(study: optuna.Study) -> str:
    """The share of the scores' variance that each option explains (fANOVA), and noise alone."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = np.array([trial.value for trial in trials], dtype=float)
    if len(trials) < ENOUGH or np.ptp(values) == 0 or len(trials[0].params) < 2:
        return f"importances: of two options or more, from {ENOUGH} trials on whose scores differ"
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)

    def shares(scores: NDArray[np.float64]) -> dict[str, float]:
        by_number = {trial.number: float(v) for trial, v in zip(trials, scores, strict=True)}
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: by_number[trial.number]
        )

    rng = np.random.default_rng(0)
    chance = [shares(rng.permutation(values)) for _ in range(_SHUFFLES)]
    found = (
        f"{name} {share:.2f} ({np.mean([one[name] for one in chance]):.2f})"
        for name, share in shares(values).items()
    )
    return f"importances (in brackets: with the scores shuffled): {', '.join(found)}"


def write_page(path: Path, study: optuna.Study, metric: str, text: str) -> None:
    """One page: the summary, and Optuna's own charts."""
    from matplotlib import pyplot

    report = Report("Sweep").text(f"```\n{text}\n```")
    charts = optuna.visualization.matplotlib

    def add(axes: Axes, caption: str) -> None:
        figure = axes.get_figure(root=True)
        if figure is not None:
            figure.set(size_inches=(7.2, 3.8), dpi=150, layout_engine="constrained")
            axes.set(facecolor="white", title="")
            style.plain(axes, axes.get_xlabel(), axes.get_ylabel())
            style.legend(axes)
            report.figure(style.png(figure), caption)
            pyplot.close(figure)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if study.get_trials(deepcopy=False, states=_DONE[:1]):
            add(charts.plot_optimization_history(study), f"`{metric}` of the trials.")
        if "with the scores shuffled" in text:
            add(charts.plot_param_importances(study), "Share of the scores' variance (fANOVA).")
    report.write(path)
