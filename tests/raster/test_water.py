"""A scene's clear water: found where it is, alike however the scene is read, applied by place."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from laws import LAWS
from sliced import ArrayScene as Scene

from kelp.raster.bands import DEM, QA
from kelp.raster.water import CELL, WATER_LEVELS, Anchored, WaterReference, is_clear_water
from kelp.raster.window import Tile

SEA = np.array([7400, 7650, 7700, 8000, 8050])


def sea(shape, levels=SEA, seed=0, spread=40):
    """Open water all over."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((7, *shape), np.float32)
    pixels[:5] = np.rint(rng.normal(np.reshape(levels, (5, 1, 1)), spread, (5, *shape)))
    return pixels


def busy(shape, seed):
    """Water that changes over the scene, with land, clouds, gaps and saturated pixels in it."""
    rng = np.random.default_rng(seed)
    pixels = sea(shape, seed=seed)
    pixels[:5] += np.rint(np.linspace(0, 600, shape[1])).astype(np.float32)
    land = rng.random(shape) < 0.3
    pixels[:5, land] = 12_000
    pixels[DEM, land] = 20
    pixels[DEM, rng.random(shape) < 0.2] = np.nan
    cloud = rng.random(shape) < 0.2
    pixels[QA, cloud] = 1
    pixels[:5, cloud] += 5000
    pixels[0, rng.random(shape) < 0.05] = np.nan
    pixels[4, rng.random(shape) < 0.05] = 65_535
    return pixels


def median_of_water(pixels):
    """The lower median of pixels that pass the published rule, by sorting."""
    swir, nir = pixels[0], pixels[1]
    dem = pixels[DEM]
    with np.errstate(invalid="ignore"):
        clear = (pixels[QA] == 0) & np.isfinite(pixels[:5]).all(0) & (pixels[:5] < 16_384).all(0)
        clear &= np.where(np.isnan(dem), swir < 9500, (dem <= 0) & (swir < 10_500))
        clear &= nir < swir + 1500
    values = np.sort(pixels[:5, clear], axis=1)
    return values[:, (clear.sum() - 1) // 2], int(clear.sum())


@LAWS
@given(st.tuples(st.integers(20, 200), st.integers(20, 200)), st.integers(0, 9))
def test_one_cell_holds_the_median_of_clear_water(shape, seed):
    pixels = busy(shape, seed)
    found = WaterReference.estimate(Scene(pixels))
    expected, count = median_of_water(pixels)
    assert found.clear.tolist() == [[count]]
    assert found.levels[0, 0].tolist() == expected.tolist()
    assert found.fallback is None
    anchored = found.apply(pixels, Tile(0, 0, *shape))
    clear = is_clear_water(pixels)
    after = np.sort(anchored[:5, clear], axis=1)[:, (count - 1) // 2]
    assert after.tolist() == list(WATER_LEVELS)


def differs_by_windows(pixels, apply):
    """Whether cutting before or after anchoring makes any difference, over many windows."""
    whole = apply(pixels, Tile(0, 0, *pixels.shape[1:]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, x = rng.integers(0, pixels.shape[1] - 9), rng.integers(0, pixels.shape[2] - 9)
        tile = Tile(int(y), int(x), int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        if apply(pixels[:, *tile.slices], tile).tobytes() != whole[:, *tile.slices].tobytes():
            return True
    return False


def test_windows_make_no_difference():
    pixels = busy((600, 800), 1)
    found = WaterReference.estimate(Scene(pixels))
    assert found.levels.shape == (2, 2, 5)
    assert not differs_by_windows(pixels, found.apply)
    # Planted: a window taken for one at the scene's corner, and a window's own estimate.
    corner = lambda part, tile: found.apply(part, Tile(0, 0, tile.height, tile.width))  # noqa: E731
    own = lambda part, tile: WaterReference.estimate(Scene(part)).apply(  # noqa: E731
        part, Tile(0, 0, tile.height, tile.width)
    )
    assert differs_by_windows(pixels, corner)
    assert differs_by_windows(pixels, own)
    source = Anchored(Scene(pixels), found)
    assert source.shape == (600, 800)
    tile = Tile(100, 350, 90, 64)
    assert (
        source.read(tile).tobytes()
        == found.apply(pixels, Tile(0, 0, 600, 800))[:, *tile.slices].tobytes()
    )


def rows_asked(scene):
    return sorted(row for tile in scene.windows for row in range(tile.y, tile.bottom))


def test_a_small_scene_is_read_whole_and_of_a_large_one_some_rows():
    scene = Scene(sea((500, 40)))
    assert WaterReference.estimate(scene).read_share == 1
    assert rows_asked(scene) == list(range(500))
    assert max(tile.height for tile in scene.windows) <= 64
    scene = Scene(sea((1100, 40)))  # cells begin at 0, 366 and 733
    found = WaterReference.estimate(scene)
    wanted = [*range(8, 366, 17), *range(374, 733, 17), *range(741, 1100, 17)]
    assert rows_asked(scene) == wanted
    assert found.read_share == len(wanted) / 1100
    assert {(tile.x, tile.width) for tile in scene.windows} == {(0, 40)}


def test_only_the_rows_that_are_read_matter():
    pixels = sea((700, 60))
    pixels[:5] += np.rint(np.linspace(0, 300, 700))[:, np.newaxis].astype(np.float32)
    read = np.zeros(700, bool)
    read[8:350:17] = read[358::17] = True
    found = WaterReference.estimate(Scene(pixels))
    for cell, half in enumerate((slice(350), slice(350, 700))):
        clear = pixels[:, half][:, read[half]]
        assert found.clear[cell, 0] == clear[0].size
    elsewhere, there = pixels.copy(), pixels.copy()
    elsewhere[:5, ~read] = 13_000
    there[:5, read] += 50
    assert WaterReference.estimate(Scene(elsewhere)).levels.tobytes() == found.levels.tobytes()
    assert np.allclose(WaterReference.estimate(Scene(there)).levels, found.levels + 50)


def test_bands_along_the_scan_lines_do_not_fall_into_step_with_the_rows_that_are_read(monkeypatch):
    """Thematic Mapper has 16 detectors, each a little brighter or darker than the others."""
    pixels = sea((700, 200), spread=10)
    pixels[:5] += np.linspace(-30, 30, 16)[np.arange(700) % 16][:, np.newaxis].round()
    assert np.abs(WaterReference.estimate(Scene(pixels)).levels - SEA).max() <= 4
    monkeypatch.setattr("kelp.raster.water.EVERY", 16)
    assert np.abs(WaterReference.estimate(Scene(pixels)).levels - SEA).max() > 4


def test_local_levels_follow_the_water_and_one_number_does_not():
    pixels = sea((CELL, 3 * CELL), spread=10)
    pixels[:5] += np.repeat([0, 300, 600], CELL).astype(np.float32)
    local = WaterReference.estimate(Scene(pixels))
    constant = WaterReference.estimate(Scene(pixels), "constant")
    assert local.levels.shape == (1, 3, 5)
    assert constant.levels.shape == (1, 1, 5)
    for k, lift in enumerate((0, 300, 600)):
        middle = Tile(CELL // 2, k * CELL + CELL // 2, 1, 1)
        # A cell's own water counts 27 times its neighbour's.
        assert np.allclose(local.level(middle), SEA + lift, atol=25)
    assert np.allclose(constant.level(), SEA + 300, atol=15)


def test_a_competition_image_and_the_large_scene_around_it_agree():
    """On even water the cell of a large scene says what the image alone says, to a DN or two."""
    pixels = sea((3 * CELL, 3 * CELL))
    whole = WaterReference.estimate(Scene(pixels))
    window = Tile(CELL, CELL, CELL, CELL)
    image = WaterReference.estimate(Scene(pixels[:, *window.slices]))
    large = whole.apply(pixels[:, *window.slices], window)
    small = image.apply(pixels[:, *window.slices], Tile(0, 0, CELL, CELL))
    assert np.abs(large - small).max() <= 2


def test_a_cell_of_land_takes_the_water_around_it():
    pixels = sea((CELL, 3 * CELL))
    pixels[:5, :, CELL : 2 * CELL] = 13_000
    pixels[DEM, :, CELL : 2 * CELL] = 50
    found = WaterReference.estimate(Scene(pixels))
    assert found.clear[0, 1] == 0
    assert np.allclose(found.levels, SEA, atol=3)


@pytest.mark.parametrize("spoil", ["land", "cloud", "missing"])
def test_without_clear_water_nothing_is_shifted_and_it_is_said(spoil):
    pixels = sea((60, 70))
    if spoil == "land":
        pixels[:5], pixels[DEM] = 13_000, 30
    elif spoil == "cloud":
        pixels[QA] = 1
    else:
        pixels[2] = np.nan
    found = WaterReference.estimate(Scene(pixels))
    assert found.fallback == "no clear water found (0 px); optical bands are not shifted"
    assert np.isnan(found.level()).all()
    assert found.apply(pixels, Tile(0, 0, 60, 70)).tobytes() == pixels.tobytes()


def test_an_unknown_elevation_may_be_sea_and_is_recorded():
    pixels = sea((60, 70))
    pixels[DEM] = np.nan
    pixels[:5, :20] = 13_000  # land that no DEM tells of is too bright
    found = WaterReference.estimate(Scene(pixels))
    assert not found.knows_elevation
    assert np.allclose(found.level(), SEA, atol=5)


def test_what_is_missing_saturated_or_no_band_stays():
    pixels = sea((40, 40))
    pixels[1, 0, 0], pixels[2, 0, 1], pixels[3, 0, 2] = np.nan, 65_535, -32_768
    pixels[QA, 1, 1], pixels[DEM, 2, 2] = 1, 7
    before = pixels.copy()
    found = WaterReference.constant((40, 40), SEA)
    after = found.apply(pixels, Tile(0, 0, 40, 40))
    assert pixels.tobytes() == before.tobytes()
    assert np.isnan(after[1, 0, 0])
    assert (after[2, 0, 1], after[3, 0, 2]) == (65_535, -32_768)
    assert after[QA:].tobytes() == before[QA:].tobytes()
    assert after[0, 5, 5] - before[0, 5, 5] == 7574 - 7400


def test_none_is_no_shift():
    scene = Scene(sea((50, 50)))
    found = WaterReference.estimate(scene, "none")
    assert not scene.windows
    assert found.apply(scene.pixels, Tile(0, 0, 50, 50)).tobytes() == scene.pixels.tobytes()


def test_the_area_of_interest_of_a_scene_outlives_anchoring():
    """The sliced engine asks its source for it: lost, the map would be of the whole scene."""

    class Wanted:
        shape = (4, 5)
        area = object()

        def read(self, tile=None):
            return np.zeros((7, 4, 5), np.float32)

    reference = WaterReference.estimate(Wanted(), "none")
    assert Anchored(Wanted(), reference).area is Wanted.area


def test_windows_of_a_wide_scene_do_not_matter(monkeypatch):
    """Wide rows are read in parts, cells lie across their borders."""
    scene = Scene(busy((70, 900), 3))
    whole = WaterReference.estimate(scene)
    monkeypatch.setattr("kelp.raster.water._COLUMNS", 101)
    monkeypatch.setattr("kelp.raster.water._ROWS", 9)
    scene.windows.clear()
    parts = WaterReference.estimate(scene)
    assert max(tile.width for tile in scene.windows) == 101
    assert (parts.levels == whole.levels).all()
    assert (parts.clear == whole.clear).all()
    assert len(whole.levels[0]) > 1


def some_windows(shape, seed):
    rng = np.random.default_rng(seed)
    for _ in range(2):
        y, x = (int(rng.integers(0, size)) for size in shape)
        sides = (int(rng.integers(1, 25)) for _ in shape)
        yield Tile(y, x, *sides).clipped(shape)


@settings(LAWS, max_examples=40)
@given(
    st.tuples(st.integers(30, 110), st.integers(30, 110)),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([1, 3]),
)
def test_a_part_of_a_scene_is_shifted_as_in_the_whole_scene(shape, seed, inland, every):
    """Law: cells of windows that alone are wanted are those of the whole scene, to the last bit."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kelp.raster.water.CELL", 10)
        patched.setattr("kelp.raster.water.EVERY", every)
        pixels = busy(shape, seed)
        if inland:  # water lies many cells away from most of the windows
            pixels[:5, 20:], pixels[DEM, 20:] = 13_000, 50
        whole = WaterReference.estimate(Scene(pixels))
        scene, windows = Scene(pixels), list(some_windows(shape, seed))
        part = WaterReference.estimate(scene, windows=windows)
    assert (whole.read_share == 1) == (every == 1)
    for tile in windows:
        shifted = part.apply(pixels[:, *tile.slices], tile)
        assert shifted.tobytes() == whole.apply(pixels[:, *tile.slices], tile).tobytes()
    read = np.zeros(shape, int)
    for tile in scene.windows:
        read[tile.slices] += 1
    assert read.max() == 1
    assert part.read_share == pytest.approx(read.mean())


def test_only_the_cells_around_a_window_are_read(monkeypatch):
    """A window needs the cells that it lies between, and their neighbours."""
    monkeypatch.setattr("kelp.raster.water.CELL", 10)
    monkeypatch.setattr("kelp.raster.water.EVERY", 1)
    pixels = sea((200, 300))
    pixels[:5] += np.rint(np.linspace(0, 900, 300)).astype(np.float32)
    scene, window = Scene(pixels), Tile(96, 150, 8, 4)  # rows of cells 9 and 10, columns 14 and 15
    part = WaterReference.estimate(scene, windows=[window])
    read = np.zeros(scene.shape, bool)
    for tile in scene.windows:
        read[tile.slices] = True
    assert read[80:120, 130:170].all()
    assert read.sum() == 40 * 40
    assert part.read_share == pytest.approx(1600 / 60_000)
    low, high = part.extremes()
    assert SEA[0] + 390 < low[0] <= high[0] < SEA[0] + 510
    # Planted: only the window's own cells were read, and their neighbours taken for land.
    own = pixels.copy()
    own[:5, :90] = own[:5, 110:] = 13_000
    alone = WaterReference.estimate(Scene(own), windows=[window])
    seen = pixels[:, *window.slices]
    assert (alone.apply(seen, window) != part.apply(seen, window)).any()


def test_windows_of_a_scene_without_water_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr("kelp.raster.water.CELL", 10)
    monkeypatch.setattr("kelp.raster.water.EVERY", 1)
    pixels = sea((60, 70))
    pixels[QA] = 1
    found = WaterReference.estimate(Scene(pixels), windows=[Tile(5, 5, 4, 4)])
    assert found.fallback
    assert found.read_share == 1  # it was looked for everywhere
