"""Options of `kelp sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kelp.config.base import Config, option

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "none"]


class SweepConfig(Config):
    """A search for better options of kelp train: many runs, with other options each."""

    train_config: Path = option(help="Config file of kelp train: what all trials share")
    space: Path = option(help="YAML file of the options to search, with their ranges or values")
    output_dir: Path = option(
        help="Folder for the runs, mlflow.db, study.db, trials.csv, best.yaml and report.html; "
        "a sweep that was started there is resumed"
    )
    trials: int = option(
        20, help="Trials to finish, those of earlier calls included", unit="trials", ge=1
    )
    timeout: float | None = option(
        None, help="Start no trial after this time; default: no limit", unit="seconds", gt=0
    )
    sampler: Sampler = option(
        "tpe",
        help="How options are chosen: from what scored well (tpe), at random, or all combinations",
    )
    pruner: Pruner = option(
        "median", help="End trials that do worse than the median of those before at the same epoch"
    )
    seed: int = option(
        0, help="Seed of the choices; that of training is in the config file", unit="integer", ge=0
    )
