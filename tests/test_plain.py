"""Every command in the plain installation, as processes: it works, or says what to install.

`KELP_BIN` names the folder of the `kelp` program of a wheel in an empty environment (`make wheel`);
without it this environment's runs, and finds none of the packages of the extras.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kelp
from kelp.cli import COMMANDS
from kelp.raster.masks import read_mask

pytestmark = pytest.mark.slow

SCENE = Path(kelp.__file__).parent / "demo" / "data" / "OL000001_satellite_georef.tif"
HIDDEN = """
import sys
from importlib.machinery import PathFinder

EXTRAS = (
    "torch torchvision torchmetrics timm segmentation_models_pytorch lightning mlflow safetensors "
    "onnx onnxscript distributed optuna sklearn lightgbm fsspec s3fs geopandas pyogrio shapely "
    "pystac pystac_client netCDF4 pyproj xarray"
).split()
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in EXTRAS else find(name, *rest)
)
from kelp.cli import main

sys.exit(main(sys.argv[1:]))
"""
PROGRAM = [sys.executable, "-c", HIDDEN]
if "KELP_BIN" in os.environ:
    PROGRAM = [str(Path(os.environ["KELP_BIN"]).absolute() / "kelp")]

TABLE = "--metadata_fp=tables/train_val_test_dataset.parquet"
PAIRS = "--preds_dir=maps --gt_dir=val/masks"
WORKS = (
    "simulate --output_dir=raw --places=4 --dates=2 --test=1 --seed=3",
    "metadata --data_dir=raw --output_dir=tables --splits=3",
    "stats --data_dir=raw/train --output_dir=tables",
    "indices",
    f"slice --data_dir=raw/train {TABLE} --output_dir=sliced --image_size=128",
    f"split --data_dir=raw {TABLE} --cv_split=0 --output_dir=val",
    "models",
    "info --data_dir=val/images",
    "predict --data_dir=val/images --output_dir=maps --save_probabilities",
    "verify --predictions_dir=maps --data_dir=val/images",
    f"evaluate {PAIRS} --output_dir=scores",
    f"report {PAIRS} --output_dir=report",
    "submit --predictions_dir=maps --output_dir=submission",
    "preview --data_dir=val/images --predictions_dir=maps --output_dir=pictures",
    "ensemble --predictions_dirs=maps,maps --output_dir=merged",
    "predict --data_dir=A_2023-01-15.tif --output_dir=placed",
    "stac --predictions_dir=placed --output_dir=stac",
    "view --predictions_dir=placed --output=view.html",
)
ON_PAIRS = "--run_dir=coasts --data_dir=val/images --gt_dir=val/masks --output_dir=out"
REFUSED = {
    f"train --data_dir=raw {TABLE} --output_dir=out": "kelp-slicer[train]",
    f"baseline --data_dir=raw {TABLE} --output_dir=out": "kelp-slicer[train]",
    "sweep --train_config=train.yaml --space=space.yaml --output_dir=out": "kelp-slicer[train]",
    f"tune {ON_PAIRS}": "kelp-slicer[train]",
    f"compare {ON_PAIRS}": "kelp-slicer[train]",
    "export --run_dir=coasts --output_path=out.onnx": "kelp-slicer[train]",
    "demo --output_dir=out": "kelp-slicer[train]",
    "beds --predictions_dir=placed --output=out.gpkg": "kelp-slicer[geo]",
    "areas --predictions_dir=placed --output=out.csv --aoi=aoi.geojson": "kelp-slicer[geo]",
    "series --predictions_dir=placed --output_dir=out": "kelp-slicer[series]",
    "search --stac=https://localhost:1/ --bbox=0,0,1,1 --output=out": "the server does not answer",
    "predict --data_dir=val/images --output_dir=out --backend=torch": "kelp-slicer[train]",
    "predict --data_dir=val/images --output_dir=out --scheduler=local:2": "kelp-slicer[dask]",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every command that works has run."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copy(SCENE, folder / "A_2023-01-15.tif")
    (folder / "aoi.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (folder / "train.yaml").write_text("architecture: unet\n")
    (folder / "space.yaml").write_text("lr: [0.001, 0.0003]\n")
    for line in WORKS:
        done = run(folder, line)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    return folder


def run(folder, line):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or "-c" in PROGRAM}
    return subprocess.run(
        [*PROGRAM, *line.split(), "--quiet"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


def test_every_command_is_tried():
    assert {line.split()[0] for line in (*WORKS, *REFUSED)} == set(COMMANDS)


@pytest.mark.skipif("KELP_BIN" not in os.environ, reason="make wheel")
def test_the_wheel_is_small_and_brings_little():
    """40 MB with its network, 40 packages: a minute on a slow line."""
    bin_ = Path(os.environ["KELP_BIN"]).absolute()
    (wheel,) = (Path.cwd() / "dist").glob("*.whl")
    assert wheel.stat().st_size <= 40e6
    assert len(list(bin_.parent.glob("lib/python*/site-packages/*.dist-info"))) <= 40


def test_a_scene_is_mapped_and_reported(world):
    assert (read_mask(world / "placed" / "A_2023-01-15_kelp.tif") == 1).any()
    for made in ("view.html", "report/report.html", "submission/submission.tar"):
        assert (world / made).stat().st_size


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_done_says_so_in_one_line(world, line):
    done = run(world, line)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert REFUSED[line] in done.stderr
    assert not list(world.glob("out*"))
