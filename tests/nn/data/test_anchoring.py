"""Training sees anchored tiles exactly as prediction sees the anchored scene."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import tiny_spec
from slicing_world import config as slicing
from world import make_world, read_tif, write_tif

from kelp.config import TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import ConfigError
from kelp.nn.data.anchoring import anchored
from kelp.nn.data.datamodule import read_fold
from kelp.nn.data.dataset import TileDataset
from kelp.nn.data.reading import Files
from kelp.nn.preprocess import Preprocess
from kelp.progress import silent
from kelp.raster.bands import BANDS, OPTICAL
from kelp.raster.scene import Scene
from kelp.raster.streaming import unit_stats
from kelp.raster.water import WATER_LEVELS, Anchored, WaterReference
from kelp.raster.window import Tile
from kelp.tables import WATER


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images large enough for two cells across, whose water changes from left to right."""
    made = make_world(tmp_path_factory.mktemp("world"), n_train=2, n_test=0, shape=(60, 620))
    for path in (made.train_dir / "images").glob("*.tif"):
        pixels = read_tif(path)
        ramp = np.linspace(0, 800, pixels.shape[2]).astype(pixels.dtype)
        optical = pixels[:5]
        optical[(optical > 0) & (optical < 30_000)] += np.broadcast_to(ramp, optical.shape)[
            (optical > 0) & (optical < 30_000)
        ]
        write_tif(path, pixels)
    return made


@pytest.fixture
def tables(world, tmp_path):
    """Tiles as files, and as windows of the images."""
    return {
        materialize: slice_dataset(
            slicing(world, output_dir=tmp_path / str(materialize), materialize=materialize)
        ).table
        for materialize in (True, False)
    }


def samples(table, anchoring="local", **options):
    config = TrainConfig(
        data_dir=table.parent,
        metadata_fp=table,
        output_dir=table.parent / "out",
        sahi=True,
        num_workers=0,
        anchoring=anchoring,
        **options,
    )
    fold = read_fold(config)
    sources = fold.train_sources
    data = TileDataset(sources, reader=anchored(Files(), sources, config, silent))
    return {
        (row["tile_id"], row["y"], row["x"]): data[k].raw.numpy()
        for k, row in enumerate(fold.train.to_dict("records"))
    }


def as_predicted(world, key):
    """The tile as `kelp predict` reads it from the whole scene."""
    tile_id, y, x = key
    with Scene(world.train_dir / "images" / f"{tile_id}_satellite.tif") as scene:
        source = Anchored(scene, WaterReference.estimate(scene))
        return source.read(Tile(y, x, 32, 32).clipped(scene.shape))


@pytest.mark.parametrize("materialize", [True, False])
def test_tiles_are_windows_of_the_anchored_scene(world, tables, materialize):
    for key, raw in samples(tables[materialize], random_crops=False).items():
        expected = as_predicted(world, key)
        inside = raw[:, : expected.shape[1], : expected.shape[2]]
        assert inside.tobytes() == expected.tobytes(), key
    # Planted: the raw numbers are others.
    key, raw = next(iter(samples(tables[materialize], "none", random_crops=False).items()))
    assert not np.array_equal(raw[:5], as_predicted(world, key)[:5], equal_nan=True)


def test_tiles_without_their_images_use_what_the_table_knows(world, tables):
    table = tables[True]
    rows = pd.read_parquet(table)
    assert rows[list(WATER)].notna().all().all()
    gone = rows.assign(source_image_path="gone/" + rows["source_image_path"])
    gone.to_parquet(table)
    for key, raw in samples(table, random_crops=False).items():
        expected = as_predicted(world, key)
        inside = raw[:, : expected.shape[1], : expected.shape[2]]
        # One number for the tile instead of a field: half a tile's slope at most.
        assert np.nanmax(np.abs(inside - expected)) <= 800 / 620 * 16 + 1
    gone.drop(columns=list(WATER)).to_parquet(table)
    with pytest.raises(ConfigError, match=r"slice again, or give (--)?anchoring none"):
        samples(table, random_crops=False)
    assert samples(table, "none", random_crops=False)


def test_the_spec_finds_the_reference_it_was_trained_with(world):
    path = next((world.train_dir / "images").glob("*.tif"))
    with Scene(path) as scene:
        for anchoring in ("local", "constant", "none"):
            spec = spec_of(
                anchoring=anchoring, water_levels=(7000.0, 7100.0, 7200.0, 7300.0, 7400.0)
            )
            found = spec.reference(scene)
            expected = WaterReference.estimate(scene, anchoring, spec.water_levels)
            np.testing.assert_array_equal(found.levels, expected.levels)
            assert found.target == expected.target == spec.water_levels


def spec_of(**changes):
    statistics = dict.fromkeys(BANDS, unit_stats(1, 0))
    return tiny_spec(statistics=statistics, image_size=32, **changes)


def test_water_normalisation_by_hand():
    spec = spec_of(normalization_strategy="water", anchoring="local")
    raw = torch.zeros(1, 7, 2, 2)
    raw[0, : len(OPTICAL)] = torch.tensor(WATER_LEVELS)[:, None, None]
    raw[0, 1, 0, 0] += 1000  # kelp in NIR
    raw[0, 0, 1, 1] = torch.nan
    raw[0, 4, 0, 1] = 65_535
    raw[0, 6] = 0.5
    out = Preprocess(spec)(raw)
    expected = torch.zeros(1, 7, 2, 2)
    expected[0, 1, 0, 0] = 1000 / 1500
    expected[0, 4, 0, 1] = 10  # the largest number that a network is shown
    expected[0, 6] = 0.5  # DEM: by the statistics
    torch.testing.assert_close(out, expected)


def test_a_moved_folder_of_tiles_still_trains(world, tables, tmp_path):
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(tables[True].parent, moved)
    here = samples(moved / tables[True].name, random_crops=False)
    there = samples(tables[True], random_crops=False)
    for key, raw in here.items():
        assert np.nanmax(np.abs(raw - there[key])) <= 800 / 620 * 16 + 1
