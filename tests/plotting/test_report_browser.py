"""The report in a real browser: no errors, pictures there, readable on a phone and in the dark."""

from __future__ import annotations

import re

import pytest
from browser import look, look_on_phone, needs_browser

from kelp.plotting.charts import by_class, curves, lines
from kelp.plotting.html import Report

pytestmark = needs_browser

DARK = "--blink-settings=preferredColorScheme=0"

# What a person or a screen reader would notice, written into the page by the page itself.
PROBE = """
<script>
addEventListener("load", () => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parse(c).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor, [r, g, b, a = 1] = parse(c);
      if (a > 0) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const words = "h1, h2, p, li, td, th, caption, dt, dd, a, code, figcaption, summary";
  const contrast = all(words).map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName + ": " + e.textContent.slice(0, 30)];
  }).sort((x, y) => x[0] - y[0]);
  const levels = all("h1, h2, h3, h4").map((e) => +e.tagName[1]);
  const found = {
    pictures: [...document.images].map((i) => [i.naturalWidth, i.alt]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: innerWidth,
    contrast: contrast[0],
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
    jumps: levels.filter((l, k) => k && l > levels[k - 1] + 1).length,
    lost: all("nav a").filter((a) => !all(a.getAttribute("href")).length).length,
    cut: all("caption div").filter((e) => e.getBoundingClientRect().right > innerWidth).length,
    boxes: all(".wide").map((e) => [e.tabIndex, e.getAttribute("aria-label")]),
    requests: performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith("data:")),
    lang: document.documentElement.lang,
  };
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything that a report can hold, and the probe."""
    wide = [tuple(f"a long heading {k}" for k in range(12)), tuple(range(12))]
    report = Report("Kelp off a coast with a rather long name").text("The answer: **0.807**, `p`.")
    report.cards({"Dice": "0.807", "a figure with long words": "1,234,567.89"})
    for title in ("Scores", "Curves", "Scenes", "Again"):
        report.text(f"## {title}\n\n- one [link](https://example.org)\n- two")
    report.table(wide, "A table wider than a phone. " * 9).table([("name", "value"), ("a", 0.5)])
    report.figure(lines({"a": [(0, 0.1), (1, 0.9)]}, "x", "y"), "A curve of `shares`.")
    report.figure(by_class({"a": [0.1, None]}, ["1-4", "5+"], "share"), "Shares by class.")
    report.figure(curves({"train/loss": [(1, 0.5), (2, 0.4)]}), "Loss.")
    report.details("Settings", "```\n" + "kelp report --config " + "x" * 200 + "\n```")
    path = report.write(tmp_path_factory.mktemp("report") / "report.html")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    return path


def test_a_report_has_no_errors_and_says_everything_in_words(page):
    found, console = look(page, "--window-size=1100,900")
    assert console == []
    assert found["requests"] == []
    assert len(found["pictures"]) == 3
    assert all(width > 0 and words for width, words in found["pictures"])
    assert (found["jumps"], found["lost"], found["lang"]) == (0, 0, "en")
    assert all(index == 0 and words for index, words in found["boxes"])
    assert not found["dark"]
    assert found["contrast"][0] >= 4.5, found["contrast"]


def test_a_report_fits_a_phone(page):
    found = look_on_phone(page)
    assert found["width"] == 360
    assert found["overflow"] <= 0
    assert found["cut"] == 0


def test_a_report_can_be_read_in_the_dark(page):
    found, _ = look(page, "--window-size=1100,900", DARK)
    assert found["dark"]
    assert sum(map(int, re.findall(r"\d+", found["paper"])[:3])) < 200
    assert found["contrast"][0] >= 4.5, found["contrast"]
