"""One self-contained HTML file of text, tables and pictures: nothing is fetched, nothing runs.

All text is escaped. What a text may hold is a small part of Markdown: headings, paragraphs,
lists, fenced code, and inside a line `code`, **bold** and [links](https://example.org).
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kelp.io.files import write_text
from kelp.plotting.rendering import FALSE, KELP, MISSED, NO_KELP, web_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Sequence[tuple[float, float]]

_INK, _QUIET_INK, _GRID = "#1c2733", "#5b6875", "#e3e7eb"
_LINES: Final = ("#1f6fb2", "#d9820b", "#2a8c57", "#b0336f", "#6a56b8", "#5b6875")
_PIXELS_PER_CSS_PIXEL: Final = 1.5  # pictures stay sharp on dense screens
_FEW_SECTIONS: Final = 4
"""Below this a page needs no list of them."""
_SAFE_LINK: Final = re.compile(r"(https?://|[\w./#-]+$)")


class Report:
    """A page built from top to bottom; `write` makes the file.

    Every method returns the report, so that calls can be chained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body: list[str] = []

    def text(self, markdown: str) -> Report:
        """Add text (see the module for what it may hold); HTML in it is shown, not obeyed."""
        self._body.extend(_blocks(markdown))
        return self

    def cards(self, figures: Mapping[str, str]) -> Report:
        """Add a row of key figures: large values over their names."""
        cards = "".join(
            f"<div><dd>{html.escape(value)}</dd><dt>{html.escape(name)}</dt></div>"
            for name, value in figures.items()
        )
        self._body.append(f'<dl class="cards">{cards}</dl>')
        return self

    def table(self, rows: Sequence[Sequence[object]], caption: str = "") -> Report:
        """Add a table; the first row is its heading. Numbers are set to the right.

        Floats are shown with four significant digits, `None` as a dash.
        """
        head, *body = rows
        numeric = [
            any(isinstance(row[k], int | float) for row in body)
            and all(row[k] is None or isinstance(row[k], int | float) for row in body)
            for k in range(len(head))
        ]

        def line(row: Sequence[object], tag: str) -> str:
            cells = (
                f"<{tag}{' class=n' if right else ''}>{html.escape(_cell(value))}</{tag}>"
                for value, right in zip(row, numeric, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        title = f"<caption>{_inline(caption)}</caption>" if caption else ""
        words = html.escape(re.sub(r"[*`]", "", caption) or "table", quote=True)
        lines = "".join(line(row, "td") for row in body)
        self._body.append(
            # Wide tables scroll in a box of their own, which the keyboard must reach.
            f'<div class="wide" role="region" aria-label="{words}" tabindex="0">'
            f"<table>{title}<thead>{line(head, 'th')}</thead>"
            f"<tbody>{lines}</tbody></table></div>"
        )
        return self

    def figure(self, png: bytes, caption: str = "") -> Report:
        """Add a picture (the bytes of a PNG file); the caption also describes it to readers."""
        data = base64.b64encode(png).decode("ascii")
        words = html.escape(re.sub(r"[*`]", "", caption), quote=True)
        note = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        width = round(int.from_bytes(png[16:20], "big") / _PIXELS_PER_CSS_PIXEL)
        self._body.append(
            f'<figure><img width="{width}" alt="{words}" src="data:image/png;base64,{data}">'
            f"{note}</figure>"
        )
        return self

    def details(self, summary: str, markdown: str) -> Report:
        """Add text that is shown when its summary is opened."""
        inner = "".join(_blocks(markdown))
        self._body.append(f"<details><summary>{_inline(summary)}</summary>{inner}</details>")
        return self

    def write(self, path: Path) -> Path:
        """Write the page to `path`, atomically, and return the path."""
        title = html.escape(self.title)
        style = resources.files("kelp.plotting").joinpath("report.css").read_text(encoding="utf-8")
        body = _with_contents("\n".join(self._body))
        write_text(
            path,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n",
        )
        return path


def _with_contents(body: str) -> str:
    """The body with a list of its sections before the first of them, where there are several."""
    titles: list[str] = []

    def numbered(match: re.Match[str]) -> str:
        titles.append(match[1])
        return f'<h2 id="s{len(titles)}">{match[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", numbered, body)
    if len(titles) < _FEW_SECTIONS:
        return body
    items = "".join(f'<li><a href="#s{k}">{title}</a></li>' for k, title in enumerate(titles, 1))
    contents = f'<nav aria-label="Sections"><ul>{items}</ul></nav>\n'
    return body.replace('<h2 id="s1">', f'{contents}<h2 id="s1">', 1)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _blocks(markdown: str) -> list[str]:
    """HTML of the blocks of a text; blank lines part them."""
    blocks = []
    # Fenced code may hold blank lines, so it is taken out first.
    for k, part in enumerate(re.split(r"^```.*\n?", markdown, flags=re.MULTILINE)):
        if k % 2:
            blocks.append(f"<pre><code>{html.escape(part.rstrip())}</code></pre>")
            continue
        for block in re.split(r"\n\s*\n", part):
            if block.strip():
                blocks.append(_block(block.strip()))
    return blocks


def _block(block: str) -> str:
    heading = re.match(r"(#{1,3}) +(.+)\Z", block)
    if heading:
        # The page's title is the only h1.
        level = max(2, len(heading[1]))
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    lines = [line.strip() for line in block.splitlines()]
    if lines[0].startswith("- "):
        # A line that starts no item of its own continues the one before.
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    """Escaped text with code, bold and links; other links than web and relative ones are text."""
    escaped = html.escape(" ".join(text.split()), quote=True)

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        return f'<a href="{target}">{words}</a>' if _SAFE_LINK.match(target) else match[0]

    pieces = re.split(r"`([^`]+)`", escaped)
    for k, piece in enumerate(pieces):
        if k % 2:
            pieces[k] = f"<code>{piece}</code>"
        else:
            bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", piece)
            pieces[k] = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, bold)
    return "".join(pieces)


def curves(history: Mapping[str, Series], best: int | None = None) -> bytes:
    """A PNG of training curves: one panel for each quantity, one line for each split.

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
    figure = _figure(4.2 * columns, 2.9 * rows)
    for k, (quantity, lines) in enumerate(panels.items(), 1):
        _plot(figure.add_subplot(rows, columns, k), quantity, lines, best)
    if best is not None:
        figure.supxlabel("epoch", size=9, color=_QUIET_INK)
    return _png(figure)


def _plot(axes: Axes, quantity: str, lines: Mapping[str, Series], best: int | None) -> None:
    if best is not None:
        axes.axvline(best, color=_QUIET_INK, lw=1.2, ls=":")
        top = axes.get_xaxis_transform()  # of the panel, whatever its values
        side: Any = {"ha": "right", "xytext": (-4, -2)} if best > 1 else {"xytext": (4, -2)}
        axes.annotate(
            f"best: {best}",
            (best, 1),
            xycoords=top,
            textcoords="offset points",
            va="top",
            size=8,
            color=_QUIET_INK,
            **side,
        )
    for color, (split, series) in zip(_LINES * len(lines), lines.items(), strict=False):
        steps = [step for step, _ in series]
        values = [value if math.isfinite(value) else math.nan for _, value in series]
        # A lone point has no line; a marker shows it.
        marker = "o" if len(series) < 30 else ""
        axes.plot(steps, values, color=color, lw=1.8, marker=marker, ms=3.5, label=split)
    axes.set_title(quantity, loc="left", size=11, weight="bold", color=_INK)
    if all(float(step).is_integer() for series in lines.values() for step, _ in series):
        axes.locator_params(axis="x", integer=True)  # epochs come whole
    axes.grid(visible=True, color=_GRID, lw=0.8)
    axes.margins(x=0.03)
    _plain(axes)
    if any(lines):
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def lines(values: Mapping[str, Series], across: str, up: str) -> bytes:
    """A PNG of shares against shares, one line for each name; NaN is a gap.

    Args:
        values: `(x, y)` pairs between 0 and 1, by name.
        across: what x is, for the axis.
        up: what y is.
    """
    figure = _figure(7.2, 3.8)
    axes = figure.add_subplot()
    for color, (name, series) in zip(_LINES * len(values), values.items(), strict=False):
        marker = "o" if 2 < len(series) < 30 else ""
        x, y = [x for x, _ in series], [y for _, y in series]
        style = "--" if len(series) == 2 else "-"  # a mere guide
        axes.plot(x, y, style, color=color, lw=1.8, marker=marker, ms=4, label=name)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(across, color=_QUIET_INK, size=9)
    axes.set_ylabel(up, color=_QUIET_INK, size=9)
    axes.grid(visible=True, color=_GRID, lw=0.8)
    _plain(axes)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _png(figure)


def intervals(
    values: Mapping[str, tuple[float | None, float | None, float | None]], quantity: str
) -> bytes:
    """A PNG of estimates with their intervals, one below the other.

    Args:
        values: value, low and high by name, `None` where undefined.
        quantity: what they are, for the axis.
    """
    figure = _figure(8.4, 1.0 + 0.32 * max(len(values), 1))
    axes = figure.add_subplot()
    for k, (value, low, high) in enumerate(values.values()):
        if low is not None and high is not None:
            axes.plot([low, high], [k, k], color=_LINES[0], lw=2.4, solid_capstyle="butt")
        axes.plot([math.nan if value is None else value], [k], "o", color=_INK, ms=5)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(quantity, color=_QUIET_INK, size=9)
    axes.grid(visible=True, axis="x", color=_GRID, lw=0.8)
    _plain(axes)
    return _png(figure)


def by_class(
    values: Mapping[str, Sequence[float | None]], classes: Sequence[str], quantity: str
) -> bytes:
    """A PNG of shares by class, one line for each name; `None` is a gap."""
    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    for color, (name, shares) in zip(_LINES * len(values), values.items(), strict=False):
        heights = [math.nan if share is None else share for share in shares]
        axes.plot(range(len(classes)), heights, color=color, lw=1.8, marker="o", ms=4, label=name)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(quantity, color=_QUIET_INK, size=9)
    axes.grid(visible=True, color=_GRID, lw=0.8)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    return _png(figure)


def _plain(axes: Axes) -> None:
    """No frame but the lower edge; quiet labels."""
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET_INK, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_QUIET_INK)


def confusion(tp: int, fp: int, fn: int, tn: int) -> bytes:
    """A PNG of the four counts of pixels, in the colours of the previews.

    Each cell also tells its share of its row: of the true kelp, and of the rest.
    """
    figure = _figure(5.2, 3.3)
    axes = figure.add_subplot()
    cells = (
        (0, 0, tp, tp + fn, KELP, "found"),
        (0, 1, fn, tp + fn, MISSED, "missed"),
        (1, 0, fp, fp + tn, FALSE, "false alarm"),
        (1, 1, tn, fp + tn, NO_KELP, "rightly empty"),
    )
    from matplotlib.patches import Rectangle

    for row, column, number, whole, color, words in cells:
        ink = "white" if sum(color) < 400 else _INK
        box = Rectangle((column + 0.02, row + 0.02), 0.96, 0.96, color=web_color(color))
        axes.add_patch(box)
        share = f"{number / whole:.2%} of the row" if whole else "no such pixel"
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        axes.text(column + 0.5, row + 0.42, f"{number:,}", size=15, weight="bold", **middle)
        axes.text(column + 0.5, row + 0.68, f"{words}, {share}", size=8.5, **middle)
    axes.set_xlim(0, 2)
    axes.set_ylim(2, 0)
    axes.set_xticks([0.5, 1.5], ["predicted kelp", "predicted none"])
    axes.set_yticks([0.5, 1.5], ["kelp", "no kelp"])
    axes.tick_params(length=0, labelsize=10, colors=_INK)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
