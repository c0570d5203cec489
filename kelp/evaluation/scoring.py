"""Scores of a folder of masks against truth: `kelp evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.config.predict import EvaluateConfig
from kelp.errors import InputError, TableError
from kelp.evaluation.confusion import PATCH_SIZES, Counts, Figures, ratio
from kelp.io.executors import gather, spread
from kelp.io.files import input_folder, output_folder, write_json, write_text
from kelp.progress import Progress, silent
from kelp.raster.masks import georeference_of, read_mask
from kelp.tables import MASK_SUFFIX, read_table, tile_id_of

_NAMES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Areas:
    """Areas in km2 of the scored pixels, and how large the pixels were taken to be.

    A kelp pixel counts whole, however sparse the canopy: presence area, an upper bound.
    """

    truth_km2: float = 0.0
    predicted_km2: float = 0.0
    scored_km2: float = 0.0
    observed_km2: float = 0.0
    images: int = 0
    images_assumed: int = 0
    assumed_pixel_size_m: float = 30.0

    @property
    def pixel_size(self) -> str:
        """Where the size of a pixel comes from, in words."""
        if not self.images_assumed:
            return "pixel size from the CRS"
        some = (
            ""
            if self.images_assumed == self.images
            else f" for {self.images_assumed} of {self.images} images"
        )
        return f"{self.assumed_pixel_size_m:g} m pixels assumed{some}, no projected CRS"

    def plus(self, counts: Counts, seen: Counts, pixel_m2: float | None) -> Areas:
        """Add an image with these counts of all and of observed pixels; `None`: assume a size."""
        km2 = (self.assumed_pixel_size_m**2 if pixel_m2 is None else pixel_m2) / 1e6
        return Areas(
            self.truth_km2 + km2 * (counts.tp + counts.fn),
            self.predicted_km2 + km2 * (counts.tp + counts.fp),
            self.scored_km2 + km2 * sum(counts),
            self.observed_km2 + km2 * sum(seen),
            self.images + 1,
            self.images_assumed + (pixel_m2 is None),
            self.assumed_pixel_size_m,
        )


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    Attributes:
        all_pixels: figures where a prediction of 255 counts as no kelp.
        observed_pixels: figures of the pixels that the prediction saw.
        areas: areas in km2.
        by_place: figures of each place's images, by `aoi_id`; empty without a metadata table.
        files: the files written.
    """

    all_pixels: Figures
    observed_pixels: Figures
    areas: Areas
    by_place: Mapping[str, Figures] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def mean_place_dice(self) -> float | None:
        """Mean over places of the Dice pooled within each; a place without any kelp scores 1."""
        dices = [figures.pooled_dice for figures in self.by_place.values()]
        return ratio(sum(1.0 if dice is None else dice for dice in dices), len(dices))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file: finite numbers, `None` where undefined."""
        areas = self.areas
        places: dict[str, Any] = {
            "mean_place_dice": self.mean_place_dice,
            "by_place": {
                place: {"images": f.images, "pooled_dice": f.pooled_dice}
                | {"mean_image_dice": f.mean_image_dice}
                for place, f in self.by_place.items()
            },
        }
        return {
            "images": self.all_pixels.images,
            "all_pixels": self.all_pixels.to_json(),
            "observed_pixels": self.observed_pixels.to_json(),
            "areas": {
                "truth_kelp_km2": areas.truth_km2,
                "predicted_kelp_km2": areas.predicted_km2,
                "scored_km2": areas.scored_km2,
                "observed_km2": areas.observed_km2,
                "pixel_size": areas.pixel_size,
            },
            **(places if self.by_place else {}),
        }

    def to_text(self) -> str:
        """An aligned plain-text table."""
        return _table(self)

    def summary(self) -> str:
        """The table, and where it was written."""
        return "\n".join([self.to_text(), *(f"wrote {path}" for path in self.files)])


def _table(scores: Scores) -> str:
    both = (scores.all_pixels, scores.observed_pixels)

    def row(name: str, values: Sequence[float | None]) -> str:
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells)

    def patch_row(k: int) -> str:
        cells = [f"{f.patches[k].found} of {f.patches[k].patches}" for f in both]
        return f"{f'  {PATCH_SIZES[k]} px':<26}" + "".join(f"{cell:>16}" for cell in cells)

    images = f"{both[0].images} image{'' if both[0].images == 1 else 's'}"
    lines = [
        f"{images:<26}{'all pixels':>16}{'observed only':>16}",
        row("Dice, pooled", [f.pooled_dice for f in both]),
        row("Dice, mean of images", [f.mean_image_dice for f in both]),
        row("IoU", [f.counts.iou for f in both]),
        row("precision", [f.counts.precision for f in both]),
        row("recall", [f.counts.recall for f in both]),
        "patches found, by size",
        *(patch_row(k) for k in range(len(PATCH_SIZES))),
    ]
    if scores.by_place:
        lines.append(row(f"Dice, mean of {len(scores.by_place)} places", [scores.mean_place_dice]))
    areas = scores.areas
    return "\n".join(
        [
            *lines,
            f"{'kelp area, truth':<26}{areas.truth_km2:>12.3f} km2 ({areas.pixel_size})",
            f"{'kelp area, predicted':<26}{areas.predicted_km2:>12.3f} km2 ({areas.pixel_size})",
            f"{'area observed':<26}{areas.observed_km2:>12.3f} km2 of {areas.scored_km2:.3f} km2"
            f" ({areas.pixel_size})",
        ]
    )


def pixel_area_m2(path: Path) -> float | None:
    """Area of a raster's pixel in square metres; `None` unless its CRS is a projected one."""
    reference = georeference_of(path)
    if reference.crs is None or reference.transform is None or not reference.crs.is_projected:
        return None
    metres = float(reference.crs.linear_units_factor[1])
    return abs(float(reference.transform.determinant)) * metres**2


def evaluate(config: EvaluateConfig, progress: Progress = silent) -> Scores:
    """Score the masks of a folder against those of another, paired by tile id.

    Predictions without truth are not looked at. With `metadata_fp` also by place (`aoi_id`).

    Raises:
        InputError: a prediction is missing (named), a mask unreadable, or a pair's sizes differ.
        TableError: the metadata table has no row for an image.
    """
    config = config.absolute() if config.scheduler else config
    truths = {tile_id_of(p): p for p in input_folder(config.gt_dir, f"*{MASK_SUFFIX}")}
    found = {tile_id_of(p): p for p in input_folder(config.preds_dir, f"*{MASK_SUFFIX}")}
    absent = [tile_id for tile_id in truths if tile_id not in found]
    if absent:
        raise InputError(
            f"{config.preds_dir}: no prediction for {_some(absent)} of {config.gt_dir}; "
            "predict these images too, or take their truth away"
        )
    places = places_of(config.metadata_fp, truths) if config.metadata_fp else {}
    everything, seen = Figures(), Figures()
    areas = Areas(assumed_pixel_size_m=config.pixel_size)
    by_place: dict[str, Figures] = {}
    pairs = [(path, found[tile_id]) for tile_id, path in truths.items()]
    with (
        gather(config.workers, config.scheduler) as workers,
        closing(spread(_figures, pairs, workers)) as judged,
    ):
        for done, (tile_id, (figures, observed, pixel)) in enumerate(
            zip(truths, judged, strict=True), 1
        ):
            everything, seen = everything.plus(figures), seen.plus(observed)
            areas = areas.plus(figures.counts, observed.counts, pixel)
            if places:
                place = places[tile_id]
                by_place[place] = by_place.get(place, Figures()).plus(figures)
            progress("scoring", done, len(truths))
    scores = Scores(everything, seen, areas, dict(sorted(by_place.items())))
    if config.output_dir is None:
        return scores
    folder = output_folder(config.output_dir)
    files = (folder / "scores.json", folder / "scores.txt")
    write_json(files[0], scores.to_json())
    write_text(files[1], scores.to_text() + "\n")
    config.record(folder)
    return replace(scores, files=files)


def _figures(pair: tuple[Path, Path]) -> tuple[Figures, Figures, float | None]:
    """Figures of all pixels and of those observed, and the area of a pixel, where it is known."""
    truth, prediction = _pair(*pair)
    area = pixel_area_m2(pair[0]) or pixel_area_m2(pair[1])
    return Figures.of(truth, prediction), Figures.of(truth, prediction, True), area


def _pair(truth_path: Path, prediction_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    truth, prediction = read_mask(truth_path), read_mask(prediction_path)
    if truth.shape != prediction.shape:
        sizes = [f"{h} x {w}" for h, w in (truth.shape, prediction.shape)]
        raise InputError(
            f"{prediction_path} has {sizes[1]} pixels (height x width), {truth_path} {sizes[0]}; "
            "a prediction must have the size of its truth"
        )
    return truth, prediction


def places_of(table_path: Path, tile_ids: Mapping[str, Path]) -> dict[str, str]:
    """The place of each tile id, from a table of `kelp metadata`."""
    table = read_table(table_path, ["tile_id", "aoi_id"])
    places = dict(zip(table["tile_id"].astype(str), table["aoi_id"].astype(str), strict=True))
    absent = [tile_id for tile_id in tile_ids if tile_id not in places]
    if absent:
        raise TableError(f"{table_path}: the table has no row for {_some(absent)}")
    return places


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
