"""The files of a scene: where each lies, whether they fit together, and one VRT over them.

The VRT is text that GDAL opens from memory: bands are read by windows from the files as they
were delivered, and nothing is copied.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

import rasterio
from affine import Affine

from kelp.errors import InputError
from kelp.io import http, remote
from kelp.io.files import is_file
from kelp.io.location import Url
from kelp.raster.masks import quietly
from kelp.raster.validity import MaskBands, masked_as
from kelp.sensors.quality import Flag
from kelp.sensors.record import SceneFacts, Source

_BLOCK: Final = 512
"""Bytes of a block of an archive, which ends with empty ones."""
_GRID_SLACK: Final = 0.01
"""Pixels by which two files of a scene may lie apart: georeferences are rounded."""
_CURL: Final = "/vsicurl?max_retry=3&retry_delay=1&list_dir=no&empty_dir=yes&url="
"""GDAL's reader of URLs: three more tries, and no questions about neighbours of a file."""


@dataclass(frozen=True)
class Part:
    """A file that holds one layer of a scene."""

    role: str
    """A band of kelp, a quality layer, or `metadata`."""
    href: str
    """Its name in the record."""
    place: Path | Url
    """The file, or the archive that holds it."""
    member: str = ""
    """Its name in the archive."""
    offset: int = 0
    """Where it begins in the archive."""
    size: int | None = None
    """Bytes; None = all of the file."""

    @property
    def gdal(self) -> str:
        """What GDAL opens."""
        if isinstance(self.place, Url):
            return remote_path(self.place)
        if self.member:
            return f"/vsitar/{{{self.place.absolute()}}}/{self.member}"
        return str(self.place.absolute())

    def source(self) -> Source:
        """What the record says of it. Reads the whole file, unless a store knows it better."""
        if isinstance(self.place, Url):
            if http.is_http(self.place):
                etag, size = http.identity_of(self.place)
            else:
                found = remote.look(self.place)
                etag, size = found.identity, found.size
            return Source(role=self.role, href=self.href, etag=etag, size=size)
        return Source.of_file(self.role, self.place, self.href, self.offset, self.size)

    def content(self, most: int) -> bytes:
        """The first `most` bytes."""
        if isinstance(self.place, Url):
            return remote.read_text(self.place).encode()[:most]
        try:
            with self.place.open("rb") as file:
                file.seek(self.offset)
                return file.read(most if self.size is None else min(most, self.size))
        except OSError as error:
            raise InputError(f"{self.place}: cannot be read ({error.strerror})") from error


def remote_path(url: Url) -> str:
    """What GDAL opens for a URL; requester-pays and credentials are settings of GDAL's own."""
    scheme, _, rest = str(url).partition("://")
    stores = {"s3": "vsis3", "gs": "vsigs", "az": "vsiaz", "abfs": "vsiaz"}
    if scheme in stores:
        return f"/{stores[scheme]}/{rest}"
    if scheme in ("http", "https"):
        return _CURL + quote(str(url), safe="")
    raise InputError(f"{url}: kelp reads http, https, s3, gs and az here, not {scheme}")


def file_name(href: str) -> str:
    """The file name at the end of a path or URL, without what a signature adds to it."""
    return unquote(urlsplit(href).path if "://" in href else href).replace("\\", "/").split("/")[-1]


def without_secrets(href: str) -> str:
    """A URL without its query, where signatures stand."""
    return href.partition("?")[0] if "://" in href else href


def parse_xml(text: str) -> ElementTree.Element:
    """The root of a document.

    Raises:
        ValueError: it declares entities, which can grow without end.
        ElementTree.ParseError: it is no XML.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares entities")
    return ElementTree.fromstring(text)


@dataclass(frozen=True)
class SceneFiles:
    """A scene as it was delivered: which file holds what, and what its numbers mean."""

    where: Path | Url
    """The folder, archive or item."""
    facts: SceneFacts
    bands: Mapping[str, Part]
    """The file of each optical band."""
    layers: Mapping[str, Part]
    """The file of each quality layer."""
    flags: Mapping[str, Flag]
    """The quality bits of the sensor, also those whose layer is missing."""
    default_quality: tuple[str, ...]
    metadata: tuple[Part, ...] = ()
    masks: tuple[Part, ...] = ()
    """Files beside those of bands and layers that hide pixels of theirs (`.msk`)."""
    dtype: str = "UInt16"
    """GDAL's type that holds the values of all files."""
    nodata: float = 0
    gain: float = 1.0
    """Collection 2 integer = stored value x gain + offset."""
    offset: float = 0.0

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every file that is read."""
        return (*self.bands.values(), *self.layers.values(), *self.metadata, *self.masks)


def files_of_tar(path: Path) -> dict[str, Part]:
    """The files of an archive by their names, none of them unpacked.

    Raises:
        InputError: it is compressed, no archive, or was not fetched to its end.
    """
    found: dict[str, Part] = {}
    length, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                name = file_name(member.name)
                end = member.offset_data + member.size
                if end > length:
                    raise InputError(
                        f"{path}: ends inside {name} ({length:,} bytes, at least {end:,} expected);"
                        " the download was cut short, fetch it again"
                    )
                at = member.name.removeprefix("./")  # as GDAL names it
                found[name] = Part("", name, path, at, member.offset_data, member.size)
        if length < -(-end // _BLOCK) * _BLOCK + _BLOCK:  # tarfile takes any end for the end
            raise InputError(
                f"{path}: has no end mark after its last file; the download was cut short, fetch "
                "it again"
            )
    except (tarfile.TarError, OSError, EOFError) as error:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        reason = " ".join(str(error).split()) or type(error).__name__
        way = "unpack it" if zipped else "the download may be cut short, fetch it again"
        kind = "is compressed" if zipped else f"not a readable tar archive ({reason})"
        raise InputError(f"{path}: {kind}; {way}") from error
    return found


def files_of_folder(path: Path) -> dict[str, Part]:
    """The files of a folder by their names; hidden ones are left out."""
    return {
        entry.name: Part("", entry.name, entry)
        for entry in sorted(path.iterdir())
        if entry.is_file() and not entry.name.startswith(".")
    }


@dataclass(frozen=True)
class _Header:
    """What is known of a file before its pixels are read."""

    shape: tuple[int, int]
    crs: Any
    transform: Affine
    block: tuple[int, int]
    dtype: str
    point: bool
    count: int
    gdal: str
    """What GDAL opens: of a band with a mask of its own a VRT in which what it hides is nodata."""
    hides: bool
    """Whether a mask hides pixels that `gdal` shows."""
    masks: tuple[Part, ...]
    """The files of masks that lie beside it."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        left, top = self.transform @ (0, 0)
        right, bottom = self.transform @ (self.shape[1], self.shape[0])
        return left, top, right, bottom


def _header(part: Part, void: float | None) -> _Header:
    """Look at a file; what a mask of its own hides becomes `void`, if that is a number."""
    if isinstance(part.place, Path) and not part.member:
        if not is_file(part.place):
            raise InputError(f"{part.place}: no such file; fetch the scene again")
        if part.place.stat().st_size == 0:
            raise InputError(f"{part.place}: is empty; fetch it again")
    name = f"{part.place}/{part.member}" if part.member else without_secrets(str(part.place))
    spoken = Path(name) if isinstance(part.place, Path) else Url(name)
    with quietly(spoken), rasterio.open(part.gdal) as opened:
        masked = None if void is None else masked_as(opened, void)
        beside = {Path(file).name: file for file in opened.files if file.endswith(".msk")}
        return _Header(
            shape=(opened.height, opened.width),
            crs=opened.crs,
            transform=opened.transform,
            block=opened.block_shapes[0],
            dtype=opened.dtypes[0],
            point=opened.tags().get("AREA_OR_POINT") == "Point",
            count=opened.count,
            gdal=masked or part.gdal,
            hides=void is None and MaskBands(opened, [1]).present,
            # Of a mask in an archive the hash is that of all the archive.
            masks=tuple(
                Part("mask", name, part.place if part.member else Path(file))
                for name, file in beside.items()
            ),
        )


def open_headers(files: SceneFiles, layers: Sequence[str]) -> dict[str, _Header]:
    """Open every file that will be read, by role.

    Raises:
        InputError: a file cannot be read, or lies on another grid than the others.
    """
    parts = {**files.bands, **{name: files.layers[name] for name in layers}}
    headers = {
        role: _header(part, files.nodata if role in files.bands else None)
        for role, part in parts.items()
    }
    reference_role = max(headers, key=lambda role: abs(headers[role].transform.a))
    reference = headers[reference_role]
    for role, header in headers.items():
        reason = _differs(header, reference)
        if reason:
            raise InputError(
                f"{files.where}: {parts[role].href} and {parts[reference_role].href} lie on "
                f"different grids ({reason}); fetch the product again"
            )
        if header.count != 1:
            raise InputError(
                f"{files.where}: {parts[role].href} has {header.count} bands, not 1; "
                "fetch the product again"
            )
    return headers


def _differs(header: _Header, reference: _Header) -> str:
    """In what a file's grid differs from the coarsest one; '' = not at all, or it is finer."""
    if header.crs != reference.crs:
        return f"CRS {header.crs} and {reference.crs}"
    pixel = abs(reference.transform.a)
    for mine, other in zip(header.bounds, reference.bounds, strict=True):
        if abs(mine - other) > _GRID_SLACK * pixel:
            return f"edges {mine:.1f} and {other:.1f}"
    for mine, other in zip(header.shape, reference.shape, strict=True):
        if mine % other:
            return f"{header.shape} and {reference.shape} pixels"
    return ""


def vrt_of(
    files: SceneFiles, roles: Iterable[str], headers: Mapping[str, _Header], nodata: float | None
) -> str:
    """A VRT whose bands are the named files, on the grid of the coarsest of them.

    Args:
        files: the scene.
        roles: names of bands or layers, in the order of the VRT's bands.
        headers: of all files of the scene.
        nodata: value of missing pixels; None = no such value.
    """
    grid = max(headers.values(), key=lambda header: abs(header.transform.a))
    height, width = grid.shape
    lines = [f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">']
    if grid.crs is not None:
        lines.append(f"<SRS>{escape(grid.crs.to_wkt(), quote=False)}</SRS>")
    numbers = ", ".join(repr(float(value)) for value in grid.transform.to_gdal())
    lines.append(f"<GeoTransform>{numbers}</GeoTransform>")
    if grid.point:
        lines.append('<Metadata><MDI key="AREA_OR_POINT">Point</MDI></Metadata>')
    for number, role in enumerate(roles, start=1):
        lines += _band(number, role, headers[role], grid, files.dtype, nodata)
    lines.append("</VRTDataset>")
    return "\n".join(lines)


def _band(
    number: int,
    role: str,
    header: _Header,
    grid: _Header,
    dtype: str,
    nodata: float | None,
) -> list[str]:
    height, width = header.shape
    rectangles = (
        f'<SrcRect xOff="0" yOff="0" xSize="{width}" ySize="{height}"/>'
        f'<DstRect xOff="0" yOff="0" xSize="{grid.shape[1]}" ySize="{grid.shape[0]}"/>'
    )
    name = f'<SourceFilename relativeToVRT="0">{escape(header.gdal, quote=False)}</SourceFilename>'
    block = [min(a, b) for a, b in zip(header.block, grid.shape, strict=True)]
    finer = header.shape != grid.shape
    # Of classes and bits there is no average.
    resampling = "" if not finer else f' resampling="{"nearest" if nodata is None else "average"}"'
    kind = "ComplexSource" if finer and nodata is not None else "SimpleSource"
    missing = "" if nodata is None else f"{nodata:g}"
    return [
        f'<VRTRasterBand dataType="{dtype}" band="{number}" blockXSize="{block[1]}" '
        f'blockYSize="{block[0]}">',
        f"<Description>{escape(role, quote=False)}</Description>",
        f"<NoDataValue>{missing}</NoDataValue>" if missing else "",
        f"<{kind}{resampling}>",
        name,
        "<SourceBand>1</SourceBand>",
        f'<SourceProperties RasterXSize="{width}" RasterYSize="{height}" '
        f'DataType="{_GDAL_TYPES.get(header.dtype, "UInt16")}" '
        f'BlockXSize="{header.block[1]}" BlockYSize="{header.block[0]}"/>',
        rectangles,
        f"<NODATA>{missing}</NODATA>" if kind == "ComplexSource" else "",
        f"</{kind}>",
        f'<MaskBand><VRTRasterBand dataType="Byte"><SimpleSource>{name}<SourceBand>mask,1'
        f"</SourceBand>{rectangles}</SimpleSource></VRTRasterBand></MaskBand>"
        if header.hides
        else "",
        "</VRTRasterBand>",
    ]


_GDAL_TYPES: Final = {
    "uint8": "Byte",
    "int8": "Int8",
    "uint16": "UInt16",
    "int16": "Int16",
    "uint32": "UInt32",
    "int32": "Int32",
    "float32": "Float32",
    "float64": "Float64",
}


def digest_of(sources: Iterable[Source]) -> str:
    """Stands for the content of all files that a map was made of."""
    known = [
        [source.role, source.href, source.sha256 or source.etag or ""]
        for source in sources
        if source.role != "metadata"  # what matters of it is in the facts
    ]
    return hashlib.sha256(json.dumps(sorted(known)).encode()).hexdigest()
