"""Whole images against slices at equal training compute, on simulated coasts, with `kelp compare`.

    python benchmarks/should_i_slice.py [--pixels 1e8] [--seeds 0] [--world 0] [--work_dir DIR]

Simulates a world, trains a U-Net with the packaged EfficientNet-Lite0 on whole images (350 px
padded to 352) and on tiles (128 px enlarged to 320, bilinear), each until it has seen `--pixels`
network pixels, and compares them on test places that neither has seen, against clean truth.
Networks learn from noisy labels; thresholds are fitted on the other half of the test places.
A step that is finished in `--work_dir` is not done again. 1e8 pixels take about four minutes of
training a network on two cores; the trial of the design used 3e8.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring

import kelp
from kelp import config
from kelp.manifest import IMAGES_TABLE, TILES_TABLE

TILE = 128
SHARED: dict[str, Any] = {
    "cv_split": 0, "batch_size": 8, "num_workers": 1, "use_weighted_sampler": True,
    "has_kelp_importance_factor": 3, "kelp_pixels_pct_importance_factor": 0.2,
    "qa_ok_importance_factor": 0, "qa_corrupted_pixels_pct_importance_factor": -1,
    "almost_all_water_importance_factor": 0.5, "dem_nan_pixels_pct_importance_factor": 0.25,
    "dem_zero_pixels_pct_importance_factor": -1, "encoder": "tu-tf_efficientnet_lite0",
    "lr": 1e-3, "lr_scheduler": "onecycle", "loss": "combo",
}  # fmt: skip
"""What both networks share: only the picture they are shown differs."""
RECIPES: dict[str, dict[str, Any]] = {
    "whole": {"image_size": 352, "resize_strategy": "pad"},
    "sliced": {
        "image_size": 320, "resize_strategy": "resize", "interpolation": "bilinear", "sahi": True,
    },
}  # fmt: skip


def prepare(root: Path, world: int, places: int, test: int) -> None:
    """Simulated images, tables, statistics and tiles of a world."""
    if (root / "sahi" / TILES_TABLE).is_file():
        return
    kelp.simulate(
        config.SimulateConfig(output_dir=root / "raw", places=places, dates=3, test=test,
                              seed=world, workers=2)
    )  # fmt: skip
    table = root / "processed" / IMAGES_TABLE
    kelp.build_metadata(config.MetadataConfig(data_dir=root / "raw", output_dir=root / "processed"))
    kelp.slice_dataset(
        config.SliceConfig(data_dir=root / "raw" / "train", metadata_fp=table,
                           output_dir=root / "sahi", image_size=TILE)
    )  # fmt: skip


def train(root: Path, kind: str, pixels: float, seed: int, epochs: int) -> Path:
    """A bundle trained until it has seen that many network pixels."""
    done = root / f"{kind}-{pixels:.3g}-{seed}.json"
    if done.is_file():
        return Path(json.loads(done.read_text())["run_dir"])
    recipe = RECIPES[kind]
    sliced = recipe.get("sahi", False)
    table = root / "sahi" / TILES_TABLE if sliced else root / "processed" / IMAGES_TABLE
    samples = round(pixels / recipe["image_size"] ** 2 / epochs / 8) * 8
    result = kelp.train(
        config.TrainConfig(
            data_dir=root / "sahi" if sliced else root / "raw",
            metadata_fp=table, output_dir=root / "runs", seed=seed, epochs=epochs,
            early_stopping_patience=epochs,
            samples_per_epoch=samples, **SHARED, **recipe,
        )
    )  # fmt: skip
    done.write_text(json.dumps({"run_dir": str(result.run_dir)}))
    return result.run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=float, default=1e8, help="network pixels of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--world", type=int, default=0, help="seed of the simulation")
    parser.add_argument("--places", type=int, default=60, help="to learn from")
    parser.add_argument("--test", type=int, default=40, help="test places")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = options.work_dir or Path(tempfile.mkdtemp(prefix="kelp-"))
    root = root / f"world{options.world}"
    prepare(root, options.world, options.places, options.test)
    rows: list[measuring.Row] = []
    texts = []
    for seed in options.seeds:
        started = time.monotonic()
        runs = {kind: train(root, kind, options.pixels, seed, options.epochs) for kind in RECIPES}
        trained = time.monotonic() - started
        links = {kind: root / f"seed{seed}" / kind for kind in RECIPES}
        for kind, link in links.items():
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(runs[kind].resolve())
        result = kelp.compare(
            config.CompareConfig(
                data_dir=root / "raw" / "test" / "images", gt_dir=root / "raw" / "test_truth",
                run_dir=tuple(links.values()), sahi_tile_size=TILE,
                output_dir=root / f"comparison-{options.pixels:.3g}-{seed}",
            )
        )  # fmt: skip
        print(f"\nworld {options.world}, seed {seed}, {trained:.0f} s of training\n{result.text}")
        texts.append(result.advice.text)
        for judged in result.comparison.judged:
            dice = result.comparison.figure(judged, "pooled_dice")
            rows.append(
                {"seed": seed, "way": judged.way.name, "Dice": dice.value, "low": dice.low,
                 "high": dice.high, "cost": judged.multiplier}
            )  # fmt: skip
    title = f"Should I slice? World {options.world}, {options.pixels:.3g} network pixels"
    measuring.report(title, rows, texts, options.json)
    print(f"data, runs and comparisons: {root}")


if __name__ == "__main__":
    main()
