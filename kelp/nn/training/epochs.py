"""What is kept at the end of each epoch: curves, bundles, and the checkpoint to resume from."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from kelp.config import TrainConfig
from kelp.errors import ConfigError
from kelp.files import atomic, atomic_folder, write_json
from kelp.nn.training.task import TRAIN_LOSS
from kelp.nn.training.tracking import Tracking
from kelp.progress import Progress

log = logging.getLogger("kelp")

CHECKPOINTS: Final = "checkpoints"
LAST: Final = "last.ckpt"
HISTORY: Final = "history.json"
BEST: Final = "bundle"
LATEST: Final = "bundle-latest"

SaveBundle = Callable[[Path, int, Mapping[str, float]], object]
"""`save(folder, epoch, scores)`: write the network as it is now as a bundle."""


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

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; plain numbers, so that it loads without unpickling."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the finished epochs of a resumed run."""
        self.history = [dict(metrics) for metrics in state_dict["history"]]

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
        """Tell how far the run is."""
        batches = int(trainer.num_training_batches)
        done = trainer.current_epoch * batches + batch_idx + 1
        # The end is told by `train`: validation and the bundle still follow the last batch.
        self.progress("training", min(done, self._total(batches) - 1), self._total(batches))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the epoch, save it, and decide whether to go on."""
        epoch = trainer.current_epoch + 1
        if epoch <= len(self.history):
            return  # a resumed run passes the end of its last finished epoch again
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(metrics[TRAIN_LOSS]):
            raise ConfigError(
                f"training diverged: the loss of epoch {epoch} is {metrics[TRAIN_LOSS]}; "
                "lower --lr, or use --precision 32-true"
            )
        self.history.append(metrics)
        self._save_bundles(epoch, metrics)
        write_json(self.tracking.artifacts / HISTORY, _finite(self.history))
        self.tracking.log_epoch(epoch, metrics)
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

    def finish_progress(self, trainer: Trainer) -> None:
        """Tell that training is over, be it early."""
        total = self._total(int(trainer.num_training_batches))
        self.progress("training", total, total)

    def _save_bundles(self, epoch: int, metrics: Mapping[str, float]) -> None:
        scores = {name: v for name, v in metrics.items() if name.startswith("val/")}
        scores = {name: value for name, value in scores.items() if math.isfinite(value)}
        latest = self.tracking.artifacts / LATEST
        self.save(latest, epoch, scores)
        kept = self.ranking[: self.config.save_top_k]
        if epoch in kept:
            with atomic_folder(self._folder(epoch)) as folder:
                shutil.copytree(latest, folder, copy_function=_link, dirs_exist_ok=True)
        for folder in (self.tracking.artifacts / CHECKPOINTS).glob("epoch-*"):
            if folder not in [self._folder(best) for best in kept]:
                shutil.rmtree(folder)

    def _folder(self, epoch: int) -> Path:
        return self.tracking.artifacts / CHECKPOINTS / f"epoch-{epoch:04d}"

    def _total(self, batches: int) -> int:
        return max(1, self.config.epochs * batches)

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
