"""What is added up over images, the figures made of it, and how sure they are.

Every figure is a function of sums over images. So the images of a place, of a fold, or of a
bootstrap draw of places are one addition, and all draws together one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.evaluation.confusion import PATCH_SIZES, Counts, Figures, count
from kelp.raster.bands import MASK_NODATA
from kelp.raster.probability import CODES
from kelp.tiling.seams import Steps

Array = NDArray[np.float64]
Mask = NDArray[np.uint8]

BINS: Final = 10
"""Of the reliability diagram."""

OPEN_WATER: Final = "false_kelp_share_of_open_water"

_SHORE: Final = 3
"""Pixels around true kelp that are no kelp-free water: labels are not finer than that."""
_LEVEL: Final = 0.95
_MOST_UNDEFINED: Final = 0.05
"""Share of draws without a value above which an interval is not told."""

_NAMES: Final = (
    "images",
    "dice_sum",
    "tp",
    "fp",
    "fn",
    "tn",
    *(f"patches_{size}" for size in PATCH_SIZES),
    *(f"found_{size}" for size in PATCH_SIZES),
    "band_tp",
    "band_fp",
    "band_fn",
    "open_false_km2",
    "open_km2",
    "border",
    "borders",
    "elsewhere",
    "others",
    "truth_km2",
    "mask_km2",
    "expected_km2",
    "labels_tp",
    "labels_fp",
    "labels_fn",
    *(f"bin_{part}_{k}" for part in ("pixels", "p", "kelp") for k in range(BINS)),
)
_PLACE: Final = {name: k for k, name in enumerate(_NAMES)}


class Sums:
    """Named sums; leading axes are draws, places or nothing at all."""

    def __init__(self, values: Array | None = None) -> None:
        self.values = np.zeros(len(_NAMES)) if values is None else values

    def __getitem__(self, name: str) -> Array:
        part: Array = self.values[..., _PLACE[name]]
        return part

    def plus(self, other: Sums) -> Sums:
        """Of both sets of images."""
        return Sums(self.values + other.values)


def sums_of(
    truth: Mask,
    codes: Mask,
    threshold: int,
    land: NDArray[np.bool_],
    steps: Steps,
    km2: float,
    labels: Mask | None = None,
) -> Sums:
    """Sums of one image; all arrays `(height, width)`.

    Args:
        truth: 0, 1, 255 = not labelled.
        codes: probabilities in units of 1 / `CODES`, 255 = not observed (counts as no kelp).
        threshold: kelp where a code is at least this.
        land: DEM > 0.
        steps: of the probabilities (see `kelp.tiling.seams`).
        km2: area of a pixel.
        labels: a second truth, of other labellers.
    """
    seen = codes != MASK_NODATA
    prediction = np.where(seen, codes >= threshold, MASK_NODATA).astype(np.uint8)
    figures = Figures.of(truth, prediction)
    others = Counts() if labels is None else count(labels, prediction)
    labelled = truth != MASK_NODATA
    p = np.where(seen, codes, 0)[labelled] / CODES
    kelp, said = truth == 1, prediction == 1
    open_water = labelled & ~land & ~ndimage.binary_dilation(kelp, iterations=_SHORE)
    true_band, said_band = _band(kelp) & labelled, _band(said) & labelled
    bins = np.minimum((p * BINS).astype(np.intp), BINS - 1)
    values: dict[str, float] = {
        "images": 1,
        "dice_sum": figures.dice_sum,
        **figures.counts._asdict(),
        "band_tp": int((true_band & said_band).sum()),
        "band_fp": int((said_band & ~true_band).sum()),
        "band_fn": int((true_band & ~said_band).sum()),
        "open_false_km2": np.count_nonzero(open_water & said) * km2,
        "open_km2": np.count_nonzero(open_water) * km2,
        **steps._asdict(),
        "truth_km2": np.count_nonzero(kelp) * km2,
        "mask_km2": np.count_nonzero(said & labelled) * km2,
        "expected_km2": float(p.sum()) * km2,
        "labels_tp": others.tp,
        "labels_fp": others.fp,
        "labels_fn": others.fn,
    }
    for size, patches in zip(PATCH_SIZES, figures.patches, strict=True):
        values |= {f"patches_{size}": patches.patches, f"found_{size}": patches.found}
    for part, weights in (("pixels", None), ("p", p), ("kelp", kelp[labelled])):
        counted = np.bincount(bins, weights, minlength=BINS)
        values |= {f"bin_{part}_{k}": float(n) for k, n in enumerate(counted)}
    return Sums(np.array([values[name] for name in _NAMES], dtype=np.float64))


def with_probabilities(decided: Sums, probable: Sums) -> Sums:
    """The sums of a mask, with those that only probabilities tell from another `Sums`."""
    values = decided.values.copy()
    for name, k in _PLACE.items():
        if name.startswith("bin_") or name == "expected_km2":
            values[..., k] = probable.values[..., k]
    return Sums(values)


def _band(kelp: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Kelp pixels that touch a pixel without kelp (Cheng et al. 2021, Boundary IoU, d = 1)."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(kelp, border_value=1)
    return kelp & ~inner


def _divide(part: Array, whole: Array) -> Array:
    """NaN where `whole` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Array = np.where(whole == 0, np.nan, part / whole)
    return quotient


def _seam(s: Sums) -> Array:
    score: Array = np.exp(_divide(s["border"], s["borders"]) - _divide(s["elsewhere"], s["others"]))
    return score


def _calibration_error(s: Sums) -> Array:
    gaps = [np.abs(s[f"bin_p_{k}"] - s[f"bin_kelp_{k}"]) for k in range(BINS)]
    pixels = [s[f"bin_pixels_{k}"] for k in range(BINS)]
    return _divide(np.sum(gaps, axis=0), np.sum(pixels, axis=0))


def _recall(size: str) -> Callable[[Sums], Array]:
    return lambda s: _divide(s[f"found_{size}"], s[f"patches_{size}"])


FIGURES: Final[Mapping[str, Callable[[Sums], Array]]] = {
    "pooled_dice": lambda s: _divide(2 * s["tp"], 2 * s["tp"] + s["fp"] + s["fn"]),
    "pooled_dice_of_labels": lambda s: _divide(
        2 * s["labels_tp"], 2 * s["labels_tp"] + s["labels_fp"] + s["labels_fn"]
    ),
    "mean_image_dice": lambda s: _divide(s["dice_sum"], s["images"]),
    "iou": lambda s: _divide(s["tp"], s["tp"] + s["fp"] + s["fn"]),
    "precision": lambda s: _divide(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: _divide(s["tp"], s["tp"] + s["fn"]),
    **{f"recall_{size}_px": _recall(size) for size in PATCH_SIZES},
    "boundary_dice": lambda s: _divide(
        2 * s["band_tp"], 2 * s["band_tp"] + s["band_fp"] + s["band_fn"]
    ),
    OPEN_WATER: lambda s: _divide(s["open_false_km2"], s["open_km2"]),
    "seam_score": _seam,
    "calibration_error": _calibration_error,
    "area_by_threshold": lambda s: _divide(s["mask_km2"], s["truth_km2"]),
    "area_by_probability": lambda s: _divide(s["expected_km2"], s["truth_km2"]),
}
"""Figures by name, each a function of sums; NaN where undefined."""


class Draws:
    """Bootstrap draws of places: the same for every way, so that differences are paired.

    Places are drawn, not images or pixels: images of one place, and pixels of one image, are not
    independent witnesses.
    """

    def __init__(self, places: int, draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._times = rng.multinomial(places, np.full(places, 1 / places), size=draws)

    def sums(self, by_place: NDArray[Any]) -> NDArray[Any]:
        """Sums of every draw, `(draws, columns)`, of `(places, columns)`."""
        total: NDArray[Any] = self._times @ by_place
        return total

    def of(self, by_place: Sums) -> Sums:
        """Sums of every draw; `by_place` has one row for each place."""
        return Sums(self.sums(by_place.values))


def interval(values: Array) -> tuple[float, float] | None:
    """The middle 95 % of draws; `None` where more than 5 % of them have no value."""
    known = values[np.isfinite(values)]
    if len(known) < (1 - _MOST_UNDEFINED) * len(values):
        return None
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
