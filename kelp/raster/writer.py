"""Writing one-band rasters by rows: complete or not at all, resumed after a kill.

The source's CRS and transform are copied, or none: nothing is invented.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray

from kelp.errors import BusyError, InputError
from kelp.io.files import atomic, check_name, hidden, open_locked
from kelp.raster.bands import MASK_NODATA
from kelp.raster.georeference import crs_words
from kelp.raster.masks import Georeference, quietly
from kelp.raster.window import Shape, Tile

log = logging.getLogger("kelp")

COG_SIDE: Final = 1024
"""Rasters with a longer side are written as Cloud Optimized GeoTIFFs."""

# 0 = deep water, 1 = kelp, 255 = transparent: QGIS and GDAL show a mask at once.
MASK_COLORS: Final = {0: (16, 52, 92, 255), 1: (255, 190, 30, 255), MASK_NODATA: (0, 0, 0, 0)}

_SMALLEST: Final = 512
"""Side at which overviews end: a block of a COG."""

_NOWHERE: Final = Georeference()
_TYPES: Final = {"uint8": "Byte", "float32": "Float32"}


def rows_path(path: Path) -> Path:
    """The plain file of rows beside a raster that is being written."""
    return hidden(path, ".rows")


class RasterWriter:
    """Writes a one-band raster by rows; the file appears, complete, when the block succeeds.

    Rows are first appended to a plain hidden file beside the raster: what a process wrote before
    it was killed can be kept (`begin`). In the end they are copied to a GeoTIFF, for a raster
    with a side above 1,024 px a Cloud Optimized one with overviews (by mode for masks, by
    averaging for the others), which is read back before it gets its name: GDAL does not tell
    of a disk that fills up on closing.

    Args:
        path: the raster.
        shape: its `(height, width)`.
        dtype: `uint8` or `float32`.
        georeference: where it lies.
        nodata: the stored value of "not observed".
        tags: metadata of the file.
        scale: value of one unit of the stored numbers; a `uint8` raster without it is a mask.
        description: what the band holds, as GIS programs show it; of a mask `kelp`.

    Raises:
        InputError: no file system takes a file of that name.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        dtype: str,
        georeference: Georeference,
        nodata: float,
        tags: Mapping[str, str],
        scale: float | None = None,
        description: str = "",
    ) -> None:
        check_name(path)
        self.path = path
        self.is_mask = dtype == "uint8" and scale is None
        self.checksum = 0
        """CRC-32 of the rows written so far."""
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._place = georeference
        self._nodata = nodata
        self._tags = dict(tags)
        self._scale = scale
        self._name = description or ("kelp" if self.is_mask else "")
        self._path_of_rows = rows_path(path)
        self._rows: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def begin(self, kept: int = 0) -> None:
        """Start to write, after the first `kept` rows of what an earlier process left.

        `checksum` then tells whether they are what was written. Raises `BusyError` when another
        process is writing the raster.
        """
        size = kept * self._shape[1] * self._dtype.itemsize
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._rows is None:
                self._rows = open_locked(self._path_of_rows)
            self._rows.truncate(size)
            self._rows.seek(0)
            self.checksum = 0
            for start in range(0, size, 1 << 24):
                piece = self._rows.read(min(1 << 24, size - start))
                self.checksum = zlib.crc32(piece, self.checksum)
        except BlockingIOError as error:
            raise BusyError(f"{self.path}: another process is writing it; wait for it") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, y: int, rows: NDArray[np.generic]) -> None:
        """Write `rows`, shape `(n, width)`, at row `y`: from the top on, without gaps."""
        rows = np.ascontiguousarray(rows, dtype=self._dtype)
        self.checksum = zlib.crc32(rows.data, self.checksum)
        try:
            self._file.write(rows.data)
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Make sure that the rows written so far outlive a power cut."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """Make the raster of the rows and give it its name."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        with atomic(self.path) as partial:
            self._copy(partial)
            self._verify(partial)

    def discard(self) -> None:
        """Forget the rows, unless another process writes them."""
        if self._rows:
            with suppress(OSError):  # while the lock is held: later they are another's
                self._path_of_rows.unlink(missing_ok=True)
            self.suspend()

    def suspend(self) -> None:
        """Stop writing; the rows stay for a later `begin`."""
        if self._rows:
            with suppress(OSError):  # what a full disk did not take is written again
                self._rows.close()
            self._rows = None

    @property
    def _file(self) -> IO[bytes]:
        if self._rows is None:
            raise ValueError(f"{self.path}: written to before begin()")
        return self._rows

    def _copy(self, partial: Path) -> None:
        """The rows as a GeoTIFF; GDAL reads them through a description of the plain file."""
        options: dict[str, Any] = {"driver": "GTiff", "bigtiff": "if_safer"}
        halved: list[tuple[int, Shape]] = []
        if max(self._shape) > COG_SIDE:
            options |= {"driver": "COG", "overview_resampling": "average"}
            halved = self._append_overviews() if self.is_mask else []
        plain = partial.with_suffix(".vrt")
        try:
            with quietly(self.path, writing=True):
                plain.write_text(self._description(halved), encoding="utf-8")
                rasterio.shutil.copy(plain, partial, compress="deflate", **options)
        finally:
            for left in partial.parent.glob(f"{partial.stem}.*"):  # also overviews on their way
                if left != partial:
                    left.unlink(missing_ok=True)

    def _append_overviews(self) -> list[tuple[int, Shape]]:
        """Put a mask's overviews below its rows; where each begins in the file, and its shape.

        By mode, as GDAL makes them. It takes as long for a mask that is nearly all unobserved as
        for another, most of the time that a small area of interest has to itself.
        """
        found, begin, shape = list[tuple[int, Shape]](), 0, self._shape
        while max(shape) > _SMALLEST:
            half = Shape((shape[0] + 1) // 2, (shape[1] + 1) // 2)
            end = begin + shape[0] * shape[1]
            for y in range(0, shape[0], 256):
                rows = min(256, shape[0] - y)
                offset = begin + y * shape[1]
                values = np.fromfile(self._path_of_rows, np.uint8, rows * shape[1], offset=offset)
                self._file.write(_halved(values.reshape(rows, shape[1])).data)
            self._file.flush()
            found.append((end, half))
            begin, shape = end, half
        return found

    def _description(self, halved: Sequence[tuple[int, Shape]] = ()) -> str:
        """The file of rows as a GDAL virtual dataset (gdal.org/drivers/raster/vrt.html).

        Args:
            halved: where overviews begin in it, and their shapes.
        """
        root = _dataset(self._shape)
        if self._place.crs is not None:
            ElementTree.SubElement(root, "SRS").text = self._place.crs.to_wkt()
        if self._place.transform is not None:
            numbers = ",".join(map(repr, self._place.transform.to_gdal()))
            ElementTree.SubElement(root, "GeoTransform").text = numbers
        tags = ElementTree.SubElement(root, "Metadata")
        for key, value in self._tags.items():
            ElementTree.SubElement(tags, "MDI", key=key).text = value
        band = self._band(root, 0, self._shape[1])
        values: dict[str, object] = {"NoDataValue": self._nodata}
        if self._name:
            values["Description"] = self._name
        if self._scale is not None:
            values["Scale"] = self._scale
        statistics = {} if self.is_mask else self._statistics()
        if statistics:
            known = ElementTree.SubElement(band, "Metadata")
            for key, figure in statistics.items():
                ElementTree.SubElement(known, "MDI", key=f"STATISTICS_{key}").text = repr(figure)
        for name, number in values.items():
            ElementTree.SubElement(band, name).text = str(number)
        for begin, shape in halved:
            smaller = _dataset(shape)
            self._band(smaller, begin, shape[1])
            overview = ElementTree.SubElement(band, "Overview")
            source = ElementTree.SubElement(overview, "SourceFilename", relativeToVRT="0")
            source.text = ElementTree.tostring(smaller, encoding="unicode")
            ElementTree.SubElement(overview, "SourceBand").text = "1"
        if self.is_mask:
            ElementTree.SubElement(band, "ColorInterp").text = "Palette"
            table = ElementTree.SubElement(band, "ColorTable")
            for entry in range(256):
                color = MASK_COLORS.get(entry, (0, 0, 0, 255))
                parts = {f"c{i}": str(part) for i, part in enumerate(color, 1)}
                ElementTree.SubElement(table, "Entry", parts)
        return ElementTree.tostring(root, encoding="unicode")

    def _band(self, root: ElementTree.Element, begin: int, width: int) -> ElementTree.Element:
        """A band of numbers that lie in the plain file, from a byte on, row after row."""
        size = self._dtype.itemsize
        kind = {"dataType": _TYPES[self._dtype.name], "subClass": "VRTRawRasterBand"}
        band = ElementTree.SubElement(root, "VRTRasterBand", kind, band="1")
        # Not relative: GDAL would take a backslash of the folder's name for a separator.
        source = ElementTree.SubElement(band, "SourceFilename", relativeToVRT="0")
        source.text = str(self._path_of_rows.absolute())
        for name, value in (
            ("ByteOrder", {"little": "LSB", "big": "MSB"}[sys.byteorder]),
            ("ImageOffset", begin),
            ("PixelOffset", size),
            ("LineOffset", width * size),
        ):
            ElementTree.SubElement(band, name).text = str(value)
        return band

    def _statistics(self) -> dict[str, float]:
        """Of the stored numbers, as GDAL keeps them: else QGIS computes them for every view."""
        number, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
        for start in range(0, self._shape[0], 512):
            rows = min(512, self._shape[0] - start) * self._shape[1]
            offset = start * self._shape[1] * self._dtype.itemsize
            values = np.fromfile(self._path_of_rows, self._dtype, rows, offset=offset)
            missing = np.isnan(values) if np.isnan(self._nodata) else values == self._nodata
            known = values[~missing].astype(np.float64)
            if known.size:
                number += known.size
                total += known.sum()
                squares += np.square(known).sum()
                low, high = min(low, known.min()), max(high, known.max())
        if not number:
            return {}
        mean = total / number
        spread = np.sqrt(max(0.0, squares / number - mean**2))
        share = round(100 * number / (self._shape[0] * self._shape[1]), 4)
        found = {"MINIMUM": low, "MAXIMUM": high, "MEAN": mean, "STDDEV": spread}
        return {name: float(v) for name, v in found.items()} | {"VALID_PERCENT": share}

    def _verify(self, partial: Path) -> None:
        """Raise `InputError` unless the finished file holds the rows that were written."""
        checksum = 0
        with quietly(self.path, writing=True), rasterio.open(partial) as dataset:
            for strip in Tile(0, 0, dataset.height, dataset.width).strips(512):
                checksum = zlib.crc32(dataset.read(1, window=strip.window).data, checksum)
            if self._place.crs is not None and dataset.crs is None:
                log.warning(
                    "%s: has no CRS: a GeoTIFF cannot hold that of its scene (%s)",
                    self.path,
                    crs_words(self._place.crs),
                )
        if checksum != self.checksum:
            raise InputError(f"{self.path}: cannot be written; check the free space")

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror or error}); "
            "check the folder's permissions and the free space"
        )


def _dataset(shape: Shape) -> ElementTree.Element:
    """A GDAL virtual dataset without a band."""
    size = {"rasterXSize": str(shape[1]), "rasterYSize": str(shape[0])}
    return ElementTree.Element("VRTDataset", size)


def _mode(pixels: Sequence[int]) -> int:
    """What most of the observed pixels hold; of values as frequent that which is first to be so."""
    best, most = MASK_NODATA, 0
    for end, value in enumerate(pixels, start=1):
        count = pixels[:end].count(value)
        if value != MASK_NODATA and count > most:
            best, most = value, count
    return best


_MODES: Final = np.array(
    [_mode(four) for four in product((0, 1, MASK_NODATA), repeat=4)], dtype=np.uint8
)
"""Modes of four pixels: a table, as GDAL counts the 256 values of every four pixels."""


def _halved(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask with each 2 x 2 pixels as their mode, shape `(height, width)` halved, rounded up."""
    height, width = mask.shape
    out = np.full(((height + 1) // 2, (width + 1) // 2), MASK_NODATA, dtype=np.uint8)
    seen = np.flatnonzero(mask.min(axis=0) != MASK_NODATA)
    if len(seen):  # only between the first and the last observed column
        left, right = int(seen[0]) // 2 * 2, int(seen[-1]) + 1
        odd = (0, height % 2), (0, (right - left) % 2)
        codes = np.minimum(np.pad(mask[:, left:right], odd, constant_values=MASK_NODATA), 2)
        upper, lower = codes[::2], codes[1::2]
        four = ((upper[:, ::2] * 3 + upper[:, 1::2]) * 3 + lower[:, ::2]) * 3 + lower[:, 1::2]
        out[:, left // 2 : (right + 1) // 2] = _MODES[four]
    return out


def write_mask(
    path: Path,
    mask: NDArray[np.uint8],
    georeference: Georeference = _NOWHERE,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a mask of shape `(height, width)` with colour table and nodata 255."""
    with RasterWriter(path, Shape.of(mask), "uint8", georeference, MASK_NODATA, tags or {}) as out:
        out.write(0, mask)


def remove_rows(path: Path) -> bool:
    """Remove the rows that a killed writer of `path` left; False where one is still writing."""
    rows = rows_path(path)
    if rows.is_file():
        try:
            with open_locked(rows):
                rows.unlink()
        except BlockingIOError:
            return False
    return True
