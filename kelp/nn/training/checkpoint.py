"""What is saved at the end of each epoch: curves, pictures, bundles, and the checkpoint."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning import LightningModule, Trainer

from kelp.config import TrainConfig
from kelp.inference.bundle import read_spec
from kelp.io.files import atomic, atomic_folder, write_json
from kelp.nn.bundle import load_network
from kelp.nn.model import KelpNet
from kelp.nn.training.history import CHECKPOINTS, LAST, EpochHistory
from kelp.nn.training.pictures import (
    CURVES,
    MATRIX,
    Album,
    draw_confusion,
    draw_curves,
    write_confusions,
)
from kelp.nn.training.task import LEARNING_RATE, TRAIN_LOSS
from kelp.nn.training.tracking import Part, Tracking
from kelp.progress import Progress

log = logging.getLogger("kelp")

HISTORY: Final = "history.json"
SPEED: Final = "train/samples_per_second"
WAITING: Final = "train/waiting_for_data"
BEST: Final = "bundle"
LATEST: Final = "bundle-latest"

SaveBundle = Callable[[Path, KelpNet, int, Mapping[str, float]], object]
"""`save(folder, net, epoch, scores)`: write the network as it is now as a bundle."""


class BundleCheckpoint(EpochHistory):
    """Saves each epoch: bundles, curves, pictures, and the checkpoint to resume from.

    The order of writing makes a kill harmless at any moment: the bundles first, the checkpoint
    last; an epoch that is not in the checkpoint is done again.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracking: Tracking,
        save: SaveBundle,
        progress: Progress,
        album: Album,
        part: Part | None = None,
    ) -> None:
        super().__init__(config)
        self.album = album
        self.part = part
        self.tracking = tracking
        self.save = save
        self.progress = progress
        self.steps = 1
        self.logged = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch is waited for."""
        self.waiting = self.working = 0.0
        self.samples = 0
        self.since = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come."""
        now = time.monotonic()
        self.waiting += now - self.since
        self.since = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predictions of the last validation are no longer of use."""
        self.album.forget()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predictions that are to be pictured need not be made twice."""
        if trainer.world_size == 1:  # else the batches are dealt out
            self.album.take(outputs, batch_idx)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report progress, and the curves by steps."""
        batches = int(trainer.num_training_batches)
        if batch_idx + 1 == batches and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # it may be steps behind
        now = time.monotonic()
        self.working += now - self.since
        self.since = now
        self.samples += len(batch.raw)
        self.steps = self.config.epochs * batches
        done = trainer.current_epoch * batches + batch_idx + 1
        # The end is reported later: validation and the bundle still follow the last batch.
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
        self.since = time.monotonic()  # validation is neither work nor waiting
        if self.config.val_check_interval < 1:
            metrics = trainer.callback_metrics.items()
            scores = {f"{name}_step": float(v) for name, v in metrics if name.startswith("val/")}
            self.tracking.log_point(trainer.global_step, scores)

    def _save(self, net: KelpNet, epoch: int, metrics: Mapping[str, float]) -> None:
        self._save_bundles(net, epoch, metrics)
        write_json(self.tracking.artifacts / HISTORY, _finite(self.history))
        write_confusions(self.tracking.artifacts, self.confusions, self.ranking[0])
        self.tracking.log_point(epoch, metrics)

    def _draw(self, trainer: Trainer, net: KelpNet, epoch: int) -> None:
        # Not in the history: that says the same whatever the machine.
        if spent := self.waiting + self.working:
            speed = trainer.world_size * self.samples / spent
            self.tracking.log_point(epoch, {SPEED: speed, WAITING: self.waiting / spent})
        is_last = epoch == self.config.epochs or trainer.should_stop
        if self.album.draws(epoch, is_last):
            with trainer.precision_plugin.forward_context():
                names = self.album.draw_epoch(net, epoch, self.words(epoch))
            self.tracking.log_files(*names)

    def words(self, epoch: int) -> str:
        """What an epoch's pictures say of it."""
        monitored = self.config.monitor_metric
        best = self.ranking[0]
        rank = "best so far" if best == epoch else f"best so far: epoch {best}"
        return f"{monitored} {self.history[epoch - 1][monitored]:.4f}; {rank}"

    def _save_checkpoint(self, trainer: Trainer) -> None:
        with atomic(self.tracking.artifacts / CHECKPOINTS / LAST) as partial:
            trainer.save_checkpoint(partial)
        self._log_epoch(len(self.history), self.history[-1])
        if self.part:
            self.part.end_epoch(len(self.history), self.history[-1])

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

    def finish(self, device: torch.device) -> None:
        """Picture the run and its best epoch, and put its bundle under its final name.

        Raises:
            TrainingError: the network finds nothing; there is no bundle then but the latest.
        """
        self.require_found()
        if not self.found[self.ranking[0] - 1].kelp:
            log.warning(
                "the validation rows hold no kelp: their scores only say whether kelp was marked "
                "where none is; choose another --cv_split, or more images"
            )
        artifacts, spec = self.tracking.artifacts, read_spec(self.best_folder)
        draw_curves(artifacts, self.history, spec.epoch)
        draw_confusion(artifacts, self.confusions[spec.epoch - 1])
        net = load_network(self.best_folder, spec).to(device)
        pictures = self.album.draw_best(net, spec.epoch, self.words(spec.epoch))
        self.publish()
        names = [path.name for path in artifacts.glob("bundle*")]
        matrix = (f"{MATRIX}.json", f"{MATRIX}.png")
        self.tracking.log_files(*pictures, CURVES, *matrix, HISTORY, *names)

    @property
    def best_folder(self) -> Path:
        """The bundle of the best epoch so far."""
        return self._folder(self.ranking[0])

    def finish_progress(self) -> None:
        """Report that training is over, be it early."""
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

    def _log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
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
