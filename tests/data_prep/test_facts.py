import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.data_prep.facts import KELP_FACTS, facts
from kelp.raster.bands import DEM, QA
from kelp.tables import FACTS

NAN = np.float32(np.nan)


def scene(height: int, width: int) -> np.ndarray:
    """All observed, all sea."""
    pixels = np.full((7, height, width), 8000, np.float32)
    pixels[QA] = pixels[DEM] = 0
    return pixels


@st.composite
def scenes(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pixels = rng.choice(
        np.array([7000, 8000, NAN], np.float32), (7, height, width), p=[0.4, 0.4, 0.2]
    )
    pixels[QA] = rng.random((height, width)) < draw(st.sampled_from([0, 0.3, 1]))
    heights = np.array([NAN, -32768, -3, 0, 0.5, 60], np.float32)
    pixels[DEM] = rng.choice(heights[: draw(st.integers(1, 6))], (height, width))
    mask = rng.choice(np.array([0, 1, 255], np.uint8), (height, width))
    return pixels, mask


@given(scenes())
def test_every_fact_is_the_count_of_its_pixels(made):
    """Against the definitions, pixel by pixel."""
    pixels, mask = made
    n = mask.size
    cells = [(pixels[:, y, x], mask[y, x]) for y, x in np.ndindex(mask.shape)]
    kelp = sum(m == 1 for _, m in cells)
    bad = sum(p[QA] == 1 for p, _ in cells)
    unknown = sum(bool(np.isnan(p[DEM]) or p[DEM] < 0) for p, _ in cells)
    sea = sum(p[DEM] == 0 for p, _ in cells)
    seen = sum(
        bool(np.isfinite(p[1]) and np.isfinite(p[:5]).sum() >= 3 and p[QA] != 1) for p, _ in cells
    )
    got = facts(pixels, mask)
    assert tuple(got) == FACTS
    assert got == {
        "kelp_pixels": kelp,
        "kelp_pixels_pct": kelp / n,
        "has_kelp": kelp > 0,
        "qa_corrupted_pixels_pct": bad / n,
        "qa_ok": bad == 0,
        "dem_nan_pixels_pct": unknown / n,
        "dem_zero_pixels_pct": sea / n,
        "water_pixels_pct": (sea + unknown) / n,
        "almost_all_water": (sea + unknown) / n > 0.98,
        "valid_pixels_pct": seen / n,
        "high_kelp_pixels_pct": kelp / n > 0.4,
    }


@given(scenes())
def test_without_a_mask_nothing_is_said_about_kelp(made):
    pixels, mask = made
    with_mask, without = facts(pixels, mask), facts(pixels, None)
    assert [without[name] for name in KELP_FACTS] == [None] * 4
    rest = set(FACTS) - set(KELP_FACTS)
    assert {name: without[name] for name in rest} == {name: with_mask[name] for name in rest}


def test_values_are_plain_numbers():
    got = facts(scene(4, 5), np.zeros((4, 5), np.uint8))
    assert {type(value) for value in got.values()} == {int, float, bool}


@pytest.mark.parametrize("kelp, suspect", [(40, False), (41, True)])
def test_more_than_40_per_cent_kelp_is_suspect(kelp, suspect):
    mask = np.zeros((5, 20), np.uint8)
    mask.flat[:kelp] = 1
    assert facts(scene(5, 20), mask)["high_kelp_pixels_pct"] is suspect


@pytest.mark.parametrize("land, water", [(2, False), (1, True)])
def test_more_than_98_per_cent_water_is_almost_all(land, water):
    pixels = scene(5, 20)
    pixels[DEM].flat[:land] = 3
    assert facts(pixels, None)["almost_all_water"] is water


def test_a_tile_takes_well_under_a_millisecond():
    pixels, mask = scene(128, 128), np.zeros((128, 128), np.uint8)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        facts(pixels, mask)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
