"""Unusual CRS, and another program's PROJ: no word of a C library on stderr."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from world import write_tif

from kelp.cli import main
from kelp.errors import InputError
from kelp.raster import area
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference, georeference_of, read_mask
from kelp.raster.writer import write_mask
from kelp.sensors.aoi import Polygons
from kelp.sensors.elevation import Elevation
from kelp.sensors.quality import CloudMask

LOCAL = CRS.from_wkt('LOCAL_CS["a harbour",UNIT["metre",1]]')
UTM = CRS.from_epsg(32618)

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
        assert georeference_of(made).crs == georeference_of(tmp_path / f"{i}.tif").crs


@pytest.mark.parametrize("name", ["PROJ_DATA", "PROJ_LIB"])
def test_the_database_of_another_proj_is_left(tmp_path, name):
    """QGIS and others name theirs to all that they start; a polar CRS became a local one."""
    code = (
        "import os; from rasterio.crs import CRS; from kelp.cli.console import reporting\n"
        "with reporting(quiet=False): print(CRS.from_epsg(3031).is_projected)\n"
        f"print(os.environ.get('{name}'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, name: str(tmp_path)},
    )
    assert done.stdout.split() == ["True", "None"]
    assert done.stderr == (
        f"kelp: {name}={tmp_path}: of another PROJ than rasterio's, which now uses its own "
        "database\n"
    )


def test_a_crs_that_cannot_be_understood_is_no_bug(monkeypatch):
    """Where no command mended PROJ: in a library."""

    def fail(*_):
        raise CRSError("Cannot find proj.db")

    monkeypatch.setattr(area, "reproject", fail)
    place = Georeference(UTM, Affine(30, 0, 0, 0, -30, 0))
    with pytest.raises(InputError, match=r"a\.tif: its CRS \(.*\) cannot be placed on the Earth"):
        area.GroundArea.of_file(Path("a.tif"), place, (8, 9))


@pytest.fixture
def local_map(tmp_path):
    path = tmp_path / "maps" / "A_2023-01-15_kelp.tif"
    path.parent.mkdir()
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5, 3:6] = 1
    write_mask(path, mask, Georeference(LOCAL, Affine(1, 0, 0, 0, -1, 0)))
    text = '{"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]]}'
    feature = f'{{"type": "Feature", "properties": {{"id": "a"}}, "geometry": {text}}}'
    (tmp_path / "aoi.geojson").write_text(feature)
    return path


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("areas --predictions_dir=maps --aoi=aoi.geojson --output=a.csv", 2),
        ("beds --predictions_dir=maps --output=b.geojson", 2),
        ("beds --predictions_dir=maps --output=b.gpkg", 2),
        ("series --predictions_dir=maps --output_dir=s", 2),
        ("view --predictions_dir=maps --output=v.html", 0),
        ("stac --predictions_dir=maps --output_dir=t", 0),
    ],
)
def test_a_local_crs_is_no_place_on_the_earth(local_map, monkeypatch, capsys, command, status):
    monkeypatch.chdir(local_map.parents[1])
    assert main([*command.split(), "--quiet"]) == status
    said = capsys.readouterr().err
    assert said.count("\n") == bool(status)
    assert ("A_2023-01-15_kelp.tif: has no CRS, or a local one" in said) == bool(status)


def test_nothing_is_laid_on_a_scene_with_a_local_crs(local_map, tmp_path):
    shape, affine = (8, 9), Affine(1, 0, 0, 0, -1, 0)
    with pytest.raises(InputError, match="no georeference, or a local one; polygons"):
        Polygons(tmp_path / "aoi.geojson", shape, LOCAL, affine, "--aoi")
    with pytest.raises(InputError, match="no georeference, or a local one; stack"):
        Elevation(local_map, shape, LOCAL, affine)
    with pytest.raises(InputError, match=r"its CRS \(a harbour\) cannot be transformed to"):
        CloudMask(local_map, shape, UTM, affine)
    with pytest.raises(InputError, match="has no CRS, or a local one; set it"):
        Elevation(local_map, shape, UTM, affine)


def test_a_crs_that_no_geotiff_holds_is_told(tmp_path, caplog):
    crs = CRS.from_user_input("+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +lon_0=18")
    write_mask(tmp_path / "m.tif", np.ones((8, 9), np.uint8), Georeference(crs, Affine.scale(0.1)))
    assert caplog.messages == [
        f"{tmp_path / 'm.tif'}: has no CRS: a GeoTIFF cannot hold that of its scene (unnamed)"
    ]
