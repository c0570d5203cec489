"""`kelp metadata`: the table of images, with their facts, places and leak-free folds.

One row for each image, sorted by `tile_id`; `tables.FACTS`, and

- `original_split`: `train` or `test`;
- `aoi_id`: the place, numbered from 0, over training and test images together; `aoi_by_dem` is
  False where the DEM could not place the image, which is then a place of its own;
- `split_0` … : `val` where the fold validates on the image, else `train`; `test` for test images,
  `left_out` for training images with a suspect label;
- `image_path`, `mask_path`: relative to `data_dir`, with forward slashes; null without a mask.
  Facts about kelp are null there, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pandas as pd

from kelp import tables
from kelp.data_prep import folds, sites
from kelp.data_prep.facts import Fact, facts
from kelp.errors import InputError, TableError
from kelp.io.executors import gather, spread
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.files import input_folder, output_folder
from kelp.progress import Progress, silent
from kelp.raster.bands import DEM
from kelp.raster.georeference import require_same_grid
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import read_mask
from kelp.raster.scene import Scene
from kelp.tables import (
    FACTS,
    IMAGE_SUFFIX,
    IMAGES_TABLE,
    LEFT_OUT,
    MASK_SUFFIX,
    TEST,
    TRAIN,
    VAL,
)

if TYPE_CHECKING:
    from kelp.config import MetadataConfig

_NULLABLE: Final = {
    "kelp_pixels": "Int64",
    "has_kelp": "boolean",
    "high_kelp_pixels_pct": "boolean",
}
"""Types of facts that test images lack, and that plain numpy columns could not lack."""

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class MetadataResult:
    """What `build_metadata` made.

    Attributes:
        table: the table of images.
        train: number of training images.
        test: number of test images.
        places: number of places.
        folds: number of folds.
        left_out: training images with suspect labels, in no fold.
    """

    table: Path
    train: int
    test: int
    places: int
    folds: int
    left_out: int

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.train} training and {self.test} test images of {self.places} places "
            f"in {self.folds} folds: {self.table}"
        )


class _Source(NamedTuple):
    """The files of one image."""

    tile_id: str
    split: str
    image: Path
    mask: Path | None

    def __str__(self) -> str:
        return str(self.image)


class _Surveyed(NamedTuple):
    """What is known of one image after it was read."""

    facts: dict[str, Fact]
    terrain: sites.Terrain


def build_metadata(config: MetadataConfig, progress: Progress = silent) -> MetadataResult:
    """Survey a data folder, group its images by place, and write the table of images.

    Law: no place has training images in two folds. The table does not depend on the number of
    workers. Images that fail are left out of it, and named when it is written.

    Raises:
        InputError: missing or empty folders, unreadable files, images without NIR or three
            optical bands, bad masks or masks of other grids, fewer than two places.
        BugError: a bug ended some images; the others are done.
        TableError: the CSV lacks a column or names absent files.
    """
    config = config.absolute() if config.scheduler else config
    sources = (
        _from_csv(config.metadata_fp, config.data_dir)
        if config.metadata_fp
        else _from_folders(config.data_dir)
    )
    require_kelp_value((one.mask for one in sources if one.mask), config.kelp_value)
    found: list[_Surveyed | Failure] = []
    with gather(config.workers, config.scheduler) as workers:
        output_folder(config.output_dir)
        work = partial(attempt, partial(_survey, config))
        with closing(spread(work, sources, workers)) as results:
            for result in results:
                found.append(result)
                progress("reading images", len(found), len(sources))
    total = len(sources)
    both = list(zip(sources, found, strict=True))
    failures = {source.image: one for source, one in both if isinstance(one, Failure)}
    if len(failures) == total:
        raise_failures(failures, total, "images", config.output_dir)
    sources = [source for source, one in both if not isinstance(one, Failure)]
    surveyed = [one for one in found if not isinstance(one, Failure)]
    threshold = config.similarity_threshold
    grouped = sites.group_terrains(
        [one.terrain for one in surveyed],
        sites.DEFAULT_THRESHOLD if threshold is None else threshold,
        progress,
    )
    table = _image_table(config.data_dir, sources, surveyed, grouped)
    left_out = _add_folds(table, config)
    path = config.output_dir / IMAGES_TABLE
    tables.write_table(table, path)
    config.record(config.output_dir)
    train = int((table["original_split"] == TRAIN).sum())
    n_folds = sum(str(name).startswith("split_") for name in table.columns)
    made = MetadataResult(path, train, len(table) - train, len(grouped), n_folds, left_out)
    raise_failures(failures, total, "images", config.output_dir, made)
    return made


def _from_folders(data_dir: Path) -> list[_Source]:
    """Images of `train/images` (each with its mask) and, where there is one, `test/images`."""
    sources = _images(data_dir, TRAIN)
    if (data_dir / TEST / "images").is_dir():
        sources += _images(data_dir, TEST)
    for source in sources:
        if source.mask is not None and not source.mask.is_file():
            raise InputError(
                f"{source.mask}: no such mask, but there is its image {source.image}; "
                "add the mask or take the image away"
            )
    return _unique(sources, data_dir)


def _images(data_dir: Path, split: str) -> list[_Source]:
    found = input_folder(data_dir / split / "images", f"*{IMAGE_SUFFIX}", rasters=True)
    return [_source(data_dir, tables.tile_id_of(path), split) for path in found]


def _source(data_dir: Path, tile_id: str, split: str) -> _Source:
    folder = data_dir / split
    image = folder / "images" / f"{tile_id}{IMAGE_SUFFIX}"
    mask = folder / "masks" / f"{tile_id}{MASK_SUFFIX}" if split == TRAIN else None
    return _Source(tile_id, split, image, mask)


def _from_csv(path: Path, data_dir: Path) -> list[_Source]:
    """The images that the competition's CSV names.

    Its rows of `type` "satellite" are the images, `in_train` tells their part. Its rows of `type`
    "kelp", the masks of the training images, all say `in_train` False, which means nothing.
    """
    table = tables.read_table(path, ("tile_id", "type", "in_train"))
    rows = table[table["type"].astype(str).str.strip() == "satellite"]
    if rows.empty:
        raise TableError(f"{path}: no row has type = satellite; is it the competition's metadata?")
    in_train = rows["in_train"].astype(str).str.strip().str.lower()
    strange = rows[~in_train.isin(("true", "false"))]
    if len(strange):
        raise TableError(
            f"{path}: in_train of {strange['tile_id'].iloc[0]} is "
            f"{strange['in_train'].iloc[0]!r}; it must be True or False"
        )
    sources = [
        _source(data_dir, str(tile_id), TRAIN if train == "true" else TEST)
        for tile_id, train in zip(rows["tile_id"], in_train, strict=True)
    ]
    needed = [file for source in sources for file in (source.image, source.mask) if file]
    tables.require_files(needed, path)
    return _unique(sources, path)


def _unique(sources: Sequence[_Source], origin: Path) -> list[_Source]:
    """The sources by `tile_id`. Raises `TableError` for one that is named twice."""
    ordered = sorted(sources, key=lambda source: source.tile_id)
    for one, other in pairwise(ordered):
        if one.tile_id == other.tile_id:
            raise TableError(f"{origin}: has two images called {one.tile_id}; keep one of them")
    return ordered


def _survey(config: MetadataConfig, source: _Source) -> _Surveyed:
    with Scene(source.image, config.band_order) as scene:
        scene.check()
        pixels = scene.read()
    mask = None
    if source.mask is not None:
        require_same_grid(source.image, source.mask, config.ignore_georeference)
        mask = read_mask(source.mask, kelp_value=config.kelp_value)
    return _Surveyed(facts(pixels, mask), sites.embed(pixels[DEM]))


def _image_table(
    data_dir: Path,
    sources: Sequence[_Source],
    surveyed: Sequence[_Surveyed],
    grouped: sites.Places,
) -> pd.DataFrame:
    """The table of images, still without folds."""

    def relative(path: Path | None) -> str | None:
        return None if path is None else path.relative_to(data_dir).as_posix()

    table = pd.DataFrame(
        {
            "tile_id": [source.tile_id for source in sources],
            "original_split": [source.split for source in sources],
            "aoi_id": grouped.ids,
            "aoi_by_dem": grouped.by_dem,
        }
    )
    for name in FACTS:
        values = [one.facts[name] for one in surveyed]
        table[name] = pd.Series(values, dtype=_NULLABLE.get(name))
    table["kelp_pixels_pct"] = table["kelp_pixels_pct"].astype(np.float64)  # None becomes NaN
    table["image_path"] = [relative(source.image) for source in sources]
    table["mask_path"] = [relative(source.mask) for source in sources]
    return table


def _add_folds(table: pd.DataFrame, config: MetadataConfig) -> int:
    """Add `split_<k>` columns before the facts; returns how many images are left out."""
    train = (table["original_split"] == TRAIN).to_numpy()
    suspect = train & table["high_kelp_pixels_pct"].fillna(False).to_numpy(bool)
    if suspect.any() and not config.keep_suspect_labels:
        log.warning(
            "%d images with over 40 %% kelp, mostly mislabelled, are left out of the folds (%s%s); "
            "--keep_suspect_labels keeps them",
            suspect.sum(),
            ", ".join(table["tile_id"][suspect][:3]),
            ", …" if suspect.sum() > 3 else "",
        )
    else:
        suspect = np.zeros_like(train)
    used = train & ~suspect
    fold = folds.assign_folds(
        table["aoi_id"].to_numpy()[used],
        table["kelp_pixels_pct"].to_numpy()[used],
        config.splits,
        config.seed,
    )
    rest = np.where(suspect, LEFT_OUT, TEST).astype(object)
    for k in range(int(fold.max()) + 1):
        column = rest.copy()
        column[used] = np.where(fold == k, VAL, TRAIN)
        table.insert(4 + k, f"split_{k}", column)
    return int(suspect.sum())
