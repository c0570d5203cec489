"""Do probabilities mean what they say? Reliability, temperature, and the threshold that suits them.

Pixels of labelled scenes are counted by logit, so that a temperature (Guo et al. 2017, On
Calibration of Modern Neural Networks) and thresholds near 0 and 1 are found on one histogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from kelp.evaluation.bootstrap import Estimate, SiteBootstrap, interval
from kelp.evaluation.confusion import defined, dice, ratio
from kelp.evaluation.thresholds import Histogram, best_threshold

BINS: Final = 10
"""Classes of probability of a reliability diagram."""

_STEP: Final = 0.05
EDGES: Final = np.arange(-30, 17, _STEP)
"""Of logits: each class from one edge to the next. Beyond, float32 probabilities are 0 or 1."""
_MIDDLES: Final = EDGES + _STEP / 2
THRESHOLDS: Final = np.flatnonzero(np.abs(EDGES) < 7)
"""Classes that a threshold may begin with: 0.001 to 0.999."""
_COOLEST, _HOTTEST = 0.05, 20.0


def bin_of(p: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    """The tenth that each probability lies in."""
    return np.minimum((p * BINS).astype(np.intp), BINS - 1)


def calibration_error(
    pixels: NDArray[Any], p: NDArray[Any], kelp: NDArray[Any]
) -> NDArray[np.float64]:
    """Expected calibration error: the mean gap between probability and share of kelp.

    Args:
        pixels: in each class of probability, `(…, classes)`.
        p: sum of their probabilities.
        kelp: how many of them are kelp.

    Returns:
        `(…,)`; NaN without pixels.
    """
    return ratio(np.abs(p - kelp).sum(axis=-1), pixels.sum(axis=-1))


class Reliability(NamedTuple):
    """Observed, labelled pixels in tenths of probability, each `(10,)`."""

    pixels: NDArray[np.float64]
    p: NDArray[np.float64]
    """Sums of probabilities."""
    kelp: NDArray[np.float64]

    @property
    def error(self) -> float | None:
        """Expected calibration error."""
        return defined(calibration_error(*self))

    def rows(self) -> list[dict[str, float | None]]:
        """Pixels, mean probability and share of kelp of each tenth, for tables and files."""
        return [
            {
                "pixels": float(pixels),
                "mean_probability": defined(ratio(p, pixels)),
                "kelp_share": defined(ratio(kelp, pixels)),
            }
            for pixels, p, kelp in zip(*self, strict=True)
        ]

    def points(self) -> list[tuple[float, float]]:
        """Mean probability and share of kelp of the tenths that have pixels, for a diagram."""
        known = self.pixels > 0
        return [
            (float(p), float(kelp))
            for p, kelp in (np.stack([self.p, self.kelp])[:, known] / self.pixels[known]).T
        ]


def logit_histogram(sites: int) -> Histogram:
    """An empty histogram by logit, a position for each site."""
    return Histogram.empty((sites,), len(EDGES))


def logit_classes(p: NDArray[np.float32]) -> NDArray[np.intp]:
    """The class of logits that each probability lies in."""
    with np.errstate(divide="ignore"):
        logits = special.logit(p.astype(np.float64))
    classes: NDArray[np.intp] = np.searchsorted(EDGES, logits, side="right") - 1
    return np.clip(classes, 0, len(EDGES) - 1)


def expected_area(areas: NDArray[np.float64]) -> float:
    """Sum of probability times area, of areas by class of logits, `(classes,)`."""
    return float((areas * probabilities()).sum())


def probabilities() -> NDArray[np.float64]:
    """In the middle of each class of logits, `(classes,)`."""
    p: NDArray[np.float64] = special.expit(_MIDDLES)
    return p


def add_logits(
    histogram: Histogram, site: int, p: NDArray[np.float32], truth: NDArray[np.uint8]
) -> None:
    """Count pixels by logit.

    Args:
        histogram: of `logit_histogram`.
        site: its number.
        p: probabilities, NaN = not observed.
        truth: 0, 1, 255 = not labelled, of the same shape.
    """
    observed = np.isfinite(p)
    classes = logit_classes(p[observed])
    for k in (0, 1):
        chosen = classes[truth[observed] == k]
        histogram.pixels[site, k] += np.bincount(chosen, minlength=len(EDGES))
    histogram.unobserved_kelp[site] += np.count_nonzero(~observed & (truth == 1))


def reliability(histogram: Histogram) -> Reliability:
    """Of a histogram by logit, all sites together."""
    p = special.expit(_MIDDLES)
    counts = histogram.total().pixels
    pixels, kelp = counts.sum(axis=0), counts[1]
    parts = (pixels, pixels * p, kelp)
    sums = (np.bincount(bin_of(p), part, minlength=BINS).astype(np.float64) for part in parts)
    return Reliability(*sums)


def best_temperature(histogram: Histogram) -> float:
    """What logits must be divided by for the least cross-entropy."""
    pixels = histogram.total().pixels
    signed = np.stack([_MIDDLES, -_MIDDLES])

    def entropy(log_temperature: float) -> float:
        losses = np.logaddexp(0, signed / np.exp(log_temperature))
        return float((pixels * losses).sum() / pixels.sum())

    bounds = np.log(_COOLEST), np.log(_HOTTEST)
    return float(np.exp(optimize.minimize_scalar(entropy, bounds=bounds, method="bounded").x))


def combined_temperature(was: float, factor: float) -> float:
    """A temperature times another one, within what is sensible, in three digits."""
    return float(f"{np.clip(was * factor, _COOLEST, _HOTTEST):.3g}")


def as_threshold(k: int) -> float:
    """The threshold that begins with a class of logits, in few digits."""
    p = float(special.expit(EDGES[k]))
    return round(p, 2 - math.floor(math.log10(min(p, 1 - p))))


def nearest_class(threshold: float) -> int:
    """The class of `THRESHOLDS` that begins nearest to a threshold."""
    edge = special.logit(np.clip(threshold, 1e-3, 1 - 1e-3))
    return int(THRESHOLDS[np.abs(EDGES[THRESHOLDS] - edge).argmin()])


@dataclass(frozen=True)
class Calibration:
    """Threshold and temperature fitted to labelled sites, and what they gain.

    Attributes:
        before: pixels by logit and site, as the network was.
        after: the same with the new temperature.
        temperature: before, after.
        threshold: before, and as fitted.
        part: of each site, whose threshold was fitted on the other parts.
        bootstrap: draws of sites.
    """

    before: Histogram
    after: Histogram
    temperature: tuple[float, float]
    threshold: tuple[float, float]
    part: NDArray[np.intp]
    bootstrap: SiteBootstrap

    @property
    def sites(self) -> int:
        """Number of sites."""
        return len(self.part)

    @cached_property
    def held_out_classes(self) -> NDArray[np.intp]:
        """The class of logits that kelp begins with at each site, fitted on other sites."""
        others = self.after.grouped(self.part).others()
        found = best_threshold(others.dice(), THRESHOLDS)
        kelp = others.pixels[:, 1].sum(axis=-1) + others.unobserved_kelp > 0
        # Without kelp on the others there is nothing to fit to.
        chosen: NDArray[np.intp] = np.where(kelp, found, nearest_class(self.carried))[self.part]
        return chosen

    @cached_property
    def _counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """TP, FP, FN of each site, `(sites, 3)`: before; and at thresholds of other sites."""
        after = self.after.counts()[np.arange(self.sites), :, self.held_out_classes]
        return self.before.counts()[:, :, nearest_class(self.threshold[0])], after

    @cached_property
    def scores(self) -> dict[str, Estimate]:
        """Pooled Dice before, as fitted, and the difference, with intervals over sites."""
        values = [dice(*counts.sum(axis=0)) for counts in self._counts]
        drawn = [dice(*self.bootstrap.sums(counts).T) for counts in self._counts]
        return {
            "before": Estimate.of(values[0], drawn[0]),
            "fitted": Estimate.of(values[1], drawn[1]),
            "difference": Estimate.of(values[1] - values[0], drawn[1] - drawn[0]),
        }

    @property
    def gains(self) -> bool:
        """Whether the fitted threshold is better, where it was not fitted, than the old one.

        The interval must say so: on few sites with noisy labels a value alone moves by chance.
        """
        low = self.scores["difference"].low
        return self.sites > 1 and low is not None and low > 0

    @property
    def carried(self) -> float:
        """The old threshold where the temperature has moved it to."""
        old, (was, now) = self.threshold[0], self.temperature
        if was == now or not 0 < old < 1:
            return old
        return float(f"{special.expit(special.logit(old) * was / now):.3g}")

    @property
    def kept(self) -> float:
        """The threshold to decide by: the fitted one if it surely gains, else the old one."""
        return self.threshold[1] if self.gains else self.carried

    @cached_property
    def errors(self) -> tuple[float | None, float | None]:
        """Expected calibration error before and after."""
        return reliability(self.before).error, reliability(self.after).error

    @cached_property
    def threshold_interval(self) -> tuple[float, float] | None:
        """The middle 95 % of the best thresholds of bootstrap draws of sites.

        `None` where more than 5 % of the draws have no kelp.
        """
        by_site = self.after.counts()[..., THRESHOLDS]
        drawn = self.bootstrap.sums(by_site.reshape(self.sites, -1))
        tp, fp, fn = drawn.reshape(-1, *by_site.shape[1:]).transpose(1, 0, 2)
        best = best_threshold(dice(tp, fp, fn), np.arange(len(THRESHOLDS))).astype(np.float64)
        best[tp[:, 0] + fn[:, 0] == 0] = np.nan
        found = interval(best)
        if found is None:
            return None
        low, high = (as_threshold(int(THRESHOLDS[round(k)])) for k in found)
        return low, high

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "temperature": {"before": self.temperature[0], "after": self.temperature[1]},
            "threshold": {
                "before": self.threshold[0],
                "fitted": self.threshold[1],
                "after": self.kept,
                "interval": self.threshold_interval,
            },
            "pooled_dice": {
                name: {
                    "value": score.value,
                    "interval": None if score.low is None else (score.low, score.high),
                }
                for name, score in self.scores.items()
            },
            "calibration_error": {"before": self.errors[0], "after": self.errors[1]},
        }
