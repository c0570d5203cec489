"""The seed's four commands, as processes, on a small world prepared by kelp's own commands.

`KELP_BIN` names the folder of the `kelp` program that the last tests run: that of a wheel
installed into an empty environment (`make wheel`), else this environment's.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import kelp
from kelp.raster.masks import read_mask, read_tags
from kelp.tables import IMAGES_TABLE, TILES_TABLE

pytestmark = pytest.mark.slow

ROOT = Path(kelp.__file__).parent.parent
BIN = Path(os.environ.get("KELP_BIN", Path(sys.executable).parent)).absolute()

STATS = (
    "2023-12-31T20:30:39-stats-fill_value=nan-mask_using_qa=True-mask_using_water_mask=True.json"
)
RUN = "mlruns/567580247645556359/5691fc348f874ffdb2fc6c9616e11246"

PREPARE = r"""
python ./kelp/data_prep/ \
    --data_dir=data/raw/train \
    --metadata_fp=data/processed/train_val_test_dataset.parquet \
    --output_dir=data/processed/sahi \
    --image_size=128 \

"""
TRAIN = rf"""
python ./kelp/nn/training/ \
    --data_dir data/processed/sahi \
    --output_dir mlruns \
    --metadata_fp data/processed/sahi/sahi_train_val_test_dataset.parquet \
    --dataset_stats_fp data/processed/{STATS} \
    --cv_split $(FOLD_NUMBER) \
    --batch_size 32 \
    --num_workers 4 \
    --bands R,G,B,SWIR,NIR,QA,DEM \
    --image_size 320 \
    --resize_strategy resize \
    --interpolation nearest \
    --fill_missing_pixels_with_torch_nan True \
    --mask_using_qa True \
    --mask_using_water_mask True \
    --use_weighted_sampler True \
    --samples_per_epoch 10240 \
    --has_kelp_importance_factor 3 \
    --kelp_pixels_pct_importance_factor 0.2 \
    --qa_ok_importance_factor 0 \
    --qa_corrupted_pixels_pct_importance_factor -1 \
    --almost_all_water_importance_factor 0.5 \
    --dem_nan_pixels_pct_importance_factor 0.25 \
    --dem_zero_pixels_pct_importance_factor -1 \
    --normalization_strategy quantile \
    --architecture unet \
    --encoder tu-efficientnet_b5 \
    --pretrained True \
    --encoder_weights imagenet \
    --lr 3e-4 \
    --optimizer adamw \
    --weight_decay 1e-4 \
    --loss dice \
    --monitor_metric val/dice \
    --save_top_k 1 \
    --early_stopping_patience 50 \
    --precision 16-mixed \
    --epochs 10 \
    --swa False \
    --sahi True
"""
PREDICT = rf"""
python ./kelp/nn/inference/ \
    --data_dir=data/raw/splits/split_8/images \
    --dataset_stats_dir=data/processed \
    --output_dir=data/predictions/sahi-split=8 \
    --run_dir={RUN} \
    --decision_threshold=0.48 \
    --sahi_tile_size=128 \

"""
# The seed lacks the first backslash; with it, the command is the seed's.
SUBMIT = rf"""
python ./kelp/nn/inference/ \
    --data_dir=data/raw/test/images \
    --dataset_stats_dir=data/processed \
    --output_dir=data/submissions/sahi \
    --run_dir={RUN} \
    --precision=bf16-mixed \
    --decision_threshold=0.48 \
    --preview_submission \
    --preview_first_n=10 \
    --sahi_tile_size=128 \

"""

# Sizes are cut, meanings are not. No hub is reachable: random weights.
SMALL = {
    "$(FOLD_NUMBER)": "0",
    "--batch_size 32": "--batch_size 4",
    "--image_size 320": "--image_size 64",
    "--samples_per_epoch 10240": "--samples_per_epoch 12",
    "--encoder tu-efficientnet_b5": "--encoder tu-resnet18",
    "--pretrained True": "--pretrained False",
    "--epochs 10": "--epochs 1 --min_dice 0",
}
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTHON", "KELP"))},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def shell(command, folder, expect=0, **environment):
    """Run a command as typed into a shell in `folder`, with this Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**ENVIRONMENT, "PATH": path, **environment},
    )
    assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def program(folder, *arguments, expect=0):
    return shell(" ".join([f"'{BIN / 'kelp'}'", *map(str, arguments)]), folder, expect)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Simulated data and kelp's own preparation, in a clone whose path has a space."""
    root = tmp_path_factory.mktemp("seed") / "my kelp clone"
    shutil.copytree(ROOT / "kelp", root / "kelp", ignore=shutil.ignore_patterns("__pycache__"))
    # So that it shows which kelp ran: this copy, not the installed one.
    init = root / "kelp" / "_version.py"
    init.write_text(init.read_text().replace(f'"{kelp.__version__}"', '"9.9.9"'))
    program(root, "simulate --output_dir data/raw --places 9 --dates 1 --test 2 --seed 3 --quiet")
    program(root, "metadata --data_dir data/raw --output_dir data/processed --splits 9 --quiet")
    program(root, "stats --data_dir data/raw/train --output_dir data/processed --quiet")
    (stats,) = (root / "data/processed").glob("*-stats-*.json")
    stats.rename(root / "data/processed" / STATS)
    table = f"--metadata_fp data/processed/{IMAGES_TABLE}"
    program(
        root,
        f"split --data_dir data/raw {table} --cv_split 8 "
        "--output_dir data/raw/splits/split_8 --quiet",
    )
    return root


@pytest.fixture(scope="module")
def tiles(world):
    shell(PREPARE, world)
    return world / "data/processed/sahi"


def small_training():
    command = TRAIN
    for written, cut in SMALL.items():
        assert written in command
        command = command.replace(written, cut)
    return command


@pytest.fixture(scope="module")
def run(world, tiles):
    shell(small_training(), world)
    (trained,) = (path for path in (world / "mlruns/kelp").iterdir() if path.is_dir())
    shutil.copytree(trained, world / RUN)  # a run folder moves anywhere
    return world / RUN


def test_prepare(tiles):
    assert (tiles / TILES_TABLE).is_file()
    assert len(list((tiles / "images").iterdir())) == 9 * 9
    assert len(list((tiles / "masks").iterdir())) == 9 * 9


def test_train(run):
    artifacts = run / "artifacts"
    assert (artifacts / "bundle" / "weights.safetensors").is_file()
    assert (artifacts / "bundle" / "bundle.json").is_file()
    assert (artifacts / "config.yaml").is_file()
    assert list((artifacts / "samples").glob("*.png"))


def test_predict(world, run):
    shell(PREDICT, world)
    out = world / "data/predictions/sahi-split=8"
    images = sorted((world / "data/raw/splits/split_8/images").iterdir())
    assert images
    for image in images:
        mask = out / image.name.replace("_satellite", "_kelp")
        assert read_mask(mask).shape == (350, 350)
        assert read_tags(mask)["KELP_VERSION"] == "9.9.9"


def test_submit_and_the_same_bytes_again(world, run):
    def state():
        folder = world / "data/submissions/sahi"
        return {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".tif", ".tar", ".png")
        }

    shell(SUBMIT, world)
    first = state()
    assert sum(name.endswith(".png") for name in first) == 2
    with tarfile.open(world / "data/submissions/sahi/submission.tar") as tar:
        names = tar.getnames()
    test_images = sorted(p.name for p in (world / "data/raw/test/images").iterdir())
    assert names == [name.replace("_satellite", "_kelp") for name in test_images]
    assert "2 already finished" in shell(SUBMIT, world).stdout
    assert state() == first
    shutil.rmtree(world / "data/submissions/sahi")
    shell(SUBMIT, world)
    assert state() == first


def test_the_seeds_fourth_command_without_its_backslash_says_what_is_missing(world):
    done = shell("python ./kelp/nn/inference/", world, expect=2)
    assert done.stderr.splitlines() == ["kelp: error: --data_dir is missing; see --help"]


def test_training_as_written_says_how_to_get_weights(world, tiles, tmp_path):
    started = time.monotonic()
    done = shell(TRAIN.replace("$(FOLD_NUMBER)", "0"), world, expect=2, HF_HOME=str(tmp_path))
    assert time.monotonic() - started < 90  # most of it is importing torch on a busy machine
    error = [line for line in done.stderr.splitlines() if line.startswith("kelp: error")]
    assert len(error) == 1
    assert "--encoder_weights FILE" in error[0]
    assert "--pretrained False" in error[0]
    assert "Traceback" not in done.stderr


def test_workers_make_no_difference(world, tiles):
    """`--num_workers 0` and `4`: the same samples, so the same network."""
    weights = {}
    for workers in (0, 4):
        command = small_training().replace("--num_workers 4", f"--num_workers {workers}")
        command = command.replace("--output_dir mlruns", f"--output_dir runs-{workers}")
        shell(command, world)
        (file,) = (world / f"runs-{workers}/kelp").glob("*/artifacts/bundle/weights.safetensors")
        weights[workers] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights[0] == weights[4]


def test_the_program_on_a_virtual_dataset_and_whole_images(world):
    """`kelp slice/train/predict` (of the wheel, where CI names one): bilinear, and pad beside."""
    table = f"--metadata_fp data/processed/{IMAGES_TABLE}"
    program(
        world,
        f"slice --data_dir data/raw/train {table} --output_dir virtual",
        "--no-materialize --quiet",
    )
    common = (
        "--architecture linknet --encoder tu-resnet18 --pretrained False --epochs 1 "
        "--limit_train_batches 2 --limit_val_batches 2 --num_workers 0 --batch_size 2 "
        "--min_dice 0 --quiet"
    )
    program(
        world,
        f"train --data_dir virtual --metadata_fp virtual/{TILES_TABLE} --output_dir vruns",
        "--sahi --image_size 64 --resize_strategy resize --interpolation bilinear",
        common,
    )
    program(world, f"train --data_dir data/raw {table} --output_dir wruns", common)
    for runs in ("vruns", "wruns"):
        (run,) = (path for path in (world / runs / "kelp").iterdir() if path.is_dir())
        program(
            world,
            f"predict --data_dir data/raw/test/images --output_dir out-{runs}",
            f"--run_dir '{run}' --quiet",
        )
        masks = sorted((world / f"out-{runs}").glob("*.tif"))
        assert len(masks) == 2
        assert np.isin(read_mask(masks[0]), (0, 1, 255)).all()


def test_the_program_asked_for_a_cluster(world):
    """The wheel alone brings no Dask: one line tells what to install. With it: a cluster."""
    asked = "stats --data_dir data/raw/train --output_dir there --scheduler local:1 --quiet"
    known = subprocess.run(
        [BIN / "python", "-c", "import distributed"], env=ENVIRONMENT, capture_output=True
    )
    if known.returncode:
        told = program(world, asked, expect=2).stderr
        assert told.count("\n") == 1
        assert 'pip install "kelp-slicer[dask]"' in told
        assert not (world / "there").exists()
    else:
        program(world, asked)
        assert list((world / "there").glob("*-stats-*.json"))
