"""A Landsat-sized scene under a memory budget: killed once, gone on with, looked at for seams.

    python benchmarks/whole_scene.py --run_dir RUN [--side 7800] [--max_memory 1GB] [--work_dir DIR]
    python benchmarks/whole_scene.py --network_share [--side 7800] [--work_dir DIR]

Makes a georeferenced scene of simulated coast (nodata corners as of a tilted footprint, clouds,
land), predicts it with `kelp predict` as a process with either blend; the one with Hann windows is
killed in the middle and started again. Prints measured peak memory and time, and for each blend how
steep the probabilities are across the borders of tiles beside elsewhere (1.00 = no seam), and
leaves the scene, the outputs and a picture in `--work_dir`. `--network_share`: processor time of a
prediction by the packaged network with its defaults and `--land skip`, and of the network in it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.windows import Window

import kelp
from kelp.config import PredictConfig
from kelp.inference.predictor import Predictor
from kelp.raster.bands import BANDS, NODATA
from kelp.raster.writer import MASK_COLORS
from kelp.simulation.scene import simulate_scene
from kelp.tiling.grid import TileGrid
from kelp.tiling.seams import steps

TILE, OVERLAP = 128, 64
Pixels = NDArray[np.float32]


def make_scene(path: Path, side: int, seed: int) -> None:
    """A quarter is simulated; mirror images of it continue the coast without a break."""
    half = -(-side // 2)
    quarter = simulate_scene(seed, half, half).pixels
    across = np.concatenate([quarter, quarter[:, :, ::-1]], axis=2)[:, :, :side]
    profile = {
        "driver": "GTiff",
        "count": len(BANDS),
        "height": side,
        "width": side,
        "dtype": "int32",
        "nodata": NODATA,
        "crs": "EPSG:32611",
        "transform": from_origin(2e5, 4e6, 30, 30),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
    }
    tilt = 0.2 * side  # Landsat's footprint is a square turned by some 12 degrees
    x = np.arange(side)
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.descriptions = BANDS
        for y in range(0, side, 512):
            rows = np.arange(y, min(y + 512, side))
            strip = across[:, np.where(rows < half, rows, 2 * half - 1 - rows)]
            slant, drop = tilt * rows[:, None] / side, tilt * x / side
            outside = (x < tilt - slant) | (x > side - slant)
            outside |= (rows[:, None] < drop) | (rows[:, None] > side - tilt + drop)
            strip = np.where(outside, NODATA, strip)
            dataset.write(strip, window=Window(0, y, side, len(rows)))


def command(options: argparse.Namespace, scene: Path, out: Path, blend: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "kelp",
        "predict",
        "--data_dir",
        str(scene),
        "--output_dir",
        str(out),
        "--run_dir",
        str(options.run_dir),
        "--max_memory",
        options.max_memory,
        "--blend",
        blend,
        "--sahi_tile_size",
        str(TILE),
        "--sahi_overlap",
        str(OVERLAP),
        "--save_probabilities",
        "--land",
        "skip",
    ]


def predict(arguments: list[str], kill_at: int | None, rows: Path) -> tuple[float, str]:
    """Run the command, or kill it once `kill_at` bytes of rows are there; seconds and output."""
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if kill_at is not None:
        while process.poll() is None and not (rows.exists() and rows.stat().st_size > kill_at):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    text, _ = process.communicate()
    if kill_at is None and process.returncode:
        raise SystemExit(text)
    return time.perf_counter() - started, text


def network_share(scene: Path, out: Path) -> dict[str, float]:
    """Seconds of one processor for a whole prediction, and for the network in it."""
    network, compute = 0.0, Predictor.__call__

    def timed(self: Predictor, raw: Pixels) -> Pixels:
        nonlocal network
        began = time.thread_time()
        p = compute(self, raw)
        network += time.thread_time() - began
        return p

    config = PredictConfig(
        data_dir=scene, output_dir=out, land="skip", threads=1, overwrite=True, band_order=BANDS
    )
    began = time.process_time()
    with mock.patch.object(Predictor, "__call__", timed):
        counts = kelp.predict_scenes(config).counts
    whole = time.process_time() - began
    print(f"{counts}")
    print(f"{whole:.1f} s of one processor, the network {network:.1f}: {whole / network:.3f} times")
    return {"seconds": whole, "network": network, "ratio": whole / network}


def seam(path: Path, side: int) -> dict[str, float | None]:
    """Whether borders of tiles show in a map of probabilities.

    `score` is that of `kelp.tiling.seams`, `kelp compare`'s: geometric means. `mean` is the
    plain mean of the steps across borders by that of all others: a few edges of kelp hold most
    of it, so it differs between any two sets of lines; `spread` is its standard deviation over
    the other phases of a stride, each taken as if borders lay there.
    """
    with rasterio.open(path) as dataset:
        p = dataset.read(1)
    stride = TILE - OVERLAP
    result: dict[str, float | None] = {"score": steps(p, TileGrid(p.shape, TILE, OVERLAP)).score}
    for name, axis in (("rows", 0), ("columns", 1)):
        difference = np.abs(np.diff(p, axis=axis))
        seen = np.isfinite(difference)
        counts = seen.sum(axis=1 - axis)
        sums = np.where(seen, difference, 0).sum(axis=1 - axis, dtype=np.float64)
        phase = np.arange(1, side) % stride  # borders lie on multiples of the stride
        means = []
        for k in range(stride):
            at = phase == k
            border, elsewhere = (sums[x].sum() / counts[x].sum() for x in (at, ~at))
            means.append(border / elsewhere)
        result[f"{name}, mean"] = float(means[0])
        result[f"{name}, spread"] = float(np.std(means[1:]))
    return result


def picture(scene: Path, outputs: dict[str, Path], path: Path, size: int = 900) -> None:
    """SWIR-NIR-R, mask and probabilities side by side."""
    with rasterio.open(scene) as dataset:
        raw = dataset.read([1, 2, 3], out_shape=(3, size, size)).astype(float)
    seen = raw != NODATA
    image = np.clip((raw - 7000) / 13_000, 0, 1) * 255 * seen
    panels = [np.moveaxis(image, 0, -1).astype(np.uint8)]
    with rasterio.open(outputs["mask"]) as dataset:
        mask = dataset.read(1, out_shape=(size, size), resampling=Resampling.mode)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for value, color in MASK_COLORS.items():
        colors[value] = color[:3]
    panels.append(colors[mask])
    with rasterio.open(outputs["probability"]) as dataset:
        p = dataset.read(1, out_shape=(size, size), resampling=Resampling.average)
    panels.append(np.repeat((np.nan_to_num(p) * 255).astype(np.uint8)[..., None], 3, axis=2))
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("--network_share", action="store_true")
    parser.add_argument("--side", type=int, default=7800)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--max_memory", default="1GB")
    parser.add_argument("--blends", default="hann,mean")
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.run_dir and not options.network_share:
        parser.error("--run_dir or --network_share is needed")
    work = options.work_dir or Path(tempfile.mkdtemp(prefix="whole_scene_"))
    work.mkdir(parents=True, exist_ok=True)
    scene = work / "coast.tif"
    if not scene.exists():
        make_scene(scene, options.side, options.seed)
    if options.network_share:
        shares = network_share(scene, work / "packaged")
        if options.json:
            options.json.write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
        return
    figures: dict[str, object] = {"side": options.side, "max_memory": options.max_memory}
    for number, blend in enumerate(options.blends.split(",")):
        out = work / blend
        arguments = command(options, scene, out, blend)
        if number == 0:
            rows = out / ".coast_kelp.tif.rows"
            seconds, _ = predict(arguments, options.side**2 // 3, rows)
            print(f"{blend}: killed after {seconds:.0f} s")
        seconds, text = predict(arguments, None, out)
        print(text.strip())
        mask, probability = out / "coast_kelp.tif", out / "coast_kelp_prob.tif"
        check = [str(Path(sys.executable).with_name("rio")), "cogeo", "validate"]
        for path in (mask, probability):
            told = subprocess.run([*check, path], capture_output=True, text=True, check=False)
            print(told.stdout.strip())
        seams = seam(probability, options.side)
        peak = re.search(r"peak memory ([0-9.]+ \w+)", text)
        figures[blend] = {"seconds": seconds, "seam": seams, "peak": peak and peak[1]}
        print(f"{blend}: {seconds:.0f} s; step across tile borders / elsewhere: {seams}")
        picture(scene, {"mask": mask, "probability": probability}, work / f"{blend}.png")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"scene, outputs and pictures: {work}")


if __name__ == "__main__":
    main()
