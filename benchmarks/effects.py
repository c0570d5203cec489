"""What each choice of training is worth: one thing changed at a time, at equal network pixels.

    python benchmarks/effects.py [--pixels 1e8] [--seeds 0 1] [--variants ...] [--work_dir DIR]

Networks learn from noisy labels of the calibrated simulated coast, on tiles as `kelp train --sahi
True` cuts them, with the settings of `should_i_slice.py`, and are taken as they are at the end.
They are judged on its test places against clean truth, as `kelp predict` makes maps. Thresholds
are fitted on other places; a figure is the mean over seeds; intervals hold the middle 95 % of
bootstrap draws of places, the same for all, so they tell nothing of the seeds: those stand beside.

What is finished in `--work_dir` is not done again; 1e8 pixels take about eight minutes of training
a network on one core. `--quick` runs the same program small; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import should_i_slice
from measuring import Row
from numpy.typing import NDArray

import kelp
from kelp import config
from kelp.evaluation.bootstrap import SiteBootstrap, interval
from kelp.evaluation.confusion import PATCH_SIZES, Figures
from kelp.evaluation.thresholds import parts_of
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import read_mask
from kelp.raster.scene import read_scene
from kelp.tables import TILES_TABLE

BEST_17 = (
    "DEMWM",
    "NDVI",
    "ATSAVI",
    "AVI",
    "CI",
    "ClGreen",
    "GBNDVI",
    "GVMI",
    "IPVI",
    "KIVU",
    "MCARI",
    "MVI",
    "NormNIR",
    "PNDVI",
    "SABI",
    "WDRVI",
    "mCRIG",
)
"""Those of the original system's best models."""
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "nosampler": {"use_weighted_sampler": False},
    "random": {"pretrained": False},
    "noaugment": {"augment": False},
    "indices": {"spectral_indices": BEST_17, "index_input": "reflectance"},
    "dice": {"loss": "dice"},
    "indicesnomask": {
        "spectral_indices": BEST_17,
        "index_input": "reflectance",
        "mask_using_qa": False,
        "mask_using_water_mask": False,
    },
    "fold1": {"cv_split": 1},
    "ce": {"loss": "ce"},
    "indicesdn": {"spectral_indices": BEST_17, "index_input": "dn"},
}
ENSEMBLES = {"base + fold1": ("base", "fold1"), "base, both seeds": ("base", "base")}
_CODES = 250
"""Probabilities are kept as whole numbers of 1/250; 255 = not observed."""

Codes = NDArray[np.uint8]


def train(root: Path, out: Path, name: str, seed: int, options: argparse.Namespace) -> Path:
    """The run of a variant; the link under which it is kept."""
    link = out / f"{name}-{seed}"
    if not link.is_symlink():
        base = config.TrainConfig(
            data_dir=root / "sahi",
            metadata_fp=root / "sahi" / TILES_TABLE,
            output_dir=out / "runs",
            sahi=True,
            seed=seed,
            epochs=options.epochs,
            early_stopping_patience=options.epochs,
            **{**should_i_slice.SHARED, **VARIANTS[name]},
        )
        batches = max(1, round(options.pixels / base.image_size**2 / base.epochs / base.batch_size))
        draws: dict[str, int] = {"samples_per_epoch": batches * base.batch_size}
        if not base.use_weighted_sampler:
            draws["limit_train_batches"] = batches
        run = kelp.train(base.model_copy(update=draws))
        out.mkdir(parents=True, exist_ok=True)
        link.symlink_to(run.run_dir.resolve())
    return link


def maps(run: Path, images: Path) -> Codes:
    """Probabilities of all test images, `(images, height, width)`; predicted once."""
    kept = run.resolve() / "effects.npy"
    if not kept.is_file():
        bundle = kelp.load_bundle(run, "latest")
        found = [
            kelp.predict_array(bundle, read_scene(path)) for path in sorted(images.glob("*.tif"))
        ]
        codes = [np.rint(np.nan_to_num(p, nan=MASK_NODATA / _CODES) * _CODES) for p in found]
        np.save(kept, np.stack(codes).astype(np.uint8))
    codes_of_all: Codes = np.load(kept)
    return codes_of_all


class Judge:
    """Scores of maps against truth, with thresholds of other places."""

    def __init__(self, truth: NDArray[np.uint8]) -> None:
        self.truth = truth
        self.part = parts_of(len(truth), 0)  # a test image is a place of its own
        self.draws = SiteBootstrap(len(truth), 2000, 0)

    def outcomes(self, codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """TP, FP, FN of each image `(images, 3)`, and patches and those found by size."""
        tables = np.stack([self._table(*pair) for pair in zip(codes, self.truth, strict=True)])
        best = np.zeros(self.part.max() + 1, dtype=np.intp)
        for part in range(len(best)):
            tp, fp, fn = tables[self.part != part].sum(axis=0)
            best[part] = np.argmax(2 * tp / np.maximum(2 * tp + fp + fn, 1))
        chosen = best[self.part]
        patches = [self._patches(*each) for each in zip(codes, self.truth, chosen, strict=True)]
        return tables[np.arange(len(tables)), :, chosen], np.stack(patches)

    @staticmethod
    def _table(codes: Codes, truth: NDArray[np.uint8]) -> NDArray[np.int64]:
        """TP, FP, FN at each threshold, `(3, thresholds)`; not observed counts as no kelp."""
        value = np.where(codes == MASK_NODATA, 0, codes)
        counts = [np.bincount(value[truth == k], minlength=_CODES + 1) for k in (0, 1)]
        above = [each[::-1].cumsum()[::-1][1:] for each in counts]
        return np.stack([above[1], above[0], counts[1].sum() - above[1]])

    @staticmethod
    def _patches(codes: Codes, truth: NDArray[np.uint8], chosen: int) -> NDArray[np.int64]:
        mask = ((codes > chosen) & (codes != MASK_NODATA)).astype(np.uint8)
        found = Figures.of(truth, mask).patches
        return np.array([[one.patches, one.found] for one in found])


def pooled(outcomes: NDArray[Any]) -> NDArray[np.float64]:
    tp, fp, fn = (outcomes[..., k] for k in range(3))
    scores: NDArray[np.float64] = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    return scores


def row(name: str, seeds: list[int], found: dict[str, Any], judge: Judge) -> Row:
    """A line of the table: figures of a way, and its difference to the base, seed by seed."""
    ours, base = found[name], found["base"]
    dices = [float(pooled(ours[seed][0].sum(axis=0))) for seed in seeds]
    pairs = [(ours[seed][0], base[seed][0]) for seed in seeds]
    single = [float(pooled(a.sum(axis=0)) - pooled(b.sum(axis=0))) for a, b in pairs]
    drawn = np.mean(
        [pooled(judge.draws.sums(a)) - pooled(judge.draws.sums(b)) for a, b in pairs], axis=0
    )
    bounds = interval(drawn)
    patches = sum(ours[seed][1].sum(axis=0) for seed in seeds)
    line: Row = {"": name, "Dice": round(float(np.mean(dices)), 3)}
    if name != "base":
        between = f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else ""
        line["less the base"] = f"{np.mean(single):+.3f}{between}"
        line["seed by seed"] = ", ".join(f"{one:+.3f}" for one in single)
    for k, size in enumerate(PATCH_SIZES):
        line[f"found {size} px"] = round(patches[k, 1] / max(patches[k, 0], 1), 2)
    return line


def main() -> None:
    parser = measuring.parser(__doc__, threads=False)
    parser.add_argument("--pixels", type=float, default=1e8, help="network pixels of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the training")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--places", type=int, default=60, help="to learn from, three images each")
    parser.add_argument("--test", type=int, default=100, help="test places")
    parser.add_argument("--size", type=int, default=350, help="side of an image, px")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--work_dir", type=Path, help="keep what is made, go on with it")
    parser.add_argument("--quick", action="store_true", help="small, to try the program")
    options = parser.parse_args()
    if options.quick:
        options.places, options.test, options.size, options.epochs = 6, 8, 160, 1
        options.pixels, options.seeds, options.variants = 2e6, [0], ["base", "random"]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = options.work_dir or Path(tempfile.mkdtemp(prefix="kelp-"))
    root, out = work / "calibrated", work / "effects" / f"{options.pixels:.3g}"
    should_i_slice.prepare(root, "calibrated", options)
    images = root / "raw" / "test" / "images"
    masks = sorted((root / "raw" / "test_truth").glob("*_kelp.tif"))
    judge = Judge(np.stack([read_mask(path) for path in masks]))
    names = ["base", *(name for name in options.variants if name != "base")]
    codes = {
        name: {seed: maps(train(root, out, name, seed, options), images) for seed in options.seeds}
        for name in names
    }
    for name, (first, second) in ENSEMBLES.items():
        if {first, second} <= set(codes) and len(options.seeds) > 1:
            shift = 1 if first == second else 0
            codes[name] = {
                seed: averaged(codes[first][seed], codes[second][options.seeds[k - shift]])
                for k, seed in enumerate(options.seeds)
            }
    found = {
        name: {seed: judge.outcomes(one) for seed, one in by_seed.items()}
        for name, by_seed in codes.items()
    }
    rows = [row(name, options.seeds, found, judge) for name in codes]
    title = f"Effects at {options.pixels:.3g} network pixels, seeds {options.seeds}"
    measuring.report(title, rows, [f"data and runs: {work}"], options.json)


def averaged(first: Codes, second: Codes) -> Codes:
    """The mean of two networks' probabilities; what one did not observe, neither did the other."""
    mean = np.rint((first.astype(np.float32) + second) / 2)
    return np.where(first == MASK_NODATA, MASK_NODATA, mean).astype(np.uint8)


if __name__ == "__main__":
    main()
