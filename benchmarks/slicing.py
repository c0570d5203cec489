"""Speed of `kelp slice` against a plain loop, and the choice of the tiles' file format.

    python benchmarks/slicing.py [--data_dir DIR] [--images 40] [--repeats 5] [--formats]

The plain loop, in one process, opens the source, reads a window, pads it, and writes it with
`rasterio.open(..., "w")` at the compression of `kelp slice`, for each tile and its mask. It has
no table to make. Loop, materialised and virtual slicing run in turn, and each repeat gives one
ratio; the median is printed. `--data_dir` holds `images/` and `masks/`; without it the real scene
of the package is copied, each copy turned and moved, so that no two files are alike.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import pandas as pd
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from kelp.config import SliceConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.data_prep.tile_files import COMPRESSION
from kelp.tiling.grid import TileGrid

SIZE = 128
TARGETS = {"materialised": 1.8, "virtual": 20.0}


def copies_of_scene(scene: Path, folder: Path, count: int) -> None:
    """`count` variants of a scene, stored as it is, with masks of a few patches."""
    with rasterio.open(scene) as source:
        pixels, profile = source.read(), source.profile
    rng = np.random.default_rng(0)
    flat = {"driver": "GTiff", "count": 1, "dtype": "int8", "compress": "lzw"}
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        moved = np.roll(pixels, rng.integers(0, 350, 2), axis=(1, 2))
        turned = np.rot90(moved, number % 4, axes=(1, 2))
        mask = np.zeros(turned.shape[1:], np.int8)
        for y, x in rng.integers(0, 330, (number % 5, 2)):
            mask[y : y + 14, x : x + 6] = 1
        with rasterio.open(folder / "images" / f"C{number:06d}_satellite.tif", "w", **profile) as o:
            o.write(turned)
        height, width = mask.shape
        with rasterio.open(
            folder / "masks" / f"C{number:06d}_kelp.tif", "w", height=height, width=width, **flat
        ) as out:
            out.write(mask, 1)


def plain_loop(data_dir: Path, output_dir: Path, ids: Iterable[str]) -> None:
    """The slicing that everybody writes first."""
    for tile_id in ids:
        with rasterio.open(data_dir / "images" / f"{tile_id}_satellite.tif") as source:
            shape = source.shape
        for tile in TileGrid(shape, SIZE, edge="pad"):
            part = tile.clipped(shape)
            window = Window(part.x, part.y, part.width, part.height)
            for folder, stem, fill, dtype in (
                ("images", f"{tile_id}_satellite", -32768, None),
                ("masks", f"{tile_id}_kelp", 255, "uint8"),
            ):
                with rasterio.open(data_dir / folder / f"{stem}.tif") as source:
                    values = source.read(window=window)
                    transform = source.window_transform(window)
                padded = np.full((len(values), SIZE, SIZE), fill, dtype or values.dtype)
                padded[:, : part.height, : part.width] = values
                with rasterio.open(
                    output_dir / folder / f"{stem}_{tile.x}_{tile.y}.tif",
                    "w",
                    height=SIZE,
                    width=SIZE,
                    count=len(values),
                    dtype=padded.dtype,
                    nodata=fill,
                    transform=transform,
                    blockysize=SIZE,
                    **COMPRESSION,
                ) as out:
                    out.write(padded)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(data_dir: Path, ids: list[str], repeats: int, root: Path) -> None:
    """Print images per second of the three ways, and the medians of their paired ratios."""
    table = root / "table.parquet"
    pd.DataFrame({"tile_id": ids, "original_split": "train"}).to_parquet(table)
    times: dict[str, list[float]] = {"plain loop": [], **{name: [] for name in TARGETS}}

    def sliced(name: str) -> None:
        slice_dataset(
            SliceConfig(
                data_dir=data_dir,
                metadata_fp=table,
                output_dir=root / name,
                image_size=SIZE,
                materialize=name == "materialised",
            )
        )

    for repeat in range(repeats + 1):  # the first warms the file cache and is not counted
        for name in times:
            shutil.rmtree(root / name, ignore_errors=True)
            if name in TARGETS:
                spent = seconds(lambda name=name: sliced(name))
            else:
                for folder in ("images", "masks"):
                    (root / name / folder).mkdir(parents=True)
                spent = seconds(lambda name=name: plain_loop(data_dir, root / name, ids))
            if repeat:
                times[name].append(spent)
    print(f"{len(ids)} images, {len(os.sched_getaffinity(0))} cores, {repeats} paired runs")
    for name, spent in times.items():
        rate = len(ids) / statistics.median(spent)
        ratio = statistics.median(a / b for a, b in zip(times["plain loop"], spent, strict=True))
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"{name:>12}: {rate:7.1f} images/s, {ratio:5.2f} x the plain loop{target}")


def formats(image: Path, folder: Path) -> None:
    """Print write time, read time and size of the tiles of an image in lossless formats."""
    with rasterio.open(image) as source:
        grid = [t for t in TileGrid(source.shape, SIZE) if t.clipped(source.shape) == t]
        tiles = [source.read(window=Window(t.x, t.y, t.width, t.height)) for t in grid]
    choices: list[dict[str, Any]] = [
        {"compress": "lzw", "interleave": "pixel"},
        {"compress": "lzw", "predictor": 2, "interleave": "band"},
    ]
    choices += [
        {"compress": "deflate", "zlevel": level, "predictor": predictor, "interleave": interleave}
        for interleave in ("pixel", "band")
        for predictor in (1, 2)
        for level in (1, 2, 3, 6)
    ]
    files = [folder / f"{i}.tif" for i in range(len(tiles))]

    def write(choice: dict[str, Any]) -> None:
        for path, tile in zip(files, tiles, strict=True):
            with rasterio.open(
                path,
                "w",
                driver="GTiff",
                count=len(tile),
                height=SIZE,
                width=SIZE,
                dtype=tile.dtype,
                blockysize=SIZE,
                **choice,
            ) as out:
                out.write(tile)

    def read() -> None:
        for path in files:
            with rasterio.open(path) as source:
                source.read()

    for choice in choices:
        spent = [(seconds(lambda choice=choice: write(choice)), seconds(read)) for _ in range(7)]
        written, fetched = (min(column) / len(tiles) * 1e3 for column in zip(*spent, strict=True))
        size = sum(path.stat().st_size for path in files) / len(files) / 1e3
        print(f"write {written:5.2f} ms  read {fetched:5.2f} ms  {size:6.1f} kB a tile  {choice}")


def main() -> None:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--scene", type=Path, default=measuring.SCENE)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--formats", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    logging.getLogger("kelp").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data_dir = options.data_dir
        if data_dir is None:
            data_dir = root / "source"
            copies_of_scene(options.scene, data_dir, options.images)
        images = sorted((data_dir / "images").glob("*_satellite.tif"))[: options.images]
        if options.formats:
            formats(images[0], root)
            return
        ids = [path.name.removesuffix("_satellite.tif") for path in images]
        compare(data_dir, ids, options.repeats, root)


if __name__ == "__main__":
    main()
