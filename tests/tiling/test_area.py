"""An area of interest: inside it the map of the whole scene, outside nothing read or observed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced import ArrayScene, exact, noisy_scene

from kelp.raster.bands import DEM
from kelp.raster.validity import observed
from kelp.tiling import engine as engines
from kelp.tiling.grid import TileGrid
from kelp.tiling.strip import Slicing


def scale(batch):
    """The exact network: NIR as a probability, and a share of the tile's mean."""
    near = exact(batch)
    return (near + near.mean(axis=(1, 2), keepdims=True)) / 2


class Area:
    def __init__(self, wanted):
        self.wanted = wanted

    def mask(self, tile):
        return self.wanted[tile.slices]


class AreaScene(ArrayScene):
    def __init__(self, pixels, wanted):
        super().__init__(pixels)
        self.area = Area(wanted)
        self.read_at = np.zeros(self.shape, np.int64)

    def read(self, tile):
        self.read_at[tile.slices] += 1
        return super().read(tile)


def run(job, tile, overlap, **options):
    engine = engines.Engine(scale, Slicing(tile, overlap, batch_size=3, **options))
    engine.run([engines.Job(job, job)])
    return job.result, engine.counts


def rectangle(shape, top, left, height, width):
    wanted = np.zeros(shape, bool)
    wanted[top : top + height, left : left + width] = True
    return wanted


def touching(shape, tile, overlap, wanted):
    """Union of the tiles that touch the area, and their number; tile by tile."""
    needed, count = np.zeros(shape, bool), 0
    for one in TileGrid(shape, tile, overlap):
        inside = one.clipped(shape)
        if wanted[inside.slices].any():
            needed[inside.slices] = True
            count += 1
    return needed, count


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.sampled_from([8, 16, 30]),
    share=st.sampled_from([0, 1, 2]),
    skip_land=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=60)
def test_inside_is_the_map_of_the_whole_scene(shape, corner, size, tile, share, skip_land, seed):
    overlap = tile * share // 4
    top, left = (round(c * (s - 1)) for c, s in zip(corner, shape, strict=True))
    wanted = rectangle(shape, top, left, *size)
    pixels = noisy_scene(shape, seed)
    if skip_land:
        pixels[DEM] = np.where(np.arange(shape[1]) < shape[1] // 2, 5, 0)
    options = {"skip_land": skip_land, "land_tolerance": 2}
    whole, _ = run(ArrayScene(pixels), (tile, tile), (overlap, overlap), **options)
    job = AreaScene(pixels, wanted)
    found, counts = run(job, (tile, tile), (overlap, overlap), **options)
    np.testing.assert_array_equal(found[wanted], whole[wanted])
    assert np.isnan(found[~wanted]).all()
    needed, count = touching(shape, tile, overlap, wanted)
    assert counts.predicted + counts.land <= count
    if skip_land:  # tiles need a margin to tell that they are land
        grown = np.pad(needed, 2)
        for axis in (0, 1):
            grown = np.any([np.roll(grown, step, axis) for step in range(-2, 3)], axis=0)
        needed = grown[2:-2, 2:-2]
    rows = needed.any(axis=1)
    assert (job.read_at[rows][needed[rows]] >= 1).all()
    assert job.read_at.max() <= 1  # no pixel twice


def test_only_what_tiles_need_is_read():
    shape, tile, overlap = (400, 500), 32, 16
    wanted = rectangle(shape, 200, 240, 60, 80)
    job = AreaScene(noisy_scene(shape), wanted)
    _, counts = run(job, (tile, tile), (overlap, overlap))
    needed, count = touching(shape, tile, overlap, wanted)
    assert counts.predicted == count
    np.testing.assert_array_equal(job.read_at > 0, needed)


def test_observed_pixels_outside_still_weigh_a_tile():
    """A tile's weight is its observed share, of all its pixels: else the map would change."""
    pixels = noisy_scene((40, 40), holes=0.5)
    wanted = rectangle((40, 40), 10, 10, 3, 3)
    whole, _ = run(ArrayScene(pixels), (16, 16), (8, 8))
    found, _ = run(AreaScene(pixels, wanted), (16, 16), (8, 8))
    seen = observed(pixels)
    assert np.isfinite(found).sum() == (wanted & seen).sum()
    np.testing.assert_array_equal(found[wanted], whole[wanted])


def test_an_area_of_single_pixels():
    wanted = np.zeros((50, 50), bool)
    wanted[[0, 49, 25], [0, 49, 10]] = True
    pixels = noisy_scene((50, 50), holes=0)
    whole, _ = run(ArrayScene(pixels), (16, 16), (8, 8))
    found, counts = run(AreaScene(pixels, wanted), (16, 16), (8, 8))
    np.testing.assert_array_equal(found[wanted], whole[wanted])
    assert counts.predicted < len(TileGrid((50, 50), 16, 8)) / 2


def test_a_source_without_area_is_wanted_whole():
    result, _ = run(ArrayScene(noisy_scene((20, 20), holes=0)), (16, 16), (8, 8))
    assert np.isfinite(result).mean() > 0.8
