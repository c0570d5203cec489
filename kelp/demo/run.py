"""`kelp demo`: the whole pipeline, small, on simulated coasts and one real scene, to a report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kelp.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    MetadataConfig,
    PredictConfig,
    SimulateConfig,
    SliceConfig,
    StatsConfig,
    TrainConfig,
)
from kelp.data_prep.metadata import build_metadata
from kelp.data_prep.slicing import slice_dataset
from kelp.data_prep.stats import compute_stats
from kelp.demo.coast import can_make_products, make_coast
from kelp.demo.page import Outcome, real_scene, write_report
from kelp.evaluation.scoring import evaluate
from kelp.io.files import output_folder, write_json
from kelp.products.submission import ARCHIVE, SIDE
from kelp.progress import Progress, silent
from kelp.simulation.layout import simulate

if TYPE_CHECKING:
    from kelp.nn.training.result import TrainResult

log = logging.getLogger("kelp")

# The sliced recipe with the packaged encoder, cut to what two cores do in some minutes.
_TILE: Final = 128
_BATCH: Final = 8


@dataclass(frozen=True)
class DemoResult:
    """What the demo left behind."""

    report: Path
    scores: Path
    pooled_dice: float | None
    """Of the test images, against the clean truth."""
    packaged_dice: float | None
    """The same of the network that comes with kelp."""
    seconds: float

    def summary(self) -> str:
        """Two lines for the terminal."""
        dice = _number(self.pooled_dice)
        return (
            f"pooled kelp Dice on unseen places: {dice} (simulated, against the clean truth; the "
            f"network that comes with kelp: {_number(self.packaged_dice)}); "
            f"{self.seconds:.0f} s\nopen {self.report}"
        )


class _Clock:
    """Seconds of each step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        log.info("demo: %s", name)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def demo(config: DemoConfig, progress: Progress = silent) -> DemoResult:
    """Simulate, prepare, train, predict, score and report, all under `output_dir`.

    Leaves `report.html`, `scores.json`, `submission.tar`, `mlruns/`, `networks/`, `data/`,
    `predictions/`, `comparison/` and `coast/`.
    """
    # Known in kelp by its commands only: the demo does what a user would do.
    from kelp.inference.predict import predict_scenes
    from kelp.nn.comparison.compare import compare
    from kelp.nn.training.fit import train

    root = output_folder(config.output_dir)
    raw, predictions = root / "data" / "raw", root / "predictions"
    clock = _Clock()
    with (
        clock.step("map a real scene with the network that comes with kelp"),
        resources.as_file(real_scene()) as scene,
    ):
        real = predict_scenes(
            PredictConfig(
                data_dir=scene,
                output_dir=predictions / "real",
                save_probabilities=True,
                overwrite=True,
            ),
            progress,
        )
    log.info("demo: the first map after %.1f s: %s", clock.total, real.masks[0])
    tables, stats = _prepare(config, raw, clock, progress)
    with clock.step("train on slices"):
        training = train(_sliced(config, tables.tiles, stats), progress)
    with clock.step("train a rival on whole images, with as many network pixels"):
        rival = train(_whole(config, tables.images, raw), progress)
    with clock.step("predict the test images in slices"):
        predict_scenes(
            _prediction(raw / "test" / "images", predictions / "test", training, config), progress
        )
    with clock.step("predict them with the network that comes with kelp"):
        predict_scenes(
            PredictConfig(
                data_dir=raw / "test" / "images",
                output_dir=predictions / "packaged",
                overwrite=True,
            ),
            progress,
        )
    with clock.step("score"):
        scores, packaged = (
            evaluate(
                EvaluateConfig(
                    gt_dir=raw / "test_truth",
                    preds_dir=predictions / name,
                    output_dir=predictions / name,
                ),
                progress,
            )
            for name in ("test", "packaged")
        )
    with clock.step("compare whole images with slices"):
        comparison = compare(
            CompareConfig(
                data_dir=raw / "test" / "images",
                gt_dir=raw / "test_truth",
                run_dir=_named(root / "networks", sliced=training, whole=rival),
                output_dir=root / "comparison",
                overlaps=(),
            ),
            progress,
        )
    coast = None
    if can_make_products():
        with clock.step("map a coast over three years: beds, areas, series, page"):
            coast = make_coast(
                root / "coast",
                training.run_dir,
                (raw / "test" / "images", raw / "test_truth"),
                config.seed,
                min(config.size, 256),
                progress,
            )
    else:
        log.info('demo: no coast; it needs pip install "kelp-slicer[geo,series]"')
    if config.size == SIDE:
        (predictions / "test" / ARCHIVE).replace(root / ARCHIVE)
    outcome = Outcome(config, training, scores, packaged, comparison, real, coast, clock.seconds)
    figures = _write_scores(root / "scores.json", outcome)
    report = write_report(root / "report.html", outcome, raw, predictions)
    config.record(root)
    return DemoResult(
        report,
        root / "scores.json",
        figures["pooled_dice"],
        figures["packaged_pooled_dice"],
        clock.total,
    )


class _Tables(NamedTuple):
    images: Path
    tiles: Path


def _prepare(
    config: DemoConfig, raw: Path, clock: _Clock, progress: Progress
) -> tuple[_Tables, Path]:
    """Simulated images and tiles; returns their tables and the statistics of the bands."""
    processed, sahi = raw.parent / "processed", raw.parent / "sahi"
    with clock.step("simulate coasts"):
        simulate(
            SimulateConfig(
                output_dir=raw,
                places=config.places,
                dates=config.dates,
                test=config.test,
                size=config.size,
                seed=config.seed,
            ),
            progress,
        )
    with clock.step("describe images, group places, make folds"):
        images = build_metadata(MetadataConfig(data_dir=raw, output_dir=processed), progress)
    with clock.step("band statistics"):
        stats = compute_stats(
            StatsConfig(
                data_dir=raw / "train", output_dir=processed, metadata_fp=images.table, cv_split=0
            ),
            progress,
        )
    with clock.step("slice"):
        tiles = slice_dataset(
            SliceConfig(
                data_dir=raw / "train", metadata_fp=images.table, output_dir=sahi, image_size=_TILE
            ),
            progress,
        )
    return _Tables(images.table, tiles.table), stats.path


def _sliced(config: DemoConfig, table: Path, stats: Path) -> TrainConfig:
    return _training(
        config, data_dir=table.parent, metadata_fp=table, dataset_stats_fp=stats, sahi=True
    )


def _whole(config: DemoConfig, table: Path, raw: Path) -> TrainConfig:
    """The same, shown whole images: fewer of them, for as many network pixels."""
    tile = _sliced(config, table, table).image_size
    rival = _training(config, data_dir=raw, metadata_fp=table, sahi=False)
    side = max(rival.image_size, -(-config.size // 32) * 32)  # larger images are padded to that
    samples = config.samples_per_epoch * tile**2 / side**2
    batches = max(1, round(samples / _BATCH))
    # That whole images find nothing at this budget would be a result, too.
    return rival.model_copy(update={"samples_per_epoch": batches * _BATCH, "min_dice": 0.0})


def _named(folder: Path, **runs: TrainResult) -> tuple[Path, ...]:
    """Links to runs, under names for people."""
    folder.mkdir(exist_ok=True)
    links = []
    for name, run in runs.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(run.run_dir, folder))
        links.append(link)
    return tuple(links)


def _training(config: DemoConfig, **data: Any) -> TrainConfig:
    return TrainConfig(
        **data,
        output_dir=config.output_dir / "mlruns",
        batch_size=_BATCH,
        num_workers=1,
        use_weighted_sampler=True,
        samples_per_epoch=config.samples_per_epoch,
        has_kelp_importance_factor=3,
        kelp_pixels_pct_importance_factor=0.2,
        qa_ok_importance_factor=0,
        qa_corrupted_pixels_pct_importance_factor=-1,
        almost_all_water_importance_factor=0.5,
        dem_nan_pixels_pct_importance_factor=0.25,
        dem_zero_pixels_pct_importance_factor=-1,
        encoder="tu-tf_efficientnet_lite0",
        lr=2e-3,
        lr_scheduler="onecycle",
        loss="combo",
        epochs=config.epochs,
        early_stopping_patience=config.epochs,
        min_dice=config.min_dice,
        seed=config.seed,
    )


def _prediction(
    scenes: Path, output: Path, training: TrainResult, config: DemoConfig
) -> PredictConfig:
    return PredictConfig(
        data_dir=scenes,
        output_dir=output,
        run_dir=(training.run_dir,),
        preview_submission=config.size == SIDE,
        overwrite=True,
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _write_scores(path: Path, outcome: Outcome) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "pooled_dice": outcome.scores.all_pixels.pooled_dice,
        "packaged_pooled_dice": outcome.packaged.all_pixels.pooled_dice,
        "seconds": round(sum(outcome.seconds.values()), 1),
        "seconds_by_step": {k: round(v, 1) for k, v in outcome.seconds.items()},
        "validation": outcome.training.scores,
        "test": outcome.scores.to_json(),
    }
    write_json(path, figures)
    return figures
