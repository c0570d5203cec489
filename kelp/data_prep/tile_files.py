"""Files of tiles: their format, and how thousands of them are written fast and whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio.dtypes import in_dtype_range
from rasterio.io import MemoryFile

from kelp.errors import InputError
from kelp.io.files import write_bytes
from kelp.raster.bands import MASK_NODATA, NODATA, OPTICAL
from kelp.raster.masks import Georeference, suppress_georef_warnings
from kelp.raster.scene import Scene
from kelp.raster.window import Shape, Tile

# DEFLATE is in every GDAL build. Tiles are written once and read in every epoch: band by band in
# one strip they are smallest and read as fast as any, a predictor gains nothing, and level 3 is
# within 6 % of the smallest size at half of its time (`benchmarks/slicing.py --formats`).
COMPRESSION: Final[dict[str, Any]] = {
    "driver": "GTiff",
    "compress": "deflate",
    "zlevel": 3,
    "interleave": "band",
}
_STRIP: Final = 512  # rows


@dataclass(frozen=True)
class TileFormat:
    """How the tiles of one image are stored.

    Attributes:
        dtype: type of the stored values.
        nodata: value of padding, and nodata tag.
        descriptions: names of the bands, where they have one.
        zero_is_missing: positions of bands whose 0 becomes `nodata`.
    """

    dtype: str
    nodata: float
    descriptions: tuple[str | None, ...]
    zero_is_missing: tuple[int, ...] = ()


MASK_FORMAT: Final = TileFormat("uint8", MASK_NODATA, (None,))


def image_format(scene: Scene, named: bool) -> TileFormat:
    """The format of tiles of a scene: its own type where that holds its nodata value.

    Without a usable nodata tag that value is -32768, and 8 and 16 bit unsigned values are widened
    to int32. A tag of 0 is not usable: padding of 0 would be good pixels at sea level in QA and
    DEM. Where 0 means missing (so tagged, or unsigned without a tag; see `kelp.raster.scene`) the
    tiles say -32768, and so must their optical pixels. With `named` (`--band_order` was given) the
    bands are described.
    """
    descriptions = tuple(name or None for name in scene.names) if named else scene.descriptions
    dtype, tag = scene.dtype, scene.nodata
    if tag not in (None, 0) and in_dtype_range(tag, dtype):
        return TileFormat(dtype, tag, descriptions)
    zero_is_missing = tag == 0 or (tag is None and dtype.startswith("uint"))
    zeros = tuple(i for i, name in enumerate(scene.names) if zero_is_missing and name in OPTICAL)
    if in_dtype_range(NODATA, dtype):
        return TileFormat(dtype, NODATA, descriptions, zeros)
    if np.dtype(dtype).itemsize > 2:
        raise InputError(
            f"{scene.path}: {dtype} cannot hold the nodata value {NODATA}; "
            "give the file a nodata tag other than 0, or convert it to int32"
        )
    return TileFormat("int32", NODATA, descriptions, zeros)


def cut(
    stored: NDArray[Any], tile: Tile, form: TileFormat, hidden: NDArray[np.bool_] | None = None
) -> NDArray[Any]:
    """A tile of an array `(bands, height, width)`, padded where it sticks out.

    Where values are `hidden` (masks, alpha and fillers of the source), the tile has nodata.
    """
    part = tile.clipped(Shape.of(stored))
    window = stored[:, *part.slices]
    out = np.full((len(stored), tile.height, tile.width), form.nodata, dtype=form.dtype)
    out[:, : part.height, : part.width] = window
    for band in form.zero_is_missing:
        out[band, : part.height, : part.width][window[band] == 0] = form.nodata
    if hidden is not None:
        out[:, : part.height, : part.width][hidden[:, *part.slices]] = form.nodata
    return out


def encode(pixels: NDArray[Any], form: TileFormat, georeference: Georeference) -> bytes:
    """A GeoTIFF of `pixels`, shape `(bands, height, width)`, as bytes.

    Made in memory, because GDAL reports a full disk only when a file is closed, if at all.
    """
    count, height, width = pixels.shape
    with suppress_georef_warnings(), MemoryFile() as memory:
        with memory.open(
            count=count,
            height=height,
            width=width,
            dtype=form.dtype,
            nodata=form.nodata,
            blockysize=min(height, _STRIP),
            **COMPRESSION,
            **georeference.profile,
        ) as dataset:
            dataset.write(pixels)
            if any(form.descriptions):
                dataset.descriptions = form.descriptions
        return bytes(memory.getbuffer())


def put(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; not yet safe from a power cut."""
    write_bytes(path, content, sync=False)
