"""Long and wide: many scenes, long ones, empty ones; peak memory, time and open files of a predict.

    python benchmarks/soak.py [--many 2000] [--side 60000] [--sparse 100000] [--aoi]

A real `kelp predict` in a process of its own, whose network is one 1 x 1 convolution, on

- `--many` scenes of 64 x 64 px in one folder,
- one of `--side` x 400 px and one of 400 x `--side`,
- one of `--sparse` x `--sparse` px of which only 512 x 512 in the middle are stored; with `--aoi`
  an area of interest of 2,000 px around them is given.

and before each on one of a quarter of the number, length or side. Memory and open files should not
grow (sums over the width of a scene are held, so that a wide one takes more), seconds of CPU should
grow as the pixels do. 0 leaves a kind out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import measuring
import numpy as np
import rasterio
from measuring import Row
from memory import write_scene
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from kelp.raster.bands import BANDS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

NARROW, SMALL, STORED, AREA = 400, 64, 512, 2000
PLACE = {"crs": "EPSG:32610", "transform": from_origin(400_000, 6_000_000, 30, 30)}
MOST_TIMES, MOST_MB, MOST_FILES = 1.25, 50, 5


def make(kind: str, folder: Path, size: int) -> None:
    """The scenes of a kind in a folder."""
    folder.mkdir()
    if kind == "many":
        write_scene(folder / "0.tif", (SMALL, SMALL))
        for number in range(1, size):
            (folder / f"{number}.tif").write_bytes((folder / "0.tif").read_bytes())
        return
    if kind != "sparse":
        write_scene(folder / "scene.tif", (size, NARROW) if kind == "long" else (NARROW, size))
        return
    with rasterio.open(
        folder / "scene.tif",
        "w",
        driver="GTiff",
        count=len(BANDS),
        height=size,
        width=size,
        dtype="int16",
        nodata=-32768,
        tiled=True,
        blockxsize=STORED,
        blockysize=STORED,
        compress="deflate",
        sparse_ok=True,
        bigtiff="yes",
        **PLACE,
    ) as out:
        out.descriptions = BANDS
        pixels = np.random.default_rng(0).integers(7000, 30000, (len(BANDS), STORED, STORED))
        pixels[BANDS.index("QA")] = 0
        middle = size // 2 // STORED * STORED
        out.write(pixels.astype(np.int16), window=Window(middle, middle, STORED, STORED))


def area_of(folder: Path, size: int) -> list[str]:
    """The option that names an area around what a sparse scene stores."""
    middle = size // 2 // STORED * STORED + STORED // 2
    left, top = PLACE["transform"] @ (middle - AREA // 2, middle - AREA // 2)
    right, bottom = PLACE["transform"] @ (middle + AREA // 2, middle + AREA // 2)
    box = transform_bounds(PLACE["crs"], "EPSG:4326", left, bottom, right, top)
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    file = folder / "area.geojson"
    file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return [f"--aoi={file}"]


def use_pixel_network() -> None:
    from bundles import PixelBody

    from kelp.nn.model import ARCHITECTURES

    ARCHITECTURES["unet"] = lambda spec: PixelBody(spec.channels)


def predict_here(arguments: list[str]) -> None:
    """Run the command; print what it took as JSON."""
    from kelp.cli import main as kelp

    use_pixel_network()
    most, ended = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, len(list(Path("/proc/self/fd").iterdir())))

    watch = threading.Thread(target=count)
    watch.start()
    began, before = time.perf_counter(), time.process_time()
    status = kelp(["predict", *arguments, "--threads=1", "--quiet"])
    spent, busy = time.perf_counter() - began, time.process_time() - before
    ended.set()
    watch.join()
    facts = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(facts.partition("VmHWM:")[2].split()[0]) / 1000
    figures = {"peak MB": peak, "s": spent, "CPU s": busy, "open files": most, "exit": status}
    print(json.dumps(figures))


def measure(kind: str, size: int, aoi: bool, max_memory: str | None) -> Row:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from bundles import tiny_bundle

        use_pixel_network()
        bundle = tiny_bundle(folder / "bundle", tile_size=(128, 128), image_size=128)
        make(kind, folder / "scenes", size)
        options = [f"--data_dir={folder / 'scenes'}", f"--output_dir={folder / 'maps'}"]
        options += [f"--run_dir={bundle}", "--device=cpu"]
        options += [f"--max_memory={max_memory}"] if max_memory else []
        if kind == "sparse":
            options += area_of(folder, size) if aoi else []
        else:
            options += [f"--band_order={','.join(BANDS)}"]
        taken = measuring.child(__file__, *options)
        if taken["exit"]:
            raise SystemExit(f"{kind} of {size:,}: refused, see above")
        pixels = {"many": size * SMALL**2, "sparse": size**2}.get(kind, size * NARROW)
        shown = {"many": f"{size:,} scenes", "long": f"{size:,} x {NARROW}"}
        shown |= {"wide": f"{NARROW} x {size:,}", "sparse": f"{size:,} x {size:,}, sparse"}
        return {"kind": shown[kind], **taken, "CPU ms/Mpx": taken["CPU s"] / pixels * 1e9}


def verdict(rows: list[Row]) -> str:
    small, large = rows
    times = large["CPU ms/Mpx"] / small["CPU ms/Mpx"]
    memory = large["peak MB"] - small["peak MB"]
    files = large["open files"] - small["open files"]
    return (
        f"{large['kind']}: a pixel takes {times:.2f} times the CPU (target: {MOST_TIMES}), "
        f"{memory:+.0f} MB (target: {MOST_MB}), {files:+d} open files (target: {MOST_FILES})"
    )


def main() -> None:
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--side", type=int, default=60_000)
    parser.add_argument("--sparse", type=int, default=100_000)
    parser.add_argument("--aoi", action="store_true", help="of a sparse scene")
    parser.add_argument("--max_memory", help="of each predict, as there")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        predict_here(options.child)
        return
    sizes = {"many": options.many, "long": options.side, "wide": options.side}
    rows, verdicts = [], []
    for kind, size in {**sizes, "sparse": options.sparse}.items():
        if size:
            aoi, budget = options.aoi, options.max_memory
            pair = [measure(kind, part, aoi, budget) for part in (size // 4, size)]
            rows += pair
            verdicts.append(verdict(pair))
            measuring.print_table(pair)
    measuring.report("Long and wide", rows, verdicts, options.json)


if __name__ == "__main__":
    main()
