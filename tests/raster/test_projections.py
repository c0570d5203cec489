"""Unusual CRS, and another program's PROJ: no word of a C library on stderr."""

import os
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from world import write_tif

from kelp.raster.bands import BANDS
from kelp.raster.masks import georeference_of, read_mask

CRSS = [
    "EPSG:32618",
    "EPSG:4326",
    "EPSG:7405",  # compound
    "EPSG:2263",  # feet
    'LOCAL_CS["a harbour",UNIT["metre",1]]',
    "+proj=omerc +lat_0=4 +lonc=102.25 +alpha=323.02 +k=0.99984 +gamma=323.13 "
    "+a=6377295.664 +rf=300.8017 +units=m",
    'GEOGCS["weird",DATUM["none",SPHEROID["x",6370000,0]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]]',
]

# As a prediction does it: scenes are read in one thread and maps written in another.
IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from kelp.cli.console import reporting
from kelp.raster.georeference import require_same_grid
from kelp.raster.masks import read_mask
from kelp.raster.scene import Scene
from kelp.raster.writer import RasterWriter

def write(path, scene, values):
    with RasterWriter(path, scene.shape, "uint8", scene.georeference, 255, {}) as out:
        out.write(0, values)

with reporting(quiet=True), ThreadPoolExecutor(2) as pool:
    for path in sorted(Path(sys.argv[1]).glob("*.tif")):
        with Scene(path) as scene:
            values = pool.submit(scene.read).result()[0] > 0
            assert scene.reading
            target = path.with_name(f"{path.stem}_kelp.tif")
            pool.submit(write, target, scene, values).result()
        require_same_grid(path, target)
"""


@pytest.mark.parametrize("proj", [None, "/nonexistent"])
def test_unusual_crs_are_kept_and_nothing_is_said(tmp_path, proj):
    image = np.full((7, 20, 26), 8000, dtype=np.int32)
    for i, crs in enumerate(CRSS):
        place = {"crs": CRS.from_user_input(crs), "transform": Affine(30, 0, 0, 0, -30, 0)}
        path = write_tif(tmp_path / f"{i}.tif", image, **place)
        with rasterio.open(path, "r+") as out:
            out.descriptions = BANDS
    environment = {**os.environ} | ({"PROJ_DATA": proj, "PROJ_LIB": proj} if proj else {})
    done = subprocess.run(
        [sys.executable, "-c", IN_THREADS, tmp_path],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for i in range(len(CRSS)):
        made = tmp_path / f"{i}_kelp.tif"
        assert read_mask(made).all()
        assert georeference_of(made).transform == Affine(30, 0, 0, 0, -30, 0)
        if proj is None:  # without its database PROJ knows a compound CRS less exactly
            assert georeference_of(made).crs == georeference_of(tmp_path / f"{i}.tif").crs
