"""A tiny folder in competition layout, made without the simulator."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from kelp import tables

# Surfaces in Landsat Collection-2 integers: SWIR, NIR, R, G, B.
WATER = (7500, 7700, 7760, 8060, 8110)
LAND = (14800, 16350, 9950, 9800, 8900)
KELP = (7600, 9300, 7780, 8040, 8020)


@dataclass(frozen=True)
class World:
    """Where things lie: `data_dir` holds `train/` and `test/`, `table` describes the images."""

    data_dir: Path
    table: Path
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def train_dir(self) -> Path:
        return self.data_dir / "train"


def write_tif(path: Path, pixels: NDArray, **profile: object) -> Path:
    """Write `(bands, height, width)` as a GeoTIFF, LZW and pixel-interleaved as in competition."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    settings = {"compress": "lzw", "interleave": "pixel", "dtype": pixels.dtype, **profile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, **settings
        ) as out:
            out.write(pixels)
    return path


@contextmanager
def opened(path: Path, mode: str = "r") -> Iterator[Any]:
    """A raster opened with rasterio; that it has no georeference is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, mode) as dataset:
            yield dataset


def read_tif(path: Path) -> NDArray:
    """All bands of a raster as stored, `(bands, height, width)`."""
    with opened(path) as source:
        return source.read()


def coast(
    shape: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """An image, int32 `(7, height, width)`, and its mask, int8: a sloping shore with kelp off it.

    Some nodata, some clouds (QA = 1) and saturated pixels, each in a corner of its own.
    """
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    distance = columns - width * rng.uniform(0.3, 0.6) - rows * rng.uniform(-0.3, 0.3)
    land = distance < 0
    kelp = (distance > 3) & (distance < 3 + width // 8) & (rows % 16 < 10)
    image = np.empty((7, height, width), np.int32)
    for band, (sea, shore, canopy) in enumerate(zip(WATER, LAND, KELP, strict=True)):
        image[band] = np.where(land, shore, np.where(kelp, canopy, sea))
        image[band] += rng.normal(0, 60, shape).astype(np.int32)
    image[5] = (rows < height // 6) & (columns > width // 2)
    image[6] = np.where(land, 1 - distance // 2, 0)
    image[:5, image[5] == 1] = 65535
    image[:5, height - height // 8 :, : width // 5] = -32768
    image[6, height // 2 :, width - width // 10 :] = -32768
    return image, kelp.astype(np.int8)


def make_world(
    root: Path,
    n_train: int = 4,
    n_test: int = 2,
    shape: tuple[int, int] = (90, 70),
    seed: int = 0,
    folds: int = 2,
) -> World:
    """Write competition-layout images and masks below `root/raw`, and a table of `kelp metadata`.

    The table has the columns that other commands read: keys, splits, folds, facts and paths.
    """
    rng = np.random.default_rng(seed)
    data_dir = root / "raw"
    train = tuple(f"TR{i:06d}" for i in range(n_train))
    test = tuple(f"TE{i:06d}" for i in range(n_test))
    rows = []
    for number, tile_id in enumerate(train + test):
        split = "train" if tile_id in train else "test"
        image, mask = coast(shape, rng)
        write_tif(data_dir / split / "images" / f"{tile_id}_satellite.tif", image)
        if split == "train":
            write_tif(data_dir / split / "masks" / f"{tile_id}_kelp.tif", mask[np.newaxis])
        fold = {
            f"split_{k}": "test" if split == "test" else "val" if number % folds == k else "train"
            for k in range(folds)
        }
        share = float(mask.mean())
        facts = dict.fromkeys(tables.FACTS, 0.0) | {
            "kelp_pixels": int(mask.sum()),
            "kelp_pixels_pct": share,
            "has_kelp": share > 0,
            "qa_ok": False,
            "almost_all_water": False,
            "high_kelp_pixels_pct": False,
        }
        rows.append(
            {"tile_id": tile_id, "original_split": split, "aoi_id": number, "aoi_by_dem": True}
            | fold
            | facts
            | {
                "image_path": f"{split}/images/{tile_id}_satellite.tif",
                "mask_path": f"{split}/masks/{tile_id}_kelp.tif" if split == "train" else None,
            }
        )
    table = root / "processed" / tables.IMAGES_TABLE
    table.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(table, index=False)
    return World(data_dir, table, train, test)


def rgb_of(png: bytes) -> NDArray[np.uint8]:
    """The pixels of a picture, `(height, width, 3)`."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


def drawing(text: str) -> NDArray[np.uint8]:
    """A mask from a drawing: `#` kelp, `.` none, `?` 255."""
    rows = text.split()
    return np.uint8([[{"#": 1, ".": 0, "?": 255}[mark] for mark in row] for row in rows])
