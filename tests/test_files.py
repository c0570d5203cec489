"""What killed processes left is removed; what a living one writes is not."""

import os
import subprocess
import sys

import pytest

from kelp.files import discard_partials, scratch_folder


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
