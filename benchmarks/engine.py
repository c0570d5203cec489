"""What slicing and merging cost by themselves: scene Mpx/s with a network that does nearly nothing.

    python benchmarks/engine.py [--sides 1024,4096] [--files 4096] [--resize 2048] [--spread 2048]

Tiles of 128 px with overlap 64; the network is one band times a constant, at crop = tile. kelp's
engine runs against MONAI, pytorch-toolbelt and tiler on float32 scenes in memory, each first
checked to give the right map; then from a file to a mask file: peers read the file whole with
rasterio and write a tiled deflate GeoTIFF, kelp streams and writes a Cloud Optimized one with
overviews, its journal kept. `contiguous` asks that the network be given a batch that it can run
on: MONAI at batch 1 otherwise hands out views, of which six bands of seven are never touched.
`resize` resizes 128 px to 320 and back in the network: the whole engine against the resize alone on
the same batches. `spread` asks for the standard deviation of overlapping tiles as well. All in
turn, repeatedly, in one process; ratios are medians of paired runs. Memory is the growth of each
run's peak (VmHWM) in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import peers
import rasterio
import torch
from measuring import Row
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from kelp.inference import memory
from kelp.inference.outputs import Outputs
from kelp.inference.plan import make_plan
from kelp.nn.resize import to_network, to_scene
from kelp.raster.bands import BANDS
from kelp.raster.masks import decoding
from kelp.raster.scene import Scene
from kelp.tiling.engine import Engine, Job
from kelp.tiling.strip import Slicing

Pixels = NDArray[np.float32]

TILE, OVERLAP, SIDE = 128, 64, 320
NIR, CONSTANT, THRESHOLD = BANDS.index("NIR"), float(np.float32(1 / 65535)), 0.2
SLICING = Slicing((TILE, TILE), (OVERLAP, OVERLAP))
OURS = "kelp"
SPREAD = "kelp, with the spread"


def scene_of(height: int, width: int) -> Pixels:
    """A scene without a missing value."""
    rng = np.random.default_rng(0)
    block = rng.integers(7000, 30000, (len(BANDS), 509, 499)).astype(np.float32)
    block[BANDS.index("QA")] = 0
    repeats = (1, -(-height // 509), -(-width // 499))
    return np.ascontiguousarray(np.tile(block, repeats)[:, :height, :width])


def trivial(batch: Pixels) -> Pixels:
    return batch[:, NIR] * np.float32(CONSTANT)


def trivial_torch(batch: torch.Tensor) -> torch.Tensor:
    return batch[:, NIR] * CONSTANT


def contiguous_torch(batch: torch.Tensor) -> torch.Tensor:
    """By bands or by pixels: networks run on both."""
    if not batch.is_contiguous(memory_format=torch.channels_last):
        batch = batch.contiguous()
    return trivial_torch(batch)


class Map:
    """An array as source and sink (the engine's protocols)."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.shape = (pixels.shape[1], pixels.shape[2])
        self.result, self.spread = np.empty((2, *self.shape), dtype=np.float32)

    def read(self, tile: Any) -> Pixels:
        """A window."""
        rows, columns = tile.slices
        return self.pixels[:, rows, columns]

    def write(self, y: int, rows: Pixels) -> None:
        """Take rows."""
        self.result[y : y + len(rows)] = rows

    def write_spread(self, y: int, rows: Pixels) -> None:
        """Take rows of the spread."""
        self.spread[y : y + len(rows)] = rows

    def close(self) -> None:
        """Nothing to do."""


def engine_on_array(scene: Pixels, spread: bool = False) -> Pixels:
    array = Map(scene)
    Engine(trivial, SLICING).run([Job(array, array, spread=array.write_spread if spread else None)])
    return array.result


def engine_on_file(source: Path, target: Path) -> None:
    with Scene(source, BANDS) as scene:
        plan = make_plan([scene.size], SLICING, 0, 1)
        sink = Outputs(scene.shape, scene.georeference, target, THRESHOLD, {}, None, "benchmark")
        engine = Engine(trivial, SLICING)
        with decoding(plan.cache):
            engine.run([Job(scene, sink, sink)])
    for _, error in engine.failures:
        raise error


def peer_on_file(peer: peers.Peer, source: Path, target: Path) -> None:
    with rasterio.open(source) as dataset:
        scene = dataset.read(out_dtype="float32")
        height, width = dataset.shape
    p = peer.run(peer.prepare(scene), trivial_torch)
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512}
    with rasterio.open(
        target,
        "w",
        **profile,
        compress="deflate",
        count=1,
        dtype="uint8",
        height=height,
        width=width,
    ) as out:
        out.write((p >= np.float32(THRESHOLD)).astype(np.uint8), 1)


def write_scene(path: Path, pixels: Pixels) -> None:
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512}
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        **profile,
        compress="deflate",
        zlevel=1,
        num_threads=2,
        count=count,
        dtype="int16",
        height=height,
        width=width,
    ) as out:
        out.write(pixels.astype(np.int16))


def find_peers(only: str = "") -> list[peers.Peer]:
    return peers.installed(TILE, OVERLAP, (1, 8, 32), only)


def quickest(network: peers.Predict) -> list[peers.Peer]:
    """Of each library its quickest batch size and mode here, and its quickest mode at kelp's batch.

    Tried on a scene of 1,024 x 1,536.
    """
    found, scene = find_peers(), scene_of(1024, 1536)
    ways = {peer.name: _runner(peer, peer.prepare(scene), network) for peer in found}
    runs = measuring.interleaved(ways, 3)
    best: dict[str, peers.Peer] = {}
    for peer in sorted(found, key=lambda peer: statistics.median(runs[peer.name])):
        best.setdefault(peer.library, peer)
        if peer.batch == SLICING.batch_size:
            best.setdefault(f"{peer.library} at kelp's batch", peer)
    return list({peer.name: peer for peer in best.values()}.values())


def _runner(peer: peers.Peer, scene: Any, network: peers.Predict) -> Callable[[], Pixels]:
    return lambda: peer.run(scene, network)


def in_memory(shape: tuple[int, int], repeats: int, memory_too: bool) -> list[Row]:
    scene, rows = scene_of(*shape), []
    expected = scene[NIR] * np.float32(CONSTANT)
    for title, network in (("in memory", trivial_torch), ("contiguous", contiguous_torch)):
        ways: dict[str, Callable[[], Pixels]] = {OURS: lambda: engine_on_array(scene)}
        for peer in quickest(network):
            ways[peer.name] = _runner(peer, peer.prepare(scene), network)
        for name, way in ways.items():  # this also warms them up
            wrong = float(np.abs(way() - expected).max())
            if not wrong < 1e-6:
                raise SystemExit(f"{name} gives a wrong map at {shape}: off by {wrong}")
        runs = measuring.interleaved(ways, repeats, warm=False)
        rows += rows_of(title, shape, runs)
        if memory_too and title == "in memory":
            for row in rows[-len(runs) :]:
                row["MB"] = peak_of(title, row["way"], shape)
    return rows


def from_files(shape: tuple[int, int], repeats: int, memory_too: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "scene.tif", Path(folder) / "mask.tif"
        write_scene(source, scene_of(*shape))
        ways: dict[str, Callable[[], object]] = {OURS: lambda: engine_on_file(source, target)}
        for peer in quickest(trivial_torch):
            ways[peer.name] = lambda peer=peer: peer_on_file(peer, source, target)
        expected = scene_of(*shape)[NIR] * np.float32(CONSTANT) >= np.float32(THRESHOLD)
        for name, way in ways.items():
            way()
            with rasterio.open(target) as dataset:
                wrong = float((dataset.read(1) != expected).mean())
            if wrong > 1e-4:  # peers round the last bit otherwise
                raise SystemExit(f"{name} gives a wrong mask: {wrong:.2%} of its pixels")
        runs = measuring.interleaved(ways, repeats, warm=False)
        rows = rows_of("files", shape, runs)
        if memory_too:
            for row in rows:
                row["MB"] = peak_of("files", row["way"], shape)
    return rows


def rows_of(title: str, shape: tuple[int, int], runs: dict[str, list[float]]) -> list[Row]:
    megapixels = shape[0] * shape[1] / 1e6
    return [
        {
            "from": title,
            "scene": f"{shape[0]} x {shape[1]}",
            "way": name,
            "Mpx/s": megapixels / statistics.median(times),
            "kelp is times faster": measuring.ratio(times, runs[OURS]),
        }
        for name, times in runs.items()
    ]


class Resizing:
    """The trivial network behind the resize of `kelp train`'s defaults; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[Pixels] = []
        self.recording = False

    def __call__(self, batch: Pixels) -> Pixels:
        """Resize, multiply one band, resize back."""
        if self.recording:
            self.batches.append(batch.copy())
        with torch.inference_mode():
            x = to_network(torch.from_numpy(batch), SIDE, "nearest")
            return to_scene(trivial_torch(x), (TILE, TILE), "nearest").numpy()


def resized(shape: tuple[int, int], repeats: int) -> list[Row]:
    scene, network = Map(scene_of(*shape)), Resizing()

    def whole() -> None:
        Engine(network, SLICING).run([Job(scene, scene)])

    def alone() -> None:
        for batch in network.batches:
            network(batch)

    network.recording = True
    whole()
    network.recording = False
    runs = measuring.interleaved({OURS: whole, "the resize alone": alone}, repeats)
    rows = rows_of("resize to 320", shape, runs)
    times = rows[1].pop("kelp is times faster")
    rows[0]["kelp is times faster"] = None
    rows[0]["times the resize alone"] = 1 / times
    return rows


def spread_of_tiles(shape: tuple[int, int], repeats: int) -> list[Row]:
    scene = scene_of(*shape)
    ways = {OURS: lambda: engine_on_array(scene), SPREAD: lambda: engine_on_array(scene, True)}
    rows = rows_of("spread", shape, measuring.interleaved(ways, repeats))
    times = rows[1].pop("kelp is times faster")
    rows[0]["kelp is times faster"] = None
    rows[0]["with the spread"] = times
    return rows


def peak_of(title: str, way: str, shape: tuple[int, int]) -> float:
    answer = measuring.child(__file__, title, way, str(shape[0]), str(shape[1]))
    return float(answer["MB"])


def measure_child(title: str, way: str, height: int, width: int) -> None:
    """Print by how many MB the peak of this process grows in one run."""
    torch.set_num_threads(2)
    scene = scene_of(height, width)
    found = [] if way == OURS else find_peers(only=way)
    peer = next((peer for peer in found if peer.name == way), None)
    network, small = trivial_torch, scene_of(256, 256)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "scene.tif", Path(folder) / "mask.tif"
        if title == "files":
            write_scene(source, scene)
            del scene
            work: Callable[[], object] = (
                (lambda: peer_on_file(peer, source, target))
                if peer
                else (lambda: engine_on_file(source, target))
            )
            write_small = Path(folder) / "small.tif"
            write_scene(write_small, small)
            with rasterio.open(write_small) as dataset:  # GDAL's drivers are loaded
                dataset.read()
        elif peer:
            peer.run(peer.prepare(small), network)  # what is loaded once
            prepared = peer.prepare(scene)
            work = _runner(peer, prepared, network)
        else:
            engine_on_array(small)
            work = lambda: engine_on_array(scene)  # noqa: E731
        print(json.dumps({"MB": memory.growth(work) / 1e6}))


def verdicts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for title in dict.fromkeys(row["from"] for row in rows):
        of = [row for row in rows if row["from"] == title]
        for scene in dict.fromkeys(row["scene"] for row in of):
            ours = next(row for row in of if row["scene"] == scene and row["way"] == OURS)
            if "times the resize alone" in ours:
                times = ours["times the resize alone"]
                lines.append(f"{title}: {times:.2f} times the resize alone (target: at most 1.15)")
                continue
            if "with the spread" in ours:
                lines.append(f"{title}: {ours['with the spread']:.2f} times the time without it")
                continue
            others = [row for row in of if row["scene"] == scene and row is not ours]
            same = [row for row in others if f"batch {SLICING.batch_size}" in row["way"]]
            for which, group in (("the best peer", others), ("the best at its batch", same)):
                if group:
                    times = min(row["kelp is times faster"] for row in group)
                    lines.append(
                        f"{title}, {scene}: {ours['Mpx/s']:.1f} Mpx/s (target: 4), {times:.2f} "
                        f"times {which} (target: 3)"
                    )
    return lines


def sizes(text: str) -> list[tuple[int, int]]:
    """`1024,600x5000`: squares, or height x width."""
    parts = [part.partition("x") for part in text.split(",") if part]
    return [(int(height), int(width or height)) for height, _, width in parts]


def main() -> None:
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    parser = measuring.parser(__doc__)
    parser.add_argument("--sides", type=sizes, default="1024,1500x4100,4096,8192")
    parser.add_argument("--files", type=sizes, default="1024,4096")
    parser.add_argument("--resize", type=sizes, default="2048")
    parser.add_argument("--spread", type=sizes, default="2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        title, way, height, width = options.child
        measure_child(title, way, int(height), int(width))
        return
    rows: list[Row] = []
    for shape in options.sides:
        # Long runs are steadier than short ones.
        repeats = max(3, options.repeats // (1 + shape[0] * shape[1] // 40_000_000))
        rows += in_memory(shape, repeats, not options.no_memory)
    for shape in options.files:
        rows += from_files(shape, options.repeats, not options.no_memory)
    for shape in options.resize:
        rows += resized(shape, options.repeats)
    for shape in options.spread:
        rows += spread_of_tiles(shape, options.repeats)
    measuring.report("Engine overhead, trivial network", rows, verdicts(rows), options.json)


if __name__ == "__main__":
    main()
