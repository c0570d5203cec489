"""Options of the commands that prepare data: metadata, stats, slice, split, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from kelp.config.base import SCHEDULER_HELP, WORKERS_HELP, Config, Names, option
from kelp.errors import ConfigError
from kelp.raster.bands import IndexInput

WorldName = Literal["calibrated", "specks", "murky"]


class MetadataConfig(Config):
    """Per-image facts, AOI groups and leak-free stratified folds of a data folder."""

    command: ClassVar[str] = "metadata"

    data_dir: Path = option(help="Folder that holds train/images, train/masks and test/images")
    output_dir: Path = option(help="Folder for train_val_test_dataset.parquet")
    metadata_fp: Path | None = option(
        None, help="The competition's metadata CSV; without it the folders decide"
    )
    similarity_threshold: float | None = option(
        None,
        help="DEM similarity above which two images show one place; default: the calibrated one",
        unit="0-1",
        gt=0,
        le=1,
    )
    splits: int = option(10, help="Number of folds", unit="folds", ge=2)
    keep_suspect_labels: bool = option(
        False, help="Keep images with over 40 % kelp (mostly mislabelled) in the folds"
    )
    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )
    workers: int = option(0, help=WORKERS_HELP, unit="processes", ge=0)
    scheduler: str | None = option(None, help=SCHEDULER_HELP)
    seed: int = option(42, help="Seed of the fold assignment", unit="integer", ge=0)


class StatsConfig(Config):
    """Statistics of every band and spectral index, for normalising."""

    command: ClassVar[str] = "stats"

    data_dir: Path = option(help="Folder that holds images/ (the training images)")
    output_dir: Path = option(help="Folder for the statistics file")
    metadata_fp: Path | None = option(
        None, help="Table of kelp metadata or kelp slice; needed for --cv_split"
    )
    cv_split: int | None = option(
        None, help="Use only this fold's training rows; default: all rows", unit="fold", ge=0
    )
    mask_using_qa: bool = option(True, help="Leave pixels with QA = 1 out of the indices")
    mask_using_water_mask: bool = option(True, help="Leave land (DEM > 0) out of the indices")
    fill_missing_pixels_with_torch_nan: bool = option(
        True, help="What training fills missing values with: the channel's minimum; False: 0"
    )
    spectral_indices: Names = option(
        ("all",), help="Spectral indices, comma-separated; `all`, or `none`"
    )
    index_input: IndexInput = option(
        "dn", help="Compute indices on raw integers (dn) or on clipped surface reflectance"
    )
    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )
    workers: int = option(0, help=WORKERS_HELP, unit="processes", ge=0)
    scheduler: str | None = option(None, help=SCHEDULER_HELP)


class IndicesConfig(Config):
    """The spectral indices that `kelp stats` and `kelp train` know, with formula and source."""

    command: ClassVar[str] = "indices"

    names: Names = option((), help="Only these, comma-separated; default: all")


class SliceConfig(Config):
    """A sliced dataset: small tiles of every training image, and their table."""

    command: ClassVar[str] = "slice"

    data_dir: Path = option(help="Folder that holds images/ and masks/")
    metadata_fp: Path = option(help="train_val_test_dataset.parquet of kelp metadata")
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
    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )
    workers: int = option(0, help=WORKERS_HELP, unit="processes", ge=0)
    scheduler: str | None = option(None, help=SCHEDULER_HELP)

    @model_validator(mode="after")
    def _stride_leaves_no_gap(self) -> Self:
        if self.stride is not None and self.stride > self.image_size:
            raise ConfigError(
                f"--stride {self.stride} px is larger than --image_size {self.image_size} px: "
                "pixels between tiles would be lost"
            )
        return self


class SplitConfig(Config):
    """A fold's validation images and masks as a folder."""

    command: ClassVar[str] = "split"

    data_dir: Path = option(help="Folder that holds train/images and train/masks")
    metadata_fp: Path = option(help="train_val_test_dataset.parquet of kelp metadata")
    output_dir: Path = option(help="Folder for images/ and masks/")
    cv_split: int = option(0, help="Number of the fold", unit="fold", ge=0)


class SimulateConfig(Config):
    """Simulated coastal scenes in competition layout, for tests, the demo and benchmarks."""

    command: ClassVar[str] = "simulate"

    output_dir: Path = option(help="Folder for train/, test/, test_truth/ and SIMULATED.md")
    places: int = option(40, help="Places in the training set", unit="places", ge=1)
    dates: int = option(3, help="Images of each training place", unit="images", ge=1)
    test: int = option(10, help="Test images, each of a place of its own", unit="images", ge=0)
    size: int = option(350, help="Side of an image", unit="px", ge=16)
    world: WorldName = option(
        "calibrated",
        help="Like published figures; many small dense patches (specks); or turbid, cloudy, "
        "with faint kelp and poorer labels (murky)",
    )
    workers: int = option(0, help=WORKERS_HELP, unit="processes", ge=0)
    scheduler: str | None = option(None, help=SCHEDULER_HELP)
    seed: int = option(0, help="Seed: the same seed gives the same bytes", unit="integer", ge=0)
