"""`kill -9` at random moments of a real `kelp predict`, `slice` or `train`, then the command again.

    python benchmarks/kills.py [--of predict] [--kills 20] [--size 1400x1100] [--seed 0]

`--of slice` and `--of train`: killed at a moment drawn evenly between the first file and the usual
end. The restarted slice must leave the same files with the same bytes, the resumed training (or a
new one, where none had begun) the same weights; both leave nothing hidden behind.

Of predict: a simulated scene, a small network with random weights, probabilities saved beside the
mask. Each time the process gets SIGKILL at a moment drawn evenly between its first finished batch
and the usual end of the process, so also while the final files are made; the restarted command must
end with the bytes of an undisturbed run. Work redone: tiles that the killed process had reported as
finished, less those that the restarted one counts as `done earlier`, in rows of tiles.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
import rasterio
import torch
from measuring import Row
from rasterio.transform import from_origin

from kelp.config import TrainConfig
from kelp.data_prep.stats import channel_statistics
from kelp.inference.bundle import file_sha256
from kelp.inference.spec import BundleSpec
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import read_scene
from kelp.simulation.scene import simulate_scene
from kelp.tables import IMAGES_TABLE
from kelp.tiling.grid import TileGrid

# The command itself, which then tells of each batch and not every ten seconds.
COMMAND = (
    "import sys, torch, kelp.cli.console; torch.set_num_threads(1); "
    "kelp.cli.console._SECONDS_BETWEEN_LINES = -1.0; "
    "from kelp.cli import main; sys.exit(main(sys.argv[1:]))"
)
TILE = 64


@dataclass(frozen=True)
class Outcome:
    """What a process told before it ended or was killed."""

    tiles: int
    """Finished, by its last progress line."""
    first: float
    """Seconds until its first progress line."""
    seconds: float
    text: str
    killed: bool

    @property
    def finished(self) -> bool:
        """Whether all was complete before the process began."""
        return "1 already finished" in self.text

    @property
    def done_earlier(self) -> int:
        """Tiles that the process took over from another."""
        found = re.search(r"([\d,]+) done earlier", self.text)
        return int(found[1].replace(",", "")) if found else 0


@dataclass(frozen=True)
class Case:
    """The command to kill."""

    bundle: Path
    scene: Path
    tiles: int
    columns: int

    def run(self, target: Path, kill_after: float | None = None) -> Outcome:
        """Run the command; `kill_after` its first progress line, in seconds, kill it."""
        arguments = ["predict", f"--data_dir={self.scene}", f"--output_dir={target}"]
        arguments += [f"--run_dir={self.bundle}", "--save_probabilities", "--batch_size=4"]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines: list[str] = []
        tiles, first, timer = 0, 0.0, None
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            told = re.search(r"predicting: (\d+) of", line)
            if not told:
                continue
            tiles = int(told[1])
            if not first:
                first = time.monotonic() - started
                if kill_after is not None:
                    timer = threading.Timer(kill_after, process.send_signal, [signal.SIGKILL])
                    timer.start()
        code = process.wait()
        if timer:
            timer.cancel()
        if code not in (0, -signal.SIGKILL):
            raise SystemExit("".join(lines))
        spent = time.monotonic() - started
        return Outcome(tiles, first, spent, "".join(lines), code == -signal.SIGKILL)


def make_case(folder: Path, height: int, width: int) -> Case:
    path = folder / "scene.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(BANDS),
        height=height,
        width=width,
        dtype="int16",
        nodata=-32768,
        compress="deflate",
        tiled=True,
        crs="EPSG:32610",
        transform=from_origin(500000, 4000000, 30, 30),
    ) as out:
        out.write(simulate_scene(0, height, width).pixels.astype(np.int16))
        out.descriptions = BANDS
    options = {"image_size": 64, "encoder": "tu-resnet18", "sahi": True}
    config = TrainConfig(data_dir=folder, metadata_fp=folder, output_dir=folder, **options)
    network = network_spec(config, (TILE, TILE)).model_dump()
    spec = BundleSpec.model_validate(
        {
            **network,
            "statistics": channel_statistics(
                [read_scene(path)], BANDS, IndexSettings("dn", True, True)
            ),
        }
    )
    torch.manual_seed(0)
    bundle = save_bundle(folder / "bundle", KelpNet(spec), spec)
    grid = TileGrid((height, width), TILE, TILE // 2)
    return Case(bundle, path, len(grid), len(grid.columns))


def spawn(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kelp", *arguments, "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def until_done(process: subprocess.Popen[str], target: Path, after: float | None) -> list[float]:
    """Seconds to the first file and to the end; `after` the first file the group is killed."""
    began, first = time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(0.005)
        spent = time.monotonic() - began
        if not first and target.is_dir() and any(target.iterdir()):
            first = spent
        if first and after is not None and spent - first >= after:
            os.killpg(process.pid, signal.SIGKILL)
            break
    _, told = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(told)
    return [first, time.monotonic() - began]


def simulated(folder: Path) -> list[str]:
    """A small data set; the options that name it."""
    for name, *options in (
        ("simulate", "--places=3", "--dates=2", "--test=1", "--size=256"),
        ("metadata", f"--data_dir={folder / 'data'}"),
    ):
        target = folder / ("data" if name == "simulate" else "table")
        until_done(spawn([name, f"--output_dir={target}", *options]), target, None)
    return [f"--metadata_fp={folder / 'table' / IMAGES_TABLE}"]


def slice_again(folder: Path, target: Path) -> list[str]:
    data = folder / "data" / "train"
    sizes = ["--image_size=64", "--stride=16", "--workers=1"]
    return ["slice", f"--data_dir={data}", f"--output_dir={target}", *sizes]


def train_again(folder: Path, target: Path) -> list[str]:
    options = ["--encoder=tu-test_resnet", "--decoder_channels=16,8,8,4", "--pretrained=False"]
    options += ["--image_size=64", "--epochs=4", "--num_workers=0", "--min_dice=0"]
    options += ["--samples_per_epoch=48", "--batch_size=8", "--use_weighted_sampler=True"]
    options += ["--device=cpu", "--plot_n_batches=0"]
    begun = sorted(target.glob("*/*/artifacts/config.yaml"))
    if begun:
        options += [f"--resume_from={begun[0].parents[1]}"]
    return ["train", f"--data_dir={folder / 'data'}", f"--output_dir={target}", *options]


def kill_often(name: str, kills: int, moments: random.Random) -> list[Row]:
    """Rows of a command that writes a folder."""
    again = {"slice": slice_again, "train": train_again}[name]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, target = Path(temporary), Path(temporary) / "out"
        table = simulated(folder)
        first, whole = until_done(spawn(again(folder, target) + table), target, None)
        wanted = results(target, name)
        print(f"undisturbed: {whole:.1f} s, {first:.1f} s to the first file, {len(wanted)} files")
        while len(rows) < kills:
            shutil.rmtree(target)
            after = moments.uniform(0, whole - first)
            process = spawn(again(folder, target) + table)
            until_done(process, target, after)
            if process.returncode == 0:  # it was quicker than usual
                continue
            done = len(results(target, name))
            until_done(spawn(again(folder, target) + table), target, None)
            left = [path for path in target.rglob(".*") if path.suffix == ".partial"]
            rows.append(
                {
                    "killed after s": round(after, 2),
                    "files done": done,
                    "of": len(wanted),
                    "same bytes": results(target, name) == wanted,
                    "nothing left behind": not left,
                }
            )
            measuring.print_table(rows[-1:])
    return rows


def results(target: Path, name: str) -> dict[str, str]:
    """What must be the same: all files of a slice, the weights of a training."""
    pattern = "*" if name == "slice" else "*.safetensors"
    files = [path for path in target.rglob(pattern) if path.is_file()]
    return {
        # The folders of a run have a name of its own.
        str(path.relative_to(target) if name == "slice" else path.parent.name): file_sha256(path)
        for path in files
        if path.name[0] != "."
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tif")
    }


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--of", choices=("predict", "slice", "train"), default="predict")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--size", default="1400x1100")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    if options.of != "predict":
        rows = kill_often(options.of, options.kills, moments)
        good = sum(row["same bytes"] and row["nothing left behind"] for row in rows)
        verdict = [f"{good} of {len(rows)} end as an undisturbed run (target: all)"]
        measuring.report(f"kill -9 of kelp {options.of}", rows, verdict, options.json)
        return
    height, _, width = options.size.partition("x")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make_case(folder, int(height), int(width))
        whole = case.run(folder / "whole")
        wanted = digests(folder / "whole")
        print(f"undisturbed: {whole.seconds:.1f} s, {whole.first:.1f} s to the first batch")
        while len(rows) < options.kills:
            target = folder / "killed"
            shutil.rmtree(target, ignore_errors=True)
            after = moments.uniform(0, whole.seconds - whole.first)
            killed = case.run(target, after)
            if not killed.killed:  # it was quicker than usual
                continue
            again = case.run(target)
            redone = 0 if again.finished else max(0, killed.tiles - again.done_earlier)
            left = [path.name for path in target.glob(".*")]
            rows.append(
                {
                    "killed after s": round(after, 2),
                    "tiles done": killed.tiles,
                    "of": case.tiles,
                    "taken over": again.done_earlier,
                    "rows of tiles redone": redone / case.columns,
                    "same bytes": digests(target) == wanted,
                    "nothing left behind": not left,
                }
            )
            measuring.print_table(rows[-1:])
    same = sum(row["same bytes"] for row in rows)
    strips = [row["rows of tiles redone"] for row in rows]
    inside = sum(0 < row["tiles done"] < row["of"] for row in rows)
    verdict = [
        f"{same} of {len(rows)} end with the bytes of an undisturbed run (target: all); "
        f"{inside} were killed between their first and last tile",
        f"rows of tiles redone: median {statistics.median(strips):.2f}, most {max(strips):.2f} "
        "(target: at most 1)",
    ]
    measuring.report(f"kill -9, {height} x {width} px", rows, verdict, options.json)


if __name__ == "__main__":
    main()
