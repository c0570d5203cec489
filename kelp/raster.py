"""One-band rasters (masks, probabilities) in and out, and the georeference that pixels keep.

Writing copies the source's CRS and transform, or none: it never invents one.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from kelp.bands import MASK_NODATA
from kelp.errors import InputError
from kelp.files import atomic
from kelp.grid import Shape, Tile

log = logging.getLogger("kelp")

COG_SIDE: Final = 1024
"""Rasters with a longer side are written as Cloud Optimized GeoTIFFs."""

# 0 = deep water, 1 = kelp, 255 = transparent: QGIS and GDAL show a mask at once.
MASK_COLORS: Final = {0: (16, 52, 92, 255), 1: (255, 190, 30, 255), MASK_NODATA: (0, 0, 0, 0)}


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies; both `None` for a raster without one."""

    crs: Any = None
    transform: Affine | None = None

    def shifted(self, tile: Tile) -> Georeference:
        """The georeference of a window of the raster."""
        if self.transform is None:
            return self
        return Georeference(self.crs, self.transform @ Affine.translation(tile.x, tile.y))

    @property
    def profile(self) -> dict[str, Any]:
        """Keyword arguments for `rasterio.open(..., "w")`."""
        return {
            name: value
            for name, value in (("crs", self.crs), ("transform", self.transform))
            if value is not None
        }


@contextmanager
def quietly(path: Path, writing: bool = False) -> Iterator[None]:
    """Competition files have no georeference, which is no news; errors name the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except RasterioError as error:  # RasterioIOError is one, too
        reason = " ".join(str(error).split()) or "no reason given"
        if writing:
            raise InputError(
                f"{path}: cannot be written ({reason}); check the free space"
            ) from error
        raise InputError(
            f"{path}: not a readable raster ({reason}); the file may be truncated, fetch it again"
        ) from error


def open_dataset(path: Path) -> Any:
    """Open a raster for reading with rasterio. Raises `InputError` naming the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with quietly(path):
        return rasterio.open(path)


def read_mask(path: Path, tile: Tile | None = None) -> NDArray[np.uint8]:
    """A mask (or a window of it): uint8, 0 = no kelp, 1 = kelp, 255 = not observed.

    Raises `InputError` when the file has more than one band or other values than these.
    """
    raw, nodata = _read_band(path, tile, "a mask")
    missing = raw == MASK_NODATA
    if nodata is not None and nodata not in (0, 1):
        missing |= raw == nodata
    wrong = ~(missing | (raw == 0) | (raw == 1))
    if wrong.any():
        raise InputError(
            f"{path}: a mask holds 0, 1 and 255 (not observed), this one also {raw[wrong][0]}"
        )
    return np.where(missing, MASK_NODATA, raw).astype(np.uint8)


def read_probability(path: Path, tile: Tile | None = None) -> NDArray[np.float32]:
    """Probabilities (or a window of them): float32 in 0-1, NaN = not observed.

    Raises `InputError` when the file has more than one band or other values than these.
    """
    raw, nodata = _read_band(path, tile, "a raster of probabilities")
    p: NDArray[np.float32] = raw.astype(np.float32)
    if nodata is not None:
        p[p == np.float32(nodata)] = np.nan
    wrong = (p < 0) | (p > 1)
    if wrong.any():
        raise InputError(f"{path}: probabilities lie between 0 and 1, this one is {p[wrong][0]}")
    return p


def _read_band(path: Path, tile: Tile | None, kind: str) -> tuple[NDArray[Any], float | None]:
    """The only band of a raster (or a window of it), as stored, and its nodata tag."""
    with open_dataset(path) as dataset:
        if dataset.count != 1:
            raise InputError(f"{path}: {kind} has one band, this file has {dataset.count}")
        window = Window(tile.x, tile.y, tile.width, tile.height) if tile else None
        with quietly(path):
            return dataset.read(1, window=window), dataset.nodata


def raster_shape(path: Path) -> Shape:
    """Height and width of a raster, in pixels, without reading its pixels."""
    with open_dataset(path) as dataset:
        return dataset.height, dataset.width


def read_tags(path: Path) -> dict[str, str]:
    """The metadata tags of a raster; empty for a file that is missing or unreadable."""
    if not path.is_file():
        return {}
    try:
        with open_dataset(path) as dataset:
            return dict(dataset.tags())
    except InputError:
        return {}


class RasterWriter:
    """Writes a one-band raster by rows; the file appears, complete, when the block succeeds.

    A raster with a side above 1,024 px becomes a valid Cloud Optimized GeoTIFF with overviews
    (by mode for masks, by averaging for probabilities), a smaller one a plain GeoTIFF. Before it
    gets its name it is read back: GDAL does not tell of a disk that fills up on closing.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        dtype: str,
        georeference: Georeference,
        nodata: float,
        tags: Mapping[str, str],
    ) -> None:
        self.path = path
        self.is_mask = dtype == "uint8"
        self.large = max(shape) > COG_SIDE
        self._checksum = 0
        self._tags = dict(tags)
        self._profile: dict[str, Any] = {
            "driver": "GTiff",
            "height": shape[0],
            "width": shape[1],
            "count": 1,
            "dtype": dtype,
            "nodata": nodata,
            "compress": "deflate",
            "bigtiff": "if_safer",
            **({"tiled": True, "blockxsize": 512, "blockysize": 512} if self.large else {}),
            **georeference.profile,
        }

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._partial = stack.enter_context(atomic(self.path))
            # A large raster is first written plainly, then copied to COG layout.
            self._plain = self._partial
            if self.large:
                self._plain = self._partial.with_suffix(".plain.tif")
                stack.callback(self._plain.unlink, missing_ok=True)
            with quietly(self.path, writing=True):
                self._dataset = rasterio.open(self._plain, "w", **self._profile)
                stack.callback(self._close)
                if self.is_mask:
                    self._dataset.write_colormap(1, MASK_COLORS)
                self._dataset.update_tags(**self._tags)
            self._stack = stack.pop_all()
        return self

    def write(self, y: int, rows: NDArray[np.generic]) -> None:
        """Write `rows`, shape `(n, width)`, at row `y`: from the top on, without gaps."""
        rows = np.ascontiguousarray(rows, dtype=self._profile["dtype"])
        self._checksum = zlib.crc32(rows.data, self._checksum)
        with quietly(self.path, writing=True):
            self._dataset.write(rows, 1, window=Window(0, y, rows.shape[1], rows.shape[0]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # whatever fails here, the file does not get its name
            self._close()
            if self.large:
                with quietly(self.path, writing=True):
                    rasterio.shutil.copy(
                        self._plain,
                        self._partial,
                        driver="COG",
                        compress="deflate",
                        overview_resampling="mode" if self.is_mask else "average",
                    )
            self._verify()

    def _close(self) -> None:
        if not self._dataset.closed:
            with quietly(self.path, writing=True):
                self._dataset.close()

    def _verify(self) -> None:
        """Raise `InputError` unless the finished file holds the rows that were written."""
        checksum = 0
        with quietly(self.path, writing=True), rasterio.open(self._partial) as dataset:
            for y in range(0, dataset.height, 512):
                rows = min(512, dataset.height - y)
                strip = dataset.read(1, window=Window(0, y, dataset.width, rows))
                checksum = zlib.crc32(strip.data, checksum)
        if checksum != self._checksum:
            raise InputError(f"{self.path}: cannot be written; check the free space")


def write_mask(
    path: Path,
    mask: NDArray[np.uint8],
    georeference: Georeference = Georeference(),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a mask of shape `(height, width)` with colour table and nodata 255."""
    with RasterWriter(path, mask.shape, "uint8", georeference, MASK_NODATA, tags or {}) as out:
        out.write(0, mask)


def georeference_from(dataset: Any) -> Georeference:
    """A dataset's georeference; an identity transform without CRS counts as none."""
    if dataset.crs is None and dataset.transform == Affine.identity():
        return Georeference()
    return Georeference(dataset.crs, dataset.transform)


def georeference_of(path: Path) -> Georeference:
    """The georeference of a raster file."""
    with open_dataset(path) as dataset:
        return georeference_from(dataset)
