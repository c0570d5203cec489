"""How close are the scenes of `kelp simulate` to published figures of the competition's tiles?

    python benchmarks/simulation_calibration.py [--scenes 300] [--seed 0]

Draws 350 x 350 scenes, each of a place of its own, and prints simulated beside published values.
The published ones are statistics printed or drawn in public notebooks about the Kelp Wanted data,
and measurements on 32 of its tiles; those of drawn figures are good to 2-5 %. Labels, not the
truth, are compared: published figures know nothing else.
"""

from __future__ import annotations

import argparse
import io
import time
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from scipy import ndimage

from kelp.simulation.scene import SimulatedScene, simulate_scene

SIZE = 350
NODATA = -32768
BANDS = ("SWIR", "NIR", "R", "G", "B")
Rows = dict[str, list[Any]]


def one_scene(scene: SimulatedScene, rng: np.random.Generator, rows: Rows) -> None:
    """Add the figures of a scene to `rows`."""
    optical = scene.pixels[:5].astype(np.float32)
    optical[optical == NODATA] = np.nan
    qa, dem, label = scene.pixels[5], scene.pixels[6], scene.label > 0
    rows["kelp px"].append(int(label.sum()))
    rows["QA"].append(qa.mean())
    rows["land"].append((dem > 0).mean())
    rows["sea"].append((dem <= 0).mean() > 0.98)
    rows["dem"].append(dem[(dem > 0)])
    rows["dem void"].append((bool((dem == NODATA).any()), bool((dem == NODATA).all())))
    rows["missing"].append(np.isnan(optical).any(axis=(1, 2)))
    rows["saturated"].append((optical == 65_535).any(axis=(1, 2)))
    rows["image size"].append(stored_size(scene.pixels))
    if label.any():
        numbered, _ = ndimage.label(label, structure=np.ones((3, 3)))
        areas = np.bincount(numbered.ravel())[1:]
        rows["areas"].append(areas)
        rows["count"].append(len(areas))
        rows["mask size"].append(stored_size(label[np.newaxis].astype(np.int8)))
        rows["edge"].append(1 - ndimage.binary_erosion(label).sum() / label.sum())
        rows["wrong"].append((label.sum(), (label & (scene.truth > 0)).sum(), scene.truth.sum()))
        if (dem > 0).any():
            rows["shore"].append(ndimage.distance_transform_edt(dem <= 0)[label])
    pixels(optical, dem, label, rng, rows)


def pixels(
    optical: NDArray[np.float32],
    dem: NDArray[np.int32],
    label: NDArray[np.bool_],
    rng: np.random.Generator,
    rows: Rows,
) -> None:
    """Add a sample of the pixels that the elevation model calls water or land, with features."""
    seen = np.isfinite(optical).all(axis=0)
    water = seen & (dem < 1)
    if not water.any():
        return
    red, nir = optical[2], optical[1]
    bare = water & ~label
    middle = np.median(optical[:, bare if bare.any() else water], axis=1)
    features = np.stack(
        [
            *optical,
            (nir - red) / (nir + red),
            nir - middle[1],
            nir - middle[1] - red + middle[2],
        ]
    )
    some = water & (rng.random(water.shape) < 0.25)
    rows["features"].append(np.vstack([features[:, some], label[some]]))
    rows["ground"].append(optical[:, seen & (dem >= 1) & (rng.random(water.shape) < 0.05)])


def stored_size(array: NDArray[Any]) -> int:
    """Bytes of the array as a competition GeoTIFF."""
    count, height, width = array.shape
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=array.dtype,
            compress="lzw",
            interleave="pixel",
        ) as dataset:
            dataset.write(array)
        return len(memory.getbuffer())


def best_dice(feature: NDArray[np.float32], label: NDArray[np.bool_]) -> float:
    """Dice of the best threshold of one feature, in either direction."""
    order = np.argsort(feature)
    dice = []
    for truth in (label[order], label[order][::-1]):
        hits = truth.sum() - np.cumsum(truth)
        taken = len(truth) - np.arange(1, len(truth) + 1)
        dice.append((2 * hits / (taken + truth.sum())).max())
    return float(max(dice))


def numbers(values: Any, form: str = "{:.3g}") -> str:
    return " / ".join(form.format(value) for value in np.atleast_1d(np.asarray(values, float)))


def report(rows: Rows) -> None:
    """Print simulated and published figures side by side."""
    out = io.StringIO()

    def line(name: str, published: str, values: Any, form: str = "{:.3g}") -> None:
        out.write(f"{name:44s} {published:42s} {numbers(values, form)}\n")

    line("", "PUBLISHED", [], "")
    kelp, qa, land = (np.array(rows[name]) for name in ("kelp px", "QA", "land"))
    line("images with kelp", "0.626", (kelp > 0).mean())
    line("kelp share of all px", "0.0068", kelp.mean() / SIZE**2)
    line(
        "kelp px q50 q75 sd",
        "112 / 880 / 2695",
        [*np.quantile(kelp, (0.5, 0.75)), kelp.std()],
        "{:.0f}",
    )
    line(
        "QA mean sd q25 q50 q75",
        "0.070 / 0.138 / 0.001 / 0.013 / 0.074",
        [qa.mean(), qa.std(), *np.quantile(qa, (0.25, 0.5, 0.75))],
    )
    line("QA all zero, over 40 %", "0.037 / 0.041", [(qa == 0).mean(), (qa > 0.4).mean()])
    line("land share q25 q50 q75", "0.08 / 0.23 / 0.53", np.quantile(land, (0.25, 0.5, 0.75)))
    line("almost all water", "0.12", np.mean(rows["sea"]))
    dem = np.concatenate(rows["dem"])
    line("land height mean sd, m", "44 / 58", [dem.mean(), dem.std()])
    line("DEM with void, all void", "0.117 / 0.033", np.mean(rows["dem void"], axis=0))
    line(
        "bands with -32768",
        "0.151 / 0.171 / 0.211 / 0.212 / 0.240",
        np.mean(rows["missing"], axis=0),
    )
    line(
        "bands with 65535",
        "0.039 / 0.036 / 0.045 / 0.019 / 0.14",
        np.mean(rows["saturated"], axis=0),
    )
    line(
        "image MB q05 q50 q95",
        "0.83 / 1.28 / 1.76",
        np.quantile(rows["image size"], (0.05, 0.5, 0.95)) / 1e6,
    )
    line(
        "mask bytes q05 q25 q50 q75 q95",
        "2559 / 2615 / 2730 / 2939 / 3478",
        np.quantile(rows["mask size"], (0.05, 0.25, 0.5, 0.75, 0.95)),
        "{:.0f}",
    )
    line(
        "patches q25 q50 q75 q90",
        "3 / 7 / 12 / 18",
        np.quantile(rows["count"], (0.25, 0.5, 0.75, 0.9)),
    )
    areas = np.concatenate(rows["areas"])
    line(
        "patch px q25 q50 q75 q90 q95 q99",
        "2 / 23 / 90 / 320 / 568 / 1680",
        np.quantile(areas, (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)),
        "{:.0f}",
    )
    line("edge px of a mask, median", "0.45", np.median(rows["edge"]))
    line(
        "px to shore q05 q25 q50 q75 q95",
        "2.3 / 6.1 / 12 / 25 / 100",
        np.quantile(np.concatenate(rows["shore"]), (0.05, 0.25, 0.5, 0.75, 0.95)),
    )
    values(rows, line)
    drawn, both, true = np.sum(rows["wrong"], axis=0)
    line("Dice of label and truth", "(unknown)", 2 * both / (drawn + true))
    print(out.getvalue())


def values(rows: Rows, line: Any) -> None:
    """The part of the report that is about digital numbers."""
    table = np.concatenate(rows["features"], axis=1)
    label = table[-1] > 0
    published = (
        "7484 / 7574 / 7584 / 7679",
        "7719 / 7794 / 8809 / 8924",
        "7758 / 7828 / 7902 / 7941",
        "8051 / 8136 / 8109 / 8159",
        "8104 / 8162 / 7994 / 8031",
    )
    ground = np.concatenate(rows["ground"], axis=1)
    land = ("13736 / 2969", "15268 / 3569", "9861 / 1683", "9736 / 1663", "8933 / 1368")
    for band, name in enumerate(BANDS):
        sets = [table[band, part] for part in (~label, label)]
        # Published histograms end where clouds begin.
        sets[0] = sets[0][sets[0] < 11_000]
        line(
            f"{name} water median mean, kelp median mean",
            published[band],
            [f(s) for s in sets for f in (np.median, np.mean)],
            "{:.0f}",
        )
        line(
            f"{name} land mean sd", land[band], [ground[band].mean(), ground[band].std()], "{:.0f}"
        )
    offset = table[6, label]
    line("NIR offset of kelp mean sd", "1028 / 763", [offset.mean(), offset.std()], "{:.0f}")
    line(
        "  q05 q25 q50 q75 q95",
        "-31 / 429 / 959 / 1541 / 2418",
        np.quantile(offset, (0.05, 0.25, 0.5, 0.75, 0.95)),
        "{:.0f}",
    )
    line("NDVI of kelp mean sd", "0.052 / 0.036", [table[5, label].mean(), table[5, label].std()])
    targets = (0.022, 0.117, 0.038, 0.025, 0.050, 0.190, 0.116, 0.252)
    for row, (name, goal) in enumerate(
        zip((*BANDS, "NDVI", "NIR offset", "ODVI"), targets, strict=True)
    ):
        line(f"best threshold Dice, {name}", f"{goal:.3f}", best_dice(table[row], label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: Rows = {
        name: []
        for name in (
            "kelp px",
            "QA",
            "land",
            "sea",
            "dem",
            "dem void",
            "missing",
            "saturated",
            "image size",
            "areas",
            "count",
            "mask size",
            "edge",
            "wrong",
            "shore",
            "features",
            "ground",
        )
    }
    rng = np.random.default_rng(0)
    seconds = 0.0
    for child in np.random.SeedSequence(args.seed).spawn(args.scenes):
        start = time.process_time()
        scene = simulate_scene(np.random.default_rng(child), SIZE, SIZE)
        seconds += time.process_time() - start
        one_scene(scene, rng, rows)
    report(rows)
    print(
        f"{seconds / args.scenes:.3f} s of one core for a scene, place included "
        f"({rasterio.__name__} {rasterio.__version__}, numpy {np.__version__})"
    )


if __name__ == "__main__":
    main()
