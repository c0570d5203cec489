"""The water reference of each file that a training reads: of its image, as prediction finds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.config import TrainConfig
from kelp.errors import ConfigError
from kelp.io.executors import spread
from kelp.io.files import is_file
from kelp.nn.data.dataset import Source
from kelp.nn.data.reading import Reader
from kelp.progress import Progress
from kelp.raster.masks import raster_shape
from kelp.raster.water import Anchored, WaterReference
from kelp.raster.window import RasterSource, Tile

_FEW: Final = 256
"""Images below which starting processes takes longer than reading."""


@dataclass(frozen=True)
class AnchoredReader:
    """Reads images with their clear water where it is to be; masks as they are."""

    reader: Reader
    references: Mapping[Path, WaterReference]

    def image(self, path: Path) -> AbstractContextManager[RasterSource]:
        """Open an image."""
        return self._opened(path)

    def mask(self, path: Path, tile: Tile | None) -> NDArray[np.uint8]:
        """A mask, or a window of it."""
        return self.reader.mask(path, tile)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[RasterSource]:
        with self.reader.image(path) as pixels:
            yield Anchored(pixels, self.references[path])


def anchored(
    reader: Reader, sources: Sequence[Source], config: TrainConfig, progress: Progress
) -> Reader:
    """The reader of a run whose scenes are anchored as `--anchoring` says.

    A tile's file has the reference of the image that it was cut from, which is read for it; where
    that is gone, the levels that `kelp slice` wrote beside the tile.

    Raises:
        ConfigError: neither is at hand.
    """
    if config.anchoring == "none":
        return reader
    images: dict[Path, None] = {}
    for source in sources:
        if source.parent is None:
            images[source.image] = None
        elif is_file(source.parent.image):
            images[source.parent.image] = None
    found: dict[Path, WaterReference] = {}
    workers = max(1, config.num_workers) if len(images) >= _FEW else 1
    work = spread(partial(_estimate, reader, config), list(images), workers)
    for path, reference in zip(images, work, strict=True):
        found[path] = reference
        progress("water", len(found), len(images))
    references = dict(found)
    for source in sources:
        parent = source.parent
        if parent is None:
            continue
        if parent.image in found:
            references[source.image] = found[parent.image].cut(parent.y, parent.x)
        elif parent.levels is not None:
            shape = raster_shape(source.image)
            references[source.image] = WaterReference.constant(shape, parent.levels)
        else:
            raise ConfigError(
                f"--anchoring {config.anchoring}: {source.image.name} is too small to find clear "
                f"water in, {parent.image} that it was cut from is missing, and the table has no "
                "levels of it; slice again, or give --anchoring none"
            )
    return AnchoredReader(reader, references)


def _estimate(reader: Reader, config: TrainConfig, path: Path) -> WaterReference:
    with reader.image(path) as pixels:
        return WaterReference.estimate(pixels, config.anchoring)
