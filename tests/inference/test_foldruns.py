"""`kelp train --cv_split all`: a run for each fold, one parent, stopped and gone on with."""

import json
import shutil

import pandas as pd
import pytest
from bundles import mlflow_client
from slicing_world import config as slicing
from slicing_world import small_training

import kelp
from kelp.cli import main
from kelp.config import PredictConfig, TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import BundleError, ConfigError, TableError
from kelp.inference.foldruns import FoldRun, FoldRuns, runs_of
from kelp.nn.training import folds as module
from kelp.nn.training.folds import train_folds
from kelp.nn.training.tracking import quiet_libraries

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def table(world, tmp_path_factory):
    """Three folds, of which the last holds nothing out."""
    path = slice_dataset(slicing(world, output_dir=tmp_path_factory.mktemp("sahi"))).table
    rows = pd.read_parquet(path)
    rows = rows.drop(columns=[name for name in rows if name.startswith("split_")])
    first = rows["tile_id"].rank(method="dense") == 1
    rows["split_0"] = first.map({True: "val", False: "train"})
    rows["split_1"] = first.map({True: "train", False: "val"})
    rows["split_2"] = "train"
    rows.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def options(table):
    limits = {"limit_train_batches": 2, "limit_val_batches": 2}
    return small_training(table, encoder="tu-resnet18", cv_split="all", **limits)


@pytest.fixture(scope="module")
def done(options, tmp_path_factory):
    return train_folds(TrainConfig(**options, output_dir=tmp_path_factory.mktemp("all")))


def test_every_fold_has_its_run_under_one_parent(done):
    assert done.folds.folds == [0, 1]
    assert done.folds.unfinished == []
    kept = json.loads((done.run_dir / "artifacts" / "folds.json").read_text())
    scores = [run["scores"]["val/dice"] for run in kept["runs"].values()]
    assert kept["summary"]["val/dice"]["mean"] == pytest.approx(sum(scores) / 2)
    assert kept["summary"]["val/dice"]["sd"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    with quiet_libraries():
        client = mlflow_client(done.run_dir.parents[1])
        parent = client.get_run(done.run_dir.name)
        assert parent.info.status == "FINISHED"
        assert parent.data.metrics["val/dice_mean"] == pytest.approx(sum(scores) / 2)
        for number, run in done.folds.runs.items():
            child = client.get_run(run.run)
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert child.data.params["cv_split"] == str(number)
    text = done.summary()
    assert "fold 0: val/dice" in text
    assert "2 folds in" in text


def test_a_fold_is_what_it_is_alone(done, options, tmp_path):
    alone = kelp.train(TrainConfig(**options | {"cv_split": 1}, output_dir=tmp_path))
    ours = done.run_dir.parent / done.folds.runs[1].run / "artifacts" / "bundle"
    name = "weights.safetensors"
    assert (ours / name).read_bytes() == (alone.bundle / name).read_bytes()


def test_the_parent_stands_for_the_ensemble(done, world, tmp_path):
    runs = runs_of([done.run_dir])
    assert [run.name for run in runs] == [run.run for _, run in sorted(done.folds.runs.items())]
    for name, paths in (("parent", (done.run_dir,)), ("named", tuple(runs))):
        kelp.predict_scenes(
            PredictConfig(
                data_dir=world.train_dir / "images",
                output_dir=tmp_path / name,
                run_dir=paths,
                device="cpu",
                precision="32-true",
            )
        )
    for mask in (tmp_path / "named").glob("*.tif"):
        assert mask.read_bytes() == (tmp_path / "parent" / mask.name).read_bytes()


def test_stopped_in_the_second_fold_it_goes_on_with_that(
    options, done, tmp_path, monkeypatch, caplog
):
    train, trained = module.train, []

    def stopping(config, *args):
        if config.cv_split == 1 and not trained.count(1):
            trained.append(1)
            raise KeyboardInterrupt
        trained.append(config.cv_split)
        return train(config, *args)

    monkeypatch.setattr(module, "train", stopping)
    config = TrainConfig(**options, output_dir=tmp_path)
    with caplog.at_level("INFO", "kelp"), pytest.raises(KeyboardInterrupt):
        train_folds(config)
    (line,) = [m for m in caplog.messages if m.startswith("all folds go on with")]
    parent = line.split("--resume_from ")[1]
    with pytest.raises(BundleError, match=r"fold 1 is not finished; go on with kelp train"):
        runs_of([type(tmp_path)(parent)])
    result = train_folds(TrainConfig(**options, output_dir=tmp_path, resume_from=parent))
    assert trained == [0, 1, 1]
    assert result.folds.summary() == done.folds.summary()
    # Finished, there is nothing left to do.
    train_folds(TrainConfig(**options, output_dir=tmp_path, resume_from=parent))
    assert trained == [0, 1, 1]


def test_stopped_in_the_middle_of_a_fold_it_goes_on_with_its_last_epoch(options, tmp_path):
    longer = options | {"epochs": 2, "lr_scheduler": "none"}
    whole = train_folds(TrainConfig(**longer, output_dir=tmp_path / "whole"))
    config = TrainConfig(**longer, output_dir=tmp_path / "stopped")

    def stop(stage, done, total):
        if stage == "training" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_folds(config, stop)
    (kept,) = (tmp_path / "stopped" / "kelp").glob("*/artifacts/folds.json")
    begun = json.loads(kept.read_text())["runs"]["0"]
    assert begun["scores"] is None
    parent = kept.parents[1]
    again = train_folds(config.model_copy(update={"resume_from": parent, "cv_split": 0}))
    assert again.folds.runs[0].run == begun["run"]
    for number in (0, 1):
        ours, theirs = (
            result.run_dir.parent / result.folds.runs[number].run / "artifacts" / "bundle"
            for result in (again, whole)
        )
        name = "weights.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    with pytest.raises(ConfigError, match=r"epochs=3: the folds of .* have 2"):
        train_folds(config.model_copy(update={"resume_from": parent, "epochs": 3}))
    with pytest.raises(BundleError, match="the parent of runs of all folds; name one of them"):
        kelp.load_bundle(parent)
    assert runs_of([parent / "artifacts"]) == runs_of([parent])


def test_wrong_use(options, table, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"use kelp\.train_folds"):
        kelp.train(TrainConfig(**options, output_dir=tmp_path))
    rows = pd.read_parquet(table)
    copy = tmp_path / "table.parquet"
    rows.assign(split_0="train", split_1="val").to_parquet(copy)
    with pytest.raises(TableError, match="no fold has rows"):
        train_folds(TrainConfig(**options | {"metadata_fp": copy}, output_dir=tmp_path))
    flags = [f"--data_dir={table.parent}", f"--metadata_fp={table}", f"--output_dir={tmp_path}"]
    assert main(["train", *flags, "--sahi", "--cv_split=none"]) == 2
    assert "cv_split" in capsys.readouterr().err
    assert main(["train", *flags, "--sahi", "--cv_split=-1"]) == 2
    folder = tmp_path / "parent"
    FoldRuns(
        [0, 1], {0: FoldRun("a", {"val/dice": 0.5}), 1: FoldRun("b", {"val/dice": 0.7})}
    ).write(folder)
    assert [path.name for path in runs_of([folder])] == ["a", "b"]
    (folder / "artifacts" / "folds.json").write_text("[]")
    with pytest.raises(BundleError, match="damaged"):
        runs_of([folder])
    shutil.rmtree(folder)
    assert runs_of([folder]) == [folder]
