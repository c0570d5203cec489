"""What every field of `comparison.json` means; the file itself holds it, and the reference."""

from __future__ import annotations

from typing import Final

from kelp.evaluation.confusion import PATCH_SIZES
from kelp.evaluation.metrics import OPEN_WATER
from kelp.nn.comparison.result import AT_EQUAL_PRECISION

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
