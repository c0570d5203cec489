import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.errors import ConfigError
from kelp.raster.window import Tile
from kelp.tiling.grid import TileGrid, origins

sizes = st.integers(1, 400)


@st.composite
def grids(draw, edge="clamp"):
    tile = (draw(st.integers(1, 130)), draw(st.integers(1, 130)))
    overlap = (draw(st.integers(0, tile[0] - 1)), draw(st.integers(0, tile[1] - 1)))
    # A wide axis with a stride of one pixel would only be slow.
    shape = tuple(
        draw(st.integers(1, min(400, 12 * (t - o) + t))) for t, o in zip(tile, overlap, strict=True)
    )
    return TileGrid(shape, tile, overlap, edge)


def cover(grid):
    count = np.zeros(grid.shape, dtype=int)
    for tile in grid:
        count[tile.clipped(grid.shape).slices] += 1
    return count


@given(st.one_of(grids(), grids(edge="pad")))
def test_every_pixel_lies_in_a_tile(grid):
    assert cover(grid).min() >= 1


@given(grids())
def test_no_tile_leaves_a_scene_of_at_least_one_tile(grid):
    for axis in (0, 1):
        if grid.shape[axis] >= grid.tile[axis]:
            ends = [(t.bottom, t.right)[axis] for t in grid]
            assert max(ends) == grid.shape[axis]
        else:
            assert len((grid.rows, grid.columns)[axis]) == 1


@given(st.one_of(grids(), grids(edge="pad")))
def test_a_grid_is_a_sequence_row_by_row(grid):
    tiles = list(grid)
    assert len(grid) == len(tiles)
    assert [grid[i] for i in range(len(grid))] == tiles
    assert tiles == sorted(tiles, key=lambda t: (t.y, t.x))
    assert grid[-1] == tiles[-1]
    assert list(grid[1:3]) == tiles[1:3]
    assert [t for y in grid.rows for t in grid.row(y)] == tiles
    assert all((t.height, t.width) == grid.tile for t in tiles)
    with pytest.raises(IndexError):
        grid[len(grid)]


def test_the_competition_image_needs_25_tiles_not_36():
    grid = TileGrid((350, 350), 128, 64)
    assert len(grid) == 25
    assert grid.rows == (0, 64, 128, 192, 222)


def test_slicing_a_dataset_pads_only_the_last_tile():
    grid = TileGrid((350, 350), 128, edge="pad")
    assert grid.rows == (0, 128, 256)


@given(size=sizes, tile=st.integers(1, 64), data=st.data())
def test_padded_origins_are_multiples_of_the_stride(size, tile, data):
    stride = data.draw(st.integers(1, tile))
    starts = origins(size, tile, stride, "pad")
    assert all(start == i * stride for i, start in enumerate(starts))
    assert starts[-1] + tile >= size
    assert len(starts) == 1 or starts[-2] + tile < size


@pytest.mark.parametrize(
    ("shape", "tile", "overlap"),
    [((0, 5), 4, 0), ((5, 5), 0, 0), ((5, 5), 4, 4), ((5, 5), 4, -1), ((5, 5), (4, 2), 3)],
)
def test_impossible_grids_are_refused(shape, tile, overlap):
    with pytest.raises(ConfigError):
        TileGrid(shape, tile, overlap)


def test_a_tile_knows_its_slices():
    tile = Tile(3, 5, 10, 20)
    assert tile.slices == (slice(3, 13), slice(5, 25))
    assert tile.clipped((8, 100)) == Tile(3, 5, 5, 20)


@pytest.mark.parametrize("edge", ["", "clip", "CLAMP", None])
def test_an_unknown_edge_is_refused(edge):
    with pytest.raises(ConfigError, match="choose clamp or pad"):
        TileGrid((40, 40), 16, 8, edge=edge)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    tile=st.integers(1, 48),
    shared=st.floats(0, 0.99),
    edge=st.sampled_from(["clamp", "pad"]),
)
def test_a_grid_lays_at_most_1024_tiles_on_a_pixel(shape, tile, shared, edge):
    overlap = int(tile * shared)
    rows, columns = (origins(size, tile, tile - overlap, edge) for size in shape)
    count = [np.zeros(size + 2 * tile, dtype=int) for size in shape]
    for axis, starts in enumerate((rows, columns)):
        for start in starts:
            count[axis][start : start + tile] += 1
    most = count[0].max() * count[1].max()
    if most <= 1024:
        assert len(TileGrid(shape, tile, overlap, edge)) == len(rows) * len(columns)
    else:
        with pytest.raises(ConfigError, match=f"lay {most:,} of them on a pixel"):
            TileGrid(shape, tile, overlap, edge)


@given(
    y=st.integers(0, 60),
    x=st.integers(0, 60),
    tile=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_clipped_tile_is_what_lies_inside(y, x, tile, shape):
    scene = np.arange(shape[0] * shape[1]).reshape(shape)
    clipped = Tile(y, x, *tile).clipped(shape)
    assert clipped.height >= 0
    assert clipped.width >= 0
    inside = scene[y : y + tile[0], x : x + tile[1]]
    np.testing.assert_array_equal(scene[clipped.slices], inside)
    assert (clipped.height, clipped.width) == inside.shape


def test_a_window_of_rasterio_is_columns_first():
    window = Tile(y=3, x=5, height=7, width=11).window
    assert (window.col_off, window.row_off, window.width, window.height) == (5, 3, 11, 7)
