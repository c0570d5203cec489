"""The table of tiles tells the truth about each tile, and where its pixels are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from slicing_world import config, one_image
from world import make_world

from kelp import tables
from kelp.config import SliceConfig
from kelp.data_prep.facts import facts, tile_facts
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import InputError
from kelp.raster.masks import read_mask
from kelp.raster.scene import read_scene
from kelp.raster.validity import observed
from kelp.raster.window import Tile
from kelp.tiling.grid import TileGrid

SLOW = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plain_facts(pixels, mask):
    """The contract's definitions, once more, pixel by pixel."""
    size = mask.size
    counts = dict.fromkeys(("kelp", "bad", "unknown", "zero", "water", "seen"), 0)
    for y, x in np.ndindex(mask.shape):
        *optical, qa, dem = (float(v) for v in pixels[:, y, x])
        present = [np.isfinite(v) for v in optical]
        counts["kelp"] += mask[y, x] == 1
        counts["bad"] += qa == 1
        counts["unknown"] += np.isnan(dem) or dem < 0
        counts["zero"] += dem == 0
        counts["water"] += np.isnan(dem) or dem <= 0
        counts["seen"] += qa != 1 and present[1] and sum(present) >= 3
    share = {name: count / size for name, count in counts.items()}
    return {
        "kelp_pixels": counts["kelp"],
        "kelp_pixels_pct": share["kelp"],
        "has_kelp": counts["kelp"] > 0,
        "qa_corrupted_pixels_pct": share["bad"],
        "qa_ok": counts["bad"] == 0,
        "dem_nan_pixels_pct": share["unknown"],
        "dem_zero_pixels_pct": share["zero"],
        "water_pixels_pct": share["water"],
        "almost_all_water": share["water"] > 0.98,
        "valid_pixels_pct": share["seen"],
        "high_kelp_pixels_pct": share["kelp"] > 0.4,
    }


@SLOW
@given(
    pixels=arrays(
        np.float32, (7, 13, 9), elements=st.sampled_from([0.0, 1.0, -3.0, 9000.0, np.nan])
    ),
    mask=arrays(np.uint8, (13, 9), elements=st.sampled_from([0, 1, 255])),
)
def test_facts_of_tiles_are_those_of_the_contract(pixels, mask):
    pixels[5] = pixels[5] == 1
    tiles = [tile.clipped((13, 9)) for tile in TileGrid((13, 9), 5, 2, edge="pad")]
    columns = tile_facts(pixels, mask, tiles)
    assert tuple(columns) == tables.FACTS
    for number, tile in enumerate(tiles):
        alone = pixels[:, *tile.slices], mask[tile.slices]
        found = {name: column[number] for name, column in columns.items()}
        assert found == plain_facts(*alone) == facts(*alone)


def test_facts_by_hand():
    pixels = np.full((7, 10, 10), 9000, np.float32)
    pixels[5], pixels[6] = 0, 0
    pixels[5, 0] = 1  # a tenth
    pixels[6, :2] = 5  # land: a fifth
    pixels[6, 2, :5] = np.nan
    pixels[1, 9, 9] = np.nan  # NIR
    mask = np.zeros((10, 10), np.uint8)
    mask[:5, :] = 1
    mask[9] = 255
    found = {k: v[0] for k, v in tile_facts(pixels, mask, [Tile(0, 0, 10, 10)]).items()}
    assert found == {
        "kelp_pixels": 50,
        "kelp_pixels_pct": 0.5,
        "has_kelp": True,
        "qa_corrupted_pixels_pct": 0.1,
        "qa_ok": False,
        "dem_nan_pixels_pct": 0.05,
        "dem_zero_pixels_pct": 0.75,
        "water_pixels_pct": 0.8,
        "almost_all_water": False,
        "valid_pixels_pct": 0.89,
        "high_kelp_pixels_pct": True,
    }


def test_the_table_holds_the_tiles_own_facts_and_the_images_columns(tmp_path):
    world = make_world(tmp_path, n_train=3)
    parents = pd.read_parquet(world.table).assign(note="kept", x=-1)
    parents.loc[parents["tile_id"] == world.train[1], "split_0"] = "left_out"
    parents.sample(frac=1, random_state=3).to_parquet(world.table)
    result = slice_dataset(config(world, stride=20))
    table = pd.read_parquet(result.table)
    assert result.tiles == len(table)
    assert (result.images, result.left_out) == (3, 0)
    assert result.table.name == tables.TILES_TABLE
    assert set(table["tile_id"]) == set(world.train)
    assert list(table.columns[:3]) == list(tables.TILE_KEY)
    assert not table.duplicated(list(tables.TILE_KEY)).any()
    assert table.equals(table.sort_values(["tile_id", "y", "x"], ignore_index=True))
    assert set(table["note"]) == {"kept"}
    assert set(table.loc[table["tile_id"] == world.train[1], "split_0"]) == {"left_out"}
    for row in table.itertuples():
        pixels = read_scene(result.table.parent / row.image_path)
        mask = read_mask(result.table.parent / row.mask_path)
        assert pixels.shape[1:] == mask.shape == (row.tile_height, row.tile_width) == (32, 32)
        real = mask[: 90 - row.y, : 70 - row.x]
        assert row.kelp_pixels == (real == 1).sum()
        assert row.has_kelp == bool(row.kelp_pixels)
        assert row.valid_pixels_pct == observed(pixels).sum() / real.size
        source = read_scene(result.table.parent / row.source_image_path)
        part = pixels[:, : real.shape[0], : real.shape[1]]
        np.testing.assert_array_equal(
            part, source[:, row.y : row.y + real.shape[0], row.x : row.x + real.shape[1]]
        )
        assert (result.table.parent / row.source_mask_path).is_file()


def test_a_virtual_table_differs_from_a_real_one_only_in_its_files(tmp_path):
    world = make_world(tmp_path)
    real = pd.read_parquet(slice_dataset(config(world)).table)
    virtual = slice_dataset(config(world, output_dir=tmp_path / "virtual", materialize=False))
    table = pd.read_parquet(virtual.table)
    assert table[["image_path", "mask_path"]].isna().all().all()
    same = [name for name in real if name not in ("image_path", "mask_path")]
    pd.testing.assert_frame_equal(table[same], real[same])
    assert {path.name for path in (tmp_path / "virtual").iterdir()} == {
        tables.TILES_TABLE,
        "kelp-slice.yaml",
    }


def test_source_paths_hold_after_both_folders_moved_and_through_a_link(tmp_path):
    world = make_world(tmp_path / "a", n_train=1)
    deep = tmp_path / "a" / "deep" / "sliced"
    deep.mkdir(parents=True)
    link = tmp_path / "a" / "link"
    link.symlink_to(deep, target_is_directory=True)
    slice_dataset(config(world, output_dir=link, materialize=False))
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b" / "deep" / "sliced"
    table = pd.read_parquet(moved / tables.TILES_TABLE)
    for name in ("source_image_path", "source_mask_path"):
        assert (moved / table[name][0]).is_file()


def test_tiles_with_little_to_see_are_left_out(tmp_path):
    image = np.full((7, 16, 33), 9000, np.int32)
    image[5:] = 0
    image[:5, :, 8:16] = -32768
    image[:5, :, 20:] = -32768
    options = one_image(tmp_path, image)
    result = slice_dataset(SliceConfig(**options, image_size=16, min_valid_fraction=0.5))
    table = pd.read_parquet(result.table)
    assert list(table["x"]) == [0]
    assert result.left_out == 2
    assert [p.name for p in (tmp_path / "out" / "images").iterdir()] == ["A_satellite_0_0.tif"]
    with pytest.raises(InputError, match=r"min_valid_fraction=0\.9: no tile"):
        slice_dataset(SliceConfig(**options, image_size=16, min_valid_fraction=0.9))
