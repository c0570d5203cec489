"""What `--sahi True` and `kelp predict` do where nothing else is said: the recipe of the bundle."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from bundles import tiny_bundle, use_pixel_network
from world import coast, write_tif

import kelp
from kelp.cli import main
from kelp.config import TrainConfig
from kelp.config.base import read_yaml
from kelp.errors import ConfigError
from kelp.inference.bundle import load_bundle
from kelp.inference.predictor import sliced
from kelp.nn.model import ARCHITECTURES
from kelp.nn.training.plan import network_spec
from kelp.raster.masks import read_mask

RECIPE = {"prediction_tile": 48, "prediction_overlap": 8}


def config_of(**options):
    return TrainConfig(data_dir="d", metadata_fp="t.parquet", output_dir="o", **options)


def recipe(config):
    return config.image_size, config.resize_strategy, config.interpolation, config.random_crops


@pytest.mark.parametrize("yes", [True, "True", "true", "1", "y", "yes", "t", "on"])
def test_sahi_brings_its_own_defaults_however_it_is_written(yes):
    assert recipe(config_of(sahi=yes)) == (224, "resize", "bilinear", True)


@pytest.mark.parametrize("no", [False, "False", "n", "off", "0"])
def test_whole_images_have_theirs(no):
    assert recipe(config_of(sahi=no)) == recipe(config_of()) == (352, "pad", "nearest", False)


def test_explicit_options_win_over_the_defaults_of_sahi():
    given = config_of(sahi=True, image_size=256, interpolation="nearest", random_crops=False)
    assert (given.image_size, given.interpolation, given.random_crops) == (256, "nearest", False)
    with pytest.raises(ConfigError, match="random_crops"):
        config_of(random_crops=True)


def test_training_on_resized_tiles_leaves_the_recipe_in_the_bundle():
    spec = network_spec(config_of(sahi=True), (128, 128))
    assert (spec.prediction_tile, spec.prediction_overlap) == (352, 64)
    assert spec.at_scale(352).network_shape((352, 352)) == (640, 640)  # 616, rounded up
    assert spec.at_scale(192).network_shape((192, 192)) == (352, 352)  # 336, rounded up
    assert spec.at_scale(352).at_scale(352) == spec.at_scale(352)
    for other in (config_of(), config_of(sahi=True, resize_strategy="pad")):
        assert network_spec(other, (128, 128)).prediction_tile is None


class Sizes(torch.nn.Module):
    """Notes what the network is shown."""

    seen: ClassVar[list[tuple[int, ...]]] = []  # of the class: networks are copied

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        return x[:, :1] + self.weight


@pytest.fixture
def sizes(monkeypatch, tmp_path):
    body = Sizes()
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: body)
    return body, load_bundle(tiny_bundle(tmp_path / "bundle", **RECIPE))


def test_prediction_cuts_the_recipes_tiles_at_the_trainings_scale(sizes):
    body, bundle = sizes
    scene = coast((80, 90), np.random.default_rng(0))[0]
    body.seen.clear()
    kelp.predict_array(bundle, scene, batch_size=1, precision="32-true")
    assert set(body.seen) == {(96, 96)}  # 48 px, twice as large as in training
    assert len(body.seen) == 2 * 3
    body.seen.clear()
    kelp.predict_array(bundle, scene, tile=48, batch_size=1, precision="32-true")
    assert set(body.seen) == {(64, 64)}  # a wish is brought to the network's size
    assert sliced([bundle], None, 4)[1:] == ((48, 48), (4, 4))
    assert sliced([bundle], None, None)[1:] == ((48, 48), (8, 8))
    assert sliced([bundle], 32, None)[1:] == ((32, 32), (16, 16))


def test_bundles_of_different_recipes_need_a_tile(sizes, tmp_path):
    _, bundle = sizes
    other = load_bundle(tiny_bundle(tmp_path / "other"))
    with pytest.raises(ConfigError, match="sahi_tile_size"):
        sliced([bundle, other], None, None)
    assert len(sliced([bundle, other], 32, None)[0]) == 2


def test_a_recorded_prediction_makes_the_same_again(monkeypatch, tmp_path):
    use_pixel_network(monkeypatch)
    bundle = tiny_bundle(tmp_path / "bundle", **RECIPE)
    write_tif(
        tmp_path / "in" / "AA000001_satellite.tif", coast((80, 90), np.random.default_rng(0))[0]
    )
    argv = ["predict", "--data_dir", str(tmp_path / "in"), "--run_dir", str(bundle)]
    assert main([*argv, "--output_dir", str(tmp_path / "one")]) == 0
    record = tmp_path / "one" / "kelp-predict.yaml"
    assert read_yaml(record)["sahi_tile_size"] is None  # the bundle says it
    again = ["predict", "--config", str(record), "--output_dir", str(tmp_path / "two")]
    assert main(again) == 0
    name = "AA000001_kelp.tif"
    np.testing.assert_array_equal(
        read_mask(tmp_path / "one" / name), read_mask(tmp_path / "two" / name)
    )
    assert main([*argv, "--output_dir", str(tmp_path / "three"), "--sahi_tile_size", "48"]) == 0
    assert read_yaml(tmp_path / "three" / "kelp-predict.yaml")["sahi_tile_size"] == 48


def test_an_onnx_file_takes_the_recipes_tiles(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    use_pixel_network(monkeypatch)
    bundle = tiny_bundle(tmp_path / "bundle", **RECIPE)
    file = tmp_path / "kelp.onnx"
    assert main(["export", "--run_dir", str(bundle), "--output_path", str(file)]) == 0
    onnx = load_bundle(file)
    assert (onnx.spec.tile_size, onnx.spec.prediction_overlap) == ((48, 48), 8)
    scene = coast((80, 90), np.random.default_rng(0))[0]
    ours, theirs = (
        kelp.predict_array(one, scene, precision="32-true") for one in (load_bundle(bundle), onnx)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
