"""One plain recommendation out of a comparison; it may well be not to slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kelp.evaluation.bootstrap import FEW_SITES, Estimate
from kelp.nn.comparison.result import Comparison, Evaluation


@dataclass(frozen=True)
class Advice:
    """The answer to "should I slice?"."""

    slice: bool
    text: str
    whole: Evaluation | None
    """The best variant that shows the network whole images."""
    sliced: Evaluation | None
    """The best sliced variant, of the first one of each network."""
    difference: Estimate | None
    """Pooled Dice, sliced less whole."""
    training: Estimate | None = None
    """Pooled Dice of the best network trained on tiles, as `kelp predict` applies it, less that
    of the best one trained on whole images, applied to whole images; if there are both."""

    def to_json(self) -> dict[str, Any]:
        """By name; variants by theirs."""
        return {
            "slice": self.slice,
            "text": self.text,
            "whole": self.whole and self.whole.name,
            "sliced": self.sliced and self.sliced.name,
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
    gain = tiles.difference(images)
    if gain.low is None or gain.high is None:
        return applied
    verdict = (
        "slice" if gain.low > 0 else "do not slice" if gain.high < 0 else "no difference shown"
    )
    text = (
        f"In training: {verdict}, {_amount(gain)} ({tiles.name} against {images.name}). "
        f"At prediction: {applied.text}"
    )
    return replace(applied, text=text, training=gain)


def _amount(gain: Estimate) -> str:
    return f"{gain.number('+.3f')} Dice, 95 % interval {gain.bounds('+.3f')}"


def _applied(comparison: Comparison) -> Advice:
    """Slice only where the interval of the gain in pooled Dice lies above 0."""
    whole = comparison.best(("whole", "whole, upsampled"))
    sliced = comparison.best(("sliced",))
    if not comparison.of_kinds(("sliced",)):
        text = (
            "No answer: no sliced variant is small enough to be run (--largest_pass), so there "
            "was nothing to compare with."
        )
        return Advice(False, text, whole, sliced, None)
    if sliced is None:
        text = "No answer: these scenes hold no kelp, neither true nor predicted."
        return Advice(False, text, whole, sliced, None)
    if whole is None:
        text = (
            "Slice: these scenes are too large to be shown to a network at once "
            "(--largest_pass), so there was nothing to compare with."
        )
        return Advice(True, text, whole, sliced, None)
    gain = sliced.difference(whole)
    cost = sliced.multiplier / whole.multiplier
    names = f"({sliced.name} against {whole.name})"
    price = f"It costs {cost:.1f} times the network pixels."
    if gain.low is None or gain.high is None:
        text = f"No answer: too few images have kelp to tell {names}."
        return Advice(False, text, whole, sliced, gain)
    if gain.low > 0:
        text = f"Slice: {_amount(gain)} {names}. {price}"
    elif gain.high < 0:
        text = f"Do not slice, it harms: {_amount(gain)} {names}. {price}"
    else:
        text = f"Do not slice, no gain can be shown: {_amount(gain)} {names}. {price}"
    if comparison.sites < FEW_SITES:
        text += f" With {comparison.sites} sites only, take the interval as too narrow."
    return Advice(gain.low > 0, text, whole, sliced, gain)
