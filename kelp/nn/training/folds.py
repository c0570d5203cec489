"""`kelp train --cv_split all`: one run for each fold, one after the other, under one parent."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from kelp.config import TrainConfig
from kelp.errors import ConfigError, TableError
from kelp.inference.foldruns import FOLDS_FILE, FoldRun, FoldRuns
from kelp.io.files import write_text
from kelp.nn.export import add_network_file
from kelp.nn.training.checkpoint import BEST
from kelp.nn.training.fit import train
from kelp.nn.training.plan import CONFIG_FILE, effective, run_folder
from kelp.nn.training.result import TrainResult
from kelp.nn.training.tracking import (
    ARTIFACTS,
    Part,
    Tracking,
    quiet_libraries,
    reopen_run,
    start_run,
)
from kelp.progress import Progress, silent
from kelp.tables import TRAIN, VAL, count_folds, fold_column, read_table

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class FoldsResult:
    """A finished cross-validation."""

    run_dir: Path
    """The parent folder: what `kelp predict --run_dir` and `kelp tune` take for all folds."""
    folds: FoldRuns
    """The run of each fold and its scores."""
    metric: str
    """The metric that picked the best epoch of each."""
    seconds: float
    """Wall time, of this session only where it was resumed."""

    def summary(self) -> str:
        """A line for each fold, mean and spread, and the parent folder."""
        lines = [
            f"fold {k}: {self.metric} {run.scores[self.metric]:.4f}, run {run.run}"
            for k, run in sorted(self.folds.runs.items())
            if run.scores is not None
        ]
        total = self.folds.summary()[self.metric]
        lines.append(
            f"{len(self.folds.folds)} folds in {self.seconds:.0f} s: {self.metric} "
            f"{total['mean']:.4f} +- {total['sd']:.4f} (standard deviation); run folder "
            f"{self.run_dir}"
        )
        return "\n".join(lines)


def train_folds(config: TrainConfig, progress: Progress = silent) -> FoldsResult:
    """Train a network on every fold of a table.

    The folds share all settings. What is finished is kept when training is stopped, and
    `resume_from` of the parent goes on with the rest.

    Raises:
        KelpError: as in `train`; the folds before are kept.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    started = time.monotonic()
    config = config.model_copy(update={"cv_split": "all"})
    numbers = _numbers(config.metadata_fp)
    with quiet_libraries():
        parent, folds = _open(effective(config), numbers)
        try:
            with parent:
                for number in folds.unfinished:
                    _train_one(config, number, parent, folds, progress)
                for name, figures in folds.summary().items():
                    point = {f"{name}_mean": figures["mean"], f"{name}_sd": figures["sd"]}
                    parent.log_point(0, point)
                parent.log_files(FOLDS_FILE)
        except KeyboardInterrupt:
            log.info("all folds go on with --resume_from %s", parent.run_dir)
            raise
    return FoldsResult(parent.run_dir, folds, config.monitor_metric, time.monotonic() - started)


def _numbers(path: Path) -> list[int]:
    """The folds that have something to train and to validate on."""
    table = read_table(path, ("tile_id",))
    numbers: list[int] = []
    empty: list[int] = []
    for number in range(count_folds(table, path)):
        parts = set(table[fold_column(table, number, path)])
        (numbers if {TRAIN, VAL} <= parts else empty).append(number)
    if not numbers:
        raise TableError(f"{path}: no fold has rows to train and to validate on")
    if empty:
        log.info(
            "left out, without rows to train or to validate on: fold %s", ", ".join(map(str, empty))
        )
    return numbers


def _open(config: TrainConfig, numbers: list[int]) -> tuple[Tracking, FoldRuns]:
    """The parent's run, and what is done already."""
    if config.resume_from is not None:
        folder = run_folder(config.resume_from)
        epochs = TrainConfig.load(folder / ARTIFACTS / CONFIG_FILE).epochs
        if epochs != config.epochs:
            raise ConfigError(
                f"--epochs {config.epochs}: the folds of {folder} have {epochs}, and all folds "
                "share their settings; give that, or begin again without --resume_from"
            )
        parent = reopen_run(folder, config)
        return parent, FoldRuns.read(parent.run_dir) or FoldRuns(numbers)
    parent = start_run(config)
    folds = FoldRuns(numbers)
    folds.write(parent.run_dir)
    # Last: it makes the folder one that can be resumed.
    write_text(parent.artifacts / CONFIG_FILE, config.to_yaml())
    return parent, folds


def _train_one(
    config: TrainConfig, number: int, parent: Tracking, folds: FoldRuns, progress: Progress
) -> None:
    log.info("fold %d, one of %d", number, len(folds.folds))
    begun = folds.runs.get(number)
    run_dir = parent.run_dir.parent / begun.run if begun else None
    can_go_on = run_dir is not None and (run_dir / ARTIFACTS / CONFIG_FILE).is_file()
    child = config.model_copy(
        update={"cv_split": number, "resume_from": run_dir if can_go_on else None}
    )

    def begin(run_id: str) -> None:
        folds.runs[number] = FoldRun(run_id)
        folds.write(parent.run_dir)

    part = Part(parent.run_id, f"fold {number}", begin)
    result = train(child, progress, part)
    finite = {name: value for name, value in result.scores.items() if math.isfinite(value)}
    folds.runs[number] = FoldRun(result.run_id, finite)
    folds.write(parent.run_dir)


def train_one_or_all(config: TrainConfig, progress: Progress = silent) -> TrainResult | FoldsResult:
    """`kelp train`: one fold, or all of them; bundles get their `network.onnx`."""
    result = train_folds(config, progress) if config.cv_split == "all" else train(config, progress)
    if isinstance(result, FoldsResult):
        for run in result.folds.runs.values():
            add_network_file(result.run_dir.parent / run.run / ARTIFACTS / BEST)
    elif result.writes:
        add_network_file(result.bundle)
    return result
