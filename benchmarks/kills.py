"""`kill -9` at random moments of a real `kelp predict`, `slice` or `train`, then the command again.

    python benchmarks/kills.py [--of predict] [--processes 1] [--kills 20] [--size 1400x1100]

`--of slice`, `train`, `pack` (the store of packed images that a training begins with), and predict
with `--processes 2`: all processes work in one output folder, in every second turn under the names
of different hosts. Each is killed at a moment of its own, drawn evenly between the first file and
the usual end; a turn counts where at least one was. Then all start again at once and run to their
end. What is left must be what one undisturbed process leaves: the same files with the same bytes
(of a training its weights, for each run; of the store its arrays), and nothing hidden. Of two
predictions one may refuse a scene that the other is writing; a last one alone then finds all done.

Of one predict: a simulated scene, a small network with random weights, probabilities saved beside
the mask. Each time the process gets SIGKILL at a moment drawn evenly between its first finished
batch and the usual end of the process, so also while the final files are made; the restarted
command must end with the bytes of an undisturbed run. Work redone: tiles that the killed process
had reported as finished, less those that the restarted one counts as `done earlier`, in rows.
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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
import rasterio
import torch
from measuring import Row
from rasterio.transform import from_origin
from safetensors import safe_open

from kelp.config import TrainConfig
from kelp.data_prep.stats import channel_statistics
from kelp.inference.spec import BundleSpec
from kelp.io.files import file_sha256
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


# The command on a host of that name.
ON_HOST = (
    "import socket, sys; name = sys.argv.pop(1); socket.gethostname = lambda: name; "
    "from kelp.cli import main; sys.exit(main(sys.argv[1:]))"
)
# What `kelp train` does before its first batch.
PACK = """
import socket, sys
from pathlib import Path
name, folder, target = sys.argv[1:]
socket.gethostname = lambda: name
from types import SimpleNamespace
from kelp.config import TrainConfig
from kelp.nn.data.packing import pack

images = sorted(Path(folder).glob("data/train/images/*.tif"))
mask = lambda path: path.parents[1] / "masks" / path.name.replace("_satellite", "_kelp")
options = {"data_dir": folder, "metadata_fp": folder, "output_dir": target, "num_workers": 0}
sources = [SimpleNamespace(image=path, mask=mask(path)) for path in images]
pack(sources, TrainConfig(**options), lambda *_: None)
"""
REFUSED = "another process is writing it"


@dataclass(frozen=True)
class Shared:
    """A command that several processes run in one output folder, and what it must leave."""

    name: str
    folder: Path

    def commands(self, target: Path, processes: int) -> list[list[str]]:
        """The arguments of each process, the interpreter's first."""
        folder, data = self.folder, self.folder / "data" / "train"
        table = f"--metadata_fp={folder / 'table' / IMAGES_TABLE}"
        if self.name == "pack":
            return [[PACK, "HOST", str(folder), str(target)]] * processes
        if self.name == "predict":
            options = [f"--data_dir={data / 'images'}", "--run_dir=coasts", "--backend=onnx"]
            options += ["--save_probabilities", "--batch_size=1", "--threads=1"]
        elif self.name == "slice":
            options = [f"--data_dir={data}", table, "--image_size=64", "--stride=16"]
            options += ["--workers=1"]
        else:
            options = ["--encoder=tu-test_resnet", "--decoder_channels=16,8,8,4", table]
            options += ["--pretrained=False", f"--data_dir={folder / 'data'}", "--device=cpu"]
            options += ["--image_size=64", "--epochs=2", "--num_workers=0", "--min_dice=0"]
            options += ["--samples_per_epoch=48", "--batch_size=8", "--plot_n_batches=0"]
            options += ["--use_weighted_sampler=True", "--anchoring=none"]
        begun = sorted(target.glob("*/*/artifacts/config.yaml")) if self.name == "train" else []
        again = [[f"--resume_from={file.parents[1]}"] for file in begun]
        again += [[]] * (processes - len(again))
        command = [ON_HOST, "HOST", self.name, f"--output_dir={target}", *options, "--quiet"]
        return [command + more for more in again[:processes]]

    def run(self, target: Path, hosts: list[str], within: list[float]) -> tuple[list[int], float]:
        """Run a process for each host; its exit status or -9, and seconds to the first file.

        `within`: seconds from the first file in `target` after which each is killed, or none.
        """
        began, first = time.monotonic(), 0.0
        with ExitStack() as stack:
            running = []
            for host, command in zip(hosts, self.commands(target, len(hosts)), strict=True):
                said = stack.enter_context(tempfile.TemporaryFile("w+"))
                line = [host if part == "HOST" else part for part in command]
                process = subprocess.Popen(
                    [sys.executable, "-c", *line],
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
                running.append((process, said))
            while any(process.poll() is None for process, _ in running):
                time.sleep(0.005)
                spent = time.monotonic() - began
                if not first and target.is_dir() and any(target.iterdir()):
                    first = spent
                for (process, _), after in zip(running, within, strict=False):
                    if first and spent - first >= after and process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            for process, said in running:
                said.seek(0)
                text = said.read()
                fine = process.returncode in (0, -signal.SIGKILL)
                if not fine and not (process.returncode == 2 and REFUSED in text):
                    raise SystemExit(text)
        return [process.returncode for process, _ in running], first

    def results(self, target: Path) -> dict[str, str]:
        """Digests of what must be the same, hidden files with them."""
        if self.name == "pack":
            return packed(target / "packed")
        found = {}
        for path in target.rglob("*.safetensors" if self.name == "train" else "*"):
            # A run has an id of its own, and a record tells when its map was made.
            if path.is_file() and path.suffix != ".json":
                name = path.relative_to(target).as_posix()
                found[name] = file_sha256(path)
        if self.name == "train":
            return {
                name: digest for name, digest in found.items() if not name.startswith("packed/")
            }
        return found


def packed(store: Path) -> dict[str, str]:
    """Digests of the arrays of a store of packed images; a file that cannot be read is an error."""
    found = {}
    for file in store.glob("[!.]*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118  # it is no dict
                found[key] = hashlib.sha256(opened.get_tensor(key).tobytes()).hexdigest()
    return found


def as_alone(found: dict[str, str], wanted: dict[str, str], name: str, runs: int) -> bool:
    """Whether a folder holds what one undisturbed process left, of a training once for each run."""
    if name != "train":
        return found == wanted
    by_run: dict[str, dict[str, str]] = {}
    for path, digest in found.items():
        run, _, file = path.partition("/artifacts/")
        by_run.setdefault(run, {})[file] = digest
    whole = {path.partition("/artifacts/")[2]: digest for path, digest in wanted.items()}
    return len(by_run) >= runs and all(files == whole for files in by_run.values())


def prepare(name: str, folder: Path) -> Shared:
    """A small simulated data set."""
    images = 12 if name == "pack" else 3
    for command in (
        ["simulate", f"--places={images}", "--dates=2", "--test=1", "--size=256"],
        ["metadata", f"--data_dir={folder / 'data'}"],
    ):
        target = folder / ("data" if command[0] == "simulate" else "table")
        arguments = [*command, f"--output_dir={target}", "--quiet"]
        subprocess.run([sys.executable, "-m", "kelp", *arguments], check=True)
    return Shared(name, folder)


def kill_often(name: str, processes: int, kills: int, moments: random.Random) -> list[Row]:
    """Rows of a command that several processes run in one folder."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        shared, target = prepare(name, Path(temporary)), Path(temporary) / "out"
        shared.run(target, ["a"], [])
        wanted = shared.results(target)
        shutil.rmtree(target)
        began = time.monotonic()
        _, first = shared.run(target, ["a"] * processes, [])
        usual = time.monotonic() - began - first
        print(
            f"undisturbed: {first:.1f} s to the first file, {usual:.1f} more; {len(wanted)} files"
        )
        while len(rows) < kills:
            shutil.rmtree(target)
            hosts = ["a", "b" if len(rows) % 2 else "a"][:processes]
            within = [moments.uniform(0, usual) for _ in hosts]
            ended, _ = shared.run(target, hosts, within)
            if not any(ended):  # they were quicker than usual
                continue
            done = len(shared.results(target))
            again, _ = shared.run(target, hosts, [])
            if any(again):
                again, _ = shared.run(target, hosts[:1], [])
            rows.append(
                {
                    "hosts": len(set(hosts)),
                    "killed after s": ", ".join(
                        f"{after:.2f}" if code else "-"
                        for after, code in zip(within, ended, strict=True)
                    ),
                    "files then": done,
                    "of": len(wanted),
                    "as alone": as_alone(shared.results(target), wanted, name, 1)
                    and not any(again),
                    "nothing left behind": not list(target.rglob(".*")),
                }
            )
            measuring.print_table(rows[-1:])
    return rows


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tif")
    }


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--of", choices=("predict", "slice", "train", "pack"), default="predict")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--size", default="1400x1100")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    if options.of != "predict" or options.processes > 1:
        rows = kill_often(options.of, options.processes, options.kills, moments)
        good = sum(row["as alone"] and row["nothing left behind"] for row in rows)
        verdict = [f"{good} of {len(rows)} end as an undisturbed run (target: all)"]
        title = f"kill -9 of kelp {options.of}, {options.processes} at once"
        measuring.report(title, rows, verdict, options.json)
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
