"""Writing one-band rasters by rows: complete or not at all, resumed after a kill.

The source's CRS and transform are copied, or none: nothing is invented.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.windows import Window

from kelp.errors import BusyError, InputError
from kelp.io.files import atomic, check_name, hidden, open_locked
from kelp.raster.bands import MASK_NODATA
from kelp.raster.georeference import crs_words
from kelp.raster.masks import Georeference, quietly
from kelp.raster.window import Shape

log = logging.getLogger("kelp")

COG_SIDE: Final = 1024
"""Rasters with a longer side are written as Cloud Optimized GeoTIFFs."""

# 0 = deep water, 1 = kelp, 255 = transparent: QGIS and GDAL show a mask at once.
MASK_COLORS: Final = {0: (16, 52, 92, 255), 1: (255, 190, 30, 255), MASK_NODATA: (0, 0, 0, 0)}

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
    averaging for probabilities), which is read back before it gets its name: GDAL does not tell
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
        if max(self._shape) > COG_SIDE:
            averaging = "mode" if self.is_mask else "average"
            options |= {"driver": "COG", "overview_resampling": averaging}
        plain = partial.with_suffix(".vrt")
        try:
            with quietly(self.path, writing=True):
                plain.write_text(self._description(), encoding="utf-8")
                rasterio.shutil.copy(plain, partial, compress="deflate", **options)
        finally:
            for left in partial.parent.glob(f"{partial.stem}.*"):  # also overviews on their way
                if left != partial:
                    left.unlink(missing_ok=True)

    def _description(self) -> str:
        """The file of rows as a GDAL virtual dataset (gdal.org/drivers/raster/vrt.html)."""
        height, width = self._shape
        size = self._dtype.itemsize
        root = ElementTree.Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
        if self._place.crs is not None:
            ElementTree.SubElement(root, "SRS").text = self._place.crs.to_wkt()
        if self._place.transform is not None:
            numbers = ",".join(map(repr, self._place.transform.to_gdal()))
            ElementTree.SubElement(root, "GeoTransform").text = numbers
        tags = ElementTree.SubElement(root, "Metadata")
        for key, value in self._tags.items():
            ElementTree.SubElement(tags, "MDI", key=key).text = value
        kind = {"dataType": _TYPES[self._dtype.name], "subClass": "VRTRawRasterBand"}
        band = ElementTree.SubElement(root, "VRTRasterBand", kind, band="1")
        values: dict[str, object] = {
            "NoDataValue": self._nodata,
            "ByteOrder": {"little": "LSB", "big": "MSB"}[sys.byteorder],
            "ImageOffset": 0,
            "PixelOffset": size,
            "LineOffset": width * size,
        }
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
        # Not relative: GDAL would take a backslash of the folder's name for a separator.
        source = ElementTree.SubElement(band, "SourceFilename", relativeToVRT="0")
        source.text = str(self._path_of_rows.absolute())
        if self.is_mask:
            ElementTree.SubElement(band, "ColorInterp").text = "Palette"
            table = ElementTree.SubElement(band, "ColorTable")
            for entry in range(256):
                color = MASK_COLORS.get(entry, (0, 0, 0, 255))
                parts = {f"c{i}": str(part) for i, part in enumerate(color, 1)}
                ElementTree.SubElement(table, "Entry", parts)
        return ElementTree.tostring(root, encoding="unicode")

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
            for y in range(0, dataset.height, 512):
                rows = min(512, dataset.height - y)
                strip = dataset.read(1, window=Window(0, y, dataset.width, rows))
                checksum = zlib.crc32(strip.data, checksum)
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


def write_mask(
    path: Path,
    mask: NDArray[np.uint8],
    georeference: Georeference = _NOWHERE,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a mask of shape `(height, width)` with colour table and nodata 255."""
    with RasterWriter(path, mask.shape, "uint8", georeference, MASK_NODATA, tags or {}) as out:
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
