"""Charts of reports and runs, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from kelp.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Sequence[tuple[float, float]]

_GUIDE: Final = "calibrated"
"""The line to compare others with."""
_BARS: Final = 20
"""At most; with all 47 channels most would be too short to see."""
_FEW: Final = 30
"""Points of a line below which each has a marker: a lone point has no line."""


def curves(history: Mapping[str, Series], best: int | None = None) -> bytes:
    """Training curves: one panel for each quantity, one line for each split.

    Args:
        history: `(step, value)` pairs by name; `train/loss` and `val/loss` share the panel
            "loss". Values that are not finite are gaps.
        best: the epoch to mark in every panel, where the steps are epochs.
    """
    panels: dict[str, dict[str, Series]] = {}
    for name, series in history.items():
        split, _, quantity = name.rpartition("/")
        panels.setdefault(quantity, {})[split] = series
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = style.figure(4.2 * columns, 2.9 * rows)
    for k, (quantity, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, k)
        _mark(axes, best)
        _plot(axes, lines)
        style.title(axes, quantity)
        style.plain(axes)
        if all(float(step).is_integer() for series in lines.values() for step, _ in series):
            axes.locator_params(axis="x", integer=True)  # epochs come whole
        axes.margins(x=0.03)
        if any(lines):
            style.legend(axes)
    if best is not None:
        figure.supxlabel("epoch", size=9, color=style.QUIET_INK)
    return style.png(figure)


def _mark(axes: Axes, best: int | None) -> None:
    if best is None:
        return
    side: Any = {"ha": "right", "xytext": (-4, -2)} if best > 1 else {"xytext": (4, -2)}
    axes.axvline(best, color=style.QUIET_INK, lw=1.2, ls=":")
    axes.annotate(
        f"best: {best}",
        (best, 1),
        xycoords=axes.get_xaxis_transform(),  # of the panel, whatever its values
        textcoords="offset points",
        va="top",
        size=8,
        color=style.QUIET_INK,
        **side,
    )


def _plot(axes: Axes, lines: Mapping[str, Series]) -> None:
    for k, (name, series) in enumerate(lines.items()):
        axes.plot(
            [x for x, _ in series],
            [y if math.isfinite(y) else math.nan for _, y in series],
            "--" if name == _GUIDE else "-",
            color=style.LINES[k % len(style.LINES)],
            lw=1.8,
            marker="o" if name != _GUIDE and len(series) < _FEW else "",
            ms=3.5,
            label=name,
        )


def lines(values: Mapping[str, Series], across: str, up: str) -> bytes:
    """Shares against shares, one line for each name; NaN is a gap, `calibrated` dashed.

    Args:
        values: `(x, y)` pairs between 0 and 1, by name.
        across: what x is, for the axis.
        up: what y is.
    """
    figure = style.figure(7.2, 3.8)
    axes = figure.add_subplot()
    _plot(axes, values)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    style.plain(axes, across, up)
    if len(values) > 1:
        style.legend(axes)
    return style.png(figure)


def intervals(
    values: Mapping[str, tuple[float | None, float | None, float | None]], quantity: str
) -> bytes:
    """Estimates with their intervals, one below the other.

    Args:
        values: value, low and high by name, `None` where undefined.
        quantity: what they are, for the axis.
    """
    figure = style.figure(8.4, 1.0 + 0.32 * max(len(values), 1))
    axes = figure.add_subplot()
    for k, (value, low, high) in enumerate(values.values()):
        if low is not None and high is not None:
            axes.plot([low, high], [k, k], color=style.LINES[0], lw=2.4, solid_capstyle="butt")
        axes.plot([math.nan if value is None else value], [k], "o", color=style.INK, ms=5)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    style.plain(axes, quantity, grid="x")
    return style.png(figure)


def by_class(
    values: Mapping[str, Sequence[float | None]], classes: Sequence[str], quantity: str
) -> bytes:
    """Shares by class, one line for each name; `None` is a gap."""
    figure = style.figure(7.2, 3.4)
    axes = figure.add_subplot()
    shares = {
        name: [(k, math.nan if share is None else share) for k, share in enumerate(each)]
        for name, each in values.items()
    }
    _plot(axes, shares)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_ylim(-0.03, 1.03)
    style.plain(axes, y=quantity)
    style.legend(axes)
    return style.png(figure)


def bars(shares: Mapping[str, float], heading: str, quantity: str) -> bytes:
    """A bar for each of the first shares, in their order; the rest as one."""
    shown = dict(list(shares.items())[:_BARS])
    if rest := list(shares.values())[_BARS:]:
        shown[f"{len(rest)} others"] = sum(rest)
    figure = style.figure(6.5, 1.1 + 0.24 * len(shown))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), list(shown.values()), height=0.66, color=style.LINES[0])
    largest = max(shown.values(), default=0.0)
    for k, share in enumerate(shown.values()):
        axes.text(share + largest / 80, k, f"{share:.1%}", va="center", size=8.5, color=style.INK)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.12 or 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    style.title(axes, heading)
    style.plain(axes, quantity, grid="x")
    return style.png(figure)


def confusion(tp: int, fp: int, fn: int, tn: int) -> bytes:
    """The four counts of pixels, in the colours of the previews.

    Each cell also shows its share of its row: of the true kelp, and of the rest.
    """
    from matplotlib.patches import Rectangle

    figure = style.figure(5.2, 3.3)
    axes = figure.add_subplot()
    cells = (
        (0, 0, tp, tp + fn, style.KELP, "found"),
        (0, 1, fn, tp + fn, style.MISSED, "missed"),
        (1, 0, fp, fp + tn, style.FALSE, "false alarm"),
        (1, 1, tn, fp + tn, style.NO_KELP, "true negative"),
    )
    for row, column, number, whole, color, words in cells:
        middle: dict[str, Any] = {"ha": "center", "va": "center"}
        middle["color"] = "white" if sum(color) < 400 else style.INK
        box = Rectangle((column + 0.02, row + 0.02), 0.96, 0.96, color=style.web_color(color))
        axes.add_patch(box)
        share = f"{number / whole:.2%} of the row" if whole else "no such pixel"
        axes.text(column + 0.5, row + 0.42, f"{number:,}", size=15, weight="bold", **middle)
        axes.text(column + 0.5, row + 0.68, f"{words}, {share}", size=8.5, **middle)
    axes.set_xlim(0, 2)
    axes.set_ylim(2, 0)
    axes.set_xticks([0.5, 1.5], ["predicted kelp", "predicted none"])
    axes.set_yticks([0.5, 1.5], ["kelp", "no kelp"])
    axes.tick_params(length=0, labelsize=10, colors=style.INK)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return style.png(figure)
