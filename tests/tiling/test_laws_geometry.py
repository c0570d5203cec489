"""The laws of kelp on tiles, each against the fault that would break it.

1 reflection, 6 memory, and how tiles are merged. What else a law asks is in its module's tests.
"""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS, Memory

from kelp.raster.bands import BANDS, QA
from kelp.raster.validity import canonical, observed
from kelp.tiling.engine import Engine, Job
from kelp.tiling.grid import TileGrid
from kelp.tiling.strip import Slicing

pytestmark = pytest.mark.usefixtures("one_thread")
NIR = BANDS.index("NIR")


def run_engine(network, pixels, tile, overlap, **options):
    job = Memory(pixels)
    engine = Engine(network, Slicing(tile, overlap, **options))
    engine.run([Job(job, job)])
    return job.result


# --- law 1: a scene smaller than a tile is reflected up to it


def mirrored(size, side):
    """Which pixel of an axis of `size` each of `side` shows: 0 1 2 1 0 1 … for three."""
    period = max(1, 2 * (size - 1))
    steps = np.arange(max(size, side)) % period
    return np.minimum(steps, period - steps)


@settings(LAWS, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    tile=st.tuples(st.integers(8, 15), st.integers(8, 15)),
)
def test_the_network_sees_small_scenes_reflected(shape, tile):
    pixels = canonical(np.random.default_rng(0).integers(1, 65535, (7, *shape)))
    pixels[QA] = 0
    seen = []

    def network(batch):
        seen.append(batch[0].copy())
        return np.zeros((1, *tile), np.float32)

    run_engine(network, pixels, tile, (3, 5), batch_size=1)
    rows, columns = (mirrored(*sides) for sides in zip(shape, tile, strict=True))
    whole = pixels[:, rows[:, None], columns]
    expected = [whole[:, *t.slices] for t in TileGrid(shape, tile, (3, 5))]
    np.testing.assert_array_equal(seen, expected)


# --- merging: a tile's vote weighs by the share of observed input it had


@settings(LAWS, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), qa_as_nodata=st.booleans())
def test_a_tile_votes_by_its_observed_share(seed, qa_as_nodata):
    rng = np.random.default_rng(seed)
    shape, tile, overlap = (30, 37), (12, 10), (7, 6)
    pixels = canonical(rng.integers(1, 65535, (7, *shape)))
    pixels[QA] = rng.random(shape) < rng.random(shape[1])  # clouds: denser in some columns
    pixels[NIR][rng.random(shape) < rng.random(shape[0])[:, None]] = np.nan
    seen = observed(pixels, qa_as_nodata)
    votes, weights, answers = np.zeros(shape), np.zeros(shape), []
    for t in TileGrid(shape, tile, overlap):
        share = seen[t.slices].mean()
        if share:
            answers.append(rng.random())
            votes[t.slices] += share * answers[-1]
            weights[t.slices] += share
    said = iter(answers)

    def network(batch):
        return np.full((1, *tile), next(said), np.float32)

    options = {"batch_size": 1, "qa_as_nodata": qa_as_nodata}
    result = run_engine(network, pixels, tile, overlap, **options)
    with np.errstate(invalid="ignore"):
        expected = np.where(seen, votes / weights, np.nan)
    np.testing.assert_allclose(result, expected, atol=2e-3)  # weights are counted in 2^-12


# --- law 6: memory grows with width x tile, not with height x width


class Coastline:
    """A scene that is never in memory: 64 px wide, any height, clouds in places."""

    def __init__(self, height):
        self.shape = (height, 64)
        self.rows = 0

    def read(self, tile):
        pixels = np.full((7, tile.height, tile.width), 9000, np.float32)
        pixels[QA] = 0
        pixels[QA, :, : tile.y % 64] = 1
        return pixels

    def write(self, y, rows):
        assert y == self.rows
        self.rows += len(rows)

    def close(self):
        assert self.rows == self.shape[0]


def peak_memory(height):
    scene = Coastline(height)
    engine = Engine(lambda batch: batch[:, NIR] / 65535, Slicing((32, 32), (16, 16)))
    gc.collect()
    tracemalloc.start()
    try:
        engine.run([Job(scene, scene)])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_height():
    peak_memory(200)  # what the first run alone brings in
    short, tall = 2_000, 20_000
    grown = peak_memory(tall) - peak_memory(short)
    # Where tiles begin is kept, a number a row of tiles; any plane of the scene would be more.
    smallest_plane = (tall - short) * 64
    assert grown < smallest_plane / 2
