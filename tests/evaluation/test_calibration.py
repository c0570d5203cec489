"""Calibration: counts by logit, temperature, reliability, thresholds fitted on other sites."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from kelp.evaluation.bootstrap import SiteBootstrap
from kelp.evaluation.calibration import (
    EDGES,
    THRESHOLDS,
    Calibration,
    add_logits,
    as_threshold,
    best_temperature,
    calibration_error,
    expected_area,
    logit_classes,
    logit_histogram,
    reliability,
)
from kelp.evaluation.thresholds import Histogram, best_threshold, parts_of


def counted(p, truth):
    histogram = logit_histogram(1)
    add_logits(histogram, 0, p, truth)
    return histogram


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_counts_are_those_of_each_threshold(seed):
    rng = np.random.default_rng(seed)
    p = special.expit(rng.normal(-1, 3, (20, 30))).astype(np.float32)
    p[rng.random(p.shape) < 0.1] = np.nan
    p[0, :3] = 0, 1, 1e-38
    truth = rng.choice([0, 1, 255], p.shape, p=[0.7, 0.2, 0.1]).astype(np.uint8)
    histogram = counted(p, truth)
    assert histogram.pixels.sum() == (np.isfinite(p) & (truth != 255)).sum()
    counts, dices = histogram.counts()[0], histogram.dice()[0]
    logits = special.logit(p.astype(np.float64))
    for k in rng.integers(len(THRESHOLDS), size=5):
        said = np.nan_to_num(logits, nan=-np.inf) >= EDGES[THRESHOLDS[k]]
        tp = (said & (truth == 1)).sum()
        fp = (said & (truth == 0)).sum()
        fn = (~said & (truth == 1)).sum()
        assert tuple(counts[:, THRESHOLDS[k]]) == (tp, fp, fn)
        assert dices[THRESHOLDS[k]] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_thresholds_are_told_in_few_digits():
    told = [as_threshold(k) for k in THRESHOLDS]
    assert told == sorted(set(told))
    assert told[0] == pytest.approx(0.001, rel=0.1)
    assert told[-1] == pytest.approx(0.999, rel=0.001)
    assert 0.5 in told


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_an_overconfident_network_is_found(temperature):
    rng = np.random.default_rng(0)
    honest = rng.normal(-2, 2, 400_000)
    truth = (rng.random(len(honest)) < special.expit(honest)).astype(np.uint8)
    p = special.expit(honest * temperature).astype(np.float32)
    histogram = counted(p[None], truth[None])
    assert best_temperature(histogram) == pytest.approx(temperature, rel=0.03)
    was = reliability(histogram).error
    again = special.expit(special.logit(p.astype(np.float64)) / temperature).astype(np.float32)
    assert reliability(counted(again[None], truth[None])).error < 0.003
    assert was > 0.01 or temperature == 1


def test_what_was_not_observed_is_missed_but_does_not_calibrate():
    p = np.full((4, 4), np.nan, np.float32)
    p[0] = 0.5
    truth = np.ones((4, 4), np.uint8)
    histogram = counted(p, truth)
    assert (histogram.pixels.sum(), histogram.unobserved_kelp) == (4, 12)
    tp, fp, fn = histogram.counts()[0][:, THRESHOLDS[0]]
    assert (tp, fp, fn) == (4, 0, 12)


def calibrated(by_site, threshold, temperature=(1.0, 1.0)):
    histogram = Histogram(
        np.stack([one.pixels[0] for one in by_site]), np.zeros(len(by_site), np.int64)
    )
    best = as_threshold(int(best_threshold(histogram.total().dice(), THRESHOLDS)))
    return Calibration(
        histogram,
        histogram,
        temperature,
        (threshold, best),
        parts_of(len(by_site), 0),
        SiteBootstrap(len(by_site), 200, 0),
    )


def site(seed, kelp=True):
    rng = np.random.default_rng(seed)
    honest = rng.normal(-2, 2, (1, 5000))
    truth = (rng.random(honest.shape) < special.expit(honest)) & kelp
    return counted(special.expit(honest).astype(np.float32), truth.astype(np.uint8))


def test_an_old_threshold_moves_with_the_temperature():
    sites = [site(k) for k in range(6)]
    best = calibrated(sites, 0.5).threshold[1]
    one = calibrated(sites, best, (1.0, 2.5))
    assert not one.gains
    assert (
        one.kept == one.carried == pytest.approx(special.expit(special.logit(best) / 2.5), rel=0.01)
    )
    assert calibrated(sites, 1.0, (1.0, 2.5)).carried == 1
    assert calibrated(sites, 0.3).carried == 0.3


def test_with_one_site_the_threshold_stays():
    one = calibrated([site(1)], 0.9)
    assert not one.gains
    assert one.kept == 0.9
    assert one.scores["difference"].value == 0


def test_a_gain_that_may_be_chance_moves_no_threshold():
    one = calibrated([site(k) for k in range(16, 20)], 0.35)
    gain = one.scores["difference"]
    assert gain.low < 0 < gain.value  # four sites do not show it
    assert not one.gains
    assert one.kept == 0.35
    assert one.threshold[1] != 0.35


def test_sites_without_kelp_fit_nothing():
    sites = [site(1), *(site(k, kelp=False) for k in range(2, 9))]
    one = calibrated(sites, 0.4)
    # A third of the draws miss the one site with kelp.
    assert one.threshold_interval is None
    # That site is evaluated at the old threshold, since the others have nothing to fit to.
    assert as_threshold(one.held_out_classes[0]) == pytest.approx(0.4, rel=0.03)
    low, high = calibrated([site(k) for k in range(8)], 0.4).threshold_interval
    assert 0.1 < low < high < 0.9


def test_calibration_error_by_hand():
    # 40 pixels at 0.2, 12 of them kelp; 10 at 0.8, 8 of them kelp; the first of two draws has none
    pixels, p, kelp = np.array([[0, 0], [40, 10]]), np.array([[0, 0], [8, 8]]), [[0, 0], [12, 8]]
    found = calibration_error(pixels, p, np.array(kelp))
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(4 / 50)


def test_areas_by_class_are_those_of_pixels():
    p = special.expit(np.linspace(-8, 8, 5001)).astype(np.float32)
    areas = np.bincount(logit_classes(p), np.full(len(p), 900.0), minlength=len(EDGES))
    assert areas.sum() == pytest.approx(900 * 5001)
    assert expected_area(areas) == pytest.approx(900 * float(p.sum()), rel=1e-3)
