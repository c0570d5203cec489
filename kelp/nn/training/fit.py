"""`kelp train`: one training run, tracked, ending in a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kelp.config import TrainConfig
from kelp.config.choices import Precision
from kelp.inference.spec import BundleSpec, NetworkSpec
from kelp.io.files import write_text
from kelp.nn.bundle import save_bundle
from kelp.nn.device import resolve_device, resolve_precision, weights_dtype
from kelp.nn.model import KelpNet, start_from_share
from kelp.nn.preprocess import Preprocess
from kelp.nn.pretrained import load_pretrained
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
from kelp.nn.training.result import TrainResult, result_of
from kelp.nn.training.tracking import (
    ARTIFACTS,
    Part,
    Pruned,
    Tracking,
    quiet_libraries,
    reopen_run,
    start_run,
)
from kelp.progress import Progress, silent
from kelp.raster.statistics import StatsFile

# Lightning takes seconds to import, and talks meanwhile: inside `quiet_libraries` only.
if TYPE_CHECKING:
    from kelp.nn.data.datamodule import FoldData
    from kelp.nn.training.epochs import EpochJudge
    from kelp.nn.training.keeping import EpochKeeper, SaveBundle
    from kelp.nn.training.team import Team

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class _Setup:
    """Everything that is known before the run is opened."""

    config: TrainConfig
    team: Team
    device: torch.device
    precision: Precision
    data: FoldData
    statistics: Statistics | None
    """Known to the first process only, until they meet."""
    net: KelpNet
    checkpoint: Path | None
    """Where a resumed run goes on."""
    first_epoch: int
    """Epochs that it has done."""
    validates_every: int
    """Training batches between validations."""


def train(
    config: TrainConfig, progress: Progress = silent, part: Part | None = None
) -> TrainResult:
    """Train a network on a fold of a table of images or tiles.

    On a CPU the result follows from the configuration and the data alone. A run that was stopped
    goes on with `resume_from`, and ends as if it had never been stopped.

    Args:
        config: the options.
        progress: told of batches.
        part: what the run is part of (see `kelp.train_folds`, `kelp.sweep`).

    Raises:
        KelpError: the input cannot be used, or training diverged; see the message.
        Pruned: `part` ended the run.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The run can be resumed.
    """
    started = time.monotonic()
    with quiet_libraries():
        from kelp.nn.training.team import form_team

        config = effective(config)
        device = resolve_device(config.device)
        team = form_team(config, device)
        with _silent_unless(team.leads):
            setup = _prepare(config, team, device, progress if team.leads else silent)
            if not team.leads:
                return _take_part(setup, started)
        tracking = _open(setup.config, part)
        try:
            if part:
                part.begin(tracking.run_id)
            keeper = _run(setup, tracking, progress, part)
        except KeyboardInterrupt:
            tracking.finish("KILLED")
            log.info("stopped; go on with --resume_from %s", tracking.run_dir)
            raise
        except Pruned as reason:
            tracking.prune(str(reason))
            raise
        except BaseException:
            tracking.finish("FAILED")
            raise
        tracking.finish("FINISHED")
    return result_of(keeper, tracking.run_dir, started)


def follow(
    config: TrainConfig, rank: int, count: int, port: int, ready: Callable[[], None]
) -> None:
    """Take part in a run that another process of this machine leads.

    Args:
        config: the options, as the first process runs them.
        rank: number of this process.
        count: processes of the run.
        port: where they meet.
        ready: called before they do.

    Raises:
        KelpError: as in `train`.
    """
    with quiet_libraries(track=False):
        from kelp.nn.training.team import Team, open_store

        team = Team(rank, count, ddp=True)
        setup = _prepare(config, team, resolve_device(config.device), silent)
        ready()
        team.store = open_store(count, port)
        _take_part(setup, time.monotonic())


@contextmanager
def _silent_unless(leads: bool) -> Iterator[None]:
    """Of several processes only the first speaks."""
    before = log.disabled
    log.disabled = before or not leads
    try:
        yield
    finally:
        log.disabled = before


def _prepare(config: TrainConfig, team: Team, device: torch.device, progress: Progress) -> _Setup:
    """Check everything that can be checked, and build the network; what takes long comes last.

    Only the first process does what takes long: the network's weights and numbers are brought to
    the others when they meet.
    """
    from kelp.nn.data.datamodule import FoldData, read_fold, require_bands
    from kelp.nn.data.packing import pack

    precision = resolve_precision(config.precision, device)
    fold = read_fold(config)
    if team.leads:
        require_bands(fold, config)
    checkpoint, first_epoch = _resume_point(config)
    data = FoldData(fold, config, first_epoch, device.type == "cuda", team.share)
    every = validation_interval(config, data.batches)
    spec = network_spec(config, data.shape)
    net = _build_network(spec, config, loads=team.leads and checkpoint is None)
    net.body.to(weights_dtype(precision))
    statistics = None
    if team.leads:
        statistics = run_statistics(config, fold.train_sources, progress)
        _normalise(net, statistics.file)
    data.reader = pack(fold.train_sources + fold.val_sources, config, progress)
    return _Setup(
        config, team, device, precision, data, statistics, net, checkpoint, first_epoch, every
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
    """The checkpoint to go on from, if there is one, and the epochs done until then."""
    from kelp.nn.training.epochs import read_checkpoint

    if config.resume_from is None:
        return None, 0
    return read_checkpoint(run_folder(config.resume_from) / ARTIFACTS)


def _open(config: TrainConfig, part: Part | None) -> Tracking:
    if config.resume_from is None:
        return start_run(config, part)
    return reopen_run(run_folder(config.resume_from), config)


def _run(setup: _Setup, tracking: Tracking, progress: Progress, part: Part | None) -> EpochKeeper:
    """Write down what the run is, then train, with the others where there are any."""
    from kelp.nn.training.helpers import together
    from kelp.nn.training.keeping import EpochKeeper
    from kelp.nn.training.pictures import Album

    config, team = setup.config, setup.team
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
    keeper = EpochKeeper(config, tracking, save, progress, album, part)
    if setup.first_epoch < config.epochs:
        with together(config, team, setup.device, tracking.run_dir):
            _fit(setup, keeper, tracking.run_dir)
            keeper.finish_progress()
            keeper.finish(setup.device)
            team.agree(str(tracking.run_dir))
    else:
        assert setup.checkpoint is not None
        keeper.restore(setup.checkpoint)
        keeper.finish_progress()
        keeper.finish(setup.device)
    return keeper


def _saver(setup: _Setup, recorded: TrainConfig, stats_file: Path) -> SaveBundle:
    """What writes the bundles of a run."""
    fold = setup.data.fold

    def save(folder: Path, net: KelpNet, epoch: int, scores: Mapping[str, float]) -> None:
        spec = BundleSpec(
            **dict(setup.net.spec),
            scores=dict(scores),
            epoch=epoch,
            stats_file=stats_file.name,
            rows={"train": len(fold.train), "val": len(fold.val)},
            training=recorded.model_dump(mode="json"),
        )
        save_bundle(folder, net, spec, [stats_file])

    return save


def _take_part(setup: _Setup, started: float) -> TrainResult:
    """Train with the others, and write nothing; the run's folder is known in the end."""
    from kelp.nn.training.epochs import EpochJudge
    from kelp.nn.training.helpers import together

    config = setup.config
    judge = EpochJudge(config)
    if setup.first_epoch < config.epochs:
        with together(config, setup.team, setup.device):
            _fit(setup, judge, None)
            run_dir = Path(setup.team.agree(""))
    else:
        assert setup.checkpoint is not None
        assert config.resume_from is not None
        judge.restore(setup.checkpoint)
        run_dir = run_folder(config.resume_from)
    return result_of(judge, run_dir, started, leads=False)


def _fit(setup: _Setup, judge: EpochJudge, run_dir: Path | None) -> None:
    from kelp.nn.training.loop import build_trainer, has_idle_parameters, plain_errors
    from kelp.nn.training.task import KelpTask

    config = setup.config
    trainer = build_trainer(
        config,
        setup.device,
        setup.precision,
        setup.team,
        judge,
        setup.validates_every,
        run_dir,
        has_idle_parameters(setup.net) if setup.team.ddp else False,
    )
    task = KelpTask(setup.net, config)
    if config.compile:
        compile_network(setup.net.body, config.compile_mode, setup.device)
    with plain_errors(config):
        trainer.fit(task, setup.data, ckpt_path=setup.checkpoint, weights_only=True)
