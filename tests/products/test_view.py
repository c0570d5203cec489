"""The page of maps: what is on it, and what a real browser makes of it."""

from __future__ import annotations

import json
import re

import geopandas
import numpy as np
import pytest
from affine import Affine
from browser import look, look_on_phone, needs_browser
from coasts import UTM, write_map
from rasterio.crs import CRS
from shapely import box
from world import write_tif

import kelp
from kelp.cli import main
from kelp.raster.masks import Georeference

PROBE = """
<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const text = (selector) => document.querySelector(selector).textContent;
  const slider = document.getElementById("slider");
  const state = () => ({
    when: text("#when"), row: all("tr[aria-current] td").map((e) => e.textContent),
    picture: all(".leaflet-image-layer").map((e) => e.alt),
    outlines: all("path.leaflet-interactive").length,
    hit: all("path.leaflet-interactive").filter((e) => {
      const { x, y, width, height } = e.getBoundingClientRect();
      return document.elementFromPoint(x + width / 2, y + height / 2) === e;
    }).length,
    listed: all("#largest-beds tr").map((e) => +e.children[1].textContent),
  });
  const first = state();
  const width = document.querySelector(".leaflet-image-layer").naturalWidth;
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  const found = {
    first, width, second: state(),
    crosses: all("#chart .gap").length, dots: all("#chart .dot").length,
    quarters: [all("#chart-quarters .gap").length, all("#chart-quarters .dot").length],
    whiskers: all("#chart .whisker").length, rows: all("#rows tr").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    unnamed: all("button, input, select")
      .filter((e) => !e.textContent && !e.ariaLabel && !e.labels?.length).length,
    requests: performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith("data:")),
    small: all("button, select").filter((e) => e.offsetHeight && e.offsetHeight < 38).length,
  };
  all("#layers button").find((e) => e.dataset.kind === "p").click();
  found.probability = state().picture;
  document.getElementById("beds").click();
  found.without = state().outlines;
  const select = document.getElementById("region");
  select.value = "nowhere"; select.dispatchEvent(new Event("change"));
  found.nowhere = [all("#chart .gap").length, all("#chart .dot").length, text("#rows")];
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
</script>
"""


@pytest.fixture(scope="module")
def coast(tmp_path_factory):
    """Three dates, one of them clouded over; two regions, one beyond the maps."""
    root = tmp_path_factory.mktemp("coast")
    mask = np.zeros((40, 30), np.uint8)
    mask[5:10, 5:9] = 1
    mask[20:24, 10:20] = 1
    p = np.where(mask == 1, 0.75, 0.0)
    clouds = np.full(mask.shape, 255)
    maps = root / "maps"
    write_map(maps, "A", mask, p, acquired="2020-02-01", sensor="landsat-8")
    write_map(maps, "B", clouds, clouds * np.nan, acquired="2020-08-09", sensor="landsat-8")
    write_map(
        maps,
        "C",
        mask,
        p,
        acquired="2021-02-11T13:30:00+00:00",
        sensor="landsat-9",
        scene_id="C</script><b>",
    )
    x, y = 400_000, 4_272_000
    frame = geopandas.GeoDataFrame(
        {"name": ["coast", "nowhere"]},
        geometry=[box(x, y - 1200, x + 900, y), box(x + 9e4, y, x + 9.1e4, y + 500)],
        crs=32721,
    )
    frame.to_file(root / "r.gpkg")
    assert (
        main(
            [
                "series",
                "--predictions_dir",
                f"{maps}",
                "--output_dir",
                f"{root / 's'}",
                "--aoi",
                f"{root / 'r.gpkg'}",
            ]
        )
        == 0
    )
    return root


def page_of(coast, output, *more):
    arguments = ["--predictions_dir", f"{coast / 'maps'}", "--output", f"{output}"]
    assert main(["view", *arguments, *map(str, more)]) == 0
    return output.read_text(encoding="utf-8")


def data_of(text):
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_figures_of_the_page(coast, tmp_path):
    text = page_of(coast, tmp_path / "map.html", "--title", "A <coast>")
    data = data_of(text)
    assert "<title>A &lt;coast&gt;</title>" in text
    assert [m["date"] for m in data["maps"]] == ["2020-02-01", "2020-08-09", "2021-02-11 13:30 UTC"]
    assert data["maps"][2]["name"] == "C</script><b>"
    assert data["bounds"] == [[0, 0], [1200, 900]]
    first, second, _ = data["rows"]["Whole map"]
    assert (first["expected"], first["presence"]) == (60 * 900 * 0.75, 60 * 900)
    assert [second[k] for k in ("expected", "presence", "low", "high")] == [None] * 4
    assert second["note"] == "nothing of the region was observed"
    beds = data["maps"][0]["beds"]["features"]
    assert [bed["properties"]["pixels"] for bed in beds] == [20, 40]
    ring = beds[0]["geometry"]["coordinates"][0][0]
    assert sorted({tuple(point) for point in ring}) == [
        (150, 900),
        (150, 1050),
        (270, 900),
        (270, 1050),
    ]
    assert data["maps"][1]["beds"]["features"] == []
    assert (tmp_path / "kelp-view.yaml").is_file()
    assert page_of(coast, tmp_path / "again.html", "--title", "A <coast>") == text


@needs_browser
def test_a_browser_shows_it(coast, tmp_path):
    page = tmp_path / "map.html"
    text = page_of(coast, page, "--aoi", coast / "r.gpkg", "--series_dir", coast / "s")
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    found, console = look(page, "--window-size=1000,900")
    assert console == []
    assert found["requests"] == []
    assert found["first"]["when"] == "2021-02-11 13:30 UTC, landsat-9 (3 of 3)"
    assert found["first"]["row"][0] == "2021-02-11 13:30 UTC"
    assert found["second"]["when"] == "2020-02-01, landsat-8 (1 of 3)"
    assert found["second"]["row"][:5] == ["2020-02-01", "landsat-8", "100 %", "0.041", "–"]
    assert found["second"]["picture"] == ["Mask of 2020-02-01"]
    assert found["width"] == 30
    assert (found["second"]["outlines"], found["second"]["hit"]) == (2, 2)
    assert found["second"]["listed"] == [40, 20]
    assert found["probability"] == ["Probability of 2020-02-01"]
    assert found["without"] == 0
    assert (found["crosses"], found["dots"], found["whiskers"], found["rows"]) == (1, 2, 0, 3)
    assert found["quarters"] == [3, 2]
    assert found["nowhere"][:2] == [3, 0]
    assert "0.000" not in found["nowhere"][2]
    assert (found["unnamed"], found["small"], found["overflow"]) == (0, 0, 0)


@needs_browser
def test_a_phone_shows_it(coast, tmp_path):
    page = tmp_path / "map.html"
    text = page_of(coast, page, "--aoi", coast / "r.gpkg")
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    found = look_on_phone(page)
    assert (found["overflow"], found["small"]) == (0, 0)


def test_scenes_and_shrunk_pictures(tmp_path):
    image = np.full((7, 100, 130), 8000, np.int32)
    image[5:] = 0
    write_tif(tmp_path / "scenes" / "A_satellite.tif", image)
    mask = np.zeros((100, 130), np.uint8)
    mask[50, 50] = 1
    write_map(tmp_path / "maps", "A", mask, georeference=Georeference(), record=False)
    output = tmp_path / "map.html"
    kelp.view(
        kelp.config.ViewConfig(
            predictions_dir=tmp_path / "maps",
            output=output,
            side=64,
            data_dir=tmp_path / "scenes",
        )
    )
    data = data_of(output.read_text(encoding="utf-8"))
    (shown,) = data["maps"]
    assert shown["scene"].startswith("data:image/webp")
    assert shown["beds"] is None  # no CRS
    assert shown["date"] is None
    # Blocks of 3 x 3 pixels reach over the edge: 34 rows of 90 m, 44 columns.
    assert shown["bounds"] == [[3000 - 34 * 90, 0], [3000, 44 * 90]]
    assert data["rows"]["Whole map"][0]["presence"] == 900


def test_degrees_are_laid_out_in_metres(tmp_path):
    place = Georeference(CRS.from_epsg(4326), Affine(0.001, 0, -58, 0, -0.001, -51.5))
    write_map(tmp_path / "maps", "A", np.eye(100), georeference=place)
    output = tmp_path / "map.html"
    kelp.view(kelp.config.ViewConfig(predictions_dir=tmp_path / "maps", output=output))
    north, east = data_of(output.read_text(encoding="utf-8"))["bounds"][1]
    assert north == pytest.approx(11_132, rel=0.001)
    assert east == pytest.approx(11_132 * np.cos(np.radians(51.55)), rel=0.001)


def test_bad_input_is_one_line(tmp_path, capfd):
    def failing(folder, output, *more):
        arguments = ["--predictions_dir", f"{tmp_path / folder}", "--output", f"{output}"]
        assert main(["view", *arguments, *map(str, more)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert not output.exists()
        return line

    page = tmp_path / "map.html"
    write_map(tmp_path / "one", "A", np.eye(4))
    assert "written as .html" in failing("one", tmp_path / "map.pdf")
    assert "quarters.parquet" in failing("one", page, "--series_dir", tmp_path)
    write_map(tmp_path / "crs", "A", np.eye(4))
    write_map(
        tmp_path / "crs",
        "B",
        np.eye(4),
        georeference=Georeference(CRS.from_epsg(32720), UTM.transform),
    )
    assert "another CRS" in failing("crs", page)
    turned = Georeference(UTM.crs, UTM.transform @ Affine.rotation(10))
    write_map(tmp_path / "turned", "A", np.eye(4), georeference=turned)
    assert "turned" in failing("turned", page)
    write_tif(tmp_path / "scenes" / "A_satellite.tif", np.full((7, 9, 9), 8000, np.int32))
    line = failing("one", page, "--data_dir", tmp_path / "scenes")
    assert "its pixels are not those of" in line
