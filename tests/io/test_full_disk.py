"""A disk that fills up while the rows become a GeoTIFF."""

import subprocess
import sys

import pytest

FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from kelp.errors import InputError
from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter

folder, side, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rows = np.random.default_rng(0).random((side, 60)).astype("f4")
nodata = float("nan") if kind == "float32" else 255
if kind == "uint8":
    rows = (rows < 0.5).astype("u1")


def write(limit):
    writer = RasterWriter(folder / "X.tif", rows.shape, kind, Georeference(), nodata, {})
    writer.begin()
    try:
        writer.write(0, rows)
        writer.sync()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        writer.discard()


write(10**9)
size = (folder / "X.tif").stat().st_size
(folder / "X.tif").unlink()
for limit in [0, size // 8, size // 4, size // 2, size * 3 // 4, size - 200, size - 1]:
    try:
        write(limit)
    except InputError as error:
        assert "X.tif: cannot be written" in str(error), error
    except Exception as error:
        sys.exit(f"a limit of {limit} of {size} bytes is {type(error).__name__}: {error}")
    else:
        sys.exit(f"a limit of {limit} of {size} bytes is not noticed")
    assert not list(folder.iterdir()), list(folder.iterdir())
"""


@pytest.mark.parametrize("side", [400, 1100], ids=["GeoTIFF", "COG"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_a_disk_that_is_full_at_any_byte_is_bad_luck_not_a_bug(tmp_path, side, kind):
    """A limit on the size of files stands for the full disk."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, tmp_path, str(side), kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
