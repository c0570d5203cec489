"""Prediction, evaluation and products run where torch is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from bundles import tiny_bundle, use_pixel_network
from rasterio.crs import CRS
from world import coast, write_tif

import kelp
from kelp.config import ExportConfig
from kelp.raster.masks import Georeference, read_mask
from kelp.raster.writer import write_mask

WITHOUT = """
import sys

TRAIN = "torch torchvision torchmetrics timm segmentation_models_pytorch lightning mlflow onnx"
for name in TRAIN.split():
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""
IMPORTS = """
import importlib, pkgutil
import kelp

for name in ("inference", "evaluation", "raster", "tiling", "data_prep", "products", "sensors"):
    package = importlib.import_module(f"kelp.{name}")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
"""
PREDICTS = """
from kelp.cli import main

sys.exit(main(sys.argv[1:]))
"""
LOOKS = """
assert status == 0
slow = {"torch", "lightning", "mlflow", "timm", "pandas", "scipy", "matplotlib", "onnx", "psutil"}
loaded = slow & set(sys.modules)
assert not loaded, loaded
"""


def without_torch(code, *arguments):
    root = Path(kelp.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
    )


def test_the_packages_of_prediction_import():
    """Also where modules of Python are missing that Windows does not have."""
    unix = "sys.modules |= dict.fromkeys(('fcntl', 'grp', 'pwd', 'resource', 'termios', 'tty'))"
    done = without_torch(unix + IMPORTS)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bundle with its ONNX file, and a scene."""
    folder = tmp_path_factory.mktemp("light")
    with pytest.MonkeyPatch.context() as patch:
        use_pixel_network(patch)
        bundle = tiny_bundle(folder / "bundle")
        kelp.export(ExportConfig(run_dir=bundle, output_path=bundle / "network.onnx"))
        scene = write_tif(folder / "A_satellite.tif", coast((70, 50), np.random.default_rng(5))[0])
        config = {"data_dir": scene, "run_dir": bundle, "output_dir": folder / "torch"}
        kelp.predict_scenes(kelp.config.PredictConfig(**config, device="cpu", precision="32-true"))
    return folder, bundle, scene


@pytest.mark.parametrize("backend", ["auto", "onnx"])
@pytest.mark.parametrize("run", ["bundle", "bundle/network.onnx"])
def test_a_scene_is_predicted(world, tmp_path, backend, run):
    folder, _, scene = world
    done = without_torch(
        PREDICTS,
        "predict",
        f"--data_dir={scene}",
        f"--run_dir={folder / run}",
        f"--output_dir={tmp_path}",
        f"--backend={backend}",
    )
    assert done.returncode == 0, done.stderr
    wanted, found = (read_mask(p / "A_kelp.tif") for p in (folder / "torch", tmp_path))
    assert (wanted == 1).sum() > 50
    assert (wanted != found).mean() <= 1e-4


def test_what_needs_torch_says_what_to_install(world, tmp_path):
    _, bundle, scene = world
    predict = ["predict", f"--data_dir={scene}", f"--run_dir={bundle}", f"--output_dir={tmp_path}"]
    done = without_torch(PREDICTS, *predict, "--backend=torch")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "kelp-slicer[train]"' in done.stderr
    train = ["train", "--data_dir=d", "--metadata_fp=m", f"--output_dir={tmp_path}"]
    done = without_torch(PREDICTS, *train)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'pip install "kelp-slicer[train]"' in done.stderr


def test_torch_stays_out_where_onnx_runtime_predicts(world, tmp_path):
    """Also where it is installed: importing it takes seconds."""
    _, bundle, scene = world
    code = PREDICTS.replace("sys.exit(main(sys.argv[1:]))", "status = main(sys.argv[1:])") + LOOKS
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys" + code,
            "predict",
            f"--data_dir={scene}",
            f"--run_dir={bundle}",
            f"--output_dir={tmp_path}",
            "--backend=onnx",
        ],
        capture_output=True,
        text=True,
        cwd=Path(kelp.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "A_kelp.tif").is_file()


def test_beds_areas_and_series_are_made(tmp_path):
    """With the packages for vector files and grids, but no torch."""
    mask = np.zeros((12, 12), np.uint8)
    mask[2:8, 3:9] = 1
    place = Georeference(CRS.from_epsg(32718), Affine(30, 0, 5e5, 0, -30, 4.3e6))
    maps = tmp_path / "maps"
    maps.mkdir()
    write_mask(maps / "A_2023-01-15_kelp.tif", mask, place)
    ring = [[5e5, 4.3e6], [5.004e5, 4.3e6], [5.004e5, 4.2996e6], [5e5, 4.2996e6], [5e5, 4.3e6]]
    (tmp_path / "aoi.geojson").write_text(
        json.dumps(
            {
                "type": "Feature",
                "crs": {"type": "name", "properties": {"name": "EPSG:32718"}},
                "properties": {"id": "bay"},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        )
    )
    lines = {
        "beds": ["--output=beds.gpkg"],
        "areas": ["--output=areas.csv", "--aoi=aoi.geojson"],
        "series": ["--output_dir=series", "--aoi=aoi.geojson"],
    }
    code = WITHOUT + "from kelp.cli import main\nfor line in sys.argv[1:]:\n"
    code += "    assert main([*line.split(), '--predictions_dir=maps', '--quiet']) == 0\n"
    commands = [" ".join([name, *options]) for name, options in lines.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(kelp.__file__).parents[1])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 bed of 1 map" in done.stdout
    assert "32400" in (tmp_path / "areas.csv").read_text()
    assert list((tmp_path / "series").iterdir())
