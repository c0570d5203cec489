"""Weights and threshold of an ensemble, fitted to scenes that its networks never learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.evaluation.bootstrap import site_numbers
from kelp.evaluation.confusion import dice
from kelp.evaluation.thresholds import Histogram, best_threshold, parts_of
from kelp.raster.probability import CODES, quantise

_MOST_MIXTURES: Final = 300
_FINEST: Final = 20  # weights in steps of 0.05
_LEAST: Final = 5  # the lowest threshold, as a code: nearly all of the sea lies below it
_ALLOWED: Final = np.arange(_LEAST, CODES + 1)


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and the pooled Dice of the labelled scenes with it.

    Attributes:
        weights: of the networks; sum 1.
        threshold: kelp where the weighted mean is at least this.
        dice: with these.
        dice_equal: with equal weights, at the threshold that suits them best.
        dice_alone: of each network alone, at the threshold that suits it best.
        held_out: Dice of parts of the sites with weights and threshold of the other parts.
        held_out_equal: the same with equal weights. Not below `held_out`: equal ones are kept.
        scenes: labelled scenes.
        sites: their sites.
    """

    weights: tuple[float, ...]
    threshold: float
    dice: float
    dice_equal: float
    dice_alone: tuple[float, ...]
    held_out: float
    held_out_equal: float
    scenes: int
    sites: int

    def to_json(self) -> dict[str, Any]:
        """All figures, by name."""
        values = asdict(self)
        values["places"] = values.pop("sites")  # the file's name for it
        return values

    def summary(self) -> str:
        """Two lines for the terminal."""
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        alone = ", ".join(f"{dice:.4f}" for dice in self.dice_alone)
        kept = "" if self.held_out > self.held_out_equal else "; equal weights are kept"
        return (
            f"weights {weights}, threshold {self.threshold:g}: pooled Dice {self.dice:.4f} "
            f"(equal weights {self.dice_equal:.4f}, alone {alone})\n"
            f"fitted weights on other sites than they were fitted to: {self.held_out:.4f}, "
            f"equal ones {self.held_out_equal:.4f}{kept}"
        )


def mixtures(count: int) -> NDArray[np.float64]:
    """Weights to choose from, `(mixtures, count)`: the equal ones first, then by nearness to them.

    All that are whole n-ths with sum 1, n as large as leaves at most 300 of them (20 at most).
    """
    parts = next(n for n in range(_FINEST, 0, -1) if n == 1 or _few(n, count))
    found = np.array(list(_shares(parts, count)), dtype=np.float64) / parts
    equal = np.full((1, count), 1 / count)
    found = found[np.abs(found - equal).max(axis=1) > 1e-9]
    order = np.argsort(((found - equal) ** 2).sum(axis=1), kind="stable")
    return np.concatenate([equal, found[order]])


def _few(parts: int, count: int) -> bool:
    """Whether `parts` can be shared among `count` in few enough combinations."""
    return comb(parts + count - 1, parts) <= _MOST_MIXTURES


def _shares(parts: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (parts,)
        return
    for first in range(parts + 1):
        for others in _shares(parts - first, count - 1):
            yield first, *others


class Weighting:
    """Counts what every mixture makes of labelled pixels, and chooses one.

    Args:
        sites: the site of each scene that will come, in their order.
        count: networks.
        seed: of sharing sites out into parts.
    """

    def __init__(self, sites: Sequence[str], count: int, seed: int = 0) -> None:
        self._number = site_numbers(sites)
        self._sites = len(set(sites))
        self._part = parts_of(self._sites, seed)
        self._mixtures = mixtures(count)
        self._counted = Histogram.empty((int(self._part.max()) + 1, len(self._mixtures)))

    def add(
        self, scene: int, votes: Iterable[NDArray[np.float32]], truth: NDArray[np.uint8]
    ) -> None:
        """Count pixels of a scene.

        Args:
            scene: its number.
            votes: probabilities of each network, `(height, width)`; NaN = not observed.
            truth: 0, 1, 255 = not labelled, of the same shape.
        """
        labelled = truth != 255
        p = np.stack([vote[labelled] for vote in votes])
        truth = truth[labelled]
        part = int(self._part[self._number[scene]])
        seen = np.isfinite(p)
        p = np.where(seen, p, 0).astype(np.float64)
        # No mixture lifts these above the lowest threshold.
        low = seen.all(axis=0) & (p.max(axis=0) < (_LEAST - 0.5) / CODES)
        for k in (0, 1):
            self._counted.pixels[part, :, k, 0] += np.count_nonzero(low & (truth == k))
        p, seen, truth = p[:, ~low], seen[:, ~low], truth[~low]
        for mixture, weights in enumerate(self._mixtures):
            cast = weights @ seen
            mean = np.divide(weights @ p, cast, out=np.full_like(cast, np.nan), where=cast > 0)
            self._counted.add((part, mixture), truth, quantise(mean))

    def fit(self) -> Fitted:
        """Choose weights and threshold.

        Raises:
            InputError: no labelled pixel is kelp, or all scenes are of one site.
        """
        if self._sites < 2:
            raise InputError(
                "--gt_dir: all labelled scenes are of one site; weights are evaluated on sites "
                "they were not fitted to, give scenes of several"
            )
        everywhere = self._everywhere()
        dices = everywhere.dice()
        if np.isnan(everywhere.recall()).all():
            raise InputError("--gt_dir: no labelled pixel is kelp; nothing can be fitted")
        codes = best_threshold(dices, _ALLOWED)
        best = np.take_along_axis(dices, codes[:, np.newaxis], axis=1)[:, 0]
        held_out, held_out_equal = self._held_out(len(self._mixtures)), self._held_out(1)
        chosen = int(best.argmax()) if held_out > held_out_equal else 0
        alone = [int(np.argmax(self._mixtures[:, k])) for k in range(self._mixtures.shape[1])]
        return Fitted(
            weights=tuple(float(weight) for weight in self._mixtures[chosen]),
            threshold=float(codes[chosen] / CODES),
            dice=float(best[chosen]),
            dice_equal=float(best[0]),
            dice_alone=tuple(float(best[k]) for k in alone),
            held_out=held_out,
            held_out_equal=held_out_equal,
            scenes=len(self._number),
            sites=self._sites,
        )

    def _everywhere(self) -> Histogram:
        return Histogram(
            self._counted.pixels.sum(axis=0), self._counted.unobserved_kelp.sum(axis=0)
        )

    def _held_out(self, mixtures: int) -> float:
        """Dice of every part with what suits the others best, of the first so many mixtures."""
        counts = self._counted.counts()
        total = np.zeros(3, dtype=np.int64)
        for part, others in enumerate(self._counted.others().dice()):
            codes = best_threshold(others[:mixtures], _ALLOWED)
            reached = others[np.arange(mixtures), codes]
            chosen = int(np.nan_to_num(reached).argmax())
            total += counts[part, chosen, :, codes[chosen]]
        return float(np.nan_to_num(dice(*total)))
