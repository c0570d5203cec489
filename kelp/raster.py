"""Rasters in and out: windowed reading into canonical arrays, atomic writing, georeference.

Reading normalises every spelling of "missing" (tags, -32768, 0 in untagged unsigned files, NaN)
to NaN, so that nothing downstream sees a nodata number. Writing copies the source's CRS and
transform, or none: it never invents one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window

from kelp import bands
from kelp.bands import BANDS, MASK_NODATA, NODATA
from kelp.errors import ConfigError, InputError
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
def _quietly(path: Path) -> Iterator[None]:
    """Competition files have no georeference, which is no news; errors name the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except (RasterioIOError, RasterioError) as error:
        reason = " ".join(str(error).split()) or "read error"
        raise InputError(
            f"{path}: not a readable raster ({reason}); the file may be truncated, fetch it again"
        ) from error


def open_dataset(path: Path) -> Any:
    """Open a raster for reading with rasterio. Raises `InputError` naming the file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with _quietly(path):
        return rasterio.open(path)


class Scene:
    """A multi-band raster, read by windows as canonical arrays. A context manager.

    Args:
        path: the file.
        band_order: names of the file's bands; without it the file's band descriptions count,
            and without those a 7-band file without CRS has competition order.

    Raises:
        InputError: the file cannot be read, or its bands cannot be named.
    """

    def __init__(self, path: Path, band_order: Sequence[str] = ()) -> None:
        self.path = path
        self._dataset = open_dataset(path)
        try:
            self.names = _band_names(self._dataset, path, band_order)
        except (InputError, ConfigError):
            self._dataset.close()
            raise
        self.shape: Shape = (self._dataset.height, self._dataset.width)
        self.georeference = _georeference(self._dataset)
        self._indexes = [i + 1 for i, name in enumerate(self.names) if name]
        self._targets = [BANDS.index(name) for name in self.names if name]
        self._nodata = [
            _nodata_of(self._dataset, index, BANDS[target])
            for index, target in zip(self._indexes, self._targets, strict=True)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dataset.close()

    @property
    def present(self) -> tuple[str, ...]:
        """The known bands that the file holds, in canonical order."""
        return tuple(name for name in BANDS if name in self.names)

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        return str(self._dataset.dtypes[0])

    @property
    def nodata(self) -> float | None:
        """The nodata tag of the file, if it has one."""
        tag: float | None = self._dataset.nodata
        return tag

    @property
    def descriptions(self) -> tuple[str | None, ...]:
        """The band descriptions of the file."""
        return tuple(self._dataset.descriptions)

    def require(self, names: Sequence[str]) -> None:
        """Raise `InputError` unless the file holds all the named bands.

        A missing DEM is allowed: it is unknown everywhere, which one line of notice says.
        """
        absent = [name for name in names if name not in self.names]
        if absent == ["DEM"]:
            log.warning("%s: no DEM band; elevation is taken as unknown", self.path)
        elif absent:
            raise InputError(
                f"{self.path}: lacks the band {', '.join(absent)}; "
                f"it holds {', '.join(self.present)} (name them with --band_order)"
            )

    def read(self, tile: Tile | None = None) -> NDArray[np.float32]:
        """Read a window that lies inside the scene (default: all) as a canonical array."""
        return self._canonical(self._read(self._indexes, tile))

    def sample(self, side: int) -> NDArray[np.float32]:
        """The whole scene thinned (by picking pixels) to at most `side` pixels a side."""
        step = max(1, -(-max(self.shape) // side))
        thinned = (-(-self.shape[0] // step), -(-self.shape[1] // step))
        return self._canonical(self._read(self._indexes, None, thinned))

    def read_stored(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The whole scene twice, decoded once: as stored, and as a canonical array.

        The first has the file's type and all its bands, also those kelp does not know.
        """
        stored = self._read(list(self._dataset.indexes), None)
        return stored, self._canonical([stored[index - 1] for index in self._indexes])

    def _read(
        self, indexes: list[int], tile: Tile | None, thinned: Shape | None = None
    ) -> NDArray[Any]:
        window = Window(tile.x, tile.y, tile.width, tile.height) if tile else None
        out_shape = (len(indexes), *thinned) if thinned else None
        with _quietly(self.path):
            raw: NDArray[Any] = self._dataset.read(indexes, window=window, out_shape=out_shape)
        return raw

    def _canonical(self, raw: Sequence[NDArray[Any]] | NDArray[Any]) -> NDArray[np.float32]:
        out = np.empty((len(BANDS), *raw[0].shape), dtype=np.float32)
        for target in range(len(BANDS)):
            if target not in self._targets:
                out[target] = 0 if target == bands.QA else np.nan
        for values, target, nodata in zip(raw, self._targets, self._nodata, strict=True):
            plane = out[target]
            plane[...] = values
            for value in nodata:
                plane[values == value] = np.nan
        if "QA" in self.names:
            out[bands.QA] = bands.decode_qa(out[bands.QA])
        return out


def read_scene(path: Path, band_order: Sequence[str] = ()) -> NDArray[np.float32]:
    """A whole scene as a canonical array, shape `(7, height, width)`."""
    with Scene(path, band_order) as scene:
        return scene.read()


def read_mask(path: Path, tile: Tile | None = None) -> NDArray[np.uint8]:
    """A mask (or a window of it): uint8, 0 = no kelp, 1 = kelp, 255 = not observed.

    Raises `InputError` when the file has more than one band or other values than these.
    """
    with open_dataset(path) as dataset:
        if dataset.count != 1:
            raise InputError(f"{path}: a mask has one band, this file has {dataset.count}")
        window = Window(tile.x, tile.y, tile.width, tile.height) if tile else None
        with _quietly(path):
            raw = dataset.read(1, window=window)
        nodata = dataset.nodata
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
    with open_dataset(path) as dataset:
        if dataset.count != 1:
            raise InputError(f"{path}: probabilities have one band, this file has {dataset.count}")
        window = Window(tile.x, tile.y, tile.width, tile.height) if tile else None
        with _quietly(path):
            raw: NDArray[np.float32] = dataset.read(1, window=window).astype(np.float32)
        nodata = dataset.nodata
    if nodata is not None:
        raw[raw == np.float32(nodata)] = np.nan
    wrong = (raw < 0) | (raw > 1)
    if wrong.any():
        raise InputError(f"{path}: probabilities lie between 0 and 1, this one is {raw[wrong][0]}")
    return raw


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
    (by mode for masks, by averaging for probabilities), a smaller one a plain GeoTIFF.
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
        self._atomic = atomic(self.path)
        self._partial = self._atomic.__enter__()
        # A large raster is first written plainly, then copied to COG layout.
        self._plain = self._partial.with_suffix(".plain.tif") if self.large else self._partial
        with _quietly(self._plain):
            self._dataset = rasterio.open(self._plain, "w", **self._profile)
            if self.is_mask:
                self._dataset.write_colormap(1, MASK_COLORS)
            self._dataset.update_tags(**self._tags)
        return self

    def write(self, y: int, rows: NDArray[np.generic]) -> None:
        """Write `rows`, shape `(n, width)`, beginning at row `y`."""
        with _quietly(self.path):
            self._dataset.write(rows, 1, window=Window(0, y, rows.shape[1], rows.shape[0]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._dataset.closed:
                with _quietly(self._plain):
                    self._dataset.close()
            if self.large and kind is None:
                with _quietly(self._plain):
                    rasterio.shutil.copy(
                        self._plain,
                        self._partial,
                        driver="COG",
                        compress="deflate",
                        overview_resampling="mode" if self.is_mask else "average",
                    )
        finally:
            if self.large:
                self._plain.unlink(missing_ok=True)
            self._atomic.__exit__(kind, error, trace)


def write_mask(
    path: Path,
    mask: NDArray[np.uint8],
    georeference: Georeference = Georeference(),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a mask of shape `(height, width)` with colour table and nodata 255."""
    with RasterWriter(path, mask.shape, "uint8", georeference, MASK_NODATA, tags or {}) as out:
        out.write(0, mask)


def _georeference(dataset: Any) -> Georeference:
    """A dataset's georeference; an identity transform without CRS counts as none."""
    if dataset.crs is None and dataset.transform == Affine.identity():
        return Georeference()
    return Georeference(dataset.crs, dataset.transform)


def georeference_of(path: Path) -> Georeference:
    """The georeference of a raster file."""
    with open_dataset(path) as dataset:
        return _georeference(dataset)


def _band_names(dataset: Any, path: Path, band_order: Sequence[str]) -> tuple[str, ...]:
    """Names of the file's bands; '' for one that kelp does not know."""
    if band_order:
        if len(band_order) != dataset.count:
            raise InputError(
                f"{path}: has {dataset.count} bands, --band_order names {len(band_order)}"
            )
        return bands.parse_bands(band_order)
    described = tuple((text or "").strip().upper() for text in dataset.descriptions)
    named = tuple(name if name in BANDS else "" for name in described)
    repeated = {name for name in named if name and named.count(name) > 1}
    if repeated:
        raise InputError(f"{path}: two bands are described as {', '.join(sorted(repeated))}")
    if any(named):
        return named
    if dataset.count == len(BANDS) and dataset.crs is None:
        return BANDS
    raise InputError(
        f"{path}: cannot tell which of its {dataset.count} bands is which; "
        "name them with --band_order SWIR,NIR,R,G,B,QA,DEM (in the file's order)"
    )


def _nodata_of(dataset: Any, index: int, name: str) -> tuple[float, ...]:
    """The stored values of one band that mean "missing" (NaN always does)."""
    tag = dataset.nodatavals[index - 1]
    if name in ("QA", "DEM"):
        # Here 0 is a value (good pixel, sea level), whatever a file-wide tag says.
        return (NODATA,) if tag in (None, 0) else (NODATA, tag)
    if tag is not None:
        return (NODATA, tag)
    return (NODATA, 0) if dataset.dtypes[index - 1].startswith("uint") else (NODATA,)
