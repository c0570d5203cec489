"""Band names, and their order in competition files and in canonical arrays.

Inside kelp every scene is a **canonical array**: float32, shape `(7, height, width)`, bands in
`BANDS` order, values as stored in the file (Landsat Collection-2 Level-2 integers, QA as 0/1, DEM
in metres), NaN = missing. `kelp.raster.scene` makes such arrays from files; nothing downstream
sees a nodata number. What counts as missing is said in `kelp.raster.validity`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

from kelp.errors import ConfigError

# The command line needs the names only, and `--help` should not wait for numpy.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BANDS: Final = ("SWIR", "NIR", "R", "G", "B", "QA", "DEM")
"""Order of the bands in competition files and in every canonical array."""

OPTICAL: Final = ("SWIR", "NIR", "R", "G", "B")
FEWEST_OPTICAL: Final = 3
"""With fewer optical values than these, NIR among them, a pixel does not count as observed."""

NODATA: Final = -32768
"""Missing value of competition files, also where no tag says so."""

MASK_NODATA: Final = 255
"""Value of "not observed" in masks; 0 = no kelp, 1 = kelp."""

REFLECTANCE_SCALE: Final = 2.75e-5
REFLECTANCE_OFFSET: Final = -0.2
"""Landsat Collection 2 Level 2: reflectance = DN * 2.75e-5 - 0.2 (USGS, LSDS-1619)."""

IndexInput = Literal["reflectance", "dn"]
"""What spectral indices are computed on: surface reflectance, or raw integers."""

Anchoring = Literal["none", "constant", "local"]
"""Optical bands as they are; shifted by one number a scene and band; or by a smooth field."""

PIXEL_SIZE_M: Final = 30.0
"""Side of a Landsat pixel in metres, assumed where a raster has no CRS."""

_SWIR, NIR, _R, _G, _B, QA, DEM = range(7)

# Landsat Collection-2 QA_PIXEL bits (USGS LSDS-1618, LSDS-1619): fill, dilated cloud, cirrus,
# cloud, cloud shadow, snow. Bits 6 and 7 (clear, water) are set on good pixels.
QA_PIXEL_BAD: Final = 0b0011_1111


def position(band: str) -> int:
    """Index of `band` in a canonical array."""
    return BANDS.index(parse_bands([band])[0])


def parse_bands(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical spelling of band names. Raises `ConfigError` for an unknown or repeated one."""
    parsed = tuple(name.strip().upper() for name in names)
    for name in parsed:
        if name not in BANDS:
            raise ConfigError(f"unknown band {name!r}: choose from {', '.join(BANDS)}")
        if parsed.count(name) > 1:
            raise ConfigError(f"band {name} is named twice")
    return parsed


def reflected(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """`pixels`, shape `(…, h, w)`, grown to at least `height` x `width` by their mirror image.

    It is added below and to the right. So a scene smaller than a tile fills the tile, in
    training as in prediction.
    """
    import numpy as np

    short = [
        max(0, want - have) for want, have in zip((height, width), pixels.shape[-2:], strict=True)
    ]
    if not any(short):
        return pixels
    return np.pad(pixels, [(0, 0)] * (pixels.ndim - 2) + [(0, n) for n in short], mode="reflect")


def to_reflectance(dn: NDArray[np.float32]) -> NDArray[np.float32]:
    """Surface reflectance of Collection-2 Level-2 integers (0-1 over most surfaces)."""
    import numpy as np

    return dn * np.float32(REFLECTANCE_SCALE) + np.float32(REFLECTANCE_OFFSET)
