"""What "not observed" looks like: the one place that decides it, for files and arrays.

A stored value of a band is missing where

- a nodata tag names it, it is NaN, or it is -32768; in optical bands of unsigned files without a
  tag also where it is 0 (in QA and DEM 0 is a value, whatever a file-wide tag says);
- a mask band says so (GDAL's internal masks, `.msk` files, masks of single bands), or an alpha
  band is 0;
- all optical bands of the pixel hold one value that no surface has (`fillers`).

Elevations and cloud masks are unknown where any of the first two says so.

A pixel of a scene is observed where enough of its bands are left and QA does not speak against
it (`observed`). A pixel of a mask or of probabilities is observed where its value is not missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError
from kelp.raster.bands import (
    BANDS,
    FEWEST_OPTICAL,
    NIR,
    NODATA,
    OPTICAL,
    QA,
    QA_PIXEL_BAD,
    parse_bands,
)

_LARGEST: Final = 1e30
"""No band holds such numbers: floats beyond are the type's extremes, in whatever rounding."""


def nodata_values(tag: float | None, dtype: str, name: str) -> tuple[float, ...]:
    """The stored values of a scene's band that mean "missing"; NaN always does."""
    if name in ("QA", "DEM"):
        return (NODATA,) if tag in (None, 0) else (NODATA, tag)
    if tag is not None:
        return (NODATA, tag)
    return (NODATA, 0) if dtype.startswith("uint") else (NODATA,)


class MaskBands:
    """What mask bands and alpha bands of a dataset say about some of its bands.

    Args:
        dataset: opened with rasterio.
        indexes: the bands, numbered from 1. One of them is data, even where GDAL takes it for
            alpha, as it does with the fourth band of plain 8 bit files.
    """

    def __init__(self, dataset: Any, indexes: Sequence[int]) -> None:
        self._dataset = dataset
        kinds = [kind.name for kind in dataset.colorinterp]
        self._alpha = [i for i, kind in enumerate(kinds, 1) if kind == "alpha" and i not in indexes]
        self._masked = []
        for index in indexes:
            flags = {flag.name for flag in dataset.mask_flag_enums[index - 1]}
            # "nodata" with "per_dataset": a pixel is missing where all bands hold their values.
            plain = flags in ({"all_valid"}, {"nodata"})
            self._masked.append(not plain and "alpha" not in flags)
        self._shared = all(
            "per_dataset" in {flag.name for flag in dataset.mask_flag_enums[index - 1]}
            for index in indexes
        )
        self._indexes = list(indexes)

    @property
    def present(self) -> bool:
        """Whether there is any."""
        return bool(self._alpha) or any(self._masked)

    @property
    def planes(self) -> list[str]:
        """GDAL's names of the bands that tell where the first of ours is missing."""
        masks = [f"mask,{self._indexes[0]}"] if self._masked[0] else []
        return masks + [str(index) for index in self._alpha]

    def missing(self, window: Any = None) -> NDArray[np.bool_] | None:
        """Where the bands are missing by a mask: bool `(bands, height, width)`, or `None`.

        `window` is rasterio's. Reads the file: errors are rasterio's.
        """
        if not self.present:
            return None
        read = self._dataset.read
        outside = [read(index, window=window) == 0 for index in self._alpha]
        everywhere = np.logical_or.reduce(outside) if outside else None
        planes: list[NDArray[np.bool_] | None] = []
        for index, masked in zip(self._indexes, self._masked, strict=True):
            if masked and self._shared and planes and planes[0] is not None:
                planes.append(planes[0])
                continue
            plane = self._dataset.read_masks(index, window=window) == 0 if masked else everywhere
            if masked and everywhere is not None:
                plane = plane | everywhere
            planes.append(plane)
        shape = next(plane.shape for plane in planes if plane is not None)
        return np.stack([np.zeros(shape, np.bool_) if p is None else p for p in planes])


def masked_as(dataset: Any, void: float) -> str | None:
    """A VRT of the first band in which what masks hide is `void`; `None` where there are none.

    For warping: of a file with a mask or alpha band *and* a nodata tag GDAL heeds one of the two.

    Args:
        dataset: opened with rasterio.
        void: the number that means "missing" in the band itself.
    """
    text: str | None = None
    for plane in MaskBands(dataset, [1]).planes:
        name = dataset.name if text is None else text
        hidden = _vrt(dataset, f"<SimpleSource>{_source(name, '1')}</SimpleSource>", void, plane)
        shown = f"{_source(hidden, '1')}<UseMaskBand>true</UseMaskBand>"
        text = _vrt(dataset, f"<ComplexSource>{shown}</ComplexSource>", void)
    return text


def _vrt(dataset: Any, source: str, void: float, plane: str = "") -> str:
    numbers = ", ".join(repr(float(value)) for value in dataset.transform.to_gdal())
    mask = f"<SimpleSource>{_source(dataset.name, plane)}</SimpleSource>" if plane else ""
    return "".join(
        (
            f'<VRTDataset rasterXSize="{dataset.width}" rasterYSize="{dataset.height}">',
            f"<SRS>{escape(dataset.crs.to_wkt(), quote=False)}</SRS>" if dataset.crs else "",
            f"<GeoTransform>{numbers}</GeoTransform>",
            '<VRTRasterBand dataType="Float64" band="1">',
            f"<NoDataValue>{float(void)!r}</NoDataValue>{source}</VRTRasterBand>",
            f'<MaskBand><VRTRasterBand dataType="Byte">{mask}</VRTRasterBand></MaskBand>'
            if plane
            else "",
            "</VRTDataset>",
        )
    )


def _source(name: str, band: str) -> str:
    return (
        f'<SourceFilename relativeToVRT="0">{escape(name, quote=False)}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand>"
    )


def fillers(optical: Sequence[NDArray[Any]]) -> NDArray[np.bool_] | None:
    """Where all optical bands hold one value that no surface has; `None` = nowhere.

    On the scale of Landsat Collection 2 these are zero and negative numbers (-9999 among them),
    and the extremes of the type. One band of a dark pixel may be zero, not all of them.

    Args:
        optical: the optical bands of a scene as stored, each `(height, width)`.
    """
    if len(optical) < FEWEST_OPTICAL:
        return None
    first, *others = optical
    suspect = first <= 0
    if np.issubdtype(first.dtype, np.integer):
        suspect |= first == np.iinfo(first.dtype).max
    else:
        suspect |= first >= _LARGEST
    for other in others:
        if not suspect.any():
            return None
        suspect &= other == first
    return suspect if suspect.any() else None


def missing_values(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    """Where a band without further meaning (a mask, probabilities) is missing by its values."""
    if values.dtype.kind != "f":
        return np.zeros(values.shape, np.bool_) if nodata is None else np.equal(values, nodata)
    missing: NDArray[np.bool_] = np.isnan(values)
    if nodata is not None:
        missing |= values == values.dtype.type(nodata)
    return missing


def canonical(pixels: NDArray[np.generic], names: Sequence[str] = BANDS) -> NDArray[np.float32]:
    """Turn a plain array of raw values into a canonical array.

    `pixels` has shape `(len(names), height, width)`; NaN, -32768 and `fillers` mean missing. Bands
    that are not named are missing everywhere, except QA, which is then 0 (nothing known to be bad).
    """
    names = parse_bands(names)
    if pixels.ndim != 3 or len(pixels) != len(names):
        raise ConfigError(
            f"an array of shape {pixels.shape} does not hold {len(names)} bands, {','.join(names)}"
        )
    out = np.full((len(BANDS), *pixels.shape[1:]), np.nan, dtype=np.float32)
    out[QA] = 0
    with np.errstate(over="ignore"):  # the lowest float64 is one of the fillers
        for name, plane in zip(names, pixels, strict=True):
            out[BANDS.index(name)] = plane
    out[out == NODATA] = np.nan
    filled = fillers([plane for name, plane in zip(names, pixels, strict=True) if name in OPTICAL])
    if filled is not None:
        out[: len(OPTICAL), filled] = np.nan
    if "QA" in names:
        out[QA] = decode_qa(out[QA])
    return out


def decode_qa(values: NDArray[np.float32], bits: int = QA_PIXEL_BAD) -> NDArray[np.float32]:
    """QA as 0 = good, 1 = cloud or bad pixel; unknown QA is bad.

    A band with values above 1 is Landsat's QA_PIXEL, of which the given bits are bad: by default
    fill, dilated cloud, cirrus, cloud, shadow and snow.
    """
    missing = ~np.isfinite(values)
    if missing.all():
        return np.ones_like(values)
    known = np.where(missing, 0, values) if missing.any() else values
    if known.max() > 1:
        known = (known.astype(np.int64) & bits) != 0
    bad: NDArray[np.bool_] = missing | (known != 0)
    return bad.astype(np.float32)


def observed(pixels: NDArray[np.float32], qa_as_nodata: bool = True) -> NDArray[np.bool_]:
    """Where a canonical array really shows the ground: bool, shape `(height, width)`.

    Not observed means NIR missing, or fewer than three of the five optical bands present,
    or (with `qa_as_nodata`) QA = 1. The DEM never decides.
    """
    # Bytes added band by band: several times faster than one sum over the bands.
    count = np.zeros(pixels.shape[1:], dtype=np.uint8)
    for band in pixels[: len(OPTICAL)]:
        count += np.isfinite(band)
    seen: NDArray[np.bool_] = np.isfinite(pixels[NIR])
    seen &= count >= FEWEST_OPTICAL
    if qa_as_nodata:
        seen &= pixels[QA] != 1
    return seen
