"""Whole images against slices at equal training compute, on simulated coasts, with `kelp compare`.

    python benchmarks/should_i_slice.py [--pixels 3e8] [--worlds calibrated specks murky]
        [--seeds 0] [--real_dir DIR] [--work_dir DIR] [--quick]

For each world and seed a U-Net with the packaged EfficientNet-Lite0 is trained on whole images
(350 px padded to 352) and on tiles (`--sahi True`, its defaults), each until it has seen
`--pixels` network pixels, and both are compared on test places that neither has seen, against
clean truth. Networks learn from noisy labels; thresholds are fitted on other places. The last
table is the one that decides: what slices gain over whole images, with intervals over places.
With `--real_dir` the networks are also applied to real tiles, `<id>_satellite.tif` with
`<id>_kelp.tif`; no real label is learned from.

What is finished in `--work_dir` is not done again. 3e8 pixels take about a quarter of an hour of
training a network on two cores. `--quick` runs the same program small, in a few minutes; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import measuring

import kelp
from kelp import config
from kelp.manifest import IMAGES_TABLE, TILES_TABLE
from kelp.simulation.world import WORLDS

SHARED: dict[str, Any] = {
    "cv_split": 0, "batch_size": 8, "num_workers": 1, "use_weighted_sampler": True,
    "has_kelp_importance_factor": 3, "kelp_pixels_pct_importance_factor": 0.2,
    "qa_ok_importance_factor": 0, "qa_corrupted_pixels_pct_importance_factor": -1,
    "almost_all_water_importance_factor": 0.5, "dem_nan_pixels_pct_importance_factor": 0.25,
    "dem_zero_pixels_pct_importance_factor": -1, "encoder": "tu-tf_efficientnet_lite0",
    "lr": 1e-3, "lr_scheduler": "onecycle", "loss": "combo", "limit_val_batches": 32,
}  # fmt: skip
"""What both networks share: only the picture they are shown differs."""
KINDS = ("whole", "sliced")


def prepare(root: Path, world: str, options: argparse.Namespace) -> None:
    """Simulated images, tables and tiles of a world; the seed of a world is its number."""
    kelp.simulate(
        config.SimulateConfig(
            output_dir=root / "raw", places=options.places, dates=3, test=options.test,
            size=options.size, seed=list(WORLDS).index(world), world=world,
        )
    )  # fmt: skip
    kelp.build_metadata(config.MetadataConfig(data_dir=root / "raw", output_dir=root / "processed"))
    kelp.slice_dataset(
        config.SliceConfig(
            data_dir=root / "raw" / "train", metadata_fp=root / "processed" / IMAGES_TABLE,
            output_dir=root / "sahi",
        )
    )  # fmt: skip


def train(root: Path, kind: str, seed: int, options: argparse.Namespace) -> Path:
    """A network trained until it has seen that many pixels; the link under which it is kept."""
    link = root / f"{options.pixels:.3g}-{seed}" / kind
    if not link.is_symlink():
        sliced = kind == "sliced"
        table = root / "sahi" / TILES_TABLE if sliced else root / "processed" / IMAGES_TABLE
        changes = {"encoder": options.encoder, "pretrained": False} if options.quick else {}
        base = config.TrainConfig(
            data_dir=root / "sahi" if sliced else root / "raw", metadata_fp=table,
            output_dir=root / "runs", sahi=sliced, seed=seed, epochs=options.epochs,
            early_stopping_patience=options.epochs, **SHARED | changes,
        )  # fmt: skip
        samples = options.pixels / base.image_size**2 / options.epochs / base.batch_size
        draws = {"samples_per_epoch": max(1, round(samples)) * base.batch_size}
        run = kelp.train(base.model_copy(update=draws))
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(run.run_dir.resolve())
    return link


def compare(runs: list[Path], images: Path, truth: Path, out: Path) -> dict[str, Any]:
    """The comparison of the networks, as `comparison.json` holds it."""
    if not (out / "comparison.json").is_file():
        result = kelp.compare(
            config.CompareConfig(data_dir=images, gt_dir=truth, run_dir=tuple(runs), output_dir=out)
        )
        print(result.text, flush=True)
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return found
