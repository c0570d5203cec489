"""Tables of images and tiles: their columns, their files, joins by key and never by order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kelp.errors import InputError, TableError
from kelp.io.files import RASTERS, atomic, input_folder, is_file
from kelp.io.location import Url
from kelp.sensors import scene_name

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SUFFIX: Final = "_satellite.tif"
MASK_SUFFIX: Final = "_kelp.tif"
PROBABILITY_SUFFIX: Final = "_kelp_prob.tif"
SPREAD_SUFFIX: Final = "_kelp_spread.tif"
WORKERS_FILE: Final = "kelp-workers.json"
"""Beside maps that a cluster made: what each worker did."""
IMAGES_TABLE: Final = "train_val_test_dataset.parquet"
TILES_TABLE: Final = "sahi_train_val_test_dataset.parquet"

TRAIN: Final = "train"
VAL: Final = "val"
TEST: Final = "test"
LEFT_OUT: Final = "left_out"
"""In a fold's column: a training image with a suspect label, neither trained nor validated on."""

FACTS: Final = (
    "kelp_pixels",
    "kelp_pixels_pct",
    "has_kelp",
    "qa_corrupted_pixels_pct",
    "qa_ok",
    "dem_nan_pixels_pct",
    "dem_zero_pixels_pct",
    "water_pixels_pct",
    "almost_all_water",
    "valid_pixels_pct",
    "high_kelp_pixels_pct",
)
"""Columns that describe an image, or a tile of its own (not its parent)."""

WATER: Final = ("water_swir", "water_nir", "water_r", "water_g", "water_b")
"""Columns of a table of tiles: DN of clear water around each, as the whole image tells it."""

TILE_KEY: Final = ("tile_id", "x", "y")
"""Key of a row of a table of tiles; `x` and `y` are the column and row offset in pixels."""


def output_name(path: Path | Url, suffix: str = MASK_SUFFIX) -> str:
    """Name of the product of a scene: X_satellite.tif gives X_kelp.tif, name.tif name_kelp.tif."""
    return scene_name(path) + suffix


def tile_id_of(path: Path) -> str:
    """The competition's name of a scene or mask file."""
    for suffix in (IMAGE_SUFFIX, PROBABILITY_SUFFIX, SPREAD_SUFFIX, MASK_SUFFIX):
        if stem := _without(path.name, suffix):
            return stem
    return path.stem


def _without(name: str, suffix: str) -> str:
    """What stands before the suffix, in any case, also of `.tiff`; '' where it is not there."""
    for ending in (suffix, f"{suffix}f"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return ""


def masks_in(folder: Path) -> dict[str, Path]:
    """Masks of a folder by tile id, whatever the case of their suffix.

    Raises:
        InputError: there is no such folder, or it holds none.
    """
    if found := products_in(folder, MASK_SUFFIX):
        return found
    raise InputError(f"{folder}: the folder holds no *{MASK_SUFFIX} file")


def products_in(folder: Path, suffix: str) -> dict[str, Path]:
    """Masks, or other products, as `masks_in`; there may be none."""
    files = input_folder(folder)
    return {tile_id_of(path): path for path in files if _without(path.name, suffix)}


def scenes_in(folder: Path) -> dict[str, Path]:
    """GeoTIFFs and VRTs of a folder that are no products of kelp, by tile id."""
    products = (MASK_SUFFIX, PROBABILITY_SUFFIX, SPREAD_SUFFIX)
    return {
        tile_id_of(path): path
        for path in input_folder(folder)
        if path.name.lower().endswith(RASTERS)
        and not any(_without(path.name, suffix) for suffix in products)
    }


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a parquet (or CSV) table that must hold `columns`. Raises `TableError`."""
    import pandas as pd  # the names of files alone, which prediction needs, start without it

    if not is_file(path):
        raise TableError(f"{path}: no such table; make it with kelp metadata or kelp slice")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else _read_parquet(path, columns)
    except TableError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TableError(f"{path}: not a readable table ({reason}); make it again") from error
    absent = [name for name in columns if name not in table.columns]
    if absent:
        raise TableError(f"{path}: the table lacks the column {', '.join(absent)}")
    if table.empty:
        raise TableError(f"{path}: the table has no rows")
    if "tile_id" in columns and table["tile_id"].isna().any():
        raise TableError(f"{path}: a row has no tile_id")
    return table


def _read_parquet(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table by its columns alone: what pandas noted about it may be damaged and is not needed."""
    from pyarrow import parquet, types

    table = parquet.read_table(path, partitioning=None)
    table.validate(full=True)  # else a text that is not UTF-8 shows where it is used, if at all
    for name in set(columns) & set(table.column_names):
        kind = table.schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
            raise TableError(f"{path}: the column {name} holds {kind}, not text or numbers")
    frame: pd.DataFrame = table.replace_schema_metadata(None).to_pandas()
    return frame


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as parquet, atomically."""
    with atomic(path) as partial:
        table.to_parquet(partial, index=False)


def fold_column(table: pd.DataFrame, fold: int, path: Path) -> str:
    """Name of the column of a fold. Raises `TableError` when the table has no such fold."""
    name = f"split_{fold}"
    if name not in table.columns:
        folds = count_folds(table, path)
        raise TableError(f"{path}: has no fold {fold}; --cv_split lies between 0 and {folds - 1}")
    return name


def count_folds(table: pd.DataFrame, path: Path) -> int:
    """Number of folds of a table, at least 1. Raises `TableError` where it has none."""
    folds = sum(str(column).startswith("split_") for column in table.columns)
    if not folds:
        raise TableError(f"{path}: the table has no folds; make it with kelp metadata")
    return folds


def require_files(paths: Sequence[Path], table: Path) -> None:
    """Raise `TableError` naming (the first of) the files that a table needs and that are absent."""
    absent = [path for path in paths if not is_file(path)]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise TableError(
            f"{absent[0]}{more}: no such file, but {table} has a row for it; check --data_dir, or "
            "make the table of the files that there are"
        )
