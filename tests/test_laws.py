"""The laws of kelp on pixels, each against the fault that would break it.

1 reflection, 3 averages of probabilities, 5 same bytes, 6 memory, 7 no leakage, 10 train =
predict. Those on files are in test_laws_files.py; what else a law asks is in its module's tests.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import STATISTICS, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS, biased_bundle, predict, rasters, use_ramp_network, write_scenes
from world import coast, make_world, read_tif, write_tif

import kelp
from kelp.bands import BANDS, DEM, NODATA, QA, canonical, observed
from kelp.config import StatsConfig, TrainConfig
from kelp.grid import TileGrid
from kelp.nn import symmetry
from kelp.nn.bundle import Bundle, load_bundle, save_bundle
from kelp.nn.datamodule import read_fold
from kelp.nn.dataset import Source, TileDataset, collate
from kelp.nn.inference.engine import Engine, Slicing
from kelp.nn.inference.network import Network
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import run_statistics
from kelp.nn.training.task import KelpTask
from kelp.progress import silent
from kelp.raster import read_mask, write_mask
from kelp.scene import Scene
from kelp.stats import ChannelStats, StatsFile, compute_stats

CPU = torch.device("cpu")
NIR = BANDS.index("NIR")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Law 5 is about a fixed number of threads, and the other tests are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ramp(monkeypatch):
    use_ramp_network(monkeypatch)


class Memory:
    """An array as source and sink of the engine."""

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, pixels.shape[1:]
        self.result = np.full(self.shape, -1, np.float32)

    def read(self, tile):
        return self.pixels[:, *tile.slices]

    def write(self, y, rows):
        self.result[y : y + len(rows)] = rows

    def close(self):
        pass


def run_engine(network, pixels, tile, overlap, **options):
    job = Memory(pixels)
    engine = Engine(network, Slicing(tile, overlap, **options))
    engine.run(job, job)
    engine.finish()
    return job.result


# --- law 1: a scene smaller than a tile is reflected up to it


def mirrored(size, side):
    """Which pixel of an axis of `size` each of `side` shows: 0 1 2 1 0 1 … for three."""
    period = max(1, 2 * (size - 1))
    steps = np.arange(max(size, side)) % period
    return np.minimum(steps, period - steps)


@settings(LAWS, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    tile=st.tuples(st.integers(8, 15), st.integers(8, 15)),
)
def test_the_network_sees_small_scenes_reflected(shape, tile):
    pixels = canonical(np.random.default_rng(0).integers(1, 65535, (7, *shape)))
    pixels[QA] = 0
    seen = []

    def network(batch):
        seen.append(batch[0].copy())
        return np.zeros((1, *tile), np.float32)

    run_engine(network, pixels, tile, (3, 5), batch_size=1)
    rows, columns = (mirrored(*sides) for sides in zip(shape, tile, strict=True))
    whole = pixels[:, rows[:, None], columns]
    expected = [whole[:, *t.slices] for t in TileGrid(shape, tile, (3, 5))]
    np.testing.assert_array_equal(seen, expected)


# --- merging: a tile's vote weighs by the share of observed input it had


@settings(LAWS, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), qa_as_nodata=st.booleans())
def test_a_tile_votes_by_its_observed_share(seed, qa_as_nodata):
    rng = np.random.default_rng(seed)
    shape, tile, overlap = (30, 37), (12, 10), (7, 6)
    pixels = canonical(rng.integers(1, 65535, (7, *shape)))
    pixels[QA] = rng.random(shape) < rng.random(shape[1])  # clouds: denser in some columns
    pixels[NIR][rng.random(shape) < rng.random(shape[0])[:, None]] = np.nan
    seen = observed(pixels, qa_as_nodata)
    votes, weights, answers = np.zeros(shape), np.zeros(shape), []
    for t in TileGrid(shape, tile, overlap):
        share = seen[t.slices].mean()
        if share:
            answers.append(rng.random())
            votes[t.slices] += share * answers[-1]
            weights[t.slices] += share
    said = iter(answers)

    def network(batch):
        return np.full((1, *tile), next(said), np.float32)

    options = {"batch_size": 1, "qa_as_nodata": qa_as_nodata}
    result = run_engine(network, pixels, tile, overlap, **options)
    with np.errstate(invalid="ignore"):
        expected = np.where(seen, votes / weights, np.nan)
    np.testing.assert_allclose(result, expected, atol=2e-3)  # weights are counted in 2^-12


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
    views = [symmetric_views(bundle.net, raw) for bundle in bundles]
    assert {len(v) for v in views} == {symmetries}
    assert min(np.ptp(v, axis=0).max() for v in views) > 0.2  # they disagree
    parts = [v[0] if merge is None else MERGES[merge](v) for v in views]
    assert np.ptp(parts, axis=0).max() > 0.2
    got = Network(bundles, CPU, "32-true", merge)(raw[None])
    np.testing.assert_allclose(got[0], np.mean(parts, axis=0), atol=1e-6)


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
    p = kelp.predict_array(Bundle(root, spec, net.eval()), raw, device="cpu", precision="32-true")
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
from kelp.nn.inference.network import Network
from kelp.nn.inference.predict import predict_scenes

torch.set_num_threads(1)
answer, batches = Network.__call__, 0


def dying(network, raw):
    global batches
    batches += 1
    if batches == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(network, raw)


Network.__call__ = dying
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
    answer, whole = Network.__call__, rasters(undisturbed)
    for last in count():
        out, batches = tmp_path / str(last), iter(range(last))

        def failing(network, raw, batches=batches):
            if next(batches, None) is None:
                raise RuntimeError("a bug")
            return answer(network, raw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Network, "__call__", failing)
            try:
                predict(scenes[0].parent, bundle, out, **SLICES)
            except RuntimeError:
                pass
            else:
                break
        left = rasters(out)
        assert left.items() <= whole.items()
        assert {path.name for path in out.iterdir()} == set(left)
        if last % 2:  # half of them: each costs a whole run
            continue
        predict(scenes[0].parent, bundle, out, **SLICES)
        assert rasters(out) == whole
    assert last >= 5  # there were that many batches to stop at


# --- law 6: memory grows with width x tile, not with height x width


class Coastline:
    """A scene that is never in memory: 64 px wide, any height, clouds in places."""

    def __init__(self, height):
        self.shape = (height, 64)
        self.rows = 0

    def read(self, tile):
        pixels = np.full((7, tile.height, tile.width), 9000, np.float32)
        pixels[QA] = 0
        pixels[QA, :, : tile.y % 64] = 1
        return pixels

    def write(self, y, rows):
        assert y == self.rows
        self.rows += len(rows)

    def close(self):
        assert self.rows == self.shape[0]


def peak_memory(height):
    scene = Coastline(height)
    engine = Engine(lambda batch: batch[:, NIR] / 65535, Slicing((32, 32), (16, 16)))
    gc.collect()
    tracemalloc.start()
    try:
        engine.run(scene, scene)
        engine.finish()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_height():
    peak_memory(200)  # what the first run alone brings in
    short, tall = 2_000, 20_000
    grown = peak_memory(tall) - peak_memory(short)
    # Where tiles begin is kept, a number a row of tiles; any plane of the scene would be more.
    smallest_plane = (tall - short) * 64
    assert grown < smallest_plane / 2


# --- law 7: the statistics that kelp computes never see the validation fold


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), n_train=5, n_test=1, shape=(9, 13))


def fold_statistics(data_dir, table):
    """The fold's statistics by both roads: `kelp stats`, and training's own."""
    common = {"metadata_fp": table, "cv_split": 0, "output_dir": table.parent}
    made = compute_stats(
        StatsConfig(data_dir=data_dir / "train", spectral_indices="NDVI", workers=1, **common)
    )
    config = TrainConfig(data_dir=data_dir, spectral_indices="NDVI", **common)
    own = run_statistics(config, read_fold(config).train_sources, silent)
    return StatsFile.load(made.path).channels, own.file.channels


@settings(LAWS, max_examples=12)
@given(
    fold=st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda f: 0 < sum(f) < 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_validation_pixels_move_no_statistic(world, tmp_path_factory, fold, seed):
    root = tmp_path_factory.mktemp("fold")
    rows = pd.read_parquet(world.table)
    rows["split_0"] = [*("val" if v else "train" for v in fold), "test"]
    rows.to_parquet(root / "table.parquet")
    before = fold_statistics(world.data_dir, root / "table.parquet")
    assert before[0] == before[1]

    def changed(parts, name):
        shutil.copytree(world.data_dir, root / name)
        rng = np.random.default_rng(seed)
        for i in np.flatnonzero(rows["split_0"].isin(parts)):
            pixels = rng.integers(-40_000, 80_000, (7, 9, 13)).astype(np.int32)
            pixels[QA] = rng.random((9, 13)) < 0.5
            write_tif(root / name / rows["image_path"][i], pixels)
        return fold_statistics(root / name, root / "table.parquet")

    assert changed(["val", "test"], "unseen") == before
    assert changed(["train"], "seen") != before


# --- law 10: training sees what prediction sees


def body_inputs(net, work):
    """What a network's body is given while `work` runs."""
    seen = []
    hook = net.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        work()
    finally:
        hook.remove()
    return torch.cat(seen)


def any_tile(rng, shape):
    """Stored numbers of every kind: missing, saturated, negative, clouds, unknown elevation."""
    raw = rng.integers(-500, 65536, (7, *shape)).astype(np.int32)
    raw[QA] = rng.random(shape) < 0.3
    raw[DEM] = rng.choice([-3, 0, 0, 40], shape)
    raw[rng.random(raw.shape) < 0.2] = NODATA
    raw[:5, :2] = 9000  # enough to be worth predicting
    raw[QA, :2] = 0
    return raw


@settings(LAWS, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    tile=st.sampled_from([(32, 32), (24, 40)]),
    augment=st.booleans(),
    changes=st.fixed_dictionaries(
        {
            "resize_strategy": st.sampled_from(["pad", "resize"]),
            "interpolation": st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"]),
            "normalization_strategy": st.sampled_from(["quantile", "z-score", "min-max"]),
            "fill_missing_pixels_with_torch_nan": st.booleans(),
            "mask_using_qa": st.booleans(),
            "mask_using_water_mask": st.booleans(),
            "spectral_indices": st.sampled_from([(), ("NDVI", "DEMWM")]),
        }
    ),
)
def test_training_sees_what_prediction_sees(tmp_path_factory, seed, tile, augment, changes):
    root, rng = tmp_path_factory.mktemp("tile"), np.random.default_rng(seed)
    paths = [write_tif(root / f"{i}.tif", any_tile(rng, tile)) for i in range(3)]
    write_mask(root / "mask.tif", rng.integers(0, 2, tile).astype(np.uint8))
    indices = {"NDVI": ChannelStats(-1, 1, 0, 0.3, -0.4, 0.6, 1000, 0), "DEMWM": STATISTICS["QA"]}
    spec = tiny_spec(tile_size=tile, statistics=STATISTICS | indices, **changes)
    with pytest.MonkeyPatch.context() as patch:
        use_ramp_network(patch)
        net = KelpNet(spec)
    config = TrainConfig(data_dir=root, metadata_fp=root, output_dir=root, augment=augment)
    task = KelpTask(net, config)
    task.log = lambda *args, **kwargs: None  # there is no trainer that listens
    batch = collate(TileDataset([Source(path, root / "mask.tif") for path in paths]))
    trained = body_inputs(net.train(), lambda: task.training_step(batch, 0))
    validated = body_inputs(net, lambda: task.validation_step(batch, 0))

    network = Network([Bundle(root, spec, net.eval())], CPU, "32-true")

    def predicted():
        engine = Engine(network, Slicing(tile, (0, 0), batch_size=len(paths)))
        for path in paths:
            with Scene(path) as scene:
                engine.run(scene, Memory(np.empty((7, *tile))))
        engine.finish()

    seen = body_inputs(net, predicted)
    assert torch.equal(validated, seen)
    if not augment:
        assert torch.equal(trained, seen)
        return
    allowed = symmetry.SYMMETRIES if tile[0] == tile[1] else symmetry.SHAPE_KEEPING
    turned = [symmetry.apply(batch.raw, k).numpy() for k in allowed]
    views = torch.stack([body_inputs(net, lambda raw=raw: network(raw)) for raw in turned])
    assert torch.equal(views[0], seen)
    for i, one in enumerate(trained):
        assert any(torch.equal(one, view) for view in views[:, i])
