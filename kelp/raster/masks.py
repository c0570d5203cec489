"""Reading one-band rasters (masks, probabilities), and the georeference that pixels keep."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from kelp.errors import InputError
from kelp.io import remote
from kelp.io.files import file_sha256, is_file
from kelp.io.location import Url
from kelp.raster.bands import MASK_NODATA
from kelp.raster.validity import MaskBands, missing_values
from kelp.raster.window import Shape, Tile

log = logging.getLogger("kelp")


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
    def on_earth(self) -> bool:
        """Whether it says where on the Earth; a local CRS (`LOCAL_CS`) does not."""
        if self.crs is None or self.transform is None:
            return False
        crs = CRS.from_user_input(self.crs)
        return bool(crs.is_projected or crs.is_geographic)

    @property
    def profile(self) -> dict[str, Any]:
        """Keyword arguments for `rasterio.open(..., "w")`."""
        return {
            name: value
            for name, value in (("crs", self.crs), ("transform", self.transform))
            if value is not None
        }


class _Silence:
    """Ignores NotGeoreferencedWarning while at least one thread is inside.

    Filters belong to the process: threads that each set and restored them would undo each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore", NotGeoreferencedWarning)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_silence: Final = _Silence()


def suppress_georef_warnings() -> AbstractContextManager[None]:
    """A raster without georeference is no news, as competition files have none; for all threads."""
    return _silence


@contextmanager
def quietly(path: Path | Url, writing: bool = False) -> Iterator[None]:
    """Competition files have no georeference, which is no news; errors name the file.

    Without rasterio's environment, which each thread needs for itself, GDAL, PROJ and libtiff write
    to stderr; with it their words become errors, or end in rasterio's own logger.
    """
    try:
        with suppress_georef_warnings(), rasterio.Env():
            yield
    except Exception as error:
        if not is_gdal_error(error):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        reason = re.sub(r"/vsiriopener_\w+/", "", reason)  # rasterio's name for a store
        if writing:
            raise InputError(
                f"{path}: cannot be written ({reason}); check the free space"
            ) from error
        raise InputError(
            f"{path}: not a readable raster ({reason}); the file may be truncated, fetch it again"
        ) from error


def is_gdal_error(error: Exception) -> bool:
    """Whether an error is GDAL's or rasterio's, which both have several families of them."""
    if isinstance(error, RasterioError | CRSError | UnicodeDecodeError):
        return True
    return type(error).__name__.startswith("CPLE_")  # copying and warping let GDAL's own through


@contextmanager
def decoding(cache: int) -> Iterator[None]:
    """Keep at most `cache` bytes of decoded blocks (GDAL's block cache), whatever threads read."""
    with suppress_georef_warnings(), rasterio.Env(GDAL_CACHEMAX=cache):
        yield


def open_dataset(path: Path | Url) -> Any:
    """Open a raster for reading with rasterio. Raises `InputError` naming the file.

    Of one in a store the header is fetched, and later what is read: nobody should read much.
    """
    if isinstance(path, Url):
        with quietly(path):
            return remote.open_raster(path)
    if not is_file(path):
        raise InputError(f"{path}: no such file; check the path")
    with quietly(path):
        return rasterio.open(path)


def read_mask(path: Path, tile: Tile | None = None, kelp_value: int = 1) -> NDArray[np.uint8]:
    """A mask (or a window of it): uint8, 0 = no kelp, 1 = kelp, 255 = not observed.

    Not observed is 255, the nodata value of the file, and NaN.

    Args:
        path: a raster of one band.
        tile: the window; default: all.
        kelp_value: what the file says where there is kelp; with 255 only nodata is not observed.

    Raises:
        InputError: the file has more than one band or other values than these.
    """
    raw, missing, _ = _read_band(path, tile, "a mask", (0, 1, kelp_value))
    kelp = (raw == kelp_value) & ~missing
    if kelp_value != MASK_NODATA:
        missing |= raw == MASK_NODATA
    wrong = ~(missing | kelp | (raw == 0))
    if wrong.any():
        told = "0, 1 and 255 (not observed)"
        if kelp_value != 1:
            told = f"0, {kelp_value} (--kelp_value) and nodata"
        raise InputError(f"{path}: a mask holds {told}, this one also {raw[wrong][0]}")
    mask: NDArray[np.uint8] = kelp.astype(np.uint8)
    mask[missing] = MASK_NODATA
    return mask


def read_probability(path: Path, tile: Tile | None = None) -> NDArray[np.float32]:
    """Probabilities (or a window of them): float32 in 0-1, NaN = not observed.

    Numbers stored in steps (uint8 with a scale) are scaled.

    Raises `InputError` when the file has more than one band or other values than these.
    """
    raw, missing, scale = _read_band(path, tile, "a raster of probabilities")
    with np.errstate(over="ignore"):  # float64; beyond 1 anyway
        p: NDArray[np.float32] = raw.astype(np.float32)
    p[missing] = np.nan
    p *= np.float32(scale)
    wrong = (p < 0) | (p > 1)
    if wrong.any():
        raise InputError(f"{path}: probabilities lie between 0 and 1, this one is {p[wrong][0]}")
    return p


def _read_band(
    path: Path, tile: Tile | None, kind: str, not_missing: tuple[float, ...] = ()
) -> tuple[NDArray[Any], NDArray[np.bool_], float]:
    """The only band of a raster (or a window of it), as stored; where it is missing; its scale.

    A nodata tag that names one of the values `not_missing` is no news about pixels.
    """
    with open_dataset(path) as dataset:
        refuse_complex(dataset, path)
        require_one_band(dataset, str(path), kind)
        window = tile.window if tile else None
        with quietly(path):
            raw = dataset.read(1, window=window)
            hidden = MaskBands(dataset, [1]).missing(window)
        tag = None if dataset.nodata in not_missing else dataset.nodata
        missing = missing_values(raw, tag)
        return raw, missing if hidden is None else missing | hidden[0], dataset.scales[0]


def require_one_band(dataset: Any, name: str, kind: str) -> None:
    """Raise `InputError` for a file of several bands; one of transparency does not count."""
    alpha = sum(colour.name == "alpha" for colour in dataset.colorinterp[1:])
    if dataset.count - alpha != 1:
        raise InputError(f"{name}: {kind} has one band, this file has {dataset.count}")


def refuse_complex(dataset: Any, path: Path | Url) -> None:
    """Raise `InputError` for a file with complex numbers, such as radar's."""
    for index, dtype in enumerate(dataset.dtypes, 1):
        if dtype.startswith("complex"):
            raise InputError(
                f"{path}: band {index} holds complex numbers ({dtype}); "
                "kelp takes integers and floats of optical scenes"
            )


def descriptions_of(dataset: Any) -> tuple[str | None, ...]:
    """Band descriptions; what is not UTF-8 in them becomes the replacement character."""
    try:
        return tuple(dataset.descriptions)
    except UnicodeDecodeError:
        pass
    # rasterio reads them all or none; GDAL's own description of the dataset has the bytes.
    with MemoryFile(ext=".vrt") as memory:
        rasterio.shutil.copy(dataset, memory.name, driver="VRT")
        described = memory.read().decode("utf-8", "replace")
    bands = ElementTree.fromstring(described).findall("VRTRasterBand")
    return tuple(band.findtext("Description") for band in bands)


def sources_of(dataset: Any, path: Path) -> dict[str, str]:
    """SHA-256 of the other files whose pixels or masks a dataset reads, by name.

    Those are the sources of a virtual dataset (of sources that are virtual themselves, too), and
    `.msk` files.
    """
    found: dict[str, str] = {}
    seen = {path.resolve()}
    waiting = list(dataset.files)
    while waiting:
        file = Path(waiting.pop())
        # Statistics and overviews change no pixel that is read.
        if file.suffix.lower() in (".xml", ".ovr") or file.resolve() in seen:
            continue
        seen.add(file.resolve())
        if not file.is_file():
            continue
        found[os.path.relpath(file, path.parent)] = file_sha256(file)
        if file.suffix.lower() == ".vrt":
            with open_dataset(file) as source:
                waiting += source.files
    return dict(sorted(found.items()))


def raster_shape(path: Path) -> Shape:
    """Height and width of a raster, in pixels, without reading its pixels."""
    with open_dataset(path) as dataset:
        return Shape(dataset.height, dataset.width)


def read_tags(path: Path | Url) -> dict[str, str]:
    """The metadata tags of a raster; empty for a file that is missing or is no raster.

    Raises `InputError` where nobody can tell: the store does not answer, or reading is not allowed.
    """
    if not remote.exists(path):
        return {}
    try:
        with open_dataset(path) as dataset, quietly(path):
            return dict(dataset.tags())
    except InputError as error:
        if isinstance(path, Url):  # an object is complete or not there
            raise
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: reading is not allowed; check its permissions") from error
        return {}


def georeference_from(dataset: Any) -> Georeference:
    """A dataset's georeference; an identity transform without CRS counts as none."""
    if dataset.crs is None and dataset.transform == Affine.identity():
        return Georeference()
    return Georeference(dataset.crs, dataset.transform)


def georeference_of(path: Path) -> Georeference:
    """The georeference of a raster file."""
    with open_dataset(path) as dataset:
        return georeference_from(dataset)
