"""Pixels of labelled scenes counted by logit: what threshold and temperature are fitted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from kelp.nn.comparison.sums import Draws, interval

_STEP: Final = 0.05
EDGES: Final = np.arange(-30, 17, _STEP)
"""Of logits: each class from one edge to the next. Beyond, float32 probabilities are 0 or 1."""
_MIDDLES: Final = EDGES + _STEP / 2
THRESHOLDS: Final = np.flatnonzero(np.abs(EDGES) < 7)
"""Classes that a threshold may begin with: 0.001 to 0.999."""
_BINS: Final = 10
COOLEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Counted:
    """Pixels of labelled scenes by logit.

    Attributes:
        by_place: pixels without and with kelp in each class of logits, `(places, 2, classes)`.
        missed: pixels of kelp that were not observed, `(places,)`.
    """

    by_place: NDArray[np.int64]
    missed: NDArray[np.int64]

    @property
    def pixels(self) -> NDArray[np.int64]:
        """Of all places, `(2, classes)`."""
        total: NDArray[np.int64] = self.by_place.sum(axis=0)
        return total

    def outcomes(self) -> NDArray[np.int64]:
        """TP, FP and FN of each place at each threshold, `(places, 3, thresholds)`."""
        above = self.by_place[..., ::-1].cumsum(axis=-1)[..., ::-1][..., THRESHOLDS]
        kelp = self.by_place[:, 1].sum(axis=-1) + self.missed
        return np.stack([above[:, 1], above[:, 0], kelp[:, None] - above[:, 1]], axis=1)

    def reliability(self) -> NDArray[np.float64]:
        """Pixels, their mean probability and their share of kelp in tenths of p, `(3, 10)`."""
        p = special.expit(_MIDDLES)
        tenth = np.minimum((p * _BINS).astype(np.intp), _BINS - 1)
        pixels, kelp = self.pixels.sum(axis=0), self.pixels[1]
        sums = [np.bincount(tenth, part, minlength=_BINS) for part in (pixels, pixels * p, kelp)]
        with np.errstate(invalid="ignore"):
            return np.stack([sums[0], sums[1] / sums[0], sums[2] / sums[0]])

    def calibration_error(self) -> float:
        """Expected calibration error: the mean gap between probability and share of kelp."""
        pixels, p, share = self.reliability()
        return float(np.nansum(pixels * np.abs(p - share)) / pixels.sum())


def count(p: NDArray[np.float32], truth: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
    """Pixels without and with kelp by logit, `(2, classes)`, and kelp that was not observed.

    Args:
        p: probabilities, NaN = not observed.
        truth: 0, 1, 255 = not labelled.
    """
    seen = np.isfinite(p)
    with np.errstate(divide="ignore"):
        logits = special.logit(np.where(seen, p, 0.5).astype(np.float64))
    bins = np.clip(np.searchsorted(EDGES, logits, side="right") - 1, 0, len(EDGES) - 1)
    counted = [np.bincount(bins[seen & (truth == k)], minlength=len(EDGES)) for k in (0, 1)]
    return np.stack(counted), int(np.count_nonzero(~seen & (truth == 1)))


def best_temperature(pixels: NDArray[np.int64]) -> float:
    """What logits must be divided by for the least cross-entropy.

    Args:
        pixels: without and with kelp in each class of logits, `(2, classes)`.
    """
    signed = np.stack([_MIDDLES, -_MIDDLES])

    def entropy(log_temperature: float) -> float:
        losses = np.logaddexp(0, signed / np.exp(log_temperature))
        return float((pixels * losses).sum() / pixels.sum())

    bounds = np.log(COOLEST), np.log(HOTTEST)
    return float(np.exp(optimize.minimize_scalar(entropy, bounds=bounds, method="bounded").x))


def dice(outcomes: NDArray[Any]) -> NDArray[np.float64]:
    """Pooled Dice of TP, FP and FN along the last axis but one; 0 where there is none of them."""
    tp, fp, fn = (outcomes[..., k, :] for k in range(3))
    whole = 2 * tp + fp + fn
    return np.where(whole == 0, 0.0, 2 * tp / np.maximum(whole, 1))


def _nearest(threshold: float) -> int:
    """The class of `THRESHOLDS` that begins nearest to a threshold."""
    edge = special.logit(np.clip(threshold, 1e-3, 1 - 1e-3))
    return int(np.abs(EDGES[THRESHOLDS] - edge).argmin())


def as_threshold(k: int) -> float:
    """The threshold that begins with the class `THRESHOLDS[k]`, in few digits."""
    p = float(special.expit(EDGES[THRESHOLDS[k]]))
    return round(p, 2 - math.floor(math.log10(min(p, 1 - p))))


@dataclass(frozen=True)
class Tuned:
    """What was fitted for one network, and what it gains.

    Attributes:
        name: of the run.
        bundle: the bundle's folder.
        scenes: where the scenes are from.
        before: counted with the bundle as it was.
        after: counted with the temperature.
        temperature: before, after.
        threshold: before, and as fitted.
        part: of each place, whose threshold was fitted on the other parts.
        draws: bootstrap draws of places.
        images: number of scenes.
    """

    name: str
    bundle: Path
    scenes: str
    before: Counted
    after: Counted
    temperature: tuple[float, float]
    threshold: tuple[float, float]
    part: NDArray[np.intp]
    draws: Draws
    images: int

    @property
    def places(self) -> int:
        """Number of places."""
        return len(self.part)

    @cached_property
    def _outcomes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """TP, FP, FN of each place, `(places, 3)`: before; and at thresholds of other places."""
        by_place = self.after.outcomes()
        own = _by_part(by_place, self.part)
        others = by_place.sum(axis=0) - own
        # Without kelp on the others there is nothing to fit to.
        kelp = (others[:, 0, 0] + others[:, 2, 0]) > 0
        fitted = np.where(kelp, dice(others).argmax(axis=-1), _nearest(self.carried))
        after = by_place[np.arange(self.places), :, fitted[self.part]]
        return self.before.outcomes()[:, :, _nearest(self.threshold[0])], after

    def scores(self) -> dict[str, tuple[float, tuple[float, float] | None]]:
        """Pooled Dice before, as fitted, and the difference, with intervals over places."""
        totals, drawn = [], []
        for outcomes in self._outcomes:
            totals.append(float(dice(outcomes.sum(axis=0)[:, None])[0]))
            drawn.append(dice(self.draws.sums(outcomes)[..., None])[:, 0])
        return {
            "before": (totals[0], interval(drawn[0])),
            "fitted": (totals[1], interval(drawn[1])),
            "difference": (totals[1] - totals[0], interval(drawn[1] - drawn[0])),
        }

    @property
    def gains(self) -> bool:
        """Whether the fitted threshold is better, where it was not fitted, than the old one."""
        return self.places > 1 and self.scores()["difference"][0] > 0

    @property
    def carried(self) -> float:
        """The old threshold where the temperature has moved it to."""
        old, (was, now) = self.threshold[0], self.temperature
        if was == now or not 0 < old < 1:
            return old
        return float(f"{special.expit(special.logit(old) * was / now):.3g}")

    @property
    def kept(self) -> float:
        """The threshold to decide by: the fitted one if it gains, else the old one."""
        return self.threshold[1] if self.gains else self.carried

    def threshold_interval(self) -> tuple[float, float] | None:
        """The middle 95 % of the best thresholds of bootstrap draws of places.

        `None` where more than 5 % of the draws have no kelp.
        """
        by_place = self.after.outcomes()
        flat = by_place.reshape(self.places, -1)
        drawn = self.draws.sums(flat).reshape(-1, *by_place.shape[1:])
        best = dice(drawn).argmax(axis=-1).astype(np.float64)
        best[drawn[:, 0, 0] + drawn[:, 2, 0] == 0] = np.nan
        found = interval(best)
        return found and (as_threshold(round(found[0])), as_threshold(round(found[1])))

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "run": self.name,
            "bundle": str(self.bundle),
            "scenes": self.scenes,
            "images": self.images,
            "places": self.places,
            "temperature": {"before": self.temperature[0], "after": self.temperature[1]},
            "threshold": {
                "before": self.threshold[0],
                "fitted": self.threshold[1],
                "after": self.kept,
                "interval": self.threshold_interval(),
            },
            "pooled_dice": {
                name: {"value": value, "interval": bounds}
                for name, (value, bounds) in self.scores().items()
            },
            "calibration_error": {
                "before": self.before.calibration_error(),
                "after": self.after.calibration_error(),
            },
        }


def _by_part(by_place: NDArray[np.int64], part: NDArray[np.intp]) -> NDArray[np.int64]:
    """Sums of the places of each part."""
    sums = np.zeros((int(part.max()) + 1, *by_place.shape[1:]), dtype=np.int64)
    np.add.at(sums, part, by_place)
    return sums
