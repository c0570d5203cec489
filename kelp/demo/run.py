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
from kelp.demo.coast import Coast, can_make_products, make_coast
from kelp.demo.page import Outcome, real_scene, write_report
from kelp.evaluation.scoring import Scores, evaluate
from kelp.io.files import output_folder, write_json
from kelp.products.submission import ARCHIVE, SIDE
from kelp.progress import Progress, silent
from kelp.simulation.layout import simulate

if TYPE_CHECKING:
    from kelp.inference.predict import PredictResult
    from kelp.nn.comparison.compare import CompareResult
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
    steps = _Steps(config, progress)
    real = steps.map_real_scene()
    tables, stats = steps.prepare()
    training, rival = steps.train(tables, stats)
    scores, packaged = steps.predict_and_score(training)
    comparison = steps.compare(training, rival)
    coast = steps.make_coast(training)
    root = steps.root
    if config.size == SIDE:
        (steps.predictions / "test" / ARCHIVE).replace(root / ARCHIVE)
    outcome = Outcome(
        config, training, scores, packaged, comparison, real, coast, steps.clock.seconds
    )
    figures = _write_scores(root / "scores.json", outcome)
    report = write_report(root / "report.html", outcome, steps.raw, steps.predictions)
    config.record(root)
    return DemoResult(
        report,
        root / "scores.json",
        figures["pooled_dice"],
        figures["packaged_pooled_dice"],
        steps.clock.total,
    )


class _Tables(NamedTuple):
    images: Path
    tiles: Path


class _Steps:
    """The commands of the demo, in the order in which a user would give them."""

    def __init__(self, config: DemoConfig, progress: Progress) -> None:
        # Where they are not installed it is said now, and not after the first steps.
        import kelp.nn.comparison.compare
        import kelp.nn.training.fit  # noqa: F401

        self._config, self._progress = config, progress
        self.root = output_folder(config.output_dir)
        self.raw, self.predictions = self.root / "data" / "raw", self.root / "predictions"
        self._test, self._truth = self.raw / "test" / "images", self.raw / "test_truth"
        self.clock = _Clock()

    def _predict(self, scenes: Path, name: str, **options: Any) -> PredictResult:
        # Known in kelp by its commands only: the demo does what a user would do.
        from kelp.inference.predict import predict_scenes

        output = self.predictions / name
        prediction = PredictConfig(data_dir=scenes, output_dir=output, overwrite=True, **options)
        return predict_scenes(prediction, self._progress)

    def map_real_scene(self) -> PredictResult:
        """The first map, by the network that comes with kelp."""
        words = "map a real scene with the network that comes with kelp"
        with self.clock.step(words), resources.as_file(real_scene()) as scene:
            real = self._predict(scene, "real", save_probabilities=True)
        log.info("demo: the first map after %.1f s: %s", self.clock.total, real.masks[0])
        return real

    def prepare(self) -> tuple[_Tables, Path]:
        """Simulated images and tiles; returns their tables and the statistics of the bands."""
        config, raw, clock, progress = self._config, self.raw, self.clock, self._progress
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
        train, table = raw / "train", images.table
        with clock.step("band statistics"):
            stats = compute_stats(
                StatsConfig(data_dir=train, metadata_fp=table, output_dir=processed, cv_split=0),
                progress,
            )
        with clock.step("slice"):
            tiles = slice_dataset(
                SliceConfig(data_dir=train, metadata_fp=table, output_dir=sahi, image_size=_TILE),
                progress,
            )
        return _Tables(table, tiles.table), stats.path

    def train(self, tables: _Tables, stats: Path) -> tuple[TrainResult, TrainResult]:
        """A network on slices, and its rival on whole images."""
        from kelp.nn.training.fit import train

        with self.clock.step("train on slices"):
            training = train(_sliced(self._config, tables.tiles, stats), self._progress)
        with self.clock.step("train a rival on whole images, with as many network pixels"):
            rival = train(_whole(self._config, tables.images, self.raw), self._progress)
        return training, rival

    def predict_and_score(self, training: TrainResult) -> tuple[Scores, Scores]:
        """The test images by the demo's network and by the one that comes with kelp."""
        with self.clock.step("predict the test images in slices"):
            self._predict(
                self._test,
                "test",
                run_dir=(training.run_dir,),
                preview_submission=self._config.size == SIDE,
            )
        with self.clock.step("predict them with the network that comes with kelp"):
            self._predict(self._test, "packaged")
        with self.clock.step("score"):
            return self._score("test"), self._score("packaged")

    def _score(self, name: str) -> Scores:
        maps = self.predictions / name
        evaluation = EvaluateConfig(gt_dir=self._truth, preds_dir=maps, output_dir=maps)
        return evaluate(evaluation, self._progress)

    def compare(self, training: TrainResult, rival: TrainResult) -> CompareResult:
        """Whether slicing pays."""
        from kelp.nn.comparison.compare import compare

        with self.clock.step("compare whole images with slices"):
            return compare(
                CompareConfig(
                    data_dir=self._test,
                    gt_dir=self._truth,
                    run_dir=_named(self.root / "networks", sliced=training, whole=rival),
                    output_dir=self.root / "comparison",
                    overlaps=(),
                ),
                self._progress,
            )

    def make_coast(self, training: TrainResult) -> Coast | None:
        """Maps of a coast and what is made of them; None without the extras that it takes."""
        if not can_make_products():
            log.info('demo: no coast; it needs pip install "kelp-slicer[geo,series]"')
            return None
        with self.clock.step("map a coast over three years: beds, areas, series, page"):
            return make_coast(
                self.root / "coast",
                training.run_dir,
                (self._test, self._truth),
                self._config.seed,
                min(self._config.size, 256),
                self._progress,
            )


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
