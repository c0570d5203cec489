"""`kelp simulate`: a data set of simulated scenes in the layout of the competition."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.io import MemoryFile

import kelp
from kelp.data_prep.tile_files import put
from kelp.errors import ConfigError
from kelp.io.executors import spread
from kelp.io.files import discard_partials, output_folder, write_text
from kelp.progress import Progress, silent
from kelp.raster.masks import suppress_georef_warnings
from kelp.raster.window import Shape
from kelp.simulation.scene import SimulatedScene, make_place, take_picture
from kelp.simulation.world import WORLDS
from kelp.tables import IMAGE_SUFFIX, MASK_SUFFIX, TEST, TRAIN

if TYPE_CHECKING:
    from kelp.config import SimulateConfig

PLACES_TABLE: Final = "places.csv"
NOTE: Final = "SIMULATED.md"
TRUTH: Final = "{split}_truth"

_OFFSET: Final = 200 / 350  # largest offset between pictures of a place, in image sides
_IDS: Final = 26**2 * 10**6
_STRIDE, _FIRST = 412_654_757, 52_807_345  # a prime: different numbers, different names


@dataclass(frozen=True)
class SimulationResult:
    """What `simulate` made.

    Attributes:
        folder: the data folder.
        train: number of training images.
        test: number of test images.
        places: number of places.
        kelp_images: images with kelp in them.
    """

    folder: Path
    train: int
    test: int
    places: int
    kelp_images: int

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.train} training and {self.test} test images (SIMULATED) of {self.places} "
            f"places, {self.kelp_images} with kelp: {self.folder}"
        )


class _Job(NamedTuple):
    """All pictures of one place."""

    split: str
    place: int
    tile_ids: tuple[str, ...]


class _Picture(NamedTuple):
    """A row of the table of places, and whether there is kelp."""

    tile_id: str
    split: str
    place: int
    date: int
    dy: int
    dx: int
    has_kelp: bool


def simulate(config: SimulateConfig, progress: Progress = silent) -> SimulationResult:
    """Write simulated images and masks as the competition lays them out.

    `train/masks` hold labels as volunteers draw them, `train_truth` and `test_truth` the truth.
    The bytes depend on the options and the seed, not on the number of workers. `SIMULATED.md` is
    written last: without it a run was not finished.

    Raises:
        ConfigError: `output_dir` holds images that are not of this run.
        InputError: `output_dir` cannot be written.
    """
    jobs = _jobs(config)
    folders = _folders(config, jobs)
    for name in (NOTE, PLACES_TABLE):
        (config.output_dir / name).unlink(missing_ok=True)
    pictures: list[_Picture] = []
    total = sum(len(job.tile_ids) for job in jobs)
    work = spread(partial(_simulate_place, config), jobs, config.workers)
    try:
        with closing(work) as results:
            for rows in results:
                pictures += rows
                progress("simulating", len(pictures), total)
    finally:
        for folder in folders:
            discard_partials(folder)
    if hasattr(os, "sync"):
        os.sync()  # the images are on disk before the files that vouch for them
    _write_table(config, pictures)
    config.record(config.output_dir)
    write_text(config.output_dir / NOTE, _note(config))
    return SimulationResult(
        config.output_dir,
        config.places * config.dates,
        config.test,
        len(jobs),
        sum(picture.has_kelp for picture in pictures),
    )


def tile_name(number: int, seed: int) -> str:
    """Identifier of the form AB123456; different numbers have different ones."""
    code = (number * _STRIDE + seed * 7919 + _FIRST) % _IDS
    letters, digits = divmod(code, 10**6)
    first, second = divmod(letters, 26)
    return f"{chr(65 + first)}{chr(65 + second)}{digits:06d}"


def _jobs(config: SimulateConfig) -> list[_Job]:
    # Even numbers are training images, odd ones test images: more of one kind renames none.
    train = [
        tuple(
            tile_name(2 * (place * config.dates + date), config.seed)
            for date in range(config.dates)
        )
        for place in range(config.places)
    ]
    jobs = [_Job(TRAIN, place, ids) for place, ids in enumerate(train)]
    for index in range(config.test):
        tile_id = tile_name(2 * index + 1, config.seed)
        jobs.append(_Job(TEST, config.places + index, (tile_id,)))
    return jobs


def _folders(config: SimulateConfig, jobs: list[_Job]) -> list[Path]:
    """Make the folders of the layout; images of another run must not lie among these."""
    out = config.output_dir
    ids = {TRAIN: set[str](), TEST: set[str]()}
    for job in jobs:
        ids[job.split].update(job.tile_ids)
    folders = []
    for split, known in ids.items():
        kinds = [(out / split / "images", IMAGE_SUFFIX), (_truth(out, split), MASK_SUFFIX)]
        if split == TRAIN:
            kinds.append((out / split / "masks", MASK_SUFFIX))
        for folder, suffix in kinds:
            for path in sorted(folder.glob("[!.]*")):
                if path.name.removesuffix(suffix) not in known:
                    raise ConfigError(
                        f"--output_dir {out} holds other data ({path}); choose an empty folder"
                    )
            folders.append(output_folder(folder))
    return folders


def _truth(folder: Path, split: str) -> Path:
    return folder / TRUTH.format(split=split)


def _rng(config: SimulateConfig, job: _Job, date: int | None = None) -> np.random.Generator:
    """Randomness of a place, or of one picture of it, whoever draws it when."""
    index = job.place if job.split == TRAIN else job.place - config.places
    key = (job.split == TEST, index) if date is None else (job.split == TEST, index, date)
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key))


def _simulate_place(config: SimulateConfig, job: _Job) -> list[_Picture]:
    """Make and write all pictures of a place."""
    size = config.size
    room = round(_OFFSET * size) if len(job.tile_ids) > 1 else 0
    place = make_place(_rng(config, job), Shape(size + room, size + room), WORLDS[config.world])
    rows = []
    for date, tile_id in enumerate(job.tile_ids):
        rng = _rng(config, job, date)
        dy, dx = (int(offset) for offset in rng.integers(0, room + 1, 2))
        scene = take_picture(rng, place, (dy, dx), Shape(size, size))
        _write(config.output_dir, job.split, tile_id, scene)
        has_kelp = bool(scene.truth.any())
        rows.append(_Picture(tile_id, job.split, job.place, date, dy, dx, has_kelp))
    return rows


def _write(out: Path, split: str, tile_id: str, scene: SimulatedScene) -> None:
    put(out / split / "images" / f"{tile_id}{IMAGE_SUFFIX}", _encode(scene.pixels))
    name = f"{tile_id}{MASK_SUFFIX}"
    put(_truth(out, split) / name, _encode(scene.truth[np.newaxis].astype(np.int8)))
    if split == TRAIN:
        put(out / split / "masks" / name, _encode(scene.label[np.newaxis].astype(np.int8)))


def _encode(pixels: NDArray[Any]) -> bytes:
    """A GeoTIFF as those of the competition: LZW, pixel interleaved, no CRS, no nodata tag."""
    count, height, width = pixels.shape
    with suppress_georef_warnings(), MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=pixels.dtype,
            compress="lzw",
            interleave="pixel",
        ) as dataset:
            dataset.write(pixels)
        return bytes(memory.getbuffer())


def _write_table(config: SimulateConfig, pictures: list[_Picture]) -> None:
    def lines() -> Iterator[str]:
        yield "tile_id,split,place,date,dy,dx"
        for row in pictures:
            yield ",".join(str(value) for value in row[:-1])

    write_text(config.output_dir / PLACES_TABLE, "\n".join(lines()) + "\n")


def _note(config: SimulateConfig) -> str:
    return f"""# SIMULATED data

Every image and mask in this folder was made by `kelp simulate` (kelp {kelp.__version__}). Nothing
here was seen by a satellite or drawn by a person. The scenes imitate published statistics of the
Landsat tiles of the Kelp Wanted competition; they are for tests, the demo and benchmarks only. A
score on them says nothing of how well kelp is found on real scenes.

| setting | value |
|---|---|
| training places | {config.places} |
| images of each place | {config.dates} |
| test images, each of a place of its own | {config.test} |
| side of an image | {config.size} px |
| world | {config.world} |
| seed | {config.seed} |

- `train/images`, `test/images`: int32, bands SWIR, NIR, R, G, B, QA, DEM; missing = -32768.
- `train/masks`: labels as volunteers draw them: shifted, incomplete, at times false.
- `train_truth`, `test_truth`: where the kelp really is.
- `{PLACES_TABLE}`: which images show one place, and the offset `dy`, `dx` (px) within it.
"""
