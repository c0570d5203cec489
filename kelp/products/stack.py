"""Maps of one coast laid on one lattice of pixels, and what each pixel showed in each quarter.

A *station* is a pixel of the footprint: it had kelp in at least one map. A *look* is what one
sensor saw on one day: maps of one day and sensor are mosaicked, and a pixel comes from the first
of them, by name, that observed it. A quarter's figure is the mean of its looks.

The lattice is worked off by strips of rows. What a strip gave is kept in a file of its own, so
that a killed run goes on after its last strip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.io.files import atomic
from kelp.products.maps import Map
from kelp.products.regions import Cover, Region
from kelp.raster.area import GroundArea
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import Georeference
from kelp.raster.window import Shape, Tile

SENSOR_GROUPS: Final = {
    "passes4_5": ("landsat-4", "landsat-5"),
    "passes7": ("landsat-7",),
    "passes8": ("landsat-8", "landsat-9"),
    "passes_other": (),
}
"""Counts of looks by sensor, as the station files of SBC LTER name them; 9 counts with 8."""

GROUPS: Final = tuple(SENSOR_GROUPS)
STRIP_ROWS: Final = 256
"""Rows of a strip: 40 years of a strip full of stations fill some hundred MB."""

_ALIGNED: Final = 0.01
"""Pixels by which grids may be off each other and still be one lattice."""


def group_of(sensor: str | None) -> int:
    """Position in `GROUPS` of a sensor."""
    for k, sensors in enumerate(SENSOR_GROUPS.values()):
        if sensor in sensors:
            return k
    return GROUPS.index("passes_other")


@dataclass(frozen=True)
class Look:
    """What one sensor saw on one day: its maps, and the row and column of their first pixels."""

    day: date
    sensor: str | None
    maps: tuple[Map, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stack:
    """All looks at a coast on one lattice.

    Attributes:
        georeference: of the lattice, which covers all maps.
        shape: its `(height, width)`.
        looks: by day, then sensor.
        first_year: quarter 0 is the first of this year.
        quarters: number of quarters up to that of the last look.
        regions: where stations are wanted; empty = everywhere.
        expected: figures are expected areas; False: presence areas.
        area: ground area of pixels.
    """

    georeference: Georeference
    shape: Shape
    looks: tuple[Look, ...]
    first_year: int
    quarters: int
    regions: tuple[Region, ...]
    expected: bool
    area: GroundArea

    @classmethod
    def of(cls, maps: Sequence[Map], regions: Sequence[Region] = ()) -> Stack:
        """Lay maps on their common lattice.

        Raises:
            InputError: a map has no date or no CRS, or its pixels are not those of the others.
        """
        undated = [m for m in maps if m.day is None]
        if undated:
            more = f" and {len(undated) - 1} more" if len(undated) > 1 else ""
            raise InputError(
                f"{undated[0].mask}{more}: no date; a series needs one, in the map's record or "
                "its name (…_2023-01-15_kelp.tif)"
            )
        place, shape, offsets = lattice_of(maps)
        by_look: dict[tuple[date, str], list[tuple[Map, tuple[int, int]]]] = defaultdict(list)
        for entry, offset in sorted(
            zip(maps, offsets, strict=True), key=lambda pair: pair[0].scene_id
        ):
            assert entry.day is not None
            by_look[entry.day, entry.sensor or ""].append((entry, offset))
        looks = tuple(
            Look(day, sensor or None, *map(tuple, zip(*found, strict=True)))
            for (day, sensor), found in sorted(by_look.items(), key=lambda pair: pair[0])
        )
        first, last = looks[0].day.year, looks[-1].day
        return cls(
            place,
            shape,
            looks,
            first,
            (last.year - first) * 4 + (last.month - 1) // 3 + 1,
            tuple(regions),
            all(entry.no_expected_area is None for entry in maps),
            GroundArea.of(place, shape),
        )

    def quarter_of(self, day: date) -> int:
        """Number of a day's quarter."""
        return (day.year - self.first_year) * 4 + (day.month - 1) // 3

    def name_of(self, quarter: int) -> tuple[int, int]:
        """Year and quarter (1-4) of a quarter's number."""
        return self.first_year + quarter // 4, quarter % 4 + 1

    def strips(self) -> list[Tile]:
        """Windows of full width that cover the lattice from the top."""
        return list(Tile(0, 0, *self.shape).strips(STRIP_ROWS))

    def read(
        self, look: Look, tile: Tile, probabilities: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None] | None:
        """Mask of a look in a window, 255 where not observed, and what its areas are made of.

        None where the look does not reach the window.
        """
        mask = np.full((tile.height, tile.width), MASK_NODATA, np.uint8)
        values = np.full(mask.shape, np.nan, np.float32) if probabilities else None
        reached = False
        for entry, (row, column) in zip(look.maps, look.offsets, strict=True):
            there = tile.intersection(Tile(row, column, *entry.shape))
            if there is None:
                continue
            reached = True
            part, here = there.moved(-row, -column), there.slices_in(tile)
            found = entry.read(part)
            new = (mask[here] == MASK_NODATA) & (found != MASK_NODATA)
            mask[here][new] = found[new]
            if values is not None:
                p = entry.read_expected(part) if self.expected else found.astype(np.float32)
                assert p is not None
                if np.isnan(p[new]).any():
                    raise InputError(
                        f"{entry.probability}: no probability where {entry.mask.name} was "
                        "observed; make both again"
                    )
                values[here][new] = p[new]
        return (mask, values) if reached else None


def lattice_of(
    maps: Sequence[Map],
) -> tuple[Georeference, Shape, list[tuple[int, int]]]:
    """Where the lattice that covers all maps lies, its shape, and each map's first row and column.

    Raises:
        InputError: a map has no CRS, or its pixels are not those of the others.
    """
    places = _places(maps)
    top, left = (min(offset[k] for offset in places) for k in (0, 1))
    bottom, right = (
        max(o[k] + m.shape[k] for o, m in zip(places, maps, strict=True)) for k in (0, 1)
    )
    origin = maps[0].georeference
    assert origin.transform is not None
    moved = Georeference(origin.crs, origin.transform @ Affine.translation(left, top))
    offsets = [(row - top, column - left) for row, column in places]
    return moved, Shape(bottom - top, right - left), offsets


def _places(maps: Sequence[Map]) -> list[tuple[int, int]]:
    """Row and column of each map's first pixel on the lattice of the first map."""
    first = maps[0]
    lattice = first.georeference.transform
    if lattice is None or not first.georeference.on_earth:
        raise InputError(
            f"{first.mask}: has no CRS, or a local one; a series needs to know where its pixels lie"
        )
    back = ~lattice
    out = []
    for entry in maps:
        crs, transform = entry.georeference.crs, entry.georeference.transform
        if crs != first.georeference.crs or transform is None:
            raise InputError(
                f"{entry.mask}: lies in another CRS than {first.mask.name}; a series needs maps "
                "of one grid"
            )
        step = back @ transform
        row, column = round(step.f), round(step.c)
        # Corners, not only the origin: pixels of another size or turned ones drift apart.
        height, width = entry.shape
        for x, y in ((0, 0), (width, 0), (0, height), (width, height)):
            there = step @ (x, y)
            if max(abs(there[0] - column - x), abs(there[1] - row - y)) > _ALIGNED:
                raise InputError(
                    f"{entry.mask}: its pixels are not those of {first.mask.name}; a series needs "
                    "maps of one grid (gdalwarp -tap -tr …)"
                )
        out.append((row, column))
    return out


@dataclass(frozen=True)
class Strip:
    """What a strip of the lattice showed; n stations, Q quarters, R regions, K looks, G groups.

    Attributes:
        looks: times that each pixel was observed, `(height, width)`.
        kelp: times that it had kelp.
        rows: row of each station on the lattice, n.
        columns: its column.
        pixel_m2: its ground area.
        area: mean area in square metres of the looks of a quarter, `(Q, n)`, NaN = unseen.
        presence: whether it had kelp in a quarter, `(Q, n)`.
        passes: looks of a quarter by group of sensors, `(G, Q, n)`.
        inside: which stations lie in a region, `(R, n)`.
        look_area: area that a look saw in a region, `(R, K)`.
        look_seen: stations that it saw there, `(R, K)`.
    """

    looks: NDArray[np.uint16]
    kelp: NDArray[np.uint16]
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    pixel_m2: NDArray[np.float64]
    area: NDArray[np.float32]
    presence: NDArray[np.bool_]
    passes: NDArray[np.uint8]
    inside: NDArray[np.bool_]
    look_area: NDArray[np.float64]
    look_seen: NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        with atomic(path) as partial:
            np.savez(partial, **arrays)

    @classmethod
    def load(cls, path: Path) -> Strip:
        """Read it."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{field.name: stored[field.name] for field in fields(cls)})


def work_strip(stack: Stack, tile: Tile) -> Strip:
    """What a strip of the lattice showed."""
    looks, kelp = np.zeros((2, tile.height, tile.width), np.uint16)
    for look in stack.looks:
        if found := stack.read(look, tile, probabilities=False):
            looks += found[0] != MASK_NODATA
            kelp += found[0] == 1
    footprint = kelp > 0
    if stack.regions:
        covers = [Cover.of(r, stack.georeference, stack.shape) for r in stack.regions]
        within = np.stack([cover.inside(tile) for cover in covers])
        footprint &= within.any(axis=0)
    y, x = np.nonzero(footprint)
    inside = within[:, y, x] if stack.regions else np.ones((1, len(y)), bool)
    pixel = np.broadcast_to(stack.area.pixels(tile), footprint.shape)[y, x]
    size = stack.quarters, len(y)
    area, presence = np.zeros(size, np.float32), np.zeros(size, bool)
    passes = np.zeros((len(GROUPS), *size), np.uint8)
    look_area = np.zeros((len(inside), len(stack.looks)))
    look_seen = np.zeros(look_area.shape, np.int64)
    for k, look in enumerate(stack.looks if len(y) else ()):
        found = stack.read(look, tile, probabilities=True)
        if found is None:
            continue
        mask, values = found[0][y, x], found[1]
        assert values is not None
        observed = mask != MASK_NODATA
        quarter = stack.quarter_of(look.day)
        part = np.where(observed, values[y, x], 0)
        area[quarter] += part
        presence[quarter] |= mask == 1
        counts = passes[group_of(look.sensor), quarter]
        counts += observed & (counts < 255)
        look_area[:, k] = inside @ (part * pixel)
        look_seen[:, k] = inside @ observed.astype(np.int64)
    for quarter in range(stack.quarters):  # one at a time: all of them would be large
        seen = passes[:, quarter].sum(axis=0, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # 0 / 0 where nothing was seen
            area[quarter] = area[quarter] / seen * pixel
    rows, columns = (y + tile.y).astype(np.int32), (x + tile.x).astype(np.int32)
    return Strip(
        looks, kelp, rows, columns, pixel, area, presence, passes, inside, look_area, look_seen
    )


@dataclass(frozen=True)
class Strips:
    """The strips of a stack, each in a file of a folder."""

    stack: Stack
    folder: Path

    def path(self, tile: Tile) -> Path:
        """The file of a strip."""
        return self.folder / f"strip-{tile.y:06d}.npz"

    def work(self, tile: Tile) -> None:
        """Make the file of a strip."""
        work_strip(self.stack, tile).save(self.path(tile))

    def left(self) -> list[Tile]:
        """Strips that have no file yet."""
        return [tile for tile in self.stack.strips() if not self.path(tile).is_file()]

    def __iter__(self) -> Iterator[tuple[Tile, Strip]]:
        """Strips from the top. One may fill some hundred MB: who reads them lets go of each."""
        for tile in self.stack.strips():
            yield tile, Strip.load(self.path(tile))


def station_count(strips: Strips) -> tuple[NDArray[np.int64], Any]:
    """Stations of each strip, and the first and last row and column that have one (or None)."""
    counts, boxes = [], []
    for _, strip in strips:
        counts.append(len(strip.rows))
        if len(strip.rows):
            boxes.append(
                [strip.rows.min(), strip.columns.min(), strip.rows.max(), strip.columns.max()]
            )
    box = np.array(boxes)
    ends = (*box[:, :2].min(axis=0), *box[:, 2:].max(axis=0)) if boxes else None
    return np.array(counts, np.int64), ends
