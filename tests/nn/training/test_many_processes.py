"""Two real processes train one network, over gloo, on a CPU."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundles import mlflow_client
from safetensors.torch import load_file
from slicing_world import config as slicing
from slicing_world import small_training
from world import make_world, write_tif

from kelp.config import TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import InputError, ProcessError
from kelp.inference.bundle import load_bundle
from kelp.nn.training.fit import train
from kelp.progress import silent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ONE = """
import json, sys
from pathlib import Path
from kelp.config import TrainConfig
from kelp.nn.data.dataset import TileDataset
from kelp.nn.training.fit import train

seen, read = [], TileDataset.__getitem__
def recording(self, index):
    seen.append([str(self.sources[getattr(index, "row", index)].image), type(index).__name__])
    return read(self, index)
TileDataset.__getitem__ = recording
result = train(TrainConfig.load(Path(sys.argv[1])))
print(json.dumps({"seen": seen, "run_dir": str(result.run_dir), "summary": result.summary(),
                  "bundle": result.bundle.exists(), "scores": result.scores}))
"""


@pytest.fixture(scope="module", autouse=True)
def one_core_each():
    """Processes take as many threads as this says."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A network of 64 px, 18 tiles to train on, 17 to validate on in 5 batches: one short of 6."""
    world = make_world(tmp_path_factory.mktemp("world"), n_train=6, shape=(50, 70))
    table = slice_dataset(slicing(world, output_dir=tmp_path_factory.mktemp("sahi"))).table
    return small_training(
        table,
        random_crops=False,
        epochs=2,
        loss="combo",
        lr=3e-3,
        devices=2,
        device="cpu",
        augment_gain=0.1,
        lr_scheduler="reduce_lr_on_plateau",
        samples_per_epoch=23,
        use_weighted_sampler=True,
    )


@pytest.fixture(scope="module")
def whole(options, new_store, tmp_path_factory):
    """A run of two processes that something else started, as torchrun does; what each has read."""
    folder = tmp_path_factory.mktemp("whole")
    config = TrainConfig(**options, output_dir=new_store(folder / "runs"))
    (folder / "one.py").write_text(ONE)
    (folder / "config.yaml").write_text(config.to_yaml())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {
        "TORCHELASTIC_RUN_ID": "t",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(folder / "one.py"), str(folder / "config.yaml")],
            env={**os.environ, **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert [errors for _, errors in said] == ["", ""]
    return config, *(json.loads(output) for output, _ in said)


def test_together_they_see_what_one_would(whole):
    from kelp.nn.data.datamodule import FoldData, read_fold

    config, first, second = whole
    fold = read_fold(config)
    data = FoldData(fold, config, 0, pin=False)
    expected = []
    for epoch in range(config.epochs):
        data.sampler.set_epoch(epoch)
        expected += [[str(fold.train_sources[d.row].image), "Draw"] for d in data.sampler]
        expected += [[str(source.image), "int"] for source in fold.val_sources]
    assert sorted(first["seen"] + second["seen"]) == sorted(expected)
    assert len(first["seen"]) - len(second["seen"]) in range(2 * 6)  # shared, nearly evenly


def test_scores_are_those_of_one_process(whole):
    """Of the weights that both arrived at, on all of the fold."""
    from kelp.nn.data.anchoring import anchored
    from kelp.nn.data.datamodule import FoldData, read_fold
    from kelp.nn.losses import LossSettings, build_loss
    from kelp.nn.metrics import KelpScores

    config, first, _ = whole
    run_dir = Path(first["run_dir"])
    logged = history(run_dir)[-1]
    net, scores = load_bundle(run_dir / "artifacts" / "bundle-latest").net.module, KelpScores()
    loss = build_loss(config.loss, LossSettings(0.0, (1.0, 1.0)))
    total, rows = 0.0, 0
    fold = read_fold(config)
    data = FoldData(fold, config, 0, pin=False)
    data.reader = anchored(data.reader, fold.val_sources, config, silent)
    with torch.inference_mode():
        for batch in data.val_dataloader():
            logits = net(batch.raw)
            total += float(loss(logits, net.resize_target(batch.target))) * len(batch.raw)
            rows += len(batch.raw)
            p = net.to_input(logits.sigmoid(), batch.target.shape[-2:])
            scores.update(p, batch.target, batch.observed)
    assert total / rows == pytest.approx(logged["val/loss"], abs=1e-5)
    for name, value in scores.confusion().scores().items():
        assert value == pytest.approx(logged[f"val/{name}"], abs=1e-5)


def test_only_the_first_writes_and_speaks(whole):
    config, first, second = whole
    (run_dir,) = (config.output_dir / "kelp").iterdir()
    assert str(run_dir) == first["run_dir"] == second["run_dir"]
    assert first["scores"] == second["scores"]
    assert second["bundle"]  # the others wait until all is there
    assert first["summary"].startswith("trained 2 epochs")
    assert not second["summary"]
    client = mlflow_client(config.output_dir)
    (experiment,) = client.search_experiments(filter_string="name = 'kelp'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "val/dice")) == config.epochs


def test_one_is_killed_and_the_run_is_resumed(whole, options, new_store, tmp_path, caplog):
    """It ends with the weights of the run above, whoever started its processes, with pictures."""
    caplog.set_level("INFO", "kelp")
    store = new_store(tmp_path / "runs")
    options = options | {"plot_n_batches": 1}
    config = TrainConfig(**options, output_dir=store)
    steps = 3  # of an epoch: 12 draws of each process in batches of 4
    killed = []

    def kill(stage, done, total):
        if stage == "training" and done == steps + 1 and not killed:
            killed.append(children()[1])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(ProcessError, match="process 2 of 2 was killed") as error:
        train(config, kill)
    assert "\n" not in str(error.value)
    assert len(killed) == 1
    assert not children()
    (run_dir,) = (store / "kelp").iterdir()
    assert str(run_dir) in str(error.value)
    assert len(history(run_dir)) == 1

    resumed = train(TrainConfig(**options, output_dir=store, resume_from=run_dir))
    assert not children()
    assert resumed.scores == whole[1]["scores"]
    told = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in told] == ["epoch 1 of 2", "epoch 2 of 2"]
    a, b = (
        load_file(Path(folder) / "artifacts" / "bundle-latest" / "weights.safetensors")
        for folder in (whole[1]["run_dir"], run_dir)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    sheets = {path.name for path in (run_dir / "artifacts" / "samples").glob("*.png")}
    assert sheets == {"epoch-001.png", "epoch-002.png", "inputs.png"}


def test_the_error_of_another_process_is_one_line(options, new_store, tmp_path):
    """A mask of the second validation batch, which process 2 reads, has lost its rows."""
    from kelp.nn.data.datamodule import read_fold

    shutil.copytree(options["data_dir"], tmp_path / "sahi")
    moved = {
        "data_dir": tmp_path / "sahi",
        "metadata_fp": tmp_path / "sahi" / options["metadata_fp"].name,
    }
    moved["output_dir"] = new_store(tmp_path / "runs")
    config = TrainConfig(**options | moved | {"epochs": 1})
    bad = read_fold(config).val_sources[5].mask
    write_tif(bad, torch.zeros(1, 8, 32, dtype=torch.uint8).numpy())
    with pytest.raises(InputError, match=rf"{bad.name}: has 8 x 32 pixels") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not children()


def children():
    """The processes of this one's run that live, in the order of their ranks."""
    return sorted(process.pid for process in multiprocessing.active_children())


def history(run_dir):
    return json.loads((run_dir / "artifacts" / "history.json").read_text())
