"""`kelp baseline`: boosted trees on single pixels, as a run and a bundle like those of networks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kelp.config import BaselineConfig
from kelp.errors import TableError
from kelp.evaluation.confusion import Confusion
from kelp.inference.backends.trees import PixelTrees, lightgbm
from kelp.inference.spec import TREES, BundleSpec, NetworkSpec
from kelp.io.files import write_bytes, write_json
from kelp.nn.bundle import save_bundle
from kelp.nn.metrics import KelpScores, monitored
from kelp.nn.preprocess import Preprocess
from kelp.nn.training.pictures import MATRIX, draw_confusion, write_confusion
from kelp.nn.training.pixels import PixelSample, sample_pixels, samples_of
from kelp.nn.training.plan import STATS_FOLDER, Statistics, run_statistics
from kelp.nn.training.tracking import Tracking, quiet_libraries, start_run
from kelp.plotting.charts import bars
from kelp.progress import Progress, silent
from kelp.raster.indices import channel_names, parse_indices
from kelp.raster.statistics import StatsFile
from kelp.raster.window import Shape

if TYPE_CHECKING:
    from kelp.nn.data.datamodule import Fold

log = logging.getLogger("kelp")

BUNDLE: Final = "bundle"
IMPORTANCES: Final = "feature_importances"
_TRAIN, _VAL = 0, 1  # streams of random numbers
_TOLD_OF: Final = 10  # trees between points of the curves


@dataclass(frozen=True)
class BaselineResult:
    """A finished run of `kelp baseline`."""

    run_id: str
    """MLflow's id of the run."""
    run_dir: Path
    """`<output_dir>/<experiment>/<run_id>`: what `kelp predict --run_dir` takes."""
    bundle: Path
    """The trees."""
    scores: dict[str, float]
    """Of all observed pixels of the validation fold; kelp where p >= 0.5."""
    trees: int
    """Trees that are kept."""
    pixels: int
    """Pixels that they were trained on."""
    images: int
    """Images or tiles that these were drawn from."""
    importances: dict[str, float]
    """Share of the gain of all splits, by channel."""
    seconds: float
    """Wall time."""

    def summary(self) -> str:
        """The scores and where the run is, for the terminal."""
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        return (
            f"trained {self.trees} trees on {self.pixels:,} pixels of {self.images:,} images in "
            f"{self.seconds:.0f} s\n{scores}\nrun folder {self.run_dir}"
        )


def train_baseline(config: BaselineConfig, progress: Progress = silent) -> BaselineResult:
    """Train boosted trees on single pixels of a fold of a table of images or tiles.

    Images are read one after the other and only drawn pixels are kept, at most
    `pixels_per_image` of each: about 4 bytes a pixel and channel, and 2 more while trees grow.
    The result follows from the configuration and the data alone.

    Args:
        config: the options.
        progress: gets the number of images and trees.

    Raises:
        KelpError: the input cannot be used, or LightGBM is missing; see the message.
        KeyboardInterrupt: Ctrl-C.
    """
    started = time.monotonic()
    lightgbm()  # before hours of reading, not after
    with quiet_libraries():
        from kelp.nn.data.datamodule import read_fold, require_bands, training_shape

        fold = read_fold(config)
        require_bands(fold, config)
        statistics = run_statistics(config, fold.train_sources, progress)
        spec = trees_spec(config, training_shape(fold, config), statistics.file)
        setup = _Setup(config, fold, statistics, spec)
        with start_run(config) as tracking:
            return _run(setup, tracking, progress, started)


def trees_spec(config: BaselineConfig, tile_size: Shape, statistics: StatsFile) -> NetworkSpec:
    """The trees that a configuration describes.

    Args:
        config: the options.
        tile_size: what prediction cuts scenes into, side by side.
        statistics: fill missing values and scale the others.
    """
    indices = parse_indices(config.spectral_indices)
    channels = channel_names(config.bands, indices)
    return NetworkSpec(
        bands=config.bands,
        spectral_indices=indices,
        index_input=config.index_input,
        mask_using_qa=config.mask_using_qa,
        mask_using_water_mask=config.mask_using_water_mask,
        fill_missing_pixels_with_torch_nan=config.fill_missing_pixels_with_torch_nan,
        normalization_strategy="quantile",
        statistics={name: statistics.channels[name] for name in channels},
        sahi=config.sahi,
        tile_size=tile_size,
        prediction_overlap=0,
        image_size=max(tile_size),
        resize_strategy="pad",
        interpolation="nearest",
        architecture=TREES,
        encoder="none",
        decoder_channels=(),
        decoder_attention_type="none",
        temperature=1.0,
    )


@dataclass(frozen=True)
class _Setup:
    """Everything that is known before the run is opened."""

    config: BaselineConfig
    fold: Fold
    statistics: Statistics
    spec: NetworkSpec


def _run(setup: _Setup, tracking: Tracking, progress: Progress, started: float) -> BaselineResult:
    """Draw, grow and score; the bundle is written last."""
    config, fold, artifacts = setup.config, setup.fold, tracking.artifacts
    stats_file = setup.statistics.write(artifacts)
    config.record(tracking.run_dir)
    drawn, judged_by = _draw(setup, progress)
    grown = grow(drawn, judged_by, setup.spec.channels, config, progress)
    _log_curves(tracking, grown.losses)
    if grown.trees == config.trees and config.early_stopping_rounds:
        log.info("the loss was still falling at the last tree; more --trees may do better")
    net = PixelTrees(grown.text, setup.spec, "the new model")
    confusion, loss = score(net, fold, config, progress)
    scores = {"val/loss": loss} | {f"val/{k}": value for k, value in monitored(confusion).items()}
    tracking.log_point(grown.trees, scores)
    write_confusion(artifacts, confusion)
    draw_confusion(artifacts, confusion)
    importances = draw_importances(artifacts, grown.gains)
    described = BundleSpec(
        **dict(setup.spec),
        scores=scores,
        epoch=grown.trees,
        stats_file=stats_file.name,
        rows={"train": len(fold.train), "val": len(fold.val)},
        training=config.absolute().model_dump(mode="json"),
    )
    bundle = save_bundle(artifacts / BUNDLE, net, described, [stats_file])
    pictures = [f"{name}.{kind}" for name in (MATRIX, IMPORTANCES) for kind in ("json", "png")]
    tracking.log_files(STATS_FOLDER, *pictures, BUNDLE)
    return BaselineResult(
        run_id=tracking.run_id,
        run_dir=tracking.run_dir,
        bundle=bundle,
        scores=scores,
        trees=grown.trees,
        pixels=len(drawn),
        images=len(fold.train_sources),
        importances=importances,
        seconds=time.monotonic() - started,
    )


def _draw(setup: _Setup, progress: Progress) -> tuple[PixelSample, PixelSample]:
    """Pixels to train on, and those that tell when to stop."""
    config, fold, preprocess = setup.config, setup.fold, Preprocess(setup.spec)
    drawn = sample_pixels(fold.train_sources, preprocess, config, _TRAIN, progress)
    if not 0 < np.count_nonzero(drawn.kelp) < len(drawn):
        what = "pixels without kelp" if drawn.kelp.any() else "kelp"
        raise TableError(
            f"{config.metadata_fp}: no observed {what} in the training rows of fold "
            f"{config.fold}; try another fold"
        )
    judged_by = sample_pixels(fold.val_sources, preprocess, config, _VAL, progress)
    if not len(judged_by):
        raise TableError(
            f"{config.metadata_fp}: no observed pixels in the validation rows of fold "
            f"{config.fold}; try another fold"
        )
    return drawn, judged_by


def _log_curves(tracking: Tracking, losses: Mapping[str, Sequence[float]]) -> None:
    """The loss on drawn pixels by trees; like what networks log within an epoch."""
    length = len(losses["train"])
    for number in sorted({*range(0, length, _TOLD_OF), length - 1}):
        point = {f"{part}/loss_step": values[number] for part, values in losses.items()}
        tracking.log_point(number + 1, point)


def score(
    net: PixelTrees, fold: Fold, config: BaselineConfig, progress: Progress
) -> tuple[Confusion, float]:
    """Counts and mean log loss of all observed pixels of the validation fold."""
    scores, total, pixels = KelpScores(), 0.0, 0
    for number, sample in enumerate(samples_of(fold.val_sources, config), 1):
        p = torch.from_numpy(net.probabilities(sample.raw[None].numpy())[0, 0])
        scores.update(p, sample.target, sample.observed)
        right = torch.where(sample.target == 1, p, 1 - p)[sample.observed].double()
        total -= float(right.clamp(min=1e-7).log().sum())
        pixels += len(right)
        progress("scoring", number, len(fold.val_sources))
    return scores.confusion(), total / max(pixels, 1)


def draw_importances(folder: Path, gains: Mapping[str, float]) -> dict[str, float]:
    """Write `feature_importances.json` and `.png`; give the shares, the largest first.

    Args:
        folder: where to.
        gains: of each channel: by how much its splits lowered the training loss.
    """
    total = sum(gains.values()) or 1.0
    ordered = dict(sorted(gains.items(), key=lambda item: -item[1]))
    rows = {name: {"gain": gain, "share": gain / total} for name, gain in ordered.items()}
    write_json(folder / f"{IMPORTANCES}.json", rows)
    shares = {name: row["share"] for name, row in rows.items()}
    png = bars(shares, "Importance of the channels", "share of the gain of all splits")
    write_bytes(folder / f"{IMPORTANCES}.png", png)
    return shares


@dataclass(frozen=True)
class Grown:
    """Trees, and how they came about."""

    text: str
    """LightGBM's text of the best of them."""
    trees: int
    """How many these are."""
    gains: dict[str, float]
    """Of each channel: by how much its splits lowered the training loss."""
    losses: dict[str, list[float]]
    """After each tree that was grown: mean log loss of the drawn pixels, by `train` and `val`."""


def grow(
    training: PixelSample,
    validation: PixelSample,
    channels: Sequence[str],
    config: BaselineConfig,
    progress: Progress,
) -> Grown:
    """Grow trees until the loss on the validation pixels has not fallen for some time.

    Args:
        training: pixels to learn from.
        validation: pixels of the validation fold.
        channels: names of the features.
        config: the options.
        progress: gets the number of trees.
    """
    library, settings = lightgbm(), _settings(config)
    data = _dataset(library, training, channels, settings)
    losses: dict[str, dict[str, list[float]]] = {}
    callbacks: list[Callable[..., None]] = [
        library.record_evaluation(losses),
        # The end is told later: fewer trees may do.
        lambda env: progress("growing trees", min(env.iteration, config.trees - 1), config.trees),
    ]
    if config.early_stopping_rounds:
        callbacks.append(library.early_stopping(config.early_stopping_rounds, verbose=False))
    booster = library.train(
        settings,
        data,
        config.trees,
        valid_sets=[data, _dataset(library, validation, channels, settings, data)],
        valid_names=["train", "val"],
        callbacks=callbacks,
    )
    progress("growing trees", config.trees, config.trees)
    best = booster.best_iteration if config.early_stopping_rounds else booster.num_trees()
    gains = booster.feature_importance("gain", iteration=best)
    return Grown(
        text=booster.model_to_string(num_iteration=best),
        trees=best,
        gains=dict(zip(channels, map(float, gains), strict=True)),
        losses={part: by_metric["binary_logloss"] for part, by_metric in losses.items()},
    )


def _settings(config: BaselineConfig) -> dict[str, Any]:
    return {
        "objective": "binary",
        "metric": "binary_logloss",
        "learning_rate": config.learning_rate,
        "num_leaves": config.leaves,
        # Kelp is rare, so the curvature of the loss is tiny: whole steps would go far beyond its
        # least value, and the first tree would be the best.
        "max_delta_step": 1.0,
        "seed": config.seed,
        "deterministic": True,
        "force_row_wise": True,  # by default the faster way is found by trying both
        "num_threads": config.threads or torch.get_num_threads(),
        "verbosity": -1,
    }


def _dataset(
    library: Any,
    sample: PixelSample,
    channels: Sequence[str],
    settings: Mapping[str, Any],
    reference: Any = None,
) -> Any:
    """Pixels as LightGBM takes them; weights of mean 1, as its limits on leaves expect."""
    return library.Dataset(
        sample.features,
        sample.kelp.astype(np.float32),
        weight=sample.weights / sample.weights.mean(),
        feature_name=list(channels),
        reference=reference,
        params=dict(settings),
    )
