"""The picture of a sweep: the score over the trials, and which options mattered."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kelp.nn.search.study import Importance, Outcome

_INK, _QUIET, _GRID, _BLUE, _ORANGE = "#1c2733", "#5b6875", "#e3e7eb", "#1f6fb2", "#d9820b"
_OPTION_HEIGHT: Final = 0.34  # inches
_LONGEST_NAME: Final = 34


def draw(
    outcomes: Sequence[Outcome],
    metric: str,
    mode: str,
    importances: Mapping[str, Importance] | None,
    why_not: str,
) -> bytes:
    """A PNG of two panels: `metric` over the trials, and the importance of each option.

    Args:
        outcomes: the trials that ended.
        metric: the score's name.
        mode: whether `max` or `min` of it is best.
        importances: `None` where they cannot be told.
        why_not: what to say then.
    """
    from matplotlib.figure import Figure

    height = max(3.6, 1.6 + _OPTION_HEIGHT * len(importances or ()))
    figure = Figure(figsize=(11, height), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_values(left, outcomes, metric, mode)
    if importances is None:
        _say(right, why_not)
    else:
        complete = sum(one.state == "complete" for one in outcomes)
        _draw_importances(right, importances, complete)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _draw_values(axes: Axes, outcomes: Sequence[Outcome], metric: str, mode: str) -> None:
    complete = [
        (t.number, t.value) for t in outcomes if t.state == "complete" and t.value is not None
    ]
    pruned = [(t.number, t.value) for t in outcomes if t.state == "pruned" and t.value is not None]
    without = [t.number for t in outcomes if t.value is None]
    if complete:
        numbers, values = zip(*complete, strict=True)
        best = list(accumulate(values, max if mode == "max" else min))
        last = max(t.number for t in outcomes)
        axes.step(
            [*numbers, last],
            [*best, best[-1]],
            where="post",
            color=_ORANGE,
            lw=1.6,
            label="best so far",
        )
        axes.plot(numbers, values, "o", color=_BLUE, ms=6, label="complete")
    if pruned:
        numbers, values = zip(*pruned, strict=True)
        axes.plot(
            numbers, values, "o", mfc="white", mec=_BLUE, ms=6, label="pruned: its last score"
        )
    if without:
        # Their height says nothing: they stand on the lower edge.
        axes.plot(
            without,
            [0.02] * len(without),
            "x",
            color=_QUIET,
            ms=6,
            label="failed, or refused",
            transform=axes.get_xaxis_transform(),
        )
    _title(axes, f"{metric} of the trials ({'more' if mode == 'max' else 'less'} is better)")
    axes.set_xlabel("trial", color=_QUIET, size=9)
    axes.locator_params(axis="x", integer=True)
    axes.grid(visible=True, color=_GRID, lw=0.8)
    axes.margins(x=0.04, y=0.12)
    _plain(axes)
    if outcomes:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="best")


def _draw_importances(axes: Axes, importances: Mapping[str, Importance], complete: int) -> None:
    for k, one in enumerate(importances.values()):
        axes.barh(k, one.share, height=0.6, color=_BLUE)
        axes.plot([one.chance] * 2, [k - 0.4, k + 0.4], color=_ORANGE, lw=2.2)
        axes.text(
            max(one.share, one.chance) + 0.015,
            k,
            f"{one.share:.2f}",
            va="center",
            size=8.5,
            color=_INK,
        )
    names = [
        name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
        for name in importances
    ]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    longest = max(max(one.share, one.chance) for one in importances.values())
    axes.set_xlim(0, max(longest * 1.15, 0.1))
    _title(axes, "Importance of the options")
    axes.set_xlabel(
        f"share of the variance among {complete} complete trials (fANOVA);\n"
        "orange: the same with the scores dealt by chance",
        color=_QUIET,
        size=9,
    )
    axes.grid(visible=True, axis="x", color=_GRID, lw=0.8)
    _plain(axes)


def _say(axes: Axes, words: str) -> None:
    """A panel without anything to draw."""
    _title(axes, "Importance of the options")
    axes.set_axis_off()
    axes.text(0, 0.9, words, transform=axes.transAxes, va="top", size=10, color=_QUIET, wrap=True)


def _title(axes: Axes, words: str) -> None:
    axes.set_title(words, loc="left", size=11, weight="bold", color=_INK)


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_QUIET)
