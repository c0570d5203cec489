"""`kelp info`: what kelp sees in scenes."""

import json

import numpy as np
import pytest
from satellites import CRS, PRODUCTS, TRANSFORM, layer, make_landsat

from kelp.cli import main
from kelp.config.scenes import InfoConfig
from kelp.inference.info import info
from kelp.tiling.grid import TileGrid

SHAPE = (150, 130)
CLEAR, CLOUD = 1 << 6, 1 << 3


@pytest.fixture
def folder(tmp_path):
    qa = np.full(SHAPE, CLEAR, np.uint16)
    qa[:, 70:] = CLOUD
    return make_landsat(tmp_path, 8, SHAPE, qa=qa)


def described(path, **options):
    (scene,) = info(InfoConfig(data_dir=path, sahi_tile_size=32, **options)).scenes
    return scene.values


def test_it_says_what_is_there(folder):
    values = described(folder)
    assert values["scene"]["sensor"] == "landsat-8"
    assert values["scene"]["acquired"] == "2019-12-01T15:13:51.861099Z"
    assert values["grid"] == {
        "shape": list(SHAPE),
        "crs": CRS,
        "transform": list(TRANSFORM)[:6],
    }
    assert values["bands"] == ["SWIR", "NIR", "R", "G", "B", "QA"]
    share = values["quality"]["share"]
    assert share["cloud"] == pytest.approx(60 / 130)
    assert share["fill"] == share["high_aerosol"] == 0
    assert values["quality"]["bad_share"] == pytest.approx(60 / 130)
    nir = layer(5, SHAPE)
    assert abs(values["observed_values"]["NIR"]["median"] - np.median(nir[:, :70])) < 10
    assert values["dem"] is None
    assert values["aoi"] is None


def observed_tiles(wanted):
    return sum(wanted[tile.clipped(SHAPE).slices].any() for tile in TileGrid(SHAPE, 32, 16))


def test_it_counts_tiles_that_would_be_run(folder, tmp_path):
    wanted = np.zeros(SHAPE, bool)
    wanted[:, :70] = True
    cost = described(folder)["cost"]
    assert cost["tiles"] == observed_tiles(wanted)
    assert cost["all_tiles"] == len(TileGrid(SHAPE, 32, 16))
    assert described(folder, quality="none")["cost"]["tiles"] == cost["all_tiles"]
    path = tmp_path / "aoi.geojson"
    ring = [TRANSFORM @ corner for corner in ((40, 50), (100, 50), (100, 60), (40, 60), (40, 50))]
    crs = {"type": "name", "properties": {"name": CRS}}
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    wanted[:] = False
    wanted[50:60, 40:70] = True
    values = described(folder, aoi=path)
    assert values["cost"]["tiles"] == observed_tiles(wanted)
    assert values["aoi"]["share"] == pytest.approx(600 / (150 * 130))


def test_on_the_command_line(folder, tmp_path, capsys):

    assert main(["info", "--data_dir", str(folder), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{PRODUCTS[8]}: landsat-8, L2SP, T1, 2019-12-01T15:13:51")
    assert "cloud 46.2 %*" in text
    assert main(["info", "--data_dir", str(folder), "--json", "--quiet"]) == 0
    (values,) = json.loads(capsys.readouterr().out)
    assert values["scene"]["id"] == PRODUCTS[8]


def test_a_scene_that_cannot_be_read_is_exit_2_with_the_reason(folder, tmp_path, capsys):
    other = make_landsat(tmp_path, 9)
    (other / f"{PRODUCTS[9]}_SR_B5.TIF").write_bytes(b"")
    assert main(["info", "--data_dir", str(tmp_path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 of 2 scenes cannot be read" in error
    assert "SR_B5.TIF: is empty" in error
