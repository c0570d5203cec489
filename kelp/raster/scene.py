"""Scenes: multi-band rasters, read by windows as canonical arrays.

Reading normalises every spelling of "missing" (tags, -32768, 0 in untagged unsigned files, NaN)
to NaN, so that nothing downstream sees a nodata number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from kelp.errors import ConfigError, InputError
from kelp.io.location import Url
from kelp.raster import bands
from kelp.raster.bands import BANDS, FEWEST_OPTICAL, NODATA, OPTICAL
from kelp.raster.masks import georeference_from, open_dataset, quietly
from kelp.raster.window import Shape, Tile

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class SceneSize:
    """What reading a scene will take."""

    shape: Shape
    block: Shape
    """Height and width of the blocks in which the file is stored."""
    stored: int
    """Bytes of a pixel as stored, all bands."""

    @property
    def row_of_blocks(self) -> int:
        """Bytes of the blocks side by side that a row of pixels lies in."""
        across = -(-self.shape[1] // self.block[1]) * self.block[1]
        return self.block[0] * across * self.stored


class Scene:
    """A multi-band raster, read by windows as canonical arrays. A context manager.

    Args:
        path: the file.
        band_order: names of the file's bands; without it the file's band descriptions count,
            and without those a 7-band file without CRS has competition order.
        dataset: the raster as rasterio has opened it, where `path` is none that it could open.

    Raises:
        InputError: the file cannot be read, or its bands cannot be named.
    """

    def __init__(
        self, path: Path | Url, band_order: Sequence[str] = (), dataset: Any = None
    ) -> None:
        self.path = path
        self.qa_bits = bands.QA_PIXEL_BAD
        self._dataset = open_dataset(path) if dataset is None else dataset
        try:
            self.names = _band_names(self._dataset, path, band_order)
        except (InputError, ConfigError):
            self._dataset.close()
            raise
        self.shape: Shape = (self._dataset.height, self._dataset.width)
        self.georeference = georeference_from(self._dataset)
        self._told_of_dem = False
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
    def size(self) -> SceneSize:
        """What reading it will take."""
        height, width = self._dataset.block_shapes[0]
        stored = sum(np.dtype(kind).itemsize for kind in self._dataset.dtypes)
        return SceneSize(self.shape, (height, width), stored)

    @property
    def reading(self) -> dict[str, object]:
        """How the stored values are understood; other files than the scene's own may tell it."""
        place = self.georeference
        return {
            "bands": self.names,
            "nodata": [[str(value) for value in values] for values in self._nodata],
            "crs": place.crs.to_wkt() if place.crs else None,
            "transform": list(place.transform) if place.transform else None,
        }

    @property
    def descriptions(self) -> tuple[str | None, ...]:
        """The band descriptions of the file."""
        return tuple(self._dataset.descriptions)

    def require(self, names: Sequence[str]) -> None:
        """`check`, and one line of notice, given once, where the DEM is missing."""
        self.check(names)
        if "DEM" in names and "DEM" not in self.names and not self._told_of_dem:
            self._told_of_dem = True
            log.warning("%s: no DEM band; elevation is taken as unknown", self.path)

    def check(self, names: Sequence[str] = ()) -> None:
        """Raise `InputError` unless the file holds all the named bands, and enough to see by.

        Whatever the names, it must hold NIR and two more optical bands: without them no pixel
        counts as observed. A missing DEM is allowed: it is unknown everywhere.
        """
        absent = [name for name in names if name not in self.names and name != "DEM"]
        unseen = [name for name in OPTICAL if name not in self.names]
        reason = ""
        if not absent and ("NIR" in unseen or len(OPTICAL) - len(unseen) < FEWEST_OPTICAL):
            absent = ["NIR"] if "NIR" in unseen else unseen
            reason = f" (a pixel is observed with NIR and {FEWEST_OPTICAL - 1} more optical bands)"
        if absent:
            raise InputError(
                f"{self.path}: lacks the band {', '.join(absent)}{reason}; "
                f"it holds {', '.join(self.present)} (name them with --band_order)"
            )

    def read(self, tile: Tile | None = None) -> NDArray[np.float32]:
        """Read a window that lies inside the scene (default: all) as a canonical array."""
        return self._canonical(self._read(self._indexes, tile))

    def sample(self, side: int) -> NDArray[np.float32]:
        """At most `side` x `side` pixels spread over the scene, as a canonical array.

        Small windows on a regular grid: a large file is not decoded as a whole for them.
        """
        rows, columns = (_spread(length, side) for length in self.shape)
        return np.concatenate(
            [
                np.concatenate(
                    [self.read(Tile(y, x, bottom - y, right - x)) for x, right in columns], axis=2
                )
                for y, bottom in rows
            ],
            axis=1,
        )

    def read_stored(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The whole scene twice, decoded once: as stored, and as a canonical array.

        The first has the file's type and all its bands, also those kelp does not know.
        """
        stored = self._read(list(self._dataset.indexes), None)
        return stored, self._canonical([stored[index - 1] for index in self._indexes])

    def _read(self, indexes: list[int], tile: Tile | None) -> NDArray[Any]:
        window = Window(tile.x, tile.y, tile.width, tile.height) if tile else None
        with quietly(self.path):
            raw: NDArray[Any] = self._dataset.read(indexes, window=window)
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
            out[bands.QA] = bands.decode_qa(out[bands.QA], self.qa_bits)
        return out


def _spread(length: int, count: int) -> list[tuple[int, int]]:
    """Begins and ends of pieces with `count` pixels in all, spread over an axis; or all of it."""
    if length <= count:
        return [(0, length)]
    pieces = min(8, count)
    piece = count // pieces
    starts = np.linspace(0, length - piece, pieces).astype(int).tolist()
    return [(start, start + piece) for start in starts]


def read_scene(path: Path, band_order: Sequence[str] = ()) -> NDArray[np.float32]:
    """A whole scene as a canonical array, shape `(7, height, width)`."""
    with Scene(path, band_order) as scene:
        return scene.read()


def _band_names(dataset: Any, path: Path | Url, band_order: Sequence[str]) -> tuple[str, ...]:
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
