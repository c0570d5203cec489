"""Whether true masks mean by their values what kelp means: 0 = no kelp, 1 = kelp, 255 = unknown.

Many programs write masks of 0 and 255, where 255 is the object. Read as kelp's own they would be
"not observed" wherever there is kelp: an empty data set, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from kelp.errors import InputError
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import open_dataset, quietly
from kelp.raster.window import Tile

_ROWS: Final = 512


def require_kelp_value(masks: Iterable[Path], kelp_value: int = 1) -> None:
    """Raise `InputError` where a whole data set holds 0 and 255 only, and nothing says why.

    A data set without kelp is fine. So is one whose masks tag 255 as nodata: they say what it
    means. Reads masks until one holds kelp, in rows: memory grows with their width only.

    Args:
        masks: all masks of the data set.
        kelp_value: what the user says kelp is; another value than 1 is taken at that word.
    """
    if kelp_value != 1:
        return
    suspect: Path | None = None
    count = 0
    for path in masks:
        try:
            kelp, unexplained = _values(path)
        except InputError:  # whoever uses it names it, and it alone
            continue
        if kelp:
            return
        suspect = suspect or (path if unexplained else None)
        count += 1
    if suspect:
        others = f" and none of the {count} masks holds 1" if count > 1 else ""
        raise InputError(
            f"{suspect}: holds 0 and 255 only{others}; 255 means not observed. If it is kelp, give "
            "--kelp_value 255; if nothing was observed there, tag it "
            f"(gdal_edit.py -a_nodata 255 {suspect.name})"
        )


def _values(path: Path) -> tuple[bool, bool]:
    """Whether a mask holds 1, and whether it holds 255 without a nodata tag that explains it."""
    unexplained = False
    with open_dataset(path) as dataset, quietly(path):
        tagged = dataset.nodata == MASK_NODATA
        for strip in Tile(0, 0, dataset.height, dataset.width).strips(_ROWS):
            rows = dataset.read(1, window=strip.window)
            if np.any(rows == 1):
                return True, False
            unexplained = unexplained or (not tagged and bool(np.any(rows == MASK_NODATA)))
    return False, unexplained
