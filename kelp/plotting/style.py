"""The one look of every picture and page: colours, letters, plain axes, PNG files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from kelp.raster.writer import MASK_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = tuple[int, int, int]

INK: Final = "#1c2733"
QUIET_INK: Final = "#5b6875"
RULE: Final = "#c5ccd3"
GRID: Final = "#e3e7eb"
LINES: Final = ("#1f6fb2", "#d9820b", "#2a8c57", "#b0336f", "#6a56b8", "#5b6875")
"""Lines of a chart, in their order."""

NO_KELP: Final[Color] = MASK_COLORS[0][:3]
KELP: Final[Color] = MASK_COLORS[1][:3]
MISSED: Final[Color] = (225, 29, 116)
"""Kelp that the prediction lacks; this and `FALSE` stay apart from `KELP` for colour-blind eyes."""
FALSE: Final[Color] = (64, 224, 255)
"""Predicted kelp that is none."""
HATCH_LIGHT: Final[Color] = (214, 217, 220)
HATCH_DARK: Final[Color] = (160, 165, 171)

_DPI: Final = 150


def web_color(color: Color) -> str:
    """A colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches, laid out by matplotlib; not of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")


def png(drawn: Figure) -> bytes:
    """The bytes of a PNG file; the same figure gives the same bytes."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def title(axes: Axes, words: str) -> None:
    """The title of a panel."""
    axes.set_title(words, loc="left", size=11, weight="bold", color=INK)


def plain(axes: Axes, x: str = "", y: str = "", grid: bool | str = True) -> None:
    """No frame but the lower edge, quiet labels, a light grid.

    Args:
        axes: the panel.
        x: label of the horizontal axis.
        y: label of the vertical one.
        grid: of both axes, or only `x`.
    """
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="x" if grid == "x" else "both", color=GRID, lw=0.8)
    axes.tick_params(colors=QUIET_INK, labelsize=8.5, length=0)
    axes.set_xlabel(x, color=QUIET_INK, size=9)
    axes.set_ylabel(y, color=QUIET_INK, size=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(QUIET_INK)


def legend(axes: Axes) -> None:
    """Names of the lines, without a frame."""
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
