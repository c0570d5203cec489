"""HLS v2.0 granules (Harmonized Landsat Sentinel-2), L30 and S30.

Source: NASA LP DAAC, HLS v2.0 User Guide: file names, bands, scale, fill, bits of Fmask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from kelp.errors import InputError
from kelp.io.location import Url
from kelp.raster.bands import REFLECTANCE_OFFSET, REFLECTANCE_SCALE
from kelp.sensors.parts import Part, SceneFiles
from kelp.sensors.quality import Flag
from kelp.sensors.record import SceneFacts

_NAME: Final = re.compile(
    r"(?P<granule>HLS\.(?P<kind>[LS]30)\.T(?P<tile>\d{2}[A-Z]{3})\.(?P<time>\d{7}T\d{6})\."
    r"v(?P<version>\d+\.\d+))\.(?P<layer>\w+)\.tiff?",
    re.IGNORECASE,
)

BAND_FILES: Final[Mapping[str, Mapping[str, str]]] = {
    "L30": {"B": "B02", "G": "B03", "R": "B04", "NIR": "B05", "SWIR": "B06"},
    # B8A, the narrow near infrared, is the one that HLS harmonises with Landsat's.
    "S30": {"B": "B02", "G": "B03", "R": "B04", "NIR": "B8A", "SWIR": "B11"},
}
"""The file `….<this>.tif` of each optical band."""

_FILL: Final = Flag("Fmask", 0xFF, (0xFF,))


def _bit(number: int) -> Flag:
    """A bit of Fmask, which says nothing where all are set: that is fill."""
    values = tuple(v for v in range(255) if v & 1 << number)
    return Flag("Fmask", 0xFF, values)


FLAGS: Final[Mapping[str, Flag]] = {
    "fill": _FILL,
    "cirrus": _bit(0),
    "cloud": _bit(1),
    "dilated_cloud": _bit(2),  # "adjacent to cloud or shadow"
    "shadow": _bit(3),
    "snow": _bit(4),
    "high_aerosol": Flag("Fmask", 0xFF, tuple(v for v in range(255) if v >> 6 == 3)),
}
DEFAULT_QUALITY: Final = ("fill", "cloud", "dilated_cloud", "cirrus", "shadow", "snow")

_SCALE: Final = 0.0001
GAIN: Final = _SCALE / REFLECTANCE_SCALE
OFFSET: Final = -REFLECTANCE_OFFSET / REFLECTANCE_SCALE
"""Collection 2 integer = HLS value x GAIN + OFFSET (3.6364 and 7272.7): same reflectance."""
_FILL_VALUE: Final = -9999


def is_band(name: str) -> bool:
    """Whether a file is a raster of an HLS granule."""
    return _NAME.fullmatch(name) is not None


def read_product(where: Path | Url, files: Mapping[str, Part]) -> SceneFiles:
    """What the files of a granule hold, by their names.

    Raises:
        InputError: files of two granules, another version, a band that is missing.
    """
    granules: dict[str, dict[str, Part]] = {}
    for name, part in files.items():
        if found := _NAME.fullmatch(name):
            granules.setdefault(found["granule"], {})[found["layer"].upper()] = part
    if len(granules) != 1:
        names = " and ".join(sorted(granules)[:2]) or "none"
        raise InputError(
            f"{where}: holds bands of {len(granules)} HLS granules ({names}); "
            "give each granule a folder of its own"
        )
    granule, layers = next(iter(granules.items()))
    parts = _NAME.fullmatch(f"{granule}.B02.tif")
    if parts is None or parts["version"] != "2.0":
        raise InputError(f"{where}: {granule} is not of HLS version 2.0, which kelp reads")
    kind = parts["kind"].upper()
    missing = [layer for layer in BAND_FILES[kind].values() if layer not in layers]
    if missing:
        raise InputError(
            f"{where}: {', '.join(f'{granule}.{layer}.tif' for layer in missing)} is missing; "
            "fetch the granule again"
        )
    fmask = {"Fmask": replace(layers["FMASK"], role="Fmask")} if "FMASK" in layers else {}
    return SceneFiles(
        where=where,
        facts=SceneFacts(
            id=granule,
            product_id=granule,
            sensor=f"hls-{kind.lower()}",
            acquired=datetime.strptime(parts["time"], "%Y%jT%H%M%S").replace(tzinfo=UTC),
            level="L2A",
            tile=parts["tile"].upper(),
            network_validated=False,
        ),
        bands={band: replace(layers[layer], role=band) for band, layer in BAND_FILES[kind].items()},
        layers=fmask,
        flags=FLAGS,
        default_quality=DEFAULT_QUALITY,
        dtype="Int16",
        nodata=_FILL_VALUE,
        gain=GAIN,
        offset=OFFSET,
    )
