"""The maps of a folder: which scene each shows, when it was taken, what belongs to it.

A map is a mask (`<name>_kelp.tif`), perhaps with probabilities, spread and a record beside it. A
mask that another program wrote works too: what only the record knows is then None.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError, InputError
from kelp.io.files import input_folder
from kelp.raster.area import GroundArea
from kelp.raster.bands import PIXEL_SIZE_M
from kelp.raster.masks import (
    Georeference,
    georeference_from,
    open_dataset,
    read_mask,
    read_probability,
)
from kelp.raster.window import Shape, Tile
from kelp.sensors.opening import facts_of_name
from kelp.sensors.record import MapRecord, read_record, record_path
from kelp.tables import MASK_SUFFIX, PROBABILITY_SUFFIX, SPREAD_SUFFIX, tile_id_of

log = logging.getLogger("kelp")

STRIP_ROWS: Final = 256
"""Rows read at a time: half a block of a Cloud Optimized GeoTIFF, for memory's sake."""

_HLS: Final = re.compile(r"HLS\.([LS])30\.T\w{5}\.(\d{7})T(\d{6})")
_DATE: Final = re.compile(r"(?<!\d)((?:19|20)\d\d)([-_]?)(\d\d)\2(\d\d)(?!\d)")


@dataclass(frozen=True)
class Map:
    """One mask and what belongs to it.

    Attributes:
        mask: the file: 0 = no kelp, 1 = kelp, 255 = not observed.
        probability: raster of probabilities, where there is one.
        spread: raster of the spread of tiles, where there is one.
        record: what the map was made of, where kelp made it.
        shape: `(height, width)`.
        georeference: where it lies.
        pixel_size: side of a pixel in metres where there is no CRS.
    """

    mask: Path
    probability: Path | None
    spread: Path | None
    record: MapRecord | None
    shape: Shape
    georeference: Georeference
    pixel_size: float = PIXEL_SIZE_M

    @property
    def scene_id(self) -> str:
        """Name of the scene."""
        return self.record.scene.id if self.record else tile_id_of(self.mask)

    @cached_property
    def acquired(self) -> datetime | date | None:
        """When the scene was taken: a moment in UTC, or the day; from the record or the name."""
        if self.record and self.record.scene.acquired:
            return self.record.scene.acquired
        return _named(self.mask.name)[1]

    @property
    def acquired_text(self) -> str | None:
        """`acquired` in ISO 8601."""
        if isinstance(self.acquired, datetime):
            return self.acquired.astimezone(UTC).isoformat().replace("+00:00", "Z")
        return self.acquired.isoformat() if self.acquired else None

    @property
    def day(self) -> date | None:
        """The day, UTC."""
        return self.acquired.date() if isinstance(self.acquired, datetime) else self.acquired

    @cached_property
    def sensor(self) -> str | None:
        """`landsat-8`, `sentinel-2` and so on."""
        if self.record and self.record.scene.sensor:
            return self.record.scene.sensor
        return _named(self.mask.name)[0]

    @property
    def threshold(self) -> float | None:
        """Kelp where the probability is at least this."""
        return self.record.threshold if self.record else None

    @property
    def network(self) -> str | None:
        """Names of the networks that made it."""
        return "+".join(n.name for n in self.record.network) or None if self.record else None

    @property
    def weights(self) -> tuple[str, ...]:
        """SHA-256 of the networks' weights, sorted."""
        networks = self.record.network if self.record else ()
        return tuple(sorted(n.sha256 for n in networks if n.sha256))

    @property
    def distrust(self) -> str | None:
        """Why its record says that the map may be wrong; None where it does not."""
        guard = self.record.guard if self.record else None
        return "; ".join(guard.reasons) or "guard" if guard and not guard.ok else None

    @property
    def no_expected_area(self) -> str | None:
        """Why the map has no expected area; None where it has one."""
        if self.probability is None:
            return "no probabilities beside the map (kelp predict --save_probabilities)"
        facts = self.record
        if facts and facts.kelp_pixels is not None and facts.expected_area_m2 is None:
            return "the network's probabilities are not calibrated (kelp tune)"
        return None

    @property
    def is_turned(self) -> bool:
        """Whether its rows do not lie along an axis of its CRS."""
        transform = self.georeference.transform
        return transform is not None and bool(transform.b or transform.d)

    @cached_property
    def area(self) -> GroundArea:
        """Ground area of its pixels. Raises `InputError` naming the file."""
        return GroundArea.of_file(self.mask, self.georeference, self.shape, self.pixel_size)

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """A window of the mask."""
        return read_mask(self.mask, tile)

    def read_probability(self, tile: Tile) -> NDArray[np.float32] | None:
        """A window of the probabilities, NaN where the mask is 255; None without a raster."""
        return read_probability(self.probability, tile) if self.probability else None

    def read_expected(self, tile: Tile) -> NDArray[np.float32] | None:
        """Calibrated probabilities of a window; None where `no_expected_area` says why."""
        return None if self.no_expected_area else self.read_probability(tile)

    def strips(self, rows: int = STRIP_ROWS) -> Iterator[Tile]:
        """Windows of full width that cover the map from the top."""
        return Tile(0, 0, *self.shape).strips(rows)


def open_map(path: Path, pixel_size: float = PIXEL_SIZE_M) -> Map:
    """The map of a mask file.

    Raises:
        InputError: it cannot be read, its record is damaged, or its probabilities have other
            pixels.
    """
    shape, georeference = _grid_of(path)
    record = None
    if "_kelp" in path.name and record_path(path).is_file():
        record = read_record(record_path(path))
        if record.grid.shape != shape:
            raise InputError(
                f"{path}: has {shape[0]} x {shape[1]} pixels, its record says "
                f"{record.grid.shape[0]} x {record.grid.shape[1]}; make the map again"
            )
    beside = [_beside(path, suffix) for suffix in (PROBABILITY_SUFFIX, SPREAD_SUFFIX)]
    for file in filter(None, beside):
        if _grid_of(file) != (shape, georeference):
            raise InputError(f"{file}: its pixels are not those of {path}; make both again")
    return Map(path, beside[0], beside[1], record, shape, georeference, pixel_size)


def find_maps(path: Path) -> list[Map]:
    """The maps of a folder, sorted by name; or one file's.

    Maps are `*_kelp.tif`; in a folder without such names every `.tif` is one.

    Raises:
        InputError: there is none, one is unreadable, or two show one scene.
    """
    if path.is_file():
        return [open_map(path)]
    if path.is_dir() and any(path.glob(f"*{MASK_SUFFIX}")):
        files = input_folder(path, f"*{MASK_SUFFIX}")
    else:
        files = [
            file
            for file in input_folder(path, "*.tif")
            if not file.name.endswith((PROBABILITY_SUFFIX, SPREAD_SUFFIX))
        ]
    if not files:
        raise InputError(f"{path}: the folder holds no mask (<name>{MASK_SUFFIX})")
    maps = [open_map(file) for file in files]
    by_scene = defaultdict(list)
    for entry in maps:
        by_scene[entry.scene_id].append(entry.mask.name)
    for scene, names in by_scene.items():
        if len(names) > 1:
            raise InputError(
                f"{path}: {names[0]} and {names[1]} are two maps of the scene {scene}; keep one"
            )
    return maps


def trusted(maps: Sequence[Map], allow_distrusted: bool = False) -> list[Map]:
    """Maps without those that may be wrong as their records say, which one line names.

    Raises:
        InputError: none is left.
    """
    wrong = [] if allow_distrusted else [entry for entry in maps if entry.distrust]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        words = f"{wrong[0].mask}{more}: may be wrong ({wrong[0].distrust})"
        if len(wrong) == len(maps):
            raise InputError(f"{words}; no map is left: look at them, then --allow_distrusted True")
        log.warning("%s; left out: look at them, then --allow_distrusted True", words)
    return [entry for entry in maps if allow_distrusted or entry.distrust is None]


def require_comparable(maps: Sequence[Map], mixed: bool = False) -> None:
    """Raise `InputError` for maps of different networks or thresholds, unless `mixed` is wished.

    Maps without a record are taken at their word.
    """
    recorded = [m for m in maps if m.record]
    if mixed or not recorded:
        return
    first = recorded[0]
    for other in recorded[1:]:
        for what, one, two in (
            ("network", first.weights or first.network, other.weights or other.network),
            ("threshold", first.threshold, other.threshold),
        ):
            if one != two:
                values = [first.network, other.network] if what == "network" else [one, two]
                named = f" ({values[0]}, {values[1]})" if values[0] != values[1] else ""
                raise InputError(
                    f"{other.mask}: made with another {what} than {first.mask.name}{named}; "
                    "their areas do not compare: predict them alike, or --allow_mixed"
                )


def require(module: str, extra: str, purpose: str) -> Any:
    """An optional package. Raises `ConfigError` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f'{purpose} needs {module}; pip install "kelp-slicer[{extra}]"') from None


def _grid_of(path: Path) -> tuple[Shape, Georeference]:
    with open_dataset(path) as dataset:
        return Shape(dataset.height, dataset.width), georeference_from(dataset)


def _beside(mask: Path, suffix: str) -> Path | None:
    if not mask.name.endswith(MASK_SUFFIX):
        return None
    path = mask.with_name(mask.name.removesuffix(MASK_SUFFIX) + suffix)
    return path if path.is_file() else None


def _named(name: str) -> tuple[str | None, datetime | date | None]:
    """Sensor and date that a file's name tells."""
    try:
        facts = facts_of_name(name)
        if facts.acquired:
            return facts.sensor, facts.acquired
        if found := _HLS.search(name):
            moment = datetime.strptime(found[2] + found[3], "%Y%j%H%M%S")
            return f"hls-{found[1].lower()}30", moment.replace(tzinfo=UTC)
        if found := _DATE.search(name):
            return None, date(int(found[1]), int(found[3]), int(found[4]))
    except ValueError:  # digits that are no date
        pass
    return None, None
