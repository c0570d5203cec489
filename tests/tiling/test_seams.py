"""The seam score: 1 where nothing shows, more where tiles leave steps."""

import numpy as np
import pytest
from scipy import ndimage

from kelp.tiling.grid import TileGrid
from kelp.tiling.seams import Steps, steps

GRID = TileGrid((1100, 1300), 64, 32)


def smooth(seed, sigma=3.0):
    noise = np.random.default_rng(seed).normal(size=GRID.shape)
    field = ndimage.gaussian_filter(noise, sigma)
    return (1 / (1 + np.exp(-2 * field / field.std()))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_a_map_without_seams_scores_one(seed):
    assert steps(smooth(seed), GRID).score == pytest.approx(1, abs=0.03)


def test_a_level_for_each_tile_shows():
    """The planted fault: every tile is off by a little of its own."""
    p = smooth(0, 12) * 0.5 + 0.2
    rng = np.random.default_rng(1)
    for y in range(0, 1100, 32):
        for x in range(0, 1300, 32):
            p[y : y + 32, x : x + 32] += rng.uniform(-0.1, 0.1)
    assert steps(p, GRID).score > 2


def test_by_hand():
    """Steps of 0.3 across the only border, 0.1 elsewhere; pairs with NaN do not count."""
    row = np.array([0.0, 0.1, 0.4, 0.5], dtype=np.float32)
    p = np.stack([row, row])
    found = steps(p, TileGrid((2, 4), (2, 2)))
    assert (found.borders, found.others) == (2, 4)
    assert found.border == pytest.approx(2 * np.log(0.3 + 1e-6), rel=1e-5)
    assert found.score == pytest.approx(3, rel=1e-4)
    p[0, 2] = np.nan
    found = steps(p, TileGrid((2, 4), (2, 2)))
    assert (found.borders, found.others) == (1, 3)


def test_no_border_has_no_score():
    assert steps(smooth(0)[:64, :64], TileGrid((64, 64), 64, 32)).score is None
    assert Steps().score is None
    assert steps(np.zeros((1, 1), np.float32), TileGrid((1, 1), 8)).score is None
