"""The few validation samples that a run is watched by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kelp.nn.data.dataset import TileDataset

SET_SIZE: Final = 6
_MOST, _SOME = 3, 2
"""Of a set: samples with the most kelp, and with some; the others have none."""
_COUNTED: Final = 64  # samples that are read where the table has no counts of kelp


def choose(rows: pd.DataFrame, data: TileDataset, sets: int) -> list[int]:
    """Numbers of the rows to picture, in sets of six; the same for the same rows.

    A set holds three of the rows with the most kelp, two with some and one without, of different
    images where there are enough. A second set is chosen from what the first one leaves.

    Args:
        rows: of a table of images or tiles.
        data: the same rows as samples, read where the table does not say how much kelp they hold.
        sets: at most.
    """
    kelp = _kelp(rows, data)
    # Without kelp the most telling are seen well, and lie on the shore.
    unseen, off_shore = (
        (1 - _fact(rows, "valid_pixels_pct")).round(1),
        _fact(rows, "water_pixels_pct"),
    )
    order = np.lexsort((abs(off_shore - 0.5), unseen, -kelp))
    left = [int(i) for i in order if np.isfinite(kelp[i])]
    images = rows["tile_id"].astype(str).to_list()
    chosen: list[int] = []
    for _ in range(sets):
        chosen += _set(left, kelp, images)
        left = [i for i in left if i not in chosen[-SET_SIZE:]]
    return chosen


def _set(left: Sequence[int], kelp: NDArray[np.float64], images: Sequence[str]) -> list[int]:
    """Six rows, as far as there are so many, of those that are left: the most kelp first."""
    with_kelp = [i for i in left if kelp[i] > 0]
    # From the middle outwards: neither a forest again, nor a few pixels.
    places = sorted(range(len(with_kelp)), key=lambda place: abs(place - len(with_kelp) // 2))
    chosen: list[int] = []
    for rows, wanted in (
        (with_kelp, _MOST),
        ([with_kelp[place] for place in places], _MOST + _SOME),
        (left[len(with_kelp) :], SET_SIZE),
        (left, SET_SIZE),
    ):
        _add(chosen, rows, wanted, images)
    return sorted(chosen, key=lambda i: (-kelp[i], i))


def _add(chosen: list[int], rows: Sequence[int], wanted: int, images: Sequence[str]) -> None:
    """Fill up to `wanted` with rows of images that are not there yet, then with any."""
    for only_new in (True, False):
        for i in rows:
            if len(chosen) >= wanted:
                return
            if i not in chosen and not (only_new and images[i] in {images[k] for k in chosen}):
                chosen.append(i)


def _kelp(rows: pd.DataFrame, data: TileDataset) -> NDArray[np.float64]:
    """Kelp pixels of each row; NaN where nobody knows."""
    if "kelp_pixels" in rows.columns and rows["kelp_pixels"].notna().all():
        return _fact(rows, "kelp_pixels")
    counts = np.full(len(rows), np.nan)
    for i in np.unique(np.linspace(0, len(rows) - 1, _COUNTED).astype(int)):
        counts[i] = int((data[int(i)].target == 1).sum())
    return counts


def _fact(rows: pd.DataFrame, name: str) -> NDArray[np.float64]:
    values = rows[name] if name in rows.columns else pd.Series(0.0, rows.index)
    return np.asarray(values.fillna(0.0), dtype=np.float64)
