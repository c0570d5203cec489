"""Scenes to judge networks by: a user's folders, or the fold that no network was trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import pandas as pd

from kelp.config import CompareConfig, TuneConfig
from kelp.errors import BundleError, ConfigError, InputError, TableError
from kelp.evaluation.scoring import places_of
from kelp.inference.bundle import Bundle
from kelp.inference.inputs import find_scenes, survey
from kelp.io.location import Url, local
from kelp.raster.masks import raster_shape
from kelp.raster.window import Shape
from kelp.tables import (
    MASK_SUFFIX,
    TRAIN,
    VAL,
    fold_column,
    output_name,
    read_table,
    require_files,
    tile_id_of,
)

log = logging.getLogger("kelp")

_WAY_OUT: Final = "give labelled scenes as --data_dir and --gt_dir"
_PLACE: Final = "aoi_id"


@dataclass(frozen=True)
class Labelled:
    """A scene and its truth."""

    scene: Path
    truth: Path
    labels: Path | None
    """A second mask, of other labellers."""
    shape: Shape
    place: int


@dataclass(frozen=True)
class Scenes:
    """What networks are judged by."""

    images: list[Labelled]
    words: str
    """Where they are from."""


class _Found(NamedTuple):
    truths: dict[Path, Path]
    """The truth of each scene."""
    places: Path | None
    """A table of their places."""
    words: str


def labelled_scenes(
    config: CompareConfig | TuneConfig, bundles: Sequence[Bundle], labels_dir: Path | None = None
) -> Scenes:
    """The scenes with their truths and places, all of them readable.

    Args:
        config: the user's folders, or none of them.
        bundles: whose fold is meant otherwise.
        labels_dir: folder of second masks.

    Raises:
        InputError: a mask is missing or of another size, or a scene cannot be read.
        TableError: the table of a run's fold, or files that it names, are no longer there.
        ConfigError: without folders, the networks were not trained on one fold.
    """
    if config.data_dir and config.gt_dir:
        found = _of_folders(config.data_dir, config.gt_dir)
    else:
        found = _of_fold(bundles)
        log.info("scenes: %s", found.words)
    labels = _masks(found.truths, labels_dir, "labels_dir") if labels_dir else {}
    specs = [bundle.spec for bundle in bundles]
    truths = dict[Path | Url, Path | Url](found.truths.items())
    tasks, failures = survey(truths, config.band_order, specs)
    if failures:
        raise InputError(f"{len(failures)} scenes cannot be read: {'; '.join(failures.values())}")
    for task in tasks:  # before hours of prediction, not after
        truth = local(task.output)
        for mask in {truth, labels.get(local(task.path), truth)}:
            height, width = raster_shape(mask)
            if (height, width) != task.size.shape:
                raise InputError(
                    f"{mask} has {height} x {width} pixels (height x width), {task.path} "
                    f"{task.size.shape[0]} x {task.size.shape[1]}; a truth must have the size of "
                    "its scene"
                )
    names = {tile_id_of(local(task.path)): local(task.path) for task in tasks}
    if table := config.metadata_fp or found.places:
        place_of = places_of(table, names)
    else:
        log.info("without --metadata_fp each scene counts as a place of its own")
        place_of = {name: name for name in names}
    numbers = {place: k for k, place in enumerate(sorted({place_of[name] for name in names}))}
    images = [
        Labelled(
            path, local(task.output), labels.get(path), task.size.shape, numbers[place_of[name]]
        )
        for (name, path), task in zip(names.items(), tasks, strict=True)
    ]
    return Scenes(images, found.words)


def _of_folders(data_dir: Path, gt_dir: Path) -> _Found:
    truths = _masks(map(local, find_scenes(data_dir)), gt_dir, "gt_dir")
    return _Found(truths, None, f"{data_dir}, truth {gt_dir}")


def _masks(scenes: Iterable[Path], folder: Path, flag: str) -> dict[Path, Path]:
    """The mask of each scene in a folder."""
    masks = {scene: folder / output_name(scene, MASK_SUFFIX) for scene in scenes}
    absent = [path for path in masks.values() if not path.is_file()]
    if absent:
        raise InputError(
            f"{absent[0]}: no such truth, {len(absent)} of {len(masks)} scenes have none; give "
            f"the folder of their masks as --{flag}, or take the scenes away"
        )
    return masks


@dataclass(frozen=True)
class _Fold:
    """What a run held out, by image."""

    bundle: Path
    words: str
    places: Path | None
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
        "them, so scores may flatter a little"
    )
    return _Found(truths, first.places, words)


def _fold_of(bundle: Bundle) -> _Fold:
    """What the configuration says that is recorded in a bundle, as its table stands now."""
    training = bundle.spec.training
    absent = {"data_dir", "metadata_fp", "cv_split", "sahi"} - training.keys()
    if absent:
        raise BundleError(f"{bundle.path}: does not tell what it was trained on; {_WAY_OUT}")
    path, number = Path(training["metadata_fp"]), int(training["cv_split"])
    kind, root = ("source_", path.parent) if training["sahi"] else ("", Path(training["data_dir"]))
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
    places = path if _PLACE in table.columns else None
    words = f"fold {number} of {path}"
    return _Fold(bundle.path, words, places, frozenset(trained), held_out)


def _files(rows: pd.DataFrame, columns: Sequence[str], root: Path) -> dict[Path, Path]:
    """The mask of each image, tiles of one image only once; folders without links."""
    pairs = rows[list(columns)].drop_duplicates().to_numpy()
    paths = [[root / str(name) for name in pair] for pair in pairs]
    return {_real(image): _real(mask) for image, mask in sorted(paths)}


def _real(path: Path) -> Path:
    return path.parent.resolve() / path.name
