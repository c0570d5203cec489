"""What a finished run was, as `kelp.train` returns it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kelp.nn.training.tracking import ARTIFACTS

if TYPE_CHECKING:
    from kelp.nn.training.history import EpochHistory


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run_id: str
    """MLflow's id of the run."""
    run_dir: Path
    """`<output_dir>/<experiment>/<run_id>`: what `kelp predict --run_dir` takes."""
    bundle: Path
    """The bundle of the best epoch."""
    metric: str
    """The metric that picked it."""
    score: float
    """Its value there."""
    scores: dict[str, float]
    """All metrics of the best epoch."""
    epoch: int
    """The best epoch, counted from 1."""
    epochs: int
    """Epochs done."""
    seconds: float
    """Wall time, of this session only where the run was resumed."""
    writes: bool = True
    """Whether this process wrote the run; False for the others that torchrun or srun started."""

    def summary(self) -> str:
        """One line for the terminal; nothing where another process says it."""
        if not self.writes:
            return ""
        return (
            f"trained {self.epochs} epochs in {self.seconds:.0f} s; best: epoch {self.epoch}, "
            f"{self.metric} {self.score:.4f}; run folder {self.run_dir}"
        )


def result_of(
    epochs: EpochHistory, run_dir: Path, started: float, writes: bool = True
) -> TrainResult:
    """The result of a run that began at `started`, by the monotonic clock."""
    from kelp.nn.training.checkpoint import BEST

    best = epochs.ranking[0]
    scores = epochs.history[best - 1]
    metric = epochs.config.monitor_metric
    return TrainResult(
        run_id=run_dir.name,
        run_dir=run_dir,
        bundle=run_dir / ARTIFACTS / BEST,
        metric=metric,
        score=scores[metric],
        scores=scores,
        epoch=best,
        epochs=len(epochs.history),
        seconds=time.monotonic() - started,
        writes=writes,
    )
