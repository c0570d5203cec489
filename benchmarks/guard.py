"""How often the guard names a false map, and how often a good one.

    python benchmarks/guard.py --work_dir DIR [--scenes 30] [--quick]

Simulated coasts that no training has seen, of every world, are mapped by the packaged network as
they are, and spoilt as scenes are spoilt: two bands in each other's place, another scale, clouds
without a quality band, haze over a part, bright noise. A map is false with a precision below 0.2 on
at least 1,000 pixels of kelp; it is good with a precision of at least 0.5. The truth is clean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import rasterio
from numpy.typing import NDArray

from kelp.config import PredictConfig
from kelp.inference.predict import predict_scenes
from kelp.raster.bands import DEM, OPTICAL, QA
from kelp.raster.masks import quietly, read_mask
from kelp.raster.validity import canonical
from kelp.sensors.record import read_record, record_path
from kelp.simulation.scene import make_place, take_picture
from kelp.simulation.world import WORLDS

SIDE: Final = 350
OPTICS: Final = len(OPTICAL)
Pixels = NDArray[np.float32]


def _swapped(first: int, second: int) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, _: np.random.Generator) -> Pixels:
        order = list(range(len(pixels)))
        order[first], order[second] = second, first
        return pixels[order]

    return change


def _scaled(factor: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, _: np.random.Generator) -> Pixels:
        return np.concatenate([pixels[:OPTICS] * np.float32(factor), pixels[OPTICS:]])

    return change


def _no_quality(pixels: Pixels, _: np.random.Generator) -> Pixels:
    out = pixels.copy()
    out[QA], out[DEM] = 0, np.nan
    return out


def _haze(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Lifts NIR most, over a broad soft patch, as thin cloud and glint do not."""
    y, x = np.mgrid[:SIDE, :SIDE]
    cy, cx = rng.uniform(0, SIDE, 2)
    patch = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 90.0**2))
    out = pixels.copy()
    out[:OPTICS] += patch * np.array([300, 2500, 600, 500, 400])[:, None, None]
    return out


def _noise(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    out = pixels.copy()
    out[1] += rng.gamma(1.0, 900.0, (SIDE, SIDE))  # bright specks in NIR, everywhere
    return out


SPOILT: Final = {
    "as it is": lambda pixels, rng: pixels,
    "NIR and R swapped": _swapped(1, 2),
    "SWIR and B swapped": _swapped(0, 4),
    "scale 1.2": _scaled(1.2),
    "scale 0.9": _scaled(0.9),
    "no QA, no DEM": _no_quality,
    "haze in NIR": _haze,
    "noise in NIR": _noise,
}


def write_scenes(
    folder: Path,
    world: str,
    count: int,
    change: Callable[[Pixels, np.random.Generator], Pixels],
    seed: int = 77,
) -> dict[str, NDArray[np.uint8]]:
    """Write scenes of new sites; the truth of each by name."""
    truths = {}
    for number in range(count):
        sequence = np.random.SeedSequence(seed, spawn_key=(list(WORLDS).index(world), number))
        rng = np.random.default_rng(sequence)
        scene = take_picture(
            rng, make_place(rng, (SIDE, SIDE), WORLDS[world]), (0, 0), (SIDE, SIDE)
        )
        pixels = change(canonical(scene.pixels), rng).astype(np.float32)
        name = f"{world}-{number:03d}"
        profile = {"driver": "GTiff", "count": len(pixels), "dtype": "float32", "nodata": np.nan}
        profile |= {"height": SIDE, "width": SIDE}
        path = folder / f"{name}_satellite.tif"
        with (
            quietly(path),
            rasterio.open(path, "w", **profile) as file,
        ):
            file.write(pixels)
        truths[name] = scene.truth
    return truths


def maps_of(folder: Path, truths: dict[str, NDArray[np.uint8]]) -> list[tuple[int, float, bool]]:
    """Pixels of kelp, precision, and whether the guard trusts it, of each map."""
    out = []
    for name, truth in truths.items():
        path = folder / f"{name}_kelp.tif"
        kelp = read_mask(path) == 1
        found = int(kelp.sum())
        guard = read_record(record_path(path)).guard
        assert guard is not None
        out.append((found, float((truth[kelp] == 1).mean()) if found else 1.0, guard.ok))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument(
        "--scenes", type=int, default=30, help="of each world and way to spoil them"
    )
    parser.add_argument("--run_dir", type=Path, help="another bundle; default: the packaged one")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    count = 2 if options.quick else options.scenes
    rows, every = {}, []
    for what, change in SPOILT.items():
        maps = []
        for world in WORLDS:
            folder = options.work_dir / what.replace(" ", "-").replace(",", "") / world
            (folder / "scenes").mkdir(parents=True, exist_ok=True)
            truths = write_scenes(folder / "scenes", world, count, change)
            network = (options.run_dir,) if options.run_dir else ()
            predict_scenes(
                PredictConfig(
                    data_dir=folder / "scenes",
                    output_dir=folder / "maps",
                    run_dir=network,
                    backend="onnx",
                    overwrite=True,
                )
            )
            maps += maps_of(folder / "maps", truths)
        rows[what] = _counted(maps)
        every += maps
        print(f"{what}: {json.dumps(rows[what])}", flush=True)
    print(f"all: {json.dumps(_counted(every))}")


def _counted(maps: list[tuple[int, float, bool]]) -> dict[str, int]:
    false = [ok for found, precision, ok in maps if found >= 1000 and precision < 0.2]
    good = [ok for found, precision, ok in maps if precision >= 0.5]
    return {
        "maps": len(maps),
        "false": len(false),
        "false, named": false.count(False),
        "good": len(good),
        "good, named": good.count(False),
    }


if __name__ == "__main__":
    main()
