"""How fast scenes are read in strips, by storage format, and how often each block is decoded.

    python benchmarks/formats.py [--size 2048x8192] [--repeats 5]

A strip is what one row of tiles adds: 64 rows of the whole width, read as a canonical array,
from the top of the scene to its end. `kelp` reads with the block cache that its plan sets aside,
`16 MB` with GDAL's smallest useful one. How often a block is decoded is counted: the bytes that
the process fetched from the file (/proc/self/io, Linux) in units of the file's size.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import rasterio
from measuring import Row
from rasterio.errors import NotGeoreferencedWarning

from kelp.inference.plan import make_plan
from kelp.raster.bands import BANDS
from kelp.raster.masks import decoding
from kelp.raster.scene import Scene
from kelp.raster.window import Tile
from kelp.simulation.scene import simulate_scene
from kelp.tiling.strip import Slicing

SLICING = Slicing((128, 128), (64, 64))
STRIDE, SMALL_CACHE = 64, 16 << 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "striped": {},
    "tiled 256": {"tiled": True, "blockxsize": 256, "blockysize": 256},
    "tiled 512": {"tiled": True, "blockxsize": 512, "blockysize": 512},
}
COMPRESSIONS = ("none", "deflate", "lzw", "zstd")


def write(path: Path, pixels: np.ndarray, interleave: str, **options: Any) -> None:
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=pixels.dtype,
        nodata=-32768,
        interleave=interleave,
        num_threads="all_cpus",
        **options,
    ) as out:
        out.write(pixels)


def read(path: Path, cache: int | None) -> int:
    """Read a scene as the engine does; the bytes that were fetched from the file."""
    before = fetched()
    with Scene(path, BANDS) as scene:
        height, width = scene.shape
        planned = make_plan([scene.size], SLICING, 0, 1).cache
        with decoding(planned if cache is None else cache):
            for y in range(0, height, STRIDE):
                scene.read(Tile(y, 0, min(STRIDE, height - y), width))
    return fetched() - before


def fetched() -> int:
    """Bytes that this process has read so far, from the system's cache or from disk."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def measure(path: Path, megapixels: float, repeats: int) -> Row:
    decoded = {name: read(path, size) for name, size in (("kelp", None), ("16 MB", SMALL_CACHE))}
    runs = measuring.interleaved(
        {"kelp": lambda: read(path, None), "16 MB": lambda: read(path, SMALL_CACHE)},
        repeats,
        warm=False,
    )
    size = path.stat().st_size
    return {
        "file MB": size / 1e6,
        "kelp Mpx/s": megapixels / statistics.median(runs["kelp"]),
        "16 MB Mpx/s": megapixels / statistics.median(runs["16 MB"]),
        "kelp: times decoded": round(decoded["kelp"] / size, 2),
        "16 MB: times decoded": round(decoded["16 MB"] / size, 2),
    }


def main() -> None:
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--size", default="2048x8192")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    height, _, width = options.size.partition("x")
    shape = int(height), int(width or height)
    # Real structure compresses as real scenes do; a place of 1024 px is repeated.
    block = simulate_scene(0, 1024, 1024).pixels.astype(np.int16)
    repeats = (1, -(-shape[0] // 1024), -(-shape[1] // 1024))
    pixels = np.tile(block, repeats)[:, : shape[0], : shape[1]]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, interleave, compression in product(LAYOUTS, ("pixel", "band"), COMPRESSIONS):
            path = Path(folder) / "scene.tif"
            path.unlink(missing_ok=True)
            extra = {} if compression == "none" else {"compress": compression}
            write(path, pixels, interleave, **LAYOUTS[layout], **extra)
            row: Row = {"layout": layout, "interleave": interleave, "compression": compression}
            rows.append(row | measure(path, shape[0] * shape[1] / 1e6, options.repeats))
    most = max(row["kelp: times decoded"] for row in rows)
    slowest = min(row["kelp Mpx/s"] for row in rows)
    verdict = [
        f"each block is decoded at most {most:.2f} times (target: 1); slowest format "
        f"{slowest:.1f} Mpx/s"
    ]
    title = f"Reading strips of a {shape[0]} x {shape[1]} scene, 7 bands int16"
    measuring.report(title, rows, verdict, options.json)


if __name__ == "__main__":
    main()
