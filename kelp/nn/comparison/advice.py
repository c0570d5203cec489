"""One plain recommendation out of a comparison; it may well be not to slice."""

from __future__ import annotations

from dataclasses import dataclass
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

    def to_json(self) -> dict[str, Any]:
        """By name; ways by theirs."""
        return {
            "slice": self.slice,
            "text": self.text,
            "whole": self.whole and self.whole.way.name,
            "sliced": self.sliced and self.sliced.way.name,
            "difference": self.difference and self.difference.to_json(),
        }


def advise(comparison: Comparison) -> Advice:
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
    amount = f"{gain.value:+.3f} Dice, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
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
