"""How many pixels of a trained network's map depend on batch size, threads, device, precision.

    python benchmarks/precision.py --run_dir RUN --data_dir IMAGES --truth_dir MASKS [--images 16]

Every variant is compared with float32, batches of 8, all cores: pixels of the mask that differ (law
5: at most 0.01% in float32), largest difference of a probability, and Dice against the truth.
"""

from __future__ import annotations

from pathlib import Path

import measuring
import numpy as np
import torch
from numpy.typing import NDArray

import kelp
from kelp.raster.masks import read_mask
from kelp.raster.scene import read_scene
from kelp.tiling.merge import to_mask

VARIANTS = {
    "float32, batch 8": {"precision": "32-true", "batch_size": 8},
    "float32, batch 1": {"precision": "32-true", "batch_size": 1},
    "float32, batch 64": {"precision": "32-true", "batch_size": 64},
    "float32, one thread": {"precision": "32-true", "batch_size": 8, "threads": 1},
    "float32, GPU": {"precision": "32-true", "batch_size": 8, "device": "cuda"},
    "bf16-mixed": {"precision": "bf16-mixed", "batch_size": 8},
    "bf16-mixed, batch 64": {"precision": "bf16-mixed", "batch_size": 64},
}


def dice(mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    both = np.sum((mask == 1) & (truth == 1))
    return float(2 * both / (np.sum(mask == 1) + np.sum(truth == 1)))


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--truth_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    bundle = kelp.load_bundle(options.run_dir)
    paths = sorted(options.data_dir.glob("*_satellite.tif"))[: options.images]
    truth = np.stack(
        [read_mask(options.truth_dir / path.name.replace("_satellite", "_kelp")) for path in paths]
    )
    scenes = [read_scene(path) for path in paths]
    rows: list[measuring.Row] = []
    reference: NDArray[np.float32] | None = None
    for name, wishes in VARIANTS.items():
        wishes = dict(wishes)
        torch.set_num_threads(wishes.pop("threads", options.threads))
        if wishes.get("device") == "cuda" and not torch.cuda.is_available():
            print(f"{name}: no GPU here")
            continue
        p = np.stack([kelp.predict_array(bundle, scene, **wishes) for scene in scenes])
        reference = p if reference is None else reference
        mask, first = (to_mask(x, bundle.spec.threshold) for x in (p, reference))
        rows.append(
            {
                "variant": name,
                "pixels that differ, %": float(100 * np.mean(mask != first)),
                "largest difference of p": float(np.nanmax(np.abs(p - reference))),
                "Dice": round(dice(mask, truth), 4),
            }
        )
    title = f"{len(paths)} images, {bundle.spec.architecture} on {bundle.spec.encoder}"
    measuring.report(title, rows, [], options.json)


if __name__ == "__main__":
    main()
