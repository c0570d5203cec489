"""What is kept at the end of each epoch: curves, bundles, and the checkpoint to resume from."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from kelp.config import TrainConfig
from kelp.errors import ConfigError, InputError
from kelp.files import atomic, atomic_folder, write_json
from kelp.nn.metrics import Confusion
from kelp.nn.model import KelpNet
from kelp.nn.training.task import LEARNING_RATE, TRAIN_LOSS, KelpTask
from kelp.nn.training.tracking import Tracking
from kelp.progress import Progress

log = logging.getLogger("kelp")

CHECKPOINTS: Final = "checkpoints"
LAST: Final = "last.ckpt"
HISTORY: Final = "history.json"
BEST: Final = "bundle"
LATEST: Final = "bundle-latest"

SaveBundle = Callable[[Path, KelpNet, int, Mapping[str, float]], object]
"""`save(folder, net, epoch, scores)`: write the network as it is now as a bundle."""


class EpochKeeper(Checkpoint):
    """Ends each epoch: ranks it, saves what may be needed, stops when nothing improves.

    Epochs are counted from 1. The order of writing makes a kill harmless at any moment: the
    bundles first, the checkpoint last; an epoch that is not in the checkpoint is done again.
    """

    def __init__(
        self, config: TrainConfig, tracking: Tracking, save: SaveBundle, progress: Progress
    ) -> None:
        self.config = config
        self.tracking = tracking
        self.save = save
        self.progress = progress
        self.history: list[dict[str, float]] = []
        """Metrics of each finished epoch."""
        self.confusions: list[Confusion] = []
        """Pixel counts behind the scores of each finished epoch."""
        self.steps = 1
        self.logged = 0

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; plain numbers, so that it loads without unpickling."""
        return {
            "history": self.history,
            "confusions": [list(astuple(counts)) for counts in self.confusions],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the finished epochs of a resumed run."""
        self.history = [dict(metrics) for metrics in state_dict["history"]]
        self.confusions = [Confusion(*counts) for counts in state_dict["confusions"]]

    def restore(self, checkpoint: Path) -> None:
        """Take over the finished epochs of a run that has nothing left to train."""
        self.load_state_dict(_read_state(checkpoint))

    @property
    def state_key(self) -> str:
        """Name of this callback's part of a checkpoint."""
        return type(self).__name__

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run may have nothing left to do."""
        trainer.should_stop = self.exhausted

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tell how far the run is, and how it does."""
        batches = int(trainer.num_training_batches)
        self.steps = self.config.epochs * batches
        done = trainer.current_epoch * batches + batch_idx + 1
        # The end is told later: validation and the bundle still follow the last batch.
        self.progress("training", min(done, self.steps - 1), self.steps)

        self._log_step(trainer, outputs)

    def _log_step(self, trainer: Trainer, outputs: Any) -> None:
        every, step = self.config.log_every_n_steps, trainer.global_step
        if not every or step == self.logged or step % every:
            return
        self.logged = step
        # Lightning has divided it, so that gradients add up to a mean.
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.tracking.log_point(step, {f"{TRAIN_LOSS}_step": loss, f"{LEARNING_RATE}_step": rate})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Curves of validations within epochs, by steps."""
        if self.config.val_check_interval < 1:
            metrics = trainer.callback_metrics.items()
            scores = {f"{name}_step": float(v) for name, v in metrics if name.startswith("val/")}
            self.tracking.log_point(trainer.global_step, scores)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the epoch, save it, and decide whether to go on."""
        epoch = trainer.current_epoch + 1
        if epoch <= len(self.history):
            return  # a resumed run passes the end of its last finished epoch again
        assert isinstance(pl_module, KelpTask)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(metrics[TRAIN_LOSS]):
            raise ConfigError(
                f"training diverged: the loss of epoch {epoch} is {metrics[TRAIN_LOSS]}; "
                "lower --lr, or use --precision 32-true"
            )
        self.history.append(metrics)
        self.confusions.append(pl_module.scores.confusion())
        self._save_bundles(pl_module.scored, epoch, metrics)
        write_json(self.tracking.artifacts / HISTORY, _finite(self.history))
        self.tracking.log_point(epoch, metrics)
        pl_module.end_epoch(metrics)
        trainer.should_stop = self.exhausted
        with atomic(self.tracking.artifacts / CHECKPOINTS / LAST) as partial:
            trainer.save_checkpoint(partial)
        self._tell(epoch, metrics)

    def publish(self) -> Path:
        """Put the best epochs under their final names, the very best last; give its folder."""
        artifacts = self.tracking.artifacts
        names = [BEST, *(f"{BEST}-{rank}" for rank in range(2, self.config.save_top_k + 1))]
        for name, epoch in reversed(list(zip(names, self.ranking, strict=False))):
            with atomic_folder(artifacts / name) as folder:
                shutil.copytree(
                    self._folder(epoch), folder, copy_function=_link, dirs_exist_ok=True
                )
        return artifacts / BEST

    @property
    def best_folder(self) -> Path:
        """The bundle of the best epoch so far."""
        return self._folder(self.ranking[0])

    def finish_progress(self) -> None:
        """Tell that training is over, be it early."""
        self.progress("training", self.steps, self.steps)

    def _save_bundles(self, net: KelpNet, epoch: int, metrics: Mapping[str, float]) -> None:
        scores = {name: v for name, v in metrics.items() if name.startswith("val/")}
        scores = {name: value for name, value in scores.items() if math.isfinite(value)}
        latest = self.tracking.artifacts / LATEST
        self.save(latest, net, epoch, scores)
        kept = self.ranking[: self.config.save_top_k]
        if epoch in kept:
            with atomic_folder(self._folder(epoch)) as folder:
                shutil.copytree(latest, folder, copy_function=_link, dirs_exist_ok=True)
        for folder in (self.tracking.artifacts / CHECKPOINTS).glob("epoch-*"):
            if folder not in [self._folder(best) for best in kept]:
                shutil.rmtree(folder)

    def _folder(self, epoch: int) -> Path:
        return self.tracking.artifacts / CHECKPOINTS / f"epoch-{epoch:04d}"

    def _tell(self, epoch: int, metrics: Mapping[str, float]) -> None:
        monitored = self.config.monitor_metric
        log.info(
            "epoch %d of %d: %s %.4f, %s %.4f%s",
            epoch,
            self.config.epochs,
            TRAIN_LOSS,
            metrics[TRAIN_LOSS],
            monitored,
            metrics[monitored],
            " (best so far)" if self.ranking[0] == epoch else "",
        )


def read_checkpoint(artifacts: Path) -> tuple[Path | None, int]:
    """The checkpoint of a run, if it has one, and the number of epochs it holds.

    Raises `InputError` when the file cannot be read.
    """
    path = artifacts / CHECKPOINTS / LAST
    if not path.is_file():
        return None, 0  # stopped in its first epoch
    return path, len(_read_state(path)["history"])


def _read_state(path: Path) -> dict[str, Any]:
    """The keeper's part of a checkpoint, read without unpickling anything."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state: dict[str, Any] = content["callbacks"][EpochKeeper.__name__]
    except (OSError, RuntimeError, UnpicklingError, LookupError) as error:
        raise InputError(f"{path}: not a checkpoint of kelp train; start the run anew") from error
    return state


def _link(source: str, target: str) -> None:
    """A second name for a finished file, which is never written again; a copy where it must be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _finite(history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """JSON has no NaN."""
    return [
        {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in history
    ]
