"""Sliced prediction of one 350 x 350 image: kelp against the seed's algorithm and the bare network.

    python benchmarks/inference.py [--encoder tu-efficientnet_b5] [--repeats 5]

The seed's algorithm is restated plainly: 36 zero-padded tiles of 128 px with overlap 64, resized
to 320 px, all in one float32 batch, a hard vote for each tile, votes averaged and cut again.
kelp runs its 25 clamped tiles from a file to a mask file, reading and writing included. The bare
network is the time of the same 25 crops through the network alone, in batches of 8. All three
are timed in turn, repeatedly, in one process; ratios are medians of paired runs. Weights are
random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import kelp
from kelp.bands import BANDS
from kelp.indices import IndexSettings
from kelp.nn.bundle import Bundle, load_bundle, save_bundle
from kelp.nn.device import autocast, resolve_precision
from kelp.nn.model import KelpNet
from kelp.nn.spec import BundleSpec
from kelp.scene import read_scene
from kelp.stats import channel_statistics

TILE, OVERLAP, CROP = 128, 64, 320
CROPS, BATCH = 25, 8
CPU = torch.device("cpu")


def make_bundle(folder: Path, encoder: str, scene: NDArray[np.float32]) -> Bundle:
    spec = BundleSpec(
        bands=BANDS,
        statistics=channel_statistics([scene], BANDS, IndexSettings()),
        sahi=True,
        tile_size=(TILE, TILE),
        image_size=CROP,
        resize_strategy="resize",
        encoder=encoder,
    )
    torch.manual_seed(0)
    return load_bundle(save_bundle(folder, KelpNet(spec), spec))


def seeds_way(bundle: Bundle, scene: NDArray[np.float32], threshold: float = 0.5) -> NDArray:
    """The original algorithm: 6 x 6 tiles, zero-padded, one float32 batch, hard votes."""
    net, (_, height, width) = bundle.net, scene.shape
    x = net.preprocess(torch.from_numpy(scene)[None])[0]
    places = [(y, x0) for y in range(0, height, OVERLAP) for x0 in range(0, width, OVERLAP)]
    tiles = []
    for y, x0 in places:
        tile = x[:, y : y + TILE, x0 : x0 + TILE]
        tiles.append(F.pad(tile, (0, TILE - tile.shape[2], 0, TILE - tile.shape[1])))
    with torch.inference_mode():
        crops = F.interpolate(torch.stack(tiles), size=(CROP, CROP), mode="nearest")
        p = torch.sigmoid(net.body(crops)[:, 0])
        votes = F.interpolate((p >= threshold).float()[:, None], size=(TILE, TILE))[:, 0]
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (y, x0), vote in zip(places, votes.numpy(), strict=True):
        rows, columns = min(TILE, height - y), min(TILE, width - x0)
        total[y : y + rows, x0 : x0 + columns] += vote[:rows, :columns]
        count[y : y + rows, x0 : x0 + columns] += 1
    return (total / count > threshold).astype(np.uint8)


def bare_network(bundle: Bundle) -> None:
    """The network alone on as many crops as kelp needs, in its number format."""
    x = torch.zeros(BATCH, len(BANDS), CROP, CROP).to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(resolve_precision(None, CPU), CPU):
        for start in range(0, CROPS, BATCH):
            bundle.net.body(x[: min(BATCH, CROPS - start)])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="tu-efficientnet_b5")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with (
        resources.as_file(resources.files("kelp") / "data" / "LS000001_satellite.tif") as path,
        tempfile.TemporaryDirectory() as temporary,
    ):
        scene = read_scene(path)
        bundle = make_bundle(Path(temporary) / "bundle", options.encoder, scene)
        mask = Path(temporary) / "mask.tif"
        ways: dict[str, Callable[[], object]] = {
            "seed: 36 tiles, float32, hard votes": lambda: seeds_way(bundle, scene),
            "kelp, default precision": lambda: kelp.predict(bundle, path, mask, overlap=OVERLAP),
            "kelp, float32": lambda: kelp.predict(
                bundle, path, mask, overlap=OVERLAP, precision="32-true"
            ),
            "bare network, 25 crops": lambda: bare_network(bundle),
        }
        for way in ways.values():
            way()  # warm up
        runs = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                runs[name].append(seconds(way))
    print(f"{options.encoder}, {torch.get_num_threads()} threads, medians of {options.repeats}")
    first = next(iter(runs))
    for name, times in runs.items():
        ratio = statistics.median(a / b for a, b in zip(runs[first], times, strict=True))
        print(f"{name:38s} {statistics.median(times):7.2f} s   {ratio:5.2f} x the seed's speed")
    ours, bare = runs["kelp, default precision"], runs["bare network, 25 crops"]
    overhead = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    run = -(-CROPS // BATCH) * BATCH
    print(
        f"kelp takes {overhead:.2f} times the bare network's time, reading and writing included; "
        f"{overhead * CROPS / run:.2f} times for each crop, as one image alone runs {run} crops "
        f"for {CROPS} (the last batch is filled up; in a folder the next image fills it)"
    )


if __name__ == "__main__":
    main()
