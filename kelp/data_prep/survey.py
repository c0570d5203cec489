"""The facts of one image: what its pixels hold, in numbers (columns of the table of images)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.data_prep.facts import tile_facts
from kelp.raster.window import Tile

KELP_FACTS: Final = ("kelp_pixels", "kelp_pixels_pct", "has_kelp", "high_kelp_pixels_pct")
"""The facts that only a mask tells."""

Fact = int | float | bool | None


def facts(pixels: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> dict[str, Fact]:
    """Facts of an image or tile, keyed by `manifest.FACTS`.

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
