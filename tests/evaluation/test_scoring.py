"""`kelp evaluate`: pairs of masks, areas, sites, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from rasterio.crs import CRS
from world import drawing, write_tif

from kelp.config import EvaluateConfig
from kelp.errors import InputError, TableError
from kelp.evaluation.confusion import Confusion
from kelp.evaluation.scoring import evaluate
from kelp.raster.masks import Georeference
from kelp.raster.writer import write_mask


def pair(folder: Path, name: str, truth: np.ndarray, prediction: np.ndarray, **where) -> None:
    write_mask(folder / "truth" / f"{name}_kelp.tif", truth, **where)
    write_mask(folder / "preds" / f"{name}_kelp.tif", prediction, **where)


def config(folder: Path, **more) -> EvaluateConfig:
    return EvaluateConfig(gt_dir=folder / "truth", preds_dir=folder / "preds", **more)


def test_evaluate_writes_finite_figures_and_a_table(tmp_path):
    pair(tmp_path, "AA", drawing("##. .#."), drawing("#.. .##"))
    pair(tmp_path, "BB", drawing("..."), drawing("..."))
    write_mask(tmp_path / "preds" / "ZZ_kelp.tif", drawing("#"))  # no truth: not looked at
    seen: list = []
    scores = evaluate(config(tmp_path, output_dir=tmp_path / "out"), lambda *s: seen.append(s))
    assert scores.all_pixels.confusion == Confusion(tp=2, fp=1, fn=1, tn=5)
    assert scores.all_pixels.pooled_dice == 4 / 6
    assert scores.all_pixels.mean_image_dice == pytest.approx((4 / 6 + 1) / 2)
    assert seen == [("scoring", 1, 2), ("scoring", 2, 2)]
    saved = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert saved["images"] == 2
    assert saved["all_pixels"]["pooled_dice"] == 4 / 6
    large = saved["all_pixels"]["recall_by_patch_size"]["65+"]
    assert large == {"patches": 0, "found": 0, "recall": None}
    assert "by_place" not in saved
    text = (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8")
    assert "Dice, pooled                        0.6667          0.6667" in text
    assert text.strip() in scores.summary()
    assert (tmp_path / "out" / "kelp-evaluate.yaml").is_file()


def test_areas_say_what_a_pixel_was_taken_to_be(tmp_path):
    utm = Georeference(CRS.from_epsg(32621), Affine(10, 0, 500_000, 0, -20, -5_700_000))
    pair(tmp_path, "AA", drawing("##."), drawing("#.."), georeference=utm)
    scores = evaluate(config(tmp_path))
    assert scores.areas.truth_km2 == pytest.approx(2 * 200 / 1e6)
    assert scores.areas.predicted_km2 == pytest.approx(200 / 1e6)
    assert scores.to_text().count("(pixel size from the CRS)") == 3
    pair(tmp_path, "BB", drawing("##."), drawing("##?"))
    scores = evaluate(config(tmp_path, pixel_size=50))
    assert scores.areas.truth_km2 == pytest.approx(2 * 200 / 1e6 + 2 * 2500 / 1e6)
    assert scores.areas.observed_km2 == pytest.approx(3 * 200 / 1e6 + 2 * 2500 / 1e6)
    words = "pixel size from the CRS for 1 of 2 images, 50 m pixels assumed, no CRS for 1 of 2"
    assert scores.to_text().count(words) == 3
    assert words in scores.to_json()["areas"]["pixel_size"]


# Two pixels at 51.7 S, 58.9 W: a degree is 111.26 km north and 69.13 km east there (WGS 84), and
# Web Mercator stretches both sides by 1 / cos(51.7) or so.
PLACES = {
    4326: (Affine(3e-4, 0, -58.9, 0, -3e-4, -51.7), 1.3852e-3),
    3857: (Affine(30, 0, -6556718, 0, -30, -6748000), 6.922e-4),
    32721: (Affine(30, 0, 368_000, 0, -30, 4_271_000), 1.8e-3),
}


@pytest.mark.parametrize("code", PLACES)
def test_areas_are_ground_areas_in_any_crs(tmp_path, code):
    transform, km2 = PLACES[code]
    where = Georeference(CRS.from_epsg(code), transform)
    pair(tmp_path, "AA", drawing("##."), drawing("##."), georeference=where)
    areas = evaluate(config(tmp_path)).areas
    assert areas.truth_km2 == pytest.approx(km2, rel=0.005)
    assert areas.source == (
        "pixel size from the CRS" if code == 32721 else "measured on the ellipsoid"
    )


@pytest.mark.parametrize(
    ("transform", "code", "words"),
    [
        (
            Affine(10, 0, 501_000, 0, -20, -5_700_000),
            32621,
            r"shifted by \+100 columns and \+0 rows",
        ),
        (Affine(10, 0, 500_005, 0, -20, -5_700_000), 32621, r"shifted by \+0.5 columns"),
        (Affine(10, 0, 500_000, 0, -20, -5_700_000), 32620, "EPSG:32620 against EPSG:32621"),
        (Affine(5, 0, 500_000, 0, -10, -5_700_000), 32621, "0.5 x 0.5 times as large"),
        (Affine(10, 0, 500_000, 0, 20, -5_700_020), 32621, "south-up"),
    ],
)
def test_masks_that_lie_elsewhere_are_not_scored(tmp_path, transform, code, words):
    here = Georeference(CRS.from_epsg(32621), Affine(10, 0, 500_000, 0, -20, -5_700_000))
    pair(tmp_path, "AA", drawing("##."), drawing("##."), georeference=here)
    elsewhere = Georeference(CRS.from_epsg(code), transform)
    write_mask(tmp_path / "preds" / "AA_kelp.tif", drawing("##."), elsewhere)
    with pytest.raises(InputError, match=rf"preds/AA_kelp\.tif does not lie .*truth/.*{words}"):
        evaluate(config(tmp_path))
    assert evaluate(config(tmp_path, ignore_georeference=True)).all_pixels.pooled_dice == 1
    # Probabilities beside the mask must lie where it lies.
    write_mask(tmp_path / "preds" / "AA_kelp.tif", drawing("##."), here)
    soft = {"crs": elsewhere.crs, "transform": elsewhere.transform}
    write_tif(tmp_path / "preds" / "AA_kelp_prob.tif", np.float32([[[1, 1, 0]]]), **soft)
    with pytest.raises(InputError, match=rf"AA_kelp_prob\.tif does not lie .*{words}"):
        evaluate(config(tmp_path))


def test_two_south_up_masks_are_scored(tmp_path):
    south_up = Georeference(CRS.from_epsg(32621), Affine(10, 0, 500_000, 0, 20, -5_700_000))
    pair(tmp_path, "AA", drawing("##. ..."), drawing("##. ..."), georeference=south_up)
    assert evaluate(config(tmp_path)).all_pixels.pooled_dice == 1


@pytest.mark.parametrize("folder", ["truth", "preds"])
def test_masks_of_0_and_255_are_refused(tmp_path, folder):
    pair(tmp_path, "AA", drawing("##."), drawing("#.."))
    pair(tmp_path, "BB", drawing("..."), drawing("..."))
    for name, values in (("AA", [255, 255, 0]), ("BB", [0, 0, 0])):
        write_tif(tmp_path / folder / f"{name}_kelp.tif", np.uint8([[values]]))
    with pytest.raises(InputError, match=r"AA_kelp\.tif: holds 0 and 255 only and none of the 2"):
        evaluate(config(tmp_path))
    if folder == "truth":
        scores = evaluate(config(tmp_path, kelp_value=255))
        assert scores.all_pixels.confusion == Confusion(tp=1, fp=0, fn=1, tn=4)


def test_suffixes_of_any_case_are_masks(tmp_path):
    pair(tmp_path, "AA", drawing("##."), drawing("#.."))
    pair(tmp_path, "BB", drawing("##."), drawing("#.."))
    (tmp_path / "truth" / "AA_kelp.tif").rename(tmp_path / "truth" / "AA_kelp.TIF")
    (tmp_path / "preds" / "BB_kelp.tif").rename(tmp_path / "preds" / "BB_kelp.tiff")
    assert evaluate(config(tmp_path)).all_pixels.images == 2


def test_an_image_of_several_strips(tmp_path):
    """1,200 rows: a bed of 12 x 2 pixels across the border of two strips is one patch."""
    truth = np.zeros((1200, 4), np.uint8)
    truth[506:518, 1:3] = 1
    prediction = truth.copy()
    prediction[506:512] = 0  # half of it is enough
    pair(tmp_path, "AA", truth, prediction)
    scores = evaluate(config(tmp_path))
    assert scores.all_pixels.confusion == Confusion(tp=12, fp=0, fn=12, tn=4776)
    assert scores.all_pixels.patches == ((0, 0), (0, 0), (1, 1), (0, 0))


def test_feet_are_not_metres(tmp_path):
    feet = Georeference(CRS.from_epsg(2229), Affine(100, 0, 6e6, 0, -100, 2e6))  # US survey feet
    pair(tmp_path, "AA", drawing("#."), drawing("#."), georeference=feet)
    area = evaluate(config(tmp_path)).areas.truth_km2
    assert area == pytest.approx((100 * 1200 / 3937) ** 2 / 1e6)


def test_sites_are_weighed_alike(tmp_path):
    pair(tmp_path, "AA", drawing("####"), drawing("####"))
    pair(tmp_path, "BB", drawing("####"), drawing("####"))
    pair(tmp_path, "CC", drawing("#..."), drawing("...#"))
    pair(tmp_path, "DD", drawing("...."), drawing("...."))
    table = pd.DataFrame({"tile_id": ["DD", "CC", "BB", "AA", "EE"], "aoi_id": [9, 7, 3, 3, 1]})
    table.to_parquet(tmp_path / "table.parquet")
    scores = evaluate(config(tmp_path, metadata_fp=tmp_path / "table.parquet"))
    assert {place: f.images for place, f in scores.by_site.items()} == {"3": 2, "7": 1, "9": 1}
    assert scores.mean_site_dice == pytest.approx((1 + 0 + 1) / 3)
    assert scores.to_json()["by_place"]["9"] == {
        "images": 1,
        "pooled_dice": None,
        "mean_image_dice": 1.0,
    }
    assert "Dice, mean of 3 sites" in scores.to_text()
    table[table["tile_id"] != "CC"].to_parquet(tmp_path / "short.parquet")
    with pytest.raises(TableError, match=r"short\.parquet: the table has no row for CC$"):
        evaluate(config(tmp_path, metadata_fp=tmp_path / "short.parquet"))


def test_missing_predictions_and_other_sizes_are_named(tmp_path):
    pair(tmp_path, "AA", drawing("#.."), drawing("#.."))
    for k in range(7):
        write_mask(tmp_path / "truth" / f"M{k}_kelp.tif", drawing("#.."))
    with pytest.raises(InputError, match=r"preds: no prediction for M0, M1, .*M4 and 2 more of"):
        evaluate(config(tmp_path))
    pair(tmp_path / "b", "AA", drawing("#.."), drawing("# . ."))
    with pytest.raises(InputError, match=r"preds/AA_kelp\.tif does .*truth/AA_kelp\.tif: 3 x 1"):
        evaluate(config(tmp_path / "b"))
    with pytest.raises(InputError, match="no such folder"):
        evaluate(config(tmp_path / "nowhere"))
