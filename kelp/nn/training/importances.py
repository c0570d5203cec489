"""What each channel is worth to boosted trees: a file of numbers and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kelp.io.files import atomic, write_json

IMPORTANCES: Final = "feature_importances"
_BARS: Final = 20
"""In the picture at most; with all 47 channels most would be too short to see."""

_INK, _QUIET, _GRID, _BLUE = "#1c2733", "#5b6875", "#e3e7eb", "#1f6fb2"


def draw_importances(folder: Path, gains: Mapping[str, float]) -> dict[str, float]:
    """Write `feature_importances.json` and `.png`; give the shares, the largest first.

    Args:
        folder: where to.
        gains: of each channel: by how much its splits lowered the training loss.
    """
    total = sum(gains.values()) or 1.0
    ordered = dict(sorted(gains.items(), key=lambda item: -item[1]))
    rows = {name: {"gain": gain, "share": gain / total} for name, gain in ordered.items()}
    write_json(folder / f"{IMPORTANCES}.json", rows)
    shares = {name: row["share"] for name, row in rows.items()}
    png = _picture(shares)
    with atomic(folder / f"{IMPORTANCES}.png") as partial:
        partial.write_bytes(png)
    return shares


def _picture(shares: Mapping[str, float]) -> bytes:
    """A bar for each of the first channels, the rest as one; the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rest = list(shares.values())[_BARS:]
    shares = dict(list(shares.items())[:_BARS])
    if rest:
        shares[f"{len(rest)} others"] = sum(rest)
    figure = Figure(figsize=(6.5, 1.1 + 0.24 * len(shares)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(range(len(shares)), list(shares.values()), height=0.66, color=_BLUE)
    largest = max(shares.values())
    for k, share in enumerate(shares.values()):
        axes.text(share + largest / 80, k, f"{share:.1%}", va="center", size=8.5, color=_INK)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.12 or 1)
    axes.set_title("Importance of the channels", loc="left", size=11, weight="bold", color=_INK)
    axes.set_xlabel("share of the gain of all splits", color=_QUIET, size=9)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(visible=True, axis="x", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_QUIET)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
