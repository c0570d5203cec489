"""What a run needs before its first step: settings, statistics, and the network's description."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kelp import __version__
from kelp.config import FoldConfig, TrainConfig
from kelp.data_prep.stats import Source as StatsSource
from kelp.data_prep.stats import file_statistics
from kelp.errors import ConfigError, InputError
from kelp.inference.spec import NetworkSpec
from kelp.io.files import write_bytes
from kelp.nn.data.dataset import Source
from kelp.nn.device import resolve_device
from kelp.nn.training.tracking import ARTIFACTS
from kelp.progress import Progress
from kelp.raster.indices import channel_names, parse_indices
from kelp.raster.statistics import About, StatsFile
from kelp.raster.streaming import unit_stats
from kelp.raster.window import Shape

log = logging.getLogger("kelp")

CONFIG_FILE: Final = "config.yaml"
STATS_FOLDER: Final = "stats"

_LARGER: Final = 2.75
"""Tiles at prediction beside those of training: more is seen around each pixel, for less cost."""
_DEV_BATCHES: Final = 2
_FEW_FILES: Final = 256  # below this, starting processes takes longer than reading

# Whose learning rates follow from the number of epochs.
_BY_LENGTH: Final = ("onecycle", "cosine")


@dataclass(frozen=True)
class Statistics:
    """The statistics of a run and the name under which they are kept."""

    file: StatsFile
    name: str
    given: Path | None
    """The user's file, which is copied as it is."""

    def write(self, artifacts: Path) -> Path:
        """Put the file into `artifacts/stats/`."""
        path = artifacts / STATS_FOLDER / self.name
        if self.given is None:
            self.file.save(path)
        elif self.given.resolve() != path.resolve():
            write_bytes(path, self.given.read_bytes())
        return path


def run_folder(resume_from: Path) -> Path:
    """The run folder that `--resume_from` means: itself, or the parent of its `artifacts/`."""
    folder = resume_from.resolve()
    folder = folder.parent if folder.name == ARTIFACTS else folder
    if not (folder / ARTIFACTS / CONFIG_FILE).is_file():
        raise InputError(
            f"--resume_from {resume_from}: no run folder (it lacks {ARTIFACTS}/{CONFIG_FILE})"
        )
    return folder


def effective(config: TrainConfig) -> TrainConfig:
    """The configuration that is run: `--fast_dev_run` shortens it, `--devices auto` is a number.

    Raises:
        ConfigError: `--resume_from` names a run with other settings.
    """
    if config.fast_dev_run:
        limits = {
            "epochs": 1,
            "limit_train_batches": _DEV_BATCHES,
            "limit_val_batches": _DEV_BATCHES,
            "val_check_interval": 1.0,
            "min_dice": 0.0,  # two batches find nothing
        }
        config = config.model_copy(update=limits)
    if config.limit_test_batches is not None:
        log.info("--limit_test_batches changes nothing: training has no test pass")
    if config.devices == "auto":  # a run is resumed with as many, on whatever machine
        from kelp.nn.training.processes import count_devices

        number = count_devices(config, resolve_device(config.device))
        config = config.model_copy(update={"devices": number})
    if config.resume_from is not None:
        _check_resumable(config, run_folder(config.resume_from) / ARTIFACTS / CONFIG_FILE)
    return config


def _check_resumable(config: TrainConfig, recorded: Path) -> None:
    free = TrainConfig.resumable()
    before = TrainConfig.load(recorded).model_dump(mode="json", exclude=free)
    now: dict[str, Any] = config.model_dump(mode="json", exclude=free)
    if config.lr_scheduler not in _BY_LENGTH and not config.swa:
        # More epochs change nothing in those already done.
        now["epochs"] = before["epochs"]
    for name, value in before.items():
        if now[name] != value:
            raise ConfigError(
                f"--{name} {now[name]}: the run to resume has {value}; "
                f"give its own settings with --config {recorded}"
            )


def validation_interval(config: TrainConfig, batches: int) -> int:
    """Training batches between validations, of the `batches` of an epoch.

    Raises:
        ConfigError: the last validation would not be at the end of the epoch, whose weights it is
            to rank.
    """
    every = max(1, round(batches * config.val_check_interval))
    if batches % every:
        raise ConfigError(
            f"--val_check_interval {config.val_check_interval:g}: {every} does not divide the "
            f"{batches} batches of an epoch; give --limit_train_batches {batches // every * every}"
        )
    return every


def run_statistics(config: FoldConfig, sources: Sequence[Source], progress: Progress) -> Statistics:
    """The statistics that normalise a run's input.

    Those of a resumed run, of `--dataset_stats_fp`, or of the fold's training rows.

    Raises:
        StatsError: the given file lacks a channel, or was made with other settings than the run.
    """
    channels = channel_names(config.bands, parse_indices(config.spectral_indices))
    settings = config.index_settings
    if isinstance(config, TrainConfig) and config.resume_from is not None:
        return _resumed_statistics(run_folder(config.resume_from), channels)
    given = config.dataset_stats_fp
    if given is not None:
        file = StatsFile.load(given, channels)
        file.check(channels, settings, given)
        if file.about.cv_split != config.fold:
            seen = "all rows" if file.about.cv_split is None else f"fold {file.about.cv_split}"
            log.info(
                "%s: made from %s, so it saw validation rows of fold %d; scores may flatter "
                "a little",
                given,
                seen,
                config.fold,
            )
        return Statistics(file, given.name, given)
    stats = file_statistics(
        [StatsSource(source.image, source.tile) for source in sources],
        channels,
        settings,
        band_order=config.band_order,
        workers=max(1, config.num_workers) if len(sources) >= _FEW_FILES else 1,
        progress=progress,
    )
    about = About(
        cv_split=config.fold,
        row_count=len(sources),
        **asdict(settings),
        fill_value="nan" if config.fill_missing_pixels_with_torch_nan else "0",
        version=__version__,
    )
    file = StatsFile(stats, about)
    return Statistics(file, file.name(datetime.now(UTC)), None)


def _resumed_statistics(run_dir: Path, channels: Sequence[str]) -> Statistics:
    kept = sorted((run_dir / ARTIFACTS / STATS_FOLDER).glob("[!.]*.json"))
    if not kept:
        raise InputError(f"{run_dir}: lacks {ARTIFACTS}/{STATS_FOLDER}/*.json; it cannot go on")
    return Statistics(StatsFile.load(kept[0], channels), kept[0].name, kept[0])


def network_spec(config: TrainConfig, tile_size: Shape) -> NetworkSpec:
    """The network that a configuration describes; its statistics are still to come."""
    indices = parse_indices(config.spectral_indices)
    channels = channel_names(config.bands, indices)
    return NetworkSpec(
        bands=config.bands,
        spectral_indices=indices,
        index_input=config.index_input,
        mask_using_qa=config.mask_using_qa,
        mask_using_water_mask=config.mask_using_water_mask,
        fill_missing_pixels_with_torch_nan=config.fill_missing_pixels_with_torch_nan,
        normalization_strategy=config.normalization_strategy,
        anchoring=config.anchoring,
        statistics=dict.fromkeys(channels, unit_stats(0, 0)),
        sahi=config.sahi,
        tile_size=tile_size,
        image_size=config.image_size,
        resize_strategy=config.resize_strategy,
        interpolation=config.interpolation,
        architecture=config.architecture,
        encoder=config.encoder,
        decoder_channels=config.decoder_channels,
        decoder_attention_type=config.decoder_attention_type,
        **_application(config, tile_size),
    )


def _application(config: TrainConfig, tile_size: Shape) -> dict[str, Any]:
    """How prediction cuts scenes by default; see docs/experiments.md for what it is worth."""
    if not config.sahi or config.resize_strategy == "pad":
        return {}
    return {
        "prediction_tile": round(max(tile_size) * _LARGER),
        "prediction_overlap": max(tile_size) // 2,
    }
