"""Scenes to evaluate networks on: a user's folders, or the fold that no network was trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import pandas as pd

from kelp.config import scenes as reading
from kelp.errors import BundleError, ConfigError, InputError, TableError
from kelp.evaluation.bootstrap import site_numbers
from kelp.evaluation.pairs import sites_of, strips
from kelp.inference.bundle import Bundle
from kelp.inference.inputs import survey
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.location import Url, local
from kelp.raster.area import GroundArea
from kelp.raster.georeference import Grid, require_same_grid
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import read_mask
from kelp.raster.window import Shape
from kelp.sensors import find_scenes
from kelp.tables import (
    MASK_SUFFIX,
    TRAIN,
    VAL,
    fold_column,
    masks_in,
    output_name,
    read_table,
    require_files,
    tile_id_of,
)

log = logging.getLogger("kelp")

_WAY_OUT: Final = "give labelled scenes as --data_dir and --gt_dir"
_SITE: Final = "aoi_id"


class SceneOptions(Protocol):
    """How labelled scenes are read; see `kelp.config.shared`."""

    @property
    def metadata_fp(self) -> Path | None:
        """Table of their sites."""

    @property
    def band_order(self) -> tuple[str, ...]:
        """Band names of the files."""

    @property
    def kelp_value(self) -> int:
        """Of the true masks."""

    @property
    def ignore_georeference(self) -> bool:
        """Whether sizes alone decide."""


@dataclass(frozen=True)
class Labelled:
    """A scene and its truth."""

    scene: Path
    truth: Path
    labels: Path | None
    """A second mask, of other labellers."""
    grid: Grid
    site: int
    site_name: str

    def __str__(self) -> str:
        return str(self.scene)

    @property
    def shape(self) -> Shape:
        """Height and width."""
        return self.grid.shape

    def area(self, pixel_size: float) -> GroundArea:
        """Ground area of its pixels."""
        return GroundArea.of(self.grid.georeference, self.grid.shape, pixel_size)


@dataclass(frozen=True)
class Scenes:
    """What networks are evaluated on."""

    images: list[Labelled]
    words: str
    """Where they are from."""

    @property
    def sites(self) -> int:
        """Number of sites that they show."""
        return max(image.site for image in self.images) + 1


class _Found(NamedTuple):
    truths: dict[Path, Path]
    """The truth of each scene."""
    sites: Path | None
    """A table of their sites."""
    words: str


def labelled_scenes(
    options: SceneOptions,
    bundles: Sequence[Bundle],
    data_dir: Path | None = None,
    gt_dir: Path | None = None,
    labels_dir: Path | None = None,
    failures: dict[Path, Failure] | None = None,
) -> Scenes:
    """The scenes with their truths and sites, all of them readable.

    Args:
        options: how they are read.
        bundles: the networks that will see them, whose held-out fold is meant without folders.
        data_dir: folder of scenes.
        gt_dir: folder of their true masks.
        labels_dir: folder of second masks.
        failures: takes those that cannot be used, which are left out; without it each is an error.

    Raises:
        InputError: a mask is missing, masks hold 0 and 255 only, scenes or masks cannot be read,
            or they do not lie on one grid.
        TableError: the table of a run's fold, or files that it names, are no longer there.
        ConfigError: without folders, the networks were not trained on one fold.
    """
    if data_dir and gt_dir:
        found = _of_folders(data_dir, gt_dir)
    else:
        found = _of_fold(bundles)
        log.info("scenes: %s", found.words)
    labels = _masks(found.truths, labels_dir, "labels_dir") if labels_dir else {}
    specs = [bundle.spec for bundle in bundles]
    truths = dict[Path | Url, Path | Url](found.truths.items())
    tasks, wrong = survey(truths, reading.SceneOptions(band_order=options.band_order), specs)
    noted = {local(path): failure for path, failure in wrong.items()}
    require_kelp_value(found.truths.values(), options.kelp_value)
    grids: dict[Path, Grid] = {}
    for path in (local(task.path) for task in tasks):  # before hours of prediction, not after
        masks = [masks_of[path] for masks_of in (found.truths, labels) if path in masks_of]
        grid = attempt(partial(_grid, options, masks), path)
        if isinstance(grid, Failure):
            noted[path] = grid
        else:
            grids[path] = grid
    if noted and (failures is None or not grids):
        raise_failures(noted, len(truths), "scenes", None)
    if failures is not None and noted:
        failures.update(noted)
        first = next(iter(noted.values())).message
        log.warning("%d of %d scenes are left out: %s", len(noted), len(truths), first)
    table = options.metadata_fp or found.sites
    if table is None:
        log.info("without --metadata_fp each scene counts as a site of its own")
    names = [tile_id_of(path) for path in grids]
    site_of = sites_of(table, names)
    numbers = site_numbers([site_of[name] for name in names])
    images = [
        Labelled(path, found.truths[path], labels.get(path), grids[path], number, site_of[name])
        for path, name, number in zip(grids, names, numbers, strict=True)
    ]
    return Scenes(images, found.words)


def _grid(options: SceneOptions, masks: Sequence[Path], scene: Path) -> Grid:
    """The grid that a scene shares with its masks, which can be read to the last row."""
    for mask, kelp_value in zip(masks, (options.kelp_value, 1), strict=False):
        grid = require_same_grid(scene, mask, options.ignore_georeference)
        for strip, _ in strips(grid.shape):
            read_mask(mask, strip, kelp_value)
    return grid if grid.located else require_same_grid(masks[0], scene, options.ignore_georeference)


def _of_folders(data_dir: Path, gt_dir: Path) -> _Found:
    truths = _masks(map(local, find_scenes(data_dir)), gt_dir, "gt_dir")
    return _Found(truths, None, f"{data_dir}, truth {gt_dir}")


def _masks(scenes: Iterable[Path], folder: Path, flag: str) -> dict[Path, Path]:
    """The mask of each scene in a folder."""
    scenes, known = list(scenes), masks_in(folder)
    absent = [scene for scene in scenes if tile_id_of(scene) not in known]
    if absent:
        raise InputError(
            f"{folder / output_name(absent[0], MASK_SUFFIX)}: no such truth, {len(absent)} of "
            f"{len(scenes)} scenes have none; give the folder of their masks as --{flag}, or take "
            "the scenes away"
        )
    return {scene: known[tile_id_of(scene)] for scene in scenes}


@dataclass(frozen=True)
class _Fold:
    """What a run held out, by image."""

    bundle: Path
    words: str
    sites: Path | None
    trained: frozenset[Path]
    held_out: dict[Path, Path]
    """The mask of each image."""


def _of_fold(bundles: Sequence[Bundle]) -> _Found:
    """The images that every run validated on."""
    first, *others = (_fold_of(bundle) for bundle in bundles)
    shared = set(first.held_out)
    for fold in others:
        # A table of tiles lacks images of which no tile was worth keeping: those may differ.
        differ = first.held_out.keys() ^ fold.held_out.keys()
        shared &= fold.held_out.keys()
        if differ & (first.trained | fold.trained) or not shared:
            raise ConfigError(
                f"{fold.bundle} ({fold.words}) holds out other images than {first.bundle} "
                f"({first.words}); {_WAY_OUT}, of images that no run was trained on"
            )
    truths = {image: mask for image, mask in first.held_out.items() if image in shared}
    words = (
        f"{len(truths)} images that {first.words} validates on; each run picked its best epoch on "
        "them, so scores may be a little optimistic"
    )
    return _Found(truths, first.sites, words)


def _fold_of(bundle: Bundle) -> _Fold:
    """What the configuration says that is recorded in a bundle, as its table stands now."""
    training = bundle.spec.training
    absent = {"data_dir", "metadata_fp", "cv_split", "sahi"} - training.keys()
    if absent:
        raise BundleError(f"{bundle.path}: does not tell what it was trained on; {_WAY_OUT}")
    folder = _trained_in(bundle)
    path, number = folder / training["metadata_fp"], int(training["cv_split"])
    data = folder / training["data_dir"]
    kind, root = ("source_", path.parent) if training["sahi"] else ("", data)
    columns = [f"{kind}image_path", f"{kind}mask_path"]
    try:
        table = read_table(path, ("tile_id", *columns))
        fold = table[fold_column(table, number, path)]
        trained = _files(table[fold == TRAIN], columns, root)
        held_out = _files(table[fold == VAL], columns, root)
        if not held_out:
            raise TableError(f"{path}: fold {number} has no {VAL} rows")
        require_files([*held_out, *held_out.values()], path)
    except TableError as error:
        raise TableError(f"{error}; or {_WAY_OUT}") from error
    sites = path if _SITE in table.columns else None
    words = f"fold {number} of {path}"
    return _Fold(bundle.path, words, sites, frozenset(trained), held_out)


def _trained_in(bundle: Bundle) -> Path:
    """The folder that recorded relative paths start from: the current one of that training.

    Where the table is not found from here, it is told by where the bundle lies now: the run was
    written under the recorded `output_dir`, seen from there.
    """
    table, output = (Path(bundle.spec.training.get(k, "")) for k in ("metadata_fp", "output_dir"))
    if table.is_absolute() or table.is_file():
        return Path()
    depth = len(output.parts)
    for parent in bundle.path.resolve().parents:
        if depth and parent.parts[-depth:] == output.parts:
            start = Path(*parent.parts[:-depth])
            if (start / table).is_file():
                return start
    return Path()


def _files(rows: pd.DataFrame, columns: Sequence[str], root: Path) -> dict[Path, Path]:
    """The mask of each image, tiles of one image only once; folders without links."""
    pairs = rows[list(columns)].drop_duplicates().to_numpy()
    paths = [[root / str(name) for name in pair] for pair in pairs]
    return {_real(image): _real(mask) for image, mask in sorted(paths)}


def _real(path: Path) -> Path:
    return path.parent.resolve() / path.name
