"""The report: one file that fetches nothing and shows every text as it is."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from world import rgb_of

from kelp.plotting.charts import confusion, curves
from kelp.plotting.html import Report
from kelp.raster.writer import MASK_COLORS

VOID = {"meta", "img", "hr", "br"}


class Page(HTMLParser):
    """Elements and visible text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def write(report: Report, tmp_path) -> Page:
    return Page(report.write(tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_page_holds_everything_and_fetches_nothing(tmp_path):
    png = confusion(1, 2, 3, 4)
    report = (
        Report("Kelp & co")
        .text("# Result\n\nOne `code`, **bold** and\na [link](https://example.org/a?b=1&c=2).")
        .cards({"pooled Dice": "0.71"})
        .table([["name", "value"], ["images", 1234567], ["recall", None], ["iou", 0.123456]])
        .figure(png, "A `figure`")
    )
    page = write(report, tmp_path)
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(page.tags)
    sources = [
        value for _, attrs in page.elements for name, value in attrs.items() if name == "src"
    ]
    assert [source.partition(",")[0] for source in sources] == ["data:image/png;base64"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("h1") == 1
    assert ("a", {"href": "https://example.org/a?b=1&c=2"}) in page.elements
    for words in ("Kelp & co", "Result", "code", "bold", "1,234,567", "–", "0.1235", "0.71"):
        assert words in page.words
    (image,) = [attrs for tag, attrs in page.elements if tag == "img"]
    assert image["alt"] == "A figure"
    assert int(image["width"]) == round(rgb_of(png).shape[1] / 1.5)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


MARKS = [*"<>&\"'`*[]()#-\n /:abjs", "<script>", "javascript:", "```", "](x", "&lt;"]
hostile = st.lists(st.sampled_from(MARKS), max_size=30).map("".join)

ALLOWED = set(
    """html head meta title style body main nav h1 h2 h3 h4 h5 h6 p ul ol li code pre em strong a
    hr br blockquote dl div dd dt table caption thead tbody tr th td figure img
    figcaption""".split()  # noqa: SIM905
)


@given(hostile, hostile)
@example("***", "  \n")
def test_no_text_becomes_markup(text, other):
    report = Report(text).text(text).cards({text: other}).table([[text], [other]], text)
    report.figure(b"\x89PNG" + bytes(20), other)
    page = Page(report.html())
    assert set(page.tags) <= ALLOWED
    for tag, attrs in page.elements:
        assert set(attrs) <= {
            *("lang", "charset", "name", "content"),  # of the head
            *("id", "start"),  # of headings, of numbered lists
            "class",
            "href",
            "src",
            "alt",
            "width",
            "role",
            "aria-label",
            "tabindex",
        }
        if tag == "a":
            assert not (attrs["href"] or "").lower().startswith(("javascript:", "data:"))


def test_a_script_link_stays_text(tmp_path):
    page = write(Report("x").text("[go](javascript:alert(1)) [ok](docs/a.md)"), tmp_path)
    assert [attrs["href"] for tag, attrs in page.elements if tag == "a"] == ["docs/a.md"]
    assert any("[go](javascript:alert(1))" in words for words in page.words)


def test_lists_and_fenced_code_keep_their_lines(tmp_path):
    page = write(
        Report("x").text("- one\n- two\n  goes on\n\n```bash\nkelp <a>\n\n**b**\n```\nafter"),
        tmp_path,
    )
    assert page.tags.count("li") == 2
    assert "two\ngoes on" in page.words
    assert "kelp <a>\n\n**b**\n" in page.words
    assert "after" in page.words
    assert "strong" not in page.tags
    # A fence at the very end of the text closes, too.
    assert "x = 1\n" in write(Report("x").text("```\nx = 1\n```"), tmp_path).words


def test_numbers_of_tables_have_no_exponents():
    page = Report("R").table([("a", "b", "c"), (22_045.3, 0.46304, -1419.0)], "C").html()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells == ["22,045", "0.463", "-1,419"]


def test_ragged_tables_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        Report("x").table([["a", "b"], [1, 2, 3]])


def test_curves_draw_every_line_and_leave_gaps_for_what_is_not_finite():
    steps = range(50)
    rising = [(k, k / 50) for k in steps]
    one = rgb_of(curves({"val/dice": rising}))
    gap = rgb_of(curves({"val/dice": [(k, math.nan if 5 < k < 45 else v) for k, v in rising]}))
    blue = np.array([31, 111, 178])

    def drawn(image: np.ndarray) -> int:
        return int((np.abs(image.astype(int) - blue).sum(axis=-1) < 30).sum())

    assert 0 < drawn(gap) < 0.5 * drawn(one)
    two = rgb_of(curves({"train/loss": rising, "val/loss": rising[::-1], "lr": rising}))
    assert two.shape[1] > one.shape[1]
    for nothing in ({}, {"val/dice": []}, {"val/dice": [(0, math.inf)]}):
        assert rgb_of(curves(nothing)).size


def test_the_confusion_picture_has_the_colours_of_the_previews():
    image = rgb_of(confusion(10, 0, 0, 0))
    colors, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    frequent = {tuple(int(c) for c in color) for color in colors[counts > 2000]}
    assert {MASK_COLORS[1][:3], MASK_COLORS[0][:3]} <= frequent
    # The same counts give the same bytes.
    assert confusion(5, 1, 2, 9) == confusion(5, 1, 2, 9)
    assert confusion(5, 1, 2, 9) != confusion(5, 2, 1, 9)


def test_pictures_leave_pyplot_alone():
    # In a process of its own: other tests' libraries may have imported it.
    code = """if True:
        import sys
        from kelp.plotting.charts import curves
        curves({"val/dice": [(0, 0.5)]})
        sys.exit("matplotlib.pyplot" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
