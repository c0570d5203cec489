"""`kelp slice`: tiles give their image back, keep their place and depend on nothing else."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slicing_world import config, one_image
from world import make_world, opened, read_tif

from kelp import tables
from kelp.config import SliceConfig
from kelp.data_prep import slicing, tile_files
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import InputError
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference
from kelp.raster.scene import Scene, read_scene
from kelp.tiling.grid import TileGrid

GRID = Affine(30, 0, 500_000, 0, -30, 4_000_000)


SLOW = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assemble(folder, stem, shape, size, count):
    """The image that the tiles below `folder` show, and how often each pixel beyond it is seen."""
    out = np.full((count, shape[0] + size, shape[1] + size), np.nan)
    for path in folder.glob(f"{stem}_*.tif"):
        x, y = map(int, path.stem.split("_")[-2:])
        out[:, y : y + size, x : x + size] = read_tif(path)
    return out


def all_bytes(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".tif", ".parquet")
    }


@SLOW
@given(data=st.data())
def test_tiles_put_together_are_the_image(tmp_path, data):
    shape = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50)))
    size = data.draw(st.integers(8, 30))
    stride = data.draw(st.integers(1, size).filter(lambda s: s > size // 4))
    dtype = data.draw(st.sampled_from(["int16", "uint16", "int32", "float32", "float64"]))
    nodata = data.draw(st.sampled_from([None, 0, 7]))
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        image = rng.normal(9000, 5000, (7, *shape)).astype(dtype)
        image[0, 0, 0] = np.nan
    else:
        low = 1 if dtype == "uint16" else np.iinfo(dtype).min  # 0 has a test of its own
        image = rng.integers(low, np.iinfo(dtype).max, (7, *shape), dtype, endpoint=True)
    mask = rng.choice([0, 1, 255], shape).astype(np.uint8)
    root = tmp_path / "world"
    shutil.rmtree(root, ignore_errors=True)
    options = one_image(root, image, mask, nodata=nodata)
    slice_dataset(SliceConfig(**options, image_size=size, stride=stride))

    height, width = shape
    if nodata == 0:  # 0 is a value of QA and DEM: optical zeros become -32768
        image = image.astype(np.float64)
        image[:5][image[:5] == 0] = -32768
    images = assemble(root / "out" / "images", "A_satellite", shape, size, 7)
    masks = assemble(root / "out" / "masks", "A_kelp", shape, size, 1)
    np.testing.assert_array_equal(images[:, :height, :width], image)
    np.testing.assert_array_equal(masks[0, :height, :width], mask)
    fill = nodata or -32768
    for whole, value in ((images, fill), (masks, 255)):
        for beyond in (whole[:, height:], whole[:, :, width:]):
            assert set(np.unique(beyond[np.isfinite(beyond)])) <= {value}
    kept = "int32" if dtype == "uint16" and not nodata else dtype
    for path in (root / "out" / "images").iterdir():
        with opened(path) as tile:
            assert (tile.shape, tile.dtypes[0], tile.nodata) == ((size, size), kept, fill)
    with opened(next((root / "out" / "masks").iterdir())) as tile:
        assert (tile.dtypes[0], tile.nodata) == ("uint8", 255)


def test_zero_of_an_untagged_unsigned_image_stays_missing(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 3, (7, 20, 33)).astype(np.uint16)
    slice_dataset(SliceConfig(**one_image(tmp_path, image), image_size=40))
    path = tmp_path / "out" / "images" / "A_satellite_0_0.tif"
    np.testing.assert_array_equal(
        read_scene(path)[:, :20, :33], read_scene(tmp_path / "images" / "A_satellite.tif")
    )


def test_a_nodata_tag_the_type_cannot_hold_widens_it():
    class Fake:
        path, names, descriptions = Path("a.tif"), BANDS, (None,) * 7

        def __init__(self, dtype, nodata):
            self.dtype, self.nodata = dtype, nodata

    def chosen(dtype, nodata):
        form = tile_files.image_format(Fake(dtype, nodata), named=False)
        return form.dtype, form.nodata, len(form.zero_is_missing)

    assert chosen("uint8", -9999) == ("int32", -32768, 0)
    assert chosen("uint8", None) == ("int32", -32768, 5)
    assert chosen("uint8", 255) == ("uint8", 255, 0)
    assert chosen("uint16", 0) == ("int32", -32768, 5)
    assert chosen("int16", 0) == ("int16", -32768, 5)
    assert chosen("float32", 0) == ("float32", -32768, 5)
    with pytest.raises(InputError, match=r"a\.tif: uint32 cannot hold the nodata value"):
        chosen("uint32", None)


@pytest.mark.parametrize("stride", [16, 10])
def test_a_tile_lies_where_its_window_lies(tmp_path, stride):
    image = np.full((7, 40, 23), 9000, np.int16)
    options = one_image(tmp_path, image, crs="EPSG:32610", transform=GRID)
    slice_dataset(SliceConfig(**options, image_size=16, stride=stride, band_order=",".join(BANDS)))
    seen = 0
    for folder in ("images", "masks"):
        for path in (tmp_path / "out" / folder).iterdir():
            x, y = map(int, path.stem.split("_")[-2:])
            with opened(path) as tile:
                assert tile.crs.to_epsg() == 32610
                assert tile.transform == Affine(30, 0, 500_000 + 30 * x, 0, -30, 4_000_000 - 30 * y)
                if folder == "images":
                    assert tile.descriptions == BANDS
            seen += 1
    assert seen == 2 * len(TileGrid((40, 23), 16, 16 - stride, edge="pad"))


def test_no_georeference_is_invented_and_descriptions_are_kept(tmp_path):
    image = np.full((8, 20, 30), 9000, np.int16)
    options = one_image(tmp_path, image)
    names = ("B", "G", "R", "NIR", "SWIR", "QA", "DEM", "thermal")
    with opened(tmp_path / "images" / "A_satellite.tif", "r+") as scene:
        scene.descriptions = names
    slice_dataset(SliceConfig(**options, image_size=16))
    path = tmp_path / "out" / "images" / "A_satellite_16_16.tif"
    with Scene(path) as scene:
        assert scene.georeference == Georeference()
    with opened(path) as tile:
        assert tile.crs is None
        assert tile.transform == Affine.identity()
        assert tile.descriptions == names
        assert tile.compression.name in ("deflate", "lzw")  # what every GDAL can read


def test_bytes_depend_neither_on_workers_nor_on_the_order_of_rows(tmp_path):
    world = make_world(tmp_path, n_train=5)
    one = config(world)
    slice_dataset(one)
    expected = all_bytes(one.output_dir)
    assert len(expected) == 2 * 5 * 9 + 1
    shuffled = pd.read_parquet(world.table).iloc[::-1]
    shuffled.to_parquet(world.table, index=False)
    many = config(world, workers=3, output_dir=tmp_path / "many")
    steps = []
    slice_dataset(many, lambda *step: steps.append(step))
    assert all_bytes(many.output_dir) == expected
    assert steps == [("slicing", n, 5) for n in range(1, 6)]
    assert not list(many.output_dir.rglob(".*"))


def test_the_size_is_told_first_and_is_about_right(tmp_path, caplog):
    world = make_world(tmp_path)
    with caplog.at_level(logging.INFO, logger="kelp"):
        slice_dataset(config(world))
    text = caplog.records[0].getMessage()
    assert text.startswith("slicing 4 images into about 36 tiles of 32 x 32 px, about ")
    told = float(text.split(", about ")[1].split(" MB")[0]) * 1e6
    images = world.data_dir.parent / "sahi" / "images"
    assert told == pytest.approx(sum(p.stat().st_size for p in images.iterdir()), rel=0.25)


def test_the_settings_are_recorded(tmp_path):
    world = make_world(tmp_path, n_train=1)
    used = config(world)
    slice_dataset(used)
    assert SliceConfig.load(used.output_dir / "kelp-slice.yaml") == used


def test_a_tile_moved_by_a_pixel_is_noticed(tmp_path, monkeypatch):
    """The reassembly test can fail: plant the fault it is for."""
    image = np.arange(7 * 20 * 30, dtype=np.int32).reshape(7, 20, 30) + 1
    options = one_image(tmp_path, image)
    cut = slicing.cut

    def moved(stored, tile, form, hidden=None):
        return cut(np.roll(stored, 1, axis=2), tile, form)

    monkeypatch.setattr(slicing, "cut", moved)
    slice_dataset(SliceConfig(**options, image_size=16))
    whole = assemble(tmp_path / "out" / "images", "A_satellite", (20, 30), 16, 7)
    assert not np.array_equal(whole[:, :20, :30], image)


@pytest.mark.slow
def test_the_folder_is_a_command_from_any_place_with_a_space(tmp_path):
    world = make_world(tmp_path / "a b", n_train=1)
    run = subprocess.run(
        [
            sys.executable,
            str(Path(slicing.__file__).parent),
            f"--data_dir={world.train_dir}",
            f"--metadata_fp={world.table}",
            "--output_dir=out put",
            "--image_size=32",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "9 tiles of 1 images" in run.stdout
    assert (tmp_path / "out put" / tables.TILES_TABLE).is_file()
