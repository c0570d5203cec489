"""How fast samples come from the store of packed numbers, and how long a training step waits.

    python benchmarks/loading.py [--places 16] [--repeats 5]

Images of `kelp simulate`. The first table: samples per second of a data loader (batches of 8) that
opens the files for each sample, as `--pack False` does, and of one that reads the store; whole
images, and tiles of 128 px at random offsets. The second: `kelp.train` at its defaults for tiles
(128 px shown at 224, batch 8) with a small encoder on the CPU; of the last epoch, the share of time
that the loop stands in `next(batch)`, the first batch included.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import measuring
import numpy as np
import torch
from measuring import Row
from torch.utils.data import DataLoader

import kelp
from kelp.config import MetadataConfig, SimulateConfig, SliceConfig, TrainConfig
from kelp.nn.data import datamodule
from kelp.nn.data.dataset import Sample, Source, TileDataset, collate
from kelp.nn.data.packing import FOLDER, pack
from kelp.nn.data.reading import Files
from kelp.progress import silent
from kelp.raster.window import Tile

SIDE, TILE, BATCH = 350, 128, 8
TARGET_RATE, TARGET_SHARE = 5, 0.05


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--places", type=int, default=16, help="simulated, two images each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trainings", type=int, default=3, help="of each way; 0: no second table")
    parser.add_argument("--batches", type=int, default=24, help="of a training epoch")
    parser.add_argument(
        "--encoder", default="tu-mobilenetv3_small_050", help="the smallest of timm"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("kelp").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        table = world(root, options.places)
        rows, verdicts = rates(root, options.repeats)
        measuring.report(__doc__.splitlines()[0], rows, verdicts, options.json)
        if options.trainings:
            config = recipe(root, table, options.encoder, options.batches)
            rows, verdicts = shares(config, options.trainings)
            file = options.json and options.json.with_suffix(".training.json")
            measuring.report("Of a training step on the CPU", rows, verdicts, file)


def world(root: Path, places: int) -> Path:
    """Simulated images and the table of their tiles, which are windows of them."""
    kelp.simulate(
        SimulateConfig(output_dir=root / "raw", places=places, dates=2, test=1, size=SIDE)
    )
    table = kelp.build_metadata(
        MetadataConfig(data_dir=root / "raw", output_dir=root / "processed", splits=4)
    ).table
    return kelp.slice_dataset(
        SliceConfig(
            data_dir=root / "raw" / "train",
            metadata_fp=table,
            output_dir=root / "tiles",
            image_size=TILE,
            materialize=False,
        )
    ).table


# --- samples per second


def rates(root: Path, repeats: int) -> tuple[list[Row], list[str]]:
    """Samples per second of both readers; ratios are medians of paired runs."""
    images = sorted((root / "raw" / "train" / "images").iterdir())
    masks = [path.parents[1] / "masks" / path.name.replace("satellite", "kelp") for path in images]
    whole = [Source(*paths) for paths in zip(images, masks, strict=True)]
    config = TrainConfig(data_dir=root, metadata_fp=root, output_dir=root / "rates", num_workers=2)
    took = measuring.seconds(lambda: pack(whole, config, silent))
    size = sum(path.stat().st_size for path in (root / "rates" / FOLDER).iterdir())
    readers = {"files": Files(), "packed": pack(whole, config, silent)}
    corners = np.random.default_rng(0).integers(0, SIDE - TILE + 1, (2 * len(whole), 2)).tolist()
    tiles = [
        Source(image, mask, Tile(y, x, TILE, TILE))
        for (image, mask), (y, x) in zip(
            zip(images * 2, masks * 2, strict=True), corners, strict=True
        )
    ]
    rows, verdicts = (
        [],
        [
            f"packing with 2 workers: {len(images) / took:.0f} images/s, "
            f"{size / len(images) / SIDE**2:.1f} bytes a pixel"
        ],
    )
    for name, sources in (("whole images, 350 px", whole), ("tiles, 128 px", tiles)):
        for workers in (0, 2):
            ways: dict[str, Callable[[], object]] = {
                way: partial(_once, _loader(TileDataset(sources, reader=reader), workers))
                for way, reader in readers.items()
            }
            runs = measuring.interleaved(ways, repeats)
            times = measuring.ratio(runs["files"], runs["packed"])
            row: Row = {"samples": name, "workers": workers}
            for way, spent in runs.items():
                row[f"{way}, samples/s"] = len(sources) / statistics.median(spent)
            rows.append(row | {"times": times})
            verdicts.append(
                f"{name}, {workers} workers: {times:.1f} times the files (target {TARGET_RATE}): "
                + ("met" if times >= TARGET_RATE else "NOT met")
            )
    return rows, verdicts


def _loader(data: TileDataset, workers: int) -> DataLoader[Sample]:
    return DataLoader(
        data, BATCH, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


def _once(loader: DataLoader[Sample]) -> None:
    for _ in loader:
        pass


# --- a training step


class TimedLoader(DataLoader[Sample]):
    """The loader of `kelp.train`, which notes when a batch was asked for and when it came."""

    epochs: ClassVar[list[list[tuple[float, float]]]] = []

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self.sampler, datamodule.EpochSampler):  # validation
            yield from super().__iter__()
            return
        times: list[tuple[float, float]] = []
        self.epochs.append(times)
        asked = time.perf_counter()
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            times.append((asked, time.perf_counter()))
            yield batch
            asked = time.perf_counter()


def recipe(root: Path, table: Path, encoder: str, batches: int) -> TrainConfig:
    """The defaults for tiles, in a short run."""
    return TrainConfig(
        data_dir=table.parent,
        metadata_fp=table,
        output_dir=root / "runs",
        sahi=True,
        batch_size=BATCH,
        encoder=encoder,
        pretrained=False,
        device="cpu",
        epochs=2,
        limit_train_batches=batches,
        limit_val_batches=1,
        plot_n_batches=0,
    )


def shares(config: TrainConfig, repeats: int) -> tuple[list[Row], list[str]]:
    """How long a step takes and how much of it the loop waits; all ways in turn."""
    datamodule.DataLoader = TimedLoader  # type: ignore[misc]
    ways = {(w, packed): [] for w in (0, 1) for packed in (False, True)}  # type: ignore[var-annotated]
    for repeat in range(repeats):
        order = list(ways)[repeat % 4 :] + list(ways)[: repeat % 4]
        for workers, packed in order:
            TimedLoader.epochs.clear()
            kelp.train(config.model_copy(update={"num_workers": workers, "pack": packed}))
            ways[workers, packed].append(_waited(TimedLoader.epochs[-1]))
    rows, verdicts = [], []
    for (workers, packed), runs in ways.items():
        step, share = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append(
            {
                "workers": workers,
                "pack": packed,
                "step, ms": step * 1e3,
                "waiting": f"{share:.2%}",
                "in the runs": " ".join(f"{share:.2%}" for _, share in runs),
            }
        )
        if packed:
            verdicts.append(
                f"{workers} workers, packed: {share:.2%} of a step waits "
                f"(target below {TARGET_SHARE:.0%}): {'met' if share < TARGET_SHARE else 'NOT met'}"
            )
    return rows, verdicts


def _waited(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of a step, and the share of them in which the loop waited for its batch."""
    whole = times[-1][0] - times[0][0]
    waited = sum(came - asked for asked, came in times[:-1])
    return whole / (len(times) - 1), waited / whole


if __name__ == "__main__":
    main()
