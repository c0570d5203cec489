"""Peak memory of the engine beyond what is loaded, from a file to a mask file, by scene size.

    python benchmarks/memory.py [--full] [--sizes 2048,5120x20480] [--tile 128] [--batch 8]

int16 scenes of seven bands, stored in tiles of 512 px with deflate; the network is one line of
numpy. Files are read and written as `kelp predict` does: planned block cache, mask with overviews,
journal. Each size runs in a process of its own; the figure is its peak (VmHWM) less what it held
just before. `--full` adds 20480 x 20480. The block that the scenes repeat is small, so that they
take little room and time; how well a file compresses does not change its decoded size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import measuring
import numpy as np
import rasterio
from measuring import Row
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from kelp.inference import memory
from kelp.inference.outputs import Outputs
from kelp.inference.plan import make_plan
from kelp.raster.bands import BANDS
from kelp.raster.masks import decoding
from kelp.raster.scene import Scene
from kelp.tiling.engine import Engine, Job
from kelp.tiling.strip import Slicing

NIR = BANDS.index("NIR")
BLOCK = 512
SIZES = ((2048, 2048), (5120, 20480), (10240, 10240))
LARGEST = (20480, 20480)
MOST_MB, MOST_DIFFERENCE = 700, 0.10


def write_scene(path: Path, shape: tuple[int, int]) -> None:
    """A scene with holes, row of blocks by row of blocks."""
    rng = np.random.default_rng(0)
    small = rng.integers(7000, 30000, (len(BANDS), 32, 32), dtype=np.int16)
    small[BANDS.index("QA")] = 0
    small[:5, :4, :4] = -32768
    rows = np.tile(small, (1, BLOCK // 32, -(-shape[1] // 32)))[:, :, : shape[1]]
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(BANDS),
        height=shape[0],
        width=shape[1],
        dtype="int16",
        nodata=-32768,
        tiled=True,
        blockxsize=BLOCK,
        blockysize=BLOCK,
        compress="deflate",
        zlevel=1,
        num_threads="all_cpus",
        bigtiff="if_safer",
    ) as out:
        for y in range(0, shape[0], BLOCK):
            count = min(BLOCK, shape[0] - y)
            out.write(rows[:, :count], window=Window(0, y, shape[1], count))


def trivial(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.nan_to_num(batch[:, NIR], nan=0.0) * np.float32(1 / 65535)


def predict(source: Path, target: Path, slicing: Slicing) -> int:
    """Predict as `kelp predict` does; the bytes of its block cache."""
    engine = Engine(trivial, slicing)
    with Scene(source, BANDS) as scene:
        plan = make_plan([scene.size], slicing, 0, 5)
        sink = Outputs(scene.shape, scene.georeference, target, 0.2, {}, "float32", "benchmark")
        with decoding(plan.cache):
            engine.run([Job(scene, sink, sink)])
    for _, error in engine.failures:
        raise error
    return plan.cache


def measure_child(folder: Path, tile: int, batch: int) -> None:
    slicing = Slicing((tile, tile), (tile // 2, tile // 2), batch_size=batch)
    small = folder / "small.tif"
    write_scene(small, (300, 200))
    predict(small, folder / "small_kelp.tif", slicing)  # what is loaded once
    cache = 0

    def work() -> None:
        nonlocal cache
        cache = predict(folder / "scene.tif", folder / "scene_kelp.tif", slicing)

    started = time.perf_counter()
    grown = memory.growth(work)
    spent = time.perf_counter() - started
    print(json.dumps({"MB": grown / 1e6, "cache": cache / 1e6, "seconds": spent}))


def measure(shape: tuple[int, int], tile: int, batch: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "scene.tif"
        write_scene(source, shape)
        row = measuring.child(__file__, folder, str(tile), str(batch))
        return {
            "scene": f"{shape[0]} x {shape[1]}",
            "peak MB": row["MB"],
            "of it block cache, at most": row["cache"],
            "Mpx/s": shape[0] * shape[1] / 1e6 / row["seconds"],
            "file MB": source.stat().st_size / 1e6,
        }


def verdicts(rows: list[Row]) -> list[str]:
    peaks = {row["scene"]: row["peak MB"] for row in rows}
    lines = [f"largest: {max(peaks.values()):.0f} MB (target: at most {MOST_MB})"]
    square, flat = "20480 x 20480", "5120 x 20480"
    if square in peaks and flat in peaks:
        difference = abs(peaks[flat] / peaks[square] - 1)
        lines.append(
            f"a quarter of the height changes it by {difference:.1%} "
            f"(target: at most {MOST_DIFFERENCE:.0%})"
        )
    return lines


def sizes(text: str) -> list[tuple[int, int]]:
    parts = [part.partition("x") for part in text.split(",")]
    return [(int(height), int(width or height)) for height, _, width in parts]


def main() -> None:
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--sizes", type=sizes, default=SIZES)
    parser.add_argument("--full", action="store_true", help="also 20480 x 20480")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, tile, batch = options.child
        measure_child(Path(folder), int(tile), int(batch))
        return
    shapes = [*options.sizes, *([LARGEST] if options.full else [])]
    rows = [measure(shape, options.tile, options.batch) for shape in shapes]
    measuring.report("Peak memory beyond what is loaded", rows, verdicts(rows), options.json)


if __name__ == "__main__":
    main()
