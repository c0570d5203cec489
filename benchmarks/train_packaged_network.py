"""Trains the network in the box, on simulated coasts alone.

    python benchmarks/train_packaged_network.py --work_dir DIR [--device cuda]
        [--scenes varied=1600 calibrated=400 specks=300 murky=300] [--steps 3000] [--batch 64]

Scenes are simulated by all cores, anchored at their clear water and held in memory as raw numbers;
tiles of 128 px are cut anywhere in them, half of them around kelp, and shown to a U-Net with the
packaged EfficientNet-Lite0 as `kelp train --sahi True` shows them: turned, mirrored, enlarged to
224 px, labels as volunteers draw them. Calibration (Platt 1999), threshold, limits of the guard and
the errors of areas come from sites that training has not seen, with clean truth. No real scene and
no real label takes part.

What is finished in `--work_dir` is not done again: scenes lie there in parts, and training goes on
from the last of its checkpoints. At the end `bundle/` and `record.json` lie there. About 7 GB of
memory for 900 scenes; with the defaults some minutes on one large GPU, two days on two cores.
`--weights BUNDLE` trains nothing: what comes after training is done again for its weights.
`--quick` runs the same program small; its network is good for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import optimize, special
from torch import Tensor, nn

from kelp.config import ExportConfig, TrainConfig
from kelp.evaluation.calibration import EDGES, logit_classes, probabilities
from kelp.evaluation.intervals import HeldOutSite
from kelp.inference.bundle import read_spec
from kelp.inference.guard import FEW_PIXELS, GuardLimits
from kelp.inference.spec import BundleSpec, NetworkSpec
from kelp.io.files import atomic, file_sha256, write_json
from kelp.nn import symmetry
from kelp.nn.bundle import describe_bundle, save_bundle
from kelp.nn.device import Float32Depthwise
from kelp.nn.export import export
from kelp.nn.losses import LossSettings, build_loss
from kelp.nn.model import KelpNet, start_from_share
from kelp.nn.pretrained import load_pretrained
from kelp.nn.training.plan import network_spec
from kelp.nn.training.task import build_average, build_optimizer, build_scheduler
from kelp.raster.bands import PIXEL_SIZE_M, QA
from kelp.raster.streaming import ChannelStats
from kelp.raster.validity import canonical
from kelp.raster.water import WaterReference
from kelp.raster.window import Shape, Tile
from kelp.simulation.scene import make_place, take_picture
from kelp.simulation.world import WORLDS

SIDE: Final = 350
TILE: Final = 128
SHOWN: Final = 224
CODES: Final = 250
_PART: Final = 10
"""Scenes in a file."""
_RANGES: Final = {
    "SWIR": (7200.0, 9800.0, 17_900.0),
    "NIR": (7400.0, 10_600.0, 19_900.0),
    "R": (7350.0, 8500.0, 13_600.0),
    "G": (7500.0, 8700.0, 13_300.0),
    "B": (7400.0, 8400.0, 11_800.0),
}
"""DN: 1 %, mean and 99 % of published tiles, by which `kelp predict` knows a foreign scale."""
_NUMBERS: Final = {name: number for number, name in enumerate(WORLDS)}

Scenes = dict[str, NDArray[Any]]


class _Whole:
    """A scene in memory."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self.pixels = pixels
        self.shape: Shape = (pixels.shape[1], pixels.shape[2])

    def read(self, tile: Tile, /) -> NDArray[np.float32]:
        return self.pixels[:, *tile.slices]


def simulate(job: tuple[str, int, int, Path], changes: dict[str, float]) -> Path:
    """Scenes `start` to `stop` of a world, each of a site of its own, as one file."""
    world, start, stop, path = job
    if path.is_file():
        return path
    made: dict[str, list[NDArray[Any]]] = {name: [] for name in ("raw", "label", "truth", "levels")}
    for number in range(start, stop):
        rng = np.random.default_rng(
            np.random.SeedSequence(2026, spawn_key=(_NUMBERS[world], number))
        )
        settings = replace(WORLDS[world], **changes) if world == "varied" else WORLDS[world]
        place = make_place(rng, (SIDE, SIDE), settings)
        scene = take_picture(rng, place, (0, 0), (SIDE, SIDE))
        raw = canonical(scene.pixels)
        whole = Tile(0, 0, SIDE, SIDE)
        reference = WaterReference.estimate(_Whole(raw))
        anchored = reference.apply(raw, whole)
        seen = np.isfinite(raw[1]) & (np.isfinite(raw[:5]).sum(axis=0) >= 3)
        made["raw"].append(anchored)
        low, high = reference.extremes() if not reference.fallback else ([np.nan] * 5,) * 2
        made["levels"].append(np.array([low, high]))
        made["label"].append(np.where(seen, scene.label, np.uint8(255)))
        made["truth"].append(np.where(seen & (raw[QA] != 1), scene.truth, np.uint8(255)))
    with atomic(path) as partial_path, partial_path.open("wb") as file:
        np.savez(file, **{name: np.stack(values) for name, values in made.items() if values})
    return path


def parts(folder: Path, counts: dict[str, int], first: int) -> list[tuple[str, int, int, Path]]:
    """Files of scenes; scenes below `first` are held out by the other call."""
    return [
        (world, start, min(start + _PART, first + count), folder / f"{world}-{start:06d}.npz")
        for world, count in counts.items()
        for start in range(first, first + count, _PART)
    ]


def simulated(
    jobs: list[tuple[str, int, int, Path]], changes: dict[str, float], workers: int
) -> Scenes:
    """All scenes of all files."""
    lacking = [job for job in jobs if not job[3].is_file()]
    if lacking:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(simulate, changes=changes), lacking))
    loaded = [np.load(path) for *_, path in jobs]
    scenes = {
        name: np.concatenate([part[name] for part in loaded])
        for name in ("raw", "label", "truth", "levels")
    }
    scenes["world"] = np.repeat(
        [_NUMBERS[job[0]] for job in jobs], [job[2] - job[1] for job in jobs]
    )
    return scenes


def statistics() -> dict[str, ChannelStats]:
    """Ranges of the bands; clear water normalises them, but for the DEM: in hundreds of metres."""
    one = ChannelStats(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1, 0)
    dem = ChannelStats(0.0, 706.0, 20.0, 45.0, 0.0, 100.0, 1, 0)
    water = {
        name: ChannelStats(low, 65_535.0, mean, 3000.0, low, high, 1, 0)
        for name, (low, mean, high) in _RANGES.items()
    }
    return water | {"QA": one, "DEM": dem}


def spec_of() -> NetworkSpec:
    """The network that is trained."""
    config = TrainConfig(
        data_dir="d", metadata_fp="m", output_dir="o", sahi=True, encoder="tu-tf_efficientnet_lite0"
    )
    return network_spec(config, (TILE, TILE)).model_copy(update={"statistics": statistics()})


def draws(
    labels: NDArray[np.uint8], steps: int, batch: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Scene, y, x of the tiles of each step: half anywhere, half around a pixel of kelp."""
    kelpy = np.flatnonzero((labels == 1).any(axis=(1, 2)))
    pixels = {int(k): np.flatnonzero(labels[k] == 1) for k in kelpy}
    top = SIDE - TILE
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        rows = np.empty((batch, 3), dtype=np.int64)
        for row in rows:
            if rng.random() < 0.5 and len(kelpy):
                scene = int(rng.choice(kelpy))
                y, x = divmod(int(rng.choice(pixels[scene])), SIDE)
                corner = np.clip(np.array([y, x]) - rng.integers(0, TILE, 2), 0, top)
                row[:] = scene, *corner
            else:
                row[:] = rng.integers(len(labels)), *rng.integers(0, top + 1, 2)
        yield rows


def train(
    scenes: Scenes, options: argparse.Namespace, work: Path
) -> tuple[KelpNet, dict[str, Any]]:
    """The network, as the moving average of its weights, and what its training was."""
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    config = TrainConfig(
        data_dir="d",
        metadata_fp="m",
        output_dir="o",
        sahi=True,
        lr=options.lr,
        lr_scheduler="onecycle",
        loss=options.loss,
        ema_decay=options.ema,
    )
    torch.manual_seed(options.seed)
    net = KelpNet(spec_of())
    start_from_share(net)
    if options.start:
        net.load_state_dict(load_file(options.start / "weights.safetensors"))
    else:
        load_pretrained(net, "imagenet")
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(net.parameters(), config)
    scheduler = build_scheduler(optimizer, config, options.steps)
    average = build_average(net, config)
    assert average is not None
    loss_of = build_loss(config.loss, LossSettings())
    done, curve = 0, []
    kept = work / "checkpoint.pt"
    if kept.is_file():
        state = torch.load(kept, map_location=device, weights_only=True)
        for one, name in ((net, "net"), (average, "average"), (optimizer, "optimizer")):
            one.load_state_dict(state[name])
        scheduler.load_state_dict(state["scheduler"])
        done, curve = state["done"], state["curve"]
    raw, label = torch.from_numpy(scenes["raw"]), torch.from_numpy(scenes["label"])
    if device.type == "cuda":
        raw, label = raw.to(device), label.to(device)
    started, losses = time.monotonic(), []
    for step, rows in enumerate(draws(scenes["label"], options.steps, options.batch, options.seed)):
        if step < done:
            continue
        cut = [
            (int(k), slice(int(y), int(y) + TILE), slice(int(x), int(x) + TILE)) for k, y, x in rows
        ]
        batch = torch.stack([raw[k, :, y, x] for k, y, x in cut]).to(device)
        target = torch.stack([label[k, y, x] for k, y, x in cut]).to(device)
        turned = np.random.default_rng((options.seed, step, 1)).integers(8, size=len(rows))
        for k in range(1, 8):  # all tiles of one symmetry at once
            own = torch.from_numpy(np.flatnonzero(turned == k)).to(device)
            batch[own] = symmetry.apply(batch[own], k)
            target[own] = symmetry.apply(target[own], k)
        with torch.autocast(device.type, torch.bfloat16), Float32Depthwise():
            loss = loss_of(net(batch), net.resize_target(target))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(net)
        losses.append(loss.detach())
        last = step + 1 == options.steps or time.monotonic() - started > options.seconds
        if (step + 1) % options.every == 0 or last:
            curve.append([step + 1, round(float(torch.stack(losses).mean()), 4)])
            losses = []
            print(f"step {step + 1} of {options.steps}: loss {curve[-1][1]}", flush=True)
            if last:
                break
            states = {
                "net": net,
                "average": average,
                "optimizer": optimizer,
                "scheduler": scheduler,
            }
            with atomic(kept) as path:
                torch.save(
                    {n: s.state_dict() for n, s in states.items()}
                    | {"done": step + 1, "curve": curve},
                    path,
                )
    record = {
        "steps": curve[-1][0],
        "curve": curve,
        "seconds": round(time.monotonic() - started, 1),
    }
    best: KelpNet = average.module
    if options.start:
        if options.halfway:
            go_halfway(best, options.start)
        begun = json.loads((options.start / "record.json").read_text(encoding="utf-8"))
        record["start"] = {name: begun[name] for name in ("steps", "seconds", "scenes", "options")}
    return best.eval(), record


@torch.no_grad()
def go_halfway(net: KelpNet, start: Path) -> None:
    """Go back half the way to the weights that training started from.

    Wortsman et al. 2022 ("Robust fine-tuning of zero-shot models", CVPR) find such averages as good
    where both have learnt, and better elsewhere.
    """
    begun = load_file(start / "weights.safetensors")
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.lerp_(begun[name].to(value), 0.5)


@torch.no_grad()
def probabilities_of(net: KelpNet, raw: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Probabilities of whole scenes `(n, 7, 350, 350)`, some at a time, as in `kelp predict`."""
    shown = net.described(net.spec.at_scale(net.spec.prediction_tile or TILE))
    for k in range(0, len(raw), 8):
        batch = raw[k : k + 8].to(device)
        missing = torch.isnan(batch)
        filled = nn.functional.pad(batch.nan_to_num(0), (0, 2, 0, 2), mode="reflect")
        gone = nn.functional.pad(missing.float(), (0, 2, 0, 2), mode="reflect") > 0
        with torch.autocast(device.type, torch.bfloat16):
            p = shown.probabilities(torch.where(gone, torch.nan, filled))
        yield p[:, :SIDE, :SIDE].float()


def counts(
    net: KelpNet, scenes: Scenes, options: argparse.Namespace
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pixels by scene, truth and code of p, `(n, 2, 251)`, and expected kelp by scene, px."""
    device = torch.device(options.device)
    truth = torch.from_numpy(scenes["truth"]).to(device)
    tables, expected, at = [], [], 0
    for p in probabilities_of(net, torch.from_numpy(scenes["raw"]), device):
        t = truth[at : at + len(p)]
        code = (p * CODES).floor().long().clamp(0, CODES)
        place = torch.arange(len(p), device=device)[:, None, None] * 2 * (CODES + 1)
        place = place + (t == 1).long() * (CODES + 1) + code
        found = torch.bincount(place[t != 255], minlength=len(p) * 2 * (CODES + 1))
        tables.append(found.view(len(p), 2, CODES + 1).cpu().numpy())
        expected.append((p * (t != 255)).double().sum(dim=(1, 2)).cpu().numpy())
        at += len(p)
    return np.concatenate(tables), np.concatenate(expected)


def calibrate(net: KelpNet, scenes: Scenes, options: argparse.Namespace) -> dict[str, float]:
    """Slope and intercept of the logits, by which p is the share of kelp (Platt 1999).

    The intercept goes into the bias of the last layer, the slope into the temperature. Labels lack
    kelp that volunteers miss: a network that learnt from them says less than there is.
    """
    pixels = np.zeros((2, len(EDGES)))
    at = 0
    for p in probabilities_of(net, torch.from_numpy(scenes["raw"]), torch.device(options.device)):
        truth = scenes["truth"][at : at + len(p)]
        for k in (0, 1):
            classes = logit_classes(p.cpu().numpy()[truth == k])
            pixels[k] += np.bincount(classes, minlength=len(EDGES))
        at += len(p)
    logits = special.logit(probabilities())

    def entropy(line: NDArray[np.float64]) -> float:
        z = line[0] * logits + line[1]
        return float((pixels * np.logaddexp(0, [z, -z])).sum() / pixels.sum())

    slope, intercept = optimize.minimize(entropy, [1.0, 0.0], method="Nelder-Mead").x
    heads = [m for m in net.body.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1]
    assert heads[-1].bias is not None
    with torch.no_grad():
        heads[-1].bias += intercept / slope
    net.spec = net.spec.model_copy(update={"temperature": float(f"{1 / slope:.3g}")})
    return {"slope": round(float(slope), 4), "intercept": round(float(intercept), 4)}


def dice_of(
    tables: NDArray[np.int64], code: int
) -> tuple[float, float, float, NDArray[np.float64]]:
    """Pooled Dice, precision and recall at a code, and Dice by scene (NaN without kelp)."""
    hit, wrong = tables[:, 1, code:].sum(axis=1), tables[:, 0, code:].sum(axis=1)
    missed = tables[:, 1, :code].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_scene = np.where(hit + missed > 0, 2 * hit / (2 * hit + wrong + missed), np.nan)
    total = 2 * hit.sum() / max(1, 2 * hit.sum() + wrong.sum() + missed.sum())
    return (
        float(total),
        float(hit.sum() / max(1, (hit + wrong).sum())),
        float(hit.sum() / max(1, (hit + missed).sum())),
        by_scene,
    )


def best_code(tables: NDArray[np.int64]) -> int:
    """The code from which on kelp is best marked."""
    return 1 + int(np.argmax([dice_of(tables, code)[0] for code in range(1, CODES)]))


def false_share(tables: NDArray[np.int64], code: int) -> NDArray[np.float64]:
    """False kelp of each scene, as a share of what is observed."""
    wrong: NDArray[np.float64] = tables[:, 0, code:].sum(axis=1) / np.maximum(
        1, tables.sum(axis=(1, 2))
    )
    return wrong


def scored(tables: NDArray[np.int64], code: int) -> dict[str, Any]:
    """What a threshold makes of scenes."""
    dice, precision, recall, by_scene = dice_of(tables, code)
    p = (np.arange(CODES + 1) + 0.5) / (CODES + 1)
    pooled = tables.sum(axis=0)
    edges = np.minimum((p * 15).astype(int), 14)
    gap = 0.0
    for k in range(15):
        n = pooled[:, edges == k].sum()
        if n:
            gap += abs(
                pooled[1, edges == k].sum()
                - (pooled[:, edges == k].sum(axis=0) * p[edges == k]).sum()
            )
    of_kelp = by_scene[~np.isnan(by_scene)]
    return {
        "dice": round(dice, 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "mean_dice": round(float(of_kelp.mean()), 4) if len(of_kelp) else None,
        "scenes": len(tables),
        "worst_false_pixels": int(tables[:, 0, code:].sum(axis=1).max()),
        "worst_false_share": round(float(false_share(tables, code).max()), 5),
        "calibration_error": round(float(gap / max(1, pooled.sum())), 5),
        "by_scene": [None if np.isnan(d) else round(float(d), 3) for d in by_scene],
    }


def real_scenes(folder: Path) -> Scenes:
    """Real tiles with masks, to look at what the network makes of them; nothing learns of them."""
    from kelp.raster.masks import read_mask
    from kelp.raster.scene import read_scene

    raws, truths = [], []
    for path in sorted(folder.glob("*_satellite.tif")):
        mask = path.with_name(path.name.replace("_satellite", "_kelp"))
        if not mask.is_file():
            continue
        raw = read_scene(path)
        raws.append(WaterReference.estimate(_Whole(raw)).apply(raw, Tile(0, 0, *raw.shape[1:])))
        seen = np.isfinite(raw[1]) & (np.isfinite(raw[:5]).sum(axis=0) >= 3) & (raw[QA] != 1)
        truths.append(np.where(seen, read_mask(mask), np.uint8(255)))
    return {"raw": np.stack(raws), "truth": np.stack(truths)}


def guard_limits(tables: NDArray[np.int64], levels: NDArray[np.float64], code: int) -> GuardLimits:
    """What maps of held-out scenes look like.

    Args:
        tables: of the scenes that the threshold was fitted on.
        levels: lowest and highest clear water of all scenes, `(n, 2, 5)`, NaN = unknown.
        code: where kelp begins.
    """
    by_code = tables.sum(axis=1)
    kelp = by_code[:, code:].sum(axis=1)
    p = (np.arange(CODES + 1) + 0.5) / (CODES + 1)
    certainty = (by_code[:, code:] * p[code:]).sum(axis=1) / np.maximum(kelp, 1)
    shown = kelp >= FEW_PIXELS
    limits = GuardLimits().with_water(levels[:, 0], levels[:, 1])
    return limits.with_maps((kelp / by_code.sum(axis=1))[shown], certainty[shown])


def limits_of(record: dict[str, Any]) -> tuple[str, ...]:
    """What a user must know, with the figures of this run."""
    worlds = ", ".join(f"{name} {one['dice']:.2f}" for name, one in record["held_out"].items())
    words = [
        "It has seen simulated coasts alone, no real scene and no real label.",
        f"Dice by simulated world, unseen sites: {worlds}.",
        "Presence of floating canopy at the moment of the scene; tides hide it.",
    ]
    if real := record.get("real"):
        found = real["at_threshold"]
        words.insert(
            2,
            f"Six real tiles with approximate labels: Dice {found['dice']:.2f} pooled, "
            f"{found['mean_dice']:.2f} mean, precision {found['precision']:.2f}, recall "
            f"{found['recall']:.2f}; expect false kelp in glint, foam and shallow water.",
        )
    return tuple(words)


def write_bundle(net: KelpNet, record: dict[str, Any], folder: Path) -> None:
    """The bundle: weights in 16 bits, the ONNX file of the same weights, card and record."""
    halves = {
        name: value.half() if value.is_floating_point() else value
        for name, value in net.state_dict().items()
    }
    net.load_state_dict(halves)  # rounded, as they are stored and exported
    spec = BundleSpec(
        **dict(net.spec),
        threshold=record["threshold"],
        scores={f"val/{name}": record["all"][name] for name in ("dice", "precision", "recall")},
        epoch=1,
        rows={"train": sum(record["scenes"].values()), "val": record["all"]["scenes"]},
        training={"command": "benchmarks/train_packaged_network.py", **record["options"]},
        tuning={
            "scenes": "simulated coasts of four worlds that training has not seen",
            "images": record["all"]["scenes"],
            "expected_calibration_error": record["all"]["calibration_error"],
        },
        guard=GuardLimits(**record["guard"]),
        sensors=("Landsat 4", "Landsat 5", "Landsat 7", "Landsat 8", "Landsat 9"),
        limits=limits_of(record),
        held_out_sites=[
            HeldOutSite(
                site=f"{one['world']}-{number}",
                scene=f"{one['world']}-{number}",
                truth_m2=one["kelp"] * PIXEL_SIZE_M**2,
                presence_m2=one["predicted"] * PIXEL_SIZE_M**2,
                expected_m2=one["expected"] * PIXEL_SIZE_M**2,
            )
            for number, one in enumerate(record["sites"])
        ],
    )
    save_bundle(folder, net.float(), spec)
    weights = folder / "weights.safetensors"
    save_file({n: v.contiguous().cpu() for n, v in halves.items()}, weights)
    spec = read_spec(folder).model_copy(update={"weights_sha256": file_sha256(weights)})
    describe_bundle(folder, spec)
    export(ExportConfig(run_dir=folder, output_path=folder / "network.onnx"))
    write_json(folder / "record.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument(
        "--scenes", nargs="+", default=["varied=1600", "calibrated=400", "specks=300", "murky=300"]
    )
    parser.add_argument(
        "--held_out", type=int, default=60, help="sites of each world, for threshold and figures"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--loss", default="combo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument(
        "--set", nargs="*", default=[], help="settings of the varied world, name=number"
    )
    parser.add_argument("--real_dir", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="train no longer")
    parser.add_argument("--weights", type=Path, help="a bundle: train nothing")
    parser.add_argument("--start", type=Path, help="a bundle: train its weights further")
    parser.add_argument(
        "--halfway", action="store_true", help="of --start: keep the weights halfway between"
    )
    parser.add_argument("--scenes_dir", type=Path, help="of scenes; default: in --work_dir")
    parser.add_argument("--scenes_only", action="store_true", help="simulate them, no more")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    wanted = {name: int(n) for name, n in (each.split("=") for each in options.scenes)}
    if options.quick:
        wanted, options.held_out, options.steps, options.batch = {"varied": 3}, 2, 2, 2
    changes = {name: float(n) for name, n in (each.split("=") for each in options.set)}
    work = options.work_dir
    folder = options.scenes_dir or work / "scenes"
    for each in (work, folder):
        each.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    unseen = parts(folder, dict.fromkeys(WORLDS, options.held_out), 0)
    every = simulated(unseen + parts(folder, wanted, 10_000), changes, options.workers)
    count = options.held_out * len(WORLDS)
    held = {name: values[:count] for name, values in every.items()}
    scenes = {name: values[count:] for name, values in every.items()}
    seconds = round(time.monotonic() - started, 1)
    print(f"{len(scenes['raw'])} scenes, {seconds} s", flush=True)
    if options.scenes_only:
        return
    if options.weights:
        net = KelpNet(spec_of())
        net.load_state_dict(load_file(options.weights / "weights.safetensors"))
        net = net.eval().to(options.device)
        record = json.loads((options.weights / "record.json").read_text(encoding="utf-8"))
    else:
        net, record = train(scenes, options, work)
        record |= {"scenes": wanted, "scene_seconds": seconds}
    finish(net, record, held, scenes["levels"], options, work)


def finish(
    net: KelpNet,
    record: dict[str, Any],
    held: Scenes,
    levels: NDArray[np.float64],
    options: argparse.Namespace,
    work: Path,
) -> None:
    """Calibrate and fit the threshold on held-out sites of even number, score on the odd ones."""
    even = np.arange(len(held["raw"])) % 2 == 0
    known = {name: values[even] for name, values in held.items()}
    record |= {"calibration": calibrate(net, known, options)}
    fitted, expected = counts(net, known, options)
    code = best_code(fitted)
    tables, expected = counts(net, {name: values[~even] for name, values in held.items()}, options)
    worlds = held["world"][~even]
    record |= {
        "threshold": code / CODES,
        "guard": guard_limits(fitted, np.concatenate([held["levels"], levels]), code).model_dump(),
        "held_out": {
            w: scored(tables[worlds == n], code) for w, n in _NUMBERS.items() if (worlds == n).any()
        },
        "all": scored(tables, code),
        "sites": [
            {
                "world": list(WORLDS)[int(w)],
                "kelp": int(t[1].sum()),
                "predicted": int(t[:, code:].sum()),
                "expected": round(float(e), 1),
            }
            for w, t, e in zip(worlds, tables, expected, strict=True)
        ],
        "options": record.get("options", {})
        | {
            name: " ".join(value) if isinstance(value, list) else str(value)
            for name, value in vars(options).items()
            if not isinstance(value, Path)
            and (not options.weights or name in ("held_out", "workers", "device"))
        },
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
    }
    if options.real_dir:
        real, _ = counts(net, real_scenes(options.real_dir), options)
        record["real"] = {
            "at_threshold": scored(real, code),
            "best": scored(real, best_code(real)) | {"threshold": best_code(real) / CODES},
        }
    write_json(work / "record.json", record)
    write_bundle(net, record, work / "bundle")
    brief = {k: v for k, v in record.items() if k not in ("sites", "curve", "options")}
    print(json.dumps(brief), flush=True)


if __name__ == "__main__":
    main()
