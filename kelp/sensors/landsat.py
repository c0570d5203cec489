"""Landsat Collection 2 Level 2 products: their names, bands, metadata and quality bits.

Sources: USGS LSDS-1618 (Landsat 4-7 Collection 2 Level 2 Science Product Guide) and LSDS-1619
(Landsat 8-9): file names, bands, scale and offset, fill, QA_PIXEL, QA_RADSAT, SR_QA_AEROSOL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from kelp.errors import InputError
from kelp.io.files import parse_json
from kelp.io.location import Url
from kelp.raster.bands import REFLECTANCE_OFFSET, REFLECTANCE_SCALE
from kelp.sensors.parts import Part, SceneFiles, parse_xml
from kelp.sensors.quality import Flag
from kelp.sensors.record import SceneFacts

_NAME: Final = re.compile(
    r"(?P<mission>L[COTEM])(?P<satellite>\d\d)_(?P<level>L[12][A-Z]{2})_(?P<path>\d{3})(?P<row>\d{3})_"
    r"(?P<acquired>\d{8})_(?P<processed>\d{8})_(?P<collection>\d\d)_(?P<tier>T1|T2|RT|A1|A2)"
    r"(?:_(?P<rest>[\w.]+))?",
    re.IGNORECASE,
)
_PRODUCT: Final = re.compile(
    r"L[COTEM]\d\d_L[12][A-Z]{2}_\d{6}_\d{8}_\d{8}_\d\d_(?:T1|T2|RT|A1|A2)(?![A-Za-z0-9])"
)
_RASTER: Final = re.compile(
    r"(SR_|ST_|QA_|BQA|B\d|VAA|VZA|SAA|SZA|pixel_qa|radsat_qa|sr_|bt_)[\w]*\.tiff?", re.IGNORECASE
)
"""What stands after a product's name in the names of its rasters, of every level."""

_OLI: Final = {"B": "B2", "G": "B3", "R": "B4", "NIR": "B5", "SWIR": "B6"}
_TM: Final = {"B": "B1", "G": "B2", "R": "B3", "NIR": "B4", "SWIR": "B5"}
BAND_FILES: Final[Mapping[int, Mapping[str, str]]] = {4: _TM, 5: _TM, 7: _TM, 8: _OLI, 9: _OLI}
"""The file `…_SR_<this>.TIF` of each optical band, by satellite."""

# Bit of QA_PIXEL, LSDS-1618 table 5-3 and LSDS-1619 table 6-2. Satellites 4 to 7 have no cirrus.
_PIXEL: Final = {
    "fill": Flag("QA_PIXEL", 1 << 0),
    "dilated_cloud": Flag("QA_PIXEL", 1 << 1),
    "cirrus": Flag("QA_PIXEL", 1 << 2),
    "cloud": Flag("QA_PIXEL", 1 << 3),
    "shadow": Flag("QA_PIXEL", 1 << 4),
    "snow": Flag("QA_PIXEL", 1 << 5),
}
_OLI_FLAGS: Final = {
    **_PIXEL,
    "saturated": Flag("QA_RADSAT", 0b0011_1110),  # B2 to B6, which kelp reads
    "occluded": Flag("QA_RADSAT", 1 << 11),
    "high_aerosol": Flag("SR_QA_AEROSOL", 0b1100_0000, (0b1100_0000,)),
}
_TM_FLAGS: Final = {
    **{name: flag for name, flag in _PIXEL.items() if name != "cirrus"},
    "saturated": Flag("QA_RADSAT", 0b0001_1111),  # B1 to B5
    "dropped": Flag("QA_RADSAT", 1 << 9),
}
FLAGS: Final[Mapping[int, Mapping[str, Flag]]] = {
    4: _TM_FLAGS,
    5: _TM_FLAGS,
    7: _TM_FLAGS,
    8: _OLI_FLAGS,
    9: _OLI_FLAGS,
}
"""The quality bits of each satellite."""
DEFAULT_QUALITY: Final = ("fill", "dilated_cloud", "cirrus", "cloud", "shadow", "snow")

QUALITY_FILES: Final = ("QA_PIXEL", "QA_RADSAT", "SR_QA_AEROSOL")
METADATA_FILES: Final = ("MTL.json", "MTL.txt", "MTL.xml")
"""In the order in which they are looked for."""

_CONTENTS: Final[Mapping[str, str]] = {
    **{f"FILE_NAME_BAND_{number}": f"SR_B{number}.TIF" for number in range(1, 8)},
    "FILE_NAME_QUALITY_L1_PIXEL": "QA_PIXEL.TIF",
    "FILE_NAME_QUALITY_L1_RADIOMETRIC_SATURATION": "QA_RADSAT.TIF",
    "FILE_NAME_QUALITY_L2_AEROSOL": "SR_QA_AEROSOL.TIF",
}
"""Where an MTL file of Level 2 names each file, and what stands in its name after the product's."""

_LARGEST_METADATA: Final = 1 << 20


@dataclass(frozen=True)
class ProductName:
    """A Landsat product, as its file names say."""

    text: str
    satellite: int
    level: str
    path: int
    row: int
    acquired: date
    processed: str
    collection: str
    tier: str

    @property
    def scene(self) -> tuple[int, int, int, date]:
        """What two processings of one scene have in common."""
        return self.satellite, self.path, self.row, self.acquired

    @property
    def facts(self) -> SceneFacts:
        """What the name says of the scene."""
        return SceneFacts(
            id=self.text,
            product_id=self.text,
            sensor=f"landsat-{self.satellite}",
            acquired=self.acquired,
            level=self.level,
            tier=self.tier,
            wrs_path=self.path,
            wrs_row=self.row,
        )


def parse_name(name: str) -> tuple[ProductName, str] | None:
    """The product that a file or folder belongs to, and which file of it; None = not Landsat's.

    `LC08_L2SP_008059_20191201_20200825_02_T1_SR_B5.TIF` is `SR_B5.TIF` of its product.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    rest = parts["rest"] or ""
    text = name[: -len(rest) - 1] if rest else name
    try:
        acquired = datetime.strptime(parts["acquired"], "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        return None
    product = ProductName(
        text=text.upper(),
        satellite=int(parts["satellite"]),
        level=parts["level"].upper(),
        path=int(parts["path"]),
        row=int(parts["row"]),
        acquired=acquired,
        processed=parts["processed"],
        collection=parts["collection"],
        tier=parts["tier"].upper(),
    )
    return product, rest


def parse_prefix(name: str) -> ProductName | None:
    """The product whose name a text begins with; None = it does not."""
    found = _PRODUCT.match(name)
    parsed = parse_name(found[0]) if found else None
    return parsed[0] if parsed else None


def is_band(name: str) -> bool:
    """Whether a file is a raster of a Landsat product, of whatever level and collection."""
    parsed = parse_name(name)
    return parsed is not None and bool(_RASTER.fullmatch(parsed[1]))


def read_product(where: Path | Url, files: Mapping[str, Part]) -> SceneFiles:
    """What the files of a product hold, by their names; the MTL file says when, and must agree.

    Args:
        where: the folder, archive or item, for messages.
        files: each file by its name; those of other makers are passed over.

    Raises:
        InputError: level 1, Collection 1, files of two products, a band that is missing, metadata
            of another product, another scale.
    """
    product, rests = _sorted(where, renamed(where, files) or files)
    check_product(str(where), product)
    names = {band: f"sr_{file.lower()}.tif" for band, file in BAND_FILES[product.satellite].items()}
    missing = [name for name in names.values() if name not in rests]
    if missing:
        listed = ", ".join(f"{product.text}_{name.upper()}" for name in missing)
        raise InputError(f"{where}: {listed} is missing; fetch the product again")
    layers = {layer: f"{layer.lower()}.tif" for layer in QUALITY_FILES}
    metadata = next((rests[n.lower()] for n in METADATA_FILES if n.lower() in rests), None)
    facts = product.facts
    if metadata is not None:
        content = parse_metadata(
            f"{where}: {metadata.href}", metadata.href, metadata.content(_LARGEST_METADATA)
        )
        facts = check_metadata(str(where), product, content)
    return SceneFiles(
        where=where,
        facts=facts,
        bands={band: replace(rests[name], role=band) for band, name in names.items()},
        layers={
            layer: replace(rests[name], role=layer)
            for layer, name in layers.items()
            if name in rests
        },
        flags=FLAGS[product.satellite],
        default_quality=DEFAULT_QUALITY,
        metadata=() if metadata is None else (replace(metadata, role="metadata"),),
    )


def renamed(where: Path | Url, files: Mapping[str, Part]) -> dict[str, Part]:
    """Files without their product's name, by the names that the MTL file among them gives them.

    A file is meant when it has that name, or ends with what it says after the product's:
    `SR_B5.TIF`, `reef_SR_B5.TIF`. Empty where a band is called as USGS calls it, or no MTL file is
    there.

    Raises:
        InputError: two files could be meant.
    """
    if any(is_band(name) for name in files):
        return {}
    for kind in METADATA_FILES:
        for name, part in files.items():
            if not name.lower().endswith(kind.lower()):
                continue
            try:
                label, content = f"{where}: {part.href}", part.content(_LARGEST_METADATA)
                contents = parse_metadata(label, kind, content)["PRODUCT_CONTENTS"]
            except InputError:  # of another maker
                continue
            product = contents.get("LANDSAT_PRODUCT_ID", "")
            found = {}
            for key, rest in _CONTENTS.items():
                named, end = contents.get(key, "").lower(), f"_{rest}".lower()
                meant = [n for n in files if n.lower() == named or f"_{n}".lower().endswith(end)]
                if len(meant) > 1:
                    raise InputError(
                        f"{where}: {meant[0]} and {meant[1]} could both be {product}_{rest}; "
                        "remove one of them"
                    )
                if meant:
                    found[f"{product}_{rest}"] = files[meant[0]]
            if found:
                return {**found, f"{product}_{kind}": part}
    return {}


def _sorted(where: Path | Url, files: Mapping[str, Part]) -> tuple[ProductName, dict[str, Part]]:
    """The one product, and its files by what stands after its name, in lower case."""
    found: dict[str, tuple[ProductName, dict[str, Part]]] = {}
    rasters: set[str] = set()
    for name, part in files.items():
        parsed = parse_name(name)
        if parsed and parsed[1]:
            product, rest = parsed
            found.setdefault(product.text, (product, {}))[1][rest.lower()] = part
            if _RASTER.fullmatch(rest):
                rasters.add(product.text)
    if not rasters:
        raise InputError(f"{where}: holds no band of a Landsat product")
    if len(rasters) > 1:
        raise InputError(
            f"{where}: holds bands of {len(rasters)} products ({' and '.join(sorted(rasters)[:2])})"
            "; give each product a folder of its own"
        )
    product, rests = found[rasters.pop()]
    for other, (_, files_of_it) in found.items():
        if other != product.text and any(name.startswith("mtl.") for name in files_of_it):
            raise InputError(
                f"{where}: the MTL file is that of {other}, the bands are those of {product.text}; "
                "fetch the product again"
            )
    return product, rests


def check_product(where: str, product: ProductName) -> None:
    """Raise `InputError` for a product that is not surface reflectance of Collection 2."""
    if product.collection != "02":
        raise InputError(
            f"{where}: {product.text} is of Collection {int(product.collection)}; kelp reads "
            "Collection 2 Level 2, which USGS offers for the same scene"
        )
    if product.level not in ("L2SP", "L2SR"):
        raise InputError(
            f"{where}: {product.text} is a level {product.level[1]} product ({product.level}), "
            "without surface reflectance; fetch Level 2 (L2SP or L2SR) of the same scene"
        )
    if product.satellite not in BAND_FILES:
        raise InputError(f"{where}: Landsat {product.satellite} has no Level 2 products")


Metadata = Mapping[str, Mapping[str, str]]
"""An MTL file: values by group and name."""


def parse_metadata(where: str, name: str, content: bytes) -> Metadata:
    """Read an MTL file (JSON, text or XML, by its name). Raises `InputError` where it is none."""
    try:
        text = content[:_LARGEST_METADATA].decode("utf-8", errors="replace")
        if name.lower().endswith(".json"):
            groups = _groups_of_json(parse_json(text))
        elif name.lower().endswith(".xml"):
            groups = _groups_of_xml(text)
        else:
            groups = _groups_of_text(text)
    except (ValueError, LookupError, ElementTree.ParseError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not a Landsat MTL file ({reason}); fetch it again") from error
    if "PRODUCT_CONTENTS" not in groups:
        raise InputError(
            f"{where}: not the MTL file of a Collection 2 product (no PRODUCT_CONTENTS); "
            "fetch it again"
        )
    return groups


def _groups_of_json(value: Any) -> Metadata:
    return {
        group: {key: str(item) for key, item in values.items()}
        for group, values in value["LANDSAT_METADATA_FILE"].items()
    }


def _groups_of_xml(text: str) -> Metadata:
    return {
        group.tag: {item.tag: (item.text or "").strip() for item in group}
        for group in parse_xml(text)
    }


def _groups_of_text(text: str) -> Metadata:
    groups: dict[str, dict[str, str]] = {}
    open_groups: list[str] = []
    for line in text.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            continue
        if key == "GROUP":
            open_groups.append(value)
        elif key == "END_GROUP":
            open_groups.pop()
        elif open_groups:
            groups.setdefault(open_groups[-1], {})[key] = value.strip('"')
    return groups


def check_metadata(where: str, product: ProductName, metadata: Metadata) -> SceneFacts:
    """Facts of a scene from its MTL file.

    Raises:
        InputError: it belongs to another product, or its reflectance has another scale.
    """
    contents = metadata["PRODUCT_CONTENTS"]
    named = contents.get("LANDSAT_PRODUCT_ID", "")
    if named != product.text:
        raise InputError(
            f"{where}: the MTL file is that of {named or 'no product'}, the bands are those of "
            f"{product.text}; fetch the product again"
        )
    scales = metadata.get("LEVEL2_SURFACE_REFLECTANCE_PARAMETERS", {})
    for band, file in BAND_FILES[product.satellite].items():
        for key, wanted in (("MULT", REFLECTANCE_SCALE), ("ADD", REFLECTANCE_OFFSET)):
            name = f"REFLECTANCE_{key}_BAND_{file[1:]}"
            check_scale_number(where, band, name, _number(where, name, scales.get(name)), wanted)
    image = metadata.get("IMAGE_ATTRIBUTES", {})
    return product.facts.model_copy(
        update={
            "acquired": _center_time(image) or product.acquired,
            "sun_elevation": _optional(image.get("SUN_ELEVATION")),
            "sun_azimuth": _optional(image.get("SUN_AZIMUTH")),
            "cloud_cover": _optional(image.get("CLOUD_COVER")),
        }
    )


def check_scale_number(
    where: str, band: str, name: str, found: float | None, wanted: float
) -> None:
    """Raise `InputError` unless a scale or offset is that of Collection 2."""
    if found is None:
        raise InputError(f"{where}: {name} of band {band} is missing; fetch the product again")
    if abs(found - wanted) > 1e-9:
        raise InputError(
            f"{where}: {name} of band {band} is {found:g}, Collection 2 has {wanted:g}; kelp would "
            "take the values for other reflectances"
        )


def _number(where: str, name: str, text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise InputError(f"{where}: {name} is no number ({text})") from None


def _optional(text: str | None) -> float | None:
    """A figure that nothing depends on."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _center_time(image: Mapping[str, str]) -> datetime | None:
    """When the middle of the scene was taken, to the microsecond; the file gives 100 ns."""
    day, time = image.get("DATE_ACQUIRED", ""), image.get("SCENE_CENTER_TIME", "").strip('"')
    cut = re.fullmatch(r"(\d\d:\d\d:\d\d(?:\.\d{1,6})?)\d*Z?", time)
    if not cut:
        return None
    try:
        return datetime.fromisoformat(f"{day}T{cut[1]}").replace(tzinfo=UTC)
    except ValueError:
        return None
