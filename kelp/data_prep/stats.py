"""`kelp stats`: statistics of every band and spectral index of training images, or of scenes.

Statistics are over observed values only. What training later puts in place of missing ones
(`fill_missing_pixels_with_torch_nan`: the channel's minimum, or 0) is in the file's name and its
`_about`, but moves no number: a filled-in value was never observed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kelp import __version__, tables
from kelp.config.scenes import SceneOptions
from kelp.errors import ConfigError, TableError
from kelp.io.executors import gather, spread
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.files import input_folder, output_folder
from kelp.io.location import Url, local
from kelp.progress import Progress, silent
from kelp.raster.bands import BANDS
from kelp.raster.indices import IndexSettings, channel_names, index_planes, parse_indices
from kelp.raster.scene import Scene
from kelp.raster.statistics import About, StatsFile
from kelp.raster.streaming import ChannelStats, ChannelSummary, unit_stats
from kelp.raster.window import Tile
from kelp.sensors import find_scenes, open_scene

if TYPE_CHECKING:
    import pandas as pd

    from kelp.config import StatsConfig
    from kelp.io.cluster import Cluster

__all__ = [
    "About",
    "ChannelStats",
    "Source",
    "StatsFile",
    "StatsResult",
    "channel_statistics",
    "compute_stats",
    "file_statistics",
]

log = logging.getLogger("kelp")

_SATELLITE: Final = tables.IMAGE_SUFFIX.removesuffix(".tif")
_TILE_COLUMNS: Final = {"image_path", "source_image_path", "tile_height", "tile_width"}

# Scenes are summed up in groups of this many, then the groups in order, with any number of
# workers: so the last bit of means and deviations does not depend on that number.
_GROUP: Final = 16

_STRIP: Final = 1 << 22
"""Pixels whose indices are in memory at a time."""


@dataclass(frozen=True)
class Source:
    """An image, or a window of one."""

    path: Path | Url
    tile: Tile | None = None

    def __str__(self) -> str:
        return str(self.path)


_Part = tuple[list[ChannelSummary], dict[Source, Failure]]
"""What files hold, and those that failed."""


@dataclass(frozen=True)
class StatsResult:
    """What `kelp stats` made."""

    path: Path
    """The statistics file."""
    rows: int
    """Images or tiles that were read."""
    channels: int
    """Bands and indices."""

    def summary(self) -> str:
        """One line for the user."""
        return f"{self.path}: {self.channels} channels of {self.rows} images"


def channel_statistics(
    scenes: Iterable[NDArray[np.float32]], channels: Sequence[str], settings: IndexSettings
) -> dict[str, ChannelStats]:
    """Statistics of canonical arrays (any sizes), each seen once.

    Args:
        scenes: canonical arrays; NaN (missing data, the padding of tiles) is left out.
        channels: names of bands and indices, as `kelp.raster.indices.channel_names` lists them.
        settings: index input and masks.
    """
    stream = iter(scenes)
    # One scene is in memory at a time: `_summarise` uses up a group before the next is begun.
    groups = (chain([first], islice(stream, _GROUP - 1)) for first in stream)
    return _merge(channels, (_summarise(group, channels, settings) for group in groups))


def file_statistics(
    sources: Sequence[Source],
    channels: Sequence[str],
    settings: IndexSettings,
    *,
    band_order: Sequence[str] = (),
    workers: int | Cluster = 1,
    progress: Progress = silent,
    failures: dict[Source, Failure] | None = None,
) -> dict[str, ChannelStats]:
    """`channel_statistics` of files, read by `workers` processes (0 = one for each core).

    `workers` may be a cluster, see `kelp.io.executors.gather`. Files that fail are noted in
    `failures` and left out.

    Law: the same numbers, to the last bit, whatever the number of workers. Raises `InputError`
    naming the files that cannot be read, unless there are `failures` to note them in.
    """
    noted: dict[Source, Failure] = {}
    groups = [sources[i : i + _GROUP] for i in range(0, len(sources), _GROUP)]
    work = partial(_summarise_files, channels, settings, band_order)

    def shown(parts: Iterable[_Part]) -> Iterator[list[ChannelSummary]]:
        for done, (part, failed) in enumerate(parts, start=1):
            noted.update(failed)
            if noted and failures is None:
                raise_failures(noted, len(sources), "images", None)
            progress("statistics", min(done * _GROUP, len(sources)), len(sources))
            yield part

    progress("statistics", 0, len(sources))
    with closing(spread(work, groups, workers)) as parts:
        merged = _merge(channels, shown(parts))
    if failures is not None:
        failures.update(noted)
    return merged


def compute_stats(config: StatsConfig, progress: Progress = silent) -> StatsResult:
    """Statistics of training images, one fold's, or scenes, as a file that `kelp train` takes.

    Images that fail are left out, and named when the file is written.

    Raises:
        InputError: unreadable images.
        BugError: a bug ended some images; the others are done.
        TableError: the table lacks a column, the fold, or files that it names.
    """
    config = config.absolute() if config.scheduler else config
    indices = parse_indices(config.spectral_indices)
    settings = config.index_settings
    sources = _sources(config)
    channels = channel_names(BANDS, indices)
    failures: dict[Source, Failure] = {}
    with gather(config.workers, config.scheduler) as workers:
        output_folder(config.output_dir)
        stats = file_statistics(
            sources,
            channels,
            settings,
            band_order=config.band_order,
            workers=workers,
            progress=progress,
            failures=failures,
        )
    read = len(sources) - len(failures)
    if not read:
        raise_failures(failures, len(sources), "images", config.output_dir)
    empty = [name for name, values in stats.items() if not values.count]
    if empty:
        log.warning("no image has a valid pixel of %s", ", ".join(empty))
    file = StatsFile(
        stats,
        About(
            cv_split=config.cv_split,
            row_count=read,
            **asdict(settings),
            fill_value="nan" if config.fill_missing_pixels_with_torch_nan else "0",
            version=__version__,
        ),
    )
    path = config.output_dir / file.name(datetime.now(UTC))
    file.save(path)
    config.record(config.output_dir)
    result = StatsResult(path, read, len(channels))
    raise_failures(failures, len(sources), "images", config.output_dir, result)
    return result


def _summarise(
    scenes: Iterable[NDArray[np.float32]], channels: Sequence[str], settings: IndexSettings
) -> list[ChannelSummary]:
    summaries = [ChannelSummary() for _ in channels]
    indices = [name for name in channels if name not in BANDS]
    for pixels in scenes:
        planes = dict(zip(BANDS, pixels, strict=True))
        planes |= zip(indices, index_planes(indices, planes, settings), strict=True)
        for name, summary in zip(channels, summaries, strict=True):
            summary.add(planes[name])
    return summaries


def _summarise_files(
    channels: Sequence[str],
    settings: IndexSettings,
    band_order: Sequence[str],
    sources: Sequence[Source],
) -> _Part:
    failures: dict[Source, Failure] = {}

    def scenes() -> Iterator[NDArray[np.float32]]:
        for source in sources:
            pixels = attempt(partial(_read, band_order), source)
            if isinstance(pixels, Failure):
                failures[source] = pixels
                continue
            rows = max(1, _STRIP // pixels.shape[2])
            for start in range(0, pixels.shape[1], rows):
                yield pixels[:, start : start + rows]

    return _summarise(scenes(), channels, settings), failures


def _read(band_order: Sequence[str], source: Source) -> NDArray[np.float32]:
    if source.tile is None:
        with open_scene(source.path, SceneOptions(band_order=tuple(band_order))) as scene:
            scene.check()
            return scene.read()
    with Scene(local(source.path), band_order, quiet=True) as image:
        image.check()
        # The last tiles of a table without files stick out of their image: nothing is there.
        return image.read(source.tile.clipped(image.shape))


def _merge(
    channels: Sequence[str], parts: Iterable[list[ChannelSummary]]
) -> dict[str, ChannelStats]:
    totals = [ChannelSummary() for _ in channels]
    for part in parts:
        for total, summary in zip(totals, part, strict=True):
            total.merge(summary)
    return {
        # QA is a flag: it goes into the network as 0 and 1, whatever its share.
        name: unit_stats(total.count, total.nan_count) if name == "QA" else total.stats()
        for name, total in zip(channels, totals, strict=True)
    }


def _sources(config: StatsConfig) -> list[Source]:
    """What to read: images of the folder, scenes, or the training rows of the table."""
    path = config.metadata_fp
    if path is None:
        if config.cv_split is not None:
            raise ConfigError("--cv_split needs --metadata_fp: the table that holds the folds")
        if isinstance(config.data_dir, Url) or not (config.data_dir / "images").is_dir():
            return [Source(scene) for scene in find_scenes(config.data_dir)]
        images = input_folder(config.data_dir / "images", f"*{_SATELLITE}*.tif", rasters=True)
        return [Source(image) for image in images]
    data_dir = local(config.data_dir)
    table = tables.read_table(path, ["tile_id", "original_split"])
    training = table["original_split"] == tables.TRAIN
    if config.cv_split is not None:
        training &= table[tables.fold_column(table, config.cv_split, path)] == tables.TRAIN
    rows = table[training]
    if rows.empty:
        raise TableError(f"{path}: has no training row; check the table and --cv_split")
    if set(tables.TILE_KEY) <= set(table.columns):
        absent = sorted(_TILE_COLUMNS - set(table.columns))
        if absent:
            raise TableError(f"{path}: lacks the column {', '.join(absent)}; make it again")
        sources = _tiles(rows, data_dir, path)
    else:
        names = rows["tile_id"].astype(str) + tables.IMAGE_SUFFIX
        sources = [Source(data_dir / "images" / name) for name in names]
    tables.require_files([local(source.path) for source in sources], path)
    return sources


def _tiles(rows: pd.DataFrame, data_dir: Path, table: Path) -> list[Source]:
    """Tiles of a sliced dataset: files of `data_dir`, or windows of images where it has none."""
    if rows["image_path"].notna().all():
        return [Source(data_dir / name) for name in rows["image_path"]]
    windows = zip(
        rows["source_image_path"],
        rows["y"],
        rows["x"],
        rows["tile_height"],
        rows["tile_width"],
        strict=True,
    )
    return [
        Source(table.parent / image, Tile(int(y), int(x), int(height), int(width)))
        for image, y, x, height, width in windows
    ]
