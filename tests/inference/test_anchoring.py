"""Prediction shows a network the scene that training showed it: anchored, whatever the windows."""

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from world import coast, write_tif

import kelp
from kelp.config import PredictConfig
from kelp.errors import ConfigError
from kelp.inference.bundle import load_bundle
from kelp.inference.predict import predict_scenes
from kelp.inference.predictor import Predictor, predict_array
from kelp.raster.masks import read_probability
from kelp.raster.scene import read_scene
from kelp.raster.water import WaterReference
from kelp.raster.window import Tile


@pytest.fixture
def bundles(tmp_path, monkeypatch):
    """The same network twice: it expects anchored scenes, and scenes as they are."""
    use_pixel_network(monkeypatch)
    return {
        anchoring: load_bundle(tiny_bundle(tmp_path / anchoring, anchoring=anchoring))
        for anchoring in ("local", "constant", "none")
    }


@pytest.fixture
def scene(tmp_path):
    """A coast whose water changes across two cells and more."""
    pixels, _ = coast((90, 760), np.random.default_rng(0))
    ramp = np.linspace(-300, 500, 760).astype(np.int32)
    optical = pixels[:5]
    real = (optical > 0) & (optical < 30_000)
    optical[real] += np.broadcast_to(ramp, optical.shape)[real]
    return write_tif(tmp_path / "scenes" / "AB123456_satellite.tif", pixels)


def anchored(raw, anchoring):
    class Whole:
        shape = raw.shape[1:]

        def read(self, tile):
            return raw[:, *tile.slices]

    reference = WaterReference.estimate(Whole(), anchoring)
    return reference.apply(raw, Tile(0, 0, *raw.shape[1:]))


@pytest.mark.parametrize("anchoring", ["local", "constant"])
@pytest.mark.parametrize("tile", [32, 90, 200])
def test_a_map_is_that_of_the_anchored_scene(bundles, scene, anchoring, tile):
    raw = read_scene(scene)
    kept = raw.copy()
    found = predict_array(bundles[anchoring], raw, tile=tile)
    expected = predict_array(bundles["none"], anchored(raw, anchoring), tile=tile)
    assert found.tobytes() == expected.tobytes()
    assert raw.tobytes() == kept.tobytes()
    # Planted: no anchoring, and each half of the scene by its own water.
    assert found.tobytes() != predict_array(bundles["none"], raw, tile=tile).tobytes()
    halves = [predict_array(bundles[anchoring], half, tile=32) for half in np.split(raw, 2, axis=2)]
    assert np.concatenate(halves, axis=1).tobytes() != found.tobytes()


def test_files_arrays_and_python_agree(bundles, scene, tmp_path):
    expected = predict_array(bundles["local"], read_scene(scene))
    predict_scenes(
        PredictConfig(
            data_dir=scene,
            output_dir=tmp_path / "maps",
            run_dir=(bundles["local"].path,),
            save_probabilities=True,
        )
    )
    (path,) = (tmp_path / "maps").glob("*_prob.tif")
    assert read_probability(path).tobytes() == expected.tobytes()

    class Rows(list):
        def write(self, y, rows):
            self.append(rows.copy())

        def close(self):
            pass

    rows = Rows()
    kelp.predict(bundles["local"], scene, rows)
    assert np.concatenate(rows).tobytes() == expected.tobytes()


def test_networks_that_expect_other_scenes_do_not_go_together(bundles):
    with pytest.raises(ConfigError, match="anchored in different ways"):
        Predictor([bundles["local"], bundles["none"]])
    Predictor([bundles["local"], bundles["local"]])


def test_a_scene_without_water_is_told_of(bundles, caplog):
    raw = np.full((7, 40, 40), 9000, np.float32)
    raw[5], raw[6] = 0, 100
    with caplog.at_level("WARNING", "kelp"):
        found = predict_array(bundles["local"], raw)
    assert "the array: no clear water found (0 px); optical bands are not shifted" in caplog.text
    assert found.tobytes() == predict_array(bundles["none"], raw).tobytes()
