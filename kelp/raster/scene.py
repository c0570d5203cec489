"""Scenes: multi-band rasters, read by windows as canonical arrays.

Reading turns every spelling of "missing" (`kelp.raster.validity`) into NaN, so that nothing
downstream sees a nodata number.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError, InputError
from kelp.io.location import Url
from kelp.raster import bands, validity
from kelp.raster.bands import BANDS, DEM, FEWEST_OPTICAL, OPTICAL, QA
from kelp.raster.masks import (
    descriptions_of,
    georeference_from,
    open_dataset,
    quietly,
    refuse_complex,
    sources_of,
)
from kelp.raster.window import RasterSource, Shape, Tile

log = logging.getLogger("kelp")

_reported: Final[set[str]] = set()
"""Files with untagged fillers of which this process has given notice."""


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
        height, width = self.block
        across = -(-self.shape[1] // width) * width
        return height * across * self.stored


class Stored(NamedTuple):
    """A whole scene as its file has it, and as a canonical array."""

    values: NDArray[Any]
    """All bands, also those kelp does not know, `(bands, height, width)` in the file's type."""
    hidden: NDArray[np.bool_] | None
    """Which of them are missing though no nodata value says so: masks, alpha, fillers."""
    pixels: NDArray[np.float32]
    """The canonical array."""


class Scene:
    """A multi-band raster, read by windows as canonical arrays. A context manager.

    Args:
        path: the file.
        band_order: names of the file's bands (an alpha band may be left out); without it the
            file's band descriptions count, and without those a 7-band file without CRS has
            competition order.
        dataset: the raster as rasterio has opened it, where `path` is none that it could open.
        quiet: give no notice of untagged fillers: for those who read many windows.

    Raises:
        InputError: the file cannot be read, or its bands cannot be named.
    """

    def __init__(
        self,
        path: Path | Url,
        band_order: Sequence[str] = (),
        dataset: Any = None,
        quiet: bool = False,
    ) -> None:
        self.path = path
        self.qa_bits = bands.QA_PIXEL_BAD
        self._is_file = dataset is None and isinstance(path, Path)
        self._dataset = open_dataset(path) if dataset is None else dataset
        try:
            refuse_complex(self._dataset, path)
            self._described = descriptions_of(self._dataset)
            self.names = _band_names(self._dataset, self._described, path, band_order)
        except (InputError, ConfigError):
            self._dataset.close()
            raise
        self.shape = Shape(self._dataset.height, self._dataset.width)
        self.georeference = georeference_from(self._dataset)
        self._quiet = quiet
        self._reported_dem = False
        self._pixels_read = 0
        self._fillers: Counter[float] = Counter()
        self._indexes = [i + 1 for i, name in enumerate(self.names) if name]
        self._targets = [BANDS.index(name) for name in self.names if name]
        self._masks = validity.MaskBands(self._dataset, self._indexes)
        self._nodata = [
            validity.nodata_values(
                self._dataset.nodatavals[index - 1], self._dataset.dtypes[index - 1], BANDS[target]
            )
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
        self._report_fillers()

    @property
    def present(self) -> tuple[str, ...]:
        """The known bands that the file holds, in canonical order."""
        return tuple(name for name in BANDS if name in self.names)

    @property
    def dtype(self) -> str:
        """Type of the stored values; of bands of several types, one that holds them all."""
        return str(np.result_type(*self._dataset.dtypes))

    @property
    def nodata(self) -> float | None:
        """The nodata tag of the file, if it has one."""
        tag: float | None = self._dataset.nodata
        return tag

    @property
    def size(self) -> SceneSize:
        """What reading it will take."""
        stored = sum(np.dtype(kind).itemsize for kind in self._dataset.dtypes)
        return SceneSize(self.shape, self.block, stored)

    @property
    def block(self) -> Shape:
        """Height and width of the blocks in which it is stored."""
        return Shape(*self._dataset.block_shapes[0])

    @property
    def reading(self) -> dict[str, object]:
        """How the stored values are understood; other files than the scene's own may tell it."""
        reference = self.georeference
        reading: dict[str, object] = {
            "bands": self.names,
            "nodata": [[str(value) for value in values] for values in self._nodata],
            "crs": reference.crs.to_wkt() if reference.crs else None,
            "transform": list(reference.transform) if reference.transform else None,
        }
        if self._is_file and (sources := sources_of(self._dataset, Path(str(self.path)))):
            reading["sources"] = sources
        return reading

    @property
    def descriptions(self) -> tuple[str | None, ...]:
        """The band descriptions of the file; what is not UTF-8 in them is replaced by �."""
        return self._described

    def require(self, names: Sequence[str]) -> None:
        """`check`, and one line of notice, given once, where the DEM is missing."""
        self.check(names)
        if "DEM" in names and "DEM" not in self.names and not self._reported_dem:
            self._reported_dem = True
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
        raw, hidden = self._read(tile)
        filled = self._find_fillers(raw)
        pixels = self._canonical(raw, hidden)
        if filled is not None:
            self._note(raw, pixels, filled)
        self._pixels_read += pixels[0].size
        return pixels

    def read_elevation(self, tile: Tile) -> NDArray[np.float32]:
        """The DEM band alone, of a window, `(height, width)`, in metres; NaN = unknown."""
        if DEM not in self._targets:
            return np.full((tile.height, tile.width), np.nan, dtype=np.float32)
        k = self._targets.index(DEM)
        with quietly(self.path):
            values = self._planes([self._indexes[k]], tile.window)[0]
            hidden = self._masks.missing(tile.window)
        missing = np.isin(values, self._nodata[k])
        if hidden is not None:
            missing |= hidden[k]
        return np.where(missing, np.float32(np.nan), values.astype(np.float32))

    def sample(self, side: int) -> NDArray[np.float32]:
        """`sample_of` the scene; what fillers it holds is not reported."""
        counted = self._pixels_read, self._fillers.copy()
        sampled = sample_of(self, side)
        self._pixels_read, self._fillers = counted  # a share of a sample is nobody's business
        return sampled

    def read_stored(self) -> Stored:
        """The whole scene as stored and as a canonical array, decoded once."""
        everything = list(self._dataset.indexes)
        with quietly(self.path):
            planes = self._planes(everything, None)
            hidden = validity.MaskBands(self._dataset, self._indexes).missing()
        raw = [planes[index - 1] for index in self._indexes]
        filled = self._find_fillers(raw)
        pixels = self._canonical(raw, hidden)
        missing = np.zeros((len(planes), *self.shape), dtype=np.bool_)
        known = [index - 1 for index in self._indexes]
        if hidden is not None:
            missing[known] = hidden
        if len({*zip(self._dataset.nodatavals, self._dataset.dtypes, strict=True)}) > 1:
            # Each band has a rule of its own, and a file of one type has only one.
            for index, values in zip(known, self._nodata, strict=True):
                missing[index] |= np.isin(planes[index], values)
        if filled is not None:
            self._note(raw, pixels, filled)
            missing[[i for i, name in enumerate(self.names) if name in OPTICAL]] |= filled
        self._pixels_read += pixels[0].size
        stored = np.stack([plane.astype(self.dtype, copy=False) for plane in planes])
        return Stored(stored, missing if missing.any() else None, pixels)

    def _read(self, tile: Tile | None) -> tuple[list[NDArray[Any]], NDArray[np.bool_] | None]:
        """The known bands as stored, and where masks hide them."""
        window = tile.window if tile else None
        with quietly(self.path):
            return self._planes(self._indexes, window), self._masks.missing(window)

    def _planes(self, indexes: list[int], window: Any) -> list[NDArray[Any]]:
        if len({self._dataset.dtypes[index - 1] for index in indexes}) == 1:
            return list(self._dataset.read(indexes, window=window))
        return [self._dataset.read(index, window=window) for index in indexes]

    def _find_fillers(self, raw: Sequence[NDArray[Any]]) -> NDArray[np.bool_] | None:
        planes = zip(raw, self._targets, strict=True)
        return validity.fillers([values for values, target in planes if BANDS[target] in OPTICAL])

    def _canonical(
        self, raw: Sequence[NDArray[Any]], hidden: NDArray[np.bool_] | None
    ) -> NDArray[np.float32]:
        out = np.empty((len(BANDS), *raw[0].shape), dtype=np.float32)
        for target in range(len(BANDS)):
            if target not in self._targets:
                out[target] = 0 if target == QA else np.nan
        for i, (values, target, nodata) in enumerate(
            zip(raw, self._targets, self._nodata, strict=True)
        ):
            plane = out[target]
            with np.errstate(over="ignore"):  # lowest float64: a filler
                plane[...] = values
            for value in nodata:
                missing = values == value
                # Most windows hold none of it, others nothing else: a masked copy takes longest.
                if missing.all():
                    plane.fill(np.nan)
                elif missing.any():
                    np.copyto(plane, np.nan, where=missing)
            if hidden is not None:
                np.copyto(plane, np.nan, where=hidden[i])
        if QA in self._targets:
            out[QA] = validity.decode_qa(out[QA], self.qa_bits)
        return out

    def _note(
        self, raw: Sequence[NDArray[Any]], pixels: NDArray[np.float32], filled: NDArray[np.bool_]
    ) -> None:
        """Make fillers missing, and count those that no tag or mask names."""
        optical = pixels[: len(OPTICAL)]
        unnamed = filled & ~np.isnan(optical).all(axis=0)
        if not unnamed.any():  # as in most files: the others are missing already
            return
        optical[:, unnamed] = np.nan
        first = next(
            values for values, t in zip(raw, self._targets, strict=True) if BANDS[t] in OPTICAL
        )
        values, counts = np.unique(first[unnamed], return_counts=True)
        self._fillers.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def _report_fillers(self) -> None:
        if self._quiet or not self._fillers or str(self.path) in _reported:
            return
        _reported.add(str(self.path))
        share = self._fillers.total() / self._pixels_read
        log.warning(
            "%s: %.3g %% of the pixels hold %g in all optical bands, which no nodata tag names; "
            "they count as not observed",
            self.path,
            100 * share,
            self._fillers.most_common(1)[0][0],
        )


def sample_of(source: RasterSource, side: int) -> NDArray[np.float32]:
    """At most `side` x `side` pixels spread over a scene, as a canonical array.

    Small windows on a regular grid: a large file is not decoded as a whole for them.
    """
    rows, columns = (_spread(length, side) for length in source.shape)
    return np.concatenate(
        [
            np.concatenate(
                [source.read(Tile(y, x, bottom - y, right - x)) for x, right in columns], axis=2
            )
            for y, bottom in rows
        ],
        axis=1,
    )


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


def _band_names(
    dataset: Any,
    descriptions: Sequence[str | None],
    path: Path | Url,
    band_order: Sequence[str],
) -> tuple[str, ...]:
    """Names of the file's bands; '' for one that kelp does not know."""
    if band_order:
        alpha = [kind.name == "alpha" for kind in dataset.colorinterp]
        if len(band_order) == dataset.count - sum(alpha):
            names = iter(bands.parse_bands(band_order))
            return tuple("" if extra else next(names) for extra in alpha)
        if len(band_order) != dataset.count:
            raise InputError(
                f"{path}: has {dataset.count} bands, --band_order names {len(band_order)}"
            )
        return bands.parse_bands(band_order)
    described = tuple((text or "").strip().upper() for text in descriptions)
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
