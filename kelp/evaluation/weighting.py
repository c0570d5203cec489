"""Weights and threshold of an ensemble, fitted to scenes that its networks never learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.evaluation.thresholds import best_threshold, parts_of
from kelp.raster.probability import CODES

_MOST_MIXTURES: Final = 300
_FINEST: Final = 20  # weights in steps of 0.05
_LEAST: Final = (
    5  # the lowest threshold, in steps of 1 / CODES: nearly all of the sea lies below it
)


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and the pooled Dice of the labelled scenes with it.

    Attributes:
        weights: of the networks; sum 1.
        threshold: kelp where the weighted mean is at least this.
        dice: with these.
        dice_equal: with equal weights, at the threshold that suits them best.
        dice_alone: of each network alone, at the threshold that suits it best.
        held_out: Dice of parts of the places with weights and threshold of the other parts.
        held_out_equal: the same with equal weights. Not below `held_out`: equal ones are kept.
        scenes: labelled scenes.
        places: their places.
    """

    weights: tuple[float, ...]
    threshold: float
    dice: float
    dice_equal: float
    dice_alone: tuple[float, ...]
    held_out: float
    held_out_equal: float
    scenes: int
    places: int

    def to_json(self) -> dict[str, Any]:
        """All figures, by name."""
        return asdict(self)

    def summary(self) -> str:
        """Two lines for the terminal."""
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        alone = ", ".join(f"{dice:.4f}" for dice in self.dice_alone)
        kept = "" if self.held_out > self.held_out_equal else "; equal weights are kept"
        return (
            f"weights {weights}, threshold {self.threshold:g}: pooled Dice {self.dice:.4f} "
            f"(equal weights {self.dice_equal:.4f}, alone {alone})\n"
            f"fitted weights on other places than they were fitted to: {self.held_out:.4f}, "
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
    """Whether few enough ways exist of dealing `parts` to `count`."""
    ways = 1
    for k in range(1, count):
        ways = ways * (parts + k) // k
    return ways <= _MOST_MIXTURES


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
        places: the place of each scene that will come, in their order.
        count: networks.
        seed: of dealing places into parts.
    """

    def __init__(self, places: Sequence[str], count: int, seed: int = 0) -> None:
        names, self._number = np.unique(np.array(places), return_inverse=True)
        self._places = len(names)
        self._part = parts_of(self._places, seed)
        self._mixtures = mixtures(count)
        self._counted = np.zeros(
            (self._part.max() + 1, len(self._mixtures), 2, CODES + 1), dtype=np.int64
        )

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
        kelp = truth[labelled] == 1
        seen = np.isfinite(p)
        p = np.where(seen, p, 0).astype(np.float64)
        low = p.max(axis=0) < _LEAST / CODES  # no mixture lifts them above the lowest threshold
        counted = self._counted[self._part[self._number[scene]]]
        counted[:, 0, 0] += np.count_nonzero(low & ~kelp)
        counted[:, 1, 0] += np.count_nonzero(low & kelp)
        p, seen, kelp = p[:, ~low], seen[:, ~low], kelp[~low]
        for mixture, weights in enumerate(self._mixtures):
            cast = weights @ seen
            mean = np.divide(weights @ p, cast, out=np.zeros_like(cast), where=cast > 0)
            codes = (mean * CODES + 1e-6).astype(np.intp)  # 0.5 of equal votes stays 0.5
            found = np.bincount(codes + (CODES + 1) * kelp, minlength=2 * (CODES + 1))
            counted[mixture] += found.reshape(2, CODES + 1)

    def fit(self) -> Fitted:
        """Choose weights and threshold.

        Raises:
            InputError: no labelled pixel is kelp, or all scenes are of one place.
        """
        if self._places < 2:
            raise InputError(
                "--gt_dir: all labelled scenes are of one place; weights are judged on places "
                "they were not fitted to, give scenes of several"
            )
        everywhere = self._counted.sum(axis=0)
        if not everywhere[0, 1].sum():
            raise InputError("--gt_dir: no labelled pixel is kelp; nothing can be fitted")
        dices = [_best(by_code)[0] for by_code in everywhere]
        held_out = self._held_out(len(self._mixtures))
        held_out_equal = self._held_out(1)
        chosen = int(np.argmax(dices)) if held_out > held_out_equal else 0
        dice, code = _best(everywhere[chosen])
        alone = [int(np.argmax(self._mixtures[:, k])) for k in range(self._mixtures.shape[1])]
        return Fitted(
            weights=tuple(float(weight) for weight in self._mixtures[chosen]),
            threshold=code / CODES,
            dice=dice,
            dice_equal=dices[0],
            dice_alone=tuple(dices[k] for k in alone),
            held_out=held_out,
            held_out_equal=held_out_equal,
            scenes=len(self._number),
            places=self._places,
        )

    def _held_out(self, mixtures: int) -> float:
        """Dice of every part with what suits the others best, of the first so many mixtures."""
        everywhere = self._counted.sum(axis=0)
        tables = []
        for part in self._counted:
            others = (everywhere - part)[:mixtures]
            best = [_best(by_code) for by_code in others]
            chosen = int(np.argmax([dice for dice, _ in best]))
            tables.append(_table(part[chosen], best[chosen][1]))
        return _dice(np.sum(tables, axis=0))


def _best(by_code: NDArray[np.int64]) -> tuple[float, int]:
    """The best pooled Dice of a mixture, and the code it is reached at."""
    code = max(_LEAST, best_threshold(by_code))
    return _dice(_table(by_code, code)), code


def _table(by_code: NDArray[np.int64], code: int) -> NDArray[np.int64]:
    """TP, FP, FN."""
    false, true = by_code[:, code:].sum(axis=1)
    return np.array([true, false, by_code[1].sum() - true])


def _dice(table: NDArray[np.int64]) -> float:
    tp, fp, fn = (int(n) for n in table)
    return 2 * tp / max(1, 2 * tp + fp + fn)
