"""Two processes on one output: the second is refused, and does the first no harm."""

import socket
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from laws import predict, rasters
from world import coast, write_tif

from kelp.errors import InputError
from kelp.inference.outputs import JournalFile, journal_path
from kelp.raster.masks import Georeference, read_mask
from kelp.raster.writer import RasterWriter, rows_path
from kelp.tiling.merge import MergerState

HERE = socket.gethostname()
FIRST = """
import socket, sys
from pathlib import Path
import numpy as np
from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter

socket.gethostname = lambda: sys.argv[2]
with RasterWriter(Path(sys.argv[1]), (30, 1040), "uint8", Georeference(), 255, {}) as out:
    out.write(0, np.ones((20, 1040)))
    out.sync()
    print("writing", flush=True)
    sys.stdin.readline()
    out.write(20, np.zeros((10, 1040)))
"""


@contextmanager
def writing(mask, host=HERE):
    """A process that has written 20 of a mask's 30 rows; in the end it writes the others."""
    first = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FIRST, str(mask), host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "writing\n"
        yield
        _, errors = first.communicate("\n", timeout=300)
        assert first.returncode == 0, errors
    finally:
        first.kill()
        first.communicate()


def unharmed(mask):
    assert not list(mask.parent.glob(".*.rows"))
    np.testing.assert_array_equal(read_mask(mask), np.arange(30)[:, None] < np.full(1040, 20))


def test_a_second_writer_is_refused_in_one_line(tmp_path):
    mask = tmp_path / "X_kelp.tif"
    with writing(mask):
        second = RasterWriter(mask, (30, 1040), "uint8", Georeference(), 255, {})
        for kept in (0, 20):
            with pytest.raises(
                InputError, match=r"X_kelp\.tif: another process is writing it"
            ) as e:
                second.begin(kept)
            assert "\n" not in str(e.value)
            second.discard()
        assert rows_path(mask).stat().st_size == 20 * 1040
    unharmed(mask)


def test_a_lock_ends_with_its_process(tmp_path):
    mask = tmp_path / "X_kelp.tif"
    with pytest.raises(AssertionError), writing(mask):
        raise AssertionError  # and so it is killed
    second = RasterWriter(mask, (30, 1040), "uint8", Georeference(), 255, {})
    second.begin(20)
    second.write(20, np.zeros((10, 1040)))
    second.finish()
    second.discard()
    unharmed(mask)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A scene of 30 x 1040 pixels, a bundle and the folder of their masks."""
    use_pixel_network(monkeypatch)
    image, _ = coast((30, 1040), np.random.default_rng(1))
    (tmp_path / "out").mkdir()
    return (
        write_tif(tmp_path / "X_satellite.tif", image),
        [tiny_bundle(tmp_path / "bundle")],
        tmp_path / "out",
    )


@pytest.mark.parametrize("host", [HERE, "b.cluster"], ids=["here", "there"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=["plain", "overwrite"])
def test_a_second_prediction_is_refused(scene, options, host):
    mask = scene[2] / "X_kelp.tif"
    with writing(mask, host):
        with pytest.raises(InputError, match="another process is writing it") as error:
            predict(*scene, **options)
        assert "\n" not in str(error.value)
    unharmed(mask)


def test_a_second_prediction_that_finds_it_finished_does_no_harm(scene):
    """The first makes it again; what is there already is what the second would make."""
    mask = scene[2] / "X_kelp.tif"
    predict(*scene)
    before = rasters(scene[2])
    with writing(mask):
        assert predict(*scene).skipped == 1
        assert rasters(scene[2]) == before
    unharmed(mask)


def test_a_refused_prediction_leaves_the_journal_of_the_first(scene):
    """Else a kill of the first would cost all that it has done."""
    mask = scene[2] / "X_kelp.tif"
    with writing(mask):
        journal = journal_path(mask)
        empty = MergerState(16, *(np.zeros((0, 1040), t) for t in ("f8", "f4", "?")))
        JournalFile(mask, "of the first").save(empty, lambda: [0])
        before = journal.read_bytes()
        with pytest.raises(InputError, match="another process is writing it"):
            predict(*scene)
        assert journal.is_file()
        assert journal.read_bytes() == before
        journal.unlink()
    unharmed(mask)
