"""Checks before the network runs: is this the kind of data that the bundle knows?"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.data_prep.stats import StatsFile
from kelp.errors import BundleError, InputError
from kelp.inference.spec import BundleSpec
from kelp.raster import indices
from kelp.raster.bands import BANDS, OPTICAL
from kelp.raster.scene import Scene, sample_of
from kelp.raster.validity import observed
from kelp.raster.window import RasterSource

log = logging.getLogger("kelp")

_SAMPLE_SIDE: Final = 256  # pixels a side: enough for a median
# How far a median may lie outside q01-q99, in widths of that range. Nothing is darker than water,
# which other scales are; but a scene may well be brighter (haze, snow, sand) than the training's.
_SLACK_BELOW: Final = 0.25
_SLACK_ABOVE: Final = 1.0

_FEW: Final = 500
"""Of fewer pixels of land, or of sea, the order of bands is not told."""
_BRIGHTER: Final = 1.5
_BRIGHTER_DN: Final = 2500
"""Land is brighter than sea in the infrared above all; snow is as bright in NIR as in the visible.
Bright water above a wrong DEM is not so much brighter than dark."""


def needed_bands(spec: BundleSpec) -> tuple[str, ...]:
    """The bands a scene must hold: the network's own, and those of its indices and masks."""
    return indices.needed_bands(spec.bands, spec.spectral_indices, spec.index_settings)


def check_statistics(spec: BundleSpec, folder: Path) -> None:
    """Compare the statistics file that the bundle names with the one in `folder`.

    Raises `BundleError` where they differ; a folder without that file is one line of notice.
    """
    if not folder.is_dir():
        raise InputError(f"--dataset_stats_dir {folder}: no such folder")
    path = folder / spec.stats_file if spec.stats_file else None
    if path is None or not path.is_file():
        name = spec.stats_file or "none: the run computed its own"
        log.info("%s: not there to compare (%s); using the bundle's numbers", folder, name)
        return
    channels = StatsFile.load(path).channels
    for name in spec.channels:
        if channels.get(name) != spec.statistics[name]:
            raise BundleError(
                f"{path}: other numbers for {name} than the bundle was trained with; "
                "leave --dataset_stats_dir out, or point it to the run's own file"
            )


def check_scale(source: RasterSource, specs: Sequence[BundleSpec], name: str) -> None:
    """Raise `InputError` where a scene's optical values are on another scale than the bundles'.

    Compared are the medians of observed pixels with the bundle's q01-q99, give or take; and the
    contrast of land to sea between bands, which tells them apart.

    Args:
        source: the scene; a sample of it is read.
        specs: of the bundles.
        name: what messages call it.
    """
    side = _SAMPLE_SIDE
    sample = source.sample(side) if isinstance(source, Scene) else sample_of(source, side)
    sample = sample[:, observed(sample)]
    if not sample.size:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a band that is missing everywhere
        medians = dict(zip(BANDS, np.nanmedian(sample, axis=1).tolist(), strict=True))
    for spec in specs:
        odd = []
        for band in (band for band in OPTICAL if band in spec.statistics):
            stats, median = spec.statistics[band], medians[band]
            width = stats.q99 - stats.q01
            low, high = stats.q01 - _SLACK_BELOW * width, stats.q99 + _SLACK_ABOVE * width
            if np.isfinite(median) and not low <= median <= high:
                odd.append(
                    f"{band} has median {median:.4g}, trained on {stats.q01:.6g}-{stats.q99:.6g}"
                )
        if odd:
            found = _name_scale([medians[band] for band in OPTICAL if np.isfinite(medians[band])])
            raise InputError(f"{name}: {found} ({'; '.join(odd)})")
    _check_order(sample, name)


def _check_order(sample: NDArray[np.float32], name: str) -> None:
    """Raise `InputError`, or warn, where land and sea say that bands are in another order."""
    elevation = sample[BANDS.index("DEM")]
    land, sea = sample[:5, elevation > 0], sample[:5, elevation <= 0]
    if min(land.shape[1], sea.shape[1]) < _FEW:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        contrast = np.nanmedian(land, axis=1) - np.nanmedian(sea, axis=1)
    if not np.isfinite(contrast).all():
        return
    infrared, visible = contrast[:2], contrast[2:]
    words = ", ".join(f"{band} {c:.0f}" for band, c in zip(OPTICAL, contrast, strict=True))
    words = f"{name}: land is brighter than sea by {words}: bands in another order"
    if visible.max() > _BRIGHTER * max(infrared.max(), 0) + _BRIGHTER_DN:
        raise InputError(f"{words}; name them as they lie with --band_order")
    if visible.max() > _BRIGHTER * max(infrared.min(), 0) + _BRIGHTER_DN:
        log.warning("%s (--band_order), or snow; the map may be wrong", words)


def _name_scale(medians: list[float]) -> str:
    if all(-0.5 <= value <= 2 for value in medians):
        return "looks like reflectance 0-1; rescale to (reflectance + 0.2) / 2.75e-5"
    if all(value < 6000 for value in medians):
        return "looks like Collection-1 values (reflectance x 10000); use Collection-2 Level-2"
    return "values far from the training data; check the bands (--band_order) and their scale"
