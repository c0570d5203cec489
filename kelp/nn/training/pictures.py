"""Pictures of a finished run: samples with their predictions, and the confusion matrix."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kelp import preview
from kelp.bands import MASK_NODATA
from kelp.config import TrainConfig
from kelp.files import atomic, output_folder, write_json
from kelp.nn.dataset import Sample, Source, TileDataset, collate
from kelp.nn.metrics import THRESHOLD, Confusion
from kelp.nn.model import KelpNet

SAMPLES: Final = "samples"
MATRIX: Final = "confusion_matrix"

_SAMPLES_OF_A_BATCH: Final = 8
_INK, _PALE = "#1c2733", "#f4f6f8"


def draw_samples(
    folder: Path, sources: list[Source], net: KelpNet, config: TrainConfig
) -> list[Path]:
    """Picture validation samples: colours, NDVI, truth, prediction, into `<folder>/samples/`.

    Of each of the first `--plot_n_batches` batches, the eight samples with the most kelp.
    """
    data = TileDataset(sources, config.band_order)
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
    kelp = (probabilities >= THRESHOLD).to(torch.uint8)
    prediction = torch.where(sample.observed, kelp, MASK_NODATA).numpy()
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
    matrix = np.array(list(counts.values()), np.int64).reshape(2, 2)
    _write(folder / f"{MATRIX}.png", _matrix_picture(matrix, confusion.dice))


def _matrix_picture(matrix: NDArray[np.int64], dice: float) -> bytes:
    """Rows are the truth, shaded by share of the row; columns the prediction."""
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.6, 4.2), dpi=125, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(2, 2):
        axes.text(
            column,
            row,
            f"{matrix[row, column]:,} px\n{shares[row, column]:.1%}",
            ha="center",
            va="center",
            color=_PALE if shares[row, column] > 0.5 else _INK,
        )
    axes.set_xticks([0, 1], ["no kelp", "kelp"])
    axes.set_yticks([0, 1], ["no kelp", "kelp"])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"Validation fold, kelp Dice {dice:.3f}", loc="left", color=_INK)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _write(path: Path, content: bytes) -> Path:
    with atomic(path) as partial:
        partial.write_bytes(content)
    return path
