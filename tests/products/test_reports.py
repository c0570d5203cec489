"""`kelp report`: figures known by hand, what the page holds, and refusals of one line."""

import base64
import io
import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from affine import Affine
from browser import look, look_on_phone, needs_browser
from bundles import tiny_bundle
from PIL import Image
from rasterio.crs import CRS
from world import coast, write_tif

import kelp
from kelp.cli import main
from kelp.config import ReportConfig
from kelp.errors import InputError
from kelp.raster.masks import Georeference
from kelp.raster.writer import write_mask

TRUTH = np.zeros((20, 20), np.uint8)
TRUTH[2:4, 2:4] = 1  # a patch of 4 px
TRUTH[8:14, 8:14] = 1  # and one of 36 px


def make_folders(root, probabilities=True):
    """Three scenes: right, half found with an alarm elsewhere, and without any kelp."""
    half = TRUTH.copy()
    half[2:4, 2:4] = 0
    half[17, 17:20] = 1
    pairs = {
        "AA000001": (TRUTH, TRUTH),
        "AA000002": (TRUTH, half),
        "AA000003": (TRUTH * 0, TRUTH * 0),
    }
    rng = np.random.default_rng(0)
    for name, (truth, mask) in pairs.items():
        write_tif(root / "scenes" / f"{name}_satellite.tif", coast((20, 20), rng)[0])
        for folder, content in (("truth", truth), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            write_mask(root / folder / f"{name}_kelp.tif", content)
        if probabilities:
            p = np.where(mask == 1, 0.8, 0.1).astype(np.float32)
            write_tif(root / "masks" / f"{name}_kelp_prob.tif", p[np.newaxis])
    return ReportConfig(
        gt_dir=root / "truth",
        preds_dir=root / "masks",
        output_dir=root / "out",
        data_dir=root / "scenes",
        draws=200,
    )


def test_workers_of_a_cluster_are_shown(tmp_path):
    config = make_folders(tmp_path, probabilities=False)
    share = {
        "scenes": 3,
        "tiles": 4321,
        "reading": 1.25,
        "network": 30.5,
        "writing": 0.5,
        "peak_memory": 512_000_000,
    }
    record = config.preds_dir / "kelp-workers.json"
    record.write_text(json.dumps({"tcp://10.0.0.7:4001": share}))
    page = kelp.make_report(config).page.read_text()
    row = page[page.index("tcp://10.0.0.7:4001") :][:400]
    assert all(number in row for number in ("4,321", "30.5", "512"))
    record.write_text("{")
    with pytest.raises(InputError, match=r"kelp-workers\.json: damaged"):
        kelp.make_report(config)


def test_the_figures_are_those_counted_by_hand(tmp_path):
    config = make_folders(tmp_path)
    result = kelp.make_report(config)
    found = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    # 40 + 36 hits, 3 false alarms, 4 missed
    assert found["pooled_dice"]["value"] == pytest.approx(2 * 76 / (2 * 76 + 3 + 4))
    assert found["precision"]["value"] == pytest.approx(76 / 79)
    assert found["recall"]["value"] == pytest.approx(76 / 80)
    assert found["mean_image_dice"]["value"] == pytest.approx((1 + 72 / 79 + 1) / 3)
    assert found["recall_1-4_px"]["value"] == 0.5
    assert found["recall_17-64_px"]["value"] == 1
    assert found["area_by_threshold"]["value"] == pytest.approx(79 / 80)
    expected = 79 * 0.8 + (1200 - 79) * 0.1
    assert found["area_by_probability"]["value"] == pytest.approx(expected / 80)
    # 79 px at 0.8, of which 76 are kelp; 1,121 px at 0.1, of which 4 are
    error = (abs(79 * 0.8 - 76) + abs(1121 * 0.1 - 4)) / 1200
    assert found["calibration_error"]["value"] == pytest.approx(error)
    low, high = found["pooled_dice"]["low"], found["pooled_dice"]["high"]
    assert low < found["pooled_dice"]["value"] < high <= 1
    assert "pooled Dice 0.956" in result.summary()


def test_the_page_says_what_it_is_about(tmp_path):
    bundle = tiny_bundle(tmp_path / "run" / "artifacts" / "bundle", training={"lr": 0.001})
    history = [{"train/loss": 0.9, "val/dice": 0.1}, {"train/loss": 0.5, "val/dice": 0.4}]
    (bundle.parent / "history.json").write_text(json.dumps(history))
    config = make_folders(tmp_path)
    config = config.model_copy(update={"run_dir": tmp_path / "run", "title": "Off Olinda"})
    text = kelp.make_report(config).page.read_text(encoding="utf-8")
    headings = [
        "The worst scenes, and the best",
        "Scores",
        "Small patches",
        "Curves",
        "The network",
        "The data",
        "Again",
    ]
    at = [text.index(f">{words}</h2>") for words in headings]
    assert at == sorted(at)
    assert text.index("Pooled Dice of kelp is 0.956") < at[0]
    assert "With 3 sites only" in text
    answer = text[: at[0]]
    assert "Mapped area is 0.99 times the true area (30 m pixels assumed, no CRS)" in answer
    assert "5% of the kelp is missed; of 2 patches of 1-4 pixels 1 are found" in answer
    assert "4% of what is mapped as kelp is none" in answer
    worst = r"The worst of 2 scenes with kelp is <code>AA000002</code>, Dice 0.911"
    assert worst in answer
    assert "Most false kelp is in <code>AA000002</code>: 0.003 km²" in answer
    assert all(words in text for words in ("AA000002", "kelp report --config", "lr: 0.001"))
    assert text.count("<img") == 1 + 3 + 2 + 1  # patches, curves, worst and best, training


def map_of(page):
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(found)


def test_the_map_shows_the_errors_of_the_worst_scenes(tmp_path):
    config = make_folders(tmp_path).model_copy(update={"pictures": 0})
    page = kelp.make_report(config).page.read_text(encoding="utf-8")
    maps = map_of(page)["maps"]
    assert [shown["name"] for shown in maps] == ["AA000001", "AA000002", "AA000003"]
    assert all(shown["scene"] and shown["p"] for shown in maps)
    picture = Image.open(io.BytesIO(base64.b64decode(maps[1]["errors"].partition(",")[2])))
    # 0 no kelp, 1 found, 2 missed, 3 false alarms
    assert np.bincount(np.asarray(picture).ravel()).tolist() == [400 - 43, 36, 4, 3]
    config = config.model_copy(update={"map_scenes": 1})
    page = kelp.make_report(config).page.read_text(encoding="utf-8")
    assert [shown["name"] for shown in map_of(page)["maps"]] == ["AA000002"]
    assert "The 1 of them with the lowest Dice" in page
    config = config.model_copy(update={"map_scenes": 0})
    assert "<script" not in kelp.make_report(config).page.read_text(encoding="utf-8")


def test_scenes_far_from_each_other_are_laid_on_each_other(tmp_path):
    """Each from its own corner; one whose grid is turned is left out."""
    config = make_folders(tmp_path, probabilities=False)
    config = config.model_copy(update={"data_dir": None, "pictures": 0})
    grids = [
        (32610, Affine(30, 0, 4e5, 0, -30, 4e6)),
        (32621, Affine(30, 0, 7e5, 0, -30, 5e6)),
        (32610, Affine(30, 0, 4e5, 0, -30, 4e6) @ Affine.rotation(20)),
    ]
    for name, (crs, transform) in zip("123", grids, strict=True):
        for folder in ("truth", "masks"):
            place = Georeference(CRS.from_epsg(crs), transform)
            write_mask(tmp_path / folder / f"AA00000{name}_kelp.tif", TRUTH, place)
    maps = map_of(kelp.make_report(config).page.read_text(encoding="utf-8"))
    assert [shown["name"] for shown in maps["maps"]] == ["AA000001", "AA000002"]
    assert {tuple(map(tuple, shown["bounds"])) for shown in maps["maps"]} == {((0, 0), (600, 600))}
    assert [len(shown["beds"]["features"]) for shown in maps["maps"]] == [2, 2]


@needs_browser
def test_a_browser_shows_the_map_of_a_report(tmp_path):
    probe = """<script>addEventListener("load", () => {
      const all = (selector) => [...document.querySelectorAll(selector)];
      const [picture] = all(".leaflet-image-layer");
      document.documentElement.setAttribute("data-found", JSON.stringify({
        kinds: all("#layers button").map((e) => e.textContent), rows: all("#rows tr").length,
        shown: [picture.alt, picture.naturalWidth, picture.offsetWidth > 200],
        chart: document.getElementById("dates").offsetHeight,
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        requests: performance.getEntriesByType("resource").map((r) => r.name)
          .filter((name) => !name.startsWith("data:")),
      }));
    });</script></body>"""
    page = kelp.make_report(make_folders(tmp_path)).page
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    found, console = look(page, "--window-size=1000,900")
    assert console == []
    assert found == {
        "kinds": ["Scene", "Errors", "Mask", "Probability"],
        "rows": 3,
        "requests": [],
        "shown": ["Errors of AA000003", 20, True],
        "chart": 0,
        "overflow": 0,
    }
    assert look_on_phone(page)["overflow"] == 0


def test_masks_alone_are_enough(tmp_path):
    config = make_folders(tmp_path, probabilities=False).model_copy(update={"data_dir": None})
    text = kelp.make_report(config).page.read_text(encoding="utf-8")
    assert "--save_probabilities" in text
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["reliability"] is None
    assert "calibration_error" not in found["figures"]


def test_the_same_again_is_the_same_page(tmp_path):
    config = make_folders(tmp_path)
    first = kelp.make_report(config).page.read_bytes()
    record = tmp_path / "out" / "kelp-report.yaml"
    assert main(["report", "--config", str(record)]) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == first


def test_scenes_of_any_suffix_are_shown(tmp_path):
    config = make_folders(tmp_path)
    scenes = tmp_path / "scenes"
    (scenes / "AA000001_satellite.tif").rename(scenes / "AA000001_satellite.TIF")
    (scenes / "AA000002_satellite.tif").rename(scenes / "AA000002_satellite.tiff")
    assert kelp.make_report(config).page.read_text().count("the worst") >= 1


def test_tall_scenes_are_read_in_strips(tmp_path):
    """8,000 x 300 pixels, land in half of the open water: 67 MB as seven bands, 2.4 MB a mask."""
    truth = np.zeros((8000, 300), np.uint8)
    truth[100:140, 100:140] = 1
    prediction = truth.copy()
    prediction[6000, 100:102] = prediction[6000, 200:203] = 1  # two of them in the sea
    scene = np.full((7, *truth.shape), 8000, np.int16)
    scene[5] = 0
    scene[6, :, :150], scene[6, :, 150:] = 0, 20
    write_tif(tmp_path / "scenes" / "AA_satellite.tif", scene, tiled=True)
    for folder, mask in (("truth", truth), ("masks", prediction)):
        write_tif(tmp_path / folder / "AA_kelp.tif", mask[np.newaxis])
    folders = {"gt_dir": tmp_path / "truth", "preds_dir": tmp_path / "masks"}
    config = ReportConfig(
        **folders, data_dir=tmp_path / "scenes", output_dir=tmp_path / "out", pictures=0, draws=100
    )
    tracemalloc.start()
    found = kelp.make_report(config).evaluated.totals
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    # Kelp and three pixels around it are no open water: 40 x 40 and its diamond-shaped rim.
    water = 8000 * 150 - (40 * 40 + 4 * 40 * 3 + 4 * (2 + 1))
    share = found.figure("false_kelp_share_of_open_water").value
    assert share == pytest.approx(2 / water)


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    config = make_folders(tmp_path)
    (tmp_path / "scenes" / "AA000002_satellite.tif").unlink()
    with pytest.raises(InputError, match=r"no scene AA000002_satellite.tif, 1 of 3"):
        kelp.make_report(config)
    (tmp_path / "masks" / "AA000003_kelp.tif").unlink()
    with pytest.raises(InputError, match=r"no prediction for AA000003 of "):
        kelp.make_report(config)
    with pytest.raises(InputError, match="holds no bundle"):
        kelp.make_report(config.model_copy(update={"run_dir": tmp_path}))
    assert not (tmp_path / "out").exists()
    write_mask(tmp_path / "masks" / "AA000003_kelp.tif", TRUTH[:10])
    shutil.rmtree(tmp_path / "scenes")
    with pytest.raises(InputError, match="does not lie on the grid of"):
        kelp.make_report(config.model_copy(update={"data_dir": None}))
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "AA000003" not in json.dumps(figures)  # the page is of the others


def test_evaluate_leaves_the_page_beside_its_scores(tmp_path, capsys):
    config = make_folders(tmp_path)
    argv = ["evaluate", "--gt_dir", str(config.gt_dir), "--preds_dir", str(config.preds_dir)]
    assert main(argv) == 0
    assert main([*argv, "--output_dir", str(tmp_path / "scores")]) == 0
    assert (tmp_path / "scores" / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out
