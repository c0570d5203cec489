"""`kelp slice`: a dataset of small tiles of the training images, and the table of the tiles.

Tiles lie at 0, stride, 2·stride … and stick out of the image at its right and lower edge; only
here pixels beyond the image are made up (nodata in images, "not observed" in masks). Tiles of a
virtual dataset (`--materialize False`) are rows of the table only.

Paths in the table, all with forward slashes:

- `image_path`, `mask_path`: the tile's files, relative to the folder of the table; null in a
  virtual dataset, whose reader cuts the window `(y, x, tile_height, tile_width)` out of
- `source_image_path`, `source_mask_path`: relative to the folder of the table as well, so the
  table is good from any current folder, and when both folders move together.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kelp import tables
from kelp.data_prep.facts import tile_facts
from kelp.data_prep.tile_files import (
    MASK_FORMAT,
    cut,
    encode,
    image_format,
    put,
)
from kelp.errors import ConfigError, InputError, TableError
from kelp.io.executors import gather, require_shared, spread
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.files import check_name, discard_partials, output_folder
from kelp.progress import Progress, silent
from kelp.raster.georeference import require_same_grid
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import Georeference, georeference_of, read_mask
from kelp.raster.scene import Scene
from kelp.raster.water import WaterReference
from kelp.raster.window import Shape, Tile
from kelp.tables import IMAGE_SUFFIX, MASK_SUFFIX, TILES_TABLE, TRAIN
from kelp.tiling.grid import TileGrid

if TYPE_CHECKING:
    from kelp.config import SliceConfig
    from kelp.io.cluster import Cluster

log = logging.getLogger("kelp")

IMAGES: Final = "images"
MASKS: Final = "masks"

_PROBES: Final = 9  # tiles encoded to foretell the size


@dataclass(frozen=True)
class SliceResult:
    """What `slice_dataset` made.

    Attributes:
        table: the table of tiles.
        images: number of source images.
        tiles: number of rows of the table.
        left_out: tiles below `min_valid_fraction`.
    """

    table: Path
    images: int
    tiles: int
    left_out: int

    def summary(self) -> str:
        """One line for the user."""
        less = f" ({self.left_out} with too few observed pixels left out)" if self.left_out else ""
        return f"{self.tiles} tiles of {self.images} images{less}: {self.table}"


class _Sliced(NamedTuple):
    """The tiles of one image that are kept, as columns of the table of tiles."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    facts: dict[str, NDArray[Any]]
    water: NDArray[np.float64]
    """DN of clear water around each tile, `(tiles, 5)`; NaN where the image shows none."""
    left_out: int


@dataclass(frozen=True)
class _Held:
    """An image that is in memory already, read by windows."""

    pixels: NDArray[np.float32]

    @property
    def shape(self) -> Shape:
        return Shape.of(self.pixels)

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        return self.pixels[:, *tile.slices]


def slice_dataset(config: SliceConfig, progress: Progress = silent) -> SliceResult:
    """Cut the training images of a table into tiles and write the table of the tiles.

    Law: put together, the tiles of an image give back every stored value of it, and no file
    depends on the number of workers. The table is written last: a slice that was killed has none.
    Images that fail are left out of it, and named when the others are done.

    Raises:
        TableError: no training rows, an image named twice, or absent files.
        InputError: unreadable files, bad masks, masks that do not lie on their images' grids.
        BugError: a bug ended some images; the others are done.
        ConfigError: `output_dir` is `data_dir`.
    """
    config = config.absolute() if config.scheduler else config
    rows = _training_rows(config)
    masks = (_sources(config, tile_id)[1] for tile_id in rows["tile_id"])
    require_kelp_value(masks, config.kelp_value)
    with gather(config.workers, config.scheduler) as workers:
        found = _slice_all(config, rows, workers, progress)
    names = list(rows["tile_id"])
    failures = {n: one for n, one in zip(names, found, strict=True) if isinstance(one, Failure)}
    if len(failures) == len(names):
        raise_failures(failures, len(names), "images", config.output_dir)
    rows = rows[~rows["tile_id"].isin(failures)].reset_index(drop=True)
    sliced = [one for one in found if not isinstance(one, Failure)]
    table_path = config.output_dir / TILES_TABLE
    table = _tile_table(config, rows, sliced)
    if config.materialize:
        _tell_strangers(config, table)
        if hasattr(os, "sync"):
            os.sync()  # the tiles are on disk before the table that vouches for them
    tables.write_table(table, table_path)
    config.record(config.output_dir)
    result = SliceResult(table_path, len(rows), len(table), sum(one.left_out for one in sliced))
    raise_failures(failures, len(names), "images", config.output_dir, result)
    return result


def _slice_all(
    config: SliceConfig, rows: pd.DataFrame, workers: int | Cluster, progress: Progress
) -> list[_Sliced | Failure]:
    """Tiles of all images, in the order of `rows`; an older table goes before the first."""
    output_folder(config.output_dir)
    folders = [config.output_dir / name for name in (IMAGES, MASKS)]
    if config.materialize:
        _tell_size(config, rows)
        for folder in folders:
            output_folder(folder)
        require_shared(workers, config.output_dir)
        # From here on an older table would describe tiles that are being overwritten.
        (config.output_dir / TILES_TABLE).unlink(missing_ok=True)
    sliced: list[_Sliced | Failure] = []
    jobs = list(rows["tile_id"])
    cut_up = partial(attempt, partial(_slice_image, config))
    try:
        with closing(spread(cut_up, jobs, workers)) as work:
            for one in work:
                sliced.append(one)
                progress("slicing", len(sliced), len(rows))
    finally:
        for folder in folders:
            discard_partials(folder)
    return sliced


def _training_rows(config: SliceConfig) -> pd.DataFrame:
    """The training rows of the table, sorted by `tile_id`, all with files."""
    if config.materialize and config.output_dir.resolve() == config.data_dir.resolve():
        raise ConfigError(
            f"--output_dir {config.output_dir} is --data_dir: tiles would lie among their images; "
            "choose another folder"
        )
    path = config.metadata_fp
    table = tables.read_table(path, ("tile_id", "original_split"))
    rows = table[table["original_split"] == TRAIN].copy()
    if rows.empty:
        raise TableError(f"{path}: the table has no row whose original_split is {TRAIN}")
    rows["tile_id"] = rows["tile_id"].astype(str)
    repeated = rows["tile_id"][rows["tile_id"].duplicated()]
    if len(repeated):
        raise TableError(f"{path}: two rows have the tile_id {repeated.iloc[0]}")
    rows = rows.sort_values("tile_id", ignore_index=True)
    longest = max(rows["tile_id"], key=lambda name: len(os.fsencode(name)))
    for source in _sources(config, longest):
        check_name(config.output_dir / _tile_name(source.stem, 99999, 99999))
    files = [source for tile_id in rows["tile_id"] for source in _sources(config, tile_id)]
    tables.require_files(files, path)
    return rows


def _sources(config: SliceConfig, tile_id: str) -> tuple[Path, Path]:
    """Image and mask of a row, whatever paths the table holds."""
    return (
        config.data_dir / IMAGES / f"{tile_id}{IMAGE_SUFFIX}",
        config.data_dir / MASKS / f"{tile_id}{MASK_SUFFIX}",
    )


def _grid(config: SliceConfig, shape: Shape) -> TileGrid:
    stride = config.stride or config.image_size
    return TileGrid(shape, config.image_size, config.image_size - stride, edge="pad")


def _slice_image(config: SliceConfig, tile_id: str) -> _Sliced:
    """Facts of the tiles of one image; writes their files unless the dataset is virtual."""
    image_path, mask_path = _sources(config, tile_id)
    with Scene(image_path, config.band_order) as scene:
        stored, hidden, pixels = scene.read_stored()
        form = image_format(scene, named=bool(config.band_order)) if config.materialize else None
        georeference, shape = scene.georeference, scene.shape
    require_same_grid(image_path, mask_path, config.ignore_georeference)
    mask = read_mask(mask_path, kelp_value=config.kelp_value)
    tiles = list(_grid(config, shape))
    water = WaterReference.estimate(_Held(pixels))
    facts = tile_facts(pixels, mask, [tile.clipped(shape) for tile in tiles])
    kept = facts["valid_pixels_pct"] >= config.min_valid_fraction
    tiles = [tile for tile, keep in zip(tiles, kept, strict=True) if keep]
    if form is not None:
        mask_reference = georeference_of(mask_path)
        for tile in tiles:
            for folder, path, array, missing, kind, reference in (
                (IMAGES, image_path, stored, hidden, form, georeference),
                (MASKS, mask_path, mask[np.newaxis], None, MASK_FORMAT, mask_reference),
            ):
                target = config.output_dir / folder / _tile_name(path.stem, tile.x, tile.y)
                content = encode(cut(array, tile, kind, missing), kind, reference.shifted(tile))
                put(target, content)
    return _Sliced(
        np.array([tile.x for tile in tiles], dtype=np.int64),
        np.array([tile.y for tile in tiles], dtype=np.int64),
        {name: column[kept] for name, column in facts.items()},
        np.array([water.level(tile) for tile in tiles]).reshape(-1, len(tables.WATER)),
        int(np.count_nonzero(~kept)),
    )


def _tile_name(stem: str, x: int, y: int) -> str:
    return f"{stem}_{x}_{y}.tif"


def _tile_table(config: SliceConfig, rows: pd.DataFrame, sliced: list[_Sliced]) -> pd.DataFrame:
    """The table of tiles, sorted by `(tile_id, y, x)`; `sliced` is in the order of `rows`."""
    counts = [len(one.x) for one in sliced]
    if not sum(counts):
        raise InputError(
            f"--min_valid_fraction {config.min_valid_fraction}: no tile has as many observed "
            f"pixels in {config.data_dir}; choose a smaller fraction"
        )
    parent = np.repeat(np.arange(len(rows)), counts)
    x = np.concatenate([one.x for one in sliced])
    y = np.concatenate([one.y for one in sliced])
    own: dict[str, Any] = {"tile_id": rows["tile_id"].to_numpy()[parent], "x": x, "y": y}
    for name in tables.FACTS:
        own[name] = np.concatenate([one.facts[name] for one in sliced])
    for band, name in enumerate(tables.WATER):
        own[name] = np.concatenate([one.water[:, band] for one in sliced])
    sources = [_sources(config, tile_id) for tile_id in rows["tile_id"]]
    for kind, folder, files in (
        ("image", IMAGES, [image for image, _ in sources]),
        ("mask", MASKS, [mask for _, mask in sources]),
    ):
        names = (
            f"{folder}/{_tile_name(files[row].stem, column, line)}" if config.materialize else None
            for row, column, line in zip(parent, x, y, strict=True)
        )
        own[f"{kind}_path"] = pd.array(list(names), dtype="string")
        relative = np.array([_relative(path, config.output_dir) for path in files], dtype=object)
        own[f"source_{kind}_path"] = relative[parent]
    own["tile_height"] = own["tile_width"] = np.full(len(x), config.image_size, dtype=np.int64)
    inherited = [name for name in rows.columns if name not in own]
    table = rows[inherited].iloc[parent].reset_index(drop=True).assign(**own)
    others = [name for name in rows.columns if name not in tables.TILE_KEY]
    order = [*tables.TILE_KEY, *others, *(n for n in own if n not in rows.columns)]
    return table[list(dict.fromkeys(order))]


def _relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with links resolved: `..` does not go back through a link."""
    real, start = path.parent.resolve() / path.name, folder.resolve()
    try:
        return Path(os.path.relpath(real, start)).as_posix()
    except ValueError:  # another drive of Windows
        return real.as_posix()


def _tell_size(config: SliceConfig, rows: pd.DataFrame) -> None:
    """Say how much will be written, estimated from some tiles of the first image."""
    sources = [_sources(config, tile_id)[0] for tile_id in rows["tile_id"]]
    found = attempt(partial(_size, config), sources[0])
    if isinstance(found, Failure):  # it will be named
        return
    tiles, one = found
    # The other images compress about as well as their own files tell.
    weights = [path.stat().st_size for path in sources]
    size = one * sum(weights) / weights[0]
    log.info(
        "slicing %d images into about %d tiles of %d x %d px, about %.3g MB in %s",
        len(sources),
        tiles * len(sources),
        config.image_size,
        config.image_size,
        size / 1e6,
        config.output_dir,
    )


def _size(config: SliceConfig, image: Path) -> tuple[int, float]:
    """Number of tiles of an image, and about how many bytes they take."""
    with Scene(image, config.band_order, quiet=True) as scene:
        tiles = list(_grid(config, scene.shape))
        form = image_format(scene, named=False)
        stored, hidden, _ = scene.read_stored()
    probes = tiles[:: -(-len(tiles) // _PROBES)]
    written = [
        len(encode(cut(stored, tile, form, hidden), form, Georeference())) for tile in probes
    ]
    return len(tiles), sum(written) / len(written) * len(tiles)


def _tell_strangers(config: SliceConfig, table: pd.DataFrame) -> None:
    """Say so when tiles of an earlier slice, with other settings, lie beside the new ones."""
    known = {Path(path).name for path in table["image_path"]}
    found = {entry.name for entry in os.scandir(config.output_dir / IMAGES)}
    if unknown := sorted(found - known):
        log.warning(
            "%s: %d files are not of this slice, %s for one; the table does not name them",
            config.output_dir / IMAGES,
            len(unknown),
            unknown[0],
        )
