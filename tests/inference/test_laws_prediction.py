"""The laws of kelp on predictions, each against the fault that would break it.

3 averages of probabilities, 5 same bytes. What else a law asks is in its module's tests.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import tiny_spec
from laws import biased_bundle, predict, rasters, write_scenes
from world import coast, read_tif

import kelp
from kelp.errors import ConfigError
from kelp.inference.bundle import Bundle, load_bundle
from kelp.inference.predictor import Predictor
from kelp.nn.backend import TorchNet
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.raster.masks import read_mask
from kelp.raster.validity import canonical

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


# --- law 3: probabilities are averaged, and the threshold is applied once, at the very end

MERGES = {
    "mean": lambda p: p.mean(axis=0),
    "max": lambda p: p.max(axis=0),
    "min": lambda p: p.min(axis=0),
    "gmean": lambda p: np.exp(np.log(p).mean(axis=0)),
}


def symmetric_views(net, raw):
    """What a network says of a tile in each of its symmetries, in the tile's own place."""
    shape = raw.shape[1:]
    place = np.arange(raw[0].size).reshape(shape)
    turned = [np.rot90(p, k) for p in (place, place[:, ::-1]) for k in range(4)]
    views = []
    for moved in (t for t in turned if t.shape == shape):
        x = torch.from_numpy(raw.reshape(len(raw), -1)[:, moved])
        view = np.empty(place.size, np.float32)
        view[moved.ravel()] = net.probabilities(x[None])[0].detach().numpy().ravel()
        views.append(view.reshape(shape))
    return np.stack(views)


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("merge", [None, *MERGES])
@pytest.mark.parametrize(("shape", "symmetries"), [((32, 32), 8), ((24, 40), 4)])
def test_views_and_bundles_are_averaged_as_probabilities(tmp_path, merge, shape, symmetries):
    bundles = [
        load_bundle(biased_bundle(tmp_path / str(bias), bias, tile_size=shape))
        for bias in (-2.5, -0.5, 1.0)
    ]
    raw = canonical(coast(shape, np.random.default_rng(0))[0])
    views = [symmetric_views(bundle.net.module, raw) for bundle in bundles]
    assert {len(v) for v in views} == {symmetries}
    assert min(np.ptp(v, axis=0).max() for v in views) > 0.2  # they disagree
    parts = [v[0] if merge is None else MERGES[merge](v) for v in views]
    assert np.ptp(parts, axis=0).max() > 0.2
    options = {"device": "cpu", "precision": "32-true", "tta": merge}
    got = Predictor(bundles, **options)(raw[None])
    np.testing.assert_allclose(got[0], np.mean(parts, axis=0), atol=1e-6)
    got = Predictor(bundles, **options, weights=(2, 0, 6))(raw[None])
    np.testing.assert_allclose(got[0], np.average(parts, axis=0, weights=(2, 0, 6)), atol=1e-6)


@pytest.mark.usefixtures("ramp")
def test_weights_say_whose_vote_and_threshold_count(tmp_path):
    write_scenes(tmp_path / "s", [(40, 50)])
    a, b = (
        biased_bundle(tmp_path / name, bias, threshold=cut)
        for name, bias, cut in (("a", -2.5, 0.2), ("b", 1.0, 0.9))
    )
    options = {"save_probabilities": True}
    predict(tmp_path / "s", b, tmp_path / "b_alone", **options)
    weighed = predict(tmp_path / "s", (a, b), tmp_path / "weighed", weights=(0, 3), **options)
    for path in (tmp_path / "b_alone").glob("*.tif"):
        np.testing.assert_array_equal(read_tif(path), read_tif(tmp_path / "weighed" / path.name))
    again = predict(tmp_path / "s", (a, b), tmp_path / "weighed", weights=(1, 3), **options)
    assert (weighed.made, again.made) == (1, 1)
    with pytest.raises(ConfigError, match="weights: 3 weights for 2 networks"):
        predict(tmp_path / "s", (a, b), tmp_path / "no", weights=(1, 1, 1))
    with pytest.raises(ConfigError, match="weights: none may be negative"):
        predict(tmp_path / "s", (a, b), tmp_path / "no", weights=(1, -1))


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("threshold", [None, 0.55])
def test_the_threshold_comes_after_tiles_views_and_bundles(tmp_path, threshold):
    write_scenes(tmp_path / "s", [(70, 50), (20, 90)])
    parts = (("a", -2.5, 0.05), ("b", 1.0, 0.97))
    a, b = (biased_bundle(tmp_path / name, bias, threshold=cut) for name, bias, cut in parts)
    options = {"tta": True, "save_probabilities": True, "decision_threshold": threshold}
    for name, bundles in (("pa", a), ("pb", b), ("both", (a, b))):
        predict(tmp_path / "s", bundles, tmp_path / name, **options)
    differ = dict.fromkeys((np.minimum, np.maximum), 0)
    for i in range(2):
        maps = [tmp_path / name / f"AA{i:06d}_kelp.tif" for name in ("pa", "pb", "both")]
        pa, pb, p = (read_tif(path.with_stem(f"{path.stem}_prob"))[0] for path in maps)
        np.testing.assert_allclose(p, (pa + pb) / 2, atol=1e-6)
        *votes, mask = map(read_mask, maps)
        seen = mask < 255
        cut = np.float32(0.51 if threshold is None else threshold)
        np.testing.assert_array_equal(mask[seen], p[seen] >= cut)
        for vote in differ:
            differ[vote] += (mask != vote(*votes))[seen].sum()
    assert min(differ.values()) > 0  # neither vote would have given these masks


# --- law 5: the same bytes, with a real convolutional network

SHAPES = [(64, 64), (90, 70), (40, 50), (20, 90)]
SLICES = {"sahi_overlap": 16, "save_probabilities": True}


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    """A bundle of random weights whose threshold lies amid its probabilities, and scenes."""
    root = tmp_path_factory.mktemp("conv")
    scenes = write_scenes(root / "scenes", SHAPES)
    torch.manual_seed(0)
    spec = tiny_spec(decoder_channels=(16, 8, 8, 4))
    net = KelpNet(spec)
    raw = canonical(read_tif(scenes[1]))
    p = kelp.predict_array(
        Bundle(root, spec, TorchNet(net.eval())), raw, device="cpu", precision="32-true"
    )
    spec = spec.model_copy(update={"threshold": float(np.nanmedian(p))})
    return scenes, save_bundle(root / "bundle", net, spec)


@pytest.fixture(scope="module")
def undisturbed(conv, tmp_path_factory):
    scenes, bundle = conv
    out = tmp_path_factory.mktemp("undisturbed")
    predict(scenes[0].parent, bundle, out, **SLICES)
    masks = [read_mask(out / f"AA{i:06d}_kelp.tif") for i in range(len(SHAPES))]
    assert all(0.1 < (mask == 1).mean() < 0.9 for mask in masks)
    return out


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (2,), (3,), (1, 2)])
def test_other_scenes_and_their_order_change_no_byte(conv, undisturbed, tmp_path, order):
    scenes, bundle = conv
    for place, scene in enumerate(order):
        path = tmp_path / "s" / f"B{place}_satellite.tif"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(scenes[scene], path)
    predict(tmp_path / "s", bundle, tmp_path / "out", **SLICES)
    for place, scene in enumerate(order):
        for kind in ("kelp", "kelp_prob"):
            got = (tmp_path / "out" / f"B{place}_{kind}.tif").read_bytes()
            assert got == (undisturbed / f"AA{scene:06d}_{kind}.tif").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_another_batch_size_moves_next_to_no_pixel(conv, undisturbed, tmp_path, batch_size):
    scenes, bundle = conv
    predict(scenes[0].parent, bundle, tmp_path, **SLICES, batch_size=batch_size)
    moved, pixels = 0, 0
    for path in tmp_path.glob("*_kelp.tif"):
        moved += (read_mask(path) != read_mask(undisturbed / path.name)).sum()
        pixels += read_mask(path).size
    assert pixels == sum(height * width for height, width in SHAPES)
    assert moved <= 1e-4 * pixels


KILLED = """
import os, signal, sys
from pathlib import Path

import torch

from kelp.config import PredictConfig
from kelp.inference.predictor import Predictor
from kelp.inference.predict import predict_scenes

torch.set_num_threads(1)
answer, batches = Predictor.__call__, 0


def dying(network, raw):
    global batches
    batches += 1
    if batches == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(network, raw)


Predictor.__call__ = dying
predict_scenes(PredictConfig.load(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_prediction_ends_with_the_same_bytes(conv, undisturbed, tmp_path):
    scenes, bundle = conv
    out, config = tmp_path / "out", tmp_path / "config.yaml"
    options = {"data_dir": str(scenes[0].parent), "run_dir": str(bundle), "output_dir": str(out)}
    options |= SLICES | {"device": "cpu", "precision": "32-true"}
    config.write_text(json.dumps(options))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-c", KILLED, config],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(kelp.__file__).parents[1])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    finished = rasters(out)
    assert set(finished) == {"AA000000_kelp.tif", "AA000000_kelp_prob.tif"}
    assert list(out.glob(".*"))  # what the dead process was writing
    result = predict(scenes[0].parent, bundle, out, **SLICES)
    assert (result.made, result.skipped) == (3, 1)
    assert rasters(out) == rasters(undisturbed)
    assert not list(out.glob(".*"))


def test_wherever_it_stops_it_goes_on_to_the_same_bytes(conv, undisturbed, tmp_path):
    """Law 8 as well: under a final name lies a finished file or none."""
    scenes, bundle = conv
    answer, whole = Predictor.__call__, rasters(undisturbed)
    for last in count():
        out, batches = tmp_path / str(last), iter(range(last))

        def failing(network, raw, batches=batches):
            if next(batches, None) is None:
                raise RuntimeError("a bug")
            return answer(network, raw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Predictor, "__call__", failing)
            try:
                predict(scenes[0].parent, bundle, out, **SLICES)
            except RuntimeError:
                pass
            else:
                break
        left = rasters(out)
        assert left.items() <= whole.items()
        names = {path.name for path in out.iterdir()}
        assert {name for name in names if not name.endswith("_kelp.json")} == set(left)
        if last % 2:  # half of them: each costs a whole run
            continue
        predict(scenes[0].parent, bundle, out, **SLICES)
        assert rasters(out) == whole
    assert last >= 5  # there were that many batches to stop at
