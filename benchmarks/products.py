"""Beds of one large map, and forty years of a whole scene as a series: seconds, CPU, memory.

    python benchmarks/products.py [--side 7800] [--quarters 160] [--stations 600000] [--zarr]

Maps are simulated: kelp in patches along a coast, clouds, probabilities in float32. The series has
one map a quarter; eight different ones are written, the others are links to them under other
dates. Commands run as a user starts them. The CPU time tells more than the seconds on a busy
machine; the peak is that of the largest process, and with two workers there are three.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import measuring
import numpy as np
from affine import Affine
from measuring import Row
from numpy.typing import NDArray
from rasterio.crs import CRS
from scipy import ndimage

from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter, write_mask
from kelp.sensors.record import Grid, MapRecord, NetworkFacts, SceneFacts, write_record

DIFFERENT = 8
PLACE = Georeference(CRS.from_epsg(32721), Affine(30, 0, 400_000, 0, -30, 4_272_000))
NETWORK = (NetworkFacts(name="benchmark", sha256="0" * 64),)


def coast(side: int, stations: int) -> NDArray[np.float32]:
    """How fit a pixel is for kelp; above 0 for about as many as `stations`."""
    rng = np.random.default_rng(0)
    rough = ndimage.gaussian_filter(rng.standard_normal((side, side), np.float32), 2.5)
    rough /= rough.std()
    y, x = np.ogrid[:side, :side]
    shore = side / 2 + side / 9 * np.sin(x / side * 9) + side / 40 * np.sin(x / side * 60)
    fit: NDArray[np.float32] = (rough - np.abs(y - shore) / (side / 40)).astype(np.float32)
    fit -= np.partition(fit, -stations, axis=None)[-stations]
    return fit


def write_map(folder: Path, name: str, fit: NDArray[np.float32], k: int, day: date) -> None:
    """One map: kelp on most of what is fit, other clouds and another summer in each."""
    rng = np.random.default_rng(k)
    p = 1 / (1 + np.exp(np.clip(-4 * (fit - 0.2 * (k % 4)), -50, 50)))
    p[p < 0.02] = 0
    cells = ndimage.zoom(rng.random((12, 12)) < 0.15, len(fit) / 12, order=0)
    unseen = np.zeros(fit.shape, bool)
    unseen[: len(cells), : len(cells)] = cells[: len(fit), : len(fit)]
    mask = np.where(unseen, 255, p >= 0.5).astype(np.uint8)
    write_mask(folder / f"{name}_kelp.tif", mask, PLACE)
    path = folder / f"{name}_kelp_prob.tif"
    with RasterWriter(path, fit.shape, "float32", PLACE, np.nan, {}) as out:
        for top in range(0, len(fit), 512):
            part = np.s_[top : top + 512]
            out.write(top, np.where(unseen[part], np.nan, p[part]).astype(np.float32))
    record(folder, name, mask.shape, int((mask == 1).sum()), day)


def record(folder: Path, name: str, shape: tuple[int, int], pixels: int, day: date) -> None:
    grid = Grid(shape=shape, crs=PLACE.crs.to_string(), transform=tuple(PLACE.transform)[:6])
    facts = SceneFacts(id=name, sensor="landsat-8", acquired=day)
    write_record(
        folder / f"{name}_kelp.json",
        MapRecord(
            scene=facts,
            grid=grid,
            network=NETWORK,
            threshold=0.5,
            kelp_pixels=pixels,
            expected_area_m2=1.0,
        ),
    )


def write_maps(folder: Path, fit: NDArray[np.float32], quarters: int) -> None:
    folder.mkdir()
    for k in range(quarters):
        day = date(1984 + k // 4, 3 * (k % 4) + 2, 11)
        name, source = f"Q{k:03d}", f"Q{k % DIFFERENT:03d}"
        if k < DIFFERENT:
            write_map(folder, name, fit, k, day)
            continue
        for suffix in ("_kelp.tif", "_kelp_prob.tif"):
            os.link(folder / f"{source}{suffix}", folder / f"{name}{suffix}")
        record(folder, name, fit.shape, 0, day)


# A process of its own, and a small one: what a program is started from counts in its peak.
STARTER = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def measured(*arguments: object) -> Row:
    """Run a command of kelp: seconds, seconds of CPU, the largest process."""
    command = [sys.executable, "-c", STARTER, sys.executable, "-m", "kelp", *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    first, *_, last = said.splitlines()
    seconds, cpu, peak = map(float, last.split())
    shown = {"command": arguments[0], "s": seconds, "CPU s": cpu, "peak MB": peak / 1e3}
    return {**shown, "": first.replace(f"{arguments[-1]}", "…")}


def main() -> None:
    options = measuring.parser(__doc__, threads=False)
    options.add_argument("--side", type=int, default=7800)
    options.add_argument("--quarters", type=int, default=160)
    options.add_argument("--stations", type=int, default=600_000)
    options.add_argument("--zarr", action="store_true", help="the grid of the series also as Zarr")
    options.add_argument("--work_dir", type=Path, help="where; default: a temporary folder")
    config = options.parse_args()
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        root = Path(folder)
        fit = coast(config.side, config.stations)
        write_maps(root / "maps", fit, config.quarters)
        one = root / "maps" / "Q000_kelp.tif"
        rows = [
            measured("beds", "--predictions_dir", one, "--output", root / f"beds{suffix}")
            for suffix in (".gpkg", ".parquet")
        ]
        more = ("--zarr", "True") if config.zarr else ()
        maps = root / "maps"
        rows.append(
            measured(
                "series",
                *more,
                "--workers",
                2,
                "--predictions_dir",
                maps,
                "--output_dir",
                root / "series",
            )
        )
        sizes = [path.stat().st_size for path in (root / "series").rglob("*") if path.is_file()]
    beds, series = rows[0], rows[-1]
    verdicts = [
        f"beds: {beds['s']:.0f} s, {beds['CPU s']:.0f} s of CPU (target 20), "
        f"{beds['peak MB']:.0f} MB (target 500)",
        f"series: {series['s'] / 60:.1f} min, {series['CPU s'] / 60:.1f} min of CPU (target 10 min "
        f"on two cores), {series['peak MB']:.0f} MB (target 1,000)",
        f"files of the series: {len(sizes)}, {sum(sizes) / 1e6:.0f} MB",
    ]
    title = f"{config.side} x {config.side} px, {config.quarters} quarters"
    measuring.report(title, rows, verdicts, config.json)


if __name__ == "__main__":
    main()
