"""`kill -9` at random moments of a real `kelp predict`, then the same command again.

    python benchmarks/kills.py [--kills 20] [--size 1400x1100] [--seed 0]

A simulated scene, a small network with random weights, probabilities saved beside the mask. Each
time the process gets SIGKILL at a moment drawn evenly between its first finished batch and the
usual end of the process, so also while the final files are made; the restarted command must end
with the bytes of an undisturbed run. Work redone: tiles that the killed process had reported as
finished, less those that the restarted one counts as `done earlier`, in rows of tiles.
"""

from __future__ import annotations

import hashlib
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
from kelp.inference.spec import BundleSpec
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import read_scene
from kelp.simulation.scene import simulate_scene
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


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tif")
    }


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--size", default="1400x1100")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    height, _, width = options.size.partition("x")
    rows: list[Row] = []
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
