"""Whole images against slices at equal training compute, on simulated coasts, with `kelp compare`.

    python benchmarks/should_i_slice.py [--pixels 3e8] [--worlds calibrated specks murky]
        [--seeds 0] [--real_dir DIR] [--work_dir DIR] [--screen [--run_dir NETWORK]] [--quick]

For each world and seed a U-Net with the packaged EfficientNet-Lite0 is trained on whole images
(350 px padded to 352) and on tiles (`--sahi True`, its defaults), each until it has seen
`--pixels` network pixels, and both are compared on test places that neither has seen, against
clean truth. Networks learn from noisy labels and are taken as they are at the end of training (a
fold of few places would pick an epoch by chance); thresholds are fitted on other places. The last
table is the one that decides: what slices gain over whole images, with intervals over places.
With `--real_dir` the networks are also applied to real tiles, `<id>_satellite.tif` with
`<id>_kelp.tif`; no real label is learned from.

`--screen` asks something else: does a training of `kelp train --sahi True`, its calibration
included, ever collapse? Only tiles are learned from, test places are mapped with the threshold
that the bundle has, and the table has a row for each seed. With `--run_dir NETWORK` nothing is
trained: that network maps the test places.

What is finished in `--work_dir` is not done again. 3e8 pixels take about a quarter of an hour of
training a network on two cores. `--quick` runs the same program small, in a few minutes; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measuring
import numpy as np

import kelp
from kelp import config
from kelp.errors import KelpError
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.nn.comparison.result import Comparison
from kelp.simulation.world import WORLDS
from kelp.tables import IMAGES_TABLE, TILES_TABLE

SHARED: dict[str, Any] = {
    "cv_split": 0,
    "batch_size": 8,
    "num_workers": 1,
    "use_weighted_sampler": True,
    "has_kelp_importance_factor": 3,
    "kelp_pixels_pct_importance_factor": 0.2,
    "qa_ok_importance_factor": 0,
    "qa_corrupted_pixels_pct_importance_factor": -1,
    "almost_all_water_importance_factor": 0.5,
    "dem_nan_pixels_pct_importance_factor": 0.25,
    "dem_zero_pixels_pct_importance_factor": -1,
    "encoder": "tu-tf_efficientnet_lite0",
    "lr_scheduler": "onecycle",
    "loss": "combo",
    "limit_val_batches": 8,
    "calibrate": False,  # `kelp compare` fits thresholds on other places
    "min_dice": 0,  # nothing found is a figure here
}
"""What both networks share: only the picture they are shown differs."""
KINDS = ("whole", "sliced")
_WORLD = ("places", "test", "size")


def prepare(root: Path, world: str, options: argparse.Namespace) -> None:
    """Simulated images, tables and tiles of a world; the seed of a world is its number."""
    record, made = root / "world.json", {name: getattr(options, name) for name in _WORLD}
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8")) != made:
            raise SystemExit(f"{root}: was made with other options; give another --work_dir")
        return
    kelp.simulate(
        config.SimulateConfig(
            output_dir=root / "raw",
            places=options.places,
            dates=3,
            test=options.test,
            size=options.size,
            seed=list(WORLDS).index(world),
            world=world,
        )
    )
    kelp.build_metadata(config.MetadataConfig(data_dir=root / "raw", output_dir=root / "processed"))
    kelp.slice_dataset(
        config.SliceConfig(
            data_dir=root / "raw" / "train",
            metadata_fp=root / "processed" / IMAGES_TABLE,
            output_dir=root / "sahi",
        )
    )
    record.write_text(json.dumps(made), encoding="utf-8")


def train(root: Path, kind: str, seed: int, options: argparse.Namespace) -> Path:
    """A network trained until it has seen that many pixels; the link under which it is kept."""
    link = root / f"{options.pixels:.3g}-{seed}" / kind
    if not link.is_symlink():
        sliced, asked = kind != "whole", SHARED
        if kind == "screened":  # as users get it: calibrated, and refused where it found nothing
            asked = {k: v for k, v in SHARED.items() if k not in ("calibrate", "min_dice")}
        table = root / "sahi" / TILES_TABLE if sliced else root / "processed" / IMAGES_TABLE
        base = config.TrainConfig(
            data_dir=root / "sahi" if sliced else root / "raw",
            metadata_fp=table,
            output_dir=root / "runs",
            sahi=sliced,
            seed=seed,
            epochs=options.epochs,
            early_stopping_patience=options.epochs,
            lr=options.lr,
            **asked,
        )
        samples = options.pixels / base.image_size**2 / options.epochs / base.batch_size
        draws = {"samples_per_epoch": max(1, round(samples)) * base.batch_size}
        run = kelp.train(base.model_copy(update=draws))
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(run.run_dir.resolve())
    return link


def judge(runs: list[Path], images: Path, truth: Path, out: Path) -> measuring.Row:
    """What slices gain over whole images on these scenes: the lines of the last table."""
    kept = out / "reach.json"
    if not kept.is_file():
        result = kelp.compare(
            config.CompareConfig(
                data_dir=images,
                gt_dir=truth,
                run_dir=tuple(runs),
                output_dir=out,
                use_checkpoint="latest",
                overlaps=(),
            )
        )
        print(f"\n{result.text}\n", flush=True)
        kept.write_text(json.dumps(reach(result.comparison), indent=1), encoding="utf-8")
    row: measuring.Row = json.loads(kept.read_text(encoding="utf-8"))
    return row


def screened(root: Path, seed: int, options: argparse.Namespace) -> measuring.Row:
    """What a training as users get it makes of the test places; or a network that is there."""
    out = root / f"{options.pixels:.3g}-{seed}"
    kept = out / "screened.json"
    if options.run_dir:
        return {"network": str(options.run_dir), **mapped(root, options.run_dir, root / "maps")}
    if not kept.is_file():
        try:
            run = train(root, "screened", seed, options)
        except KelpError as error:
            return {"seed": seed, "pooled Dice": 0.0, "refused": str(error)}
        found = {"seed": seed, **mapped(root, run, out / "maps")}
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    row: measuring.Row = json.loads(kept.read_text(encoding="utf-8"))
    return row


def mapped(root: Path, run: Path, maps: Path) -> measuring.Row:
    """Figures of a network's maps of the test places, against clean truth."""
    raw = root / "raw"
    kelp.predict_scenes(
        config.PredictConfig(
            data_dir=raw / "test" / "images", run_dir=(run,), output_dir=maps, overwrite=True
        )
    )
    scores = kelp.evaluate(config.EvaluateConfig(gt_dir=raw / "test_truth", preds_dir=maps))
    false = [int(image["fp"]) for image in scores.by_image]
    shares, bare = list[float](), list[float]()
    for image in scores.by_image:
        if image["open_km2"] > 1:  # of less, one pixel would be a large share
            shares.append(float(image["open_false_km2"] / image["open_km2"]))
            if not image["tp"] + image["fn"]:
                bare.append(1e6 * shares[-1])
    confusion = scores.all_pixels.confusion
    return {
        "pooled Dice": confusion.dice,
        "precision": confusion.precision,
        "recall": confusion.recall,
        "most false pixels": max(false),
        "of scene": scores.tile_ids[int(np.argmax(false))],
        "largest false share of open water": max(shares),
        "scenes without kelp": len(bare),
        "false kelp there, m²/km², 95 %": float(np.percentile(bare, 95)) if bare else None,
    }


def screen(work: Path, options: argparse.Namespace) -> None:
    """Trainings of many seeds, and how far the worst lies below the median."""
    for world in options.worlds:
        prepare(work / world, world, options)
        seeds = options.seeds[:1] if options.run_dir else options.seeds
        rows = [screened(work / world, seed, options) for seed in seeds]
        dice = [row["pooled Dice"] for row in rows]
        median = statistics.median(dice)
        notes = [
            f"median {median:.4f}, worst {min(dice):.4f} (median {min(dice) - median:+.4f})",
            f"refused: {sum('refused' in row for row in rows)} of {len(rows)}",
            f"data, runs and maps: {work}",
        ]
        made = options.run_dir or f"Trainings of {options.pixels:.3g} network pixels"
        title = f"{made}, {world}"
        measuring.report(title, rows, notes, options.json)


def reach(found: Comparison) -> measuring.Row:
    """The network trained on tiles as `kelp predict` applies it, against whole images."""
    ways = {(one.name.split(":")[0], one.variant.kind): one for one in reversed(found.evaluations)}
    whole, ours = ways["whole", "whole"], ways["sliced", "sliced"]
    row: measuring.Row = {
        "whole": str(whole.figure("pooled_dice")),
        "sliced": str(ours.figure("pooled_dice")),
        "gain": str(ours.difference(whole)),
        "over the seed's merge": str(ours.difference(ways["sliced", "seed"])),
        "over the enlarged image": str(ours.difference(ways["sliced", "whole, upsampled"])),
        "seam": str(ours.figure("seam_score")),
        "cost": round(ours.multiplier / whole.multiplier, 1),
        "cost of the enlarged image": round(
            ways["sliced", "whole, upsampled"].multiplier / whole.multiplier, 1
        ),
    }
    first, second = (found.equal_to(one) for one in (ours, whole))
    for size in PATCH_SIZES[:2]:
        name, words = f"recall_{size}_px", f"found {size} px, at equal precision"
        row[words] = str(first.difference(second, name)) if first and second else "-"
    name = "false_kelp_share_of_open_water"
    row["false kelp, m²/km²"] = str(ours.difference(whole, name).times(1e6))
    return row


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--pixels", type=float, default=3e8, help="network pixels of a training")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training")
    parser.add_argument("--places", type=int, default=60, help="to learn from, three images each")
    parser.add_argument("--test", type=int, default=100, help="test places")
    parser.add_argument("--size", type=int, default=350, help="side of an image, px")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--real_dir", type=Path, help="<id>_satellite.tif with <id>_kelp.tif")
    parser.add_argument("--work_dir", type=Path, help="keep what is made, go on with it")
    parser.add_argument("--screen", action="store_true", help="only whether trainings collapse")
    parser.add_argument("--run_dir", type=Path, help="with --screen: a network that is there")
    parser.add_argument("--quick", action="store_true", help="small, to try the program")
    options = parser.parse_args()
    if options.quick:
        options.worlds, options.places, options.test, options.size = ["specks"], 6, 8, 160
        options.pixels, options.epochs = 2e6, 1
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = options.work_dir or Path(tempfile.mkdtemp(prefix="kelp-"))
    if options.screen:
        screen(work, options)
        return
    rows: list[measuring.Row] = []
    for world in options.worlds:
        root = work / world
        prepare(root, world, options)
        for seed in options.seeds:
            runs = [train(root, kind, seed, options) for kind in KINDS]
            out = runs[0].parent
            test = root / "raw" / "test" / "images", root / "raw" / "test_truth"
            rows.append({"scenes": world, "seed": seed, **judge(runs, *test, out / "comparison")})
            if options.real_dir:
                scenes = real_scenes(options.real_dir, work / "real")
                row = judge(runs, scenes, options.real_dir, out / "real")
                rows.append({"scenes": f"real, trained on {world}", "seed": seed, **row})
    words = list(dict.fromkeys(word for row in rows for word in row))
    turned = [{"": word, **{str(k): row.get(word) for k, row in enumerate(rows)}} for word in words]
    title = f"Should I slice? {options.pixels:.3g} network pixels of training"
    measuring.report(title, turned, [f"data, runs and comparisons: {work}"], options.json)


def real_scenes(folder: Path, links: Path) -> Path:
    """A folder of links to the scenes that have a mask."""
    links.mkdir(parents=True, exist_ok=True)
    for scene in sorted(folder.glob("*_satellite.tif")):
        link = links / scene.name
        if (folder / scene.name.replace("_satellite", "_kelp")).is_file() and not link.exists():
            link.symlink_to(scene.resolve())
    return links


if __name__ == "__main__":
    main()
