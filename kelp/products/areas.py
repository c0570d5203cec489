"""`kelp areas`: how much kelp each scene shows in each region, and how sure that is.

Null is never 0. Where too little of a region was observed, all its figures are null and
`null_reason` says why. Areas are those of the observed part: nothing is extrapolated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kelp.config.products import AreasConfig, RegionOptions
from kelp.errors import BundleError, ConfigError, InputError
from kelp.evaluation.intervals import AreaErrors, HeldOut, area_errors, read_held_out, sites_needed
from kelp.io.files import atomic, output_folder
from kelp.io.location import PACKAGED, packaged, packaged_names
from kelp.products.maps import Map, find_maps, require_comparable
from kelp.products.regions import Cover, Region, read_regions
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.window import Tile

log = logging.getLogger("kelp")

COLUMNS: Final = {
    "aoi_id": "string",
    "scene_id": "string",
    "acquired": "string",
    "sensor": "string",
    "pixels": "Int64",
    "observed_share": "float64",
    "unobserved_pixels": "Int64",
    "kelp_pixels": "Int64",
    "presence_area_m2": "float64",
    "expected_area_m2": "float64",
    "area_low_m2": "float64",
    "area_high_m2": "float64",
    "null_reason": "string",
}
"""Columns of the table and their types."""

_DECIMALS: Final = {"observed_share": 6} | dict.fromkeys(
    ("presence_area_m2", "expected_area_m2", "area_low_m2", "area_high_m2"), 1
)


@dataclass(frozen=True)
class Areas:
    """What `areas` wrote, as a table, and where."""

    path: Path
    table: pd.DataFrame

    def summary(self) -> str:
        """A few words for the terminal."""
        known = self.table["presence_area_m2"].notna()
        rows = len(self.table)
        return (
            f"wrote {self.path}: {rows} row{'s' * (rows != 1)}, {int((~known).sum())} without an "
            "area (null, not 0; null_reason says why)"
        )


@dataclass(frozen=True)
class Intervals:
    """How intervals are made: from expected areas, from presence areas, or why there are none."""

    expected: AreaErrors | None = None
    presence: AreaErrors | None = None
    reason: str | None = None

    def of(
        self, presence_m2: float, expected_m2: float | None, most_m2: float = np.inf
    ) -> tuple[float, float] | tuple[None, None]:
        """Low and high end of an area, at most `most_m2`; None where there is no interval."""
        if expected_m2 is not None and self.expected:
            low, high = self.expected.interval(expected_m2)
        elif self.presence:
            low, high = self.presence.interval(presence_m2)
        else:
            return None, None
        return min(low, most_m2), min(high, most_m2)


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over the pixels of a region in one map; `pixels` counts those outside the map, too."""

    pixels: float
    observed: int
    kelp: int
    presence_m2: float
    expected_m2: float | None
    observed_m2: float
    distrust: str | None = None
    """Why the map's record says that it may be wrong."""

    @property
    def observed_share(self) -> float | None:
        """Share of the region's pixels that were observed."""
        return self.observed / self.pixels if self.pixels else None

    @property
    def unobserved(self) -> int | None:
        """Pixels of the region that were not observed; None where it holds none."""
        return round(self.pixels - self.observed) if self.pixels else None

    def why_null(self, options: RegionOptions) -> str | None:
        """Why the region has no area in this map; None where it has."""
        share = self.observed_share
        if share is None:
            return "the region holds no centre of a pixel"
        if not self.observed:
            return "nothing of the region was observed"
        if share < options.min_observed:
            return f"only {share:.3f} of the region was observed"
        if self.distrust and not options.allow_distrusted:
            return f"the map may be wrong ({self.distrust})"
        return None


def areas(config: AreasConfig, progress: Progress = silent) -> Areas:
    """Write a table of one row for each region and scene.

    Raises:
        ConfigError: the ending of `output` is unknown, or geopandas is not installed.
        InputError: a map or a region cannot be used; maps do not go together.
        BundleError: `run_dir` holds no bundle, or not that of the maps.
    """
    suffix = config.output.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ConfigError(f"--output {config.output}: areas are written as .csv or .parquet")
    maps = find_maps(config.predictions_dir)
    require_comparable(maps, config.allow_mixed)
    regions = read_regions(config.aoi, config.aoi_id)
    intervals = intervals_of(config.run_dir, maps, config.coverage)
    warn_of_mixed_sensors(maps)
    rows = []
    for done, entry in enumerate(maps):
        progress("measuring areas", done, len(maps))
        for number, region in enumerate(regions):
            row = _row(entry, region, measure(entry, region), intervals, config)
            rows.append((number, entry.acquired_text or "", entry.scene_id, row))
    progress("measuring areas", len(maps), len(maps))
    rows.sort(key=lambda row: row[:3])
    table = pd.DataFrame([row for *_, row in rows], columns=list(COLUMNS)).astype(COLUMNS)
    table = table.round(_DECIMALS)
    output_folder(config.output.parent)
    write_table(table, config.output)
    config.record(config.output.parent)
    return Areas(config.output, table)


def measure(entry: Map, region: Region) -> Measured:
    """Count a map's pixels in a region. Raises `InputError` for a map without CRS."""
    place = entry.georeference
    if not place.on_earth:
        raise InputError(
            f"{entry.mask}: has no CRS, or a local one, so no region lies on it; give it one "
            "(gdal_edit.py -a_srs … -a_ullr …)"
        )
    cover = Cover.of(region, place, entry.shape)
    return _measured(entry, cover.strips(), cover.outside)


def measure_whole(entry: Map) -> Measured:
    """Count all pixels of a map."""
    whole = ((tile, np.ones((tile.height, tile.width), bool)) for tile in entry.strips())
    return _measured(entry, whole, 0)


def _measured(
    entry: Map, strips: Iterable[tuple[Tile, NDArray[np.bool_]]], outside: float
) -> Measured:
    pixels, observed, kelp, presence, observed_m2 = outside, 0, 0, 0.0, 0.0
    expected = None if entry.no_expected_area else 0.0
    for tile, inside in strips:
        if not inside.any():
            continue
        mask = entry.read(tile)
        seen = inside & (mask != MASK_NODATA)
        found = inside & (mask == 1)
        pixels += int(inside.sum())
        observed += int(seen.sum())
        kelp += int(found.sum())
        presence += entry.area.total(found, tile)
        observed_m2 += entry.area.total(seen, tile)
        if expected is not None and seen.any():
            p = entry.read_expected(tile)
            assert p is not None
            if np.isnan(p[seen]).any():
                raise InputError(
                    f"{entry.probability}: no probability where {entry.mask.name} was observed; "
                    "make both again"
                )
            expected += entry.area.total(np.where(seen, p, 0), tile)
    # What lies outside is no whole number: less than half a pixel is the polygon's rounded edge.
    pixels = pixels if outside >= 0.5 else pixels - outside
    return Measured(pixels, observed, kelp, presence, expected, observed_m2, entry.distrust)


def intervals_of(run_dir: Path | None, maps: Sequence[Map], coverage: float) -> Intervals:
    """Intervals from the errors at held-out sites that the maps' bundle knows.

    Without `run_dir` it is the packaged network that made all the maps, if one did.

    Raises:
        BundleError: it is not the bundle that made the maps.
    """
    if run_dir is not None:
        held_out = read_held_out(packaged(run_dir))
    elif (found := _packaged_of(maps)) is not None:
        held_out = found
    else:
        return Intervals(reason="no interval: no bundle was named (--run_dir)")
    for entry in maps:
        if entry.weights and held_out.sha256 not in entry.weights:
            raise BundleError(
                f"{run_dir}: not the network that made {entry.mask}; name the bundle of the maps"
            )
    expected = area_errors(held_out.pairs, coverage, expected=True)
    presence = area_errors(held_out.pairs, coverage, expected=False)
    if expected or presence:
        return Intervals(expected, presence)
    sites = len({pair.site for pair in held_out.pairs})
    return Intervals(
        reason=f"no interval: the bundle knows its errors at {sites} held-out sites, "
        f"{sites_needed(coverage)} are needed"
    )


def _packaged_of(maps: Sequence[Map]) -> HeldOut | None:
    for name in packaged_names():
        held_out = read_held_out(PACKAGED / name)
        if maps and all(entry.weights == (held_out.sha256,) for entry in maps):
            return held_out
    return None


def warn_of_mixed_sensors(maps: Sequence[Map]) -> None:
    """One notice where Landsat 5 or 7 and later sensors stand side by side."""
    sensors = {entry.sensor for entry in maps if entry.sensor}
    older = sensors & {"landsat-4", "landsat-5", "landsat-7"}
    if older and sensors - older:
        log.warning(
            "%s and %s together: visible bands of Landsat 4 to 7 are biased over water, a trend "
            "across them may be the sensors'",
            ", ".join(sorted(older)),
            ", ".join(sorted(sensors - older)),
        )


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV (nulls are empty fields) or Parquet, atomically."""
    with atomic(path) as partial:
        if path.suffix.lower() == ".csv":
            table.to_csv(partial, index=False, lineterminator="\n")
        else:
            table.to_parquet(partial, index=False)


def _row(
    entry: Map, region: Region, found: Measured, intervals: Intervals, config: AreasConfig
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "aoi_id": region.id,
        "scene_id": entry.scene_id,
        "acquired": entry.acquired_text,
        "sensor": entry.sensor,
        "pixels": round(found.pixels),
        "observed_share": found.observed_share,
        "unobserved_pixels": found.unobserved,
    }
    reason = found.why_null(config)
    if reason:
        return row | {"null_reason": reason}
    low, high = intervals.of(found.presence_m2, found.expected_m2, found.observed_m2)
    return row | {
        "kelp_pixels": found.kelp,
        "presence_area_m2": found.presence_m2,
        "expected_area_m2": found.expected_m2,
        "area_low_m2": low,
        "area_high_m2": high,
        "null_reason": reason_for(entry, intervals, low),
    }


def reason_for(entry: Map, intervals: Intervals, low: float | None) -> str | None:
    """Why a row with an area still lacks figures; None where it lacks none."""
    reasons = [entry.no_expected_area, intervals.reason if low is None else None]
    return "; ".join(filter(None, reasons)) or None
