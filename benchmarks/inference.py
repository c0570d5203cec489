"""Seconds per 350 x 350 image, sliced: kelp against the seed's algorithm, the network and peers.

    python benchmarks/inference.py [--images 4] [--encoder tu-efficientnet_b5] [--repeats 3]

The seed's algorithm is restated plainly: 36 zero-padded tiles of 128 px with overlap 64, resized
to 320 px, all in one batch, float32 in torch's own memory format, a hard vote for each tile, votes
averaged and cut again. kelp predicts a folder, files to mask files, its network loaded before. The
network alone runs the 25 crops an image that must be run, resized already, in batches of 4 and
8, of which the quickest counts. Peers run those 25 tiles of an image in memory with kelp's
float32 network. `--device cuda` measures on a GPU. All are timed in turn, repeatedly, in one
process; ratios are medians of paired runs. Weights are random: time does not depend on them. All
have the huge pages that the program `kelp` asks for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported

import measuring
import numpy as np
import peers
import rasterio
import torch
import torch.nn.functional as F
from measuring import Row
from numpy.typing import NDArray

from kelp.config import PredictConfig, TrainConfig
from kelp.config.train import Precision
from kelp.data_prep.stats import channel_statistics
from kelp.inference import predict
from kelp.inference.backends import Processor
from kelp.inference.bundle import Bundle, load_bundle
from kelp.inference.predictor import Predictor
from kelp.inference.spec import BundleSpec
from kelp.nn.backend import TorchBackend, TorchNet
from kelp.nn.bundle import load_network, save_bundle
from kelp.nn.device import autocast, resolve_device, resolve_precision
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS, DEM
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import read_scene
from kelp.tiling.engine import Counts

TILE, OVERLAP, CROP, SIDE = 128, 64, 320, 350
CROPS = 25
BATCHES = (4, 8)

Pixels = NDArray[np.float32]


def make_bundle(folder: Path, encoder: str, scene: Pixels) -> Bundle:
    options = {"image_size": CROP, "encoder": encoder, "sahi": True}
    config = TrainConfig(data_dir=folder, metadata_fp=folder, output_dir=folder, **options)
    network = network_spec(config, (TILE, TILE)).model_dump()
    spec = BundleSpec.model_validate(
        {
            **network,
            "statistics": channel_statistics([scene], BANDS, IndexSettings("dn", True, True)),
        }
    )
    torch.manual_seed(0)
    return load_bundle(save_bundle(folder, KelpNet(spec), spec))


def write_images(folder: Path, images: list[NDArray[np.int16]]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        count, height, width = image.shape
        with rasterio.open(
            folder / f"B{number:06d}_satellite.tif",
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype="int16",
            compress="deflate",
        ) as out:
            out.write(image)
    return folder


def turned(image: NDArray[np.int16], count: int) -> list[NDArray[np.int16]]:
    """An image and its symmetries: one amount of work, different pixels."""
    kinds = [np.rot90(image, k, axes=(1, 2)) for k in range(4)]
    return [np.ascontiguousarray(kinds[number % 4]) for number in range(count)]


def coastal(image: NDArray[np.int16], count: int, share: float) -> list[NDArray[np.int16]]:
    """An image whose left part is land by its DEM: a straight coast.

    Only tiles that are land all over are skipped. At half land that is one column in five; on
    simulated, broken coasts with 40 to 60 % of land it is none.
    """
    image = image.copy()
    image[DEM] = np.where(np.arange(SIDE) < share * SIDE, 10, -32768)
    return turned(image, count)


def seeds_way(net: KelpNet, scene: Pixels, device: torch.device) -> NDArray[np.uint8]:
    """The original algorithm: 6 x 6 tiles, zero-padded, one float32 batch, hard votes."""
    _, height, width = scene.shape
    x = net.preprocess(torch.from_numpy(scene)[None].to(device))[0]
    places = [(y, x0) for y in range(0, height, OVERLAP) for x0 in range(0, width, OVERLAP)]
    tiles = []
    for y, x0 in places:
        tile = x[:, y : y + TILE, x0 : x0 + TILE]
        tiles.append(F.pad(tile, (0, TILE - tile.shape[2], 0, TILE - tile.shape[1])))
    with torch.inference_mode():
        crops = F.interpolate(torch.stack(tiles), size=(CROP, CROP), mode="nearest")
        p = torch.sigmoid(net.body(crops)[:, 0])
        votes = F.interpolate((p >= 0.5).float()[:, None], size=(TILE, TILE))[:, 0].cpu()
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (y, x0), vote in zip(places, votes.numpy(), strict=True):
        rows, columns = min(TILE, height - y), min(TILE, width - x0)
        total[y : y + rows, x0 : x0 + columns] += vote[:rows, :columns]
        count[y : y + rows, x0 : x0 + columns] += 1
    return (total / count > 0.5).astype(np.uint8)


@dataclass
class Kelp:
    """`kelp predict` on a folder, with a network that is loaded already."""

    bundle: Bundle
    target: Path
    device: str

    def __call__(self, folder: Path, precision: Precision, land: str = "keep") -> Counts:
        """Predict a folder."""
        config = PredictConfig.model_validate(
            {
                "data_dir": folder,
                "output_dir": self.target,
                "run_dir": [self.bundle.path],
                "sahi_overlap": OVERLAP,
                "precision": precision,
                "land": land,
                "band_order": BANDS,
                "device": self.device,
                "overwrite": True,
            }
        )
        with mock.patch.object(predict, "load_bundles", return_value=[self.bundle]):
            return predict.predict_scenes(config).counts


def network_alone(
    bundle: Bundle,
    device: torch.device,
    precision: Precision,
    crops: int,
    batch: int,
) -> None:
    """The network that kelp runs, on crops that are preprocessed and resized already."""
    backend = bundle.on(Processor(device.type, precision, torch.get_num_threads()))
    assert isinstance(backend, TorchBackend)
    net = backend.module
    x = torch.rand(batch, len(BANDS), CROP, CROP, device=device)
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(precision, device):
        for start in range(0, crops, batch):
            net.body(x[: min(batch, crops - start)])
    if device.type == "cuda":
        torch.cuda.synchronize()


def peers_way(peer: peers.Peer, scene: Pixels, network: Predictor) -> None:
    peer.run(peer.prepare(scene), lambda x: torch.from_numpy(network(x.contiguous().numpy())))


def verdicts(runs: dict[str, list[float]], shares: dict[str, float]) -> list[str]:
    """The lines of the Reach table; `shares` are crops run in kelp's and the network's runs."""
    seed = runs["seed"]
    lines = []
    kinds = ("bf16", "float32")
    targets = (("kelp, {}", (8, 4.5)), ("kelp, coast, land skipped, {}", (12,)))
    for way, numbers in targets:
        for kind, target in zip(kinds, numbers, strict=False):
            if (name := way.format(kind)) in runs:
                faster = measuring.ratio(seed, runs[name])
                lines.append(f"{name}: {faster:.2f} times faster than the seed (target: {target})")
    for kind in kinds:
        alone = [name for name in runs if name.startswith(f"network alone, {kind}")]
        if not alone:
            continue
        best = min(alone, key=lambda name: statistics.median(runs[name]))
        ours = runs[f"kelp, {kind}"]
        over = measuring.ratio(ours, runs[best])
        share = shares[f"kelp, {kind}"]
        lines.append(
            f"kelp, {kind}: {over:.3f} times the {best} (target: 1.08); the last batch is filled "
            f"up, per crop run {over / share:.3f} times"
        )
    for name, times in runs.items():
        if name.startswith(("MONAI", "toolbelt", "tiler")):
            over = measuring.ratio(times, runs["kelp, float32"])
            lines.append(f"{name}: {over:.2f} times as long as kelp, float32, files included")
    return lines


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--encoder", default="tu-efficientnet_b5")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--land_share", type=float, default=0.5, help="of the coastal images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, count = resolve_device(options.device), options.images
    with tempfile.TemporaryDirectory() as temporary:
        scene = read_scene(measuring.SCENE)
        with rasterio.open(measuring.SCENE) as dataset:
            stored = dataset.read()
        folder = write_images(Path(temporary) / "images", turned(stored, count))
        coast = write_images(Path(temporary) / "coast", coastal(stored, count, options.land_share))
        bundle = make_bundle(Path(temporary) / "bundle", options.encoder, scene)
        assert isinstance(bundle.net, TorchNet)
        bundle.net.module.to(device)
        kelp = Kelp(bundle, Path(temporary) / "out", options.device)
        plain = load_network(bundle.path, bundle.spec)
        plain.to(device, memory_format=torch.contiguous_format)
        ways: dict[str, Callable[[], object]] = {"seed": lambda: seeds_way(plain, scene, device)}
        images = {"seed": 1}
        kinds: dict[str, Precision] = {"float32": "32-true"}
        if resolve_precision(None, device) == "bf16-mixed":
            kinds = {"bf16": "bf16-mixed"} | kinds
        for kind, precision in kinds.items():
            ways[f"kelp, {kind}"] = partial(kelp, folder, precision)
            ways[f"kelp, coast, land skipped, {kind}"] = partial(kelp, coast, precision, "skip")
            for batch in BATCHES:
                ways[f"network alone, {kind}, batch {batch}"] = partial(
                    network_alone, bundle, device, precision, CROPS * count, batch
                )
        network = Predictor(bundle, device=options.device, precision="32-true")
        for peer in peers.installed(TILE, OVERLAP, (8,)):
            if "buffered" not in peer.name:
                ways[peer.name] = partial(peers_way, peer, scene, network)
                images[peer.name] = 1
        notes = {name: way() for name, way in ways.items()}  # warms up, too
        runs = measuring.interleaved(ways, options.repeats, warm=False)
    runs = {name: [t / images.get(name, count) for t in times] for name, times in runs.items()}
    rows: list[Row] = []
    shares = {}
    for name, times in runs.items():
        row: Row = {"way": name, "s per image": statistics.median(times)}
        row["times the seed's speed"] = measuring.ratio(runs["seed"], times)
        made = notes[name]
        if isinstance(made, Counts):
            row["crops per image"] = made.predicted / count
            row["crops run"] = made.batches * 8
            shares[name] = made.batches * 8 / (CROPS * count)
        rows.append(row)
    title = f"Sliced prediction of 350 x 350 images, {options.encoder}, {count} in a folder"
    measuring.report(title, rows, verdicts(runs, shares), options.json)


if __name__ == "__main__":
    main()
