from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kelp.raster.streaming import TOLERANCE, ChannelSummary

LEVELS = (0.0, 0.01, 0.37, 0.5, 0.99, 1.0)
quick = settings(derandomize=True, max_examples=60)

missing = st.sampled_from([np.nan, np.inf, -np.inf])
whole = st.one_of(missing, st.integers(-32768, 65535).map(float))
anything = st.one_of(
    missing,
    st.integers(-100, 100).map(float),
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([65536.0, 1e9, -1e-30]),
)


def planes(elements):
    return st.lists(
        hnp.arrays(
            np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=elements
        ),
        min_size=1,
        max_size=5,
    )


def summed(parts):
    summary = ChannelSummary()
    for part in parts:
        summary.add(part)
    return summary


def valid(parts):
    values = np.concatenate([part.ravel() for part in parts]).astype(np.float64)
    return values[np.isfinite(values)], values.size


@pytest.mark.parametrize("elements", [whole, anything], ids=["whole", "anything"])
def test_equals_numpy_on_all_values(elements):
    @quick
    @given(planes(elements))
    def check(parts):
        values, size = valid(parts)
        stats = summed(parts).stats()
        assert (stats.count, stats.nan_count) == (values.size, size - values.size)
        assert all(math.isfinite(number) for number in dataclasses.astuple(stats))
        if values.size:
            assert (stats.min, stats.max) == (values.min(), values.max())
            scale = np.abs(values).max()
            assert stats.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * scale)
            assert stats.std == pytest.approx(values.std(), rel=1e-7, abs=1e-7 * scale)
            assert stats.min <= stats.mean <= stats.max
            assert stats.min <= stats.q01 <= stats.q99 <= stats.max

    check()


@quick
@given(planes(whole))
def test_quantiles_of_whole_numbers_are_exact(parts):
    values, _ = valid(parts)
    if values.size:
        got = summed(parts).quantiles(LEVELS)
        np.testing.assert_allclose(got, np.quantile(values, LEVELS), rtol=1e-12, atol=1e-9)


@quick
@given(planes(anything))
def test_other_quantiles_are_within_the_stated_tolerance(parts):
    values, _ = valid(parts)
    if values.size:
        got = np.array(summed(parts).quantiles(LEVELS))
        around = [np.quantile(values, LEVELS, method=m) for m in ("lower", "higher")]
        bound = TOLERANCE * np.abs(around).max(axis=0) + 1e-12
        assert (np.abs(got - np.quantile(values, LEVELS)) <= bound).all()


def test_the_tolerance_is_reached_by_realistic_indices():
    # A plane of NDVI over dark water: the error is a fraction of the tolerance's bound of 1.
    rng = np.random.default_rng(3)
    plane = rng.normal(0.02, 0.05, (350, 251)).astype(np.float32)
    got = np.array(ChannelSummary().add(plane).quantiles(LEVELS))
    np.testing.assert_allclose(got, np.quantile(plane, LEVELS), rtol=TOLERANCE, atol=1e-7)


@quick
@given(planes(anything), planes(anything), planes(anything))
def test_merging_is_associative_and_equals_adding(a, b, c):
    left = summed(a).merge(summed(b)).merge(summed(c)).stats()
    right = summed(a).merge(summed(b).merge(summed(c))).stats()
    added = summed([*a, *b, *c]).stats()
    scale = max(abs(added.min), abs(added.max))
    for other in (left, right):
        for field in dataclasses.fields(added):
            ours, theirs = getattr(added, field.name), getattr(other, field.name)
            if field.name in ("mean", "std"):
                assert theirs == pytest.approx(ours, rel=1e-7, abs=1e-7 * scale)
            else:
                assert theirs == ours


@quick
@given(planes(anything))
def test_a_summary_survives_the_way_between_processes(parts):
    summary = summed(parts)
    copy = pickle.loads(pickle.dumps(summary))  # noqa: S301 - our own bytes
    assert copy.stats() == summary.stats()
    copy.add(parts[0])
    assert copy.stats() == summary.add(parts[0]).stats()


def test_a_summary_on_the_way_is_small():
    plane = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    assert len(pickle.dumps(ChannelSummary().add(plane))) < 50_000


def test_merging_leaves_the_other_summary_alone():
    a, b = ChannelSummary(), ChannelSummary().add(np.array([[1, 2.5]], np.float32))
    before = pickle.dumps(b)
    a.merge(b).add(np.array([[-7, -8.5]], np.float32))
    assert pickle.dumps(b) == before
    assert a.count == 4


def test_mean_and_deviation_far_from_zero():
    # Sums of squares in float32, or E[x^2] - E[x]^2, would lose the deviation altogether.
    plane = np.full((300, 201), 60_000, np.float32)
    plane[::2] += 1
    stats = summed([plane] * 20).stats()
    assert stats.mean == pytest.approx(60_000.5, abs=1e-9)
    assert stats.std == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("plane", [np.full((3, 5), np.nan, np.float32), np.empty((0, 4), "f4")])
def test_a_channel_without_valid_pixels(plane):
    stats = ChannelSummary().add(plane).stats()
    assert dataclasses.astuple(stats) == (0, 1, 0, 1, 0, 1, 0, plane.size)
