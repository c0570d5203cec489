"""STAC: items as scenes, static catalogues and search services as lists of scenes.

An item is read as plain JSON of whatever STAC version: which asset is which band is told by the
names of the files that Landsat and HLS assets lead to, as in a folder; Sentinel-2 items, and those
of Landsat whose files were renamed, go by their keys. Asking services needs the extra `stac`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urljoin, urlsplit

from kelp.config.scenes import SearchConfig
from kelp.errors import ConfigError, InputError
from kelp.io import http, remote
from kelp.io.files import amount, is_file, parse_json, write_text
from kelp.io.location import Url, is_url, locate
from kelp.progress import Progress, silent
from kelp.raster.bands import REFLECTANCE_OFFSET, REFLECTANCE_SCALE
from kelp.sensors import hls, landsat, sentinel2
from kelp.sensors.aoi import bounds_in_degrees
from kelp.sensors.parts import Part, SceneFiles, file_name, without_secrets
from kelp.sensors.record import SceneFacts

log = logging.getLogger("kelp")

_SENTINEL2_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "B": ("blue", "B02"),
    "G": ("green", "B03"),
    "R": ("red", "B04"),
    "NIR": ("nir08", "B8A"),
    "SWIR": ("swir16", "B11"),
    "SCL": ("scl", "SCL"),
}
"""Keys of assets: Earth Search's, then Planetary Computer's."""
_LANDSAT_KEYS: Final[Mapping[str, str]] = {
    "blue": "B",
    "green": "G",
    "red": "R",
    "nir08": "NIR",
    "swir16": "SWIR",
}
"""Keys of assets of bands; before STAC 1.0 USGS called them `SR_B5.TIF`."""
_LANDSAT_LAYERS: Final[Mapping[str, str]] = {
    "qa_pixel": "QA_PIXEL",
    "qa_radsat": "QA_RADSAT",
    "qa_aerosol": "SR_QA_AEROSOL",
}
_MOST_DOCUMENTS: Final = 8
"""JSON files of a folder that are looked at for its item: a product has two or three."""
TIMEOUT: Final = 30.0
"""Seconds that a service may take for an answer."""
MOST_CATALOGUES: Final = 10_000
"""Catalogues that a static one may lead to: a chain that a program makes up never ends."""


def is_item(url: Url) -> bool:
    """Whether a URL is that of JSON: an item, a catalogue, or an item of a service."""
    path = str(url).partition("?")[0].rstrip("/").lower()
    return path.endswith((".json", ".geojson")) or "/items/" in path


def signer(name: str | None) -> Callable[[str], str]:
    """The function that `MODULE:FUNCTION` names; None = URLs stay as they are."""
    if name is None:
        return lambda href: href
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--sign {name}: cannot be imported ({error}); give MODULE:FUNCTION, as in "
            "planetary_computer:sign_url"
        ) from error

    def sign(href: str) -> str:
        signed = found(href)
        if not isinstance(signed, str):
            raise ConfigError(f"--sign {name}: gave {type(signed).__name__}, a URL is wanted")
        return signed

    return sign


def _document(location: Path | Url) -> dict[str, Any]:
    """A JSON object. Raises `InputError` where it is none."""
    try:
        if isinstance(location, Url) and http.is_http(location):
            text = http.fetch_text(location, TIMEOUT)
        elif isinstance(location, Path) and not is_file(location):
            raise InputError(f"{location}: no such file; check the path")
        elif isinstance(location, Path) and location.stat().st_size > http.LARGEST:
            raise InputError(f"{location}: of {amount(location.stat().st_size)}, no STAC document")
        else:
            text = remote.read_text(location)
        value = parse_json(text)
    except OSError as error:
        raise InputError(f"{location}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{location}: not JSON ({reason}); a STAC item was expected, not a web page"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{location}: not a STAC document, which is a JSON object")
    return value


def items_at(location: Path | Url) -> list[Path | Url]:
    """The items of a static catalogue, or the item that is named."""
    document = _document(location)
    kind = document.get("type")
    if "assets" in document and kind not in ("Catalog", "Collection"):
        return [location]
    if kind == "FeatureCollection":
        raise InputError(
            f"{location}: a collection of features; list the items' own addresses in a .txt file"
        )
    if kind in ("Catalog", "Collection") or "links" in document:
        return list(_walk(location))
    raise InputError(f"{location}: neither a STAC item nor a catalogue")


def _walk(root: Path | Url) -> Iterator[Path | Url]:
    """Where the items of a static catalogue lie: its own, then those of its children.

    No document is asked twice, whatever leads back to it.
    """
    seen: set[Path | Url] = {root}
    waiting = [root]
    catalogues = 0
    while waiting:
        where = waiting.pop()
        catalogues += 1
        if catalogues > MOST_CATALOGUES:
            raise InputError(
                f"{root}: leads to more than {MOST_CATALOGUES:,} catalogues; name one of them, or "
                "list the items' own addresses in a .txt file"
            )
        children = []
        for relation, place in _links(where):
            if place in seen:
                continue
            seen.add(place)
            if relation == "child":
                children.append(place)
            else:
                yield place
        waiting += reversed(children)


def _links(where: Path | Url) -> Iterator[tuple[str, Path | Url]]:
    """The items and children that a catalogue leads to."""
    links = _document(where).get("links")
    if not isinstance(links, list):
        raise InputError(f"{where}: not a STAC catalogue, which has a list of links")
    for link in links:
        relation = link.get("rel") if isinstance(link, dict) else None
        if relation not in ("child", "item"):
            continue
        href = link.get("href")
        if not isinstance(href, str) or not href.strip() or "\0" in href:
            raise InputError(f"{where}: a link ({relation}) has no address")
        yield relation, _join(where, href)


def _join(base: Path | Url, href: str) -> Path | Url:
    """The address that `href` means in a document at `base`."""
    if href.startswith("file:"):
        return Path(unquote(urlsplit(href).path))
    if is_url(href):
        return Url(href)
    if isinstance(base, Path):
        return Path(os.path.normpath(base.parent / href))
    scheme, _, rest = str(base).partition("://")  # of stores: nothing else is joined to
    return Url(scheme + urljoin(f"http://{rest}", href).removeprefix("http"))


def read_item(location: Path | Url, sign: Callable[[str], str]) -> SceneFiles:
    """What the assets of an item hold.

    Args:
        location: the item's file or URL; relative addresses of assets count from there.
        sign: signs the URL of an asset.

    Raises:
        InputError: no item, or not one of a sensor that kelp reads.
    """
    try:
        return _read_item(location, _document(location), sign)
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{location}: not a STAC item as the specification has it ({reason}); fetch it again"
        ) from error


def _read_item(
    location: Path | Url, document: dict[str, Any], sign: Callable[[str], str]
) -> SceneFiles:
    assets = document.get("assets")
    if not isinstance(assets, dict) or "properties" not in document:
        raise InputError(f"{location}: not a STAC item (no assets and properties)")
    places = {key: _resolve(location, href) for key, href in _hrefs(assets).items()}
    names = {key: file_name(str(place)) for key, place in places.items()}
    named = {key: name for key, name in names.items() if landsat.is_band(name)}
    names |= _names_by_key(document) | named  # what a file is called comes first
    properties: Mapping[str, Any] = document["properties"] or {}

    def parts() -> dict[str, Part]:
        return {names[key]: _part(place, sign) for key, place in places.items()}

    if any(landsat.is_band(name) for name in names.values()):
        _check_scales(location, assets, names)
        known = {
            name: part
            for name, part in parts().items()
            # Of a remote product the item itself holds what the MTL file would tell.
            if landsat.is_band(name) or (isinstance(part.place, Path) and is_file(part.place))
        }
        files = landsat.read_product(location, known)
    elif any(hls.is_band(name) for name in names.values()):
        files = hls.read_product(location, parts())
    elif _is_sentinel2(document):
        files = _sentinel2(location, document, places, sign)
    else:
        collection = document.get("collection") or "of no collection"
        raise InputError(
            f"{location}: an item ({collection}) of a sensor that kelp does not read; it reads "
            "Landsat Collection 2 Level 2, HLS and Sentinel-2 L2A"
        )
    return replace(files, facts=_with_properties(files.facts, properties))


def item_of(folder: Path) -> Path | None:
    """The STAC item in a folder that tells which of its files is which band of a Landsat product.

    None: no item, several, or one of files that are not there.
    """
    found = []
    documents = [*folder.glob("[!.]*.json"), *folder.glob("[!.]*.geojson")]
    for path in sorted(documents) if len(documents) <= _MOST_DOCUMENTS else ():
        try:
            document = _document(path)
            hrefs, named = _hrefs(document["assets"]), _names_by_key(document)
        except (InputError, AttributeError, TypeError, LookupError):
            continue
        bands = [folder / file_name(hrefs[key]) for key, name in named.items() if "_SR_B" in name]
        if bands and all(is_file(band) for band in bands):
            found.append(path)
    return found[0] if len(found) == 1 else None


def _hrefs(assets: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: asset["href"]
        for key, asset in assets.items()
        if isinstance(asset, dict) and isinstance(asset.get("href"), str)
    }


def _names_by_key(document: Mapping[str, Any]) -> dict[str, str]:
    """What USGS calls the files of a Landsat item's assets; empty where no product is named."""
    hrefs = _hrefs(document["assets"])
    texts = [str(document.get("id")), *(file_name(href) for href in hrefs.values())]
    product = next((found for found in map(landsat.parse_prefix, texts) if found), None)
    if product is None or product.satellite not in landsat.BAND_FILES:
        return {}
    rests = {key: f"{layer}.TIF" for key, layer in _LANDSAT_LAYERS.items()}
    for key, band in _LANDSAT_KEYS.items():
        rests[key] = f"SR_{landsat.BAND_FILES[product.satellite][band]}.TIF"
    rests |= {rest: rest for rest in rests.values()}
    rests |= {kind.lower(): kind for kind in landsat.METADATA_FILES}
    rests |= {kind: kind for kind in landsat.METADATA_FILES}
    return {key: f"{product.text}_{rests[key]}" for key in hrefs if key in rests}


def _resolve(location: Path | Url, href: str) -> Path | Url:
    """Where an asset lies; a file of its name beside the item comes first."""
    if isinstance(location, Path):
        beside = location.parent / file_name(href)
        if is_file(beside):
            return beside
        if is_url(href):
            return Path(file_name(href)) if href.startswith("file:") else Url(href)
        return location.parent / href
    return _join(location, href)


def _part(place: Path | Url, sign: Callable[[str], str]) -> Part:
    if isinstance(place, Path):
        return Part("", place.name, place)
    return Part("", without_secrets(str(place)), Url(sign(str(place))))


def _check_scales(
    location: Path | Url, assets: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Raise `InputError` where an item gives its surface reflectance another scale."""
    for key, asset in assets.items():
        if "_SR_B" not in names.get(key, "").upper():
            continue
        for band in asset.get("raster:bands") or ():
            for name, wanted in (("scale", REFLECTANCE_SCALE), ("offset", REFLECTANCE_OFFSET)):
                if name in band:
                    landsat.check_scale_number(str(location), key, name, float(band[name]), wanted)


def _with_properties(facts: SceneFacts, properties: Mapping[str, Any]) -> SceneFacts:
    """Add what an item knows and the names of its files do not."""
    update: dict[str, Any] = {}
    if not isinstance(facts.acquired, datetime):
        text = properties.get("datetime")
        if isinstance(text, str) and len(text) > 10:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                moment = None
            if moment is not None:
                update["acquired"] = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    for field, names in (
        ("sun_elevation", ("view:sun_elevation", "eo:sun_elevation")),
        ("sun_azimuth", ("view:sun_azimuth", "eo:sun_azimuth")),
        ("cloud_cover", ("eo:cloud_cover",)),
    ):
        value = next((properties[name] for name in names if name in properties), None)
        if getattr(facts, field) is None and isinstance(value, int | float):
            update[field] = float(value)
    return facts.model_copy(update=update)


def _is_sentinel2(document: Mapping[str, Any]) -> bool:
    text = f"{document.get('collection')} {document['properties'].get('constellation')}".lower()
    return "sentinel-2" in text


def _sentinel2(
    location: Path | Url,
    document: Mapping[str, Any],
    places: Mapping[str, Path | Url],
    sign: Callable[[str], str],
) -> SceneFiles:
    found: dict[str, str] = {}
    for role, keys in _SENTINEL2_KEYS.items():
        key = next((key for key in keys if key in places), None)
        if key is not None:
            found[role] = key
        elif role != "SCL":
            raise InputError(f"{location}: lacks the asset {' or '.join(keys)} of band {role}")
    gain, offset, baseline = _sentinel2_scale(
        location, document, [document["assets"][found[role]] for role in sentinel2.BAND_FILES]
    )
    properties = document["properties"]
    return SceneFiles(
        where=location,
        facts=SceneFacts(
            id=str(document.get("id")),
            product_id=properties.get("s2:product_uri") or document.get("id"),
            sensor="sentinel-2",
            level=f"L2A, baseline {baseline}",
            network_validated=False,
        ),
        bands={
            role: replace(_part(places[found[role]], sign), role=role)
            for role in sentinel2.BAND_FILES
        },
        layers={"SCL": replace(_part(places[found["SCL"]], sign), role="SCL")}
        if "SCL" in found
        else {},
        flags=sentinel2.FLAGS,
        default_quality=sentinel2.DEFAULT_QUALITY,
        gain=gain,
        offset=offset,
    )


def _sentinel2_scale(
    location: Path | Url, document: Mapping[str, Any], assets: list[Mapping[str, Any]]
) -> tuple[float, float, str]:
    """Gain, offset and processing baseline of a Sentinel-2 item.

    Some archives have taken the offset of baseline 04.00 off already; what the item says decides.
    """
    properties = document["properties"]
    baseline = str(
        properties.get("s2:processing_baseline") or properties.get("processing:version") or ""
    )
    try:
        major = float(baseline)
    except ValueError:
        raise InputError(
            f"{location}: does not say of which processing baseline it is "
            "(s2:processing_baseline), on which the scale of its values depends"
        ) from None
    applied = properties.get("earthsearch:boa_offset_applied")
    offsets = {
        float(band["offset"])
        for asset in assets
        for band in asset.get("raster:bands") or ()
        if "offset" in band
    }
    if major < 4 or applied is True:
        added = 0.0
    elif applied is False:
        added = -1000.0
    elif len(offsets) == 1:
        added = round(offsets.pop() * 10_000)
    else:
        raise InputError(
            f"{location}: baseline {baseline} adds an offset to the values, and the item does not "
            "say whether it was taken off (earthsearch:boa_offset_applied, raster:bands); use the "
            "SAFE folder"
        )
    return (*sentinel2.scale_of(10_000, added), baseline)


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    path: Path
    """The list of items."""
    items: tuple[str, ...]
    """Their addresses, by time."""

    def summary(self) -> str:
        """One line for the terminal."""
        return f"{len(self.items)} scenes in {self.path}; map them with --data_dir {self.path}"


def search(config: SearchConfig, progress: Progress = silent) -> SearchResult:
    """Write a list of the items of a service or catalogue; see `SearchConfig`.

    Raises:
        InputError: the service does not answer as a STAC API, or nothing was found.
    """
    box = config.bbox or (bounds_in_degrees(config.aoi) if config.aoi else None)
    if box is None:
        raise ConfigError("--bbox or --aoi: one of them is needed")
    found: dict[str, str] = {}
    for count, (href, item) in enumerate(_items(config, box), start=1):
        progress("searching", count, count)
        try:
            if _fits(item, config, box):
                found[href] = str(item["properties"].get("datetime") or "")
        except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{href}: not a STAC item as the specification has it ({reason})"
            ) from (error)
    if not found:
        raise InputError(
            f"{config.stac}: holds no scene of {config.collection or 'any collection'} there and "
            "then; widen --datetime, the box or --max_cloud"
        )
    hrefs = sorted(found, key=lambda href: (found[href], href))
    write_text(config.output, "".join(f"{href}\n" for href in hrefs))
    return SearchResult(config.output, tuple(hrefs))


def _items(config: SearchConfig, box: tuple[float, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Candidates with their addresses: those a service finds, or all of a static catalogue."""
    root = locate(config.stac)
    if "conformsTo" not in _document(root):
        yield from ((str(place), _document(place)) for place in _walk(root))
        return
    try:
        from pystac_client import Client, ConformanceClasses
    except ImportError as error:
        raise InputError(
            f'{config.stac}: searches need pystac-client; pip install "kelp-slicer[stac]"'
        ) from error
    try:
        client = Client.open(config.stac, timeout=TIMEOUT)
        query = None
        if config.max_cloud is not None and client.conforms_to(ConformanceClasses.QUERY):
            query = {"eo:cloud_cover": {"lte": config.max_cloud}}
        wanted = client.search(
            collections=[config.collection] if config.collection else None,
            bbox=list(box),
            datetime=config.datetime,
            query=query,
            limit=100,
        )
        for item in wanted.items():
            href = item.get_self_href()
            if not href:
                raise LookupError(f"the item {item.id} has no address of its own")
            yield href, item.to_dict(include_self_link=False, transform_hrefs=False)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{config.stac}: the service failed ({reason[:300]}); try again later"
        ) from error


def _fits(item: Mapping[str, Any], config: SearchConfig, box: tuple[float, ...]) -> bool:
    """Whether an item is what was asked for: a static catalogue cannot be asked, services err."""
    if config.collection and item.get("collection") not in (None, config.collection):
        return False
    properties = item["properties"]
    cloud = properties.get("eo:cloud_cover")
    if config.max_cloud is not None and (cloud is None or float(cloud) > config.max_cloud):
        return False
    moment = properties.get("datetime")
    if config.datetime and moment and not _within(datetime.fromisoformat(moment), config.datetime):
        return False
    return item.get("bbox") is None or _overlap(tuple(map(float, item["bbox"])), box)


def _within(moment: datetime, span: str) -> bool:
    start, _, end = span.partition("/")
    text = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC).isoformat()
    end = end or ("" if "/" in span else start)
    early = start not in ("", "..") and text[: len(start)] < start.rstrip("Z")[: len(text)]
    late = end not in ("", "..") and text[: len(end.rstrip("Z"))] > end.rstrip("Z")
    return not (early or late)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes in degrees overlap; west > east means across the antimeridian."""
    if len(one) == 6:
        one = (one[0], one[1], one[3], one[4])
    if one[1] > other[3] or other[1] > one[3]:
        return False

    def spans(box: tuple[float, ...]) -> list[tuple[float, float]]:
        return [(box[0], box[2])] if box[0] <= box[2] else [(box[0], 180.0), (-180.0, box[2])]

    return any(a[0] <= b[1] and b[0] <= a[1] for a in spans(one) for b in spans(other))
