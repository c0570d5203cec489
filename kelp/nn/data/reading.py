"""Where samples get their pixels from: the files themselves, or the packed numbers of a store."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kelp.errors import InputError
from kelp.raster.masks import read_mask
from kelp.raster.scene import Scene
from kelp.raster.window import RasterSource, Shape, Tile

_SMALL: Final = (np.uint8, np.uint16)
_HELD: Final = 1024
"""Files of a store that a process keeps mapped; a mapping holds no file handle."""


class Reader(Protocol):
    """Brings the pixels of images and masks; workers get a copy of it."""

    def image(self, path: Path) -> AbstractContextManager[RasterSource]:
        """Open an image. Raises `InputError` when it cannot be read."""

    def mask(self, path: Path, tile: Tile | None) -> NDArray[np.uint8]:
        """A mask, or a window of it, as `kelp.raster.masks.read_mask` gives it."""


@dataclass(frozen=True)
class Files:
    """Reads the files themselves."""

    band_order: tuple[str, ...] = ()
    kelp_value: int = 1

    def image(self, path: Path) -> Scene:
        """Open an image."""
        return Scene(path, self.band_order, quiet=True)

    def mask(self, path: Path, tile: Tile | None) -> NDArray[np.uint8]:
        """A mask, or a window of it."""
        return read_mask(path, tile, self.kelp_value)


@dataclass(frozen=True)
class Place:
    """Where the numbers of an image or a mask lie in a store, and how they are packed."""

    file: Path
    name: str
    low: tuple[float, ...] | None = None
    """See `encode`; `None` where the numbers are stored as they are."""

    @property
    def shape(self) -> Shape:
        """Height and width."""
        return Shape(*self._stored().get_shape()[-2:])

    def read(self, tile: Tile | None = None) -> NDArray[Any]:
        """A window that lies inside (default: all): of an image as a canonical array."""
        stored = self._stored()
        values: NDArray[Any] = stored[:] if tile is None else stored[..., *tile.slices]
        if self.low is None:
            return values
        return decode(values, np.array(self.low, np.float32)[:, np.newaxis, np.newaxis])

    def _stored(self) -> Any:
        try:
            return _opened(self.file).get_slice(self.name)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.file}: removed or damaged during the training; remove its folder and "
                "resume with --resume_from"
            ) from error


@dataclass(frozen=True)
class Packed:
    """Reads a store; what is not in it, from the files."""

    images: Mapping[Path, Place]
    masks: Mapping[Path, Place]
    files: Files

    def image(self, path: Path) -> AbstractContextManager[RasterSource]:
        """An image."""
        place = self.images.get(path)
        return self.files.image(path) if place is None else nullcontext(place)

    def mask(self, path: Path, tile: Tile | None) -> NDArray[np.uint8]:
        """A mask, or a window of it."""
        place = self.masks.get(path)
        # The file's reader knows what to do with a window that is not all inside.
        if place is None or (tile is not None and tile.clipped(place.shape) != tile):
            return self.files.mask(path, tile)
        return place.read(tile)


@lru_cache(_HELD)
def _opened(file: Path) -> Any:
    """A file of a store, mapped into memory when this process first reads from it."""
    return safe_open(file, framework="np")


def encode(raw: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Pack a canonical array, so that `decode` gives exactly its bits back.

    Returns:
        The distance of each number from `low` in the smallest unsigned integers that hold it,
        0 = missing, and `low`, a number for each band, shape `(7, 1, 1)`. Where no such integers
        do (fractions, infinity, a range above 65,534): the array itself, and `None`.
    """
    missing = np.isnan(raw)
    low = np.where(missing, np.float32(np.inf), raw).min(axis=(1, 2), keepdims=True) - 1
    low[~np.isfinite(low)] = 0
    codes = np.where(missing, np.float32(0), raw - low)
    smallest, largest = codes.min(), codes.max()
    for kind in _SMALL:
        if smallest >= 0 and largest <= np.iinfo(kind).max:
            small = codes.astype(kind)
            # By their bits: NaN is not equal to itself, and 0 is to -0.
            if np.array_equal(decode(small, low).view(np.uint32), raw.view(np.uint32)):
                return small, low
    return raw, None


def decode(codes: NDArray[Any], low: NDArray[np.float32]) -> NDArray[np.float32]:
    """The canonical array, or the window of one, that `encode` packed."""
    raw: NDArray[np.float32] = np.add(codes, low, dtype=np.float32)
    np.copyto(raw, np.float32(np.nan), where=codes == 0)
    return raw
