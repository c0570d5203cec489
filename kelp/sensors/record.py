"""The record of a map: `<name>_kelp.json`, from which the same map can be made again.

Everything after prediction (areas, series, catalogues, `kelp verify`) reads it. It holds nothing
that differs between two runs of the same inputs, so that its bytes are the same, too.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kelp.errors import InputError
from kelp.io.files import json_text, write_text
from kelp.io.location import Url

SCHEMA: Final = 1
"""Raised when a reader of the older schema would misunderstand a record."""
RECORD_SUFFIX: Final = "_kelp.json"
_BLOCK: Final = 1 << 20

P = TypeVar("P", bound=Path | Url)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def _moment(value: Any) -> Any:
    """A day where no time is known, else a moment in UTC."""
    if isinstance(value, str):
        text = value.strip()
        return date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)
    return value


def _in_utc(value: Any) -> Any:
    value = _moment(value)
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value


Acquired = Annotated[datetime | date, BeforeValidator(_in_utc)]
"""When a scene was taken: a moment in UTC, or only the day where no time is known."""


class Source(_Part):
    """One file that a scene was read from."""

    role: str
    """What it holds: a band of kelp, a quality layer, `metadata`, the `mask` of one of them, or
    `scene` for all at once."""
    href: str
    """Its name: relative to the scene's folder or archive, else a path or URL without secrets."""
    sha256: str | None = None
    size: int | None = None
    """Bytes."""
    etag: str | None = None
    """What a store knows its content by, in place of `sha256`."""

    @classmethod
    def of_file(
        cls, role: str, path: Path, href: str = "", offset: int = 0, size: int | None = None
    ) -> Source:
        """A local file, or `size` bytes of it from `offset` on. Reads them all."""
        digest, count = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while block := file.read(_BLOCK if size is None else min(_BLOCK, size - count)):
                    digest.update(block)
                    count += len(block)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        return cls(role=role, href=href or path.name, sha256=digest.hexdigest(), size=count)


class SceneFacts(_Part):
    """Which scene a map shows."""

    id: str
    """Name of the scene, from which the names of its products are made."""
    sensor: str | None = None
    """`landsat-4` … `landsat-9`, `hls-l30`, `hls-s30`, `sentinel-2`; None = not known."""
    acquired: Acquired | None = None
    product_id: str | None = None
    """The producer's name of it."""
    level: str | None = None
    """Processing level, as in `L2SP`."""
    tier: str | None = None
    """Collection category of Landsat: `T1`, `T2`, `RT`."""
    wrs_path: int | None = None
    wrs_row: int | None = None
    tile: str | None = None
    """MGRS tile of HLS and Sentinel-2."""
    sun_elevation: float | None = None
    """Degrees."""
    sun_azimuth: float | None = None
    """Degrees."""
    cloud_cover: float | None = None
    """The producer's figure, in percent."""
    network_validated: bool = True
    """False: no network of kelp was validated on this sensor."""
    sources: tuple[Source, ...] = ()

    @property
    def day(self) -> date | None:
        """The day, UTC, on which it was taken."""
        return self.acquired.date() if isinstance(self.acquired, datetime) else self.acquired


class Grid(_Part):
    """The pixels of a map."""

    shape: tuple[int, int]
    """Height and width."""
    crs: str | None = None
    """`EPSG:…` where there is such a code, else WKT."""
    transform: tuple[float, float, float, float, float, float] | None = None
    """a, b, c, d, e, f: x = a·column + b·row + c, y = d·column + e·row + f."""


class QualityFacts(_Part):
    """What counted as a bad pixel."""

    policy: tuple[str, ...] = ()
    """Names of the quality bits that counted."""
    cloud_mask: Source | None = None
    """The mask that was given with --cloud_mask."""
    over: Literal["scene", "area"] = "scene"
    """Of which pixels the shares are: of all the scene, or of its area of interest."""
    share: dict[str, float] = Field(default_factory=dict)
    """Share of the pixels for which a bit is set, 0-1, for every bit that is known, also those that
    did not count. Bits overlap: the shares need not add up."""
    bad_share: float | None = None
    """Share of the pixels that the policy took away, 0-1."""


class ElevationFacts(_Part):
    """Where the elevation came from."""

    sources: tuple[Source, ...] = ()
    sea_where_absent: bool = False
    """--dem_sea_where_absent: 0 outside all tiles, not unknown."""
    known_share: float | None = None
    """Share of the scene's pixels that the given tiles cover, 0-1."""


class AreaFacts(_Part):
    """The area of interest: outside it nothing is observed."""

    source: Source
    share: float
    """Its share of the scene's pixels, 0-1."""


class Removed(_Part):
    """Pixels that were set to "no kelp" by rule."""

    source: Source | None = None
    """File of polygons; None for land."""
    tolerance: int | None = None
    """Of land: pixels from water within which it stayed."""
    pixels: int | None = None
    """Observed pixels that the rule covers."""
    kelp_pixels: int | None = None
    """Those among them that the network took for kelp."""


class WaterFacts(_Part):
    """Clear water of the scene, at whose levels it was shown to the network."""

    read_share: float = 1.0
    """Share of the scene's pixels in which it was looked for, 0-1: some rows of a large scene; an
    area of interest needs its surroundings only."""
    levels: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Lowest and highest level there, DN, by band; empty: none was found."""
    clear_pixels: int = 0
    """Pixels of clear water there."""
    fallback: str | None = None
    """Why the scene was shown as it is; None where its water was found."""


class NetworkFacts(_Part):
    """A network, and its share of an ensemble."""

    name: str
    sha256: str | None = None
    """Of its weights."""
    weight: float = 1.0


class GuardFacts(_Part):
    """Whether the map may be trusted, as far as the product itself shows."""

    ok: bool = True
    reasons: tuple[str, ...] = ()


class MapRecord(_Part):
    """Everything that a map was made of and with."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True
    )

    schema_version: int = Field(default=SCHEMA, alias="schema")
    scene: SceneFacts
    grid: Grid
    quality: QualityFacts = QualityFacts()
    dem: ElevationFacts | None = None
    aoi: AreaFacts | None = None
    excluded: Removed | None = None
    land: Removed | None = None
    water: WaterFacts | None = None
    """None: the network takes scenes as they are."""
    network: tuple[NetworkFacts, ...] = ()
    backend: str | None = None
    threshold: float | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """Options of the prediction, resolved."""
    observed_share: float | None = None
    """Share of the scene's pixels that were observed, 0-1; outside an area of interest none is."""
    kelp_pixels: int | None = None
    presence_area_m2: float | None = None
    """Ground area of the pixels with kelp: an upper bound, however sparse the canopy."""
    expected_area_m2: float | None = None
    """Sum of calibrated probability x pixel area; None without calibration."""
    guard: GuardFacts | None = None
    """None: nothing was checked."""
    versions: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> str:
        """As the file holds it: the same text for the same record."""
        return json_text(self.model_dump(mode="json", by_alias=True))


def record_path(product: P) -> P:
    """The record that belongs to a mask, or to another product `<name>_kelp….tif` of it."""
    stem, found, _ = product.name.rpartition("_kelp")
    if not found:
        raise InputError(f"{product}: not the name of a map (<name>_kelp.tif)")
    return cast("P", product.with_name(stem + RECORD_SUFFIX))


def write_record(path: Path, record: MapRecord) -> None:
    """Write a record, atomically."""
    write_text(path, record.to_json())


def read_record(path: Path) -> MapRecord:
    """Read a record. Raises `InputError` where it is missing, damaged, or of a later kelp."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: the map's record cannot be read ({error.strerror}); make it with kelp predict"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a record of kelp ({error.reason})") from error
    try:
        record = MapRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise InputError(
            f"{path}: not a record of kelp ({where}: {first['msg']}); make the map again"
        ) from error
    if record.schema_version > SCHEMA:
        raise InputError(
            f"{path}: a record of schema {record.schema_version}, this kelp reads up to {SCHEMA}; "
            "update kelp"
        )
    return record
