"""Options of the commands that judge networks on labelled scenes: compare and tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from kelp.config.base import Config, Integers, Names, Paths, option, split
from kelp.config.choices import Interpolation, Precision
from kelp.config.predict import BATCH_HELP
from kelp.errors import ConfigError

Interpolations = Annotated[tuple[Interpolation, ...], BeforeValidator(split)]


class JudgingConfig(Config):
    """Networks, and labelled scenes that they were not trained on."""

    run_dir: Paths = option(
        help="Runs or bundles, comma-separated: trained whole, or on tiles; for kelp tune also the "
        "parent of --cv_split all"
    )
    output_dir: Path = option(help="Folder for report.html and the figures as JSON and text")
    data_dir: Path | None = option(
        None,
        help="Folder of labelled scenes that no bundle was trained on; default: the images "
        "that the fold of the runs validates on, which they must share",
    )
    gt_dir: Path | None = option(
        None, help="Folder of their true <tile_id>_kelp.tif masks, with --data_dir"
    )
    metadata_fp: Path | None = option(
        None,
        help="Table of kelp metadata: which scenes show one place; default: that of the "
        "fold; with --data_dir each scene is a place of its own",
    )
    use_checkpoint: Literal["best", "latest"] = option("best", help="Which bundle of a run")
    draws: int = option(2000, help="Bootstrap draws of places", unit="draws", ge=100)
    seed: int = option(0, help="Seed of the draws", unit="integer", ge=0)
    precision: Precision | None = option(
        None, help="Number format; default: bf16-mixed where the device has it, else 32-true"
    )
    batch_size: int | None = option(None, help=BATCH_HELP, unit="crops", ge=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where the network runs")
    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )
    qa_as_nodata: bool = option(True, help="Pixels with QA = 1 count as not observed")

    @model_validator(mode="after")
    def _scenes_have_masks(self) -> Self:
        if (self.data_dir is None) != (self.gt_dir is None):
            raise ConfigError(
                "--data_dir and --gt_dir belong together; give both, or neither for the images "
                "that the fold of the runs validates on"
            )
        return self


class CompareConfig(JudgingConfig):
    """Should I slice? Ways of applying networks to labelled scenes, side by side."""

    command: ClassVar[str] = "compare"

    labels_dir: Path | None = option(
        None, help="Folder of other, noisy <tile_id>_kelp.tif masks, for a second score beside"
    )
    sahi_tile_size: int | None = option(
        None, help="Side of a tile; default: as kelp predict cuts, else 128", unit="px", ge=1
    )
    overlaps: Integers = option((0,), help="Other overlaps than that of kelp predict", unit="px")
    tile_sizes: Integers = option(
        (), help="Other tiles, at the same scale, half overlap", unit="px"
    )
    interpolations: Interpolations = option((), help="Other interpolations of tiles")
    tta: bool = option(False, help="Also with the 8 symmetries of the square (8 times the cost)")
    decision_threshold: float | None = option(
        None,
        help="Kelp where p is at least this; default: fitted, for each place on others",
        unit="0-1",
        ge=0,
        le=1,
    )
    largest_pass: int = option(
        2048,
        help="Largest side that a network is shown at once; wider ways are left out",
        unit="px",
        ge=32,
    )
    pixel_size: float = option(
        30.0, help="Side of a pixel where a mask has no CRS, for areas", unit="m", gt=0
    )


class TuneConfig(JudgingConfig):
    """Threshold and temperature of networks, fitted to labelled scenes, kept in their bundles."""

    command: ClassVar[str] = "tune"

    temperature: bool = option(
        True, help="Also fit the temperature, which makes probabilities mean what they say"
    )
    store: bool = option(True, help="Write what was fitted into the bundles; False: only tell")
