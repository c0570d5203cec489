"""Pictures of a finished run: samples with their predictions, and the confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from kelp import preview, report
from kelp.config import TrainConfig
from kelp.files import atomic, output_folder, write_json
from kelp.merge import to_mask
from kelp.nn.dataset import Sample, Source, TileDataset, collate
from kelp.nn.metrics import THRESHOLD, Confusion
from kelp.nn.model import KelpNet

SAMPLES: Final = "samples"
MATRIX: Final = "confusion_matrix"

_SAMPLES_OF_A_BATCH: Final = 8


def draw_samples(
    folder: Path, sources: list[Source], net: KelpNet, config: TrainConfig
) -> list[Path]:
    """Picture validation samples: colours, NDVI, truth, prediction, into `<folder>/samples/`.

    Of each of the first `--plot_n_batches` batches, the eight samples with the most kelp.
    """
    data = TileDataset(sources, config.band_order, None if config.sahi else net.spec.tile_size)
    pictures = []
    for first in range(0, config.plot_n_batches * config.batch_size, config.batch_size):
        batch = [(i, data[i]) for i in range(first, min(first + config.batch_size, len(data)))]
        batch.sort(key=lambda numbered: -int((numbered[1].target == 1).sum()))
        pictures += [
            _draw_sample(folder, sources[i], sample, net)
            for i, sample in batch[:_SAMPLES_OF_A_BATCH]
        ]
    return pictures


def _draw_sample(folder: Path, source: Source, sample: Sample, net: KelpNet) -> Path:
    device = next(net.parameters()).device
    with torch.inference_mode():
        probabilities = net.probabilities(collate([sample]).raw.to(device))[0].cpu()
    seen = torch.where(sample.observed, probabilities, torch.nan)
    prediction = to_mask(seen.numpy(), THRESHOLD)
    title = source.image.stem
    if source.tile is not None:
        title = f"{title}_{source.tile.x}_{source.tile.y}"
    png = preview.panels(sample.raw.numpy(), sample.target.numpy(), prediction, title)
    return _write(output_folder(folder / SAMPLES) / f"{title}.png", png)


def draw_confusion(folder: Path, confusion: Confusion) -> None:
    """Write the confusion matrix as picture and as numbers."""
    counts = {
        "true_negative": confusion.true_negative,
        "false_positive": confusion.false_positive,
        "false_negative": confusion.false_negative,
        "true_positive": confusion.true_positive,
    }
    write_json(folder / f"{MATRIX}.json", counts | confusion.scores())
    png = report.confusion(
        tp=confusion.true_positive,
        fp=confusion.false_positive,
        fn=confusion.false_negative,
        tn=confusion.true_negative,
    )
    _write(folder / f"{MATRIX}.png", png)


def _write(path: Path, content: bytes) -> Path:
    with atomic(path) as partial:
        partial.write_bytes(content)
    return path
