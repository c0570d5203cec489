"""Scores: each figure against a naive count, patches against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.crs import CRS

from kelp.config import EvaluateConfig
from kelp.errors import InputError, TableError
from kelp.evaluation.confusion import (
    PATCH_SIZES,
    Counts,
    Figures,
    PatchCounts,
    count,
    count_patches,
)
from kelp.evaluation.scoring import evaluate
from kelp.raster.masks import Georeference
from kelp.raster.writer import write_mask

masks = st.tuples(st.integers(1, 9), st.integers(1, 7)).flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 255]))] * 2
    )
)


def drawing(text: str) -> np.ndarray:
    """A mask from a drawing: `#` kelp, `.` none, `?` 255."""
    rows = text.split()
    return np.uint8([[{"#": 1, ".": 0, "?": 255}[mark] for mark in row] for row in rows])


def naive_counts(truth: np.ndarray, prediction: np.ndarray, observed_only: bool) -> Counts:
    tp = fp = fn = tn = 0
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t == 255 or (observed_only and p == 255):
            continue
        tp += t == 1 and p == 1
        fp += t == 0 and p == 1
        fn += t == 1 and p != 1
        tn += t == 0 and p != 1
    return Counts(tp, fp, fn, tn)


def naive_patches(truth: np.ndarray, prediction: np.ndarray, observed_only: bool) -> list:
    """Patches by flood fill."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(truth == 1), strict=True)}
    classes = [[0, 0] for _ in PATCH_SIZES]
    while left:
        patch, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            patch.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        said = [int(prediction[p]) for p in patch]
        judged = [s for s in said if s != 255] if observed_only else said
        if not judged:
            continue
        size = next(k for k, most in enumerate((4, 16, 64, 10**9)) if len(patch) <= most)
        classes[size][0] += 1
        classes[size][1] += said.count(1) >= len(judged) / 2
    return [tuple(c) for c in classes]


@given(masks, st.booleans())
def test_counts_and_patches_are_the_naive_ones(pair, observed_only):
    truth, prediction = pair
    assert count(truth, prediction, observed_only) == naive_counts(truth, prediction, observed_only)
    patches = count_patches(truth, prediction, observed_only)
    assert [tuple(p) for p in patches] == naive_patches(truth, prediction, observed_only)


@given(st.tuples(*[st.integers(0, 50)] * 4))
def test_figures_are_their_formulas(cells):
    counts = Counts(*cells)
    tp, fp, fn, _ = cells
    assert counts.dice == (2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None)
    assert counts.iou == (tp / (tp + fp + fn) if tp + fp + fn else None)
    assert counts.precision == (tp / (tp + fp) if tp + fp else None)
    assert counts.recall == (tp / (tp + fn) if tp + fn else None)
    if counts.dice is not None and counts.iou is not None:
        assert counts.dice == pytest.approx(2 * counts.iou / (1 + counts.iou))
    if counts.precision and counts.recall:
        harmonic = 2 / (1 / counts.precision + 1 / counts.recall)
        assert counts.dice == pytest.approx(harmonic)


@given(st.lists(masks, min_size=1, max_size=5))
def test_pooled_figures_are_those_of_all_pixels_at_once(pairs):
    total = Figures()
    for truth, prediction in pairs:
        total = total.plus(Figures.of(truth, prediction))
    truth = np.concatenate([t.ravel() for t, _ in pairs])
    prediction = np.concatenate([p.ravel() for _, p in pairs])
    assert total.counts == naive_counts(truth, prediction, False)
    each = [naive_counts(t, p, False).dice for t, p in pairs]
    assert total.mean_image_dice == pytest.approx(np.mean([1 if d is None else d for d in each]))


def test_a_perfect_prediction_scores_one_and_nothing_found_zero():
    truth = drawing("##.. ?... ...#")
    perfect = Figures.of(truth, np.where(truth == 255, 1, truth).astype(np.uint8))
    assert (perfect.pooled_dice, perfect.counts.iou, perfect.mean_image_dice) == (1, 1, 1)
    nothing = Figures.of(truth, np.zeros_like(truth))
    assert (nothing.pooled_dice, nothing.counts.recall) == (0, 0)
    assert nothing.counts.precision is None


def test_empty_truth_and_empty_prediction_score_one_in_the_mean_only():
    nothing = np.zeros((3, 5), np.uint8)
    empty = Figures.of(nothing, nothing)
    assert (empty.mean_image_dice, empty.pooled_dice) == (1, None)
    false_alarm = nothing.copy()
    false_alarm[0, 0] = 1
    assert Figures.of(nothing, false_alarm).mean_image_dice == 0
    assert Figures().mean_image_dice is None


def test_not_observed_counts_as_no_kelp_and_is_left_out_of_the_second_figures():
    truth, prediction = drawing("#### ...."), drawing("##?? .?#.")
    assert count(truth, prediction) == Counts(tp=2, fp=1, fn=2, tn=3)
    assert count(truth, prediction, observed_only=True) == Counts(tp=2, fp=1, fn=0, tn=2)


# Three patches: 4 px (bottom left, joined by a corner), 5 px and 1 px.
TRUTH = drawing(
    """
    #####.....
    ..........
    .......#..
    ##........
    ..#.......
    ..#.......
    """
)


def test_patches_by_hand():
    prediction = drawing(
        """
        ##........
        ..........
        ..........
        .#........
        ..#.......
        ..........
        """
    )
    # 5 px: 2 of 5 is under a half. 4 px: 2 of 4 is enough. 1 px: missed.
    assert count_patches(TRUTH, prediction) == ((2, 1), (1, 0), (0, 0), (0, 0))
    # A third pixel of the first is enough, too.
    prediction[0, 4] = 1
    assert count_patches(TRUTH, prediction) == ((2, 1), (1, 1), (0, 0), (0, 0))


def test_diagonal_neighbours_are_one_patch(monkeypatch):
    found = count_patches(TRUTH, TRUTH)
    assert found == ((2, 2), (1, 1), (0, 0), (0, 0))
    # Planted fault: with 4 neighbours the corner patch falls apart.
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    from kelp.evaluation import confusion

    monkeypatch.setattr(confusion, "_EIGHT_NEIGHBOURS", cross)
    assert count_patches(TRUTH, TRUTH) == ((3, 3), (1, 1), (0, 0), (0, 0))


@pytest.mark.parametrize(
    "pixels, size", [(1, 0), (4, 0), (5, 1), (16, 1), (17, 2), (64, 2), (65, 3), (300, 3)]
)
def test_patch_sizes_at_their_limits(pixels, size):
    truth = np.zeros((3, 310), np.uint8)
    truth[1, :pixels] = 1
    wanted = [PatchCounts()] * len(PATCH_SIZES)
    wanted[size] = PatchCounts(1, 1)
    assert list(count_patches(truth, truth)) == wanted


def test_a_patch_under_cloud_is_missed_or_not_judged():
    truth, prediction = drawing("####.#"), drawing("#?????")
    assert count_patches(truth, prediction) == ((2, 0), (0, 0), (0, 0), (0, 0))
    # Of what was seen of the first, all was found; the second was not seen.
    seen = count_patches(truth, prediction, observed_only=True)
    assert seen == ((1, 1), (0, 0), (0, 0), (0, 0))


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
    assert scores.all_pixels.counts == Counts(tp=2, fp=1, fn=1, tn=5)
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
    degrees = Georeference(CRS.from_epsg(4326), Affine(3e-4, 0, -59, 0, -3e-4, -51))
    pair(tmp_path, "AA", drawing("##."), drawing("#.."), georeference=utm)
    scores = evaluate(config(tmp_path))
    assert scores.areas.truth_km2 == pytest.approx(2 * 200 / 1e6)
    assert scores.areas.predicted_km2 == pytest.approx(200 / 1e6)
    assert scores.to_text().count("(pixel size from the CRS)") == 3
    # Degrees are no metres: assumed, and said so in every area.
    pair(tmp_path, "BB", drawing("##."), drawing("##?"), georeference=degrees)
    scores = evaluate(config(tmp_path, pixel_size=50))
    assert scores.areas.truth_km2 == pytest.approx(2 * 200 / 1e6 + 2 * 2500 / 1e6)
    assert scores.areas.observed_km2 == pytest.approx(3 * 200 / 1e6 + 2 * 2500 / 1e6)
    assert scores.to_text().count("50 m pixels assumed for 1 of 2 images, no projected CRS") == 3
    assert "50 m" in scores.to_json()["areas"]["pixel_size"]


def test_feet_are_not_metres(tmp_path):
    feet = Georeference(CRS.from_epsg(2229), Affine(100, 0, 6e6, 0, -100, 2e6))  # US survey feet
    pair(tmp_path, "AA", drawing("#."), drawing("#."), georeference=feet)
    area = evaluate(config(tmp_path)).areas.truth_km2
    assert area == pytest.approx((100 * 1200 / 3937) ** 2 / 1e6)


def test_places_are_weighed_alike(tmp_path):
    pair(tmp_path, "AA", drawing("####"), drawing("####"))
    pair(tmp_path, "BB", drawing("####"), drawing("####"))
    pair(tmp_path, "CC", drawing("#..."), drawing("...#"))
    pair(tmp_path, "DD", drawing("...."), drawing("...."))
    table = pd.DataFrame({"tile_id": ["DD", "CC", "BB", "AA", "EE"], "aoi_id": [9, 7, 3, 3, 1]})
    table.to_parquet(tmp_path / "table.parquet")
    scores = evaluate(config(tmp_path, metadata_fp=tmp_path / "table.parquet"))
    assert {place: f.images for place, f in scores.by_place.items()} == {"3": 2, "7": 1, "9": 1}
    assert scores.mean_place_dice == pytest.approx((1 + 0 + 1) / 3)
    assert scores.to_json()["by_place"]["9"] == {
        "images": 1,
        "pooled_dice": None,
        "mean_image_dice": 1.0,
    }
    assert "Dice, mean of 3 places" in scores.to_text()
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
    with pytest.raises(InputError, match=r"preds/AA_kelp\.tif has 3 x 1 .*truth/AA_kelp\.tif 1 x"):
        evaluate(config(tmp_path / "b"))
    with pytest.raises(InputError, match="no such folder"):
        evaluate(config(tmp_path / "nowhere"))
