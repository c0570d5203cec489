"""Law 8, nothing half-written and nothing lost, against a failure at every call."""

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import zlib
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import safetensors.torch
from bundles import tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS, biased_bundle
from rasterio.errors import RasterioIOError
from rasterio.io import DatasetReader
from world import read_tif

import kelp
from kelp.errors import BundleError, InputError, KelpError
from kelp.inference.bundle import load_bundle
from kelp.io.files import atomic, atomic_folder, recover_folder
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter, write_mask


def break_at_every_call(points, work, error):
    """Do `work` again and again, failing at its first, its second … call of `points`.

    Yields after each failure; ends when `work` came through without meeting one.
    """
    flush = os.fsync
    for last in count():
        calls, failed = iter(range(last)), []

        def fused(call, calls=calls, failed=failed):
            def wrapper(*args, **kwargs):
                # A folder is flushed when the new file has its name already.
                late = call is flush and stat.S_ISDIR(os.fstat(args[0]).st_mode)
                if not late and not failed and next(calls, None) is None:
                    failed.append(call)
                    raise error
                return call(*args, **kwargs)

            return wrapper

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in points:
                patch.setattr(owner, name, fused(getattr(owner, name)))
            try:
                work()
            except (KelpError, type(error)):
                yield last
            else:
                assert not failed, "the failure was swallowed"
                return


ERRORS = [OSError(errno.ENOSPC, "No space left"), MemoryError(), KeyboardInterrupt()]
RASTER_POINTS = [
    (Path, "open"),
    (zlib, "crc32"),
    (Path, "write_text"),
    (rasterio.shutil, "copy"),
    (rasterio, "open"),
    (DatasetReader, "read"),
    (os, "fsync"),
    (Path, "replace"),
]


@pytest.mark.parametrize("error", [RasterioIOError("disk"), *ERRORS], ids=repr)
@pytest.mark.parametrize(("width", "dtype"), [(31, "uint8"), (31, "float32"), (1030, "uint8")])
def test_a_raster_fails_at_any_call_and_the_older_one_stays(tmp_path, error, width, dtype):
    path = tmp_path / "m.tif"
    write_mask(path, np.ones((4, 5), np.uint8))
    old = path.read_bytes()
    new = np.arange(12 * width).reshape(12, width) % 2

    def work():
        with RasterWriter(path, new.shape, dtype, Georeference(), 255, {"A": "b"}) as out:
            for y in range(0, 12, 3):
                out.write(y, new[y : y + 3])

    failures = 0
    for _ in break_at_every_call(RASTER_POINTS, work, error):
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.tif": old}
        failures += 1
    assert failures >= 11  # two opens, four writes, copying, reading back, flushing, renaming
    np.testing.assert_array_equal(read_tif(path)[0], new)


@settings(LAWS, max_examples=25)
@given(
    parts=st.lists(st.binary(max_size=40), max_size=6),
    stop=st.integers(0, 6),
    error=st.sampled_from(ERRORS),
    old=st.none() | st.binary(max_size=40),
)
def test_a_file_fails_between_any_two_writes(tmp_path_factory, parts, stop, error, old):
    path = tmp_path_factory.mktemp("atomic") / "new" / "f.bin"
    before = {}
    if old is not None:
        path.parent.mkdir()
        path.write_bytes(old)
        before = {"f.bin": old}

    def work(stop):
        with atomic(path) as partial, partial.open("wb") as file:
            for i, part in enumerate([*parts, b""]):
                if i == stop:
                    raise error
                file.write(part)
                file.flush()

    def content():
        return {p.name: p.read_bytes() for p in path.parent.iterdir()}

    if stop <= len(parts):
        with pytest.raises((InputError, type(error))):
            work(stop)
        assert content() == before
    for _ in break_at_every_call([(os, "fsync"), (Path, "replace")], lambda: work(None), error):
        assert content() == before
    assert content() == {"f.bin": b"".join(parts)}


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_bundle_fails_at_any_call_and_the_older_one_stays(tmp_path, error):
    folder, extra = tmp_path / "run" / "bundle", tmp_path / "s.json"
    extra.write_text("{}")
    biased_bundle(folder, 0.25)
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    spec = tiny_spec(epoch=2)
    net = KelpNet(spec)
    points = [
        (safetensors.torch, "save_file"),
        (hashlib, "file_digest"),
        (Path, "write_text"),
        (shutil, "copyfile"),
        (Path, "rename"),
    ]
    failures = 0
    for _ in break_at_every_call(points, lambda: save_bundle(folder, net, spec, [extra]), error):
        assert [p.name for p in folder.parent.iterdir()] == ["bundle"]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
        failures += 1
    assert failures == 7  # weights, their hash, card, attachment, description, two renamings
    assert load_bundle(folder).spec.epoch == 2
    assert (folder / "s.json").is_file()


# Put one folder in the place of another, dying before one call; light, so it starts quickly.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path

from kelp.io.files import atomic_folder

calls = int(sys.argv[3])


def dying(call):
    def wrapper(*args, **kwargs):
        global calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapper


with atomic_folder(Path(sys.argv[2])) as partial:
    shutil.copytree(sys.argv[1], partial, dirs_exist_ok=True)
    shutil.rmtree, Path.rename = dying(shutil.rmtree), dying(Path.rename)
"""


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("calls", range(5))  # before removing, two renamings, removing twice
def test_a_process_killed_while_it_replaces_a_bundle_loses_none(tmp_path, calls):
    run, new = tmp_path / "run", biased_bundle(tmp_path / "new", 0.25, epoch=2)
    bundle = biased_bundle(run / "artifacts" / "bundle", 0.25, epoch=1)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, new, bundle, str(calls)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(kelp.__file__).parents[1])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert bundle.exists() == (calls != 2)
    killed = shutil.copytree(run, tmp_path / "killed")
    for path in (run, run / "artifacts"):
        assert load_bundle(path).spec.epoch == (1 if calls < 3 else 2)
        assert load_bundle(path).path == bundle
    assert load_bundle(killed / "artifacts" / "bundle").spec.epoch == (1 if calls < 3 else 2)
    biased_bundle(bundle, 0.25, epoch=3)
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]
    assert load_bundle(run).spec.epoch == 3


def test_a_writer_that_fails_after_a_killed_one_loses_nothing(tmp_path):
    folder, waiting = tmp_path / "f", tmp_path / ".f.old"
    waiting.mkdir()
    (waiting / "a").write_text("older")
    with pytest.raises(MemoryError), atomic_folder(folder):
        raise MemoryError
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (folder / "a").read_text() == "older"


def test_a_reader_that_comes_between_the_two_renamings_stops_no_writer(tmp_path, monkeypatch):
    folder, rename = tmp_path / "f", Path.rename
    folder.mkdir()
    (folder / "a").write_text("older")
    met = []

    def crossed(path, target):
        if target == folder and path.name != ".f.old" and not met:
            met.append(path)
            recover_folder(folder)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crossed)
    with atomic_folder(folder) as partial:
        (partial / "b").write_text("newer")
    assert met
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_a_reader_renames_no_hidden_folder_of_others(tmp_path):
    (tmp_path / ".runs.old").mkdir()
    with pytest.raises(BundleError, match="no such folder"):
        load_bundle(tmp_path / "runs")
    assert [p.name for p in tmp_path.iterdir()] == [".runs.old"]
