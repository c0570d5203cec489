"""Facts of images and tiles: what their pixels hold, in numbers (columns of the tables)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.raster.bands import DEM, QA
from kelp.raster.validity import observed
from kelp.raster.window import Tile

ALMOST_ALL: Final = 0.98
HIGH_KELP: Final = 0.4
KELP_FACTS: Final = ("kelp_pixels", "kelp_pixels_pct", "has_kelp", "high_kelp_pixels_pct")
"""The facts that only a mask tells."""

Fact = int | float | bool | None


def tile_facts(
    pixels: NDArray[np.float32], mask: NDArray[np.uint8], tiles: Sequence[Tile]
) -> dict[str, NDArray[Any]]:
    """Facts of tiles inside an image: the columns `kelp.tables.FACTS`, a row for each tile.

    `facts` of each tile gives the same (a property test says so); here every pixel is classified
    once, however many tiles it lies in: a virtual dataset costs little beside reading the images.
    `pixels` is a canonical array `(7, height, width)`, `mask` uint8 `(height, width)`, 1 = kelp.
    """
    dem = pixels[DEM]
    planes = {
        "kelp": mask == 1,
        "bad": pixels[QA] == 1,
        "dem": dem >= 0,  # unknown, NaN, is not
        "sea": dem == 0,
        "land": dem > 0,
        "seen": observed(pixels),
    }
    counts = {
        name: np.array([np.count_nonzero(plane[tile.slices]) for tile in tiles], dtype=np.int64)
        for name, plane in planes.items()
    }
    size = np.array([tile.height * tile.width for tile in tiles], dtype=np.int64)
    kelp = counts["kelp"] / size
    water = (size - counts["land"]) / size
    return {
        "kelp_pixels": counts["kelp"],
        "kelp_pixels_pct": kelp,
        "has_kelp": counts["kelp"] > 0,
        "qa_corrupted_pixels_pct": counts["bad"] / size,
        "qa_ok": counts["bad"] == 0,
        "dem_nan_pixels_pct": (size - counts["dem"]) / size,
        "dem_zero_pixels_pct": counts["sea"] / size,
        "water_pixels_pct": water,
        "almost_all_water": water > ALMOST_ALL,
        "valid_pixels_pct": counts["seen"] / size,
        "high_kelp_pixels_pct": kelp > HIGH_KELP,
    }


def facts(pixels: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> dict[str, Fact]:
    """Facts of an image or tile, keyed by `kelp.tables.FACTS`.

    `*_pct` are shares, 0-1, of all pixels given, so give no padding. A DEM value that is NaN or
    negative is unknown (`dem_nan_pixels_pct`), and unknown counts as water.

    Args:
        pixels: canonical array `(7, height, width)`.
        mask: uint8 `(height, width)`, 1 = kelp; without one facts about kelp are None.
    """
    shape = pixels.shape[1], pixels.shape[2]
    seen = np.zeros(shape, np.uint8) if mask is None else mask
    columns = tile_facts(pixels, seen, [Tile(0, 0, *shape)])
    values: dict[str, Fact] = {name: column[0].item() for name, column in columns.items()}
    if mask is None:
        values.update(dict.fromkeys(KELP_FACTS))
    return values
