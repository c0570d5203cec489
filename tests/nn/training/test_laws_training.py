"""The laws of kelp on training, each against the fault that would break it.

7 no leakage, 10 train = predict. What else a law asks is in its module's tests.
"""

import shutil
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import STATISTICS, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS, Memory, use_ramp_network
from world import make_world, write_tif

from kelp.config import StatsConfig, TrainConfig
from kelp.config.choices import Normalization
from kelp.data_prep.stats import ChannelStats, StatsFile, compute_stats
from kelp.inference.bundle import Bundle
from kelp.inference.predictor import Predictor
from kelp.nn import symmetry
from kelp.nn.backend import TorchNet
from kelp.nn.data.datamodule import read_fold
from kelp.nn.data.dataset import Source, TileDataset, collate
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import run_statistics
from kelp.nn.training.task import KelpTask
from kelp.progress import silent
from kelp.raster.bands import DEM, NODATA, QA
from kelp.raster.scene import Scene
from kelp.raster.writer import write_mask
from kelp.tiling.engine import Engine, Job
from kelp.tiling.strip import Slicing

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


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
            "normalization_strategy": st.sampled_from(get_args(Normalization)),
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

    network = Predictor(Bundle(root, spec, TorchNet(net.eval())), device="cpu", precision="32-true")

    def predicted():
        engine = Engine(network, Slicing(tile, (0, 0), batch_size=len(paths)))
        engine.run(jobs())

    def jobs():
        for path in paths:
            with Scene(path) as scene:
                yield Job(scene, Memory(np.empty((7, *tile))))

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
