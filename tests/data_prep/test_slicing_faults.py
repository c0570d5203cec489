"""What `kelp slice` does with bad input, and what it leaves when it is stopped."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from slicing_world import config
from world import make_world, read_tif, write_tif

from kelp import tables
from kelp.data_prep import slicing
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import ConfigError, InputError, TableError
from kelp.raster.bands import BANDS


def read_table(used):
    return pd.read_parquet(used.output_dir / tables.TILES_TABLE)


def test_tiles_of_an_earlier_slice_are_told(tmp_path, caplog):
    world = make_world(tmp_path, n_train=1)
    slice_dataset(config(world, stride=16))
    slice_dataset(config(world))
    assert "files are not of this slice" in caplog.text
    tiles = pd.read_parquet(config(world).output_dir / tables.TILES_TABLE)
    assert len(tiles) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mask_of_another_size_names_both_files(tmp_path, workers):
    world = make_world(tmp_path)
    mask = world.train_dir / "masks" / "TR000002_kelp.tif"
    write_tif(mask, np.zeros((1, 70, 90), np.uint8))
    with pytest.raises(InputError) as caught:
        slice_dataset(config(world, workers=workers))
    for part in (str(mask), "TR000002_satellite.tif", "70 x 90", "90 x 70"):
        assert part in str(caught.value)
    assert "TR000002" not in set(read_table(config(world))["tile_id"])


def place(path, shift):
    """Give a file of the world a georeference."""
    where = {"crs": "EPSG:32621", "transform": Affine(30, 0, 500_000 + shift, 0, -30, 0)}
    write_tif(path, read_tif(path), **where)


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path):
    world = make_world(tmp_path, n_train=1)
    image, mask = (next((world.train_dir / kind).iterdir()) for kind in ("images", "masks"))
    place(image, 0)
    options = {"band_order": BANDS}
    assert slice_dataset(config(world, **options)).tiles == 9  # a mask without georeference
    place(mask, 15)
    with pytest.raises(
        InputError, match=r"_kelp\.tif does not .* shifted by \+0\.5 columns and \+0"
    ):
        slice_dataset(config(world, **options))
    assert slice_dataset(config(world, ignore_georeference=True, **options)).tiles == 9


def test_masks_of_0_and_255_are_refused_unless_255_is_said_to_be_kelp(tmp_path):
    world = make_world(tmp_path)
    slice_dataset(config(world))
    tiles = config(world).output_dir / "masks"
    wanted = {path.name: path.read_bytes() for path in tiles.iterdir()}
    for path in (world.train_dir / "masks").iterdir():
        write_tif(path, np.where(read_tif(path) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"holds 0 and 255 only .*kelp_value=255"):
        slice_dataset(config(world))
    slice_dataset(config(world, kelp_value=255))
    assert {path.name: path.read_bytes() for path in tiles.iterdir()} == wanted


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_whole_tiles_and_a_table_of_the_others(tmp_path, workers):
    world = make_world(tmp_path)
    used = config(world, workers=workers)
    slice_dataset(used)
    broken = world.train_dir / "images" / "TR000003_satellite.tif"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"TR000003_satellite\.tif: not a readable raster"):
        slice_dataset(used)
    assert set(read_table(used)["tile_id"]) == set(world.train) - {"TR000003"}
    assert not list(used.output_dir.rglob(".*"))


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_leaves_no_half_tile(tmp_path, monkeypatch, cause):
    """Full, remounted, its permissions lost; and then the clock is set back by years."""
    world = make_world(tmp_path, n_train=1)
    put, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        put(path, content[: len(content) // 2])
        raise OSError(cause, os.strerror(cause))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=rf"cannot be written \({os.strerror(cause)}\)"):
            slice_dataset(config(world))
    assert len(calls) == 1  # of the one image
    assert not list((config(world).output_dir / "images").iterdir())
    monkeypatch.setattr(time, "time", lambda: 1e9)
    slice_dataset(config(world))
    alone = config(world, output_dir=tmp_path / "alone")
    slice_dataset(alone)
    assert tree(config(world).output_dir / "images") == tree(alone.output_dir / "images")


def test_bad_tables_are_named(tmp_path):
    world = make_world(tmp_path)
    table = pd.read_parquet(world.table)

    def fails(changed, message, kind=TableError):
        changed.to_parquet(world.table, index=False)
        with pytest.raises(kind, match=message):
            slice_dataset(config(world))

    fails(table.drop(columns="original_split"), "lacks the column original_split")
    fails(table.assign(original_split="test"), "no row whose original_split is train")
    fails(pd.concat([table, table.head(1)]), "two rows have the tile_id TR000000")
    table.to_parquet(world.table, index=False)
    (world.train_dir / "masks" / "TR000001_kelp.tif").unlink()
    fails(table, r"TR000001_kelp\.tif: no such file, but .*\.parquet has a row for it")
    with pytest.raises(ConfigError, match=r"output_dir .* is data_dir"):
        slice_dataset(config(world, output_dir=world.train_dir))


STOPPED = """
import sys
from kelp.config import SliceConfig
from kelp.data_prep.slicing import slice_dataset
if __name__ == "__main__":
    slice_dataset(SliceConfig.load(__import__("pathlib").Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_slice_leaves_whole_tiles_and_no_process(tmp_path, how):
    world = make_world(tmp_path, n_train=30, shape=(190, 210))
    used = config(world, workers=2, stride=8)
    recorded = used.record(tmp_path)
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(Path(slicing.__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, str(script), str(recorded)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    images = used.output_dir / "images"
    deadline = time.monotonic() + 300
    while not (images.is_dir() and len(list(images.glob("*.tif"))) > 40):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(how)
    child.communicate(timeout=120)  # ends only when no worker holds the pipe any more
    assert child.returncode == (-how if how == signal.SIGKILL else -signal.SIGINT)
    assert not (used.output_dir / tables.TILES_TABLE).exists()
    finished = [p for p in used.output_dir.rglob("*.tif") if not p.name.startswith(".")]
    assert finished
    for path in finished:
        assert read_tif(path).shape[1:] == (32, 32)
    if how == signal.SIGINT:
        assert not list(used.output_dir.rglob(".*.tif"))


def tree(folder):
    """Every file of a folder with its content, hidden ones, too."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads
@pytest.mark.parametrize("seed", range(4))
def test_two_slices_into_one_folder_with_kills_end_as_one_alone(tmp_path, seed):
    """Killed at random moments, beside another one or alone; then once more: the same bytes."""
    world = make_world(tmp_path, n_train=3)
    alone = config(world, output_dir=tmp_path / "alone", stride=8)
    slice_dataset(alone)
    together = config(world, output_dir=tmp_path / "together", stride=8)
    moments, context = random.Random(seed), multiprocessing.get_context("fork")
    for _ in range(3):
        both = [context.Process(target=slice_dataset, args=(together,)) for _ in range(2)]
        for process in both:
            process.start()
        both[0].join(moments.uniform(0, 0.3))
        both[0].kill()
        both[1].join(moments.uniform(0, 0.3) if moments.random() < 0.5 else None)
        both[1].kill()
        for process in both:
            process.join()
        assert {process.exitcode for process in both} <= {0, -signal.SIGKILL}
    slice_dataset(together)
    wanted = tree(alone.output_dir)
    found = tree(together.output_dir)
    assert found.keys() == wanted.keys()
    settings = Path("kelp-slice.yaml")  # names its own folder
    assert {k: v for k, v in found.items() if k != settings} == {
        k: v for k, v in wanted.items() if k != settings
    }
