"""`kelp compare`: figures by hand, honest thresholds, and advice that may be "do not slice"."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from bundles import PixelBody, tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from world import coast, write_tif

import kelp
from kelp.agreement import Figures
from kelp.cli import main
from kelp.config import CompareConfig, ExportConfig
from kelp.errors import ConfigError, InputError
from kelp.nn import model
from kelp.nn.bundle import load_bundle
from kelp.nn.comparison.sums import (
    CODES,
    FIGURES,
    Draws,
    Sums,
    best_threshold,
    interval,
    pixels_by_code,
    sums_of,
)
from kelp.raster import read_mask
from kelp.seams import Steps
from kelp.writer import write_mask


class Shy(PixelBody):
    """Sees kelp only in pictures of at most 64 px: a network for which slicing pays."""

    def forward(self, x):
        return super().forward(x) - 100 * (max(x.shape[-2:]) > 64)


class Wide(PixelBody):
    """Sees kelp only in pictures of more than 64 px: slicing ruins it."""

    def forward(self, x):
        return super().forward(x) - 100 * (max(x.shape[-2:]) <= 64)


def figure(sums, name):
    return float(FIGURES[name](sums))


def one(truth, codes, threshold=125, land=None, steps=Steps(), km2=0.0009):  # noqa: B008
    land = np.zeros(truth.shape, bool) if land is None else land
    return sums_of(truth, codes, threshold, land, steps, km2)


def random_pair(rng, shape=(40, 50)):
    truth = (rng.random(shape) < 0.2).astype(np.uint8)
    truth[rng.random(shape) < 0.05] = 255
    codes = rng.integers(0, CODES + 1, shape).astype(np.uint8)
    codes[rng.random(shape) < 0.1] = 255
    return truth, codes


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_evaluate(seed):
    truth, codes = random_pair(np.random.default_rng(seed))
    mask = np.where(codes == 255, 255, codes >= 125).astype(np.uint8)
    wanted = Figures.of(truth, mask)
    sums = one(truth, codes)
    assert figure(sums, "pooled_dice") == pytest.approx(wanted.pooled_dice)
    assert figure(sums, "mean_image_dice") == pytest.approx(wanted.mean_image_dice)
    assert figure(sums, "precision") == pytest.approx(wanted.counts.precision)
    assert figure(sums, "recall") == pytest.approx(wanted.counts.recall)
    assert figure(sums, "iou") == pytest.approx(wanted.counts.iou)
    small = wanted.patches[0]
    assert figure(sums, "recall_1-4_px") == pytest.approx(small.found / small.patches)


def test_areas_water_and_boundary_by_hand():
    truth = np.zeros((30, 30), np.uint8)
    truth[5:10, 5:10] = 1
    codes = np.zeros((30, 30), np.uint8)
    codes[5:10, 6:11] = 250  # one column off
    codes[20, 20:24] = 250  # false, far away: two on land
    land = np.zeros((30, 30), bool)
    land[:, 22:] = True
    sums = one(truth, codes, land=land, km2=0.01)
    # 25 pixels, ring of 16: the rings of two squares one column apart share 4 + 4 and two sides.
    ring = np.zeros((30, 30), bool)
    ring[5:10, 5:10] = True
    ring[6:9, 6:9] = False
    said = np.roll(ring, 1, axis=1)
    said[20, 20:24] = True
    shared = (ring & said).sum()
    assert figure(sums, "boundary_dice") == pytest.approx(2 * shared / (ring.sum() + said.sum()))
    assert float(sums["truth_km2"]) == pytest.approx(0.25)
    assert figure(sums, "area_by_threshold") == pytest.approx(29 / 25)
    assert figure(sums, "area_by_probability") == pytest.approx(29 / 25)
    # Water farther than 3 steps from kelp: the diamond around the square has 25 + 4 x (5 x 3 + 3).
    water = 30 * 22 - (25 + 4 * 15 + 4 * 3)
    assert float(sums["open_km2"]) == pytest.approx(water * 0.01)
    assert figure(sums, "false_kelp_share_of_open_water") == pytest.approx(2 / water)


def test_calibration_by_hand():
    truth = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], np.uint8)
    codes = np.array([[50] * 4, [200] * 4], np.uint8)  # 0.2 with 1 of 4, 0.8 with 3 of 4
    assert figure(one(truth, codes), "calibration_error") == pytest.approx(0.05)


def test_nothing_is_undefined_not_zero():
    sums = one(np.zeros((5, 5), np.uint8), np.zeros((5, 5), np.uint8))
    for name in ("pooled_dice", "recall", "precision", "recall_1-4_px", "area_by_threshold"):
        assert np.isnan(figure(sums, name))
    assert np.isnan(figure(sums, "seam_score"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_threshold_with_the_highest_dice(seed):
    rng = np.random.default_rng(seed)
    truth, codes = random_pair(rng, (12, 13))
    found = best_threshold(pixels_by_code(truth, codes))
    dices = [
        Figures.of(truth, np.where(codes == 255, 255, codes >= t).astype(np.uint8)).pooled_dice
        for t in range(1, CODES + 1)
    ]
    assert dices[found - 1] == pytest.approx(max(dices))


def test_draws_are_of_places_and_paired():
    rng = np.random.default_rng(0)
    by_place = Sums(np.stack([one(*random_pair(rng)).values for _ in range(12)]))
    draws = Draws(12, 500, seed=3)
    drawn = draws.of(by_place)
    assert drawn["images"].shape == (500,)
    assert (drawn["images"] == 12).all()
    again = Draws(12, 500, seed=3).of(by_place)
    np.testing.assert_array_equal(drawn.values, again.values)
    low, high = interval(FIGURES["pooled_dice"](drawn))
    whole = Sums(by_place.values.sum(axis=0))
    assert low < figure(whole, "pooled_dice") < high
    same = Sums(np.repeat(by_place.values[:1], 12, axis=0))  # places that are all alike
    low, high = interval(FIGURES["pooled_dice"](draws.of(same)))
    assert high - low < 1e-12


def test_an_interval_of_little_is_not_told():
    assert interval(np.array([np.nan] * 10 + [0.5] * 90)) is None
    assert interval(np.array([np.nan] * 4 + [0.5] * 96)) == (0.5, 0.5)


# The command


@pytest.fixture
def labelled(tmp_path):
    """Twelve scenes of six places with their truths, and the table that says so."""
    rng = np.random.default_rng(5)
    rows = []
    for k in range(12):
        image, mask = coast((100, 90), rng)
        write_tif(tmp_path / "images" / f"K{k:02d}_satellite.tif", image)
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_mask(tmp_path / "masks" / f"K{k:02d}_kelp.tif", mask)
        rows.append({"tile_id": f"K{k:02d}", "aoi_id": f"place{k // 2}"})
    pd.DataFrame(rows).to_parquet(tmp_path / "places.parquet")
    return tmp_path


def compare(folder, monkeypatch, body, bundle=None, **options):
    monkeypatch.setattr(model, "_build_body", lambda spec: body(spec.channels))
    values = {
        "data_dir": folder / "images",
        "gt_dir": folder / "masks",
        "metadata_fp": folder / "places.parquet",
        "run_dir": (tiny_bundle(folder / "bundle", **(bundle or {})),),
        "output_dir": folder / "out",
        "precision": "32-true",
        "device": "cpu",
        "draws": 300,
    }
    return kelp.compare(CompareConfig(**(values | options)))


def test_where_slicing_cannot_help_the_advice_is_not_to(labelled, monkeypatch):
    """A network that decides pixel by pixel, at the scale of the scene."""
    result = compare(labelled, monkeypatch, PixelBody, {"resize_strategy": "pad", "image_size": 32})
    assert not result.advice.slice
    assert result.advice.text.startswith("Do not slice, no gain can be shown: +0.000 Dice")
    dices = {
        result.comparison.figure(judged, "pooled_dice").value for judged in result.comparison.judged
        if judged.way.kind != "seed"
    }  # fmt: skip
    assert len(dices) == 1
    assert dices.pop() > 0.2
    assert result.advice.difference.low == result.advice.difference.high == 0


def test_where_slicing_helps_it_says_so(labelled, monkeypatch):
    result = compare(labelled, monkeypatch, Shy)
    assert result.advice.slice
    assert re.match(r"Slice: \+0\.\d+ Dice, 95 % interval \+0", result.advice.text)
    assert "6 places only" in result.advice.text


def test_where_slicing_harms_it_says_so(labelled, monkeypatch):
    result = compare(labelled, monkeypatch, Wide, {"resize_strategy": "pad", "image_size": 32})
    assert not result.advice.slice
    assert result.advice.text.startswith("Do not slice, it harms: -")


def test_the_files_tell_all(labelled, monkeypatch):
    result = compare(
        labelled, monkeypatch, Shy, tta=True, tile_sizes=(24,), interpolations=("bilinear",)
    )
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["advice"]["text"] == result.advice.text
    assert (told["images"], told["places"], told["left_out"]) == (12, 6, [])
    names = [way["name"] for way in told["ways"]]
    assert names == [
        "whole image",
        "whole image, enlarged 2 times",
        "sliced 32 px, overlap 16 px, hann",
        "sliced 32 px, overlap 16 px, mean",
        "sliced 32 px, overlap 0 px, hann",
        "sliced 24 px, overlap 12 px, hann",
        "sliced 32 px, overlap 16 px, hann, bilinear",
        "sliced 32 px, overlap 16 px, hann, 8 symmetries",
        "the seed's merge",
    ]
    ways = dict(zip(names, told["ways"], strict=True))
    for way in told["ways"]:
        assert set(way["figures"]) == set(FIGURES)
        assert way["seconds_per_image"] > 0
        assert len(way["reliability"]) == 10
        for value in way["figures"].values():
            assert set(value) == {"value", "low", "high", "difference"}
    # 100 x 90 px: tiles of 32 with overlap 16 begin at 6 rows and 5 columns; 36 + 6 padded ones.
    crops = {name: way["network_pixels_per_image"] / 64**2 for name, way in ways.items()}
    assert crops["sliced 32 px, overlap 16 px, hann"] == 6 * 5
    assert crops["sliced 32 px, overlap 16 px, hann, 8 symmetries"] == 8 * 30
    assert ways["whole image"]["network_pixels_per_image"] == 128 * 128
    assert ways["whole image, enlarged 2 times"]["network_pixels_per_image"] == 224 * 224
    page = (labelled / "out" / "report.html").read_text()
    assert result.advice.text.split(":")[0] in page
    assert page.count("<img") >= 3
    assert (labelled / "out" / "comparison.txt").read_text().rstrip() == result.text
    assert sorted(p.name for p in (labelled / "out").iterdir()) == [
        "comparison.json", "comparison.txt", "kelp-compare.yaml", "report.html",
    ]  # fmt: skip


def test_a_way_is_what_prediction_does(labelled, monkeypatch):
    """The sliced way, at the bundle's threshold, scores as its masks do."""
    result = compare(labelled, monkeypatch, Shy, decision_threshold=0.4)
    bundle = load_bundle(labelled / "bundle")
    scores = Figures()
    for path in sorted((labelled / "images").glob("*.tif")):
        out = labelled / "mask.tif"
        kelp.predict(bundle, path, out, tile=32, overlap=16, blend="hann", precision="32-true")
        truth = read_mask(labelled / "masks" / path.name.replace("satellite", "kelp"))
        scores = scores.plus(Figures.of(truth, read_mask(out)))
    (judged,) = [
        judged for judged in result.comparison.judged
        if judged.way.name == "sliced 32 px, overlap 16 px, hann"
    ]  # fmt: skip
    value = result.comparison.figure(judged, "pooled_dice").value
    assert value == pytest.approx(scores.pooled_dice, abs=2e-3)  # probabilities in steps of 0.004


def test_the_seeds_merge_is_a_majority_of_hard_votes(labelled, monkeypatch):
    """Pixel by pixel all tiles vote alike, so the majority is the tiles' own decision."""
    settings = {"resize_strategy": "pad", "image_size": 32, "threshold": 0.48}
    result = compare(labelled, monkeypatch, PixelBody, settings, decision_threshold=0.48)
    by_kind = {judged.way.kind: judged for judged in result.comparison.judged}
    seeds, whole = by_kind["seed"].total, by_kind["whole"].total
    # 255 in neither: the seed knew no "not observed", so it may find kelp under clouds only.
    assert float(seeds["tp"]) >= float(whole["tp"]) > 0
    assert float(seeds["fn"]) <= float(whole["fn"])


def test_a_threshold_never_saw_the_places_it_is_used_on(labelled, monkeypatch):
    first = compare(labelled, monkeypatch, PixelBody)
    part = {}
    order = np.random.default_rng(0).permutation(6)
    for k, place in enumerate(order):
        part[place] = k
    for k in range(12):  # ruin the labels of one part
        if part[k // 2] == 0:
            path = labelled / "masks" / f"K{k:02d}_kelp.tif"
            write_mask(path, (read_mask(path) == 0).astype(np.uint8))
    second = compare(labelled, monkeypatch, PixelBody)
    for before, after in zip(first.comparison.judged, second.comparison.judged, strict=True):
        assert before.thresholds[0] == after.thresholds[0]
    changed = [
        before.thresholds[1:] != after.thresholds[1:]
        for before, after in zip(first.comparison.judged, second.comparison.judged, strict=True)
    ]
    assert any(changed)


def test_two_bundles_and_scenes_too_large_for_one_pass(labelled, monkeypatch, caplog):
    monkeypatch.setattr(model, "_build_body", lambda spec: Shy(spec.channels))
    pair = (
        tiny_bundle(labelled / "other", resize_strategy="pad", image_size=32),
        tiny_bundle(labelled / "bundle2"),
    )
    with caplog.at_level("INFO", "kelp"):
        compare(labelled, monkeypatch, Shy, run_dir=pair, largest_pass=200)
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["left_out"] == ["bundle2: whole image, enlarged 2 times"]
    assert "left out, larger than --largest_pass 200" in caplog.text
    assert {way["name"].partition(":")[0] for way in told["ways"]} == {"other", "bundle2"}
    nothing = compare(labelled, monkeypatch, Shy, largest_pass=64)
    assert nothing.advice.slice
    assert "too large to be shown to a network at once" in nothing.advice.text


def test_wrong_input_is_one_line(labelled, monkeypatch, capfd):
    monkeypatch.setattr(model, "_build_body", lambda spec: PixelBody(spec.channels))
    bundle = tiny_bundle(labelled / "bundle")
    config = {"data_dir": labelled / "images", "gt_dir": labelled / "masks", "run_dir": (bundle,)}
    config |= {"output_dir": labelled / "out"}
    with pytest.raises(ConfigError, match=r"--overlaps 32: must lie between 0 and 31 px"):
        kelp.compare(CompareConfig(**config, overlaps=(32,)))
    model_file = labelled / "model.onnx"
    kelp.export(ExportConfig(run_dir=bundle, output_path=model_file))
    with pytest.raises(ConfigError, match="name the run it was exported from"):
        kelp.compare(CompareConfig(**{**config, "run_dir": (model_file,)}))
    with pytest.raises(ConfigError, match="--run_dir is missing"):
        kelp.compare(CompareConfig(**{**config, "run_dir": ()}))
    with pytest.raises(ConfigError, match="--largest_pass 32: no way shows a network so little"):
        kelp.compare(CompareConfig(**config, largest_pass=32))
    truth = labelled / "masks" / "K03_kelp.tif"
    write_mask(truth, np.zeros((90, 100), np.uint8))
    with pytest.raises(InputError, match=r"K03_kelp\.tif has 90 x 100 pixels .* a truth must"):
        kelp.compare(CompareConfig(**config))
    truth.unlink()
    arguments = [f"--{name}={value}" for name, value in config.items() if name != "run_dir"]
    assert main(["compare", *arguments, f"--run_dir={bundle}", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "K03_kelp.tif: no such truth, 1 of 12 scenes have none" in line
    (labelled / "images" / "K03_satellite.tif").write_bytes(b"no tif")
    write_mask(labelled / "masks" / "K03_kelp.tif", np.zeros((100, 90), np.uint8))
    with pytest.raises(InputError, match=r"1 scenes cannot be read: .*K03_satellite\.tif"):
        kelp.compare(CompareConfig(**config))


def test_no_kelp_at_all_has_no_answer(labelled, monkeypatch):
    for path in (labelled / "masks").glob("*.tif"):
        write_mask(path, np.zeros((100, 90), np.uint8))

    class Blind(PixelBody):
        def forward(self, x):
            return super().forward(x) * 0 - 9

    result = compare(labelled, monkeypatch, Blind, decision_threshold=0.5)
    assert result.advice.text.startswith("No answer")
    assert not result.advice.slice
