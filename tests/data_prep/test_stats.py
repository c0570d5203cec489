from __future__ import annotations

import json
import logging
import weakref
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rasterio
from satellites import make_landsat, tar_of

from kelp.config import StatsConfig
from kelp.data_prep.stats import (
    About,
    Source,
    StatsFile,
    channel_statistics,
    compute_stats,
    file_statistics,
)
from kelp.errors import ConfigError, InputError, StatsError, TableError
from kelp.raster.bands import BANDS
from kelp.raster.indices import INDICES, IndexSettings, channel_names, index_planes
from kelp.raster.streaming import TOLERANCE
from kelp.raster.window import Tile
from kelp.sensors import open_scene

CHANNELS = channel_names(BANDS, INDICES)
SETTINGS = IndexSettings("dn", True, True)
SHAPE = (7, 11)


def scene(seed, shape=SHAPE):
    """A canonical array of plausible integers with gaps, clouds and land."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(7000, 17_000, (7, *shape)).astype(np.float32)
    pixels[:5][rng.random((5, *shape)) < 0.1] = np.nan
    pixels[5] = rng.random(shape) < 0.2
    pixels[6] = rng.choice([0, 0, 0, 12, np.nan], shape)
    return pixels


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.where(np.isfinite(pixels), pixels, -32768).astype(np.int32)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=7,
        height=raw.shape[1],
        width=raw.shape[2],
        dtype="int32",
        transform=rasterio.Affine(30, 0, 0, 0, -30, 0),
    ) as out:
        out.write(raw)


def write_images(folder, ids):
    scenes = {tile_id: scene(i) for i, tile_id in enumerate(ids)}
    for tile_id, pixels in scenes.items():
        write(folder / "images" / f"{tile_id}_satellite.tif", pixels)
    return list(scenes.values())


def expected_channel(name, scenes, settings):
    """All values of a channel, by a road that shares nothing with the streaming."""
    values = []
    for pixels in scenes:
        bands = dict(zip(BANDS, pixels, strict=True))
        if name in bands:
            values.append(bands[name])
            continue
        values += index_planes([name], bands, settings)
    return np.concatenate([plane.ravel() for plane in values]).astype(np.float64)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, IndexSettings("dn", False, False), IndexSettings("reflectance", True, False)],
    ids=["default", "dn", "qa-only"],
)
def test_every_channel_equals_numpy_on_all_pixels(settings):
    scenes = [scene(seed, shape) for seed, shape in enumerate([(7, 11), (1, 1), (20, 3)] * 7)]
    stats = channel_statistics(iter(scenes), CHANNELS, settings)
    assert tuple(stats) == CHANNELS
    for name in set(CHANNELS) - {"QA"}:
        values, got = expected_channel(name, scenes, settings), stats[name]
        assert got.count == np.isfinite(values).sum() > 0
        assert got.nan_count == np.isnan(values).sum()
        assert (got.min, got.max) == (np.nanmin(values), np.nanmax(values))
        assert got.mean == pytest.approx(np.nanmean(values), rel=1e-9, abs=1e-12)
        assert got.std == pytest.approx(np.nanstd(values), rel=1e-9, abs=1e-12)
        wanted = np.nanquantile(values, [0.01, 0.99])
        tolerance = 1e-12 if name in BANDS else TOLERANCE
        np.testing.assert_allclose([got.q01, got.q99], wanted, rtol=tolerance, atol=1e-9)


def test_masks_move_indices_and_never_bands():
    scenes = [scene(1)]
    masked = channel_statistics(scenes, CHANNELS, SETTINGS)
    plain = channel_statistics(scenes, CHANNELS, IndexSettings("reflectance", False, False))
    for name in BANDS:
        assert masked[name] == plain[name]
    assert masked["NDVI"].count < plain["NDVI"].count
    assert masked["DEMWM"] == plain["DEMWM"]


def test_a_missing_pixel_drops_only_itself():
    pixels = np.full((7, 3, 5), 8000, np.float32)
    pixels[5:] = 0
    pixels[1, 0, 0] = np.nan
    pixels[1, 2, 4] = 9000
    stats = channel_statistics([pixels], ("NIR", "R", "NDVI"), SETTINGS)
    assert (stats["NIR"].count, stats["NIR"].nan_count, stats["NIR"].max) == (14, 1, 9000)
    assert stats["NIR"].mean == pytest.approx((13 * 8000 + 9000) / 14)
    assert (stats["NDVI"].count, stats["NDVI"].nan_count) == (14, 1)
    assert stats["R"].count == 15


def test_quality_flag_and_empty_channels_are_stored_as_they_are_used():
    pixels = scene(2)
    pixels[0] = np.nan
    stats = channel_statistics([pixels], ("SWIR", "QA", "GVMI"), SETTINGS)
    size = pixels[0].size
    fixed = {"min": 0, "max": 1, "mean": 0, "std": 1, "q01": 0, "q99": 1}
    assert asdict(stats["QA"]) == {**fixed, "count": size, "nan_count": 0}
    assert asdict(stats["SWIR"]) == {**fixed, "count": 0, "nan_count": size}
    assert asdict(stats["GVMI"]) == {**fixed, "count": 0, "nan_count": size}


def test_scenes_are_streamed_one_at_a_time():
    begun: list[weakref.ref[np.ndarray]] = []

    def stream():
        for seed in range(40):
            pixels = scene(seed)
            begun.append(weakref.ref(pixels))
            yield pixels
            del pixels
            assert sum(ref() is not None for ref in begun) <= 2

    channel_statistics(stream(), ("NIR", "NDVI"), SETTINGS)
    assert len(begun) == 40


@pytest.fixture
def folder(tmp_path):
    ids = [f"AB{i:06d}" for i in range(35)]  # more than two groups
    return tmp_path / "train", ids, write_images(tmp_path / "train", ids)


def test_the_result_does_not_depend_on_the_workers(folder):
    root, ids, scenes = folder
    sources = [Source(root / "images" / f"{tile_id}_satellite.tif") for tile_id in ids]
    seen: list[tuple[str, int, int]] = []
    one = file_statistics(sources, CHANNELS, SETTINGS, progress=lambda *update: seen.append(update))
    two = file_statistics(sources, CHANNELS, SETTINGS, workers=2)
    assert one == two == channel_statistics(scenes, CHANNELS, SETTINGS)
    assert seen[0] == ("statistics", 0, 35)
    assert seen[-1] == ("statistics", 35, 35)


def test_an_unreadable_file_is_named_by_workers_too(folder):
    root, ids, _ = folder
    bad = root / "images" / f"{ids[20]}_satellite.tif"
    bad.write_bytes(b"II*\0 no tiff")
    config = StatsConfig(data_dir=root, output_dir=root / "out", workers=2)
    with pytest.raises(InputError, match=f"1 of 35 images failed, the rest is done: .*{bad.name}"):
        compute_stats(config)
    (file,) = (root / "out").glob("*.json")
    assert StatsFile.load(file).about.row_count == 34


def settings_of(**changes):
    return {"spectral_indices": "NDVI,DEMWM", "workers": 1, **changes}


def test_the_use_case_writes_a_file_that_loads(folder, tmp_path):
    root, _, scenes = folder
    before = datetime.now(UTC).replace(microsecond=0)
    result = compute_stats(StatsConfig(data_dir=root, output_dir=tmp_path / "out", **settings_of()))
    time, rest = result.path.name.split("-stats-")
    assert before <= datetime.fromisoformat(time + "+00:00") <= datetime.now(UTC)
    assert rest == "fill_value=nan-mask_using_qa=True-mask_using_water_mask=True.json"
    channels = channel_names(BANDS, ("NDVI", "DEMWM"))
    file = StatsFile.load(result.path, channels)
    assert file.channels == channel_statistics(scenes, channels, SETTINGS)
    assert file.about.cv_split is None
    assert (file.about.row_count, result.rows, result.channels) == (35, 35, 9)
    assert (tmp_path / "out" / "kelp-stats.yaml").is_file()
    assert "9 channels of 35 images" in result.summary()


def test_scenes_of_every_kind_have_statistics(folder, tmp_path):
    """A folder of scenes, a list, one of them, a product: whatever `kelp predict` takes."""
    root, _, _ = folder
    options = settings_of(output_dir=tmp_path / "out")

    def stats_of(place):
        return StatsFile.load(compute_stats(StatsConfig(**options, data_dir=place)).path).channels

    whole = stats_of(root)
    images = sorted((root / "images").glob("*.tif"))
    listed = tmp_path / "scenes.txt"
    listed.write_text("".join(f"{image}\n" for image in images))
    assert stats_of(root / "images") == stats_of(listed) == whole
    assert stats_of(images[0])["NIR"].count < whole["NIR"].count
    product = make_landsat(tmp_path, 8)
    with open_scene(product) as opened:
        nir = opened.read()[BANDS.index("NIR")]
    for place in (product, tar_of(product)):
        found = stats_of(place)["NIR"]
        assert found.count == np.isfinite(nir).sum()
        assert found.mean == pytest.approx(np.nanmean(nir, dtype=float))


def test_a_large_scene_is_summed_up_in_strips(folder, monkeypatch):
    """Tens of indices of all pixels of a whole scene do not fit into memory."""
    root, _, _ = folder
    sources = [Source(path) for path in sorted((root / "images").glob("*.tif"))]
    whole = file_statistics(sources, channel_names(BANDS, ["NDVI"]), SETTINGS)
    monkeypatch.setattr("kelp.data_prep.stats._STRIP", 1000)
    parts = file_statistics(sources, channel_names(BANDS, ["NDVI"]), SETTINGS)
    for name, stats in whole.items():
        assert astuple(parts[name]) == pytest.approx(astuple(stats))


def test_fill_and_masks_are_in_the_name_and_fill_moves_no_number(folder, tmp_path):
    root, _, _ = folder
    kept = compute_stats(StatsConfig(data_dir=root, output_dir=tmp_path / "a", **settings_of()))
    changes = {"fill_missing_pixels_with_torch_nan": False, "mask_using_qa": False}
    zero = compute_stats(
        StatsConfig(data_dir=root, output_dir=tmp_path / "b", **settings_of(**changes))
    )
    assert zero.path.name.endswith(
        "fill_value=0-mask_using_qa=False-mask_using_water_mask=True.json"
    )
    first, second = StatsFile.load(kept.path), StatsFile.load(zero.path)
    assert (first.about.fill_value, second.about.fill_value) == ("nan", "0")
    for name in BANDS:
        assert first.channels[name] == second.channels[name]


def table_of(root, ids, fold):
    return pd.DataFrame(
        {
            "tile_id": [*ids, "ZZ999999"],
            "original_split": ["train"] * len(ids) + ["test"],
            "split_0": [*fold, "test"],
        }
    )


def test_windows_gets_a_name_without_colons(monkeypatch):
    about = About(None, 3, True, True, "nan", "dn", "1")
    moment = datetime(2023, 12, 31, 20, 30, 39, tzinfo=UTC)
    assert StatsFile({}, about).name(moment).startswith("2023-12-31T20:30:39-stats-")
    monkeypatch.setattr("kelp.raster.statistics.os", SimpleNamespace(name="nt"))
    assert StatsFile({}, about).name(moment).startswith("2023-12-31T20-30-39-stats-")


def test_a_fold_uses_its_training_rows_only(folder, tmp_path):
    root, ids, scenes = folder
    fold = ["val" if i % 5 == 0 else "train" for i in range(len(ids))]
    path = tmp_path / "table.parquet"
    table_of(root, ids, fold).to_parquet(path)
    options = settings_of(data_dir=root, output_dir=tmp_path / "out", metadata_fp=path)
    file = StatsFile.load(compute_stats(StatsConfig(**options, cv_split=0)).path)
    chosen = [pixels for pixels, split in zip(scenes, fold, strict=True) if split == "train"]
    assert file.channels == channel_statistics(chosen, tuple(file.channels), SETTINGS)
    assert (file.about.cv_split, file.about.row_count) == (0, 28)
    assert StatsFile.load(compute_stats(StatsConfig(**options)).path).about.row_count == 35


@pytest.mark.parametrize("materialized", [True, False])
def test_sliced_tables_count_pixels_and_not_padding(tmp_path, materialized):
    pixels = scene(4, (10, 13))
    write(tmp_path / "raw" / "images" / "AB000001_satellite.tif", pixels)
    rows = []
    for y, x in [(0, 0), (0, 8), (8, 0), (8, 8)]:
        name = f"images/AB000001_satellite_{x}_{y}.tif"
        if materialized:
            padded = np.full((7, 8, 8), np.nan, np.float32)
            padded[5] = 1
            part = pixels[:, y : y + 8, x : x + 8]
            padded[:, : part.shape[1], : part.shape[2]] = part
            write(tmp_path / "sliced" / name, padded)
        rows.append(
            {
                "tile_id": "AB000001",
                "x": x,
                "y": y,
                "original_split": "train",
                "image_path": name if materialized else None,
                "tile_height": 8,
                "tile_width": 8,
                "source_image_path": "../raw/images/AB000001_satellite.tif",
            }
        )
    table = tmp_path / "sliced" / "sahi_train_val_test_dataset.parquet"
    table.parent.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(table)
    config = StatsConfig(
        data_dir=tmp_path / "sliced",
        metadata_fp=table,
        output_dir=tmp_path / "out",
        **settings_of(),
    )
    got = StatsFile.load(compute_stats(config).path).channels
    whole = channel_statistics([pixels], tuple(got), SETTINGS)
    for name in ("SWIR", "B", "DEM", "NDVI"):
        assert got[name].count == whole[name].count
        assert (got[name].min, got[name].max) == (whole[name].min, whole[name].max)
        assert got[name].mean == pytest.approx(whole[name].mean, rel=1e-12)
        assert (got[name].q01, got[name].q99) == (whole[name].q01, whole[name].q99)


def test_a_window_of_a_file(folder):
    root, ids, scenes = folder
    source = Source(root / "images" / f"{ids[0]}_satellite.tif", Tile(2, 3, 4, 100))
    got = file_statistics([source], ("NIR",), SETTINGS)
    assert got == channel_statistics([scenes[0][:, 2:6, 3:]], ("NIR",), SETTINGS)


def test_a_band_without_any_pixel_is_announced(tmp_path, caplog):
    pixels = scene(3)
    pixels[6] = np.nan
    write(tmp_path / "images" / "AB000001_satellite.tif", pixels)
    with caplog.at_level(logging.WARNING, "kelp"):
        compute_stats(StatsConfig(data_dir=tmp_path, output_dir=tmp_path / "out", **settings_of()))
    assert [record.getMessage() for record in caplog.records] == [
        "no image has a valid pixel of DEM, DEMWM"
    ]


def test_wrong_use_is_explained(folder, tmp_path):
    root, ids, _ = folder
    options = settings_of(data_dir=root, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="cv_split needs metadata_fp"):
        compute_stats(StatsConfig(**options, cv_split=1))
    with pytest.raises(ConfigError, match="did you mean NDVI"):
        compute_stats(StatsConfig(**{**options, "spectral_indices": "NDV"}))
    with pytest.raises(InputError, match="no such folder"):
        compute_stats(StatsConfig(**{**options, "data_dir": tmp_path / "nowhere"}))
    path = tmp_path / "table.parquet"
    table = table_of(root, ids, ["val"] * len(ids))
    table.to_parquet(path)
    with pytest.raises(TableError, match="has no training row"):
        compute_stats(StatsConfig(**options, metadata_fp=path, cv_split=0))
    with pytest.raises(TableError, match="has no fold 7"):
        compute_stats(StatsConfig(**options, metadata_fp=path, cv_split=7))
    table.assign(x=0, y=0).to_parquet(path)
    with pytest.raises(TableError, match="lacks the column image_path, source_image_path, tile"):
        compute_stats(StatsConfig(**options, metadata_fp=path))
    table.loc[3, "tile_id"] = "XX000003"
    table.to_parquet(path)
    with pytest.raises(TableError, match=r"XX000003_satellite\.tif"):
        compute_stats(StatsConfig(**options, metadata_fp=path))


ABOUT = About(3, 10, True, True, "nan", "dn", "0.1.0")


def stats_file(channels=("NIR", "QA", "NDVI")):
    return StatsFile(channel_statistics([scene(0)], channels, SETTINGS), ABOUT)


def test_a_file_comes_back_as_it_was(tmp_path):
    file = stats_file()
    name = file.name(datetime(2023, 12, 31, 20, 30, 39, tzinfo=UTC))
    assert name == (
        "2023-12-31T20:30:39-stats-fill_value=nan-mask_using_qa=True-mask_using_water_mask=True.json"
    )
    file.save(tmp_path / name)
    assert StatsFile.load(tmp_path / name, ("NDVI", "NIR")) == file


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("NIR",), None, "lacks the channel NIR"),
        (("NIR", "max"), None, "channel NIR: max must be a finite number"),
        (("NIR", "q01"), float("nan"), "channel NIR: q01 must be a finite number, not nan"),
        (("NDVI", "q99"), float("inf"), "channel NDVI: q99 must be a finite number"),
        (("NDVI", "mean"), "0.5", "channel NDVI: mean must be a finite number"),
        (("NDVI", "std"), True, "channel NDVI: std must be a finite number"),
        (("NDVI", "count"), 1.5, "channel NDVI: count must be a finite number"),
        (("NDVI", "std"), -1, "channel NDVI: the numbers contradict"),
        (("NIR", "min"), 1e9, "channel NIR: the numbers contradict"),
        (("NIR", "q01"), 1e9, "channel NIR: the numbers contradict"),
        (("NIR",), [1], "channel NIR is not a set of numbers"),
        (("_about",), None, "lacks _about"),
        (("_about", "index_input"), 3, "_about: index_input"),
    ],
)
def test_spoilt_files_are_refused_by_file_and_channel(tmp_path, keys, value, message):
    path = tmp_path / "stats.json"
    stats_file().save(path)
    content = json.loads(path.read_text())
    *parents, last = keys
    target = content[parents[0]] if parents else content
    if value is None:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(StatsError, match=message) as error:
        StatsFile.load(path, ("NIR", "NDVI"))
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\x00\xff"])
def test_what_is_no_statistics_file_is_refused(tmp_path, text):
    path = tmp_path / "stats.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(StatsError, match=r"stats\.json: not a"):
        StatsFile.load(path)
    with pytest.raises(StatsError, match=r"gone\.json: cannot be read"):
        StatsFile.load(tmp_path / "gone.json")


def test_a_file_must_fit_the_run(tmp_path):
    path, file = tmp_path / "s.json", stats_file()
    file.check(("NIR", "NDVI"), SETTINGS, path)
    with pytest.raises(StatsError, match=r"s\.json: lacks the channel SABI"):
        file.check(("NIR", "SABI"), SETTINGS, path)
    with pytest.raises(StatsError, match="index_input dn, this run has reflectance"):
        file.check(("NDVI",), IndexSettings("reflectance", True, True), path)
    with pytest.raises(StatsError, match="mask_using_qa=True, this run has False"):
        file.check(("NDVI",), IndexSettings("dn", False, True), path)
    # Without index channels the settings change nothing.
    file.check(("NIR", "QA"), IndexSettings("dn", False, False), path)
