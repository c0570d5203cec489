"""Options of the commands that prepare data: metadata, stats, slice, split, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from kelp.config.base import Config, Names, option
from kelp.config.shared import (
    BandOrderOptions,
    IndexOptions,
    OptionalTableOptions,
    SchedulerOptions,
    TableOptions,
    TruthOptions,
    WorkerOptions,
)
from kelp.errors import ConfigError
from kelp.io.location import Location

WorldName = Literal["calibrated", "specks", "murky", "varied"]


class MetadataConfig(BandOrderOptions, WorkerOptions, SchedulerOptions, TruthOptions):
    """Per-image facts, AOI groups and leak-free stratified folds of a data folder."""

    data_dir: Path = option(help="Folder that holds train/images, train/masks and test/images")
    output_dir: Path = option(help="Folder for train_val_test_dataset.parquet")
    metadata_fp: Path | None = option(
        None, help="The competition's metadata CSV; without it the folders decide"
    )
    similarity_threshold: float | None = option(
        None,
        help="DEM similarity above which two images show the same site; default: calibrated",
        unit="0-1",
        gt=0,
        le=1,
    )
    splits: int = option(10, help="Number of folds", unit="folds", ge=2)
    keep_suspect_labels: bool = option(
        False, help="Keep images with over 40 % kelp (mostly mislabelled) in the folds"
    )
    seed: int = option(42, help="Seed of the fold assignment", unit="integer", ge=0)


class StatsConfig(
    OptionalTableOptions, BandOrderOptions, IndexOptions, WorkerOptions, SchedulerOptions
):
    """Statistics of every band and spectral index, for normalising."""

    data_dir: Location = option(
        help="Folder that holds images/ (the training images); or scenes, as for kelp predict"
    )
    output_dir: Path = option(help="Folder for the statistics file")
    cv_split: int | None = option(
        None, help="Use only this fold's training rows; default: all rows", unit="fold", ge=0
    )
    spectral_indices: Names = option(
        ("all",), help="Spectral indices, comma-separated; `all`, or `none`"
    )


class IndicesConfig(Config):
    """The spectral indices that `kelp stats` and `kelp train` know, with formula and source."""

    names: Names = option((), help="Only these, comma-separated; default: all")


class SliceConfig(TableOptions, BandOrderOptions, WorkerOptions, SchedulerOptions, TruthOptions):
    """A sliced dataset: small tiles of every training image, and their table."""

    data_dir: Path = option(help="Folder that holds images/ and masks/")
    output_dir: Path = option(help="Folder for images/, masks/ and the table of tiles")
    image_size: int = option(128, help="Side of a tile", unit="px", ge=8)
    stride: int | None = option(
        None,
        help="Distance between tiles; default: image_size, so that they do not overlap",
        unit="px",
        ge=1,
    )
    materialize: bool = option(
        True, help="Write the tiles; False: only the table, training reads windows of the images"
    )
    min_valid_fraction: float = option(
        0.0,
        help="Leave out tiles of which a smaller share of pixels is observed",
        unit="fraction 0-1",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _stride_leaves_no_gap(self) -> Self:
        if self.stride is not None and self.stride > self.image_size:
            raise ConfigError(
                f"--stride {self.stride} px is larger than --image_size {self.image_size} px: "
                "pixels between tiles would be lost"
            )
        return self


class SplitConfig(TableOptions):
    """A fold's validation images and masks as a folder."""

    data_dir: Path = option(help="Folder that holds train/images and train/masks")
    output_dir: Path = option(help="Folder for images/ and masks/")
    cv_split: int = option(0, help="Number of the fold", unit="fold", ge=0)


class SimulateConfig(WorkerOptions):
    """Simulated coastal scenes in competition layout, for tests, the demo and benchmarks."""

    output_dir: Path = option(help="Folder for train/, test/, test_truth/ and SIMULATED.md")
    places: int = option(40, help="Places in the training set", unit="places", ge=1)
    dates: int = option(3, help="Images of each training place", unit="images", ge=1)
    test: int = option(10, help="Test images, each of a place of its own", unit="images", ge=0)
    size: int = option(350, help="Side of an image", unit="px", ge=16)
    world: WorldName = option(
        "calibrated",
        help="Like published figures; many small dense patches (specks); turbid, cloudy, with "
        "faint kelp and poorer labels (murky); or with all that disturbs real scenes (varied)",
    )
    seed: int = option(0, help="Seed: the same seed gives the same bytes", unit="integer", ge=0)
