"""One plain recommendation out of a comparison; it may well be not to slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from kelp.nn.comparison.result import Comparison, Estimate, Judged

_FEW_PLACES: Final = 8
"""Below this the bootstrap's intervals are too narrow to lean on (Efron & Tibshirani 1993)."""


@dataclass(frozen=True)
class Advice:
    """The answer to "should I slice?"."""

    slice: bool
    text: str
    whole: Judged | None
    """The best way of showing the network whole images."""
    sliced: Judged | None
    """The best sliced way, of those that lead their network's."""
    difference: Estimate | None
    """Pooled Dice, sliced less whole."""
    training: Estimate | None = None
    """Pooled Dice of the best network trained on tiles, as `kelp predict` applies it, less that
    of the best one trained on whole images, applied to whole images; if there are both."""

    def to_json(self) -> dict[str, Any]:
        """By name; ways by theirs."""
        return {
            "slice": self.slice,
            "text": self.text,
            "whole": self.whole and self.whole.way.name,
            "sliced": self.sliced and self.sliced.way.name,
            "difference": self.difference and self.difference.to_json(),
            "training": self.training and self.training.to_json(),
        }


def advise(comparison: Comparison) -> Advice:
    """What to train on, if networks of both kinds are there, and how to apply the network."""
    applied = _applied(comparison)
    tiles = comparison.best(("sliced",), sahi=True)
    images = comparison.best(("whole",), sahi=False)
    if tiles is None or images is None or applied.difference is None:
        return applied
    gain = comparison.difference(tiles, images)
    if gain.value is None or gain.low is None or gain.high is None:
        return applied
    verdict = (
        "slice" if gain.low > 0 else "do not slice" if gain.high < 0 else "no difference shown"
    )
    text = (
        f"In training: {verdict}, {_amount(gain)} ({tiles.way.name} against {images.way.name}). "
        f"At prediction: {applied.text}"
    )
    return replace(applied, text=text, training=gain)


def _amount(gain: Estimate) -> str:
    return f"{gain.value:+.3f} Dice, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"


def _applied(comparison: Comparison) -> Advice:
    """Slice only where the interval of the gain in pooled Dice lies above 0."""
    whole = comparison.best(("whole", "whole, upsampled"))
    sliced = comparison.best(("sliced",))
    if sliced is None:
        text = "No answer: these scenes hold no kelp, neither true nor predicted."
        return Advice(False, text, whole, sliced, None)
    if whole is None:
        text = (
            "Slice: these scenes are too large to be shown to a network at once "
            "(--largest_pass), so there was nothing to compare with."
        )
        return Advice(True, text, whole, sliced, None)
    gain = comparison.difference(sliced, whole)
    cost = sliced.multiplier / whole.multiplier
    ways = f"({sliced.way.name} against {whole.way.name})"
    price = f"It costs {cost:.1f} times the network pixels."
    if gain.low is None or gain.high is None or gain.value is None:
        text = f"No answer: too few images have kelp to tell {ways}."
        return Advice(False, text, whole, sliced, gain)
    amount = _amount(gain)
    if gain.low > 0:
        text = f"Slice: {amount} {ways}. {price}"
    elif gain.high < 0:
        text = f"Do not slice, it harms: {amount} {ways}. {price}"
    else:
        text = f"Do not slice, no gain can be shown: {amount} {ways}. {price}"
    places = max(comparison.places) + 1
    if places < _FEW_PLACES:
        text += f" With {places} places only, take the interval as too narrow."
    return Advice(gain.low > 0, text, whole, sliced, gain)
