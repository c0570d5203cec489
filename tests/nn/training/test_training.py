from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import mlflow_client
from safetensors.torch import load_file
from slicing_world import config as slicing
from slicing_world import small_training

import kelp
from kelp.config import StatsConfig, TrainConfig, TuneConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.data_prep.stats import compute_stats
from kelp.errors import ConfigError, InputError, StatsError, TrainingError, WeightsError
from kelp.inference.bundle import load_bundle, read_spec
from kelp.io.files import locked
from kelp.nn import device
from kelp.nn.comparison.tune import tune
from kelp.nn.data.dataset import TileDataset
from kelp.nn.training import checkpoint, fit, task, tracking
from kelp.nn.training.fit import train
from kelp.nn.training.task import KelpTask
from kelp.nn.training.tracking import quiet_libraries

STEPS = 3  # of an epoch: 24 samples in batches of 8


@pytest.fixture(scope="module")
def table(world, tmp_path_factory):
    return slice_dataset(slicing(world, output_dir=tmp_path_factory.mktemp("sahi"))).table


@pytest.fixture(scope="module")
def options(table):
    return small_training(
        table,
        batch_size=8,
        resize_strategy="resize",
        use_weighted_sampler=True,
        samples_per_epoch=24,
        epochs=3,
        loss="combo",
        lr=3e-3,
        lr_scheduler="onecycle",
    )


@pytest.fixture
def configure(options, empty_store, tmp_path):
    def make(**changes):
        output_dir = changes.get("output_dir", tmp_path / "mlruns")
        output_dir.mkdir(exist_ok=True)
        if not (output_dir / "mlflow.db").exists():
            shutil.copy(empty_store, output_dir)
        return TrainConfig(**options | {"output_dir": output_dir} | changes)

    return make


@pytest.fixture(scope="module")
def run(options, empty_store, tmp_path_factory):
    """One complete run that several tests look at."""
    output_dir = tmp_path_factory.mktemp("run")
    shutil.copy(empty_store, output_dir)
    changes = {"output_dir": output_dir, "save_top_k": 2, "plot_n_batches": 1}
    config = TrainConfig(**options | changes)
    calls = []
    before = set(Path.cwd().iterdir())
    result = train(config, progress=lambda *call: calls.append(call))
    assert set(Path.cwd().iterdir()) == before  # nothing lands in the current folder
    return config, result, calls


def test_a_run_is_calibrated_on_the_images_it_held_out(run, configure, tmp_path):
    config, result, _ = run
    spec = read_spec(result.bundle)
    table = pd.read_parquet(config.metadata_fp)
    images = table.loc[table["split_0"] == "val", "source_image_path"]
    held_out = {Path(image).name.removesuffix("_satellite.tif") for image in images}
    assert {one.scene for one in spec.held_out_sites} == held_out
    assert spec.tuning["images"] == len(held_out)
    assert spec.tuning["threshold"]["after"] == spec.threshold
    latest = read_spec(result.bundle.with_name("bundle-latest"))
    assert not latest.tuning  # the best only
    fitted = tune(TuneConfig(run_dir=(result.bundle,), output_dir=tmp_path, store=False))
    again = fitted.tuned[0].calibration
    assert again.temperature[0] == spec.temperature

    plain = train(configure(calibrate=False, epochs=1))
    spec = read_spec(plain.bundle)
    assert (spec.threshold, spec.tuning, spec.held_out_sites) == (0.5, {}, ())


def weights(folder):
    return load_file(folder / "weights.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def only_run(config):
    (folder,) = (config.output_dir / config.experiment).iterdir()
    return folder


def history(run_dir):
    return json.loads((run_dir / "artifacts" / "history.json").read_text())


class Stop(Exception):
    """Stands for a kill: nothing is cleaned up that a kill would not leave."""


def stop_at(step, error=Stop):
    def progress(stage, done, total):
        if stage == "training" and done == step:
            raise error

    return progress


# --- a complete run


def test_the_run_folder(run):
    config, result, _ = run
    assert result.run_dir == config.output_dir / "kelp" / result.run_id
    artifacts = result.run_dir / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {
        "bundle",
        "bundle-2",
        "bundle-latest",
        "checkpoints",
        "config.yaml",
        "history.json",
        "stats",
        "samples",
        "confusion_matrix.png",
        "confusion_matrix.json",
        "curves.png",
    }
    assert {path.name for path in config.output_dir.iterdir()} == {"kelp", "mlflow.db", "packed"}
    assert TrainConfig.load(artifacts / "config.yaml") == config
    assert len(list((artifacts / "samples").glob("epoch-*.png"))) == 3
    assert len(list((artifacts / "samples" / "best").glob("*.png"))) == 6
    assert len(list((artifacts / "checkpoints").glob("epoch-*"))) == 2
    assert not list(result.run_dir.rglob(".*"))


def test_bundles_hold_their_epochs(run):
    _, result, _ = run
    artifacts = result.run_dir / "artifacts"
    history = json.loads((artifacts / "history.json").read_text())
    order = sorted(range(3), key=lambda i: -history[i]["val/dice"])
    best, second, latest = (
        load_bundle(artifacts / name) for name in ("bundle", "bundle-2", "bundle-latest")
    )
    epochs = [bundle.spec.epoch for bundle in (best, second, latest)]
    assert epochs == [order[0] + 1, order[1] + 1, 3]
    assert best.spec.scores["val/dice"] == history[order[0]]["val/dice"] == result.score
    assert result.bundle == best.path
    assert best.spec.sahi
    assert best.spec.tile_size == (32, 32)
    assert (best.path / best.spec.stats_file).is_file()
    assert best.spec.training["lr"] == 3e-3


def test_the_bundle_scores_what_was_logged(run):
    """Validation, the saved weights and the statistics belong together (law 10)."""
    config, result, _ = run
    from kelp.nn.data.datamodule import FoldData, read_fold
    from kelp.nn.metrics import KelpScores

    net, scores = load_bundle(result.bundle).net.module, KelpScores()
    with torch.inference_mode():
        for batch in FoldData(read_fold(config), config, 0, pin=False).val_dataloader():
            scores.update(net.probabilities(batch.raw), batch.target, batch.observed)
    assert scores.confusion().dice == pytest.approx(result.score, abs=1e-6)
    numbers = json.loads((result.run_dir / "artifacts" / "confusion_matrix.json").read_text())
    assert numbers["true_positive"] == scores.confusion().tp


def test_mlflow_knows_the_run(run):
    config, result, _ = run
    mlflow = mlflow_client(config.output_dir)
    record = mlflow.get_run(result.run_id)
    assert record.info.status == "FINISHED"
    assert record.info.artifact_uri == (result.run_dir / "artifacts").as_uri()
    assert record.data.params["encoder"] == "tu-test_resnet"
    assert {file.path for file in mlflow.list_artifacts(result.run_id)} >= {"bundle", "samples"}
    history = json.loads((result.run_dir / "artifacts" / "history.json").read_text())
    for name in ("train/loss", "val/loss", "val/dice", "val/iou", "val/precision", "lr"):
        curve = [(m.step, m.value) for m in mlflow.get_metric_history(result.run_id, name)]
        assert curve == [(i + 1, metrics[name]) for i, metrics in enumerate(history)]


def test_warnings_of_others_than_the_libraries_are_seen():
    with quiet_libraries(), pytest.warns(RuntimeWarning, match="overflow"):
        np.float32(1e38) * np.float32(10)


def test_progress_ends_once(run):
    _, _, calls = run
    steps = [call for call in calls if call[0] == "training"]
    assert [done for _, done, total in steps if done == total] == [3 * STEPS]
    assert steps[-1] == ("training", 3 * STEPS, 3 * STEPS)


def test_statistics_are_of_the_training_rows(run, table):
    config, result, _ = run
    (kept,) = (result.run_dir / "artifacts" / "stats").iterdir()
    from kelp.nn.data.datamodule import read_fold

    raw = [sample.raw[1] for sample in TileDataset(read_fold(config).train_sources)]
    nir = torch.cat([x[torch.isfinite(x)] for x in raw])
    stats = json.loads(kept.read_text())
    assert stats["NIR"]["count"] == len(nir)
    assert stats["NIR"]["mean"] == pytest.approx(nir.double().mean().item())
    assert stats["_about"]["cv_split"] == 0
    assert load_bundle(result.bundle).spec.statistics["NIR"].max == nir.max().item()


def test_the_checkpoint_needs_no_unpickling(run):
    path = run[1].run_dir / "artifacts" / "checkpoints" / "last.ckpt"
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert len(content["callbacks"]["EpochKeeper"]["history"]) == 3


def test_the_same_seed_gives_the_same_weights(run, configure):
    _, result, _ = run
    again = train(configure(num_workers=2))
    assert_same_weights(weights(result.bundle), weights(again.bundle))
    other = train(configure(seed=1, epochs=1))
    first = "body.encoder.model.conv1.0.weight"
    a, b = (weights(r.run_dir / "artifacts" / "bundle-latest") for r in (result, other))
    assert not torch.equal(a[first], b[first])


def test_every_batch_is_augmented_anew(configure, monkeypatch):
    seeds = []

    def augment(batch, generator):
        seeds.append(generator.initial_seed())
        return batch

    monkeypatch.setattr("kelp.nn.symmetry.augment", augment)
    train(configure(epochs=2))
    assert len(set(seeds)) == len(seeds) == 2 * STEPS
    train(configure(epochs=1, augment=False))
    assert len(seeds) == 2 * STEPS


# --- stopping and going on


@pytest.mark.parametrize(
    ("step", "error", "workers", "status"),
    [
        (1, Stop, 0, "FAILED"),  # before any checkpoint
        (STEPS + 2, KeyboardInterrupt, 2, "KILLED"),
        (3 * STEPS, Stop, 0, "FAILED"),  # all is trained, nothing published
    ],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(run, configure, step, error, workers, status):
    config = configure(num_workers=workers, save_top_k=2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        train(config, progress=stop_at(step, error))
    assert signal.getsignal(signal.SIGINT) is handler
    run_dir = only_run(config)
    assert mlflow_client(config.output_dir).get_run(run_dir.name).info.status == status
    assert not (run_dir / "artifacts" / "bundle").exists()

    resumed = train(configure(resume_from=run_dir, save_top_k=2, num_workers=workers))
    _, whole, _ = run
    assert resumed.run_id == run_dir.name
    assert resumed.scores == whole.scores
    for name in ("bundle", "bundle-2", "bundle-latest"):
        assert_same_weights(
            weights(whole.run_dir / "artifacts" / name), weights(run_dir / "artifacts" / name)
        )
    mlflow = mlflow_client(config.output_dir)
    assert mlflow.get_run(run_dir.name).info.status == "FINISHED"
    assert [m.step for m in mlflow.get_metric_history(run_dir.name, "val/dice")] == [1, 2, 3]


def test_a_full_disk_is_one_line_and_then_gone_on_from(run, configure, monkeypatch):
    """The second checkpoint cannot be written; later the clock jumps by years at every look."""
    real, made = checkpoint.atomic, []

    @contextmanager
    def full(path):
        with real(path) as partial:
            yield partial
            made.append(path)
            if len(made) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = configure(save_top_k=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            train(config)
    run_dir = only_run(config)
    assert mlflow_client(config.output_dir).get_run(run_dir.name).info.status == "FAILED"
    assert not list(run_dir.rglob(".*partial*"))
    jumps = itertools.cycle((0, 1e8, -1e8))
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + next(jumps))
    resumed = train(configure(resume_from=run_dir, save_top_k=2))
    assert resumed.scores == run[1].scores
    whole = run[1].run_dir / "artifacts" / "bundle"
    assert_same_weights(weights(whole), weights(run_dir / "artifacts" / "bundle"))


def test_a_killed_run_ends_as_if_it_had_not_been(run, configure):
    config = configure(save_top_k=2)
    program = f"""
import os, signal, sys
from kelp.config import TrainConfig
from kelp.nn.training.fit import train

def kill(stage, done, total):
    if stage == "training" and done == {STEPS + 2}:
        os.kill(os.getpid(), signal.SIGKILL)

train(TrainConfig.model_validate_json(sys.argv[1]), kill)
"""
    arguments = [sys.executable, "-c", program, config.model_dump_json()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run_dir = only_run(config)
    assert not (run_dir / "artifacts" / "bundle").exists()
    assert len(history(run_dir)) == 1

    resumed = train(configure(resume_from=run_dir, save_top_k=2))
    assert resumed.scores == run[1].scores
    for name in ("bundle", "bundle-latest"):
        whole = weights(run[1].run_dir / "artifacts" / name)
        assert_same_weights(whole, weights(run_dir / "artifacts" / name))


def test_a_network_with_dropout_is_resumed_exactly(configure, tmp_path):
    changes = {"architecture": "fpn", "decoder_channels": (256, 128, 64, 32, 16), "epochs": 2}
    whole = train(configure(**changes))
    changes["output_dir"] = tmp_path / "stopped"
    with pytest.raises(Stop):
        train(configure(**changes), progress=stop_at(STEPS + 1))
    run_dir = only_run(configure(**changes))
    train(configure(**changes, resume_from=run_dir))
    assert_same_weights(
        weights(whole.run_dir / "artifacts" / "bundle-latest"),
        weights(run_dir / "artifacts" / "bundle-latest"),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler": "cosine_with_warm_restarts", "lr_cycle_epochs": 1, "lr_cycle_factor": 2},
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_plateau_patience": 0, "lr": 0.3, "epochs": 4},
        {"swa": True, "swa_epoch_start": 0.5, "lr_scheduler": "cosine", "optimizer": "sgd"},
        {"ema_decay": 0.9, "accumulate_grad_batches": 2},
    ],
)
def test_other_courses_of_the_rate_are_resumed_exactly(configure, tmp_path, changes):
    whole = train(configure(**changes))
    changes = changes | {"output_dir": tmp_path / "stopped"}
    with pytest.raises(Stop):
        train(configure(**changes), progress=stop_at(2 * STEPS + 1))
    run_dir = only_run(configure(**changes))
    train(configure(**changes, resume_from=run_dir))
    for name in ("bundle", "bundle-latest"):
        assert_same_weights(
            weights(whole.run_dir / "artifacts" / name), weights(run_dir / "artifacts" / name)
        )
    rates = [[epoch["lr"] for epoch in history(folder)] for folder in (whole.run_dir, run_dir)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_swa_averages_whole_epochs_and_renews_the_norms(configure, monkeypatch):
    seen, renewed = [], []
    ended, renew = KelpTask.end_epoch, task.renew_norms

    def end_epoch(self, metrics):
        seen.append({name: value.clone() for name, value in self.net.state_dict().items()})
        ended(self, metrics)

    monkeypatch.setattr(KelpTask, "end_epoch", end_epoch)
    monkeypatch.setattr(task, "renew_norms", lambda *args: renewed.append(renew(*args)))
    result = train(configure(swa=True, swa_epoch_start=2, lr_scheduler="none", swa_lr=1e-4))
    kept = weights(result.run_dir / "artifacts" / "bundle-latest")
    assert len(renewed) == 2
    for name, value in kept.items():
        if "running" in name:
            assert not torch.equal(value, seen[2][name])
        elif value.is_floating_point():
            mean = (seen[1][name] + seen[2][name]) / 2
            torch.testing.assert_close(value, mean)
    rates = [epoch["lr"] for epoch in history(result.run_dir)]
    assert rates[0] == pytest.approx(3e-3)
    assert rates[2] == pytest.approx(1e-4)


def test_the_moving_average_by_hand(configure, monkeypatch):
    seen, step = [], KelpTask.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(self.net.state_dict()["body.encoder.model.conv1.0.weight"].clone())

    monkeypatch.setattr(KelpTask, "optimizer_step", optimizer_step)
    result = train(configure(ema_decay=0.15, epochs=1, lr_scheduler="none"))
    first = seen[0].lerp(seen[1], 1 - 0.15)  # with 1 before: (1 + 1) / (10 + 1) is above 0.15
    kept = weights(result.bundle)["body.encoder.model.conv1.0.weight"]
    torch.testing.assert_close(kept, first.lerp(seen[2], 1 - 0.15))
    assert not torch.equal(kept, seen[2])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"swa": True, "ema_decay": 0.9}, "keep one"),
        ({"swa": True, "swa_epoch_start": 4}, "has 3 epochs"),
        ({"swa": True, "precision": "bf16-true"}, "give precision bf16-mixed"),
        ({"ema_decay": 0.9, "precision": "16-true"}, "give precision 16-mixed"),
    ],
)
def test_averages_that_cannot_be(configure, changes, cause):
    with pytest.raises(ConfigError, match=cause):
        configure(**changes)


def test_a_run_stopped_in_its_first_epoch_keeps_its_pretrained_weights(configure, monkeypatch):
    """Without a checkpoint it starts again: from the same weights, not from random ones."""

    def load(net, source):
        for parameter in net.body.parameters():
            torch.nn.init.constant_(parameter, 0.01)

    monkeypatch.setattr(fit, "load_pretrained", load)
    settings = {"pretrained": True, "epochs": 1}
    whole = train(configure(**settings))
    config = configure(**settings, output_dir=whole.run_dir.parent.parent / "stopped")
    with pytest.raises(Stop):
        train(config, progress=stop_at(1))
    resumed = train(config.model_copy(update={"resume_from": only_run(config)}))
    assert_same_weights(weights(resumed.bundle), weights(whole.bundle))


def test_a_run_stopped_while_it_is_opened_is_no_run_yet(configure, monkeypatch):
    """What makes a folder resumable is written when everything it needs is there."""
    config = configure()
    record = TrainConfig.record

    def stopped(self, folder):
        record(self, folder)
        raise Stop

    monkeypatch.setattr(TrainConfig, "record", stopped)
    with pytest.raises(Stop):
        train(config)
    artifacts = only_run(config) / "artifacts"
    assert not (artifacts / "config.yaml").exists()
    assert len(list((artifacts / "stats").iterdir())) == 1
    with pytest.raises(InputError, match="no run folder"):
        train(configure(resume_from=only_run(config)))


def test_resuming_needs_the_runs_settings(run, configure, tmp_path):
    _, result, _ = run
    with pytest.raises(ConfigError, match=r"lr=0\.1: the run to resume has 0\.003"):
        train(configure(resume_from=result.run_dir, lr=0.1, save_top_k=2))
    with pytest.raises(InputError, match="no run folder"):
        train(configure(resume_from=tmp_path))
    with pytest.raises(InputError, match="give its own output_dir"):
        train(configure(resume_from=result.run_dir, save_top_k=2))
    checkpoint = tmp_path / "run" / "artifacts" / "checkpoints" / "last.ckpt"
    shutil.copytree(result.run_dir, tmp_path / "run")
    checkpoint.write_bytes(b"not one")
    with pytest.raises(InputError, match=r"last\.ckpt: not a checkpoint"):
        train(configure(resume_from=tmp_path / "run", save_top_k=2))


def test_divergence_is_an_error_and_a_failed_run(configure):
    config = configure(lr=1e30, lr_scheduler="none", loss="bce")
    with pytest.raises(ConfigError, match=r"diverged.*lower lr"):
        train(config)
    run_dir = only_run(config)
    assert mlflow_client(config.output_dir).get_run(run_dir.name).info.status == "FAILED"
    assert not (run_dir / "artifacts" / "bundle").exists()


def test_a_bad_file_met_by_a_worker_is_one_line(configure, table, tmp_path):
    folder = tmp_path / "sahi"
    shutil.copytree(table.parent, folder)
    for path in (folder / "masks").iterdir():
        path.write_bytes(b"broken")
    config = configure(data_dir=folder, metadata_fp=folder / table.name, num_workers=1)
    with pytest.raises(InputError, match=r"^\S+_kelp_\S+\.tif: not a readable raster [^\n]*$"):
        train(config)


def test_early_stopping(configure):
    # With one step of a vanishing rate nothing improves after the first epoch.
    result = train(
        configure(
            lr=1e-30,
            lr_scheduler="none",
            optimizer="sgd",
            epochs=9,
            early_stopping_patience=2,
            limit_train_batches=1,
            monitor_metric="val/dice",
        )
    )
    assert result.epochs <= 6
    assert result.epochs - result.epoch == 2


def test_a_training_that_found_nothing_is_refused(configure):
    blind = {"lr": 1e-30, "lr_scheduler": "none", "optimizer": "sgd", "epochs": 1, "min_dice": 0.9}
    config = configure(**blind)
    with pytest.raises(TrainingError, match=r"found nothing: Dice 0\.\d+ .*min_dice=0$"):
        train(config)
    (run_dir,) = (path for path in (config.output_dir / "kelp").iterdir() if path.is_dir())
    bundles = {path.name for path in (run_dir / "artifacts").glob("bundle*")}
    assert bundles == {"bundle-latest"}  # to look into; `predict` takes it only when asked to
    # Resumed with another demand, nothing is trained again, and the bundle is there.
    kept = train(config.model_copy(update={"min_dice": 0.0, "resume_from": run_dir}))
    assert kept.bundle.is_dir()


def test_validation_rows_without_kelp_are_said(configure, table, tmp_path, caplog):
    rows = pd.read_parquet(table)
    bare = tmp_path / "bare.parquet"
    rows[(rows["split_0"] == "train") | ~rows["has_kelp"]].to_parquet(bare)
    train(configure(metadata_fp=bare, epochs=1))
    assert "the validation rows hold no kelp" in caplog.text


# --- options


def test_it_learns(configure):
    result = train(
        configure(epochs=6, samples_per_epoch=64, lr=1e-2, spectral_indices="NDVI", batch_size=8)
    )
    assert result.score > 0.6
    assert load_bundle(result.bundle).spec.channels[-1] == "NDVI"


@pytest.mark.parametrize(
    "changes",
    [
        {"sahi": False, "resize_strategy": "pad", "image_size": 96, "loss": "dice"},
        {
            "lr_scheduler": "cosine",
            "optimizer": "sgd",
            "precision": "bf16-mixed",
            "loss": "tversky",
        },
        {
            "optimizer": "adam",
            "precision": "bf16-true",
            "accumulate_grad_batches": 2,
            "loss": "focal",
        },
    ],
)
def test_options_run_and_the_bundle_loads(configure, world, monkeypatch, changes):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    if changes.get("sahi") is False:
        changes = changes | {"data_dir": world.data_dir, "metadata_fp": world.table}
    result = train(configure(fast_dev_run=True, **changes))
    bundle = load_bundle(result.bundle)
    assert result.epochs == 1
    p = bundle.net.module.probabilities(torch.full((1, 7, 50, 70), 8000.0))
    assert p.shape == (1, 50, 70)
    assert torch.isfinite(p).all()
    if not bundle.spec.sahi:
        assert bundle.spec.tile_size == (50, 70)


def test_points_within_epochs(configure):
    config = configure(epochs=2, val_check_interval=0.34, log_every_n_steps=2)
    result = train(config)
    mlflow = mlflow_client(config.output_dir)
    curves = {
        name: [(m.step, m.value) for m in mlflow.get_metric_history(result.run_id, name)]
        for name in ("train/loss_step", "lr_step", "val/dice_step", "val/dice")
    }
    assert [step for step, _ in curves["train/loss_step"]] == [2, 4, 6]
    assert [step for step, _ in curves["lr_step"]] == [2, 4, 6]
    assert [step for step, _ in curves["val/dice_step"]] == [1, 2, 3, 4, 5, 6]
    # The end of an epoch is ranked, by the last of its validations.
    assert [value for _, value in curves["val/dice"]] == [
        value for step, value in curves["val/dice_step"] if step % STEPS == 0
    ]
    with pytest.raises(ConfigError, match=r"2 does not divide the 3 batches.*batches=2$"):
        train(configure(val_check_interval=0.5))


def test_compiled_networks_are_the_same_and_what_fails_is_said(configure, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kelp")
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled.append((type(self), mode))
    )
    monkeypatch.setattr(torch, "compile", lambda function: function)
    changes = {"compile_mode": "max-autotune", "limit_test_batches": 2, "fast_dev_run": True}
    result = train(configure(compile=True, **changes))
    assert len([line for line in caplog.messages if "--limit_test_batches" in line]) == 1
    assert [mode for _, mode in compiled] == ["max-autotune"]
    assert load_bundle(result.bundle)

    def fail(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    train(configure(compile=True, fast_dev_run=True))
    assert len(compiled) == 1
    assert [line for line in caplog.messages if "no compiler" in line] == [
        "--compile True: torch cannot compile here (no compiler); training continues without it"
    ]


def test_a_given_statistics_file_is_used_and_kept_as_it_is(configure, world, tmp_path, caplog):
    stats = compute_stats(
        StatsConfig(data_dir=world.train_dir, output_dir=tmp_path / "stats", workers=1)
    ).path
    content = json.loads(stats.read_text())
    content["NIR"]["q01"] = 1234.5
    stats.write_text(json.dumps(content))
    caplog.set_level(logging.INFO, "kelp")
    result = train(configure(dataset_stats_fp=stats, fast_dev_run=True))
    bundle = load_bundle(result.bundle)
    assert bundle.spec.statistics["NIR"].q01 == 1234.5
    assert bundle.spec.stats_file == stats.name
    assert (bundle.path / stats.name).read_bytes() == stats.read_bytes()
    notices = [line for line in caplog.messages if "validation rows" in line]
    assert len(notices) == 1
    with pytest.raises(StatsError, match="mask_using_qa"):
        train(configure(dataset_stats_fp=stats, spectral_indices="NDVI", mask_using_qa=False))


def test_errors_come_before_a_run_is_opened(configure, tmp_path):
    for error, changes in (
        (StatsError, {"dataset_stats_fp": tmp_path / "none.json"}),
        (WeightsError, {"pretrained": True, "encoder_weights": str(tmp_path / "none.pth")}),
        (ConfigError, {"encoder": "tu-resnet81"}),
        (ConfigError, {"sahi": False}),
    ):
        config = configure(**changes)
        with pytest.raises(error):
            train(config)
        assert not (config.output_dir / "kelp").exists()


def test_the_monitor_mode_follows_from_the_metric(configure):
    assert configure().monitor_mode == "max"
    assert configure(monitor_metric="val/loss").monitor_mode == "min"
    assert configure(monitor_metric="val/loss", monitor_mode="min")
    for metric, mode in (("val/loss", "max"), ("val/dice", "min")):
        with pytest.raises(ConfigError, match="give monitor_mode"):
            configure(monitor_metric=metric, monitor_mode=mode)


def test_another_store_gets_a_copy(configure, empty_store, tmp_path, monkeypatch):
    store = tmp_path / "elsewhere"
    store.mkdir()
    shutil.copy(empty_store, store)
    mlflow = mlflow_client(store)
    mlflow.create_experiment("kelp", artifact_location=(store / "files").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    config = configure(fast_dev_run=True)
    result = train(config)
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"
    copy = store / "files" / result.run_id / "artifacts"
    for name in ("bundle/bundle.json", "config.yaml", "confusion_matrix.png"):
        assert (copy / name).read_bytes() == (result.run_dir / "artifacts" / name).read_bytes()
    assert not mlflow_client(config.output_dir).get_experiment_by_name("kelp")


# --- number formats


def test_the_cpu_says_whether_it_has_bfloat16(tmp_path):
    for text, expected in (
        ("model name\t: x\nflags\t\t: fpu avx512f avx512_bf16 ssse3\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx512f\nbugs : avx512_bf16\n", False),
    ):
        path = tmp_path / f"cpuinfo{len(text)}"
        path.write_text(text)
        assert device.cpu_has_bf16(path) is expected
    assert device.cpu_has_bf16(tmp_path / "none") is False


@pytest.mark.parametrize(
    ("wish", "with_bf16", "without"),
    [
        (None, "bf16-mixed", "32-true"),
        ("16-mixed", "bf16-mixed", "32-true"),
        ("16-true", "bf16-true", "32-true"),
        ("bf16-mixed", "bf16-mixed", "32-true"),
        ("32-true", "32-true", "32-true"),
    ],
)
def test_precision_falls_back_in_one_line(monkeypatch, caplog, wish, with_bf16, without):
    caplog.set_level(logging.INFO, "kelp")
    for has, expected in ((True, with_bf16), (False, without)):
        caplog.clear()
        monkeypatch.setattr(device, "cpu_has_bf16", lambda has=has: has)
        assert device.resolve_precision(wish, torch.device("cpu")) == expected
        assert len(caplog.messages) == (wish not in (None, expected))


def test_autocast_is_for_mixed_formats_only():
    cpu = torch.device("cpu")
    for precision, dtype in (
        ("bf16-mixed", torch.bfloat16),
        ("32-true", torch.float32),
        ("bf16-true", torch.float32),
    ):
        with device.autocast(precision, cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert device.weights_dtype("bf16-true") == torch.bfloat16
    assert device.weights_dtype("bf16-mixed") == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="device cuda"):
        device.resolve_device("cuda")
    assert device.resolve_device("auto").type == "cpu"


# --- the seed's form


def test_the_folder_can_be_run_from_anywhere(tmp_path):
    folder = Path(kelp.__file__).parent / "nn" / "training"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(folder), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--samples_per_epoch" in done.stdout
    assert "torch" not in done.stderr


def test_of_two_trainings_that_begin_at_once_one_makes_the_store(configure, monkeypatch):
    config, opened = configure(), tracking._client

    def client_of(output_dir):
        with pytest.raises(BlockingIOError), locked(output_dir / ".mlflow.lock"):
            pass
        return opened(output_dir)

    monkeypatch.setattr(tracking, "_client", client_of)
    with quiet_libraries():
        tracking.start_run(config)
    assert not list(config.output_dir.glob(".*"))


def test_a_store_that_was_being_made_is_not_there(options, tmp_path, monkeypatch):
    class Stopped:
        def __init__(self, tracking_uri):
            Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"half")
            raise KeyboardInterrupt

    config = TrainConfig(**options | {"output_dir": tmp_path})
    with quiet_libraries():
        with monkeypatch.context() as patch:
            patch.setattr("mlflow.MlflowClient", Stopped)
            with pytest.raises(KeyboardInterrupt):
                tracking.start_run(config)
        assert not (tmp_path / "mlflow.db").exists()
        made = tracking.start_run(config)
    assert made.client.get_run(made.run_id)
    assert (tmp_path / "mlflow.db").is_file()


def test_a_store_that_was_made_in_part_is_one_line(options, tmp_path):
    """As older versions of kelp left it where they were killed early."""
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("CREATE TABLE metrics (key TEXT)")
    database.close()
    with quiet_libraries(), pytest.raises(InputError, match="move a damaged"):
        tracking.start_run(TrainConfig(**options | {"output_dir": tmp_path}))
