from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from affine import Affine
from laws import Memory
from slicing_world import config as slicing
from world import coast, make_world, opened, read_tif, write_tif

from kelp.config import SliceConfig, TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.data_prep.stats import Source as StatsSource
from kelp.data_prep.stats import file_statistics
from kelp.errors import ConfigError, InputError, TableError
from kelp.nn.data import datamodule
from kelp.nn.data.datamodule import (
    EpochSampler,
    FoldData,
    read_fold,
    require_bands,
    sampling_weights,
    training_shape,
)
from kelp.nn.data.dataset import Draw, Sample, Source, TileDataset, collate
from kelp.raster import bands, validity
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import Scene, read_scene
from kelp.raster.window import Tile
from kelp.tiling.engine import Engine, Job
from kelp.tiling.strip import Slicing


@pytest.fixture(scope="module")
def sliced(world, tmp_path_factory):
    """The same tiles twice: as files, and as windows of the images."""
    root = tmp_path_factory.mktemp("sliced")
    return {
        materialize: slice_dataset(
            slicing(world, output_dir=root / str(materialize), materialize=materialize)
        ).table
        for materialize in (True, False)
    }


def config_of(table, **options):
    values = {
        "data_dir": table.parent,
        "metadata_fp": table,
        "output_dir": table.parent / "out",
        "sahi": True,
        "batch_size": 4,
        "num_workers": 0,
        "seed": 3,
    }
    return TrainConfig(**values | options)


def images_config(world, **options):
    return config_of(world.table, data_dir=world.data_dir, sahi=False, **options)


def same(a: Sample, b: Sample):
    return all(torch.equal(x.nan_to_num(-9), y.nan_to_num(-9)) for x, y in zip(a, b, strict=True))


def test_a_sample_is_the_file(world):
    source = read_fold(images_config(world)).train_sources[0]
    sample = TileDataset([source])[0]
    raw = read_scene(source.image)
    assert sample.raw.dtype == torch.float32
    np.testing.assert_array_equal(sample.raw.numpy(), raw)
    assert sample.target.dtype == torch.uint8
    unknown = ~validity.observed(raw, qa_as_nodata=False)
    np.testing.assert_array_equal(sample.target.numpy() == 255, unknown)
    assert unknown.any()
    np.testing.assert_array_equal(sample.observed.numpy(), validity.observed(raw))
    clouds = raw[bands.QA] == 1
    assert (sample.target.numpy()[clouds & ~unknown] != 255).all()  # the loss does look there


def test_virtual_tiles_are_the_materialised_ones(sliced):
    datasets = []
    for seed, table in enumerate(sliced.values()):
        shuffled = table.with_name("shuffled.parquet")
        pd.read_parquet(table).sample(frac=1, random_state=seed).to_parquet(shuffled)
        fold = read_fold(config_of(shuffled))
        keys = list(zip(fold.train["tile_id"], fold.train["x"], fold.train["y"], strict=True))
        datasets.append(dict(zip(keys, TileDataset(fold.train_sources), strict=True)))
    files, windows = datasets
    assert files.keys() == windows.keys()
    edges = 0
    for key, sample in files.items():
        assert sample.raw.shape == (7, 32, 32)
        assert same(sample, windows[key]), key
        edges += bool((sample.target[:, -1] == 255).all())
    assert edges  # 50 x 70 is no multiple of 32


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_so_they_are_with_a_nodata_tag_of_zero(tmp_path, dtype):
    """Padding of 0 would be good pixels at sea level."""
    root = tmp_path / "raw"
    world = make_world(tmp_path, n_train=2, n_test=0, shape=(20, 45))
    for path in sorted((world.train_dir / "images").iterdir()):
        image = read_tif(path).clip(0, 65535 if dtype == "uint16" else 32767).astype(dtype)
        write_tif(path, image, nodata=0)
        assert (image[:5] == 0).any()
    kinds = []
    for materialize in (True, False):
        table = slice_dataset(
            SliceConfig(
                data_dir=root / "train",
                metadata_fp=world.table,
                image_size=32,
                workers=1,
                output_dir=tmp_path / str(materialize),
                materialize=materialize,
            )
        ).table
        kinds.append((fold := read_fold(config_of(table)), TileDataset(fold.train_sources)))
    for file, window in zip(kinds[0][1], kinds[1][1], strict=True):
        assert same(file, window)
        assert (file.raw[bands.QA, 20:] == 1).all()
        assert torch.isnan(file.raw[bands.DEM, 20:]).all()
    numbers = [
        file_statistics(
            [StatsSource(s.image, s.tile) for s in fold.train_sources],
            ("DEM", "NIR"),
            IndexSettings("dn", True, True),
        )
        for fold, _ in kinds
    ]
    for name in ("DEM", "NIR"):
        assert numbers[0][name].count == numbers[1][name].count
        assert numbers[0][name].mean == pytest.approx(numbers[1][name].mean)


def test_a_tile_lies_where_its_row_says(world, sliced):
    fold = read_fold(config_of(sliced[True]))
    top_edge = fold.train[(fold.train["x"] > 0) & (fold.train["y"] == 0)]
    row = top_edge.index[0]
    name = f"{fold.train.loc[row, 'tile_id']}_satellite.tif"
    whole = read_scene(world.train_dir / "images" / name)
    x = fold.train.loc[row, "x"]
    np.testing.assert_array_equal(
        TileDataset(fold.train_sources)[row].raw.numpy()[:, :, : 70 - x],
        whole[:, :32, x : x + 32],
    )


def test_a_batch_of_different_sizes_is_padded_with_nothing_known(tmp_path):
    rng = np.random.default_rng(0)
    sources = []
    for i, shape in enumerate([(20, 31), (28, 17)]):
        image, mask = coast(shape, rng)
        sources.append(
            Source(
                write_tif(tmp_path / f"{i}_satellite.tif", image),
                write_tif(tmp_path / f"{i}_kelp.tif", mask[np.newaxis]),
            )
        )
    data = TileDataset(sources)
    batch = collate([data[0], data[1]])
    assert batch.raw.shape == (2, 7, 28, 31)
    for i, (height, width) in enumerate([(20, 31), (28, 17)]):
        inside = torch.zeros((28, 31), dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.isnan(batch.raw[i][:5, ~inside]).all()
        assert (batch.raw[i][bands.QA, ~inside] == 1).all()
        assert (batch.target[i][~inside] == 255).all()
        assert not batch.observed[i][~inside].any()
        assert torch.equal(batch.target[i][inside], data[i].target.flatten())


def test_whole_images_are_reflected_up_to_the_training_shape(tmp_path):
    """As prediction does with a scene smaller than its tile; batch mates make no difference."""
    rng = np.random.default_rng(0)
    world = make_world(tmp_path, n_train=4, n_test=0, shape=(36, 40))
    shapes = {1: (20, 37), 2: (36, 40), 3: (30, 17)}
    for i, shape in shapes.items():
        image, mask = coast(shape, rng)
        write_tif(world.train_dir / "images" / f"TR{i:06d}_satellite.tif", image)
        write_tif(world.train_dir / "masks" / f"TR{i:06d}_kelp.tif", mask[np.newaxis])
    fold = read_fold(images_config(world, cv_split=0))  # trains on 1 and 3
    assert training_shape(fold, images_config(world)) == (30, 37)
    config = images_config(world, batch_size=1)
    data = FoldData(fold, config, first_epoch=0, pin=False)
    seen = set()
    for index, batch in zip(data.sampler, data.train_dataloader(), strict=True):
        assert batch.raw.shape == (1, 7, 30, 37)
        scene = _Array(read_scene(fold.train_sources[index.row].image))
        height, width = scene.shape
        seen.add(scene.shape)
        engine = Engine(scene.predict, Slicing(tile=(30, 37), overlap=(0, 0), batch_size=1))
        engine.run([Job(scene, scene)])
        np.testing.assert_array_equal(batch.raw.numpy(), scene.predicted)
        outside = torch.ones((30, 37), dtype=torch.bool)
        outside[:height, :width] = False
        assert (batch.target[0][outside] == 255).all()
        assert not batch.observed[0][outside].any()
        assert torch.isfinite(batch.raw[0][1][outside]).any()
    assert seen == {shapes[1], shapes[3]}


class _Array(Memory):
    """A scene in memory, and a network that remembers what it was given."""

    def predict(self, batch):
        self.predicted = batch.copy()
        return batch[:, 5]


def test_errors_name_the_file(tmp_path):
    image, mask = coast((20, 31), np.random.default_rng(0))
    path = write_tif(tmp_path / "a_satellite.tif", image)
    other = write_tif(tmp_path / "a_kelp.tif", mask[np.newaxis, :, :-1])
    with pytest.raises(InputError, match=r"a_kelp\.tif: has 20 x 30 pixels"):
        TileDataset([Source(path, other)])[0]
    with pytest.raises(InputError, match=r"a_satellite\.tif.*none in the tile at x=40, y=0"):
        TileDataset([Source(path, other, Tile(0, 40, 32, 32))])[0]


# --- the fold


def test_the_fold_is_that_of_the_table(sliced):
    table = pd.read_parquet(sliced[True])
    for k in (0, 1):
        fold = read_fold(config_of(sliced[True], cv_split=k, random_crops=False))
        assert set(fold.val["tile_id"]) == set(table[table[f"split_{k}"] == "val"]["tile_id"])
        assert not set(fold.val["tile_id"]) & set(fold.train["tile_id"])
        for rows, sources in ((fold.train, fold.train_sources), (fold.val, fold.val_sources)):
            for row, source in zip(rows.itertuples(), sources, strict=True):
                assert source.image.name == f"{row.tile_id}_satellite_{row.x}_{row.y}.tif"
                assert source.mask.name == f"{row.tile_id}_kelp_{row.x}_{row.y}.tif"


def test_training_shape(world, sliced):
    for table in sliced.values():
        config = config_of(table)
        assert training_shape(read_fold(config), config) == (32, 32)
    config = images_config(world)
    assert training_shape(read_fold(config), config) == (50, 70)


def test_sahi_and_the_table_must_agree(world, sliced):
    with pytest.raises(ConfigError, match=r"sahi=True: .* is no table of tiles"):
        read_fold(images_config(world).model_copy(update={"sahi": True}))
    with pytest.raises(ConfigError, match="is a table of tiles: add sahi=True"):
        read_fold(config_of(sliced[True], sahi=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="mask_path"), "lacks the column mask_path"),
        (lambda t: t.drop(columns=["split_0", "split_1"]), "has no folds"),
        (lambda t: t.drop(columns="split_0"), "has no fold 0"),
        (lambda t: t.assign(split_0="train"), "fold 0 has no val rows"),
        (lambda t: t.assign(split_0="val"), "fold 0 has no train rows"),
        (lambda t: t.assign(image_path="images/gone.tif"), r"gone\.tif: no such file"),
        (lambda t: t.assign(mask_path=None), "has no mask_path"),
        (
            lambda t: t.assign(image_path=None).drop(columns="source_image_path"),
            "without image_path",
        ),
    ],
)
def test_table_errors(sliced, tmp_path, change, message):
    path = tmp_path / "table.parquet"
    change(pd.read_parquet(sliced[True])).to_parquet(path)
    with pytest.raises(TableError, match=message):
        read_fold(config_of(path, data_dir=sliced[True].parent))


def describe(path, names):
    image = read_tif(path)[: len(names)]
    write_tif(path, image)
    with opened(path, "r+") as dataset:
        dataset.descriptions = names


@pytest.mark.parametrize(
    ("options", "names", "said"),
    [
        ({}, ("NIR", "R", "G", "B"), "lacks the band SWIR, QA;"),
        ({"bands": ("NIR", "R")}, ("NIR", "R", "G"), None),
        ({"bands": ("NIR", "R"), "spectral_indices": ("GVMI",)}, ("NIR", "R", "G", "QA"), "SWIR;"),
        (
            {"bands": ("NIR",), "spectral_indices": ("NDVI",)},
            ("NIR", "R", "G"),
            "lacks the band QA;",
        ),
        (
            {"bands": ("NIR",), "spectral_indices": ("NDVI",), "mask_using_qa": False},
            ("NIR", "R", "G"),
            None,
        ),
        ({"bands": ("R", "G", "B")}, ("SWIR", "R", "G", "B"), "lacks the band NIR "),
        ({"bands": ("NIR", "R")}, ("NIR", "R", "DEM"), "lacks the band SWIR, G, B "),
    ],
)
@pytest.mark.parametrize("sahi", [True, False])
def test_images_must_hold_the_bands_of_the_run(tmp_path, options, names, said, sahi, caplog):
    world = make_world(tmp_path, n_train=4, n_test=0, shape=(20, 35))
    config = images_config(world, **options)
    if sahi:
        table = slice_dataset(slicing(world, output_dir=tmp_path / "sahi", materialize=False)).table
        config = config_of(table, **options)
    require_bands(read_fold(config), config)
    describe(world.train_dir / "images" / "TR000002_satellite.tif", names)  # fold 0 validates on it
    fold = read_fold(config)
    assert fold.val["tile_id"].iloc[-1] == "TR000002"
    if said is None:
        require_bands(fold, config)
    else:
        with pytest.raises(InputError, match=rf"TR000002_satellite\.tif: .*{said}"):
            require_bands(fold, config)
    assert not caplog.messages or "spectral_indices" in options


def test_a_missing_dem_is_one_notice(tmp_path, caplog):
    world = make_world(tmp_path, n_train=4, n_test=0, shape=(20, 35))
    for path in sorted((world.train_dir / "images").iterdir()):
        describe(path, bands.BANDS[:6])
    config = images_config(world)
    require_bands(read_fold(config), config)
    assert len(caplog.messages) == 1
    assert "no DEM band" in caplog.text
    with Scene(path) as scene:
        scene.require(bands.BANDS)
        scene.require(("NIR", "DEM"))
    assert len(caplog.messages) == 2


# --- the sampler

FACTS = pd.DataFrame(
    {
        "has_kelp": [True, False, True],
        "kelp_pixels_pct": [0.1, 0.0, 0.5],
        "qa_ok": [False, True, True],
        "qa_corrupted_pixels_pct": [0.4, 0.0, 0.0],
        "water_pixels_pct": [0.9, 1.0, 0.2],
        "dem_nan_pixels_pct": [0.0, 0.6, 0.0],
        "dem_zero_pixels_pct": [0.9, 0.4, 0.2],
    }
)
SEED_FACTORS = {
    "has_kelp_importance_factor": 3,
    "kelp_pixels_pct_importance_factor": 0.2,
    "qa_ok_importance_factor": 0,
    "qa_corrupted_pixels_pct_importance_factor": -1,
    "almost_all_water_importance_factor": 0.5,
    "dem_nan_pixels_pct_importance_factor": 0.25,
    "dem_zero_pixels_pct_importance_factor": -1,
}


def test_weights_by_hand(sliced):
    config = config_of(sliced[True], **SEED_FACTORS)
    # 3·kelp + 0.2·(1-kelp share) - (1-QA share) + 0.5·(1-water) + 0.25·(1-no DEM) - (1-DEM zero)
    sums = [
        3 + 0.2 * 0.9 - 0.6 + 0.5 * 0.1 + 0.25 * 1.0 - 0.1,  # 2.78
        0 + 0.2 * 1.0 - 1.0 + 0.5 * 0.0 + 0.25 * 0.4 - 0.6,  # -1.3
        3 + 0.2 * 0.5 - 1.0 + 0.5 * 0.8 + 0.25 * 1.0 - 0.8,  # 1.95
    ]
    expected = [1.0, 0.01, 0.01 + 0.99 * (sums[2] + 1.3) / (2.78 + 1.3)]
    assert sampling_weights(FACTS, config, sliced[True]) == pytest.approx(expected)


def test_each_factor_has_its_own_fact(sliced):
    for factor, column, is_share_of_bad in (
        ("has_kelp", "has_kelp", False),
        ("kelp_pixels_pct", "kelp_pixels_pct", True),
        ("qa_ok", "qa_ok", False),
        ("qa_corrupted_pixels_pct", "qa_corrupted_pixels_pct", True),
        ("almost_all_water", "water_pixels_pct", True),
        ("dem_nan_pixels_pct", "dem_nan_pixels_pct", True),
        ("dem_zero_pixels_pct", "dem_zero_pixels_pct", True),
    ):
        zero = dict.fromkeys(SEED_FACTORS, 0) | {f"{factor}_importance_factor": 1}
        weights = sampling_weights(FACTS, config_of(sliced[True], **zero), sliced[True])
        values = FACTS[column].to_numpy(float)
        order = np.argsort(-values if is_share_of_bad else values, kind="stable")
        assert (np.diff(weights[order]) >= 0).all()
        assert (weights.min(), weights.max()) == pytest.approx((0.01, 1.0))


def test_equal_weights_are_all_one(sliced):
    zero = dict.fromkeys(SEED_FACTORS, 0)
    weights = sampling_weights(FACTS, config_of(sliced[True], **zero), sliced[True])
    assert weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("facts", [FACTS.drop(columns="qa_ok"), FACTS.assign(qa_ok=None)])
def test_a_missing_fact_is_an_error(sliced, facts):
    with pytest.raises(TableError, match="the weighted sampler needs qa_ok"):
        sampling_weights(facts, config_of(sliced[True]), sliced[True])


def test_weighted_epochs_are_drawn_with_replacement_by_weight():
    sampler = EpochSampler(3, 0, np.array([0.01, 0.19, 0.8]), 20_000)
    assert len(sampler) == len(list(sampler)) == 20_000
    shares = np.bincount([draw.row for draw in sampler], minlength=3) / 20_000
    assert shares == pytest.approx([0.01, 0.19, 0.8], abs=0.015)


def test_without_weights_each_row_comes_once():
    sampler = EpochSampler(11, 0)
    first = list(sampler)
    assert sorted(draw.row for draw in first) == list(range(11))
    assert first == list(sampler)  # an epoch can be had again
    sampler.set_epoch(1)
    assert sorted(draw.row for draw in sampler) == list(range(11))
    assert list(sampler) != first
    assert list(EpochSampler(11, 0, first_epoch=1)) == list(sampler)
    assert list(EpochSampler(11, 1)) != first


@pytest.mark.parametrize("kind", [True, False])
def test_random_crops_lie_anywhere_near_their_row_and_inside_the_image(world, sliced, kind):
    config = config_of(sliced[kind], random_crops=True, seed=3)
    fold = read_fold(config)
    data = FoldData(fold, config, first_epoch=0, pin=False)
    dataset = TileDataset(fold.train_sources)
    offsets = set()
    for draw in data.sampler:
        sample, tile = dataset[draw], fold.train_sources[draw.row].tile
        whole = read_scene(fold.train_sources[draw.row].image)
        height, width = whole.shape[1:]
        assert sample.target.shape == (tile.height, tile.width) == (32, 32)
        y = min(max(tile.y + round(draw.down * 16), 0), height - 32)
        x = min(max(tile.x + round(draw.right * 16), 0), width - 32)
        np.testing.assert_array_equal(sample.raw.numpy(), whole[:, y : y + 32, x : x + 32])
        offsets.add((y, x))
    assert len(offsets) > len(fold.train) / 2
    assert all(source.tile is None for source in fold.val_sources) == kind  # these stay
    assert not any(draw.down or draw.right for draw in EpochSampler(5, 0))


def test_random_crops_without_the_images_are_the_tiles_as_they_are(tmp_path, caplog):
    world = make_world(tmp_path, n_train=2, shape=(50, 70))
    table = slice_dataset(slicing(world, output_dir=tmp_path / "cut")).table
    kept = [TileDataset(read_fold(config_of(table)).train_sources)[0]]
    shutil.rmtree(world.train_dir)
    with caplog.at_level("INFO", "kelp"):
        fold = read_fold(config := config_of(table, random_crops=True))
    assert "not at hand; no random crops" in caplog.text
    draws = list(FoldData(fold, config, first_epoch=0, pin=False).sampler)
    assert same(TileDataset(fold.train_sources)[Draw(0, *draws[0][1:])], kept[0])


# --- the loaders


@pytest.mark.parametrize("weighted", [True, False])
def test_samples_do_not_depend_on_workers(sliced, weighted):
    epochs = []
    for workers in (0, 2):
        config = config_of(
            sliced[True], num_workers=workers, use_weighted_sampler=weighted, samples_per_epoch=9
        )
        data = FoldData(read_fold(config), config, first_epoch=2, pin=False)
        epochs.append([*data.train_dataloader(), *data.val_dataloader()])
    for a, b in zip(*epochs, strict=True):
        assert same(a, b)
    drawn = 9 if weighted else len(data.fold.train)
    assert sum(len(batch.raw) for batch in epochs[0]) == drawn + len(data.fold.val)


def test_batches_that_shared_memory_cannot_hold_are_read_by_the_main_process(
    sliced, monkeypatch, caplog
):
    """As in containers, where 64 MB are usual."""
    config = config_of(sliced[True], num_workers=2)
    batch = config.batch_size * 32 * 32 * 30  # 7 bands of float32, a mask, what is observed
    for free, workers in ((5 * batch, 2), (5 * batch - 1, 0)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        data = FoldData(read_fold(config), config, first_epoch=0, pin=False)
        assert data.train_dataloader().num_workers == workers
    assert len(caplog.messages) == 1
    assert "--num_workers 0" in caplog.messages[0]


def test_loading_leaves_the_networks_random_numbers_alone(sliced):
    config = config_of(sliced[True])
    data = FoldData(read_fold(config), config, first_epoch=0, pin=False)
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


def test_validation_keeps_the_order_of_the_table(sliced):
    config = config_of(sliced[True], batch_size=3)
    data = FoldData(read_fold(config), config, first_epoch=0, pin=False)
    samples = [sample for batch in data.val_dataloader() for sample in batch.target]
    for sample, source in zip(samples, data.fold.val_sources, strict=True):
        assert torch.equal(sample, TileDataset([source])[0].target)


@pytest.mark.parametrize(("architecture", "batches"), [("unet", 3), ("pan", 2)])
def test_a_last_batch_of_one_is_left_out_only_where_it_would_crash(sliced, architecture, batches):
    config = config_of(
        sliced[True], use_weighted_sampler=True, samples_per_epoch=9, architecture=architecture
    )
    data = FoldData(read_fold(config), config, first_epoch=0, pin=False)
    assert len(list(data.train_dataloader())) == batches


def test_masks_are_checked_before_a_training(tmp_path):
    world = make_world(tmp_path, n_train=4, shape=(50, 70))
    config = images_config(world)
    require_bands(read_fold(config), config)
    source = read_fold(config).train_sources[0]
    elsewhere = {"crs": "EPSG:32621", "transform": Affine(30, 0, 60, 0, -30, 0)}
    write_tif(source.mask, read_tif(source.mask), **elsewhere)
    here = elsewhere | {"transform": Affine(30, 0, 0, 0, -30, 0)}
    write_tif(source.image, read_tif(source.image), **here)
    named = images_config(world, band_order=bands.BANDS)
    with pytest.raises(InputError, match=r"_kelp\.tif does not .* shifted by \+2 columns"):
        require_bands(read_fold(named), named)
    named = images_config(world, band_order=bands.BANDS, ignore_georeference=True)
    require_bands(read_fold(named), named)

    def targets(config):
        data = FoldData(read_fold(config), config, 0, pin=False)
        return [sample.target for sample in data.samples(data.fold.train_sources)]

    wanted = targets(named)
    for path in (world.train_dir / "masks").iterdir():
        write_tif(path, np.where(read_tif(path) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"holds 0 and 255 only .*kelp_value=255"):
        require_bands(read_fold(named), named)
    named = named.model_copy(update={"kelp_value": 255})
    require_bands(read_fold(named), named)
    assert all(torch.equal(a, b) for a, b in zip(targets(named), wanted, strict=True))


def test_batches_that_do_not_fit_into_shared_memory_are_read_in_the_main_process(
    tmp_path, monkeypatch, caplog
):
    """As in a container with little of it, where workers die."""
    config = TrainConfig(data_dir="d", metadata_fp="m", output_dir="o", num_workers=2, batch_size=8)
    monkeypatch.setattr(datamodule, "cores", lambda: 4)
    monkeypatch.setattr(datamodule, "_SHARED_MEMORY", tmp_path)
    free = 2 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    caplog.set_level(logging.WARNING, logger="kelp")
    assert datamodule._workers(config, (320, 320)) == 0
    assert len(caplog.messages) == 1
    assert "--shm-size" in caplog.text
    assert "--num_workers 0" in caplog.text
    free = 1 << 40
    assert datamodule._workers(config, (320, 320)) == 2
    assert len(caplog.messages) == 1
    monkeypatch.setattr(datamodule, "cores", lambda: 1)  # torch would warn of more, in five lines
    assert datamodule._workers(config, (320, 320)) == 1
