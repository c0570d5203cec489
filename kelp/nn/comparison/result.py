"""What a comparison found: figures of every variant with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kelp.evaluation.bootstrap import Estimate
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.evaluation.metrics import FIGURES, OPEN_WATER, SiteTotals
from kelp.nn.comparison.variants import Variant

AT_EQUAL_PRECISION: Final = (
    "precision",
    "recall",
    *(f"recall_{size}_px" for size in PATCH_SIZES),
    OPEN_WATER,
)
"""The figures of a variant at thresholds of equal precision."""


@dataclass(frozen=True)
class Evaluation:
    """A variant and how it does on the scenes."""

    variant: Variant
    thresholds: tuple[float, ...]
    """Kelp where p is at least this: one for each part of the sites."""
    totals: SiteTotals
    seconds: float
    """Of an image, the median."""
    network_pixels: float
    """Of an image, the mean."""
    multiplier: float
    """Network pixels for each scene pixel."""

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.variant.name

    def figure(self, name: str) -> Estimate:
        """A figure with its interval."""
        return self.totals.figure(name)

    def difference(self, other: Evaluation | None, name: str = "pooled_dice") -> Estimate:
        """A figure less that of another variant, on the same draws; undefined to itself."""
        if other is None or self is other:
            return Estimate()
        return self.totals.difference(other.totals, name)


@dataclass(frozen=True)
class Comparison:
    """All variants on the same scenes. The draws of sites are the same for each: paired.

    Attributes:
        evaluations: of the variants, in the order they were run.
        images: number of scenes.
        sites: number of sites.
        area: where the areas come from, in words.
        equal: those that reach the reference's precision, at thresholds where they do.
    """

    evaluations: tuple[Evaluation, ...]
    images: int
    sites: int
    area: str
    equal: tuple[Evaluation, ...] = ()

    def of_kinds(self, kinds: Sequence[str], sahi: bool | None = None) -> list[Evaluation]:
        """The first variant of each of these kinds of each network.

        Of a network's sliced variants only the first counts: the best of many would owe some of
        its lead to chance. With `sahi` only networks count that were trained on tiles (True) or
        on whole images (False); a pixel-wise model is neither.
        """
        first: dict[object, Evaluation] = {}
        for one in self.evaluations:
            spec = one.variant.bundle.spec
            trained = None if spec.is_pixelwise else spec.sahi
            if one.variant.kind in kinds and sahi in (None, trained):
                first.setdefault((one.variant.bundle.path, one.variant.kind), one)
        return list(first.values())

    def best(self, kinds: Sequence[str], sahi: bool | None = None) -> Evaluation | None:
        """The variant of these kinds with the highest pooled Dice; see `of_kinds`."""

        def score(one: Evaluation) -> float:
            return one.figure("pooled_dice").value or 0

        known = self.of_kinds(kinds, sahi)
        known = [one for one in known if one.figure("pooled_dice").value is not None]
        return max(known, key=score, default=None)

    def equal_to(self, one: Evaluation) -> Evaluation | None:
        """The same variant at equal precision; `None` where it never is as precise."""
        return next((other for other in self.equal if other.name == one.name), None)

    def to_json(self, baseline: Evaluation | None) -> list[dict[str, Any]]:
        """Every variant with its figures; differences are to `baseline`."""
        rows = []
        for one in self.evaluations:
            variant = one.variant
            rows.append(
                {
                    "name": variant.name,
                    "kind": variant.kind,
                    "bundle": str(variant.bundle.path),
                    "tile": variant.tile,
                    "overlap": variant.overlap if variant.tile else None,
                    "blend": variant.blend if variant.kind == "sliced" else None,
                    "tta": variant.tta,
                    "interpolation": variant.bundle.spec.interpolation,
                    "scale": variant.scale,
                    "thresholds": list(one.thresholds),
                    "seconds_per_image": one.seconds,
                    "network_pixels_per_image": one.network_pixels,
                    "network_pixels_per_scene_pixel": one.multiplier,
                    "figures": _figures(one, tuple(FIGURES), baseline),
                    "at_equal_precision": self._equal_json(one, baseline),
                    "reliability": one.totals.total.reliability.rows(),
                }
            )
        return rows

    def _equal_json(self, one: Evaluation, baseline: Evaluation | None) -> dict[str, Any] | None:
        equal = self.equal_to(one)
        if equal is None or baseline is None:
            return None
        figures = _figures(equal, AT_EQUAL_PRECISION, self.equal_to(baseline))
        return {"thresholds": list(equal.thresholds), "figures": figures}


def _figures(
    one: Evaluation, names: Sequence[str], baseline: Evaluation | None
) -> dict[str, dict[str, Any]]:
    figures = {}
    for name in names:
        figures[name] = dict[str, Any](one.figure(name).to_json())
        if baseline:
            figures[name]["difference"] = one.difference(baseline, name).to_json()
    return figures


_FIGURES: Final[dict[str, str]] = {
    "pooled_dice": "Dice over the pixels of all scenes; not observed counts as no kelp",
    "pooled_dice_of_labels": "the same against the masks of --labels_dir, at the same thresholds",
    "mean_image_dice": "mean of the scenes' own Dice; one without kelp, true or predicted, "
    "scores 1",
    "iou": "intersection over union, over the pixels of all scenes",
    "precision": "share of the pixels marked as kelp that are kelp",
    "recall": "share of the kelp pixels that are marked",
    **{
        f"recall_{size}_px": f"share of the true patches of {size} px (8-connected) of which at "
        "least half is marked"
        for size in PATCH_SIZES
    },
    "boundary_dice": "Dice of the outermost pixels of kelp (Cheng et al. 2021, d = 1)",
    OPEN_WATER: "of the water farther than 3 px from true kelp, the share that is marked: km2 of "
    "false kelp per km2",
    "seam_score": "steps of the probabilities across borders of tiles, by those up to 4 px beside "
    "them, geometric means; 1 = no seam",
    "calibration_error": "mean distance of probability and share of kelp over ten classes "
    "(expected calibration error)",
    "area_by_threshold": "kelp area by the mask, as a share of the true area",
    "area_by_probability": "kelp area by the sum of probabilities, as a share of the true area",
}

_ESTIMATE: Final[dict[str, str]] = {
    "value": "the figure; null where undefined",
    "low": "where the middle 95 % of the bootstrap draws of sites begins; null where undefined",
    "high": "where it ends",
}

_VARIANT: Final[dict[str, str]] = {
    "name": "what the variant is called in tables",
    "kind": "whole; whole, upsampled; sliced; seed",
    "bundle": "folder of the network",
    "tile": "side of a tile in scene pixels; null: the scene is one",
    "overlap": "of neighbouring tiles, in scene pixels",
    "blend": "window that weighs a tile's votes",
    "tta": "how the 8 symmetries of the square are merged; null: not run",
    "interpolation": "how tiles are resized for the network",
    "scale": "network pixels for each scene pixel, along a side",
    "thresholds": "kelp where p is at least this: one for each part of the sites, fitted on the "
    "other parts (highest pooled Dice) unless --decision_threshold is given; of the seed's merge, "
    "at which each tile votes",
    "seconds_per_image": "median over the scenes, reading included",
    "network_pixels_per_image": "what the network saw, over all tiles and symmetries, in its own "
    "pixels; mean over the scenes",
    "network_pixels_per_scene_pixel": "the same for each pixel of a scene: the cost, independent "
    "of the machine",
    **{f"figures.{name}": words for name, words in _FIGURES.items()},
    "at_equal_precision": "the variant at other thresholds: for each part of the sites the lowest "
    "at which it is, on the other parts, as precise as advice.whole is there; null where it never "
    "is",
    "at_equal_precision.thresholds": "one for each part of the sites",
    **{f"at_equal_precision.figures.{name}": _FIGURES[name] for name in AT_EQUAL_PRECISION},
    "reliability[]": "of each tenth of the probabilities",
    "reliability[].pixels": "labelled pixels with such a probability",
    "reliability[].mean_probability": "their mean probability; null without pixels",
    "reliability[].kelp_share": "the share of them that is kelp; null without pixels",
}

_DIFFERENCE: Final = "to advice.whole, on the same draws; null of advice.whole itself"

FIELDS: Final[dict[str, str]] = {
    "advice": "the answer",
    "advice.slice": "whether to slice: true only where advice.difference lies above 0 wholly",
    "advice.text": "the answer in words",
    "advice.whole": "the whole-image variant with the highest pooled Dice; null without one",
    "advice.sliced": "the sliced variant with the highest pooled Dice, the first of each network",
    "advice.difference": "pooled Dice, advice.sliced less advice.whole",
    **{f"advice.difference.{name}": words for name, words in _ESTIMATE.items()},
    "advice.training": "pooled Dice of the best network trained on tiles, as kelp predict applies "
    "it, less that of the best trained on whole images, applied to whole images; null unless "
    "there are both; value, low and high as in advice.difference",
    "scenes": "where the labelled scenes are from",
    "images": "number of scenes",
    "places": "number of sites that they show",
    "draws": "bootstrap draws of sites",
    "precision": "number format of the networks",
    "pixel_size": "where the area of a pixel comes from",
    "left_out": "variants that would have needed a larger pass than --largest_pass",
    "ways[]": "each variant of applying a network",
    **{f"ways[].{name}": words for name, words in _VARIANT.items()},
    **{f"ways[].figures.*.{name}": words for name, words in _ESTIMATE.items()},
    "ways[].figures.*.difference": _DIFFERENCE,
    **{f"ways[].at_equal_precision.figures.*.{name}": words for name, words in _ESTIMATE.items()},
    "ways[].at_equal_precision.figures.*.difference": _DIFFERENCE,
    "fields": "this: the meaning of every field; [] = each of a list, * = each by name",
}
"""By path: `[]` = each of a list, `*` = each by name."""
