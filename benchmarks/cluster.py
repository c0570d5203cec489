"""`kelp predict --scheduler` against one process: speed, overhead, faults, memory.

    python benchmarks/cluster.py [--side 2304] [--images 200] [--repeats 3] [--kills 10]
        [--planned 5120]

Real `dask scheduler` and `dask worker` processes on this machine, workers with one thread each,
networks with one thread each. A U-Net with EfficientNet-Lite0 (random weights: time does not
depend on them) as `kelp train --sahi True` makes it. Ratios are medians of paired runs; a
cluster's first run is not counted. What the machine itself allows stands beside: two processes
without Dask, each with half of the small images.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import cloudpickle
import kills
import measuring
import numpy as np
import rasterio
import torch
from measuring import Row

import kelp
from kelp.config import PredictConfig, TrainConfig
from kelp.data_prep.stats import channel_statistics
from kelp.inference.bundle import load_bundles
from kelp.inference.cluster import Setting, perform_there
from kelp.inference.inputs import survey
from kelp.inference.predict import PredictResult
from kelp.inference.predictor import Predictor
from kelp.inference.spec import BundleSpec
from kelp.inference.work import Runner, WorkQueue
from kelp.io.executors import gather
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import read_scene
from kelp.sensors import find_scenes
from kelp.simulation.scene import simulate_scene

_WORKERS: Final = (1, 2, 4)


class Dask:
    """A scheduler and workers, as started by hand."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.file = folder / f"scheduler-{workers}.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--no-dashboard")
        while not self._is_written:  # a worker that reads half of the file gives up
            time.sleep(0.1)
        self.workers = [self.add() for _ in range(workers)]

    @property
    def _is_written(self) -> bool:
        with suppress(OSError, ValueError):
            return bool(json.loads(self.file.read_text(encoding="utf-8")))
        return False

    def add(self) -> subprocess.Popen[bytes]:
        """Start a worker."""
        return self._start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(self.file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.file.parent,
        )

    def close(self) -> None:
        """End all processes."""
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()
        self.file.unlink(missing_ok=True)


@contextmanager
def dask(folder: Path, workers: int) -> Iterator[Dask]:
    cluster = Dask(folder, workers)
    try:
        yield cluster
    finally:
        cluster.close()


def write(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype="int16",
        nodata=-32768,
        compress="deflate",
        tiled=True,
    ) as out:
        out.write(pixels.astype(np.int16))
        out.descriptions = BANDS


def make(folder: Path, side: int, images: int) -> Path:
    """A large scene, small images, and a bundle."""
    (folder / "large").mkdir()
    (folder / "small").mkdir()
    write(folder / "large" / "scene.tif", simulate_scene(0, side, side).pixels)
    for number in range(images):
        write(folder / "small" / f"{number:04d}.tif", simulate_scene(number, 350, 350).pixels)
    some = (read_scene(path) for path in sorted((folder / "small").iterdir()))
    stats = channel_statistics(some, BANDS, IndexSettings("dn", True, True))
    options = {"image_size": 224, "encoder": "tu-tf_efficientnet_lite0", "sahi": True}
    config = TrainConfig(data_dir=folder, metadata_fp=folder, output_dir=folder, **options)
    network = network_spec(config, (128, 128)).model_dump()
    spec = BundleSpec.model_validate({**network, "statistics": stats})
    torch.manual_seed(0)
    return save_bundle(folder / "bundle", KelpNet(spec), spec)


def predicted(
    data: Path, bundle: Path, out: Path, scheduler: Path | None, **options: Any
) -> PredictResult:
    shutil.rmtree(out, ignore_errors=True)
    return kelp.predict_scenes(
        PredictConfig(
            data_dir=data,
            run_dir=bundle,
            output_dir=out,
            device="cpu",
            threads=1,
            scheduler=str(scheduler) if scheduler else None,
            **options,
        )
    )


def halves(folder: Path, bundle: Path, repeats: int) -> float:
    """How many times as fast two processes with nothing between them are as one of them alone."""
    images = sorted((folder / "small").iterdir())
    lists = []
    for name, some in (("all", images), ("even", images[::2]), ("odd", images[1::2])):
        lists.append(folder / f"{name}.txt")
        lists[-1].write_text("\n".join(map(str, some)), encoding="utf-8")
    whole, *parts = [(path, bundle, folder / f"of-{path.stem}", None) for path in lists]
    single, double = [], []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_predicted, parts, chunksize=1)  # torch is imported
        for _ in range(repeats):
            single.append(measuring.seconds(lambda: pool.starmap(_predicted, [whole])))
            double.append(measuring.seconds(lambda: pool.starmap(_predicted, parts, chunksize=1)))
    return measuring.ratio(single, double)


def _predicted(data: Path, bundle: Path, out: Path, scheduler: Path | None) -> None:
    torch.set_num_threads(1)
    predicted(data, bundle, out, scheduler)


def speed(folder: Path, bundle: Path, repeats: int) -> tuple[list[Row], list[str]]:
    """Every round runs all ways, each with a cluster of its own: idle workers are no rest."""
    rows, apart = [], halves(folder, bundle, repeats)
    verdicts = [
        f"two processes without Dask, half of the small images each: {apart:.2f} times as fast as "
        "one of them"
    ]
    for kind in ("large", "small"):
        runs: dict[int, list[float]] = {workers: [] for workers in (0, *_WORKERS)}
        for _ in range(repeats):
            for workers, times in runs.items():
                out = folder / f"{kind}-{workers}"
                run = partial(predicted, folder / kind, bundle, out)
                if not workers:
                    times.append(measuring.seconds(lambda run=run: run(None)))
                    continue
                with dask(folder, workers) as cluster:
                    run(cluster.file)  # the workers import torch and load the network
                    times.append(measuring.seconds(lambda run=run, c=cluster: run(c.file)))
        same = {json.dumps(kills.digests(folder / f"{kind}-{workers}")) for workers in runs}
        names = {0: "one process", **{n: f"{n} workers" for n in _WORKERS}}
        medians = {names[n]: statistics.median(times) for n, times in runs.items()}
        rows.append({"": kind, **medians, "same bytes": len(same) == 1})
        faster = measuring.ratio(runs[1], runs[2])
        over = measuring.ratio(runs[1], runs[0]) - 1
        verdicts += [
            f"{kind}: two workers {faster:.2f} times as fast as one, {faster / apart:.3f} of what "
            f"two processes without Dask reach (target 0.95); one worker takes {over:+.1%} beside "
            "one process (target at most +5%)"
        ]
    return rows, verdicts


def tasks(folder: Path, bundle: Path) -> str:
    """Bytes of what is sent for a unit."""
    sizes = []
    for kind in ("large", "small"):
        config = PredictConfig(
            data_dir=folder / kind, run_dir=bundle, output_dir=folder / "out", device="cpu"
        )
        (folder / "out").mkdir(exist_ok=True)
        bundles = load_bundles(config.run_dir)
        outputs = {path: folder / "out" / path.name for path in find_scenes(config.data_dir)}
        found, _ = survey(outputs, (), [one.spec for one in bundles])
        predictor = Predictor.of(config, bundles)
        queue = WorkQueue(Runner(config, predictor), found, lambda: 2)
        setting = Setting(config.model_dump_json(), "0" * 64, predictor.processor)
        while item := queue.next():
            sizes.append(len(cloudpickle.dumps((partial(perform_there, setting), item))))
    return (
        f"{len(sizes)} tasks of {statistics.median(sizes):,.0f} bytes, most {max(sizes):,} "
        "(target: under 20 kB)"
    )


def constants(folder: Path, bundle: Path, count: int = 1000) -> list[str]:
    """What the model in docs/scaling.md is made of, beside seconds of tiles."""
    lines = []
    with dask(folder, 2) as dask_of_two, gather(1, str(dask_of_two.file)) as cluster:
        assert not isinstance(cluster, int)
        list(cluster.map(abs, range(64)))
        left = iter(range(count))
        each = measuring.seconds(lambda: list(cluster.run(abs, lambda: next(left, None)))) / count
        lines.append(f"a task costs the scheduler and the client {1e3 * each:.1f} ms")
    for kind in ("small", "large"):
        data = folder / kind
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        config = PredictConfig(
            data_dir=data, run_dir=bundle, output_dir=folder / "out", device="cpu"
        )
        bundles = load_bundles(config.run_dir)
        outputs = {path: folder / "out" / path.name for path in find_scenes(data)}
        began = time.perf_counter()
        found, _ = survey(outputs, (), [one.spec for one in bundles])
        looked = time.perf_counter()
        WorkQueue(Runner(config, Predictor.of(config, bundles)), found, lambda: 2)
        planned = time.perf_counter()
        lines.append(
            f"a {kind} scene costs a worker {1e3 * (looked - began) / len(found):.1f} ms to look "
            f"at and the client {1e3 * (planned - looked) / len(found):.2f} ms to plan"
        )
    return lines


def killed(folder: Path, count: int, seed: int) -> tuple[list[Row], list[str]]:
    """A worker of two gets SIGKILL at a random moment; a new one comes."""
    moments = random.Random(seed)
    case = kills.make_case(folder, 1400, 1100)
    rows: list[Row] = []

    def run(out: Path, cluster: Dask) -> PredictResult:
        return predicted(case.scene, case.bundle, out, cluster.file, save_probabilities=True)

    with dask(folder, 2) as cluster:
        run(folder / "whole", cluster)  # loads the network
        seconds = measuring.seconds(lambda: run(folder / "whole", cluster))
        wanted = kills.digests(folder / "whole")
        while len(rows) < count:
            after = moments.uniform(0.1, 0.9) * seconds
            victim = cluster.workers.pop(0)
            timer = threading.Timer(after, victim.send_signal, [signal.SIGKILL])
            timer.start()
            result = run(folder / "killed", cluster)
            timer.join()
            victim.wait()
            cluster.workers.append(cluster.add())
            counts = result.counts
            rows.append(
                {
                    "killed after s": round(after, 2),
                    "of": round(seconds, 2),
                    "tiles": counts.tiles,
                    "told of": counts.predicted + counts.unobserved,
                    "found done": counts.resumed,
                    "same bytes": kills.digests(folder / "killed") == wanted,
                    "nothing left behind": not list((folder / "killed").glob(".*")),
                }
            )
            measuring.print_table(rows[-1:])
            time.sleep(3)  # for the new worker to come
    good = sum(row["same bytes"] and row["nothing left behind"] for row in rows)
    once = all(row["told of"] + row["found done"] == row["tiles"] for row in rows)
    return rows, [
        f"{good} of {len(rows)} end with the bytes of an undisturbed run (target: all); each tile "
        f"is told of once or found done: {once}"
    ]


def planned(folder: Path, side: int) -> str:
    """Memory of the scheduler while many tiles are predicted by a small network."""
    case = kills.make_case(folder, side, side)
    with dask(folder, 2) as cluster:
        result = predicted(
            case.scene,
            case.bundle,
            folder / "many",
            cluster.file,
            sahi_tile_size=32,
            sahi_overlap=16,
            batch_size=64,
        )
        status = Path(f"/proc/{cluster.scheduler.pid}/status").read_text(encoding="utf-8")
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return f"{result.counts.tiles:,} tiles: the scheduler takes at most {peak:.0f} MB (target: 500)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--side", type=int, default=2304, help="of the large scene, px")
    parser.add_argument("--images", type=int, default=200, help="small ones, 350 px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--planned", type=int, default=5120, help="side of the last scene; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    verdicts = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows: list[Row] = []
        if options.repeats:
            bundle = make(folder, options.side, options.images)
            verdicts += [tasks(folder, bundle), *constants(folder, bundle)]
            rows, told = speed(folder, bundle, options.repeats)
            verdicts += told
        for name, wanted in (("kills", options.kills), ("planned", options.planned)):
            part = folder / name
            part.mkdir()
            if wanted and name == "kills":
                _, told = killed(part, wanted, options.seed)
                verdicts += told
            elif wanted:
                verdicts.append(planned(part, wanted))
    measuring.report("Dask cluster", rows, verdicts, options.json)


if __name__ == "__main__":
    main()
