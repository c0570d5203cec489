"""Networks that come with kelp: found by name, taken by default, listed."""

import json
from importlib import resources

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from world import opened, read_tif, write_tif

from kelp.cli import main
from kelp.demo.page import real_scene
from kelp.errors import BundleError
from kelp.inference import bundle as bundles
from kelp.inference.bundle import DEFAULT_NETWORK
from kelp.inference.packaged import models
from kelp.raster.masks import georeference_of, read_mask
from kelp.sensors.record import read_record, record_path


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A folder of packaged networks with two of them."""
    use_pixel_network(monkeypatch)
    folder = tmp_path / "networks"
    tiny_bundle(
        folder / bundles.DEFAULT_NETWORK,
        sensors=("Landsat 7",),
        limits=("It has seen no real label.",),
        scores={"dice": 0.75},
    )
    tiny_bundle(folder / "other", threshold=0.6)
    (folder / "notes").mkdir()
    monkeypatch.setattr("kelp.io.location.PACKAGED", folder)
    monkeypatch.setattr("kelp.inference.packaged.PACKAGED", folder)
    return folder


def test_models_lists_names_sensors_scores_and_limits(networks, capfd):
    assert main(["models"]) == 0
    text = capfd.readouterr().out
    first, second = text.strip().split("\n\n")
    assert first.startswith(f"{bundles.DEFAULT_NETWORK} (default): unet")
    for said in ("Landsat 7", "dice 0.750", "It has seen no real label.", "threshold 0.4"):
        assert said in first
    assert second.startswith("other: unet")
    assert [network.name for network in models().networks] == [bundles.DEFAULT_NETWORK, "other"]


def test_a_name_is_a_network_and_a_folder_of_that_name_comes_first(networks, tmp_path, monkeypatch):
    assert bundles.load_bundle("other").spec.threshold == 0.6
    monkeypatch.chdir(tmp_path)
    tiny_bundle(tmp_path / "other", threshold=0.3)
    assert bundles.load_bundle("other").spec.threshold == 0.3


def test_a_name_that_is_nothing_names_those_that_are():
    with pytest.raises(BundleError, match=r"nowhere: no such folder, and no packaged network.*one"):
        bundles.load_bundle("nowhere")


@pytest.mark.parametrize("named", [[], ["--run_dir", bundles.DEFAULT_NETWORK]])
def test_predict_without_run_dir_takes_the_default_network(networks, tmp_path, capfd, named):
    scene = np.full((7, 40, 40), 8000, dtype=np.int32)
    scene[1, 10:20, 10:20] = 20000  # NIR above red: kelp to this network
    scene[5:] = 0
    folder = tmp_path / "scenes"
    folder.mkdir()
    write_tif(folder / "AA000001_satellite.tif", scene)
    out = tmp_path / "maps"
    assert main(["predict", "--data_dir", str(folder), "--output_dir", str(out), *named]) == 0
    notice = f"network: {bundles.DEFAULT_NETWORK}, which comes with kelp"
    assert (notice in capfd.readouterr().err) is (not named)
    with opened(out / "AA000001_kelp.tif") as dataset:
        mask = dataset.read(1)
    assert mask[12:18, 12:18].all()
    assert not mask[25:].any()


def test_the_packaged_network_maps_the_packaged_real_scene(tmp_path):
    """Without training and without a network's name. Kelp does not grow off Olinda, Brazil."""
    out = tmp_path / "maps"
    with resources.as_file(real_scene()) as scene:
        raw = read_tif(scene)
        assert main(["predict", f"--data_dir={scene}", f"--output_dir={out}", "--quiet"]) == 0
    (path,) = out.glob("*_kelp.tif")
    mask = read_mask(path)
    assert georeference_of(path).crs == "EPSG:31985"
    assert ((mask == 255) == (raw[5] == 1)).all()
    assert (mask == 1).mean() < 0.005
    record = read_record(record_path(path))
    assert record.network[0].name == DEFAULT_NETWORK
    assert record.water.clear_pixels > 10_000
    assert record.guard.ok == (record.kelp_pixels < 100)
    with resources.as_file(real_scene()) as scene:  # the network is found by its name
        assert main(["verify", f"--data_dir={scene}", f"--predictions_dir={out}", "--quiet"]) == 0


def test_the_packaged_network_tells_its_figures_and_is_small_enough_for_the_wheel():
    (network,) = models().networks
    assert network.size <= 40e6
    spec = network.spec
    assert {"val/dice", "val/precision", "val/recall"} == spec.scores.keys()
    assert spec.scores["val/dice"] >= 0.8
    assert len({site.site for site in spec.held_out_sites}) >= 100
    assert spec.guard is not None
    card = (network.path / "README.md").read_text()
    assert "no real label" in card
    assert "Six real tiles" in card
    assert json.loads((network.path / "record.json").read_text())["threshold"] == spec.threshold
