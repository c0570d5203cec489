"""Options of every training on a fold, whatever is trained: kelp train, kelp baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kelp.config.base import Names, option
from kelp.config.shared import BandOrderOptions, IndexOptions, TableOptions, TruthOptions
from kelp.errors import ConfigError
from kelp.raster.bands import BANDS, parse_bands


def number(value: Any) -> Any:
    """Flags are text."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


FoldNumber = Annotated[int, Field(ge=0)]
Fold = Annotated[FoldNumber | Literal["all"], BeforeValidator(number)]


class FoldConfig(TableOptions, BandOrderOptions, IndexOptions, TruthOptions):
    """Which rows are trained on, which of their channels, and where the run is kept."""

    data_dir: Path = option(
        help="Folder of kelp slice (with --sahi) or of kelp metadata", resumable=True
    )
    output_dir: Path = option(
        help="Folder for mlflow.db and <experiment>/<run_id>/artifacts", resumable=True
    )
    dataset_stats_fp: Path | None = option(
        None,
        help="Statistics file of kelp stats; default: computed from the training rows",
        resumable=True,
    )
    cv_split: Fold = option(
        0, help="Number of the validation fold, or `all`: a run for each, one after the other"
    )
    sahi: bool = option(
        False, help="The table is one of tiles: train on slices and predict in slices"
    )
    num_workers: int = option(
        4,
        help="Processes that load data, no more than cores; 0 = the main one",
        unit="processes",
        ge=0,
        resumable=True,
    )
    bands: Names = option(BANDS, help=f"Bands, comma-separated, of {','.join(BANDS)}")
    experiment: str = option("kelp", help="Name of the MLflow experiment and its folder")

    @field_validator("bands")
    @classmethod
    def _known_bands(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return parse_bands(names)

    @model_validator(mode="after")
    def _fold_fits(self) -> Self:
        if not self.bands:
            raise ConfigError("--bands: name at least one band")
        if Path(self.experiment).name != self.experiment or self.experiment in ("", ".."):
            raise ConfigError(f"--experiment {self.experiment!r}: a plain name, without slashes")
        return self

    @property
    def fold(self) -> int:
        """The number of the validation fold, where it is one."""
        if self.cv_split == "all":
            raise ConfigError("--cv_split all: kelp.train trains one fold; use kelp.train_folds")
        return self.cv_split


class BaselineConfig(FoldConfig):
    """Boosted trees that classify each pixel on its own: what a network has to beat."""

    cv_split: FoldNumber = option(0, help="Number of the validation fold", unit="fold")
    sahi: bool = option(False, help="The table is one of tiles")
    pixels_per_image: int = option(
        2000,
        help="Pixels drawn from an image or tile at most, up to half of them kelp",
        unit="pixels",
        ge=2,
    )
    trees: int = option(300, help="Trees at most", unit="trees", ge=1)
    learning_rate: float = option(
        0.1, help="What each tree adds is multiplied by this", unit="factor", gt=0, le=1
    )
    leaves: int = option(31, help="Leaves of a tree at most", unit="leaves", ge=2, le=4096)
    early_stopping_rounds: int = option(
        30,
        help="Trees without a lower loss on the validation fold's sample before stopping; "
        "0: all trees",
        unit="trees",
        ge=0,
    )
    threads: int | None = option(
        None, help="Threads of LightGBM; default: as many as torch takes", unit="threads", ge=1
    )
    seed: int = option(42, help="Seed of the drawn pixels and the trees", unit="integer", ge=0)
