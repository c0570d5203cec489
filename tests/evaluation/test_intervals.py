"""Intervals of area hold the truth as often as they say, at sites that nothing was fitted on."""

import json

import numpy as np
import pytest

from kelp.errors import BundleError
from kelp.evaluation.intervals import (
    OFFSET_M2,
    HeldOutSite,
    area_errors,
    read_held_out,
    sites_needed,
)


def simulated(rng, sites, dates=3, bias=0.15, between=0.35, within=0.15):
    """Truth and estimates: a site has a size and an error of its own, each date another one."""
    pairs = []
    for site in range(sites):
        size, own = rng.lognormal(12, 1.5), rng.normal(bias, between)
        for date in range(int(rng.integers(1, dates + 1))):
            truth = size * rng.lognormal(0, 0.5) * (rng.random() > 0.1)
            # Heavy tails, and false alarms where there is no kelp.
            error = own + rng.standard_t(4) * within
            estimate = truth * np.exp(error) + rng.exponential(3000)
            pairs.append(
                HeldOutSite(
                    site=f"s{site}",
                    scene=f"s{site}-{date}",
                    truth_m2=truth,
                    presence_m2=1.3 * estimate,
                    expected_m2=estimate,
                )
            )
    return pairs


@pytest.mark.parametrize("sites", [12, 25, 40, 80])
@pytest.mark.parametrize("expected", [True, False])
def test_ninety_percent_of_new_sites_are_covered(sites, expected):
    rng = np.random.default_rng(sites)
    held = []
    for _ in range(250):
        errors = area_errors(simulated(rng, sites), expected=expected)
        for pair in simulated(rng, 20, dates=1):
            low, high = errors.interval(pair.expected_m2 if expected else pair.presence_m2)
            held.append(low <= pair.truth_m2 <= high)
    # At least 90 % by construction; few sites make the interval wider than it need be.
    assert 0.86 <= np.mean(held) <= 0.94 + 0.6 / sites


def test_the_test_would_notice_intervals_that_are_too_narrow():
    rng = np.random.default_rng(1)
    errors = area_errors(simulated(rng, 60), coverage=0.6)
    pairs = simulated(rng, 2000, dates=1)
    held = [
        low <= pair.truth_m2 <= high
        for pair in pairs
        for low, high in [errors.interval(pair.expected_m2)]
    ]
    assert np.mean(held) < 0.8


def pair(site, truth, expected, presence=None):
    presence = expected if presence is None else presence
    return HeldOutSite(
        site=site, scene=site, truth_m2=truth, presence_m2=presence, expected_m2=expected
    )


def test_quantiles_by_hand():
    """19 sites, each off by a known factor: the ends are the most extreme errors."""
    factors = np.linspace(0.5, 1.4, 19)
    pairs = [pair(f"s{k}", f * (1e6 + OFFSET_M2) - OFFSET_M2, 1e6) for k, f in enumerate(factors)]
    errors = area_errors(pairs)
    assert errors.sites == 19
    low, high = errors.interval(2e6)
    assert low == pytest.approx(0.5 * (2e6 + OFFSET_M2) - OFFSET_M2)
    assert high == pytest.approx(1.4 * (2e6 + OFFSET_M2) - OFFSET_M2)
    # Fewer sites: the largest error either way, for both ends.
    fewer = area_errors(pairs[:9])
    assert fewer.low == pytest.approx(np.log(0.5))
    assert fewer.high == pytest.approx(-np.log(0.5))


def test_few_sites_say_nothing():
    pairs = [pair(f"s{k}", 1e5, 1e5) for k in range(8)]
    assert sites_needed() == 9
    assert area_errors(pairs) is None
    assert area_errors(pairs * 5) is None  # more scenes are not more sites
    assert area_errors([]) is None
    assert area_errors([*pairs, pair("s8", 1e5, 1e5)]) is not None


def test_scenes_of_one_site_share_its_vote():
    once = [pair(f"s{k}", 1e5 * (1 + k / 10), 1e5) for k in range(30)]
    often = once + [pair("s29", 3.9e5, 1e5)] * 500
    assert area_errors(often).high == pytest.approx(area_errors(once).high, rel=0.05)


def test_no_kelp_found_has_an_upper_end_and_ends_are_never_negative():
    pairs = [pair(f"s{k}", 2000.0 * (k % 3), 1000.0) for k in range(30)]
    low, high = area_errors(pairs).interval(0.0)
    assert low == 0
    assert 500 < high < 10_000


def test_pairs_of_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        read_held_out(tmp_path)
    folder = tmp_path / "artifacts" / "bundle"
    folder.mkdir(parents=True)
    file = folder / "bundle.json"
    file.write_text(json.dumps({"weights_sha256": "ab"}))
    assert read_held_out(tmp_path).pairs == ()
    entry = {"site": "a", "scene": "a1", "truth_m2": 1.0, "presence_m2": 2.0, "expected_m2": None}
    file.write_text(json.dumps({"weights_sha256": "ab", "held_out_sites": [entry]}))
    found = read_held_out(folder)
    assert found.sha256 == "ab"
    assert found.pairs == (HeldOutSite(**entry),)
    assert area_errors(found.pairs * 20, expected=True) is None
    file.write_text(json.dumps({"held_out_sites": [{**entry, "truth_m2": -1}]}))
    with pytest.raises(BundleError, match="not a readable bundle"):
        read_held_out(folder)
    file.write_text("{")
    with pytest.raises(BundleError, match="not a readable bundle"):
        read_held_out(folder)
