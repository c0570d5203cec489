"""A Dask cluster of real processes: the same files, and faults that cost nobody his work."""

import json
import operator
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bundles import tiny_bundle
from clusters import dask, process
from laws import predict, predict_command, rasters
from world import coast, make_world, write_tif

import kelp
from kelp.cli import main
from kelp.config import PredictConfig
from kelp.errors import ConfigError, KelpError
from kelp.inference import cluster as workers_side
from kelp.io.executors import gather

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with dask(tmp_path_factory.mktemp("dask")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A large scene and small ones, a bundle with a real network, and what one process makes."""
    root = tmp_path_factory.mktemp("scenes")
    scenes = root / "scenes"
    scenes.mkdir()
    write_tif(scenes / "L_satellite.tif", coast((1100, 90), np.random.default_rng(3))[0])
    for i in range(10):
        image, _ = coast((60, 70), np.random.default_rng(i))
        write_tif(scenes / f"S{i}_satellite.tif", image)
    bundle = tiny_bundle(root / "bundle", decoder_channels=(16, 8, 8, 4, 4))
    predict(scenes, (bundle,), root / "alone", threads=1, save_probabilities=True)
    return scenes, bundle, root / "alone"


def on_cluster(world, out, scheduler, *more):
    scenes, bundle, _ = world
    options = ("--scheduler", scheduler, "--quiet", "--save_probabilities", *more)
    return main(predict_command(scenes, bundle, out, *options))


def same_as_alone(world, out):
    assert rasters(out) == rasters(world[2])
    assert not list(out.glob(".*"))


def test_predict_makes_the_same_files(world, cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_cluster(world, Path("out"), str(cluster.file)) == 0
    same_as_alone(world, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    shares = json.loads((tmp_path / "out" / "kelp-workers.json").read_text())
    assert len(shares) == 2
    assert all(share["tiles"] for share in shares.values())
    assert [line.split(": ")[0].strip() for line in lines[1:]] == sorted(shares)
    assert on_cluster(world, Path("out"), cluster.address) == 0
    assert "11 already finished" in capsys.readouterr().out
    maps = Path(f"/proc/{cluster.scheduler.pid}/maps").read_text()
    assert "python" in maps
    assert "torch" not in maps  # half a gigabyte, and not needed there


def test_a_client_of_the_callers_own_is_used_and_left_open(world, cluster, tmp_path):
    scenes, bundle, _ = world
    config = PredictConfig(
        data_dir=scenes,
        run_dir=(bundle,),
        output_dir=tmp_path / "out",
        device="cpu",
        precision="32-true",
        save_probabilities=True,
    )
    with distributed.Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
        result = kelp.predict_scenes(config, client=client)
        assert client.status == "running"
    assert len(result.workers) == 2
    same_as_alone(world, tmp_path / "out")


def test_bad_scenes_are_named_and_the_rest_is_done(world, cluster, tmp_path, capsys):
    scenes, bundle, alone = world
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in scenes.iterdir():
        (mixed / path.name).symlink_to(path)
    (mixed / "T_satellite.tif").write_bytes(b"no raster")
    out = tmp_path / "out"
    assert on_cluster((mixed, bundle, alone), out, str(cluster.file)) == 2
    error = capsys.readouterr().err.strip()
    assert "1 of 12 scenes failed, the rest is done" in error
    assert "T_satellite.tif" in error
    assert "\n" not in error
    same_as_alone(world, out)


def without_time(folder):
    """Files by name, without a time at its beginning, and without the records of options."""
    found = {}
    for path in sorted(folder.rglob("*")):
        # The report tells its own folder.
        if path.is_file() and not path.name.startswith(("kelp-", "report")):
            name = path.name.partition("-stats-")[2] or str(path.relative_to(folder))
            found[name] = path.read_bytes()
    return found


def test_metadata_stats_slice_and_evaluate_make_the_same_files(cluster, tmp_path, capsys):
    raw = make_world(tmp_path, n_train=8).data_dir
    found = []
    for name, more in (("alone", []), ("shared", ["--scheduler", str(cluster.file)])):
        out = tmp_path / name
        assert main(["metadata", "--data_dir", str(raw), "--output_dir", str(out), *more]) == 0
        table = out / "train_val_test_dataset.parquet"
        train = str(raw / "train")
        assert main(["stats", "--data_dir", train, "--output_dir", str(out / "stats"), *more]) == 0
        slicing = ["--metadata_fp", str(table), "--output_dir", str(out / "sahi")]
        assert main(["slice", "--data_dir", train, *slicing, "--image_size", "32", *more]) == 0
        masks = ["--gt_dir", f"{train}/masks", "--preds_dir", f"{train}/masks"]
        assert main(["evaluate", *masks, "--output_dir", str(out / "scores"), *more]) == 0
        found.append(without_time(out))
    capsys.readouterr()
    assert len(found[0]) > 20
    assert found[0] == found[1]


@pytest.mark.parametrize("command", ["stats", "evaluate"])
def test_a_file_that_is_no_raster_is_named(command, cluster, tmp_path, capsys):
    raw = make_world(tmp_path, n_train=8).train_dir
    folder, options = {
        "stats": ("images", ["--data_dir", str(raw)]),
        "evaluate": ("masks", ["--gt_dir", f"{raw}/masks", "--preds_dir", f"{raw}/masks"]),
    }[command]
    bad = sorted((raw / folder).iterdir())[3]
    bad.write_bytes(b"II*\0 no tiff")
    options += ["--output_dir", str(tmp_path / "out"), "--scheduler", str(cluster.file)]
    assert main([command, *options]) == 2
    told = capsys.readouterr().err
    assert "1 of 8 images failed, the rest is done" in told
    assert f"{bad.name}: not a readable raster" in told
    assert list((tmp_path / "out").glob("*.json"))


@contextmanager
def killing(worker, out):
    """Kill a worker as soon as the prediction has something finished."""
    killed, over = threading.Event(), threading.Event()

    def strike():
        while not over.wait(0.02):
            if list(out.glob("*.tif")) or list(out.glob(".*.sections/*.npz")):
                worker.send_signal(signal.SIGKILL)
                worker.wait(30)
                killed.set()
                return

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join(120)


def test_a_killed_worker_costs_its_own_work_only(world, tmp_path):
    with dask(tmp_path) as cluster:
        out = tmp_path / "out"
        out.mkdir()
        with killing(cluster.workers[0], out) as killed:
            assert on_cluster(world, out, str(cluster.file), "--batch_size", "8") == 0
        assert killed.is_set()
        same_as_alone(world, out)
        assert len(json.loads((out / "kelp-workers.json").read_text())) <= 2


def test_a_lost_scheduler_ends_in_one_line_and_can_be_gone_on_with(world, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with dask(tmp_path) as cluster, killing(cluster.scheduler, out) as killed:
        assert on_cluster(world, out, str(cluster.file)) == 2
        assert killed.is_set()
    error = capsys.readouterr().err.strip()
    assert "scheduler of the cluster is lost" in error
    assert "\n" not in error
    done = len(list(out.glob("*_kelp.tif")))
    result = predict(*world[:1], (world[1],), out, threads=1, save_probabilities=True)
    assert result.skipped >= done
    assert result.counts.resumed or result.skipped
    same_as_alone(world, out)


def test_another_version_of_kelp_is_refused_by_name(tmp_path, capsys):
    # A worker whose kelp says that it is another one.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import kelp\nkelp.__version__ = '0.0.1'\n")
    with dask(tmp_path, workers=0) as cluster:
        paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        cluster.add_worker(PYTHONPATH=paths)
        with pytest.raises(KelpError, match=r"worker tcp://\S+: runs kelp 0.0.1, this is"):
            gather(1, str(cluster.file)).__enter__()


def test_a_worker_without_the_bundle_is_refused_by_name(world, cluster, tmp_path, monkeypatch):
    with gather(1, str(cluster.file)) as workers:
        config = PredictConfig(
            data_dir=world[0], run_dir=tmp_path / "elsewhere", output_dir=tmp_path, device="cpu"
        )
        setting = workers_side.Setting(config.model_dump_json(), "0")
        with pytest.raises(KelpError, match=r"worker tcp://\S+: .*elsewhere: no such folder"):
            workers.ask(workers_side.processor_of, setting, 1)
        config = config.model_copy(update={"run_dir": (world[1],)})
        setting = workers_side.Setting(config.model_dump_json(), "0")
        with pytest.raises(KelpError, match=r"worker tcp://\S+: .*another bundle"):
            workers.ask(workers_side.processor_of, setting, 1)


def test_a_task_that_kills_workers_ends_in_one_line(tmp_path):
    with (
        dask(tmp_path, workers=5) as cluster,
        gather(1, str(cluster.file)) as workers,
        pytest.raises(KelpError, match="died of one task; most likely memory"),
    ):
        list(workers.map(os._exit, [9]))


def test_deaths_are_counted_when_all_workers_died_and_others_came(tmp_path):
    with dask(tmp_path, workers=2) as cluster, gather(1, str(cluster.file)) as workers:

        def replace():
            for one in cluster.workers:
                one.wait(60)
            cluster.add_worker()
            cluster.add_worker()

        helper = threading.Thread(target=replace)
        helper.start()
        with pytest.raises(KelpError, match="died of one task; most likely memory"):
            list(workers.map(os._exit, [9]))
        helper.join()


def test_a_worker_out_of_memory_ends_in_one_line(tmp_path):
    """Its nanny kills it, and starts another one that the task kills, too."""
    with dask(tmp_path, workers=0) as cluster:
        nanny = process(
            "worker",
            "--scheduler-file",
            cluster.file,
            "--nthreads",
            1,
            "--nanny",
            "--memory-limit",
            "1GB",
            "--no-dashboard",
            "--death-timeout",
            300,
            "--local-directory",
            tmp_path,
        )
        try:
            with (
                gather(1, str(cluster.file)) as workers,
                pytest.raises(KelpError, match="died of one task; most likely memory"),
            ):
                list(workers.map(partial(operator.mul, b"x"), [3_000_000_000]))
        finally:
            nanny.terminate()  # it takes its worker along
            nanny.wait(30)


def test_a_task_is_small(world):
    cloudpickle = pytest.importorskip("cloudpickle")
    scenes, bundle, _ = world
    config = PredictConfig(data_dir=scenes, run_dir=bundle, output_dir=scenes)
    setting = workers_side.Setting(config.model_dump_json(), "0" * 64)
    assert len(cloudpickle.dumps(partial(workers_side.perform_there, setting))) < 5_000


@pytest.mark.parametrize(
    "scheduler, message",
    [
        ("nowhere", "neither local, local:N, an address"),
        ("local:0", "a number of workers, 1 or more"),
        ("local:two", "a number of workers, 1 or more"),
        ("local:", "a number of workers, 1 or more"),
        ("tcp://127.0.0.1:9", "no scheduler answers there; start one with `dask scheduler`"),
        ("tcp://127.0.0.1:abc", "no scheduler answers there"),
        ("tcp://127.0.0.1", "no scheduler answers there"),
        ("http://127.0.0.1:8786", "no scheduler answers there"),
        ("tls://127.0.0.1:9", "needs certificates"),
        ("list.json", "not a scheduler file"),
        ("text.txt", "not a scheduler file"),
    ],
)
def test_a_wrong_scheduler_is_one_line(scheduler, message, monkeypatch, tmp_path):
    from kelp.io import cluster

    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]", encoding="utf-8")
    Path("text.txt").write_bytes(b"\xff no scheduler")
    monkeypatch.setattr(cluster, "_CONNECTING", 1.0)
    with pytest.raises(ConfigError, match=message):
        gather(1, scheduler).__enter__()


def test_a_wrong_address_makes_no_client(monkeypatch):
    from kelp.io import cluster

    def client(*_, **__):
        raise AssertionError("half-made clients wait and complain when they go")

    monkeypatch.setattr(cluster, "Client", client)
    for scheduler in ("tcp://127.0.0.1:abc", "foo://x", "tls://127.0.0.1:9"):
        with pytest.raises(ConfigError, match=scheduler):
            gather(1, scheduler).__enter__()


@pytest.mark.parametrize("command", ["predict", "slice"])
def test_a_worker_that_does_not_see_the_output_folder_is_refused_by_name(
    world, cluster, tmp_path, monkeypatch, capsys, command
):
    from kelp.io.cluster import Cluster

    ask, out = Cluster.ask, tmp_path / "out"

    def blind(self, function, *arguments):
        answers = ask(self, function, *arguments)
        return dict.fromkeys(answers, False) if function.__name__ == "_sees" else answers

    monkeypatch.setattr(Cluster, "ask", blind)
    if command == "predict":
        assert on_cluster(world, out, str(cluster.file)) == 2
    else:
        raw = make_world(tmp_path / "world", n_train=3).data_dir
        data = str(raw)
        assert main(["metadata", "--data_dir", data, "--output_dir", str(tmp_path)]) == 0
        table = next(tmp_path.glob("*.parquet"))
        capsys.readouterr()
        out.mkdir()
        (out / "sahi_train_val_test_dataset.parquet").write_bytes(b"older")
        cut = ["slice", f"--data_dir={data}/train", f"--metadata_fp={table}", "--image_size=32"]
        cut += [f"--output_dir={out}", f"--scheduler={cluster.file}", "--quiet"]
        assert main(cut) == 2
        assert (out / "sahi_train_val_test_dataset.parquet").read_bytes() == b"older"
    error = capsys.readouterr().err.strip()
    assert "does not see" in error
    assert "worker tcp://" in error
    assert "\n" not in error
    assert not list(out.rglob("*.tif*"))
    assert not list(out.glob(".*"))


def test_an_error_of_a_task_is_not_taken_for_a_lost_scheduler(cluster, tmp_path):
    with gather(1, str(cluster.file)) as workers:
        workers.require_shared(tmp_path)
        assert not list(tmp_path.iterdir())
        with pytest.raises(KelpError, match=r"worker tcp://\S+: .*No such file .*absent"):
            list(workers.map(os.listdir, [str(tmp_path / "absent")]))
        with pytest.raises(KelpError, match=r"worker tcp://\S+: .*No such file .*absent"):
            workers.ask(os.listdir, str(tmp_path / "absent"))


def test_a_scheduler_without_workers_is_one_line(tmp_path, monkeypatch):
    from kelp.io import cluster

    monkeypatch.setattr(cluster, "_WAITING", 1.0)
    message = "has no worker; start one with `dask worker tcp://"
    with dask(tmp_path, workers=0) as alone, pytest.raises(KelpError, match=message):
        gather(1, str(alone.file)).__enter__()


def test_without_dask_one_line_tells_what_to_install_and_nothing_is_touched(
    world, tmp_path, monkeypatch, capsys
):
    with suppress(KeyError):
        monkeypatch.delitem(sys.modules, "kelp.io.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    scenes, bundle, _ = world
    raw = make_world(tmp_path, n_train=4).data_dir
    train, table = raw / "train", tmp_path / "train_val_test_dataset.parquet"
    cut = ["slice", "--data_dir", train, "--metadata_fp", table, "--image_size", "32"]
    assert main(["metadata", "--data_dir", str(raw), "--output_dir", str(tmp_path)]) == 0
    assert main([*map(str, cut), "--output_dir", str(tmp_path / "out" / "sliced")]) == 0
    before = without_time(tmp_path)
    capsys.readouterr()
    for name, command in {
        "sliced": cut,
        "metadata": ["metadata", "--data_dir", raw],
        "stats": ["stats", "--data_dir", train],
        "maps": ["predict", "--data_dir", scenes, "--run_dir", bundle],
    }.items():
        out = tmp_path / "out" / name
        asked = [*command, "--output_dir", out, "--scheduler", "local:1"]
        assert main(list(map(str, asked))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert 'pip install "kelp-slicer[dask]"' in error
    assert without_time(tmp_path) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sliced"]


def test_a_cluster_of_this_machine(world, tmp_path):
    out = tmp_path / "out"
    assert on_cluster(world, out, "local:1", "--threads", "1") == 0
    same_as_alone(world, out)
