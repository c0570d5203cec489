"""Which rows a run trains and validates on, in which order, and the loaders that bring them."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kelp import tables
from kelp.config import FoldConfig, TrainConfig
from kelp.errors import ConfigError, TableError
from kelp.io.executors import cores
from kelp.io.files import amount, is_file
from kelp.nn.data.dataset import Sample, Source, TileDataset, collate, sources_of
from kelp.nn.data.reading import Files, Reader
from kelp.nn.data.sampling import ALL, DealtBatches, EpochSampler, EvenBatches, Share
from kelp.raster.bands import BANDS
from kelp.raster.georeference import require_same_grid
from kelp.raster.indices import needed_bands, parse_indices
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import raster_shape
from kelp.raster.scene import Scene
from kelp.raster.window import Shape

log = logging.getLogger("kelp")

_TILE_COLUMNS: Final = (*tables.TILE_KEY, "tile_height", "tile_width")
_SOURCE_COLUMNS: Final = ("source_image_path", "source_mask_path")

_SHARED_MEMORY: Final = Path("/dev/shm")
_PREFETCHED: Final = 2  # batches of each worker, torch's default
_PIXEL_BYTES: Final = 4 * len(BANDS) + 2  # of a `Sample`

# These pool the whole image to one pixel, where batch normalisation needs two samples.
_NEEDS_TWO: Final = ("pspnet", "pan", "deeplabv3", "deeplabv3+", "upernet")


@dataclass(frozen=True)
class Fold:
    """The rows of a fold, and their files in the same order."""

    train: pd.DataFrame
    val: pd.DataFrame
    train_sources: list[Source]
    val_sources: list[Source]


def read_fold(config: FoldConfig) -> Fold:
    """Read the table of a run.

    Raises:
        TableError: the table lacks a column, the fold, its rows, or files of these rows.
        ConfigError: `--sahi` does not go with the table.
    """
    path = config.metadata_fp
    table = tables.read_table(path, ("tile_id", "image_path", "mask_path"))
    _check_kind(table, config)
    fold = tables.fold_column(table, config.fold, path)
    parts = {}
    for part in (tables.TRAIN, tables.VAL):
        parts[part] = table[table[fold] == part].reset_index(drop=True)
        if parts[part].empty:
            raise TableError(f"{path}: fold {config.cv_split} has no {part} rows; try another fold")
        _check_masks(parts[part], path)
    wants_moves = isinstance(config, TrainConfig) and config.random_crops
    move = wants_moves and _can_be_moved(parts[tables.TRAIN], path)
    sources = {
        part: sources_of(rows, config.data_dir, path.parent, move and part == tables.TRAIN)
        for part, rows in parts.items()
    }
    files = dict.fromkeys(
        file for part in sources.values() for s in part for file in (s.image, s.mask)
    )
    tables.require_files(list(files), path)
    return Fold(parts[tables.TRAIN], parts[tables.VAL], sources[tables.TRAIN], sources[tables.VAL])


def _check_kind(table: pd.DataFrame, config: FoldConfig) -> None:
    """Whether the table is one of tiles, as `--sahi` says."""
    path = config.metadata_fp
    absent = [name for name in _TILE_COLUMNS if name not in table.columns]
    if config.sahi and absent:
        raise ConfigError(
            f"--sahi True: {path} is no table of tiles (it lacks {', '.join(absent)}); "
            "give the table of kelp slice, or leave out --sahi"
        )
    if not config.sahi and not absent:
        raise ConfigError(
            f"{path} is a table of tiles: add --sahi True, or give the table of kelp metadata"
        )
    if table["image_path"].isna().any() and not set(_SOURCE_COLUMNS) <= set(table.columns):
        raise TableError(f"{path}: has rows without image_path; make the table again")


def _can_be_moved(rows: pd.DataFrame, path: Path) -> bool:
    """Whether the images that tiles were cut from are at hand; if not, one line of notice."""
    columns = [name for name in _SOURCE_COLUMNS if name in rows.columns]
    files = {name for column in columns for name in rows[column].dropna().unique()}
    if len(columns) == 2 and files and all(is_file(path.parent / str(name)) for name in files):
        return True
    log.info("%s: the images that its tiles were cut from are not at hand; no random crops", path)
    return False


def _check_masks(rows: pd.DataFrame, path: Path) -> None:
    unlabelled = rows["image_path"].notna() & rows["mask_path"].isna()
    if unlabelled.any():
        name = rows.loc[unlabelled, "tile_id"].iloc[0]
        raise TableError(f"{path}: {name} has no mask_path; add its mask and make the table again")


def training_shape(fold: Fold, config: FoldConfig) -> Shape:
    """Height and width of the largest training tile, or image."""
    if config.sahi:
        return Shape(*(int(fold.train[f"tile_{name}"].max()) for name in Shape._fields))
    shapes = [raster_shape(source.image) for source in fold.train_sources]
    return Shape(*map(max, zip(*shapes, strict=True)))


def require_bands(fold: Fold, config: FoldConfig) -> None:
    """Open each image of a fold (of tiles, the first) and look for the bands that a run needs.

    What is missing would otherwise be filled in everywhere, and trained on, without a word.

    Raises:
        InputError: a file lacks a band, a mask does not lie on its image's grid, or masks say with
            255 what should be 1. A missing DEM is one line of notice.
    """
    settings = config.index_settings
    needed = needed_bands(config.bands, parse_indices(config.spectral_indices), settings)
    first: dict[str, Source] = {}
    for rows, sources in ((fold.train, fold.train_sources), (fold.val, fold.val_sources)):
        for tile_id, source in zip(rows["tile_id"], sources, strict=True):
            first.setdefault(tile_id, source)
    told = False
    require_kelp_value(dict.fromkeys(s.mask for s in fold.train_sources), config.kelp_value)
    for source in first.values():
        require_same_grid(source.image, source.mask, config.ignore_georeference)
        with Scene(source.image, config.band_order, quiet=True) as scene:
            if told:
                scene.check(needed)
            else:
                scene.require(needed)
            told = told or "DEM" not in scene.present


def sampling_weights(rows: pd.DataFrame, config: TrainConfig, table: Path) -> NDArray[np.float64]:
    """Weight of each training row in the weighted sampler, between 0.01 and 1.

    The sum of seven facts, each times its `--…_importance_factor`, then stretched over the
    training rows: the least weight becomes 0.01, the largest 1 (all alike: 1).

    Raises:
        TableError: the table (`table` is its path, for the message) lacks a fact.
    """
    terms = {
        "has_kelp": (config.has_kelp_importance_factor, False),
        "kelp_pixels_pct": (config.kelp_pixels_pct_importance_factor, True),
        "qa_ok": (config.qa_ok_importance_factor, False),
        "qa_corrupted_pixels_pct": (config.qa_corrupted_pixels_pct_importance_factor, True),
        "water_pixels_pct": (config.almost_all_water_importance_factor, True),
        "dem_nan_pixels_pct": (config.dem_nan_pixels_pct_importance_factor, True),
        "dem_zero_pixels_pct": (config.dem_zero_pixels_pct_importance_factor, True),
    }
    weights = _weighted_sum(rows, terms, table)
    low, high = weights.min(), weights.max()
    if high == low:
        return np.ones(len(rows))
    scaled: NDArray[np.float64] = 0.01 + 0.99 * (weights - low) / (high - low)
    return scaled


def _weighted_sum(
    rows: pd.DataFrame, terms: Mapping[str, tuple[float, bool]], table: Path
) -> NDArray[np.float64]:
    total = np.zeros(len(rows))
    for name, (factor, is_share_of_bad) in terms.items():
        if name not in rows.columns or rows[name].isna().any():
            raise TableError(
                f"{table}: the weighted sampler needs {name} in every row; make the table again, "
                "or train with --use_weighted_sampler False"
            )
        values = rows[name].to_numpy(np.float64)
        total += factor * (1 - values if is_share_of_bad else values)
    return total


def _workers(config: TrainConfig, shape: Shape) -> int:
    """`--num_workers`, one for each core at most, since more are slower.

    It is 0, after one line, where their batches do not fit into shared memory.
    Containers often have 64 MB of it, and a worker that finds it full is killed by the system.
    """
    workers = min(config.num_workers, cores())
    if not workers or not _SHARED_MEMORY.is_dir():
        return workers
    batch = config.batch_size * shape[0] * shape[1] * _PIXEL_BYTES
    loaders = 2 if config.val_check_interval < 1 else 1  # validation within an epoch
    needed = loaders * (workers * _PREFETCHED + 1) * batch
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed <= free:
        return workers
    log.warning(
        "%s has %s free, the batches of --num_workers %d may take %s: the main process reads "
        "them, slower; make it larger (docker run --shm-size), or give --num_workers 0",
        _SHARED_MEMORY,
        amount(free),
        workers,
        amount(needed),
    )
    return 0


class FoldData(LightningDataModule):
    """The loaders of a fold. Their samples do not depend on the number of workers.

    Whole images are reflected up to `shape`, the `training_shape`. With a `share` they bring the
    part of one of several processes; validation batches may then be `None`, see `DealtBatches`.

    Raises:
        ConfigError: the samples of an epoch are too few for the processes.
    """

    def __init__(
        self, fold: Fold, config: TrainConfig, first_epoch: int, pin: bool, share: Share = ALL
    ) -> None:
        super().__init__()
        self.fold = fold
        self.config = config
        self.shape = training_shape(fold, config)
        self.workers = _workers(config, self.shape)
        self.pin = pin
        self.reader: Reader = Files(config.band_order, config.kelp_value)
        self.share = share
        weights = (
            sampling_weights(fold.train, config, config.metadata_fp)
            if config.use_weighted_sampler
            else None
        )
        self.weights = weights
        self.sampler = self._sampler(first_epoch)
        if share.count > 1:
            self._check_batches()

    def train_dataloader(self) -> DataLoader[Sample]:
        """Training rows, as the sampler orders them."""
        size = self.config.batch_size
        lonely = size > 1 and len(self.sampler) > 1 and len(self.sampler) % size == 1
        drop_last = lonely and self.config.architecture in _NEEDS_TWO
        return self._loader(self.fold.train_sources, self._train_batches(self.sampler, drop_last))

    @property
    def batches(self) -> int:
        """Training batches of an epoch, of this process."""
        return min(len(self.train_dataloader()), self.config.limit_train_batches or sys.maxsize)

    def norm_dataloader(self, epoch: int) -> DataLoader[Sample]:
        """Training rows as the sampler orders them in an epoch, beside those being trained on."""
        # A lonely last sample would upset statistics as it would training.
        drop_last = len(self.sampler) > self.config.batch_size
        batches = self._train_batches(self._sampler(epoch), drop_last)
        return self._loader(self.fold.train_sources, batches, lasting=False)

    def samples(self, sources: Sequence[Source]) -> TileDataset:
        """Samples as the loaders bring them, without random moves."""
        shape = None if self.config.sahi else self.shape
        return TileDataset(sources, (), shape, self.reader)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Validation rows, in the order of the table."""
        sources, size = self.fold.val_sources, self.config.batch_size
        if self.share.count == 1:
            return self._loader(sources, {"batch_size": size})
        dealt = DealtBatches(len(sources), size, self.share, self.config.limit_val_batches)
        return self._loader(sources, {"batch_sampler": dealt})

    def _sampler(self, first_epoch: int) -> EpochSampler:
        config = self.config
        return EpochSampler(
            len(self.fold.train),
            config.seed,
            self.weights,
            config.samples_per_epoch,
            first_epoch,
            move=config.random_crops,
            share=self.share,
        )

    def _train_batches(self, sampler: EpochSampler, drop_last: bool) -> dict[str, Any]:
        """How a loader makes batches of draws."""
        size = self.config.batch_size
        if self.share.count == 1:
            return {"sampler": sampler, "batch_size": size, "drop_last": drop_last}
        return {"batch_sampler": EvenBatches(sampler, size)}

    def _check_batches(self) -> None:
        config = self.config
        smallest = EvenBatches(self.sampler, config.batch_size).smallest
        if smallest < 2 <= config.batch_size and config.architecture in _NEEDS_TWO:
            raise ConfigError(
                f"--architecture {config.architecture}: needs two samples in every batch, and "
                f"{self.sampler.count} samples on {self.share.count} processes in batches of "
                f"{config.batch_size} leave one alone; give another --batch_size or fewer --devices"
            )

    def _loader(
        self, sources: list[Source], batches: dict[str, Any], lasting: bool = True
    ) -> DataLoader[Sample]:
        config = self.config
        return DataLoader(
            self.samples(sources),
            num_workers=self.workers,
            collate_fn=_collate_any,
            pin_memory=self.pin,
            persistent_workers=lasting and self.workers > 0,
            # Without one of its own a loader would draw from the network's random numbers.
            generator=torch.Generator().manual_seed(config.seed),
            **batches,
        )


def _collate_any(samples: Sequence[Sample]) -> Sample | None:
    """A batch; none of the empty one that a process gets when batches do not go round."""
    return collate(samples) if samples else None
