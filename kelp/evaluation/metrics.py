"""What is added up over images, and the figures made of it.

Every figure is a function of sums over images. So the images of a site, of a fold, or of a
bootstrap draw of sites are one addition, and all draws together one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.evaluation.bootstrap import Estimate, SiteBootstrap
from kelp.evaluation.calibration import BINS, Reliability, bin_of, calibration_error
from kelp.evaluation.confusion import (
    PATCH_SIZES,
    Confusion,
    Figures,
    ImageFigures,
    Mask,
    dice,
    ratio,
)
from kelp.raster.area import GroundArea
from kelp.raster.bands import MASK_NODATA
from kelp.raster.probability import dequantise
from kelp.raster.window import Tile
from kelp.tiling.seams import Steps

Array = NDArray[np.float64]

OPEN_WATER: Final = "false_kelp_share_of_open_water"

SHORE: Final = 3
"""Pixels around true kelp that are no kelp-free water: labels are not finer than that. Also the
rows that a strip needs above and below it."""

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
    "labelled_km2",
    "observed_km2",
    "labels_tp",
    "labels_fp",
    "labels_fn",
    *(f"bin_{part}_{k}" for part in ("pixels", "p", "kelp") for k in range(BINS)),
)
_COLUMN: Final = {name: k for k, name in enumerate(_NAMES)}


class Totals:
    """Named sums; leading axes are draws, sites or nothing at all."""

    def __init__(self, values: Array | None = None) -> None:
        self.values = np.zeros(len(_NAMES)) if values is None else values

    def __getitem__(self, name: str) -> Array:
        column: Array = self.values[..., _COLUMN[name]]
        return column

    @classmethod
    def of(cls, parts: Sequence[Totals]) -> Totals:
        """Of all images together."""
        return cls(np.sum([part.values for part in parts], axis=0))

    @property
    def reliability(self) -> Reliability:
        """Of sums without leading axes."""
        return Reliability(*(_bins(self, part) for part in ("pixels", "p", "kelp")))


class ImageTotals:
    """The sums of one image that comes in strips of rows, from the top to the bottom.

    Args:
        area: ground area of its pixels.
    """

    def __init__(self, area: GroundArea) -> None:
        self._area = area
        self._figures = ImageFigures()
        self._labels = Confusion()
        self._values = dict.fromkeys(_NAMES, 0.0)

    def add(
        self,
        tile: Tile,
        truth: Mask,
        prediction: Mask,
        codes: Mask | None = None,
        land: NDArray[np.bool_] | None = None,
        labels: Mask | None = None,
        above: int = 0,
    ) -> None:
        """Add the next strip.

        All arrays hold the strip, and around it up to `SHORE` rows above and below where there
        are such: with fewer, the open water and the outline of beds are wrong there.

        Args:
            tile: the strip itself.
            truth: 0, 1, 255 = not labelled.
            prediction: 0, 1, 255 = not observed (counts as no kelp).
            codes: quantised probabilities; without them nothing is known of calibration.
            land: DEM > 0; default: nowhere.
            labels: a second truth, of other labellers.
            above: rows of the arrays above the strip.
        """
        own = slice(above, above + tile.height)
        kelp, marked = truth == 1, prediction == 1
        labelled = (truth != MASK_NODATA)[own]
        open_water = labelled & ~ndimage.binary_dilation(kelp, iterations=SHORE)[own]
        if land is not None:
            open_water &= ~land[own]
        true_band, marked_band = _band(kelp)[own] & labelled, _band(marked)[own] & labelled
        kelp, marked, truth, prediction = kelp[own], marked[own], truth[own], prediction[own]
        self._figures.add(truth, prediction)
        if labels is not None:
            self._labels = self._labels.plus(Confusion.of(labels[own], prediction))

        def km2(chosen: NDArray[np.bool_] | NDArray[np.float32]) -> float:
            return self._area.total(chosen, tile) / 1e6

        self._count(
            band_tp=int(np.count_nonzero(true_band & marked_band)),
            band_fp=int(np.count_nonzero(marked_band & ~true_band)),
            band_fn=int(np.count_nonzero(true_band & ~marked_band)),
            open_false_km2=km2(open_water & marked),
            open_km2=km2(open_water),
            truth_km2=km2(kelp),
            mask_km2=km2(marked & labelled),
            labelled_km2=km2(labelled),
            observed_km2=km2(labelled & (prediction != MASK_NODATA)),
        )
        if codes is not None:
            p = dequantise(codes[own])
            known = labelled & np.isfinite(p)
            bins, of_bin = bin_of(p[known]), {"p": p[known], "kelp": kelp[known], "pixels": None}
            for part, weights in of_bin.items():
                counted = np.bincount(bins, weights, minlength=BINS)
                self._count(**{f"bin_{part}_{k}": float(n) for k, n in enumerate(counted)})
            self._count(expected_km2=km2(np.where(known, p, 0)))

    def _count(self, **values: float) -> None:
        for name, value in values.items():
            self._values[name] += value

    def finish(
        self,
        steps: Steps = Steps(),  # noqa: B008 -- an immutable tuple
    ) -> tuple[Totals, tuple[Figures, Figures]]:
        """The sums, and the figures of all and of observed pixels. Ends the image.

        `steps` are those of the probabilities (see `kelp.tiling.seams`).
        """
        both = self._figures.figures()
        figures, _ = both
        self._count(images=1, dice_sum=figures.dice_sum, **steps._asdict())
        self._count(**{name: getattr(figures.confusion, name) for name in ("tp", "fp", "fn", "tn")})
        for name in ("tp", "fp", "fn"):
            self._count(**{f"labels_{name}": getattr(self._labels, name)})
        for size, patches in zip(PATCH_SIZES, figures.patches, strict=True):
            self._count(**{f"patches_{size}": patches.patches, f"found_{size}": patches.found})
        return Totals(np.array([self._values[name] for name in _NAMES], dtype=np.float64)), both


def _band(kelp: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Kelp pixels that touch a pixel without kelp (Cheng et al. 2021, Boundary IoU, d = 1)."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(kelp, border_value=1)
    return kelp & ~inner


def _bins(s: Totals, part: str) -> Array:
    return np.stack([s[f"bin_{part}_{k}"] for k in range(BINS)], axis=-1)


def _seam(s: Totals) -> Array:
    score: Array = np.exp(ratio(s["border"], s["borders"]) - ratio(s["elsewhere"], s["others"]))
    return score


def _recall(size: str) -> Callable[[Totals], Array]:
    return lambda s: ratio(s[f"found_{size}"], s[f"patches_{size}"])


FIGURES: Final[Mapping[str, Callable[[Totals], Array]]] = {
    "pooled_dice": lambda s: dice(s["tp"], s["fp"], s["fn"]),
    "pooled_dice_of_labels": lambda s: dice(s["labels_tp"], s["labels_fp"], s["labels_fn"]),
    "mean_image_dice": lambda s: ratio(s["dice_sum"], s["images"]),
    "iou": lambda s: ratio(s["tp"], s["tp"] + s["fp"] + s["fn"]),
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: ratio(s["tp"], s["tp"] + s["fn"]),
    **{f"recall_{size}_px": _recall(size) for size in PATCH_SIZES},
    "boundary_dice": lambda s: dice(s["band_tp"], s["band_fp"], s["band_fn"]),
    OPEN_WATER: lambda s: ratio(s["open_false_km2"], s["open_km2"]),
    "seam_score": _seam,
    "calibration_error": lambda s: calibration_error(
        *(_bins(s, part) for part in ("pixels", "p", "kelp"))
    ),
    "area_by_threshold": lambda s: ratio(s["mask_km2"], s["truth_km2"]),
    "area_by_probability": lambda s: ratio(s["expected_km2"], s["truth_km2"]),
}
"""Figures by name, each a function of sums; NaN where undefined."""


class SiteTotals:
    """The sums of images, of all of them together and of every bootstrap draw of their sites.

    Args:
        by_image: of each image.
        sites: its site, numbered from 0.
        bootstrap: draws of the sites.
    """

    def __init__(
        self, by_image: Sequence[Totals], sites: Sequence[int], bootstrap: SiteBootstrap
    ) -> None:
        self.by_image = tuple(by_image)
        self.total = Totals.of(self.by_image)
        by_site = np.zeros((bootstrap.sites, len(_NAMES)))
        np.add.at(by_site, list(sites), [totals.values for totals in self.by_image])
        self._drawn = Totals(bootstrap.sums(by_site))

    def figure(self, name: str) -> Estimate:
        """A figure with its interval."""
        function = FIGURES[name]
        return Estimate.of(function(self.total), function(self._drawn))

    def difference(self, other: SiteTotals, name: str) -> Estimate:
        """A figure less that of others on the same draws: paired."""
        function = FIGURES[name]
        return Estimate.of(
            function(self.total) - function(other.total),
            function(self._drawn) - function(other._drawn),
        )
