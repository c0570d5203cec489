"""Figures that are sums: against counts by hand, in strips, and their bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.evaluation.bootstrap import Estimate, SiteBootstrap, interval, site_numbers
from kelp.evaluation.confusion import Figures
from kelp.evaluation.metrics import FIGURES, SHORE, ImageTotals, SiteTotals, Totals
from kelp.evaluation.pairs import strips
from kelp.evaluation.thresholds import Histogram, best_threshold
from kelp.raster.area import GroundArea
from kelp.raster.probability import CODES
from kelp.raster.window import Tile


def figure(totals, name):
    return float(FIGURES[name](totals))


def one(truth, codes, threshold=125, land=None, km2=0.0009):
    image = ImageTotals(GroundArea("affine", km2 * 1e6))
    mask = decided(codes, threshold)
    image.add(Tile(0, 0, *truth.shape), truth, mask, codes, land)
    return image.finish()[0]


def decided(codes, threshold):
    return np.where(codes == 255, 255, codes >= threshold).astype(np.uint8)


def random_pair(rng, shape=(40, 50)):
    truth = (rng.random(shape) < 0.2).astype(np.uint8)
    truth[rng.random(shape) < 0.05] = 255
    codes = rng.integers(0, CODES + 1, shape).astype(np.uint8)
    codes[rng.random(shape) < 0.1] = 255
    return truth, codes


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_evaluate(seed):
    truth, codes = random_pair(np.random.default_rng(seed))
    wanted = Figures.of(truth, decided(codes, 125))
    totals = one(truth, codes)
    assert figure(totals, "pooled_dice") == pytest.approx(wanted.pooled_dice)
    assert figure(totals, "mean_image_dice") == pytest.approx(wanted.mean_image_dice)
    assert figure(totals, "precision") == pytest.approx(wanted.confusion.precision)
    assert figure(totals, "recall") == pytest.approx(wanted.confusion.recall)
    assert figure(totals, "iou") == pytest.approx(wanted.confusion.iou)
    small = wanted.patches[0]
    assert figure(totals, "recall_1-4_px") == pytest.approx(small.found / small.patches)


def test_areas_water_and_boundary_by_hand():
    truth = np.zeros((30, 30), np.uint8)
    truth[5:10, 5:10] = 1
    codes = np.zeros((30, 30), np.uint8)
    codes[5:10, 6:11] = 250  # one column off
    codes[20, 20:24] = 250  # false, far away: two on land
    land = np.zeros((30, 30), bool)
    land[:, 22:] = True
    totals = one(truth, codes, land=land, km2=0.01)
    # 25 pixels, ring of 16: the rings of two squares one column apart share 4 + 4 and two sides.
    ring = np.zeros((30, 30), bool)
    ring[5:10, 5:10] = True
    ring[6:9, 6:9] = False
    said = np.roll(ring, 1, axis=1)
    said[20, 20:24] = True
    shared = (ring & said).sum()
    assert figure(totals, "boundary_dice") == pytest.approx(2 * shared / (ring.sum() + said.sum()))
    assert float(totals["truth_km2"]) == pytest.approx(0.25)
    assert figure(totals, "area_by_threshold") == pytest.approx(29 / 25)
    assert figure(totals, "area_by_probability") == pytest.approx(29 / 25)
    # Water farther than 3 steps from kelp: the diamond around the square has 25 + 4 x (5 x 3 + 3).
    water = 30 * 22 - (25 + 4 * 15 + 4 * 3)
    assert float(totals["open_km2"]) == pytest.approx(water * 0.01)
    assert figure(totals, "false_kelp_share_of_open_water") == pytest.approx(2 / water)


def test_calibration_by_hand():
    truth = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], np.uint8)
    codes = np.array([[50] * 4, [200] * 4], np.uint8)  # 0.2 with 1 of 4, 0.8 with 3 of 4
    assert figure(one(truth, codes), "calibration_error") == pytest.approx(0.05)


def test_nothing_is_undefined_not_zero():
    totals = one(np.zeros((5, 5), np.uint8), np.zeros((5, 5), np.uint8))
    for name in ("pooled_dice", "recall", "precision", "recall_1-4_px", "area_by_threshold"):
        assert np.isnan(figure(totals, name))
    assert np.isnan(figure(totals, "seam_score"))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_the_threshold_with_the_highest_dice(seed):
    rng = np.random.default_rng(seed)
    truth, codes = random_pair(rng, (12, 13))
    histogram = Histogram.empty(())
    histogram.add((), truth, codes)
    found = best_threshold(histogram.dice())
    dices = [Figures.of(truth, decided(codes, t)).pooled_dice for t in range(1, CODES + 1)]
    assert dices[found - 1] == pytest.approx(max(dices))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_precision_at_every_threshold(seed):
    truth, codes = random_pair(np.random.default_rng(seed), (12, 13))
    histogram = Histogram.empty(())
    histogram.add((), truth, codes)
    counts, precision, recall = histogram.counts(), histogram.precision(), histogram.recall()
    for t in range(1, CODES + 1):
        wanted = Figures.of(truth, decided(codes, t)).confusion
        assert tuple(counts[:, t]) == (wanted.tp, wanted.fp, wanted.fn)
        for found, value in ((precision, wanted.precision), (recall, wanted.recall)):
            assert np.isnan(found[t]) if value is None else found[t] == pytest.approx(value)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_strips_change_no_figure(seed, rows):
    """Dilation and outline need rows beyond a strip; patches and areas add up."""
    rng = np.random.default_rng(seed)
    truth, codes = random_pair(rng)
    land, labels = rng.random(truth.shape) < 0.3, (rng.random(truth.shape) < 0.2).astype(np.uint8)
    mask, height = decided(codes, 100), len(truth)
    found = []
    for step in (height, rows):
        image = ImageTotals(GroundArea("affine", 900.0))
        for y in range(0, height, step):
            top, end = max(0, y - SHORE), min(height, y + step + SHORE)
            tile = Tile(y, 0, min(step, height - y), truth.shape[1])
            parts = (array[top:end] for array in (truth, mask, codes, land, labels))
            image.add(tile, *parts, above=y - top)
        found.append(image.finish())
    np.testing.assert_allclose(found[1][0].values, found[0][0].values, rtol=1e-12)
    assert found[1][1] == found[0][1]


def test_strips_cover_an_image_with_rows_around():
    found = list(strips((1100, 7), 3))
    assert [(own.y, own.bottom) for own, _ in found] == [(0, 512), (512, 1024), (1024, 1100)]
    assert [(read.y, read.bottom) for _, read in found] == [(0, 515), (509, 1027), (1021, 1100)]
    assert [strip.above for strip in found] == [0, 3, 3]


def test_unobserved_pixels_are_neither_calibrated_nor_0():
    truth, codes = np.ones((2, 4), np.uint8), np.full((2, 4), 255, np.uint8)
    codes[0, 0] = 250
    totals = one(truth, codes)
    assert totals.reliability.pixels.tolist() == [0] * 9 + [1]
    assert totals.reliability.error == 0
    assert figure(totals, "recall") == 1 / 8  # by masks they are no kelp, as in a submission
    assert float(totals["observed_km2"]) == pytest.approx(0.0009)
    assert float(totals["labelled_km2"]) == pytest.approx(8 * 0.0009)


def test_draws_are_of_sites_and_paired():
    rng = np.random.default_rng(0)
    images = [one(*random_pair(rng)) for _ in range(24)]
    bootstrap = SiteBootstrap(12, 500, seed=3)
    sites = [k // 2 for k in range(24)]
    all_of_them = SiteTotals(images, sites, bootstrap)
    dice = all_of_them.figure("pooled_dice")
    assert dice.low < dice.value < dice.high
    assert dice.value == figure(Totals.of(images), "pooled_dice")
    assert SiteTotals(images, sites, SiteBootstrap(12, 500, seed=3)).figure("pooled_dice") == dice
    drawn = bootstrap.sums(np.ones((12, 1)))
    assert (drawn == 12).all()
    alike = SiteTotals(images[:1] * 12, range(12), bootstrap).figure("pooled_dice")
    assert alike.high - alike.low < 1e-12
    assert all_of_them.difference(all_of_them, "pooled_dice") == Estimate(0, 0, 0)


def test_an_interval_of_little_is_undefined():
    assert interval(np.array([np.nan] * 10 + [0.5] * 90)) is None
    assert interval(np.array([np.nan] * 4 + [0.5] * 96)) == (0.5, 0.5)
    assert Estimate.of(np.nan, np.array([0.5])) == Estimate()
    assert (Estimate().number(), Estimate(0.5).bounds()) == ("–", "–")


def test_sites_are_numbered_by_name():
    assert site_numbers(["b", "a", "b", "c"]) == (1, 0, 1, 2)
