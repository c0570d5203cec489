"""The space of a sweep: which options of `kelp train` are searched, and where."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from kelp.config import TrainConfig
from kelp.config.base import read_yaml
from kelp.errors import ConfigError

Value = bool | int | float | str | None
"""Of an option, as Optuna keeps it; lists are comma-separated text, as flags give them."""

_SHARED: Final = {
    "data_dir",
    "metadata_fp",
    "output_dir",
    "cv_split",
    "experiment",
    "resume_from",
    "monitor_metric",
    "monitor_mode",
    "limit_val_batches",
    "limit_test_batches",
    "fast_dev_run",
}
"""Options that say what the score is and where things lie: all trials share them."""
_OF_THE_LOSS: Final = {"loss", "ce_smooth_factor", "ce_class_weights"}
_ENDS: Final = ("low", "high")
_COMBINATIONS: Final = 512
"""Tried for one that allows a value, before the first trial."""
_LARGEST_GRID: Final = 100_000


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; `log`: evenly by their logarithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} with log: true must be above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; keep one")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step {self.step:g} must be above 0 and fit between low and high")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check beforehand."""
        return (self.low, self.high)

    def cells(self) -> list[Value] | None:
        """All values, where they can be counted."""
        step = 1 if self.step is None and isinstance(self.low, int) else self.step
        if self.log or step is None:
            return None
        low, high, by = (Decimal(str(number)) for number in (self.low, self.high, step))
        kind = type(self.low)
        return [kind(low + k * by) for k in range(int((high - low) / by) + 1)]


class Choice(BaseModel):
    """One of some `values`, without an order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Any, ...]

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Self:
        if len(self.values) < 2:
            raise ValueError("values: give two or more; a single one belongs into the config file")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check beforehand."""
        return self.values

    def cells(self) -> list[Value] | None:
        """All values."""
        return list(self.values)


@dataclass(frozen=True)
class Base:
    """What all trials of a sweep share."""

    path: Path
    """The config file of `kelp train`."""
    values: Mapping[str, Any]
    """Its options, as given."""
    output_dir: Path
    """Of the sweep, which holds the runs of its trials."""

    @classmethod
    def read(cls, path: Path, output_dir: Path) -> Base:
        """Read and check a config file of `kelp train`.

        Raises:
            ConfigError: not one, or one of several folds or of a run to resume.
        """
        base = cls(path, read_yaml(path), output_dir)
        try:
            config = base.configured({})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if config.cv_split == "all":
            raise ConfigError(f"{path}: cv_split all: a sweep judges by one fold; give its number")
        if config.resume_from is not None:
            raise ConfigError(f"{path}: resume_from: trials begin anew; leave it out")
        return base

    def configured(self, params: Mapping[str, Value]) -> TrainConfig:
        """The configuration of a trial. Raises `ConfigError` for options that do not fit."""
        return TrainConfig(**{**self.values, **params, "output_dir": self.output_dir})

    def again(self, params: Mapping[str, Value]) -> TrainConfig:
        """The configuration of a run like a trial, where the config file wants its runs."""
        config = self.configured(params)
        output_dir = Path(self.values.get("output_dir") or self.output_dir)
        return config.model_copy(update={"output_dir": output_dir})


@dataclass(frozen=True)
class Space:
    """The options that are searched, by name."""

    options: Mapping[str, Range | Choice]

    @classmethod
    def read(cls, path: Path, base: Base) -> Space:
        """Read and check a space file.

        Raises:
            ConfigError: an unknown option, an empty range, a value that `kelp train` refuses in
                every combination with the others.
        """
        entries = read_yaml(path)
        if not entries:
            raise ConfigError(
                f"{path}: no option to search; give one, as in lr: {{low: 1e-4, high: 1e-2}}"
            )
        try:
            space = cls({name: _parsed(name, entry) for name, entry in entries.items()})
            space._check(base)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return space

    def record(self) -> dict[str, Any]:
        """The space as JSON keeps it."""
        return {name: entry.model_dump(mode="json") for name, entry in self.options.items()}

    def grid(self) -> list[dict[str, Value]]:
        """All combinations.

        Raises:
            ConfigError: an option has endless values, or there are too many combinations.
        """
        columns: dict[str, list[Value]] = {}
        for name, entry in self.options.items():
            cells = entry.cells()
            if cells is None:
                raise ConfigError(
                    f"--sampler grid: {name} has no list of values; give values or a step, or "
                    "another --sampler"
                )
            columns[name] = cells
        count = math.prod(map(len, columns.values()))
        if count > _LARGEST_GRID:
            raise ConfigError(
                f"--sampler grid: {count:,} combinations are more than {_LARGEST_GRID:,}; give "
                "fewer values, or another --sampler"
            )
        return [
            dict(zip(columns, cell, strict=True)) for cell in itertools.product(*columns.values())
        ]

    def _check(self, base: Base) -> None:
        if base.configured({}).monitor_metric == "val/loss":
            for name in sorted(_OF_THE_LOSS & self.options.keys()):
                raise ConfigError(
                    f"{name}: losses of several kinds cannot be compared; monitor val/dice"
                )
        for name, entry in self.options.items():
            for value in entry.ends:
                self._check_value(base, name, value)

    def _check_value(self, base: Base, name: str, value: Value) -> None:
        """Refuse a value that no combination of the others allows."""
        refused = None
        others = {key: entry.ends for key, entry in self.options.items() if key != name}
        for k, corner in enumerate(itertools.product(*others.values())):
            try:
                base.configured({**dict(zip(others, corner, strict=True)), name: value})
            except ConfigError as error:
                refused = refused or error
            else:
                return
            if k >= _COMBINATIONS:
                return
        if refused is not None:
            raise refused


def _parsed(name: str, entry: Any) -> Range | Choice:
    """An entry of a space file, its values as `kelp train` reads them."""
    if name not in TrainConfig.model_fields:
        raise ConfigError(f"{name}: kelp train has no such option; see kelp train --help")
    if name in _SHARED:
        raise ConfigError(f"{name}: shared by all trials; set it in the config file")
    if not isinstance(entry, dict):
        raise ConfigError(f"{name}: give `low:` and `high:`, or `values:`, not {entry!r}")
    try:
        if "values" in entry:
            return _choice(name, entry)
        return _range(name, entry)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from error


def _choice(name: str, entry: dict[str, Any]) -> Choice:
    values = entry["values"]
    if not isinstance(values, list):
        raise ConfigError(f"{name}: values: give a list, as in [8, 16], not {values!r}")
    choice = Choice(**{**entry, "values": [_typed(name, value) for value in values]})
    if len(set(choice.values)) < len(choice.values):
        raise ConfigError(f"{name}: a value is there twice")
    return choice


def _range(name: str, entry: dict[str, Any]) -> Range:
    ends: dict[str, Any] = {key: _typed(name, entry[key]) for key in _ENDS if key in entry}
    for value in ends.values():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}: not a number, so it has no range; give `values:`")
    made = Range(**{**entry, **ends})
    if isinstance(made.low, int) and made.step is not None:
        if made.step % 1:
            raise ConfigError(f"{name}: step {made.step:g}: the option is a whole number")
        made = made.model_copy(update={"step": int(made.step)})
    return made


def _typed(name: str, value: Any) -> Value:
    """A value as `kelp train` reads it, and as Optuna and YAML keep it."""
    field = TrainConfig.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    typed = TypeAdapter[Any](kind).validate_python(value)
    if isinstance(typed, tuple):
        return ",".join(map(str, typed))
    plain: Value = str(typed) if isinstance(typed, Path) else typed
    return plain


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if first["type"] == "value_error":
        return reason
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{where}: there are low, high, log and step, or values"
    return f"{where}: {reason}" if where else f"{reason}, got {first['input']!r}"
