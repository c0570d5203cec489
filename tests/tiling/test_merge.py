import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kelp.errors import ConfigError, CoverageError
from kelp.raster.window import Tile
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import StripMerger, window

blends = st.sampled_from(["mean", "hann"])


@st.composite
def scenes(draw):
    """A grid of non-square tiles and a scene of any values that merging may see."""
    tile = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    overlap = (draw(st.integers(0, tile[0] - 1)), draw(st.integers(0, tile[1] - 1)))
    shape = (draw(st.integers(1, 30)), draw(st.integers(1, 30)))
    values = draw(
        arrays(np.float32, shape, elements=st.floats(-1, 1, width=32, allow_subnormal=False))
    )
    return TileGrid(shape, tile, overlap), values


def padded(values, grid):
    pad = [(0, max(0, t - s)) for t, s in zip(grid.tile, grid.shape, strict=True)]
    return np.pad(values, pad, mode="edge")


def merged(grid, values, blend, order=None, validities=None):
    tiles = list(grid)
    order = range(len(tiles)) if order is None else order
    merger = StripMerger(grid.shape, blend)
    source = padded(values, grid)
    for i in order:
        merger.add(tiles[i], source[tiles[i].slices], validities[i] if validities else 1.0)
    return merger.take(grid.shape[0])


@given(scene=scenes(), blend=blends, data=st.data())
def test_merging_the_tiles_of_an_array_gives_it_back(scene, blend, data):
    grid, values = scene
    order = data.draw(st.permutations(range(len(grid))))
    validities = data.draw(st.lists(st.floats(0.001, 1), min_size=len(grid), max_size=len(grid)))
    np.testing.assert_allclose(merged(grid, values, blend, order, validities), values, atol=1e-6)


@given(scene=scenes(), blend=blends, data=st.data())
def test_the_order_of_tiles_does_not_change_a_bit(scene, blend, data):
    grid, _ = scene
    rng = np.random.default_rng(0)
    votes = [rng.random(grid.tile, dtype=np.float32) for _ in grid]
    tiles = list(grid)

    def run(order):
        merger = StripMerger(grid.shape, blend)
        for i in order:
            merger.add(tiles[i], votes[i], 0.37)
        return merger.take(grid.shape[0])

    order = data.draw(st.permutations(range(len(grid))))
    assert run(order).tobytes() == run(range(len(grid))).tobytes()


@given(scene=scenes(), blend=blends, constant=st.floats(0, 1, width=32))
def test_a_constant_stays_that_constant(scene, blend, constant):
    grid, values = scene
    result = merged(grid, np.full_like(values, constant), blend)
    np.testing.assert_allclose(result, constant, rtol=0, atol=2**-30)


@given(scene=scenes(), blend=blends)
def test_rows_handed_out_early_are_the_same(scene, blend):
    grid, values = scene
    source, merger, parts = padded(values, grid), StripMerger(grid.shape, blend), []
    for y, below in zip(grid.rows, [*grid.rows[1:], grid.shape[0]], strict=True):
        for tile in grid.row(y):
            merger.add(tile, source[tile.slices])
        parts.append(merger.take(below))
    assert np.concatenate(parts).tobytes() == merged(grid, values, blend).tobytes()


def test_a_vote_weighs_by_validity():
    merger = StripMerger((1, 1))
    merger.add(Tile(0, 0, 1, 1), np.array([[1.0]]), 0.75)
    merger.add(Tile(0, 0, 1, 1), np.array([[0.0]]), 0.25)
    assert merger.take(1)[0, 0] == pytest.approx(0.75)


def test_a_dropped_tile_is_an_error_not_a_zero():
    grid = TileGrid((350, 333), 128, 64)
    merger = StripMerger(grid.shape)
    for tile in grid:
        if tile != grid[0]:
            merger.add(tile, np.ones(grid.tile))
    with pytest.raises(CoverageError, match="row 0, column 0"):
        merger.take(350)


@pytest.mark.parametrize("blend", ["mean", "hann"])
def test_tiles_that_disagree_are_averaged_with_their_weights(blend):
    """Against sums over the whole scene, kept by themselves."""
    grid = TileGrid((60, 50), 32, 16)
    rng = np.random.default_rng(1)
    merger = StripMerger(grid.shape, blend)
    sums, weights = np.zeros(grid.shape), np.zeros(grid.shape)
    weight = np.maximum(np.rint(window(blend, *grid.tile) * 4096), 1)
    for tile in grid:
        values = rng.random(grid.tile)
        merger.add(tile, values)
        sums[tile.slices] += values * weight
        weights[tile.slices] += weight
    np.testing.assert_allclose(merger.take(60), sums / weights, atol=1e-6)


def test_an_unknown_window_is_refused():
    with pytest.raises(ConfigError, match="blend: choose mean or hann, not 'uniform'"):
        StripMerger((4, 4), "uniform")
    with pytest.raises(ConfigError, match="not 'Hann'"):
        window("Hann", 4, 4)


def test_sums_are_exact_at_the_most_tiles_that_a_grid_allows():
    """1,024 votes of one number on a pixel give back that number, whatever their order."""
    grid = TileGrid((63, 63), 32, 31)
    order = np.random.default_rng(0).permutation(len(grid))
    value = np.float32(1 / 3)
    merger = StripMerger(grid.shape, "hann")
    for i in order:
        merger.add(grid[int(i)], np.full(grid.tile, value))
    assert (merger.take(63) == np.float32(np.rint(value * 2**30) / 2**30)).all()


def test_pixels_of_tiles_left_out_are_nan_and_no_holes():
    merger = StripMerger((4, 8))
    merger.add(Tile(0, 0, 4, 4), np.full((4, 4), 0.5))
    merger.leave_out(Tile(0, 4, 4, 4))
    result = merger.take(4)
    assert (result[:, :4] == 0.5).all()
    assert np.isnan(result[:, 4:]).all()


def test_rows_once_taken_are_closed():
    merger = StripMerger((8, 4))
    merger.add(Tile(0, 0, 4, 4), np.ones((4, 4)))
    merger.take(4)
    with pytest.raises(ValueError, match="already taken"):
        merger.add(Tile(3, 0, 4, 4), np.ones((4, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_cannot_be_probabilities_are_refused(value):
    with pytest.raises(ValueError, match="not numbers within"):
        StripMerger((2, 2)).add(Tile(0, 0, 2, 2), np.full((2, 2), value))


def test_memory_is_that_of_the_open_rows():
    merger = StripMerger((10_000, 16))
    for y in range(0, 10_000, 8):
        merger.add(Tile(y, 0, 8, 16), np.ones((8, 16)))
        merger.take(y + 8)
        assert merger.state().sums.shape == (1, 0, 16)


# The spread


def votes_of(grid, seed, agree):
    """What each tile says: one map with noise of its own, or all the same."""
    rng = np.random.default_rng(seed)
    scene = padded(rng.random(grid.shape), grid)
    noise = 0 if agree else rng.choice([1e-4, 1e-2, 1])
    return [
        np.clip(scene[tile.slices] + noise * rng.normal(size=grid.tile), 0, 1).astype(np.float32)
        for tile in grid
    ]


def spread_by_definition(grid, votes, validities, blend):
    """Two passes in float64: the mean first, then what votes differ from it."""
    height, width = padded(np.empty(grid.shape), grid).shape
    weights, moment = np.zeros((2, height, width))
    # As documented: weights are counted in units of 2^-12, at least one of them.
    units = [np.maximum(np.rint(window(blend, *grid.tile) * v * 4096), 1) for v in validities]
    for tile, vote, weight in zip(grid, votes, units, strict=True):
        weights[tile.slices] += weight
        moment[tile.slices] += weight * vote
    mean, moment = moment / weights, np.zeros((height, width))
    for tile, vote, weight in zip(grid, votes, units, strict=True):
        moment[tile.slices] += weight * (vote - mean[tile.slices]) ** 2
    return np.sqrt(moment / weights)[: grid.shape[0], : grid.shape[1]]


@given(scene=scenes(), blend=blends, agree=st.booleans(), data=st.data())
def test_the_spread_is_the_weighted_standard_deviation_of_votes(scene, blend, agree, data):
    grid, tiles = scene[0], list(scene[0])
    votes = votes_of(grid, data.draw(st.integers(0, 99)), agree)
    validities = data.draw(st.lists(st.floats(0.001, 1), min_size=len(grid), max_size=len(grid)))
    order = data.draw(st.permutations(range(len(grid))))
    plain, both = StripMerger(grid.shape, blend), StripMerger(grid.shape, blend, spread=True)
    for i in order:
        plain.add(tiles[i], votes[i], validities[i])
        both.add(tiles[i], votes[i], validities[i])
    mean, spread = both.take_planes(grid.shape[0])
    assert mean.tobytes() == plain.take(grid.shape[0]).tobytes()  # it costs the mean nothing
    expected = spread_by_definition(grid, votes, validities, blend)
    np.testing.assert_allclose(spread, expected, rtol=1e-6, atol=4e-5)
    number = np.zeros(padded(mean, grid).shape)
    for tile in tiles:
        number[tile.slices] += 1
    alone = number[: grid.shape[0], : grid.shape[1]] == 1
    assert (spread[alone] == 0).all()
    if agree:
        assert (spread == 0).all()


@given(scene=scenes(), blend=blends, data=st.data())
def test_order_and_stops_change_no_bit_of_the_spread(scene, blend, data):
    """Nor does it matter where another merger goes on from a state."""
    grid = scene[0]
    votes = dict(zip(grid, votes_of(grid, 1, agree=False), strict=True))
    whole = StripMerger(grid.shape, blend, spread=True)
    for tile in data.draw(st.permutations(list(grid))):
        whole.add(tile, votes[tile], 0.37)
    merger, parts = StripMerger(grid.shape, blend, spread=True), []
    for y, below in zip(grid.rows, [*grid.rows[1:], grid.shape[0]], strict=True):
        if data.draw(st.booleans()):
            merger = StripMerger(grid.shape, blend, merger.state(), spread=True)
        for tile in data.draw(st.permutations(list(grid.row(y)))):
            merger.add(tile, votes[tile], 0.37)
        parts.append(merger.take_planes(below))
    expected = whole.take_planes(grid.shape[0])
    assert np.concatenate(parts, axis=1).tobytes() == expected.tobytes()


@given(scene=scenes(), blend=blends, ends=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_some_columns_are_those_of_all(scene, blend, ends):
    grid = scene[0]
    found = []
    for columns in (slice(None), slice(*ends)):
        merger = StripMerger(grid.shape, blend, spread=True)
        for tile, votes in zip(grid, votes_of(grid, 1, agree=False), strict=True):
            merger.add(tile, votes, 0.37)
        found.append(merger.take_planes(grid.shape[0], columns))
    expected = np.full_like(found[0], np.nan)
    expected[..., slice(*ends)] = found[0][..., slice(*ends)]
    assert found[1].tobytes() == expected.tobytes()


@pytest.mark.parametrize("difference", [1, 0.5, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("level", [0, 0.3, 0.999])
def test_small_spreads_are_told(level, difference):
    """Also beside a large mean, where the difference of squares is small."""
    merger = StripMerger((1, 1), spread=True)
    for value in (level, level - difference):
        merger.add(Tile(0, 0, 1, 1), np.array([[value]]))
    assert merger.take_planes(1)[1, 0, 0] == pytest.approx(difference / 2, abs=2**-15)


def test_a_thousand_votes_are_summed_exactly():
    """Whole numbers below 2^53, also where all of them say kelp."""
    merger = StripMerger((1, 1), spread=True)
    for _ in range(1024):
        merger.add(Tile(0, 0, 1, 1), np.ones((1, 1)))
    state = merger.state()
    assert state.sums.ravel().tolist() == [2.0**52, 2.0**52]
    assert merger.take_planes(1).ravel().tolist() == [1, 0]


def test_pixels_without_a_vote_have_no_spread():
    merger = StripMerger((1, 2), spread=True)
    merger.add(Tile(0, 0, 1, 1), np.ones((1, 1)))
    merger.leave_out(Tile(0, 1, 1, 1))
    np.testing.assert_array_equal(merger.take_planes(1)[1], [[0, np.nan]])


def test_the_hann_window_trusts_the_middle():
    hann = window("hann", 8, 6)
    assert hann.shape == (8, 6)
    assert hann.min() > 0
    assert hann[3:5, 2:4].min() > 0.8
    np.testing.assert_allclose(hann, hann[::-1, ::-1])
    assert (window("mean", 3, 5) == 1).all()


@given(scene=scenes(), blend=blends, at_a_time=st.integers(1, 300), data=st.data())
def test_tiles_side_by_side_add_up_as_one_by_one(scene, blend, at_a_time, data):
    grid = scene[0]
    votes = dict(zip(grid, votes_of(grid, 2, agree=False), strict=True))
    one, rows = (StripMerger(grid.shape, blend, spread=True) for _ in range(2))
    validity = st.sampled_from([1.0, 0.37])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kelp.tiling.merge._VOTES", at_a_time)
        for y in grid.rows:
            tiles, stride = grid.row(y), grid.tile[1] - grid.overlap[1]
            validities = data.draw(st.lists(validity, min_size=len(tiles), max_size=len(tiles)))
            for tile, share in zip(tiles, validities, strict=True):
                one.add(tile, votes[tile], share)
            first = 0
            for k, (tile, after) in enumerate(zip(tiles, [*tiles[1:], None], strict=True), 1):
                if after is None or after.x - tile.x != stride or data.draw(st.booleans()):
                    part = np.array([votes[each] for each in tiles[first:k]])
                    rows.add_row(tiles[first:k], part, validities[first:k])
                    first = k
    end = grid.shape[0]
    assert rows.take_planes(end).tobytes() == one.take_planes(end).tobytes()


@pytest.mark.parametrize(
    "tiles",
    [
        [(0, 0), (0, 2), (0, 5)],  # at unequal distances
        [(0, 4), (0, 2)],  # from right to left
        [(0, 2), (0, 2)],  # twice
        [(0, 0), (1, 2)],  # of two rows
        [(0, 4), (0, 8)],  # out of the scene, into its next row
    ],
)
def test_tiles_that_do_not_lie_side_by_side_are_refused(tiles):
    merger = StripMerger((8, 10))
    placed = [Tile(y, x, 4, 4) for y, x in tiles]
    with pytest.raises(ValueError, match="side by side"):
        merger.add_row(placed, np.ones((len(tiles), 4, 4)), [1.0] * len(tiles))
