"""Pictures of a run: a few validation samples from epoch to epoch, curves, confusion matrices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from kelp.config import TrainConfig
from kelp.evaluation.confusion import Confusion
from kelp.inference.spec import NetworkSpec
from kelp.io.files import output_folder, write_bytes, write_json
from kelp.nn.data.dataset import Sample, TileDataset, collate
from kelp.nn.metrics import THRESHOLD, monitored, to_matrix
from kelp.nn.model import KelpNet
from kelp.plotting import charts, preview, sheets
from kelp.plotting.sheets import SheetTile
from kelp.tiling.merge import to_mask

if TYPE_CHECKING:
    from kelp.nn.data.datamodule import FoldData

SAMPLES: Final = "samples"
INPUTS: Final = f"{SAMPLES}/inputs.png"
MATRIX: Final = "confusion_matrix"
CURVES: Final = "curves.png"

SET_SIZE: Final = 6
_MOST, _SOME = 3, 2
"""Of a set: samples with the most kelp, and with some; the others have none."""
_COUNTED: Final = 64  # samples that are read where the table has no counts of kelp
_SHEETS: Final = 20
"""Epochs with a sheet, about: of longer runs not every epoch has one."""
_PANELS: Final = {
    "train/loss": "train/loss",
    "val/loss": "val/loss",
    "val/dice": "val/dice",
    "val/precision": "precision/precision, recall",
    "val/recall": "recall/precision, recall",
    "lr": "learning rate",
}
"""Metrics in `curves.png`: line and panel."""


class Album:
    """The same few validation samples, pictured from the first epoch to the last.

    They follow from the rows alone, so a resumed run pictures the same. Nothing here draws random
    numbers or leaves the network otherwise than it was.

    Args:
        config: of the run.
        data: brings its samples.
        artifacts: folder of the run's files.
    """

    def __init__(self, config: TrainConfig, data: FoldData, artifacts: Path) -> None:
        self.config = config
        self.artifacts = artifacts
        rows, sources = data.fold.val, data.fold.val_sources
        samples = data.samples(sources)
        self.numbers = choose(rows, samples, config.plot_n_batches)
        self.sources = [sources[i] for i in self.numbers]
        self.samples = [samples[i] for i in self.numbers]
        self.tiles = [
            _tile(rows.iloc[i].to_dict(), sample)
            for i, sample in zip(self.numbers, self.samples, strict=True)
        ]
        self.taken: dict[int, NDArray[np.float32]] = {}

    def draw_inputs(self, spec: NetworkSpec) -> list[str]:
        """What the network sees of the samples; the names of the files, below `artifacts`."""
        if not self.tiles:
            return []
        heading = f"Input of the network: {len(spec.channels)} channels"
        png = sheets.input_sheet(
            self.tiles[:SET_SIZE], spec.channels, spec.statistics, spec.index_settings, heading
        )
        return [self._write(INPUTS, png)]

    def draws(self, epoch: int, is_last: bool) -> bool:
        """Whether an epoch, counted from 1, has a sheet: the first, every so many, the last."""
        every = -(-self.config.epochs // _SHEETS)
        return bool(self.tiles) and (is_last or (epoch - 1) % every == 0)

    def forget(self) -> None:
        """Another validation begins."""
        self.taken.clear()

    def take(self, probabilities: Tensor, batch: int) -> None:
        """What validation predicted in a batch, counted from 0, of all rows in their order."""
        for position, number in enumerate(self.numbers[:SET_SIZE]):
            if number // self.config.batch_size == batch:
                height, width = self.samples[position].target.shape
                p = probabilities[number % self.config.batch_size, :height, :width]
                self.taken[position] = p.float().cpu().numpy()

    def draw_epoch(self, net: KelpNet, epoch: int, words: str) -> list[str]:
        """The predictions of the network at the end of an epoch, and their errors."""
        samples = self.samples[:SET_SIZE]
        if len(self.taken) == len(samples):
            p = [self.taken[position] for position in range(len(samples))]
        else:  # validation is limited, or shared with others
            p = self._predict(net, samples)
        heading = f"Epoch {epoch} of {self.config.epochs}"
        png = sheets.error_sheet(self.tiles[:SET_SIZE], p, THRESHOLD, heading, words)
        return [self._write(_sheet_name(epoch), png)]

    def draw_best(self, net: KelpNet, epoch: int, words: str) -> list[str]:
        """The best epoch's sheet, where it has none yet, and each sample on a page of its own."""
        if not self.tiles:
            return []
        names = []
        self.forget()
        if not (self.artifacts / _sheet_name(epoch)).is_file():
            names += self.draw_epoch(net, epoch, words)
        probabilities = self._predict(net, self.samples)
        for source, tile, p in zip(self.sources, self.tiles, probabilities, strict=True):
            title = source.image.stem
            if source.tile is not None:
                title = f"{title}_{source.tile.x}_{source.tile.y}"
            seen = np.where(tile.observed, p, np.nan).astype(np.float32)
            png = preview.panels(tile.pixels, tile.truth, to_mask(seen, THRESHOLD), title)
            names.append(self._write(f"{SAMPLES}/best/{title}.png", png))
        return names

    def _predict(self, net: KelpNet, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Probabilities of each sample; in batches where all have one size, as in validation."""
        alike = len({sample.target.shape for sample in samples}) == 1
        size = min(self.config.batch_size, SET_SIZE) if alike else 1
        device = next(net.parameters()).device
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        try:
            with torch.inference_mode(), _as_written(self.config.compile):
                found = [
                    net.probabilities(collate(samples[k : k + size]).raw.to(device)).cpu().numpy()
                    for k in range(0, len(samples), size)
                ]
        finally:
            for module, training in modes:
                module.training = training
        return [p for batch in found for p in batch]

    def _write(self, name: str, png: bytes) -> str:
        output_folder((self.artifacts / name).parent)
        write_bytes(self.artifacts / name, png)
        return name


def _as_written(compiled: bool) -> AbstractContextManager[object]:
    """A network run as it is: compiling it for another size of batch would take minutes."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _sheet_name(epoch: int) -> str:
    return f"{SAMPLES}/epoch-{epoch:03d}.png"


def _tile(row: Mapping[Hashable, Any], sample: Sample) -> SheetTile:
    return SheetTile(
        str(row["tile_id"]),
        f"x {row['x']}, y {row['y']}" if "x" in row else "",
        sample.raw.numpy(),
        sample.target.numpy(),
        sample.observed.numpy(),
    )


def draw_curves(folder: Path, history: Sequence[Mapping[str, float]], best: int) -> None:
    """Picture loss, scores and learning rate by epoch, the best one marked, as `curves.png`."""
    curves = {
        line: [(k, epoch[name]) for k, epoch in enumerate(history, 1)]
        for name, line in _PANELS.items()
    }
    write_bytes(folder / CURVES, charts.curves(curves, best))


def write_confusions(folder: Path, epochs: Sequence[Confusion], best: int) -> None:
    """Write the pixel counts of each epoch, and those and the scores of the best one before them.

    Args:
        folder: where `confusion_matrix.json` is written.
        epochs: counts of each finished epoch.
        best: number of the best, from 1.
    """
    by_epoch = [{"epoch": k, **to_matrix(counts)} for k, counts in enumerate(epochs, 1)]
    write_confusion(folder, epochs[best - 1], {"epoch": best, "epochs": by_epoch})


def write_confusion(
    folder: Path, confusion: Confusion, more: Mapping[str, object] | None = None
) -> None:
    """Write a confusion matrix and its scores as numbers."""
    content = to_matrix(confusion) | monitored(confusion) | dict(more or {})
    write_json(folder / f"{MATRIX}.json", content)


def draw_confusion(folder: Path, confusion: Confusion) -> None:
    """Picture a confusion matrix."""
    png = charts.confusion(tp=confusion.tp, fp=confusion.fp, fn=confusion.fn, tn=confusion.tn)
    write_bytes(folder / f"{MATRIX}.png", png)


def choose(rows: pd.DataFrame, data: TileDataset, sets: int) -> list[int]:
    """Numbers of the rows to picture, in sets of six; the same for the same rows.

    A set holds three of the rows with the most kelp, two with some and one without, of different
    images where there are enough. A second set is chosen from what the first one leaves.

    Args:
        rows: of a table of images or tiles.
        data: the same rows as samples, read where the table does not say how much kelp they hold.
        sets: at most.
    """
    kelp = _kelp(rows, data)
    # Without kelp the most telling are seen well, and lie on the shore.
    unseen, off_shore = (
        (1 - _fact(rows, "valid_pixels_pct")).round(1),
        _fact(rows, "water_pixels_pct"),
    )
    order = np.lexsort((abs(off_shore - 0.5), unseen, -kelp))
    left = [int(i) for i in order if np.isfinite(kelp[i])]
    images = rows["tile_id"].astype(str).to_list()
    chosen: list[int] = []
    for _ in range(sets):
        chosen += _set(left, kelp, images)
        left = [i for i in left if i not in chosen[-SET_SIZE:]]
    return chosen


def _set(left: Sequence[int], kelp: NDArray[np.float64], images: Sequence[str]) -> list[int]:
    """Six rows, as far as there are so many, of those that are left: the most kelp first."""
    with_kelp = [i for i in left if kelp[i] > 0]
    # From the middle outwards: neither a forest again, nor a few pixels.
    places = sorted(range(len(with_kelp)), key=lambda place: abs(place - len(with_kelp) // 2))
    chosen: list[int] = []
    for rows, wanted in (
        (with_kelp, _MOST),
        ([with_kelp[place] for place in places], _MOST + _SOME),
        (left[len(with_kelp) :], SET_SIZE),
        (left, SET_SIZE),
    ):
        _add(chosen, rows, wanted, images)
    return sorted(chosen, key=lambda i: (-kelp[i], i))


def _add(chosen: list[int], rows: Sequence[int], wanted: int, images: Sequence[str]) -> None:
    """Fill up to `wanted` with rows of images that are not there yet, then with any."""
    for only_new in (True, False):
        for i in rows:
            if len(chosen) >= wanted:
                return
            if i not in chosen and not (only_new and images[i] in {images[k] for k in chosen}):
                chosen.append(i)


def _kelp(rows: pd.DataFrame, data: TileDataset) -> NDArray[np.float64]:
    """Kelp pixels of each row; NaN where nobody knows."""
    if "kelp_pixels" in rows.columns and rows["kelp_pixels"].notna().all():
        return _fact(rows, "kelp_pixels")
    counts = np.full(len(rows), np.nan)
    for i in np.unique(np.linspace(0, len(rows) - 1, _COUNTED).astype(int)):
        counts[i] = int((data[int(i)].target == 1).sum())
    return counts


def _fact(rows: pd.DataFrame, name: str) -> NDArray[np.float64]:
    values = rows[name] if name in rows.columns else pd.Series(0.0, rows.index)
    return np.asarray(values.fillna(0.0), dtype=np.float64)
