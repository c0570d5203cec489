"""What it costs to read a scene as USGS delivers it, to map an area of interest, to warp a DEM.

    python benchmarks/real_scenes.py [--side 7800] [--repeats 1] [--work_dir DIR] [--memory]

A Landsat 9 folder is made (one tiled, compressed GeoTIFF a band, names and bits as of the real
ones) and the same pixels as one tiled GeoTIFF of seven bands. Windows are read from both in the
order of a prediction. The packaged network maps the folder as it is, with a DEM in degrees, and
with an area of interest: a square in the middle. Ratios are medians of paired repeats, of seconds
and of processor time, which other programs change less; with one thread, as waiting threads count.
`--memory` tells instead the peak of `kelp predict`, each in a process of its own.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import geopandas
import measuring
import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from shapely import box
from shapely.affinity import translate

from kelp.config import PredictConfig
from kelp.inference.predict import predict_scenes
from kelp.raster.bands import BANDS as BANDS_OF_STACK
from kelp.raster.masks import decoding
from kelp.raster.window import Tile
from kelp.sensors import SensorScene, open_scene
from kelp.simulation.scene import make_place, take_picture
from kelp.simulation.world import WORLDS

NAME: Final = "LC09_L2SP_042036_20220704_20220706_02_T1"
BANDS: Final = {"SR_B6": 0, "SR_B5": 1, "SR_B4": 2, "SR_B3": 3, "SR_B2": 4}
CLEAR: Final = 21_952  # QA_PIXEL of clear water
CLOUD: Final = 22_280
CRS: Final = "EPSG:32611"
SHOWN: Final = 448  # side of a window and of what is read around it


def make(folder: Path, side: int) -> tuple[Path, Path, Path]:
    """The product's folder, the stacked scene, and a DEM in degrees."""
    product, stack, dem = folder / NAME, folder / "stack.tif", folder / "dem.tif"
    if dem.is_file():
        return product, stack, dem
    product.mkdir(parents=True)
    rng = np.random.default_rng(0)
    piece = take_picture(rng, make_place(rng, (500, 500), WORLDS["varied"]), (0, 0), (500, 500))
    times = -(-side // 500)
    pixels = np.tile(np.nan_to_num(piece.pixels, nan=0), (1, times, times))[:, :side, :side]
    profile = {
        "driver": "GTiff",
        "height": side,
        "width": side,
        "crs": CRS,
        "transform": from_origin(300_000, 3_800_000, 30, 30),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "predictor": 2,
    }
    for name, band in BANDS.items():
        path = product / f"{NAME}_{name}.TIF"
        with rasterio.open(path, "w", count=1, dtype="uint16", nodata=0, **profile) as file:
            file.write(pixels[band].clip(1, 65_535).astype("uint16"), 1)
    quality = np.where(pixels[5] == 1, CLOUD, CLEAR).astype("uint16")
    with rasterio.open(
        product / f"{NAME}_QA_PIXEL.TIF", "w", count=1, dtype="uint16", nodata=1, **profile
    ) as file:
        file.write(quality, 1)
    with rasterio.open(stack, "w", count=7, dtype="uint16", **profile) as file:
        file.write(pixels.clip(0, 65_535).astype("uint16"))
        file.descriptions = BANDS_OF_STACK
        bounds = file.bounds
    west, _, east, north = transform_bounds(CRS, "EPSG:4326", *bounds)
    count = round((east - west) * 3600)
    size = (east - west + 0.02) / count
    heights = np.kron(rng.normal(0, 60, (40, 40)), np.ones((count // 40 + 1, count // 40 + 1)))
    with rasterio.open(
        dem,
        "w",
        driver="GTiff",
        count=1,
        dtype="float32",
        height=count,
        width=count,
        crs="EPSG:4326",
        transform=from_origin(west - 0.01, north + 0.01, size, size),
        tiled=True,
    ) as file:
        file.write(heights[:count, :count].astype("float32"), 1)
    return product, stack, dem


def read_all(path: Path) -> Callable[[], None]:
    """Reads a scene in windows, row by row."""
    config = PredictConfig(data_dir=path, output_dir=path.parent)

    def work() -> None:
        with decoding(256_000_000), open_scene(path, config) as scene:
            height, width = scene.shape
            for y in range(0, height, SHOWN):
                for x in range(0, width, SHOWN):
                    scene.read(Tile(y, x, min(SHOWN, height - y), min(SHOWN, width - x)))

    return work


class Costs:
    """Processor seconds, and pixels that were read, of each run of each way."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.pixels: dict[str, list[float]] = {}
        self._read = 0
        self._reading = SensorScene.read

    def counted(self, name: str, way: Callable[[], object]) -> Callable[[], object]:
        """The way, its costs noted."""

        def read(scene: SensorScene, tile: Tile | None = None) -> object:
            self._read += tile.height * tile.width if tile else scene.shape[0] * scene.shape[1]
            return self._reading(scene, tile)

        def work() -> None:
            SensorScene.read, self._read, began = read, 0, time.process_time()
            way()
            self.cpu.setdefault(name, []).append(time.process_time() - began)
            self.pixels.setdefault(name, []).append(self._read)
            SensorScene.read = self._reading

        return work


def peak(folder: Path, *options: str) -> float:
    """Megabytes that `kelp predict` fills at most."""
    command = [sys.executable, "-m", "kelp", "predict", "--output_dir", str(folder / "maps")]
    command += ["--overwrite", "True", "--threads", "1", *options]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"peak memory ([0-9.]+) (\w+)", said)
    if found is None:
        raise ValueError(f"no peak in {said!r}")
    return float(found[1]) * {"GB": 1000, "MB": 1}[found[2]]


def report_memory(product: Path, stack: Path, dem: Path, area: Path, file: Path | None) -> None:
    """Peaks by what is mapped."""
    ways = {
        "map the stack": (stack,),
        "map the folder": (product,),
        "map it with a DEM": (product, "--dem", dem),
        "map 5 % of it": (product, "--aoi", area),
    }
    peaks = {
        name: peak(product.parent, "--data_dir", *map(str, options))
        for name, options in ways.items()
    }
    rows: list[measuring.Row] = [{"what": name, "peak MB": most} for name, most in peaks.items()]
    beyond = peaks["map the folder"] - peaks["map the stack"]
    verdicts = [f"folder beyond the stack: {beyond:+.0f} MB", f"most: {max(peaks.values()):.0f} MB"]
    measuring.report("Memory of scenes as they are delivered", rows, verdicts, file)


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--side", type=int, default=7800)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.side, options.repeats = 700, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        product, stack, dem = make(folder, options.side)
        area, side = folder / "aoi.gpkg", options.side * 30
        half = 0.05**0.5 * side / 2
        square = box(-half, -half, half, half)
        middle = translate(square, 300_000 + side / 2, 3_800_000 - side / 2)
        geopandas.GeoDataFrame({"id": [1]}, geometry=[middle], crs=CRS).to_file(area)
        if options.memory:
            report_memory(product, stack, dem, area, options.json)
            return

        def predict(**more: object) -> Callable[[], object]:
            config = PredictConfig(
                data_dir=product, output_dir=folder / "maps", overwrite=True, threads=1, **more
            )
            return lambda: predict_scenes(config)

        costs = Costs()
        reading = {"read the folder": read_all(product), "read the stack": read_all(stack)}
        predict(aoi=area)()  # what is imported and built once
        mapping = {
            "map 5 % of it": predict(aoi=area),
            "map": predict(),
            "map with a DEM": predict(dem=dem),
        }
        times = {}
        for ways, repeats, warm in ((reading, 3, True), (mapping, options.repeats, False)):
            counted = {name: costs.counted(name, way) for name, way in ways.items()}
            times |= measuring.interleaved(counted, repeats, warm)
    cpu = {name: values[-len(times[name]) :] for name, values in costs.cpu.items()}
    pixels = {name: values[-1:] for name, values in costs.pixels.items()}
    median = statistics.median
    rows: list[measuring.Row] = [
        {
            "what": name,
            "s": median(values),
            "cpu_s": median(cpu[name]),
            "Mpx": pixels[name][0] / 1e6,
        }
        for name, values in times.items()
    ]
    verdicts = [
        f"{words}: {measuring.ratio(found[above], found[below]):.3f} (at most {target})"
        for words, found, above, below, target in (
            ("folder / stack, s", times, "read the folder", "read the stack", 1.3),
            ("folder / stack, cpu_s", cpu, "read the folder", "read the stack", 1.3),
            ("DEM warped / none, s", times, "map with a DEM", "map", 1.05),
            ("DEM warped / none, cpu_s", cpu, "map with a DEM", "map", 1.05),
            ("AOI of 5 % / whole, s", times, "map 5 % of it", "map", 0.08),
            ("AOI of 5 % / whole, cpu_s", cpu, "map 5 % of it", "map", 0.08),
            ("AOI of 5 % / whole, pixels read", pixels, "map 5 % of it", "map", 0.08),
        )
    ]
    measuring.report("Scenes as they are delivered", rows, verdicts, options.json)


if __name__ == "__main__":
    main()
