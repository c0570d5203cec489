"""Do intervals of area hold the truth, and is the expected area right?

    python benchmarks/intervals.py --work_dir DIR [--scenes 60] [--run_dir BUNDLE]

New simulated sites of every world, seen by no training and no fitting, are mapped as `kelp predict`
maps them. Intervals come from the bundle's held-out sites, as in `kelp areas`; the truth is clean,
over the observed pixels. A row for each world, and one for all: share of sites whose interval holds
the truth, with its standard error, and expected area against true area, all sites together. What
was mapped in `--work_dir` is not mapped again.
"""

from __future__ import annotations

from pathlib import Path

import measuring
import numpy as np
from guard import write_scenes
from numpy.typing import NDArray

from kelp.config import PredictConfig
from kelp.evaluation.intervals import AreaErrors, area_errors, read_held_out
from kelp.inference.bundle import DEFAULT_NETWORK
from kelp.inference.predict import predict_scenes
from kelp.io.location import packaged
from kelp.raster.bands import PIXEL_SIZE_M
from kelp.raster.masks import read_mask
from kelp.sensors.record import read_record, record_path
from kelp.simulation.world import WORLDS

SEED = 78


def areas(folder: Path, truths: dict[str, NDArray[np.uint8]]) -> NDArray[np.float64]:
    """True and expected area of each site, square metres, `(sites, 2)`."""
    rows = []
    for name, truth in truths.items():
        path = folder / f"{name}_kelp.tif"
        observed = read_mask(path) != 255
        expected = read_record(record_path(path)).expected_area_m2
        assert expected is not None
        rows.append((float((truth[observed] == 1).sum()) * PIXEL_SIZE_M**2, expected))
    return np.array(rows)


def row_of(name: str, found: NDArray[np.float64], errors: AreaErrors) -> measuring.Row:
    """Coverage and bias over some sites."""
    truth, expected = found.T
    ends = np.array([errors.interval(one) for one in expected])
    held = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
    return {
        "sites": name,
        "number": len(found),
        "interval holds the truth": round(float(held), 3),
        "standard error": round(float(np.sqrt(held * (1 - held) / len(found))), 3),
        "expected / true area": round(float(expected.sum() / truth.sum()), 3),
        "median width / true area": round(
            float(np.median(((ends[:, 1] - ends[:, 0]) / np.maximum(truth, 1))[truth > 9e4])), 2
        ),
    }


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=60, help="sites of each world")
    parser.add_argument("--run_dir", type=Path, help="another bundle; default: the packaged one")
    options = parser.parse_args()
    bundle = options.run_dir or packaged(Path(DEFAULT_NETWORK))
    errors = area_errors(read_held_out(bundle).pairs)
    assert errors is not None, f"{bundle}: too few held-out sites"
    rows, every = [], []
    for world in WORLDS:
        folder = options.work_dir / world
        (folder / "scenes").mkdir(parents=True, exist_ok=True)
        truths = write_scenes(folder / "scenes", world, options.scenes, lambda p, _: p, SEED)
        predict_scenes(
            PredictConfig(
                data_dir=folder / "scenes",
                output_dir=folder / "maps",
                run_dir=(bundle,),
                save_probabilities=True,
                backend="onnx",
            )
        )
        every.append(areas(folder / "maps", truths))
        rows.append(row_of(world, every[-1], errors))
    rows.append(row_of("all", np.concatenate(every), errors))
    measuring.report("Intervals of area", rows, [f"bundle: {bundle}"], options.json)


if __name__ == "__main__":
    main()
