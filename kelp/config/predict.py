"""Options of the commands after training: predict, submit, preview, ensemble, evaluate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from kelp.config.base import Bytes, Config, Floats, Paths, option
from kelp.config.choices import MergeMode
from kelp.config.scenes import SceneOptions
from kelp.config.shared import (
    BandOrderOptions,
    CheckpointOptions,
    DeviceOptions,
    GridOptions,
    NetworkOptions,
    PixelSizeOptions,
    QaOptions,
    SchedulerOptions,
    SiteOptions,
    ThresholdOptions,
    TruthOptions,
    WorkerOptions,
)
from kelp.errors import ConfigError
from kelp.io.location import Location
from kelp.raster.window import Blend

_PREVIEWS_HELP = "Previews at most, in the order of names"


def _check_weights(weights: Floats) -> None:
    if weights and (min(weights) < 0 or sum(weights) == 0):
        raise ConfigError("--weights: none may be negative, and not all zero")


class PredictConfig(NetworkOptions, ThresholdOptions, SceneOptions, QaOptions, SchedulerOptions):
    """Masks (and probabilities) of a folder of scenes, or of one."""

    data_dir: Location = option(
        help="A scene: a raster, a Landsat folder or .tar, an HLS folder, a Sentinel-2 .SAFE, a "
        "STAC item; or a folder, a .txt list or a STAC catalogue of scenes; or the URL of one"
    )
    output_dir: Location = option(help="Folder for <name>_kelp.tif, or its URL")
    run_dir: Paths = option(
        (),
        help="Run folder, its artifacts/, a bundle, an .onnx file, or the name of a packaged "
        "network (kelp models); several, or the parent of --cv_split all: an ensemble; default: "
        "the packaged one",
    )
    weights: Floats = option(
        (), help="Weights of an ensemble's networks, in their order; default: equal", unit="factors"
    )
    dataset_stats_dir: Path | None = option(
        None, help="Folder of statistics files: checked against the bundle's numbers"
    )
    sahi_tile_size: int | None = option(
        None, help="Predict in slices of this side; default: as trained", unit="px", ge=8
    )
    sahi_overlap: int | None = option(
        None, help="Overlap of neighbouring tiles; default: half a tile", unit="px", ge=0
    )
    blend: Blend = option(
        "hann", help="Window of a tile's vote: Hann, or uniform, which leaves seams"
    )
    backend: Literal["auto", "torch", "onnx"] = option(
        "auto",
        help="What computes the network; auto: the faster one here (torch on GPUs and in bfloat16)",
    )
    tta: bool = option(False, help="Average the 8 symmetries of the square (8 times the cost)")
    tta_merge_mode: MergeMode = option("mean", help="How --tta merges probabilities")
    save_probabilities: bool = option(
        False, help="Also write <name>_kelp_prob.tif", aliases=("soft_labels",)
    )
    probability_dtype: Literal["float32", "uint8"] = option(
        "float32", help="Type of the saved probabilities; uint8: steps of 0.004, a quarter the size"
    )
    save_spread: bool = option(
        False,
        help="Also write <name>_kelp_spread.tif: standard deviation of the overlapping tiles' "
        "probabilities, each tile's own after symmetries and networks are averaged",
    )
    land: Literal["keep", "skip", "zero"] = option(
        "keep",
        help="skip: tiles that are all land (DEM > 0) are not run, their pixels are 0; zero: "
        "besides, every land pixel far from water is 0",
    )
    land_tolerance: int = option(
        3, help="--land: with water this near, land counts as water", unit="px", ge=0
    )
    exclude: Path | None = option(
        None, help="Polygons in which there is no kelp (0): eelgrass, ports, deep water"
    )
    max_memory: Bytes | None = option(
        None,
        help="Memory that a process may fill, as in 2GB; default: no limit",
        unit="bytes",
        gt=0,
    )
    threads: int | None = option(
        None,
        help="Threads of the network in a process; default: as many as torch takes, on a "
        "cluster as many as a worker has",
        unit="threads",
        ge=1,
    )
    overwrite: bool = option(False, help="Make finished outputs again")
    preview_submission: bool = option(
        False, help="Also write submission.tar and previews/ for the first images"
    )
    preview_first_n: int = option(10, help=_PREVIEWS_HELP, unit="images", ge=1)
    submission: bool = option(False, help="Also write submission.tar")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        _check_weights(self.weights)
        if (
            self.sahi_tile_size is not None
            and self.sahi_overlap is not None
            and self.sahi_overlap >= self.sahi_tile_size
        ):
            raise ConfigError(
                f"--sahi_overlap {self.sahi_overlap} px must be smaller than "
                f"--sahi_tile_size {self.sahi_tile_size} px"
            )
        return self


class VerifyConfig(CheckpointOptions, DeviceOptions, SceneOptions):
    """Are maps what their records say? Some tiles of each are predicted again."""

    predictions_dir: Path = option(
        help="Folder of <name>_kelp.tif maps with their records, or one map", aliases=("maps_dir",)
    )
    data_dir: Location | None = option(
        None,
        help="The scenes of the maps, as for kelp predict; default: those of the folder's "
        "kelp-predict.yaml",
    )
    run_dir: Paths = option(
        (),
        help="The networks that made the maps, as for kelp predict; default: the packaged ones of "
        "these names, or those of the folder's kelp-predict.yaml",
    )
    exclude: Path | None = option(
        None, help="Polygons without kelp, as for kelp predict; default: those of the maps"
    )
    backend: Literal["auto", "torch", "onnx"] = option("auto", help="As for kelp predict")
    tiles: int = option(10, help="Tiles of each map to predict again", unit="tiles", ge=1)
    seed: int = option(0, help="Which tiles", unit="integer", ge=0)


class ModelsConfig(Config):
    """The networks that come with kelp: sensors, scores and limits."""


class ExportConfig(CheckpointOptions):
    """The network of a bundle as one file for other programs."""

    run_dir: Path = option(help="Run folder, its artifacts/, or a bundle")
    output_path: Path | None = option(
        None, help="The file to write, FILE.onnx; default: network.onnx in the bundle"
    )


class SubmitConfig(Config):
    """The submission archive of a folder of masks."""

    predictions_dir: Path = option(help="Folder of <tile_id>_kelp.tif masks")
    output_dir: Path = option(help="Folder for submission.tar")


class PreviewConfig(BandOrderOptions, GridOptions):
    """Pictures of scenes and their predicted masks."""

    data_dir: Location = option(help="The scenes, as for kelp predict")
    predictions_dir: Path = option(help="Folder of their <name>_kelp.tif masks")
    output_dir: Path = option(help="Folder for the PNG files")
    first_n: int = option(10, help=_PREVIEWS_HELP, unit="images", ge=1)


class EnsembleConfig(SiteOptions, ThresholdOptions, TruthOptions):
    """The weighted mean of several prediction folders."""

    predictions_dirs: Paths = option(help="Prediction folders, comma-separated")
    output_dir: Path = option(help="Folder for the merged masks")
    weights: Floats = option((), help="Weights, one a folder; default: equal", unit="factors")
    gt_dir: Path | None = option(
        None,
        help="Fit weights and threshold: folder of true <tile_id>_kelp.tif masks of scenes that no "
        "network was trained on",
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.gt_dir and (self.weights or self.decision_threshold is not None):
            raise ConfigError(
                "--gt_dir fits weights and threshold; leave out --weights and --decision_threshold"
            )
        if self.metadata_fp and not self.gt_dir:
            raise ConfigError(
                "--metadata_fp says which scenes show the same site, for fitting: give --gt_dir too"
            )
        if not self.predictions_dirs:
            raise ConfigError("--predictions_dirs is missing; name at least one folder")
        if self.weights and len(self.weights) != len(self.predictions_dirs):
            raise ConfigError(
                f"--weights: {len(self.weights)} weights for {len(self.predictions_dirs)} folders"
            )
        _check_weights(self.weights)
        return self


class EvaluateConfig(SiteOptions, PixelSizeOptions, WorkerOptions, SchedulerOptions, TruthOptions):
    """Scores of a folder of masks against truth."""

    gt_dir: Path = option(help="Folder of true <tile_id>_kelp.tif masks")
    preds_dir: Path = option(help="Folder of predicted <tile_id>_kelp.tif masks")
    output_dir: Path | None = option(None, help="Folder for scores.json and scores.txt")


class DemoConfig(Config):
    """Everything, small, on simulated data and one real Landsat scene, ending in a report."""

    output_dir: Path = option(Path("demo"), help="Folder for report.html, scores.json and data")
    places: int = option(32, help="Simulated places to learn from", unit="places", ge=2)
    dates: int = option(3, help="Images of each place", unit="images", ge=1)
    test: int = option(16, help="Simulated test images", unit="images", ge=1)
    size: int = option(350, help="Side of a simulated image", unit="px", ge=64)
    epochs: int = option(5, help="Training epochs", unit="epochs", ge=1)
    samples_per_epoch: int = option(192, help="Tiles drawn in an epoch", unit="tiles", ge=1)
    min_dice: float = option(0.05, help="See kelp train", unit="fraction 0-1", ge=0, lt=1)
    seed: int = option(0, help="Seed of the simulation and the training", unit="integer", ge=0)
