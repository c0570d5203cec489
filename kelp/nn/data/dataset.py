"""Images and tiles with their masks, as raw numbers: what the data loaders hand to training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, default_collate

from kelp import tables
from kelp.errors import InputError, KelpError
from kelp.nn.data.reading import Files, Reader
from kelp.raster import bands, validity
from kelp.raster.bands import MASK_NODATA
from kelp.raster.window import Shape, Tile


class Sample(NamedTuple):
    """One image or tile, or a batch of them (then every tensor has a first axis more)."""

    raw: Tensor
    """Canonical raw numbers, float32 `(7, h, w)`, NaN = missing."""
    target: Tensor
    """uint8 `(h, w)`: 0, 1, and 255 where the loss must not look: padding, missing data."""
    observed: Tensor
    """bool `(h, w)`: where scores look; False where the target is 255 or QA = 1."""


@dataclass(frozen=True)
class Parent:
    """The image that a tile's file was cut from, and what the table knows of it."""

    image: Path
    y: int
    x: int
    levels: tuple[float, ...] | None = None
    """DN of clear water around the tile (`kelp.raster.water`); NaN where there is none."""


@dataclass(frozen=True)
class Source:
    """Where a sample's pixels are: two whole files, or a window of them."""

    image: Path
    mask: Path
    tile: Tile | None = None
    """The window; it may stick out of the image at the right and lower edge."""
    parent: Parent | None = None
    """Of a file that was cut out of an image: that image."""


class Draw(NamedTuple):
    """A row that the sampler drew, and how far its window is moved."""

    row: int
    down: float = 0.0
    """In half tiles, -1 to 1; the moved window stays inside its image."""
    right: float = 0.0


def sources_of(
    rows: pd.DataFrame, root: Path, table_folder: Path, windows: bool = False
) -> list[Source]:
    """The files of each row, in the order of the rows.

    Args:
        rows: of a table of images or of tiles (`image_path`, `mask_path`); rows of a virtual
            dataset, whose `image_path` is null, name a window of their source images.
        root: folder that `image_path` and `mask_path` are relative to.
        table_folder: folder that `source_image_path` and `source_mask_path` are relative to.
        windows: name windows of the source images for all rows, so that they can be moved.
    """
    materialised = rows["image_path"].notna().to_numpy() & (not windows)
    return [
        Source(
            root / str(row["image_path"]),
            root / str(row["mask_path"]),
            parent=_parent(row, table_folder),
        )
        if is_file
        else Source(
            table_folder / str(row["source_image_path"]),
            table_folder / str(row["source_mask_path"]),
            Tile(int(row["y"]), int(row["x"]), int(row["tile_height"]), int(row["tile_width"])),
        )
        for is_file, row in zip(materialised, rows.to_dict("records"), strict=True)
    ]


def _parent(row: Mapping[Hashable, Any], table_folder: Path) -> Parent | None:
    if not isinstance(row.get("source_image_path"), str):
        return None
    levels = [row.get(name) for name in tables.WATER]
    known = None if None in levels else tuple(float(level) for level in levels)  # type: ignore[arg-type]
    return Parent(table_folder / row["source_image_path"], int(row["y"]), int(row["x"]), known)


class TileDataset(Dataset[Sample]):
    """Samples of a list of sources; holds no open file, so that workers may copy it freely.

    Args:
        sources: the files, see `sources_of`.
        band_order: names of the files' bands; empty: as `kelp.raster.scene.Scene` finds them.
        shape: whole images smaller than this are reflected up to it, as prediction does.
        reader: brings the pixels, in that order of bands; default: from the files.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        band_order: Sequence[str] = (),
        shape: Shape | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.sources = list(sources)
        self.shape = shape
        self.reader: Reader = reader or Files(tuple(band_order))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int | Draw) -> Sample:
        """Read a sample. Raises `InputError` when image and mask do not fit each other."""
        draw = index if isinstance(index, Draw) else Draw(index)
        source = self.sources[draw.row]
        raw, tile = _read_image(source, draw, self.reader)
        mask = self.reader.mask(source.mask, tile)
        if mask.shape != raw.shape[1:]:
            raise InputError(
                f"{source.mask}: has {mask.shape[0]} x {mask.shape[1]} pixels, its image "
                f"{source.image.name} {raw.shape[1]} x {raw.shape[2]}; they must be alike"
            )
        target = np.where(validity.observed(raw, qa_as_nodata=False), mask, np.uint8(MASK_NODATA))
        observed = validity.observed(raw, qa_as_nodata=True) & (target != MASK_NODATA)
        sample = Sample(torch.from_numpy(raw), torch.from_numpy(target), torch.from_numpy(observed))
        if source.tile:
            return pad(sample, source.tile.shape)
        return reflect(sample, self.shape) if self.shape else sample


def pad(sample: Sample, shape: Shape) -> Sample:
    """Grow a sample to `shape` at its right and lower edge; nothing is known there."""
    height, width = sample.target.shape
    extra = (0, shape[1] - width, 0, shape[0] - height)
    if not any(extra):
        return sample
    raw = functional.pad(sample.raw, extra, value=torch.nan)
    raw[bands.QA].nan_to_num_(nan=1.0)  # as in the padding of a tile's file: unknown is bad
    return _masked(sample, raw)


def reflect(sample: Sample, shape: Shape) -> Sample:
    """Grow a sample to at least `shape` by its mirror image, where neither loss nor scores look."""
    return _masked(sample, torch.from_numpy(bands.reflected(sample.raw.numpy(), *shape)))


def _masked(sample: Sample, raw: Tensor) -> Sample:
    """A sample grown to `raw` at its right and lower edge, without a target there."""
    height, width = sample.target.shape
    extra = (0, raw.shape[-1] - width, 0, raw.shape[-2] - height)
    return Sample(
        raw,
        functional.pad(sample.target, extra, value=MASK_NODATA),
        functional.pad(sample.observed, extra, value=False),
    )


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch; samples of different sizes are padded to the largest height and width.

    Only a validation image that is larger than every training image makes them differ.
    """
    sizes = zip(*(sample.target.shape for sample in samples), strict=True)
    shape = Shape(*map(max, sizes))
    # In a worker it stacks straight into the memory that the processes share.
    batch: Sample = default_collate([pad(sample, shape) for sample in samples])
    return batch


def as_raised(error: KelpError) -> KelpError:
    """The error of a loader's worker, which arrives as the text of its traceback, as it was."""
    last_line = str(error).strip().splitlines()[-1]
    return type(error)(last_line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: "))


def _read_image(
    source: Source, draw: Draw, reader: Reader
) -> tuple[NDArray[np.float32], Tile | None]:
    """The pixels of a sample inside its image, and the window that they are from."""
    with reader.image(source.image) as scene:
        tile = _moved(source.tile, draw, scene.shape).clipped(scene.shape) if source.tile else None
        if tile is not None and min(tile.height, tile.width) < 1:
            raise InputError(
                f"{source.image}: has {scene.shape[0]} x {scene.shape[1]} pixels, none in the "
                f"tile at x={tile.x}, y={tile.y}; slice the images again"
            )
        return scene.read(tile or Tile(0, 0, *scene.shape)), tile


def _moved(tile: Tile, draw: Draw, shape: Shape) -> Tile:
    """The window a little elsewhere; as the sampler drew it, if it did not ask for a move."""
    if not (draw.down or draw.right):
        return tile
    y = tile.y + round(draw.down * tile.height / 2)
    x = tile.x + round(draw.right * tile.width / 2)
    y = min(max(y, 0), max(0, shape[0] - tile.height))
    x = min(max(x, 0), max(0, shape[1] - tile.width))
    return Tile(y, x, tile.height, tile.width)
