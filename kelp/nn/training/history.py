"""The epochs of a run, as all of its processes know them, and the checkpoint it resumes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from kelp.config import TrainConfig
from kelp.errors import ConfigError, InputError, TrainingError
from kelp.evaluation.confusion import Confusion
from kelp.nn.metrics import Found, from_matrix, to_matrix
from kelp.nn.model import KelpNet
from kelp.nn.training.task import TRAIN_LOSS, KelpTask

CHECKPOINTS: Final = "checkpoints"
LAST: Final = "last.ckpt"
_STATE: Final = "EpochKeeper"
"""Its key in checkpoints, also in those of kelp 0.1."""


class EpochHistory(Checkpoint):
    """Scores of each epoch, and early stopping: the same in every process of a run.

    Lightning's `EarlyStopping` and `ModelCheckpoint` decide after the checkpoint is written; a
    resumed run would decide otherwise.

    Epochs are counted from 1.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.history: list[dict[str, float]] = []
        """Metrics of each finished epoch."""
        self.confusions: list[Confusion] = []
        """Pixel counts behind the scores of each finished epoch."""
        self.found: list[Found] = []
        """What each finished epoch's network makes of the validation rows at other thresholds."""

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; plain numbers, so that it loads without unpickling."""
        return {
            "history": self.history,
            "confusions": [list(to_matrix(counts).values()) for counts in self.confusions],
            "found": [list(astuple(found)) for found in self.found],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the finished epochs of a resumed run."""
        self.history = [dict(metrics) for metrics in state_dict["history"]]
        self.confusions = [from_matrix(cells) for cells in state_dict["confusions"]]
        unknown = [[0, 0.0, 0.0]] * len(self.history)  # in checkpoints before kelp 0.2
        self.found = [Found(*found) for found in state_dict.get("found", unknown)]

    def restore(self, checkpoint: Path) -> None:
        """Take over the finished epochs of a run that has nothing left to train."""
        self.load_state_dict(_read_state(checkpoint))

    @property
    def state_key(self) -> str:
        """Name of this callback's part of a checkpoint."""
        return _STATE

    @property
    def ranking(self) -> list[int]:
        """Finished epochs, the best first; of equals the earlier."""
        sign = -1 if self.config.monitor_mode == "max" else 1
        values = [metrics[self.config.monitor_metric] for metrics in self.history]
        keys = [sign * value if math.isfinite(value) else math.inf for value in values]
        return sorted(range(1, len(keys) + 1), key=lambda epoch: keys[epoch - 1])

    @property
    def exhausted(self) -> bool:
        """Whether the best epoch is so old that training should stop."""
        if not self.history:
            return False
        return len(self.history) - self.ranking[0] >= self.config.early_stopping_patience

    def require_found(self) -> None:
        """Raise `TrainingError` when the best epoch's network finds nothing."""
        best = self.ranking[0]
        found, least = self.found[best - 1], self.config.min_dice
        if least and not found.enough(least):
            raise TrainingError(
                f"training found nothing: Dice {found.best:.4f} on the validation rows in the best "
                f"epoch ({best}), at the best threshold, where marking everything gives "
                f"{found.everything:.4f} and --min_dice {least:g} is asked for; no bundle is made. "
                "Train longer (--epochs, --samples_per_epoch), change --lr or --loss, look at the "
                "masks, or keep it with --min_dice 0"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run may have nothing left to do."""
        trainer.should_stop = self.exhausted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the epoch, save it, and decide whether to stop."""
        epoch = trainer.current_epoch + 1
        if epoch <= len(self.history):
            return  # a resumed run passes the end of its last finished epoch again
        assert isinstance(pl_module, KelpTask)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # All decide by the same numbers, to the last bit: who stopped alone would be waited for.
        metrics = trainer.strategy.broadcast(metrics)
        if not math.isfinite(metrics[TRAIN_LOSS]):
            raise ConfigError(
                f"training diverged: the loss of epoch {epoch} is {metrics[TRAIN_LOSS]}; "
                "lower --lr, or use --precision 32-true"
            )
        self.history.append(metrics)
        self.confusions.append(pl_module.scores.confusion())
        self.found.append(pl_module.scores.found())
        self._save(pl_module.scored, epoch, metrics)
        trainer.should_stop = self.exhausted
        self._draw(trainer, pl_module.scored, epoch)
        pl_module.end_epoch(metrics)
        self._save_checkpoint(trainer)

    def _save(self, net: KelpNet, epoch: int, metrics: Mapping[str, float]) -> None:
        """Only the first process writes anything."""

    def _draw(self, trainer: Trainer, net: KelpNet, epoch: int) -> None:
        """Nor do the others draw."""

    def _save_checkpoint(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(LAST)  # all take part; the first process writes, to its own path


def read_checkpoint(artifacts: Path) -> tuple[Path | None, int]:
    """The checkpoint of a run, if it has one, and the number of epochs it holds.

    Raises `InputError` when the file cannot be read.
    """
    path = artifacts / CHECKPOINTS / LAST
    if not path.is_file():
        return None, 0  # stopped in its first epoch
    return path, len(_read_state(path)["history"])


def _read_state(path: Path) -> dict[str, Any]:
    """The callback's part of a checkpoint, read without unpickling anything."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state: dict[str, Any] = content["callbacks"][_STATE]
    except (OSError, RuntimeError, UnpicklingError, LookupError) as error:
        raise InputError(f"{path}: not a checkpoint of kelp train; start the run again") from error
    return state
