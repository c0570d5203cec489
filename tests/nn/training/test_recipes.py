"""The recipes of `configs/` are complete, and run on a tiny data set."""

import shlex
from pathlib import Path

import pytest
from test_seed import TRAIN
from world import make_world

import kelp
from kelp.cli import build_command, main
from kelp.config import SliceConfig, TrainConfig
from kelp.config.base import read_yaml
from kelp.data_prep.slicing import slice_dataset
from kelp.inference.bundle import load_bundle
from kelp.raster.bands import BANDS

RECIPES = Path(kelp.__file__).parent.parent / "configs"
PLACES = {"data_dir": "d", "metadata_fp": "m", "output_dir": "o"}
OF_A_DATA_SET = {*PLACES, "dataset_stats_fp", "cv_split"}


def test_the_seeds_recipe_says_what_its_command_says():
    words = shlex.split(TRAIN.replace("\\\n", " ").replace("$(FOLD_NUMBER)", "0"))
    flags = build_command("train").make_context("train", words[2:]).params
    given = {k: v for k, v in flags.items() if v is not None and k in TrainConfig.model_fields}
    given = {name: value for name, value in given.items() if name not in OF_A_DATA_SET}
    assert len(given) > 30
    recipe = TrainConfig.load(RECIPES / "sahi_seed.yaml", PLACES)
    command = TrainConfig(**given, **PLACES)
    assert {name: getattr(recipe, name) for name in given} == {
        name: getattr(command, name) for name in given
    }
    # Said outright, so that other defaults would not change the recipe.
    assert set(given) | {"random_crops"} <= set(read_yaml(RECIPES / "sahi_seed.yaml"))
    assert not recipe.random_crops


def test_the_competitions_recipe():
    recipe = TrainConfig.load(RECIPES / "kelp_wanted_best.yaml", PLACES)
    assert (recipe.encoder, recipe.image_size) == ("tu-efficientnet_b5", 352)
    assert len(recipe.spectral_indices) == 17
    assert recipe.lr_scheduler == "onecycle"
    assert recipe.use_weighted_sampler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sahi_seed", "kelp_wanted_best"])
def test_recipes_run(tmp_path, name):
    world = make_world(tmp_path, n_train=4, shape=(50, 70))
    data_dir, table = world.data_dir, world.table
    if name == "sahi_seed":
        data_dir = tmp_path / "sahi"
        table = slice_dataset(
            SliceConfig(
                data_dir=world.train_dir,
                metadata_fp=table,
                image_size=32,
                workers=1,
                output_dir=data_dir,
            )
        ).table
    paths = {
        "config": RECIPES / f"{name}.yaml",
        "data_dir": data_dir,
        "metadata_fp": table,
        "output_dir": tmp_path / "mlruns",
    }
    arguments = (
        "--fast_dev_run True --pretrained False --quiet "
        # Smaller than the recipe, but in nothing that it is about.
        "--encoder tu-test_resnet --image_size 96 --batch_size 2 --num_workers 0 "
        "--plot_n_batches 0 --precision 32-true"
    )
    given = [f"--{option}={path}" for option, path in paths.items()]  # paths may have spaces
    assert main(["train", *given, *arguments.split()]) == 0
    (run_dir,) = (tmp_path / "mlruns" / "kelp").iterdir()
    spec = load_bundle(run_dir).spec
    assert spec.sahi == (name == "sahi_seed")
    assert set(spec.channels) >= set(BANDS)
    assert len(spec.channels) == (7 if spec.sahi else 24)
