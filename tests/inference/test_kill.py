"""The real command, killed and started again, ends with the bytes of an undisturbed run."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from affine import Affine
from bundles import tiny_bundle
from laws import predict_command
from rasterio.crs import CRS
from world import coast, write_tif

from kelp.inference.outputs import journal_path
from kelp.raster.bands import BANDS
from kelp.raster.writer import rows_path

pytestmark = pytest.mark.slow

SHAPE = (1100, 90)
PLACE = {"crs": CRS.from_epsg(32719), "transform": Affine(30, 0, 400000, 0, -30, -5700000)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A georeferenced scene and a bundle with a small real network, not trained."""
    folder = tmp_path_factory.mktemp("kill")
    image, _ = coast(SHAPE, np.random.default_rng(3))
    path = write_tif(folder / "L_satellite.tif", image, **PLACE)
    bundle = tiny_bundle(folder / "bundle", decoder_channels=(16, 8, 8, 4, 4))
    return path, bundle


def command(world, out):
    path, bundle = world
    options = ("--save_probabilities", "--save_spread", "--batch_size=6", "--sahi_overlap=8")
    order = f"--band_order={','.join(BANDS)}"
    return [sys.executable, "-m", "kelp", *predict_command(path, bundle, out, order, *options)]


@contextmanager
def started(world, out):
    process = subprocess.Popen(
        command(world, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(world, out):
    """Let it run to its end; what it said."""
    with started(world, out) as process:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return said


def stopped(world, out, reached, how):
    """Stop it with a signal as soon as the disk is in a state; its status and what it said."""
    with started(world, out) as process:
        deadline = time.monotonic() + 300
        while not reached() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(how)
        _, said = process.communicate(timeout=300)
    return process.returncode, said


def rasters(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tif")}


def gone_on_from(said):
    found = re.search(r"resumed at row (\d+) of 1100", said)
    return int(found[1]) if found else 0


def test_killed_again_and_again(world, tmp_path):
    finished(world, tmp_path / "whole")
    expected = rasters(tmp_path / "whole")
    assert set(expected) == {"L_kelp.tif", "L_kelp_prob.tif", "L_kelp_spread.tif"}
    out = tmp_path / "out"
    mask = out / "L_kelp.tif"

    def rows():
        path = rows_path(mask)
        return path.stat().st_size // SHAPE[1] if path.is_file() else 0

    points = [
        (signal.SIGKILL, journal_path(mask).is_file),
        (signal.SIGKILL, lambda: rows() > 400),
        (signal.SIGINT, lambda: rows() > 600),
        (signal.SIGKILL, lambda: rows() > 900),
        # One file is finished, the others are not.
        (signal.SIGKILL, (out / "L_kelp_spread.tif").is_file),
    ]
    begun = []
    for how, reached in points:
        status, said = stopped(world, out, reached, how)
        if mask.exists() and len(begun) == len(points) - 1:
            break  # on a busy machine the last instant, of milliseconds, may pass unseen
        assert status == (130 if how == signal.SIGINT else -how), said
        assert not mask.exists()
        if how == signal.SIGINT:
            assert "stopped; nothing half-written was left" in said
        begun.append(gone_on_from(said))
    else:
        assert rows_path(mask).is_file()
        begun.append(gone_on_from(finished(world, out)))
    finished(world, out)
    # How far a journal lies behind depends on how fast the disk is; that there is one does not.
    assert begun == sorted(begun)
    assert begun[0] == 0
    assert all(row > 0 for row in begun[1:])
    assert rasters(out) == expected
    assert not list(out.glob(".*"))
