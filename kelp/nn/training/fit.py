"""`kelp train`: one training run, tracked, ending in a bundle."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kelp.config import TrainConfig
from kelp.config.choices import Precision
from kelp.errors import ConfigError, KelpError
from kelp.files import write_text
from kelp.nn.bundle import load_network, read_spec, save_bundle
from kelp.nn.device import resolve_device, resolve_precision, weights_dtype
from kelp.nn.model import KelpNet
from kelp.nn.preprocess import Preprocess
from kelp.nn.pretrained import load_pretrained
from kelp.nn.spec import BundleSpec, NetworkSpec
from kelp.nn.training.compiling import compile_network
from kelp.nn.training.plan import (
    CONFIG_FILE,
    STATS_FOLDER,
    Statistics,
    effective,
    network_spec,
    run_folder,
    run_statistics,
    validation_interval,
)
from kelp.nn.training.tracking import ARTIFACTS, Tracking, quiet_libraries, reopen_run, start_run
from kelp.progress import Progress, silent
from kelp.statsfile import StatsFile

# Lightning takes seconds to import, and talks meanwhile: inside `quiet_libraries` only.
if TYPE_CHECKING:
    from lightning import Trainer

    from kelp.nn.datamodule import FoldData
    from kelp.nn.training.epochs import EpochKeeper

log = logging.getLogger("kelp")


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

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"trained {self.epochs} epochs in {self.seconds:.0f} s; best: epoch {self.epoch}, "
            f"{self.metric} {self.score:.4f}; run folder {self.run_dir}"
        )


@dataclass(frozen=True)
class _Setup:
    """Everything that is known before the run is opened."""

    config: TrainConfig
    device: torch.device
    precision: Precision
    data: FoldData
    statistics: Statistics
    net: KelpNet
    checkpoint: Path | None
    """Where a resumed run goes on."""
    first_epoch: int
    """Epochs that it has done."""
    validates_every: int
    """Training batches between validations."""


def train(
    config: TrainConfig, progress: Progress = silent, parent: str | None = None,
    begin: Callable[[str], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Train a network on a fold of a table of images or tiles.

    On a CPU the result follows from the configuration and the data alone. A run that was stopped
    goes on with `resume_from`, and ends as if it had never been stopped.

    Args:
        config: the options.
        progress: told of batches.
        parent: id of the run that this one is part of (see `kelp.train_folds`).
        begin: told the id of the run when it is opened.

    Raises:
        KelpError: the input cannot be used, or training diverged; see the message.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The run can be resumed.
    """
    started = time.monotonic()
    with quiet_libraries():
        setup = _prepare(effective(config), progress)
        tracking = _open(setup.config, parent)
        try:
            if begin:
                begin(tracking.run_id)
            keeper = _run(setup, tracking, progress)
            bundle = _finish(setup, tracking, keeper)
        except KeyboardInterrupt:
            tracking.finish("KILLED")
            log.info("stopped; go on with --resume_from %s", tracking.run_dir)
            raise
        except BaseException:
            tracking.finish("FAILED")
            raise
        tracking.finish("FINISHED")
    best = keeper.ranking[0]
    scores = keeper.history[best - 1]
    return TrainResult(
        run_id=tracking.run_id,
        run_dir=tracking.run_dir,
        bundle=bundle,
        metric=config.monitor_metric,
        score=scores[config.monitor_metric],
        scores=scores,
        epoch=best,
        epochs=len(keeper.history),
        seconds=time.monotonic() - started,
    )


def _prepare(config: TrainConfig, progress: Progress) -> _Setup:
    """Check everything that can be checked, and build the network; what takes long comes last."""
    from kelp.nn.datamodule import FoldData, read_fold, require_bands

    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    fold = read_fold(config)
    require_bands(fold, config)
    checkpoint, first_epoch = _resume_point(config)
    data = FoldData(fold, config, first_epoch, pin=device.type == "cuda")
    every = validation_interval(config, data.batches)
    spec = network_spec(config, data.shape)
    net = _build_network(spec, config, resumed=checkpoint is not None)
    net.body.to(weights_dtype(precision))
    statistics = run_statistics(config, fold.train_sources, progress)
    _normalise(net, statistics.file)
    return _Setup(config, device, precision, data, statistics, net, checkpoint, first_epoch, every)


def _build_network(spec: NetworkSpec, config: TrainConfig, resumed: bool) -> KelpNet:
    """The network with the weights that training begins with; a checkpoint brings its own."""
    torch.manual_seed(config.seed)
    net = KelpNet(spec)
    if config.pretrained and not resumed:  # a run stopped in its first epoch has no checkpoint
        load_pretrained(net, config.encoder_weights)
    return net


def _normalise(net: KelpNet, statistics: StatsFile) -> None:
    """Give the network the statistics that it normalises with."""
    channels = {name: statistics.channels[name] for name in net.spec.channels}
    net.spec = net.spec.model_copy(update={"statistics": channels})
    net.preprocess = Preprocess(net.spec)


def _resume_point(config: TrainConfig) -> tuple[Path | None, int]:
    """The checkpoint to go on from, if there is one, and the epochs done until then."""
    from kelp.nn.training.epochs import read_checkpoint

    if config.resume_from is None:
        return None, 0
    return read_checkpoint(run_folder(config.resume_from) / ARTIFACTS)


def _open(config: TrainConfig, parent: str | None) -> Tracking:
    if config.resume_from is None:
        return start_run(config, parent)
    return reopen_run(run_folder(config.resume_from), config)


def _run(setup: _Setup, tracking: Tracking, progress: Progress) -> EpochKeeper:
    """Write down what the run is, then train."""
    from kelp.nn.training.epochs import EpochKeeper
    from kelp.nn.training.task import KelpTask

    config = setup.config
    recorded = config.model_copy(update={"resume_from": None})
    stats_file = setup.statistics.write(tracking.artifacts)
    recorded.record(tracking.run_dir)
    # Last: it makes the folder one that can be resumed, for which the statistics must be there.
    write_text(tracking.artifacts / CONFIG_FILE, recorded.to_yaml())
    tracking.log_files(CONFIG_FILE, STATS_FOLDER)

    def save(folder: Path, net: KelpNet, epoch: int, scores: Mapping[str, float]) -> None:
        spec = BundleSpec(
            **dict(setup.net.spec),
            scores=dict(scores),
            epoch=epoch,
            stats_file=stats_file.name,
            training=recorded.model_dump(mode="json"),
        )
        save_bundle(folder, net, spec, [stats_file])

    keeper = EpochKeeper(config, tracking, save, progress)
    trainer = _trainer(setup, keeper, tracking.run_dir)
    if setup.first_epoch < config.epochs:
        task = KelpTask(setup.net, config)
        if config.compile:
            compile_network(setup.net.body, config.compile_mode, setup.device)
        with _plain_errors(config):
            trainer.fit(task, setup.data, ckpt_path=setup.checkpoint, weights_only=True)
    elif setup.checkpoint is not None:
        keeper.restore(setup.checkpoint)
    keeper.finish_progress()
    return keeper


def _trainer(setup: _Setup, keeper: EpochKeeper, run_dir: Path) -> Trainer:
    """Lightning's loop, without anything of its own on the screen or on the disk."""
    from lightning import Trainer

    config = setup.config
    mixed = setup.precision.endswith("-mixed")
    return Trainer(
        accelerator="gpu" if setup.device.type == "cuda" else "cpu",
        devices=1,
        # In `*-true` Lightning would also round the raw numbers; KelpNet rounds after them.
        precision=setup.precision if mixed else "32-true",
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        limit_train_batches=config.limit_train_batches,
        limit_val_batches=config.limit_val_batches,
        val_check_interval=setup.validates_every,
        num_sanity_val_steps=0,
        callbacks=[keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        benchmark=setup.device.type == "cuda",  # nearly all batches have one shape
    )


@contextmanager
def _plain_errors(config: TrainConfig) -> Iterator[None]:
    """What Lightning and torch make of Ctrl-C, SIGTERM and errors of workers, undone."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:  # Lightning's answer to both signals
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch_size {config.batch_size}: the GPU's memory is too small for it; lower it, "
            "and raise --accumulate_grad_batches as much"
        ) from error
    except KelpError as error:
        # A worker's error arrives as the text of its traceback.
        last_line = str(error).strip().splitlines()[-1]
        message = last_line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        raise type(error)(message) from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, handler)


def _finish(setup: _Setup, tracking: Tracking, keeper: EpochKeeper) -> Path:
    """The pictures of the best epoch, and its bundle under its final name."""
    from kelp.nn.training.epochs import HISTORY
    from kelp.nn.training.pictures import MATRIX, SAMPLES, draw_confusion, draw_samples

    spec = read_spec(keeper.best_folder)
    draw_confusion(tracking.artifacts, keeper.confusions[spec.epoch - 1])
    net = load_network(keeper.best_folder, spec).to(setup.device)
    draw_samples(tracking.artifacts, setup.data.fold.val_sources, net, setup.config)
    bundle = keeper.publish()
    names = [path.name for path in tracking.artifacts.glob("bundle*")]
    tracking.log_files(SAMPLES, f"{MATRIX}.json", f"{MATRIX}.png", HISTORY, *names)
    return bundle
