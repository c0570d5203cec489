"""What killed processes left is removed; what a living one writes or holds is not."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from kelp.errors import InputError
from kelp.io.files import atomic, discard_partials, locked, scratch_folder


def test_only_the_leftovers_of_the_dead_are_removed(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    try:
        kept = tmp_path / f".map.{living.pid}.partial.tif"
        gone = [
            tmp_path / f".map.{dead.pid}.partial.tif",
            tmp_path / f".map.{os.getpid()}.partial.tif",
            tmp_path / ".bundle.partial",
        ]
        for path in (kept, *gone):
            path.write_text("rows")
        folder = tmp_path / f".scratch.{dead.pid}.partial"
        folder.mkdir()
        (folder / "0.npy").write_text("p")
        mask = tmp_path / "map.tif"
        mask.write_text("finished")
        discard_partials(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([kept, mask])
    finally:
        living.communicate(b"\n")
    discard_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [mask]


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
