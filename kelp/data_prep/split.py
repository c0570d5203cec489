"""`kelp split`: a fold's validation images and masks as a folder, to predict and score."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kelp import tables
from kelp.errors import ConfigError, TableError
from kelp.io.files import atomic, output_folder
from kelp.progress import Progress, silent
from kelp.tables import IMAGE_SUFFIX, MASK_SUFFIX, TRAIN, VAL

if TYPE_CHECKING:
    from kelp.config import SplitConfig


@dataclass(frozen=True)
class SplitResult:
    """What `split_fold` made.

    Attributes:
        images: the folder of images.
        masks: the folder of masks.
        count: number of images, and of masks.
    """

    images: Path
    masks: Path
    count: int

    def summary(self) -> str:
        """One line for the user."""
        return f"{self.count} images and masks: {self.images}, {self.masks}"


def split_fold(config: SplitConfig, progress: Progress = silent) -> SplitResult:
    """Gather the images and masks that fold `cv_split` validates on, as links where possible.

    The files are hard links to those of `data_dir`, or copies where the file system has none.

    Raises:
        TableError: no such fold, a fold without validation images, or absent files.
        ConfigError: the output would be `data_dir`'s own folder of training images, or holds
            files of another fold.
    """
    path = config.metadata_fp
    source, target = config.data_dir / TRAIN, config.output_dir
    if source.resolve() == target.resolve():
        raise ConfigError(f"--output_dir {target} holds the training images; choose another folder")
    table = tables.read_table(path, ("tile_id", "original_split"))
    fold = tables.fold_column(table, config.cv_split, path)
    ids = sorted(set(table["tile_id"][table[fold] == VAL].astype(str)))
    if not ids:
        raise TableError(f"{path}: fold {config.cv_split} has no row with {fold} = {VAL}")
    names = [f"images/{i}{IMAGE_SUFFIX}" for i in ids] + [f"masks/{i}{MASK_SUFFIX}" for i in ids]
    tables.require_files([source / name for name in names], path)
    _refuse_strangers(target, set(names))
    output_folder(target)
    for done, name in enumerate(names, start=1):
        _link(source / name, target / name)
        progress("splitting", done, len(names))
    config.record(target)
    return SplitResult(target / "images", target / "masks", len(ids))


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it."""
    with atomic(target, sync=False) as partial:
        partial.unlink(missing_ok=True)
        try:
            # Not through a symbolic link: the result must not depend on where it points later.
            os.link(source.resolve(), partial)
        except OSError:
            shutil.copyfile(source, partial)


def _refuse_strangers(folder: Path, names: set[str]) -> None:
    """Images of another fold in the folder would be predicted and scored with this one's."""
    found = (path for kind in ("images", "masks") for path in folder.glob(f"{kind}/[!.]*"))
    for path in sorted(found):
        if path.suffix.lower() == ".tif" and path.relative_to(folder).as_posix() not in names:
            raise ConfigError(
                f"--output_dir {folder}: holds {path.relative_to(folder)}, which is not of this "
                "fold; choose another folder, or empty it"
            )
