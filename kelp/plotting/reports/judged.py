"""What the masks of a folder are worth: sums of every scene, and what sweeps of thresholds give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.config import ReportConfig
from kelp.errors import InputError
from kelp.evaluation.scoring import pixel_area_m2, places_of
from kelp.evaluation.thresholds import pixels_by_code
from kelp.io.files import input_folder
from kelp.nn.comparison.sums import (
    BINS,
    FIGURES,
    Draws,
    Sums,
    interval,
    sums_of,
    with_probabilities,
)
from kelp.progress import Progress
from kelp.raster.bands import DEM, MASK_NODATA
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.probability import CODES, quantise
from kelp.raster.scene import Scene
from kelp.tables import IMAGE_SUFFIX, MASK_SUFFIX, PROBABILITY_SUFFIX, tile_id_of
from kelp.tiling.seams import Steps

_HALF: Final = CODES // 2


@dataclass(frozen=True)
class Judged:
    """The sums of every scene.

    Attributes:
        names: tile ids, sorted.
        places: the place of each scene, numbered from 0.
        by_image: sums of each scene, at the masks' own decision.
        by_code: pixels without and with kelp for each code of probability, `(2, CODES + 1)`, over
            all scenes; `None` where a scene has no probabilities.
        draws: bootstrap draws of places.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]
    by_image: tuple[Sums, ...]
    by_code: NDArray[np.int64] | None
    draws: Draws

    @cached_property
    def total(self) -> Sums:
        """Of all scenes."""
        return Sums(np.sum([sums.values for sums in self.by_image], axis=0))

    @cached_property
    def _drawn(self) -> Sums:
        by_place = np.zeros((max(self.places) + 1, len(self.total.values)))
        np.add.at(by_place, list(self.places), [sums.values for sums in self.by_image])
        return self.draws.of(Sums(by_place))

    def figure(self, name: str) -> tuple[float | None, float | None, float | None]:
        """A figure and the middle 95 % of its bootstrap draws; `None` where undefined."""
        value = float(FIGURES[name](self.total))
        if not np.isfinite(value):
            return None, None, None
        return value, *(interval(FIGURES[name](self._drawn)) or (None, None))

    def dice(self) -> list[float]:
        """Pooled Dice of each scene; NaN without kelp, true or predicted."""
        return [float(FIGURES["pooled_dice"](sums)) for sums in self.by_image]

    def reliability(self) -> list[tuple[float | None, float | None]]:
        """Mean probability and share of kelp in each tenth of the probabilities."""
        rows: list[tuple[float | None, float | None]] = []
        for k in range(BINS):
            pixels, p, kelp = (
                float(self.total[f"bin_{part}_{k}"]) for part in ("pixels", "p", "kelp")
            )
            rows.append((p / pixels, kelp / pixels) if pixels else (None, None))
        return rows


@dataclass(frozen=True)
class Sweep:
    """Precision, recall and Dice at every threshold."""

    thresholds: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    dice: NDArray[np.float64]

    @classmethod
    def of(cls, by_code: NDArray[np.int64]) -> Sweep:
        """From pixels without and with kelp for each code; NaN where nothing is predicted."""
        false, true = by_code[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        kelp = by_code[1].sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(
                np.arange(1, CODES + 1) / CODES,
                true / (true + false),
                true / kelp,
                2 * true / (true + false + kelp),
            )


def judge(config: ReportConfig, progress: Progress) -> Judged:
    """Read every pair of masks, scene by scene.

    Raises:
        InputError: a prediction is missing (named), unreadable, or of another size.
        TableError: the metadata table has no row for a scene.
    """
    truths = {tile_id_of(path): path for path in input_folder(config.gt_dir, f"*{MASK_SUFFIX}")}
    found = {tile_id_of(path): path for path in input_folder(config.preds_dir, f"*{MASK_SUFFIX}")}
    absent = [name for name in truths if name not in found]
    if absent:
        raise InputError(
            f"{config.preds_dir}: no prediction for {absent[0]}, {len(absent)} of {len(truths)} "
            f"of {config.gt_dir} have none; predict these too, or take their truth away"
        )
    scenes = scenes_of(config, truths)
    by_image, counted = [], np.zeros((2, CODES + 1), dtype=np.int64)
    complete = True
    for done, (name, path) in enumerate(truths.items(), 1):
        truth, mask = read_mask(path), read_mask(found[name])
        if truth.shape != mask.shape:
            raise InputError(
                f"{found[name]} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), "
                f"{path} {truth.shape[0]} x {truth.shape[1]}; a prediction must have the size of "
                "its truth"
            )
        area = pixel_area_m2(path) or pixel_area_m2(found[name]) or config.pixel_size**2
        land = _land(scenes.get(name), config.band_order, truth.shape)
        codes = np.where(mask == MASK_NODATA, MASK_NODATA, mask * CODES).astype(np.uint8)
        sums = sums_of(truth, codes, _HALF, land, Steps(), area / 1e6)
        probabilities = found[name].with_name(name + PROBABILITY_SUFFIX)
        if probabilities.is_file():
            p = read_probability(probabilities)
            codes = quantise(p)
            other = sums_of(truth, codes, _HALF, land, Steps(), area / 1e6)
            sums = with_probabilities(sums, other)
            counted += pixels_by_code(truth, codes)
        else:
            complete = False
        by_image.append(sums)
        progress("judging", done, len(truths))
    places = _places(config, truths)
    draws = Draws(max(places) + 1, config.draws, config.seed)
    return Judged(tuple(truths), places, tuple(by_image), counted if complete else None, draws)


def scenes_of(config: ReportConfig, truths: Mapping[str, Path]) -> dict[str, Path]:
    """The scenes of the truths, by tile id; empty without `--data_dir`."""
    if config.data_dir is None:
        return {}
    found = {tile_id_of(path): path for path in input_folder(config.data_dir, "*.tif")}
    absent = [name for name in truths if name not in found]
    if absent:
        raise InputError(
            f"{config.data_dir}: no scene {absent[0]}{IMAGE_SUFFIX}, {len(absent)} of "
            f"{len(truths)} are missing; leave out --data_dir, or give the folder of all"
        )
    return found


def _land(
    scene: Path | None, band_order: Sequence[str], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Where DEM > 0; nowhere without a scene."""
    if scene is None:
        return np.zeros(shape, dtype=np.bool_)
    with Scene(scene, band_order) as opened:
        pixels = opened.read()
    if pixels.shape[1:] != shape:
        raise InputError(
            f"{scene} has {pixels.shape[1]} x {pixels.shape[2]} pixels (height x width), its truth "
            f"{shape[0]} x {shape[1]}; they must be alike"
        )
    land: NDArray[np.bool_] = pixels[DEM] > 0
    return land


def _places(config: ReportConfig, truths: Mapping[str, Path]) -> tuple[int, ...]:
    place_of = (
        places_of(config.metadata_fp, dict(truths))
        if config.metadata_fp
        else {name: name for name in truths}
    )
    numbers = {place: k for k, place in enumerate(sorted({place_of[name] for name in truths}))}
    return tuple(numbers[place_of[name]] for name in truths)
