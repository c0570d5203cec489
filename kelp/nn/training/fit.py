"""`kelp train`: one training run, tracked, ending in a bundle."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kelp.config import TrainConfig
from kelp.config.choices import Precision
from kelp.errors import ConfigError, InputError, KelpError
from kelp.inference.bundle import load_bundle
from kelp.inference.guard import GuardLimits
from kelp.inference.spec import BundleSpec, NetworkSpec
from kelp.io.files import write_text
from kelp.nn.bundle import save_bundle
from kelp.nn.device import compile_network, resolve_device, resolve_precision, weights_dtype
from kelp.nn.model import KelpNet, start_from_share
from kelp.nn.preprocess import Preprocess
from kelp.nn.pretrained import load_pretrained
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
from kelp.nn.training.result import TrainResult, result_of
from kelp.nn.training.tracking import (
    ARTIFACTS,
    Part,
    Tracking,
    quiet_libraries,
    reopen_run,
    start_run,
)
from kelp.progress import Progress, silent
from kelp.raster.bands import OPTICAL
from kelp.raster.statistics import StatsFile

# Lightning takes seconds to import, and talks meanwhile: inside `quiet_libraries` only.
if TYPE_CHECKING:
    from kelp.nn.data.datamodule import FoldData
    from kelp.nn.data.reading import Reader
    from kelp.nn.training.checkpoint import BundleCheckpoint, SaveBundle
    from kelp.nn.training.history import EpochHistory
    from kelp.nn.training.processes import Processes

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class _Setup:
    """Everything that is known before the run is opened."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    precision: Precision
    data: FoldData
    statistics: Statistics | None
    """Known to the first process only, until they meet."""
    net: KelpNet
    checkpoint: Path | None
    """Where a resumed run starts from."""
    first_epoch: int
    """Epochs that it has done."""
    validates_every: int
    """Training batches between validations."""


def train(
    config: TrainConfig, progress: Progress = silent, part: Part | None = None
) -> TrainResult:
    """Train a network on a fold of a table of images or tiles.

    On a CPU the result follows from the configuration and the data alone. A run that was stopped
    is resumed with `resume_from`, and ends as if it had never been stopped.

    Args:
        config: the options.
        progress: gets the number of batches.
        part: what the run is part of (see `kelp.train_folds`, `kelp.sweep`).

    Raises:
        KelpError: the input cannot be used, or training diverged; see the message.
        Pruned: `part` ended the run.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The run can be resumed.
    """
    started = time.monotonic()
    with quiet_libraries():
        from kelp.nn.training.launch import launch
        from kelp.nn.training.processes import find_processes

        config = effective(config)
        device = resolve_device(config.device)
        processes = find_processes(config, device)
        if processes.must_launch:
            return launch(train, config, processes.world_size, progress, part)
        with _silent_unless(processes.is_first):
            setup = _prepare(config, processes, device, progress if processes.is_first else silent)
            if not processes.is_first:
                return _take_part(setup, started)
        tracking = _open(setup.config, part)
        try:
            with tracking:
                if part:
                    part.begin(tracking.run_id)
                epochs = _run(setup, tracking, progress, part)
        except KeyboardInterrupt:
            log.info("stopped; resume with --resume_from %s", tracking.run_dir)
            raise
    return result_of(epochs, tracking.run_dir, started)


@contextmanager
def _silent_unless(is_first: bool) -> Iterator[None]:
    """Of several processes only the first writes messages."""

    def passes(record: logging.LogRecord) -> bool:
        return is_first

    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)


def _prepare(
    config: TrainConfig, processes: Processes, device: torch.device, progress: Progress
) -> _Setup:
    """Check everything that can be checked, and build the network; what takes long comes last.

    Only the first process does what takes long: the network's weights and numbers are brought to
    the others when they meet.
    """
    from kelp.nn.data.anchoring import anchored
    from kelp.nn.data.datamodule import FoldData, read_fold, require_bands
    from kelp.nn.data.packing import pack

    precision = resolve_precision(config.precision, device)
    fold = read_fold(config)
    if processes.is_first:
        require_bands(fold, config)
    checkpoint, first_epoch = _resume_point(config)
    data = FoldData(fold, config, first_epoch, device.type == "cuda", processes.share)
    every = validation_interval(config, data.batches)
    spec = network_spec(config, data.shape)
    net = _build_network(spec, config, loads=processes.is_first and checkpoint is None)
    net.body.to(weights_dtype(precision))
    statistics = None
    if processes.is_first:
        statistics = run_statistics(config, fold.train_sources, progress)
        _normalise(net, statistics.file)
    sources = fold.train_sources + fold.val_sources
    data.reader = anchored(pack(sources, config, progress), sources, config, progress)
    return _Setup(
        config, processes, device, precision, data, statistics, net, checkpoint, first_epoch, every
    )


def _build_network(spec: NetworkSpec, config: TrainConfig, loads: bool) -> KelpNet:
    """The network with the weights that training begins with; a checkpoint brings its own."""
    torch.manual_seed(config.seed)
    net = KelpNet(spec)
    start_from_share(net)
    if config.pretrained and loads:  # a run stopped in its first epoch has no checkpoint
        load_pretrained(net, config.encoder_weights)
    return net


def _normalise(net: KelpNet, statistics: StatsFile) -> None:
    """Give the network the statistics that it normalises with."""
    channels = {name: statistics.channels[name] for name in net.spec.channels}
    net.spec = net.spec.model_copy(update={"statistics": channels})
    net.preprocess = Preprocess(net.spec)


def _resume_point(config: TrainConfig) -> tuple[Path | None, int]:
    """The checkpoint to resume from, if there is one, and the epochs done until then."""
    from kelp.nn.training.history import read_checkpoint

    if config.resume_from is None:
        return None, 0
    return read_checkpoint(run_folder(config.resume_from) / ARTIFACTS)


def _open(config: TrainConfig, part: Part | None) -> Tracking:
    if config.resume_from is None:
        return start_run(config, part)
    return reopen_run(run_folder(config.resume_from), config)


def _run(
    setup: _Setup, tracking: Tracking, progress: Progress, part: Part | None
) -> BundleCheckpoint:
    """Write down what the run is, then train, with the others where there are any."""
    from kelp.nn.training.checkpoint import BEST, BundleCheckpoint
    from kelp.nn.training.pictures import Album
    from kelp.nn.training.processes import broadcast, connection

    config = setup.config
    recorded = config.model_copy(update={"resume_from": None})
    assert setup.statistics is not None
    stats_file = setup.statistics.write(tracking.artifacts)
    recorded.record(tracking.run_dir)
    # Last: it makes the folder one that can be resumed, for which the statistics must be there.
    write_text(tracking.artifacts / CONFIG_FILE, recorded.to_yaml())
    tracking.log_files(CONFIG_FILE, STATS_FOLDER)

    album = Album(config, setup.data, tracking.artifacts)
    tracking.log_files(*album.draw_inputs(setup.net.spec))
    save = _saver(setup, recorded, stats_file)
    epochs = BundleCheckpoint(config, tracking, save, progress, album, part)
    with connection(setup.processes, tracking.run_dir):
        if setup.first_epoch < config.epochs:
            _fit(setup, epochs, tracking.run_dir)
        else:
            assert setup.checkpoint is not None
            epochs.restore(setup.checkpoint)
        epochs.finish_progress()
        epochs.finish(setup.device)
        broadcast(str(tracking.run_dir))
    if config.calibrate:
        _calibrate(tracking.artifacts / BEST, config, progress)
        tracking.log_files(BEST)
    return epochs


def _saver(setup: _Setup, recorded: TrainConfig, stats_file: Path) -> SaveBundle:
    """What writes the bundles of a run."""
    fold = setup.data.fold
    guard = _water_limits(setup.data.reader)

    def save(folder: Path, net: KelpNet, epoch: int, scores: Mapping[str, float]) -> None:
        spec = BundleSpec(
            **dict(setup.net.spec),
            scores=dict(scores),
            epoch=epoch,
            stats_file=stats_file.name,
            rows={"train": len(fold.train), "val": len(fold.val)},
            guard=guard,
            training=recorded.absolute().model_dump(mode="json"),
        )
        save_bundle(folder, net, spec, [stats_file])

    return save


def _water_limits(reader: Reader) -> GuardLimits | None:
    """What clear water was like in the scenes of the run; None where nobody looked."""
    from kelp.nn.data.anchoring import AnchoredReader

    if not isinstance(reader, AnchoredReader):
        return None
    scenes = {id(one.levels): one for one in reader.references.values() if not one.fallback}
    ends = np.array([one.extremes() for one in scenes.values()]).reshape(-1, 2, len(OPTICAL))
    found = GuardLimits().with_water(ends[:, 0], ends[:, 1])
    return found if found.water else None


def _calibrate(bundle: Path, config: TrainConfig, progress: Progress) -> None:
    """Fit what `kelp tune` fits, on the images of the fold; a bundle is one without it, too."""
    from kelp.nn.comparison.calibrate import CalibrationOptions, calibrate_run

    # The run's own table tells the sites, its own number format is the one of training.
    options = CalibrationOptions.of(config, metadata_fp=None, precision=None, batch_size=None)
    try:
        fitted = calibrate_run(load_bundle(bundle), options, progress)
    except (InputError, ConfigError) as error:
        log.warning("not calibrated: %s (later: kelp tune --run_dir %s)", error, bundle)
        return
    found = fitted.calibration
    log.info(
        "calibrated on %d held-out images of %d sites: threshold %g, temperature %g, expected "
        "calibration error %.2g",
        fitted.images,
        found.sites,
        found.kept,
        found.temperature[1],
        found.errors[1] or 0.0,
    )


def _take_part(setup: _Setup, started: float) -> TrainResult:
    """Train with the others, and write nothing; the run's folder is known in the end."""
    from kelp.nn.training.history import EpochHistory
    from kelp.nn.training.processes import broadcast, connection

    config = setup.config
    epochs = EpochHistory(config)
    if setup.first_epoch < config.epochs:
        with connection(setup.processes, None):
            _fit(setup, epochs, None)
            run_dir = Path(broadcast(""))
    else:
        assert setup.checkpoint is not None
        assert config.resume_from is not None
        epochs.restore(setup.checkpoint)
        run_dir = run_folder(config.resume_from)
    return result_of(epochs, run_dir, started, writes=False)


def _fit(setup: _Setup, epochs: EpochHistory, run_dir: Path | None) -> None:
    """Lightning's loop, without anything of its own on the screen or on the disk."""
    from lightning import Trainer

    from kelp.nn.training.processes import PlainSignals, has_idle_parameters
    from kelp.nn.training.task import KelpTask

    config, processes, device = setup.config, setup.processes, setup.device
    idle = processes.ddp and has_idle_parameters(setup.net)
    is_mixed = setup.precision.endswith("-mixed")
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=processes.local,
        num_nodes=processes.nodes,
        strategy=processes.strategy(device, idle),
        plugins=None if processes.ddp else processes.environment,
        use_distributed_sampler=False,  # the loaders bring this process's share
        # In `*-true` Lightning would also round the raw numbers; KelpNet rounds after them.
        precision=setup.precision if is_mixed else "32-true",
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        limit_train_batches=config.limit_train_batches,
        limit_val_batches=config.limit_val_batches,
        val_check_interval=setup.validates_every,
        num_sanity_val_steps=0,
        callbacks=[epochs, *([PlainSignals()] if processes.world_size > 1 else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        benchmark=device.type == "cuda",  # nearly all batches have one shape
    )
    task = KelpTask(setup.net, config)
    if config.compile:
        compile_network(setup.net.body, config.compile_mode, device)
    with _plain_errors(config):
        trainer.fit(task, setup.data, ckpt_path=setup.checkpoint, weights_only=True)


@contextmanager
def _plain_errors(config: TrainConfig) -> Iterator[None]:
    """What Lightning and torch make of Ctrl-C, SIGTERM and errors of workers, undone."""
    from kelp.nn.data.dataset import as_raised

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
        raise as_raised(error) from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, handler)
