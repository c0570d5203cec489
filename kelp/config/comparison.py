"""Options of the commands that evaluate networks on labelled scenes: compare and tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator

from kelp.config.base import Integers, Paths, option, split
from kelp.config.choices import Interpolation
from kelp.config.shared import (
    BandOrderOptions,
    BootstrapOptions,
    NetworkOptions,
    PixelSizeOptions,
    QaOptions,
    ThresholdOptions,
    TruthOptions,
)
from kelp.errors import ConfigError

Interpolations = Annotated[tuple[Interpolation, ...], BeforeValidator(split)]


class LabelledConfig(NetworkOptions, BootstrapOptions, BandOrderOptions, QaOptions, TruthOptions):
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

    @model_validator(mode="after")
    def _scenes_have_masks(self) -> Self:
        if (self.data_dir is None) != (self.gt_dir is None):
            raise ConfigError(
                "--data_dir and --gt_dir belong together; give both, or neither for the images "
                "that the fold of the runs validates on"
            )
        return self


class CompareConfig(LabelledConfig, ThresholdOptions, PixelSizeOptions):
    """Should I slice? Variants of applying networks to labelled scenes, side by side."""

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
    largest_pass: int = option(
        2048,
        help="Largest side that a network is shown at once; variants that need more are left out",
        unit="px",
        ge=32,
    )


class TuneConfig(LabelledConfig):
    """Threshold and temperature of networks, fitted to labelled scenes, kept in their bundles."""

    temperature: bool = option(
        True, help="Also fit the temperature, which makes probabilities mean what they say"
    )
    store: bool = option(True, help="Write what was fitted into the bundles; False: only report")
