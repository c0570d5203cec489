"""What killed processes left is removed; what a living one writes or holds is not."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from kelp.errors import InputError
from kelp.io import files
from kelp.io.files import (
    atomic,
    atomic_folder,
    check_name,
    discard_partials,
    hidden,
    input_folder,
    locked,
    open_locked,
    scratch_folder,
)
from kelp.raster.masks import read_mask
from kelp.raster.writer import rows_path, write_mask


def left_by(process, suffix=".tif", host=None, token="0a1b2c3d"):
    return f".kelp-{host or files.host()}-{process}-{token}.partial{suffix}"


def test_only_the_leftovers_of_the_dead_are_removed(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    try:
        kept = tmp_path / left_by(living.pid)
        # Its process number is nobody's here, but somebody's there.
        elsewhere = tmp_path / left_by(dead.pid, host="node07_f00d")
        gone = [tmp_path / left_by(dead.pid), tmp_path / left_by(os.getpid(), ".json")]
        for path in (kept, elsewhere, *gone):
            path.write_text("rows")
        folder = tmp_path / left_by(dead.pid, "")
        folder.mkdir()
        (folder / "0.npy").write_text("p")
        mask = tmp_path / "map.tif"
        mask.write_text("finished")
        discard_partials(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([kept, elsewhere, mask])
    finally:
        living.communicate(b"\n")
    discard_partials(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, mask])
    # Nobody writes for a day without writing; names of earlier versions tell no host.
    earlier = tmp_path / ".map.123.partial.tif"
    earlier.touch()
    for path in (elsewhere, earlier, mask):
        os.utime(path, (time.time() - 90_000,) * 2)
    discard_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [mask]


TWO_HOSTS = """
import socket, sys
from pathlib import Path
socket.gethostname = lambda: sys.argv[2]
from kelp.io.files import atomic, discard_partials

with atomic(Path(sys.argv[1]) / "map.tif") as partial:
    partial.write_text("rows")
    print("begun", flush=True)
    input()
    partial.open("a").write(" and rows")
"""


def test_two_hosts_write_one_file_and_neither_removes_the_others(tmp_path):
    """A second host begins while the first writes; both end well, the last one's file stays."""
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, tmp_path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a.cluster", "b.cluster")
    ]
    for one in hosts:
        assert one.stdout.readline() == "begun\n"
    discard_partials(tmp_path)  # a third
    assert len(list(tmp_path.iterdir())) == 2
    for one in hosts:
        one.communicate("\n")
        assert one.returncode == 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["rows and rows"]


NAMES = [
    "a[1]*?.tif",
    "back\\slash.tif",
    "# %20 \u00fc.tif",
    "x" * 251 + ".tif",
    "\u00e4" * 125 + ".tif",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_a_file_system_takes_is_written(tmp_path, name):
    path = tmp_path / name
    with atomic(path) as partial:
        partial.write_text("rows")
    write_mask(path, np.ones((3, 1100), np.uint8))
    assert read_mask(path).all()
    check_name(path)
    assert len(os.fsencode(hidden(path, ".sections").name)) <= 255
    assert hidden(path, ".rows") == rows_path(path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_name_that_no_file_system_takes_is_said(tmp_path):
    path = tmp_path / ("x" * 252 + ".tif")
    with pytest.raises(InputError, match=r"has 256 bytes and file systems take 255; rename"):
        check_name(path)
    with pytest.raises(InputError, match="use a shorter name"), atomic(path) as partial:
        partial.write_text("rows")
    assert not list(tmp_path.iterdir())


def test_a_folder_outlives_a_power_cut_before_the_older_one_goes(tmp_path, monkeypatch):
    """All that is written is flushed, files and names, before it takes the place."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights").write_text("older")
    events = []
    fsync, rename = os.fsync, Path.rename

    def noted(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(path, target):
        events.append(f"{target.name} renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_folder(folder) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text("newer")
        temporary = partial.name
    first = events.index(".bundle.old renamed")
    assert {"weights", "deep", temporary} <= set(events[:first])
    assert events[-1] == tmp_path.name
    events.clear()
    with atomic(tmp_path / "map.tif") as partial:
        partial.write_text("rows")
    assert events[-1] == tmp_path.name


def test_processes_that_replace_one_folder_at_once_leave_one(tmp_path):
    together = Barrier(4)

    def replace(number):
        together.wait()
        for i in range(20):
            with atomic_folder(tmp_path / "bundle") as partial:
                for name in ("a", "b"):
                    (partial / name).write_text(f"{number} {i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(replace, range(4)))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert len({p.read_text() for p in (tmp_path / "bundle").iterdir()}) == 1


def test_a_folder_that_cannot_be_made_is_told_as_the_file(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "map.tif"
    with pytest.raises(InputError, match=r"map\.tif: cannot be written"), atomic(path):
        pass


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_scratch_folder_is_gone_however_it_ends(tmp_path, error):
    try:
        with scratch_folder(tmp_path) as scratch:
            (scratch / "a").write_text("b")
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["flock", "no flock", "no fcntl"])
def file_system(request, monkeypatch):
    """One that has locks, one that answers as Lustre without -o flock does, and Windows."""
    if request.param == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    if request.param == "no flock":

        def refused(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refused)


@pytest.mark.usefixtures("file_system")
def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path, together = tmp_path / ".lock", Barrier(4)
    inside: list[int] = []

    def hold(number):
        together.wait()
        for _ in range(50):
            with locked(path, wait=True):
                inside.append(number)
                assert inside == [number]
                with pytest.raises(BlockingIOError), locked(path):
                    pass
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
    assert not list(tmp_path.iterdir())


HOLDS = """
import errno, fcntl, sys
from pathlib import Path
def refused(*_):
    raise OSError(errno.ENOTSUP, "Operation not supported")
fcntl.flock = refused
from kelp.io.files import open_locked
held = open_locked(Path(sys.argv[1]))
held.write(b"rows")
held.flush()
print("held", flush=True)
input()
"""


def test_a_killed_process_holds_no_lock(tmp_path, monkeypatch):
    path = tmp_path / "map.rows"

    def refused(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        open_locked(path)
    other.kill()
    other.communicate()
    with open_locked(path) as file:
        file.seek(0)
        assert file.read() == b"rows"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_folder_holds_and_nobody_uses_is_named(tmp_path, caplog):
    for name in ("a_satellite.tif", "b_satellite.tif", "c.tif", "d.TIFF", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "link_satellite.tif").symlink_to(tmp_path / "gone")
    (tmp_path / "x_satellite.tif").mkdir()
    os.mkfifo(tmp_path / "pipe_satellite.tif")
    (tmp_path / ".hidden_satellite.tif").mkdir()
    found = input_folder(tmp_path, "*_satellite.tif", rasters=True)
    assert [path.name for path in found] == ["a_satellite.tif", "b_satellite.tif"]
    assert caplog.messages == [
        f"{tmp_path}: not used: c.tif, d.TIFF, link_satellite.tif (a broken link) and 2 more"
    ]
    caplog.clear()
    assert len(input_folder(tmp_path)) == 5
    assert caplog.messages == [
        f"{tmp_path}: not used: link_satellite.tif (a broken link), "
        "pipe_satellite.tif (no regular file), x_satellite.tif (a folder)"
    ]
