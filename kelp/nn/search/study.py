"""The memory of a sweep: Optuna's study in a file of the output folder.

What is chosen for a trial follows from the seed, the number of trials finished before it, and
their scores alone. So a sweep that was stopped and goes on chooses as one that was not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from kelp.config import SweepConfig
from kelp.errors import ConfigError, InputError
from kelp.nn.search.space import Base, Choice, Range, Space, Value

STORE: Final = "study.db"
ENOUGH: Final = 10
"""Complete trials below which importances would be read out of noise."""

State = Literal["complete", "pruned", "failed"]

_NAME: Final = "sweep"
_RUN, _REASON, _SETTINGS, _PARENT = "run", "reason", "settings", "parent"
_STATES: Final[Mapping[TrialState, State]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_DONE: Final = (TrialState.COMPLETE, TrialState.PRUNED)
_WARM_UP: Final = 2
"""The first epoch after which a trial may be pruned: the score before says little."""
_STARTS: Final = 5
"""Complete trials before the first is pruned."""
_SHUFFLES: Final = 5
_TREES: Final = 32


@dataclass(frozen=True)
class Outcome:
    """A trial that ended."""

    number: int
    state: State
    value: float | None
    """Score of the best epoch; of a pruned trial, of its last."""
    params: dict[str, Value]
    run: str | None
    """Id of its run in MLflow; `None` where `kelp train` refused its options."""
    seconds: float | None
    reason: str
    """Why it is not complete."""


@dataclass(frozen=True)
class Importance:
    """Share of the scores' variance that an option explains."""

    share: float
    chance: float
    """The same where scores are dealt to the trials by chance: what noise alone would give."""


class Memory:
    """The trials of a sweep; every change is on the disk when its method returns."""

    def __init__(self, study: optuna.Study, config: SweepConfig, space: Space) -> None:
        self.study = study
        self.config = config
        self.space = space
        self.grid = space.grid() if config.sampler == "grid" else []
        np.random.default_rng(config.seed).shuffle(self.grid)
        self.distributions = {k: _distribution(entry) for k, entry in space.options.items()}

    @property
    def parent(self) -> str | None:
        """Id of the run in MLflow that all trials are part of."""
        found: str | None = self.study.user_attrs.get(_PARENT)
        return found

    @parent.setter
    def parent(self, run: str) -> None:
        self.study.set_user_attr(_PARENT, run)

    @property
    def wanted(self) -> int:
        """Trials that the sweep is to finish: no more than a grid has."""
        return min(self.config.trials, len(self.grid) or self.config.trials)

    @property
    def finished(self) -> int:
        """Trials that need not be done again."""
        return len(self.study.get_trials(deepcopy=False, states=_DONE))

    def fail_abandoned(self) -> list[Outcome]:
        """Mark the trials of killed processes as failed; give them."""
        abandoned = self.study.get_trials(states=(TrialState.RUNNING,))
        for trial in abandoned:
            self.study.tell(trial.number, state=TrialState.FAIL)
        numbers = {trial.number for trial in abandoned}
        return [outcome for outcome in self.outcomes() if outcome.number in numbers]

    def begin(self) -> Trial:
        """A new trial, its options chosen."""
        done = self.finished
        seed = int(np.random.SeedSequence([self.config.seed, done]).generate_state(1)[0])
        self.study.sampler = (
            optuna.samplers.TPESampler(seed=seed)
            if self.config.sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        # One that was queued when its process was killed is still there.
        if self.grid and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            tried = [t.params for t in self.study.get_trials(deepcopy=False, states=_DONE)]
            self.study.enqueue_trial(next(cell for cell in self.grid if cell not in tried))
        return self.study.ask(self.distributions)

    def complete(self, trial: Trial, value: float) -> None:
        """A trial has trained to its end; a value that is no number leaves it without one."""
        if math.isfinite(value):
            self.study.tell(trial, value)
        else:
            self.prune(trial, f"its score is {value}")

    def prune(self, trial: Trial, reason: str) -> None:
        """A trial was ended early, or its options cannot be trained."""
        trial.set_user_attr(_REASON, reason)
        self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: Trial) -> None:
        """A trial was stopped: it does not count, and its options are tried again."""
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def opened(self, trial: Trial, run: str) -> None:
        """The trial's run in MLflow is open."""
        trial.set_user_attr(_RUN, run)

    def outcomes(self) -> list[Outcome]:
        """All trials that ended, in the order of their numbers."""
        return [
            _outcome(trial)
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state in _STATES
        ]

    def importances(self) -> dict[str, Importance] | None:
        """How much each option matters (fANOVA), the most important first.

        `None` where that cannot be told: a single option, fewer than `ENOUGH` complete trials, or
        the same score in all of them.
        """
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = np.array([trial.value for trial in trials], dtype=float)
        if len(self.space.options) < 2 or len(trials) < ENOUGH or np.ptp(values) == 0:
            return None
        rng = np.random.default_rng(0)
        shares = self._shares(trials, values)
        dealt = [self._shares(trials, rng.permutation(values)) for _ in range(_SHUFFLES)]
        return {
            name: Importance(share, float(np.mean([one[name] for one in dealt])))
            for name, share in sorted(shares.items(), key=lambda item: -item[1])
        }

    def _shares(self, trials: list[FrozenTrial], values: NDArray[np.float64]) -> dict[str, float]:
        by_number = {trial.number: float(v) for trial, v in zip(trials, values, strict=True)}
        return optuna.importance.get_param_importances(
            self.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=0),
            params=list(self.space.options),
            target=lambda trial: by_number[trial.number],
        )


@contextmanager
def open_memory(config: SweepConfig, base: Base, space: Space) -> Iterator[Memory]:
    """The study of the output folder: a new one, or the one that was begun there.

    Raises:
        InputError: the file cannot be read or written.
        ConfigError: it is that of another sweep.
    """
    path = config.output_dir.resolve() / STORE
    try:
        storage = RDBStorage(f"sqlite:///{path}")
    except (OptunaError, SQLAlchemyError, RuntimeError) as error:
        raise _unusable(path, error) from error
    try:
        mode = base.configured({}).monitor_mode
        study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
            pruner=_pruner(config),
        )
        _check_settings(study, config, base, space)
        yield Memory(study, config, space)
    except (OptunaError, SQLAlchemyError) as error:
        raise _unusable(path, error) from error
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _unusable(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"{path}: cannot be used as Optuna's study ({reason}); check the disk, or choose another "
        "--output_dir"
    )


def _pruner(config: SweepConfig) -> optuna.pruners.BasePruner:
    if config.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=_STARTS, n_warmup_steps=_WARM_UP)


def _check_settings(study: optuna.Study, config: SweepConfig, base: Base, space: Space) -> None:
    """Refuse to go on with another sweep; a new study keeps what it is."""
    shared = base.configured({}).model_dump(mode="json", exclude={"output_dir"})
    own = {name: getattr(config, name) for name in ("sampler", "pruner", "seed")}
    now = {str(config.train_config): shared, str(config.space): space.record(), "--": own}
    before = study.user_attrs.get(_SETTINGS)
    if before is None:
        study.set_user_attr(_SETTINGS, list(now.values()))
        return
    for (where, new), old in zip(now.items(), before, strict=True):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                what = f"--{name}" if where == "--" else f"{where}: {name}"
                raise ConfigError(
                    f"{what}: now {_shown(new, name)}, but the sweep in {config.output_dir} was "
                    f"begun with {_shown(old, name)}; give that, or another --output_dir"
                )


def _shown(options: Mapping[str, Any], name: str) -> str:
    if name not in options:
        return "nothing"
    value = options[name]
    if isinstance(value, dict):  # an entry of the space
        return str({key: part for key, part in value.items() if part not in (None, False)})
    return str(value)


def _distribution(entry: Range | Choice) -> BaseDistribution:
    with warnings.catch_warnings():
        # A high end that no step reaches is lowered: said in the documentation.
        warnings.simplefilter("ignore")
        if isinstance(entry, Choice):
            return CategoricalDistribution(entry.values)
        if isinstance(entry.low, int) and isinstance(entry.high, int):
            return IntDistribution(entry.low, entry.high, entry.log, int(entry.step or 1))
        return FloatDistribution(entry.low, entry.high, entry.log, entry.step)


def _outcome(trial: FrozenTrial) -> Outcome:
    state = _STATES[trial.state]
    time = trial.duration.total_seconds() if trial.duration and state != "failed" else None
    value = trial.value if state != "failed" else None
    reason = trial.user_attrs.get(_REASON, "stopped" if state == "failed" else "")
    finite = value if value is not None and math.isfinite(value) else None
    run = trial.user_attrs.get(_RUN)
    return Outcome(trial.number, state, finite, dict(trial.params), run, time, reason)
