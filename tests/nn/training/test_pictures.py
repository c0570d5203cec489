"""Pictures of a run: the same samples at every epoch, and training that does not notice."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import mlflow_client, tiny_spec
from nn.training.test_training import Stop, only_run, stop_at
from safetensors.torch import load_file
from slicing_world import config as slicing
from world import coast, rgb_of, write_tif

import kelp
from kelp.config import TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.inference.bundle import load_bundle
from kelp.nn.bundle import model_card
from kelp.nn.metrics import from_matrix
from kelp.nn.training import checkpoint
from kelp.nn.training.checkpoint import SPEED, WAITING
from kelp.nn.training.fit import train
from kelp.nn.training.pictures import SET_SIZE, Album, choose
from kelp.plotting import charts

EPOCHS = 3


@pytest.fixture(scope="module")
def options(world, tmp_path_factory):
    """A network of 64 px with dropout, which draws random numbers while it trains."""
    table = slice_dataset(slicing(world, output_dir=tmp_path_factory.mktemp("sahi"))).table
    return {
        "data_dir": table.parent,
        "metadata_fp": table,
        "sahi": True,
        "num_workers": 0,
        "batch_size": 4,
        "image_size": 64,
        "precision": "32-true",
        "encoder": "tu-test_resnet",
        "architecture": "fpn",
        "pretrained": False,
        "use_weighted_sampler": True,
        "samples_per_epoch": 8,
        "epochs": EPOCHS,
        "min_dice": 0,
        "spectral_indices": "NDVI,DEMWM",
        "lr": 3e-3,
    }


@pytest.fixture(scope="module")
def run(options, new_store, tmp_path_factory):
    """A complete run with pictures that several tests look at."""
    return train(TrainConfig(**options, output_dir=new_store(tmp_path_factory.mktemp("a") / "b")))


def pictures(run_dir):
    folder = run_dir / "artifacts"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


# --- the samples


def rows_of(kelp, images=None, **facts):
    images = images or [f"image{k}" for k in range(len(kelp))]
    return pd.DataFrame({"tile_id": images, "kelp_pixels": kelp} | facts)


def test_samples_have_much_kelp_some_and_none():
    kelp = [0, 5, 10, 900, 20, 800, 30, 700, 40, 0, 50, 0]
    water = [1.0] * 9 + [0.4, 1.0, 0.0]
    numbers = choose(rows_of(kelp, water_pixels_pct=water), None, 1)
    assert [kelp[i] for i in numbers] == [900, 800, 700, 50, 40, 0]
    assert numbers[-1] == 9  # of those without, the one at the shore
    assert choose(rows_of(kelp), None, 0) == []


def test_samples_are_of_different_images_where_there_are_enough():
    kelp = [90, 80, 70, 60, 50, 40, 30, 0, 0]
    images = list("aaabbbcdd")
    numbers = choose(rows_of(kelp, images), None, 1)
    assert {images[i] for i in numbers} == set("abcd")
    assert {0, 3, 6} <= set(numbers)  # the most of each
    one = choose(rows_of(kelp, ["a"] * 9), None, 1)
    assert len(set(one)) == 6


def test_a_second_set_leaves_the_first_as_it_was():
    rng = np.random.default_rng(0)
    rows = rows_of(rng.integers(0, 9, 40).tolist(), [f"image{k % 9}" for k in range(40)])
    first, three = choose(rows, None, 1), choose(rows, None, 3)
    assert three[:6] == first
    assert len(set(three)) == 18
    assert sorted(choose(rows.iloc[:4], None, 3)) == [0, 1, 2, 3]


def test_tables_without_counts_are_counted():
    kelp = [0, 3, 8, 1, 0, 9]
    data = [SimpleNamespace(target=torch.tensor([1] * n + [0, 255])) for n in kelp]
    rows = rows_of(kelp)
    expected = choose(rows, None, 1)
    assert choose(rows.drop(columns="kelp_pixels"), data, 1) == expected
    assert choose(rows.assign(kelp_pixels=[None, *kelp[1:]]), data, 1) == expected


def test_choosing_is_quick_where_there_are_many():
    rng = np.random.default_rng(0)
    rows = rows_of(rng.integers(0, 2, 60_000).tolist(), [f"i{k // 9}" for k in range(60_000)])
    assert len(choose(rows, None, 2)) == 12
    assert SET_SIZE == 6


# --- a run


def test_what_is_drawn(run):
    drawn = pictures(run.run_dir)
    best = {name for name in drawn if name.startswith("samples/best/")}
    assert len(best) == 6
    assert all("_satellite_" in name for name in best)
    assert set(drawn) - best == {
        "samples/epoch-001.png",
        "samples/epoch-002.png",
        "samples/epoch-003.png",
        "samples/inputs.png",
        "curves.png",
        "confusion_matrix.png",
    }
    sheets = [drawn[f"samples/epoch-{k:03d}.png"] for k in (1, 2, 3)]
    assert len(set(sheets)) == 3  # it learned, and so they differ
    assert len({rgb_of(sheet).shape for sheet in sheets}) == 1
    assert max(len(sheet) for sheet in sheets) < 300_000


CELLS = (("true", "negative"), ("false", "positive"), ("false", "negative"), ("true", "positive"))


def test_counts_of_every_epoch(run):
    content = json.loads((run.run_dir / "artifacts" / "confusion_matrix.json").read_text())
    assert content["epoch"] == run.epoch
    assert [counts["epoch"] for counts in content["epochs"]] == [1, 2, 3]
    history = json.loads((run.run_dir / "artifacts" / "history.json").read_text())
    for counts, metrics in zip(content["epochs"], history, strict=True):
        numbers = {name: value for name, value in counts.items() if name != "epoch"}
        cells = [numbers[f"{of}_{what}"] for of, what in CELLS]
        assert from_matrix(cells).dice == pytest.approx(metrics["val/dice"], abs=1e-6)
        assert {name: content[name] for name in numbers} == numbers or counts["epoch"] != run.epoch


def test_the_speed_is_in_mlflow_and_not_in_the_history(run):
    mlflow = mlflow_client(run.run_dir.parent.parent)
    for name, most in ((SPEED, 1e6), (WAITING, 1)):
        curve = mlflow.get_metric_history(run.run_id, name)
        assert [point.step for point in curve] == [1, 2, 3]
        assert all(0 < point.value < most for point in curve)
    assert SPEED not in (run.run_dir / "artifacts" / "history.json").read_text()


def test_what_validation_predicts_is_what_is_drawn(run, options, new_store, tmp_path, monkeypatch):
    """It is taken over where it can be; predicted again it is the same."""
    monkeypatch.setattr(Album, "take", lambda *args: None)
    again = train(TrainConfig(**options, output_dir=new_store(tmp_path / "runs")))
    assert again.scores == run.scores
    ours, theirs = pictures(run.run_dir), pictures(again.run_dir)
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = rgb_of(ours[name]), rgb_of(theirs[name])
        assert (a != b).any(axis=-1).mean() < 1e-3, name  # other batches, other roundings
    (weights,) = {
        (r.run_dir / "artifacts" / "bundle-latest" / "weights.safetensors").read_bytes()
        for r in (run, again)
    }
    assert weights


def test_training_does_not_notice(run, options, new_store, tmp_path):
    """Not a bit of the weights depends on the pictures."""
    config = TrainConfig(**options, plot_n_batches=0, output_dir=new_store(tmp_path / "runs"))
    without = train(config)
    assert set(pictures(without.run_dir)) == {"curves.png", "confusion_matrix.png"}
    assert without.scores == run.scores
    for name in ("bundle", "bundle-latest"):
        a, b = (
            (result.run_dir / "artifacts" / name / "weights.safetensors").read_bytes()
            for result in (run, without)
        )
        assert a == b


def test_a_picture_that_disturbs_would_be_noticed(run, options, new_store, tmp_path, monkeypatch):
    """Planted fault: the network stays as it was set for the picture, without dropout."""
    draw = Album.draw_epoch

    def disturbing(self, net, epoch, words):
        torch.rand(1)
        net.body.decoder.dropout.p = 0.0
        return draw(self, net, epoch, words)

    monkeypatch.setattr(Album, "draw_epoch", disturbing)
    result = train(TrainConfig(**options, output_dir=new_store(tmp_path / "runs")))
    a, b = (
        load_file(r.run_dir / "artifacts" / "bundle-latest" / "weights.safetensors")
        for r in (run, result)
    )
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_stopped_run_goes_on_with_the_same_pictures(run, options, new_store, tmp_path):
    config = TrainConfig(**options, output_dir=new_store(tmp_path / "runs"))
    steps = 2  # of an epoch
    with pytest.raises(Stop):
        train(config, progress=stop_at(steps + 1))
    run_dir = only_run(config)
    assert {"samples/epoch-001.png", "samples/inputs.png"} == set(pictures(run_dir))
    train(config.model_copy(update={"resume_from": run_dir}))
    assert pictures(run_dir) == pictures(run.run_dir)


def test_a_run_with_nothing_left_to_train_is_drawn_all_the_same(
    run, options, new_store, tmp_path, monkeypatch
):
    config = TrainConfig(**options, output_dir=new_store(tmp_path / "runs"))
    publish = checkpoint.BundleCheckpoint.publish

    def stopped(self):
        raise Stop

    monkeypatch.setattr(checkpoint.BundleCheckpoint, "publish", stopped)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.setattr(checkpoint.BundleCheckpoint, "publish", publish)
    run_dir = only_run(config)
    shutil.rmtree(run_dir / "artifacts" / "samples")
    train(config.model_copy(update={"resume_from": run_dir}))
    left = pictures(run_dir)
    assert f"samples/epoch-{run.epoch:03d}.png" in left  # the best epoch's, at least
    assert all(pictures(run.run_dir)[name] == png for name, png in left.items())


def test_whole_images_of_different_sizes(options, world, new_store, tmp_path):
    root = tmp_path / "world"
    shutil.copytree(world.data_dir.parent, root)
    table = pd.read_parquet(root / "processed" / world.table.name)
    row = table[table["split_0"] == "val"].iloc[0]
    image, mask = coast((64, 96), np.random.default_rng(3))
    write_tif(root / "raw" / row["image_path"], image)
    write_tif(root / "raw" / row["mask_path"], mask[np.newaxis])
    changes = {
        "data_dir": root / "raw",
        "metadata_fp": root / "processed" / world.table.name,
        "sahi": False,
        "resize_strategy": "pad",
        "image_size": 96,
        "epochs": 1,
        "output_dir": new_store(tmp_path / "runs"),
        "plot_n_batches": 2,
    }
    result = train(TrainConfig(**options | changes))
    drawn = pictures(result.run_dir)
    assert "samples/epoch-001.png" in drawn
    assert len([name for name in drawn if "best/" in name]) == 2  # all that there are


@pytest.mark.parametrize(("epochs", "sheets"), [(1, 1), (20, 20), (21, 11), (50, 17), (400, 20)])
def test_long_runs_keep_about_twenty_sheets(epochs, sheets):
    config = SimpleNamespace(epochs=epochs)
    album = SimpleNamespace(config=config, tiles=[1])
    drawn = [k for k in range(1, epochs + 1) if Album.draws(album, k, is_last=False)]
    assert len(drawn) == sheets
    assert drawn[0] == 1
    assert len(set(np.diff(drawn).tolist())) <= 1  # evenly
    assert Album.draws(album, epochs, is_last=True)
    assert not Album.draws(SimpleNamespace(config=config, tiles=[]), 1, is_last=True)


def test_another_store_gets_the_pictures_in_their_folder(options, new_store, tmp_path, monkeypatch):
    store = new_store(tmp_path / "elsewhere")
    mlflow = mlflow_client(store)
    mlflow.create_experiment("kelp", artifact_location=(store / "files").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    config = TrainConfig(**options | {"epochs": 1}, output_dir=tmp_path / "runs")
    result = train(config)
    copy = {
        path.relative_to(
            store / "files" / result.run_id / "artifacts"
        ).as_posix(): path.read_bytes()
        for path in (store / "files").rglob("*.png")
    }
    assert copy == pictures(result.run_dir)


def test_the_best_epoch_is_marked():
    history = {"val/dice": [(1, 0.2), (2, 0.6), (3, 0.5)]}
    plain, first, second = (charts.curves(history, best) for best in (None, 1, 2))
    assert len({plain, first, second}) == 3


# --- the model card


def test_the_card_says_what_the_network_learned_from(run, options):
    card = (run.bundle / "README.md").read_text()
    rows = load_bundle(run.bundle).spec.rows
    assert rows == {"train": 12, "val": 12}
    for part in (
        f"| Trained on | {options['data_dir']}, fold 0 of {options['metadata_fp']}: "
        "12 tiles, validated on 12 others |",
        "| Started from | random weights |",
        "| Loss | dice |",
        "| Optimizer | adamw, rate 0.003, weight decay 0.0001 |",
        "| Steps | at most 3 epochs, batches of 4; 32-true |",
        "| Samples | 8 drawn by weight each epoch |",
        "| Augmentation | turned and mirrored, cut anywhere near their place |",
        "| Seed | 42 |",
        f"kelp {kelp.__version__}",
        f"Of epoch {run.epoch}, pooled",
        f"- val/dice: {run.score:.4f}",
    ):
        assert part in card


def test_the_card_of_other_options_and_of_older_runs():
    options = {
        "encoder_weights": "imagenet",
        "lr_scheduler": "onecycle",
        "ema_decay": 0.99,
        "devices": 4,
        "augment_gain": 0.1,
        "random_crops": False,
    }
    card = model_card(tiny_spec(training=options, rows={"train": 1234, "val": 5}), "bundle.json")
    for part in (
        "unknown, fold ?: 1,234 tiles, validated on 5 others",
        "weights imagenet",
        "rate 0.0003, onecycle",
        "batches of 32, 4 processes; bf16-mixed",
        "each row once an epoch",
        "turned and mirrored, gain 0.1 |",
        "| Average of weights | EMA 0.99 |",
    ):
        assert part in card
    assert "Optimizer" not in model_card(tiny_spec(training={"lr": 1}), "bundle.json")
