"""One self-contained HTML file of text, tables and pictures: nothing is fetched.

Nothing runs but what `Report.insert` brings. Text is Markdown (CommonMark); HTML in it is shown,
not obeyed, and links lead to the web or to files beside the page only.
"""

from __future__ import annotations

import base64
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kelp._version import __version__
from kelp.io.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it import MarkdownIt

_PIXELS_PER_CSS_PIXEL: Final = 1.5  # pictures stay sharp on dense screens
_FEW_SECTIONS: Final = 4
"""Below this a page needs no list of them."""
_SAFE_LINK: Final = re.compile(r"https?://|[\w./#%-]+\Z")


class Report:
    """A page built from top to bottom; `write` makes the file.

    Every method returns the report, so that calls can be chained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[dict[str, Any]] = []
        self._sections: list[str] = []

    def text(self, markdown: str) -> Report:
        """Add Markdown. The page's title is its only `h1`: headings begin at the second level."""
        return self._add("html", html=_blocks(markdown, self._sections))

    def cards(self, figures: Mapping[str, str]) -> Report:
        """Add a row of key figures: large values over their names."""
        return self._add("cards", figures=dict(figures))

    def table(self, rows: Sequence[Sequence[object]], caption: str = "") -> Report:
        """Add a table; the first row is its heading. Numbers are set to the right.

        Floats are shown with four significant digits, from 1,000 on whole, `None` as a dash.
        """
        head, *body = rows
        if any(len(row) != len(head) for row in body):
            raise ValueError(f"rows of a table differ in length: {sorted({len(r) for r in rows})}")
        columns = list(zip(*body, strict=True)) or [()] * len(head)
        numeric = [
            any(isinstance(value, int | float) for value in column)
            and all(value is None or isinstance(value, int | float) for value in column)
            for column in columns
        ]
        cells = [[_cell(value) for value in row] for row in (head, *body)]
        return self._add("table", rows=cells, numeric=numeric, **_caption(caption))

    def figure(self, png: bytes, caption: str = "") -> Report:
        """Add a picture (the bytes of a PNG file); the caption also describes it to readers."""
        data = base64.b64encode(png).decode("ascii")
        width = round(int.from_bytes(png[16:20], "big") / _PIXELS_PER_CSS_PIXEL)
        return self._add("figure", data=data, width=width, **_caption(caption))

    def details(self, summary: str, markdown: str) -> Report:
        """Add text that is shown when its summary is opened."""
        return self._add("details", summary=_inline(summary), html=_blocks(markdown))

    def again(self, command: str, record: Path) -> Report:
        """Add how the page is made again, from the configuration that was recorded."""
        return self.text(
            f"## Again\n\n```\nkelp {command} --config {shlex.quote(str(record))}\n```\n\n"
            f"kelp {__version__}, Python {platform.python_version()}, numpy {np.__version__}."
        )

    def insert(self, html: str) -> Report:
        """Add HTML as it is: of kelp's own making, not a user's."""
        return self._add("html", html=html)

    def write(self, path: Path) -> Path:
        """Write the page to `path`, atomically, and return the path."""
        write_text(path, self.html())
        return path

    def html(self) -> str:
        """The page."""
        page = _templates().get_template("page.html")
        sections = self._sections if len(self._sections) >= _FEW_SECTIONS else []
        return page.render(title=self.title, parts=self._parts, sections=sections)

    def _add(self, kind: str, **values: Any) -> Report:
        self._parts.append({"kind": kind, **values})
        return self


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).disable(["image", "autolink", "reference"])
    # Overrides a method by assignment, as the library documents it.
    parser.validateLink = lambda url: bool(_SAFE_LINK.match(url))  # type: ignore[method-assign]
    return parser


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("kelp.plotting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _blocks(markdown: str, sections: list[str] | None = None) -> str:
    """HTML of Markdown; `sections` takes the headings, which are numbered for links to them."""
    parser = _markdown()
    tokens = parser.parse(markdown)
    for k, token in enumerate(tokens):
        if token.tag == "h1":
            token.tag = "h2"
        if sections is not None and token.type == "heading_open" and token.tag == "h2":
            sections.append(parser.renderInline(tokens[k + 1].content))
            token.attrSet("id", f"s{len(sections)}")
    html: str = parser.renderer.render(tokens, parser.options, {})
    return html


def _inline(text: str) -> str:
    html: str = _markdown().renderInline(text)
    return html


def _caption(text: str) -> dict[str, str]:
    """As HTML, and as plain words for those who do not see."""
    return {"caption": _inline(text), "words": re.sub(r"[*`]", "", text)}


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
