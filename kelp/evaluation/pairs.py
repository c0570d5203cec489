"""Which truth belongs to which prediction, and whether they may be laid on each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kelp.config.shared import TruthOptions
from kelp.errors import InputError, TableError
from kelp.raster.georeference import Grid, require_same_grid
from kelp.raster.labels import require_kelp_value
from kelp.raster.window import Shape, Tile
from kelp.tables import IMAGE_SUFFIX, MASK_SUFFIX, masks_in, read_table, scenes_in

_ROWS: Final = 512
_NAMES_SHOWN: Final = 5


@dataclass(frozen=True)
class Pair:
    """The files of one image."""

    tile_id: str
    truth: Path
    prediction: Path
    scene: Path | None = None

    def __str__(self) -> str:
        return str(self.prediction)


def find_pairs(
    gt_dir: Path, preds_dir: Path, options: TruthOptions, data_dir: Path | None = None
) -> list[Pair]:
    """The truths of a folder, each with its prediction, by tile id.

    Predictions without truth are not looked at. Grids are compared when a pair is opened
    (`require_pair`).

    Args:
        gt_dir: folder of true masks.
        preds_dir: folder of predicted masks.
        options: what kelp is in the true masks.
        data_dir: folder of the scenes, of which every truth needs one.

    Raises:
        InputError: a prediction or a scene is missing (named), or masks hold 0 and 255 only.
    """
    truths, found = masks_in(gt_dir), masks_in(preds_dir)
    if absent := [tile_id for tile_id in truths if tile_id not in found]:
        raise InputError(
            f"{preds_dir}: no prediction for {some(absent)} of {gt_dir}; "
            "predict these images too, or take their truth away"
        )
    scenes = scenes_in(data_dir) if data_dir else {}
    if data_dir and (absent := [tile_id for tile_id in truths if tile_id not in scenes]):
        raise InputError(
            f"{data_dir}: no scene {absent[0]}{IMAGE_SUFFIX}, {len(absent)} of {len(truths)} are "
            "missing; leave out --data_dir, or give the folder of all"
        )
    require_kelp_value(truths.values(), options.kelp_value)
    require_kelp_value(found[tile_id] for tile_id in truths)
    return [
        Pair(tile_id, path, found[tile_id], scenes.get(tile_id)) for tile_id, path in truths.items()
    ]


def find_truths(gt_dir: Path, tile_ids: Iterable[str], options: TruthOptions) -> dict[str, Path]:
    """The true masks of some images. Raises `InputError` where there is none of any of them."""
    wanted = set(tile_ids)
    truths = {tile_id: path for tile_id, path in masks_in(gt_dir).items() if tile_id in wanted}
    if not truths:
        raise InputError(
            f"{gt_dir}: no truth of a scene of --predictions_dirs; a scene X has X{MASK_SUFFIX}"
        )
    require_kelp_value(truths.values(), options.kelp_value)
    return truths


def require_pair(pair: Pair, ignore_georeference: bool) -> Grid:
    """The grid that truth, prediction and scene share; a georeferenced one if there is one.

    Raises:
        InputError: they do not lie on one grid.
    """
    grid = require_same_grid(pair.truth, pair.prediction, ignore_georeference)
    for other in (pair.prediction, pair.scene):
        if other is not None and not (grid.located or ignore_georeference):
            grid = require_same_grid(other, pair.truth)
    if pair.scene:
        require_same_grid(pair.truth, pair.scene, ignore_georeference)
        require_same_grid(pair.prediction, pair.scene, ignore_georeference)
    return grid


class Strip(NamedTuple):
    """Rows of an image, and the window to read for them."""

    own: Tile
    read: Tile
    """The strip with some rows above and below it."""

    @property
    def above(self) -> int:
        """Rows that are read above the strip."""
        return self.own.y - self.read.y


def strips(shape: Shape, around: int = 0) -> Iterator[Strip]:
    """Full-width strips from the top to the bottom: memory grows with the width only.

    Args:
        shape: of the image.
        around: rows to read above and below each strip, where there are such.
    """
    height, width = shape
    for own in Tile(0, 0, height, width).strips(_ROWS):
        top, end = max(0, own.y - around), min(height, own.bottom + around)
        yield Strip(own, Tile(top, 0, end - top, width))


def sites_of(table: Path | None, tile_ids: Sequence[str]) -> dict[str, str]:
    """The site (`aoi_id`) of each tile id, from a table of `kelp metadata`.

    Without a table each is a site of its own.

    Raises:
        TableError: the table has no row for one of them.
    """
    if table is None:
        return {tile_id: tile_id for tile_id in tile_ids}
    rows = read_table(table, ["tile_id", "aoi_id"])
    known: Mapping[str, str] = dict(
        zip(rows["tile_id"].astype(str), rows["aoi_id"].astype(str), strict=True)
    )
    if absent := [tile_id for tile_id in tile_ids if tile_id not in known]:
        raise TableError(f"{table}: the table has no row for {some(absent)}")
    return {tile_id: known[tile_id] for tile_id in tile_ids}


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
