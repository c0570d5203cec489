"""`kelp sweep`: spaces, trials in MLflow, pruning, stopping and going on."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from bundles import mlflow_client
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine
from world import make_world

import kelp
from kelp.cli import main
from kelp.config import SweepConfig, TrainConfig
from kelp.errors import ConfigError, InputError, WeightsError
from kelp.io.files import locked
from kelp.nn import search as module
from kelp.nn.search import open_study, read_base, read_space
from kelp.nn.training.result import TrainResult
from kelp.nn.training.tracking import Part, Pruned, Tracking, quiet_libraries

LR = {"low": 1e-4, "high": 1e-2, "log": True}
SPACE = {"lr": LR, "batch_size": {"values": [4, 8]}}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Whole images, and a network that trains in a second."""
    world = make_world(tmp_path_factory.mktemp("world"), n_train=4, n_test=0, shape=(50, 60))
    return {
        "data_dir": str(world.data_dir),
        "metadata_fp": str(world.table),
        "num_workers": 0,
        "batch_size": 2,
        "image_size": 64,
        "precision": "32-true",
        "encoder": "tu-test_resnet",
        "decoder_channels": [16, 8, 8, 4],
        "pretrained": False,
        "epochs": 1,
        "plot_n_batches": 0,
        "min_dice": 0,
        "limit_train_batches": 1,
        "device": "cpu",
        "output_dir": "mine",
    }


@pytest.fixture
def quick_disk():
    """SQLite that does not wait for the disk: a dozen times for each trial."""

    def relax(connection, record):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)


@pytest.fixture
def configure(options, tmp_path):
    """Write config file and space; give the sweep's configuration."""

    def make(space=SPACE, base=None, **changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(options | (base or {})))
        (tmp_path / "space.yaml").write_text(
            space if isinstance(space, str) else yaml.safe_dump(space)
        )
        return SweepConfig(
            **{
                "train_config": tmp_path / "base.yaml",
                "space": tmp_path / "space.yaml",
                "output_dir": tmp_path / "sweep",
                "trials": 2,
            }
            | changes
        )

    return make


class Fake:
    """Stands for `train` where only the search is looked at; keeps the configurations it got."""

    def __init__(self, score=lambda config: config.lr):
        self.score = score
        self.seen = []

    def __call__(self, config, progress, part):
        self.seen.append(config)
        run = f"run{len(self.seen)}"
        part.begin(run)
        score = self.score(config)
        scores = score if isinstance(score, list) else [score]
        for epoch, value in enumerate(scores, 1):
            part.end_epoch(epoch, {"val/dice": value})
        folder = config.output_dir / config.experiment / run
        best = max(scores)
        return TrainResult(run, folder, folder, "val/dice", best, {}, 1, len(scores), 0.1)

    def params(self):
        return [(config.lr, config.batch_size) for config in self.seen]


@dataclass
class NoTracking:
    """Stands for the parent's run: MLflow needs seconds to open a store."""

    artifacts: Path
    run_id: str = "parent"
    closed: list = field(default_factory=list)

    def log_point(self, at, metrics):
        pass

    def log_files(self, *names):
        pass

    def finish(self, status):
        self.closed.append(status)

    __enter__, __exit__ = Tracking.__enter__, Tracking.__exit__


@pytest.fixture
def fake(monkeypatch, quick_disk, tmp_path):
    """A search without trainings and without MLflow."""

    def use(score=lambda config: config.lr):
        trainer = Fake(score)
        monkeypatch.setattr(module, "train", trainer)
        return trainer

    parent = NoTracking(tmp_path / "parent")
    parent.artifacts.mkdir()
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(module, "start_run", lambda config, name: parent)
    monkeypatch.setattr(module, "reopen_run", lambda folder, config: parent)
    use.parent = parent
    return use


def rows(folder):
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


# --- the space


@pytest.mark.parametrize(
    ("space", "cause"),
    [
        ({"learning_rate": LR}, "learning_rate: kelp train has no such option"),
        ({"lr": {"low": 1e-2, "high": 1e-4}}, r"lr: .*0\.01.*0\.0001"),
        ({"lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "lr: .*`step`.*`log`"),
        ({"weight_decay": {"low": 0, "high": 1, "log": True}}, "weight_decay: .*log"),
        ({"lr": {"low": 0.1}}, "lr: give `low:` and `high:`"),
        ({"lr": {"low": 0.1, "high": 1, "steps": 2}}, "lr: steps: there are low, high, log and"),
        ({"lr": {"low": 0.1, "high": 1, "values": [1, 2]}}, "lr: (low|high): there are"),
        ({"lr": {"low": "small", "high": 1}}, "lr: .*number.*'small'"),
        ({"lr": {"low": 0, "high": 1}}, "lr: .*greater than 0, got 0"),
        ({"lr": 0.1}, "lr: give `low:` and `high:`, or `values:`"),
        ({"batch_size": {"values": []}}, "batch_size: values: give a list of two"),
        ({"batch_size": {"values": 8}}, "batch_size: values: give a list of two"),
        ({"batch_size": {"values": [8, "8"]}}, "batch_size: .*each once"),
        ({"batch_size": {"values": [8, 0]}}, "batch_size: .*greater than or equal to 1, got 0"),
        ({"batch_size": {"low": 2.5, "high": 8}}, r"batch_size: .*integer.*2\.5"),
        ({"loss": {"values": ["dice", "love"]}}, "loss: .*'love'"),
        ({"augment": {"low": 0, "high": 1}}, "augment: not a number"),
        ({"image_size": {"values": [64, 100]}}, "image_size=100 px: networks need a multiple of"),
        ({"cv_split": {"values": [0, 1]}}, "cv_split: shared by all trials"),
        ("", "no option to search"),
        ("lr: [", "not a YAML file"),
    ],
)
def test_a_wrong_space_is_one_line_before_the_first_trial(configure, fake, capfd, space, cause):
    trainer = fake()
    with pytest.raises(ConfigError, match=cause) as error:
        kelp.sweep(configure(space))
    assert "\n" not in str(error.value)
    assert "space.yaml" in str(error.value)
    assert not trainer.seen


def read(config):
    base = read_base(config)
    return base, read_space(config.space, base)


def test_values_are_read_as_kelp_train_reads_them(configure):
    # YAML takes 1e-5 for text.
    text = "lr: {low: 1e-5, high: 1e-2, log: true}\nencoder_weights: {values: [a.pth, b.pth]}\n"
    text += "decoder_channels: {values: [[16, 8, 8, 4], '8,8,4,4']}\nepochs: {low: 1, high: 5}\n"
    text += "weight_decay: {values: [1e-4, 0]}\n"
    _, space = read(configure(text))
    assert (space["lr"].low, space["lr"].log) == (1e-5, True)
    assert space["decoder_channels"].choices == ("16,8,8,4", "8,8,4,4")
    assert space["weight_decay"].choices == (1e-4, 0.0)
    assert space["epochs"] == IntDistribution(1, 5)


def test_a_value_counts_if_some_combination_allows_it(configure):
    both = {"swa": {"values": [True, False]}, "ema_decay": {"values": [0.0, 0.9]}}
    read(configure(both, {"swa": True, "epochs": 4}))
    with pytest.raises(ConfigError, match="two averages"):
        read(configure({"ema_decay": {"values": [0.8, 0.9]}}, {"swa": True, "epochs": 4}))
    with pytest.raises(ConfigError, match="values of two losses cannot be compared"):
        read(configure({"loss": {"values": ["dice", "ce"]}}, {"monitor_metric": "val/loss"}))


@pytest.mark.parametrize(
    ("base", "cause"),
    [
        ({"cv_split": "all"}, "cv_split all: a sweep scores one fold"),
        ({"resume_from": "x"}, "resume_from: trials start from scratch"),
        ({"image_size": 65}, "multiple of 32"),
        ({"nonsense": 1}, "there is no option nonsense"),
    ],
)
def test_a_wrong_config_file(configure, base, cause):
    with pytest.raises(ConfigError, match=rf"base\.yaml: .*{cause}"):
        kelp.sweep(configure(base=base))


# --- choosing


def test_choices_follow_from_the_seed(configure, fake, tmp_path):
    seen = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = fake()
        kelp.sweep(configure(output_dir=tmp_path / folder, seed=seed, trials=4))
        seen.append(trainer.params())
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 4
    assert all(1e-4 <= lr <= 1e-2 for lr, _ in seen[0])


def test_a_stopped_sweep_chooses_as_one_that_was_not(configure, fake, tmp_path):
    whole = fake()
    kelp.sweep(configure(output_dir=tmp_path / "whole", trials=12))

    def stopping(config):
        if len(trainer.seen) == 11:
            raise KeyboardInterrupt
        return config.lr

    trainer = fake(stopping)
    config = configure(trials=12)
    with pytest.raises(KeyboardInterrupt):
        kelp.sweep(config)
    assert fake.parent.closed[-1] == "KILLED"
    assert len(rows(config.output_dir)) == 10
    again = fake()
    result = kelp.sweep(config)
    assert trainer.params() + again.params() == whole.params()[:11] + whole.params()[10:]
    assert [row["state"] for row in rows(config.output_dir)].count("failed") == 1
    assert "12 of 12 trials: 12 complete, 0 pruned; 1 stopped" in result.summary()
    # Finished, there is nothing left to do; more trials may be wished for.
    idle = fake()
    kelp.sweep(config)
    assert not idle.seen
    kelp.sweep(config.model_copy(update={"trials": 13}))
    assert len(idle.seen) == 1


@pytest.mark.parametrize("moment", ["asked", "trained"])
def test_a_trial_of_a_killed_process_is_done_again(configure, fake, moment):
    config = configure(trials=3)
    whole = fake()
    kelp.sweep(config.model_copy(update={"output_dir": config.output_dir.with_name("whole")}))
    config.output_dir.mkdir()
    base, space = read(config)
    with open_study(config, base, space) as study:  # what `kill -9` leaves
        trial = study.ask(dict(space))
        if moment == "trained":
            trial.set_user_attr("run", "gone")
            trial.report(0.5, 1)
    trainer = fake()
    kelp.sweep(config)
    assert trainer.params() == whole.params()
    first, *others = rows(config.output_dir)
    assert (first["state"], first["reason"], first["value"]) == ("failed", "", "")
    assert first["run_id"] == ("gone" if moment == "trained" else "")
    assert [row["state"] for row in others] == ["complete"] * 3
    assert fake.parent.closed == ["FINISHED"] + ["KILLED"] * (moment == "trained") + ["FINISHED"]


def test_a_grid_is_gone_through_once(configure, fake):
    space = {
        "lr": {"low": 0.1, "high": 0.35, "step": 0.1},
        "batch_size": {"values": [4, 8]},
        "epochs": {"low": 1, "high": 2},
    }
    trainer = fake()
    config = configure(space, sampler="grid", trials=5)
    kelp.sweep(config)
    config = config.model_copy(update={"trials": 100})
    base, space = read(config)
    with open_study(config, base, space) as study:  # killed before its trial began
        study.enqueue_trial({"lr": 0.1, "batch_size": 4, "epochs": 1})
    kelp.sweep(config)
    cells = [(c.lr, c.batch_size, c.epochs) for c in trainer.seen]
    assert len(set(cells)) == 12
    assert len(cells) <= 13
    assert {lr for lr, _, _ in cells} == {0.1, 0.2, 0.3}
    with pytest.raises(ConfigError, match="sampler grid: lr needs `values:` or a `step:`"):
        kelp.sweep(configure(sampler="grid", output_dir=config.output_dir / "endless"))


def test_timeout_begins_no_more(configure, fake, caplog):
    fake()
    config = configure(trials=5, timeout=1e-9)
    with caplog.at_level("INFO", "kelp"):
        kelp.sweep(config)
    assert rows(config.output_dir) == []
    assert any("--timeout" in line for line in caplog.messages)
    assert kelp.sweep(config.model_copy(update={"timeout": 100.0})).trials


# --- pruning


def test_trials_below_the_median_are_pruned(configure, fake):
    scores = [[0.1, 0.2, 0.5, 0.6]] * 5 + [[0.1, 0.2, 0.3, 0.9]]

    def score(config):
        return scores[len(trainer.seen) - 1]

    trainer = fake(score)
    config = configure(base={"epochs": 4}, trials=6)
    result = kelp.sweep(config)
    last = result.trials[-1]
    assert (last.state, last.value) == (TrialState.PRUNED, 0.3)
    assert last.user_attrs["reason"] == "after epoch 3 of 4: worse than the median"
    assert result.best.number == 0
    fake(score).seen = trainer.seen[:5]
    kept = configure(base={"epochs": 4}, trials=1, pruner="none", output_dir=config.output_dir)
    with pytest.raises(ConfigError, match=r"pruner: now none, but .* with median"):
        kelp.sweep(kept)


def test_less_can_be_better(configure, fake, monkeypatch):
    trainer = fake()

    def train(config, progress, part):
        return replace(trainer(config, progress, Part("", "", part.begin)), score=config.lr)

    monkeypatch.setattr(module, "train", train)
    base = {"monitor_metric": "val/loss"}
    result = kelp.sweep(configure(base=base, trials=4))
    assert result.best.value == min(config.lr for config in trainer.seen)


def test_options_that_do_not_fit_prune_their_trial(configure, fake, caplog):
    space = {"swa": {"values": [True, False]}, "ema_decay": {"values": [0.0, 0.9]}}
    trainer = fake()
    config = configure(space, {"epochs": 4}, sampler="grid", trials=4)
    with caplog.at_level("INFO", "kelp"):
        kelp.sweep(config)
    (refused,) = [row for row in rows(config.output_dir) if row["state"] == "pruned"]
    assert (refused["swa"], refused["ema_decay"], refused["run_id"]) == ("True", "0.9", "")
    assert refused["reason"].startswith("refused: --swa True and --ema_decay: two averages")
    assert any("refused: --swa True" in line for line in caplog.messages)
    assert len(trainer.seen) == 3


def test_where_no_trial_can_be_trained_the_sweep_stops(configure, fake):
    def diverging(config):
        raise (WeightsError if config.batch_size == 4 else ConfigError)("training diverged")

    trainer = fake(diverging)
    config = configure(trials=20)
    with pytest.raises(ConfigError, match=r"5 trials were refused and none .*diverged"):
        kelp.sweep(config)
    assert len(trainer.seen) == 5
    assert fake.parent.closed == ["FAILED"]
    assert not (config.output_dir / "best.yaml").exists()
    assert "0 complete, 5 pruned" in (config.output_dir / "summary.txt").read_text()


def test_a_score_that_is_no_number_prunes(configure, fake):
    fake(lambda config: float("nan"))
    result = kelp.sweep(configure(trials=1))
    assert (result.trials[0].state, result.trials[0].value) == (TrialState.PRUNED, None)
    assert result.best is None


def test_unreadable_data_stops_the_sweep(configure, fake):
    def missing(config):
        raise InputError("x.tif: gone")

    fake(missing)
    config = configure()
    with pytest.raises(InputError, match="gone"):
        kelp.sweep(config)
    with open_study(config, *read(config)) as study:
        assert [trial.state for trial in study.trials] == [TrialState.FAIL]


# --- one sweep, one folder


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (
            {"base": {"optimizer": "sgd"}},
            r"base\.yaml: optimizer: now sgd, but .* started with adamw",
        ),
        ({"space": {"lr": LR}}, r"space\.yaml: batch_size: now nothing, but"),
        ({"space": SPACE | {"lr": LR | {"high": 0.1}}}, r"space\.yaml: lr: now .*0\.1"),
        ({"seed": 1}, "seed: now 1, but"),
        ({"sampler": "random"}, "sampler: now random, but"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(configure, fake, changes, cause):
    trainer = fake()
    kelp.sweep(configure(trials=1))
    with pytest.raises(ConfigError, match=cause) as error:
        kelp.sweep(configure(**changes))
    assert "\n" not in str(error.value)
    assert len(trainer.seen) == 1


def test_a_second_process_is_refused(configure, fake):
    fake()
    config = configure(trials=1)
    config.output_dir.mkdir()
    with (
        locked(config.output_dir / ".sweep.lock"),
        pytest.raises(InputError, match="another process runs this sweep"),
    ):
        kelp.sweep(config)
    kelp.sweep(config)
    assert not list(config.output_dir.glob(".*"))


def test_a_damaged_study_is_one_line(configure, fake):
    fake()
    config = configure()
    config.output_dir.mkdir()
    (config.output_dir / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"study\.db: cannot be used as Optuna's study") as error:
        kelp.sweep(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["optuna", "sklearn"])
def test_without_the_extra_the_message_says_what_to_install(configure, monkeypatch, capfd, package):
    config = configure()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "kelp.nn.search")
    flags = [f"--{name}={getattr(config, name)}" for name in ("train_config", "space")]
    assert main(["sweep", *flags, f"--output_dir={config.output_dir}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"needs the package {package}" in line
    assert 'pip install "kelp-slicer[sweep]"' in line


# --- what is left


def test_files_after_every_trial(configure, fake):
    config = configure(trials=3)
    states = []

    def score(config_of_trial):
        if (config.output_dir / "trials.csv").exists():
            states.append([row["value"] for row in rows(config.output_dir)])
        return config_of_trial.lr

    trainer = fake(score)
    result = kelp.sweep(config)
    lrs = [str(lr) for lr, _ in trainer.params()]
    assert states == [lrs[:1], lrs[:2]]
    assert [row["value"] for row in rows(config.output_dir)] == lrs
    assert float(rows(config.output_dir)[0]["lr"]) == trainer.seen[0].lr
    for name in ("best.yaml", "report.html", "trials.csv", "summary.txt"):
        assert (config.output_dir / name).read_bytes() == (
            fake.parent.artifacts / name
        ).read_bytes()
    best = TrainConfig.load(result.best_config)
    assert best.output_dir == Path("mine")
    assert best.lr == max(config.lr for config in trainer.seen)
    assert SweepConfig.load(config.output_dir / "kelp-sweep.yaml") == config
    text = result.summary()
    assert f"best: trial {result.best.number}, val/dice" in text
    assert "The best score of 3 is optimistic" in text
    assert "importances: of two options or more, from 10 trials on" in text


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_importances_show_what_matters_and_what_noise_alone_would(configure, fake, slope):
    fake(lambda config: slope * (config.lr + 1e-5 * config.batch_size))
    config = configure(trials=10, sampler="random")
    text = kelp.sweep(config).text
    found = re.search(r"shuffled\): lr (\S+) \((\S+)\), batch_size", text)
    page = (config.output_dir / "report.html").read_text()
    if slope:
        assert float(found[1]) > 0.8 > float(found[2])
        assert page.count("<img") == 2
    else:
        assert found is None
        assert page.count("<img") == 1


# --- real trainings


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_trials_are_runs_of_training_under_one_parent(
    configure, empty_store, monkeypatch, tmp_path, capfd
):
    config = configure(base={"epochs": 2}, trials=2)
    for folder in (config.output_dir, tmp_path / "mine"):
        folder.mkdir()
        shutil.copy(empty_store, folder)
    train, count = module.train, []

    def pruning(config_of_trial, progress, part):
        count.append(config_of_trial)

        def end_epoch(epoch, metrics):
            part.end_epoch(epoch, metrics)
            raise Pruned(f"after epoch {epoch}")

        whole = len(count) == 1
        return train(
            config_of_trial, progress, part if whole else replace(part, end_epoch=end_epoch)
        )

    monkeypatch.setattr(module, "train", pruning)
    result = kelp.sweep(config)
    complete, pruned = result.trials
    assert [complete.state, pruned.state] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert pruned.user_attrs["reason"] == "after epoch 1"
    with quiet_libraries():
        client = mlflow_client(config.output_dir)
        runs = client.search_runs([client.get_experiment_by_name("kelp").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.run_name, parent.info.status) == ("sweep", "FINISHED")
    by_id = {run.info.run_id: run for run in runs}
    for outcome, status in ((complete, "FINISHED"), (pruned, "KILLED")):
        run = by_id[outcome.user_attrs["run"]]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.info.run_name, run.info.status) == (f"trial {outcome.number}", status)
        assert float(run.data.params["lr"]) == outcome.params["lr"]
    assert by_id[pruned.user_attrs["run"]].data.tags["kelp.pruned"] == "after epoch 1"
    folder = config.output_dir / "kelp"
    history = json.loads(
        (folder / complete.user_attrs["run"] / "artifacts" / "history.json").read_text()
    )
    assert complete.value == max(epoch["val/dice"] for epoch in history)
    assert (folder / complete.user_attrs["run"] / "artifacts" / "bundle").is_dir()
    assert not (folder / pruned.user_attrs["run"] / "artifacts" / "bundle").exists()
    assert (folder / parent.info.run_id / "artifacts" / "best.yaml").is_file()

    # What was found trains as it is, to the same score.
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(result.best_config)]) == 0
    assert f"val/dice {complete.value:.4f}" in capfd.readouterr().out
    (again,) = (tmp_path / "mine" / "kelp").iterdir()
    weights = "artifacts/bundle/weights.safetensors"
    assert (again / weights).read_bytes() == (
        folder / complete.user_attrs["run"] / weights
    ).read_bytes()


@pytest.mark.slow
def test_ctrl_c_leaves_a_sweep_that_goes_on(configure, empty_store):
    config = configure(base={"epochs": 500}, space={"lr": LR}, trials=1)
    config.output_dir.mkdir()
    shutil.copy(empty_store, config.output_dir)
    record = config.output_dir.with_name("kelp-sweep.yaml")
    record.write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "kelp", "sweep", "--config", str(record)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "epoch 1 of 500" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=300) == 130
    finally:
        process.kill()
        process.communicate()
    assert "the same command resumes the sweep" in rest
    with open_study(config, *read(config)) as study:
        (trial,) = study.trials
        assert trial.state == TrialState.FAIL
        runs = (trial.user_attrs["run"], study.user_attrs["parent"])
    with quiet_libraries():
        client = mlflow_client(config.output_dir)
        assert [client.get_run(run).info.status for run in runs] == ["KILLED"] * 2
