"""Sentinel-2 Level 2A products: SAFE folders, on their 20 m grid.

Source: ESA, Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD): file names, the
scene classification (SCL), quantification value and, from baseline 04.00 on, BOA_ADD_OFFSET.

Kelp is often classified as vegetation (4), bare (5) or unclassified (7), and dark water as dark
area (2): of the classes only 0, 1, 3 and 8 to 11 say that a pixel is bad.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from kelp.errors import InputError
from kelp.raster.bands import REFLECTANCE_OFFSET, REFLECTANCE_SCALE
from kelp.sensors.parts import Part, SceneFiles, parse_xml
from kelp.sensors.quality import Flag
from kelp.sensors.record import SceneFacts

_NAME: Final = re.compile(
    r"(?P<unit>S2[A-D])_MSI(?P<level>L1C|L2A)_(?P<time>\d{8}T\d{6})_N(?P<baseline>\d{4})_R\d{3}_"
    r"T(?P<tile>\d{2}[A-Z]{3})_\d{8}T\d{6}",
    re.IGNORECASE,
)
METADATA: Final = "MTD_MSIL2A.xml"

BAND_FILES: Final[Mapping[str, str]] = {
    "B": "B02",
    "G": "B03",
    "R": "B04",
    "NIR": "B8A",
    "SWIR": "B11",
}
_BAND_IDS: Final[Mapping[str, int]] = {"B02": 1, "B03": 2, "B04": 3, "B8A": 8, "B11": 11}
"""Numbers of bands in the list of offsets."""


def _classes(*values: int) -> Flag:
    return Flag("SCL", 0xFF, values)


FLAGS: Final[Mapping[str, Flag]] = {
    "fill": _classes(0),
    "saturated": _classes(1),
    "shadow": _classes(3),
    "cloud": _classes(8, 9),
    "cirrus": _classes(10),
    "snow": _classes(11),
}
DEFAULT_QUALITY: Final = ("fill", "cloud", "cirrus", "shadow", "snow", "saturated")

_LARGEST_METADATA: Final = 1 << 24


def scale_of(quantification: float, offset: float) -> tuple[float, float]:
    """Gain and offset that make Collection 2 integers of stored values, for the same reflectance.

    Reflectance = (value + offset) / quantification; with 10,000 and -1,000 the integers are
    3.6364 x value + 3,636.4.
    """
    gain = 1 / quantification / REFLECTANCE_SCALE
    return gain, offset * gain - REFLECTANCE_OFFSET / REFLECTANCE_SCALE


def is_product(path: Path) -> bool:
    """Whether a folder is a SAFE folder of Sentinel-2, of whatever level."""
    return path.name.upper().endswith(".SAFE") or any(path.glob("MTD_MSIL*.xml"))


def read_product(path: Path) -> SceneFiles:
    """What a SAFE folder holds.

    Raises:
        InputError: level 1C, no metadata, no offset in it where there must be one, a missing band.
    """
    name = path.resolve().name
    named = _NAME.match(name)
    if (path / "MTD_MSIL1C.xml").is_file() or (named and named["level"].upper() == "L1C"):
        raise InputError(
            f"{path}: a Level 1C product, not corrected for the atmosphere; fetch Level 2A"
        )
    metadata = path / METADATA
    if not metadata.is_file():
        raise InputError(
            f"{path}: {METADATA} is missing, which says what must be added to the values; "
            "fetch the product again"
        )
    quantification, offset, baseline, time, product = _metadata(metadata)
    found = {
        file: sorted(path.glob(f"GRANULE/*/IMG_DATA/R20m/*_{file}_20m.jp2"))
        for file in (*BAND_FILES.values(), "SCL")
    }
    for file, places in found.items():
        if len(places) > 1:
            raise InputError(f"{path}: holds {len(places)} files {file} of 20 m, one is wanted")
        if not places and file != "SCL":
            raise InputError(
                f"{path}: the band {file} of 20 m (GRANULE/*/IMG_DATA/R20m) is missing; "
                "fetch the product again"
            )

    def part(role: str, file: str) -> Part:
        place = found[file][0]
        return Part(role, place.relative_to(path).as_posix(), place)

    gain, added = scale_of(quantification, offset)
    return SceneFiles(
        where=path,
        facts=SceneFacts(
            id=re.sub(r"\.SAFE$", "", name, flags=re.IGNORECASE),
            product_id=product,
            sensor="sentinel-2",
            acquired=time,
            level=f"L2A, baseline {baseline}",
            tile=named["tile"].upper() if named else None,
            network_validated=False,
        ),
        bands={band: part(band, file) for band, file in BAND_FILES.items()},
        layers={"SCL": part("SCL", "SCL")} if found["SCL"] else {},
        flags=FLAGS,
        default_quality=DEFAULT_QUALITY,
        metadata=(Part("metadata", METADATA, metadata),),
        gain=gain,
        offset=added,
    )


def _metadata(path: Path) -> tuple[float, float, str, datetime | None, str | None]:
    """Quantification value, offset, baseline, time and name of the product."""
    try:
        if path.stat().st_size > _LARGEST_METADATA:
            raise ValueError("it is too large")
        root = parse_xml(path.read_text(encoding="utf-8"))
        values: dict[str, str] = {}
        offsets: dict[int, float] = {}
        for element in root.iter():
            tag = element.tag.rpartition("}")[2]
            if tag == "BOA_ADD_OFFSET":
                offsets[int(element.get("band_id", "-1"))] = float(element.text or "")
            elif element.text and element.text.strip():
                values.setdefault(tag, element.text.strip())
        quantification = float(values["BOA_QUANTIFICATION_VALUE"])
        baseline = values["PROCESSING_BASELINE"]
        major = float(baseline)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not the metadata of a Level 2A product ({reason}); fetch the product again"
        ) from error
    needed = {file: offsets.get(number) for file, number in _BAND_IDS.items()}
    if all(value is None for value in needed.values()) and major < 4:
        offset = 0.0  # before 2022-01-25 nothing was added
    elif None in needed.values() or len(set(needed.values())) > 1:
        raise InputError(
            f"{path}: baseline {baseline} adds an offset to the values, but the metadata does not "
            "give one for all bands (BOA_ADD_OFFSET); fetch the product again"
        )
    else:
        offset = float(next(value for value in needed.values() if value is not None))
    return quantification, offset, baseline, _time(values), values.get("PRODUCT_URI")


def _time(values: Mapping[str, str]) -> datetime | None:
    text = values.get("PRODUCT_START_TIME", "")
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
