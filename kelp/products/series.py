"""`kelp series`: many maps of one coast as quarterly and yearly figures, stations and a grid.

An unseen quarter is null in every file, never 0. Sensors are counted, not harmonised.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kelp import __version__
from kelp.config.products import SeriesConfig
from kelp.errors import InputError
from kelp.io.executors import spread
from kelp.io.files import discard_partials, json_text, output_folder, write_text
from kelp.products.areas import Intervals, intervals_of, warn_of_mixed_sensors, write_table
from kelp.products.maps import Map, find_maps, require, require_comparable, trusted
from kelp.products.netcdf import write_grid, write_stations, write_zarr
from kelp.products.regions import read_regions
from kelp.products.stack import GROUPS, Stack, Strips, group_of, station_count
from kelp.progress import Progress, silent
from kelp.raster.writer import RasterWriter

log = logging.getLogger("kelp")

EVERYWHERE: Final = "all"
"""`aoi_id` of a series without regions."""

KELPWATCH: Final = (
    "year",
    "quarter",
    "kelp_area_m2",
    "count_cells_kelp",
    "count_cells_no_clouds",
    "count_cells_historic_footprint",
)
"""Header of the CSV files of kelpwatch.org."""

QUARTERS: Final = {
    "aoi_id": "string",
    "year": "int64",
    "quarter": "int64",
    "looks": "int64",
    **dict.fromkeys(GROUPS, "int64"),
    "sensors": "string",
    "stations": "int64",
    "stations_seen": "int64",
    "observed_share": "float64",
    "mean_area_m2": "float64",
    "max_area_m2": "float64",
    "max_day": "string",
    "area_low_m2": "float64",
    "area_high_m2": "float64",
    "area_is": "string",
    "tide_m": "float64",
    "null_reason": "string",
}
"""Columns of quarters.parquet and their types."""

YEARS: Final = {
    "aoi_id": "string",
    "year": "int64",
    "quarters_seen": "int64",
    "sum_first_m2": "float64",
    "max_first_m2": "float64",
    "max_first_seen_share": "float64",
    "max_occupiable_area_m2": "float64",
    "baseline_median_m2": "float64",
    "status": "float64",
    "null_reason": "string",
}
"""Columns of years.parquet and their types."""

_TIDE_GAP: Final = 3 * 3600.0
"""Seconds between two tides of a table, at most, to interpolate between them."""


@dataclass(frozen=True)
class Series:
    """What `series` wrote: the files, and the tables of quarters and years."""

    files: tuple[Path, ...]
    quarters: pd.DataFrame
    years: pd.DataFrame
    stations: int

    def summary(self) -> str:
        """A few lines for the terminal."""
        unseen = int(self.quarters["mean_area_m2"].isna().sum())
        lines = [
            f"{self.stations} stations; {len(self.quarters)} rows of quarters, {unseen} without an "
            "area (null, not 0; null_reason says why)"
        ]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def series(config: SeriesConfig, progress: Progress = silent) -> Series:
    """Make the series of a folder of maps of one coast.

    Raises:
        ConfigError: netCDF4 is not installed (or geopandas, for regions; zarr, for `zarr`).
        InputError: a map cannot be used, or maps do not go together.
        BundleError: `run_dir` holds no bundle, or not that of the maps.
    """
    require("netCDF4", "series", "writing NetCDF")
    if config.zarr:
        require("zarr", "series", "writing Zarr")
    maps = trusted(find_maps(config.predictions_dir), config.allow_distrusted)
    require_comparable(maps, config.allow_mixed)
    regions = read_regions(config.aoi, config.aoi_id) if config.aoi else []
    stack = Stack.of(maps, regions)
    tides = read_tides(config.tides) if config.tides else None
    intervals = intervals_of(config.run_dir, maps, config.coverage)
    warn_of_mixed_sensors(maps)
    if not stack.expected and any(entry.no_expected_area is None for entry in maps):
        log.warning("some maps have no expected area: the series is of presence areas")
    folder = output_folder(config.output_dir)
    strips = _strips(stack, maps, config, folder, progress)
    counts, box = station_count(strips)
    source = "; ".join(sorted({m.network or "a mask of another program" for m in maps}))
    files = [folder / name for name in ("stations.nc", "looks.tif", "persistence.tif")]
    write_stations(files[0], strips, counts, source)
    _write_rasters(strips, *files[1:])
    if box is None:
        log.warning("%s: no map shows kelp, so there are no stations", config.predictions_dir)
        (folder / "grid.nc").unlink(missing_ok=True)
        shutil.rmtree(folder / "grid.zarr", ignore_errors=True)
    else:
        files.append(folder / "grid.nc")
        write_grid(files[-1], strips, box, source)
        if config.zarr:
            files.append(folder / "grid.zarr")
            write_zarr(files[-1], files[-2])
    sums = _Sums.of(strips)
    quarters = _quarters(stack, sums, intervals, tides, config)
    years = _years(stack, sums, quarters, config.baseline_years)
    for name, table in (("quarters", quarters), ("years", years)):
        files.append(folder / f"{name}.parquet")
        write_table(table, files[-1])
    files += [folder / "kelpwatch.csv", folder / "scenes.csv"]
    write_text(files[-2], _kelpwatch(stack, sums))
    write_table(_scenes(stack, tides), files[-1])
    config.record(folder)
    shutil.rmtree(strips.folder, ignore_errors=True)
    return Series(tuple(files), quarters, years, int(counts.sum()))


def _strips(
    stack: Stack, maps: Sequence[Map], config: SeriesConfig, folder: Path, progress: Progress
) -> Strips:
    """The strips of a stack; those that a killed run of the same inputs left are kept."""
    strips = Strips(stack, folder / ".series")
    plan = strips.folder / "plan.json"
    text = json_text(_plan(maps, config))
    if not plan.is_file() or plan.read_text(encoding="utf-8") != text:
        shutil.rmtree(strips.folder, ignore_errors=True)
        output_folder(strips.folder)
        write_text(plan, text)
    discard_partials(strips.folder)
    left, total = strips.left(), len(stack.strips())
    if len(left) < total:
        log.info("%s: resumed after %d of %d strips", folder, total - len(left), total)
    with closing(spread(strips.work, left, config.workers)) as results:
        for done, _ in enumerate(results, total - len(left) + 1):
            progress("stacking maps", done, total)
    return strips


def _plan(maps: Sequence[Map], config: SeriesConfig) -> dict[str, Any]:
    """What the strips depend on."""
    files = [file for m in maps for file in (m.mask, m.probability) if file]
    files += [config.aoi] if config.aoi else []
    stated = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    scenes = [[m.scene_id, m.acquired_text, m.sensor, m.no_expected_area] for m in maps]
    plan = {"kelp": __version__, "files": stated, "scenes": scenes, "aoi_id": config.aoi_id}
    return json.loads(json.dumps(plan))  # type: ignore[no-any-return]


@dataclass
class _Sums:
    """Figures summed over strips; R regions, Q quarters, Y years, K looks.

    Attributes:
        stations: `(R,)`.
        ever_max: sum of the stations' highest quarters of all years, `(R,)`.
        area: mean area of quarters, `(R, Q)`; 0 where nothing was seen.
        seen: stations seen, `(R, Q)`.
        year_max: sum of the stations' highest quarters, `(R, Y)`.
        year_seen: stations seen in a year, `(R, Y)`.
        look_area: `(R, K)`.
        look_seen: `(R, K)`.
        all_area: area of quarters over all stations, each once, `(Q,)`.
        all_seen: stations seen, each once, `(Q,)`.
        all_kelp: stations with kelp, each once, `(Q,)`.
        all_stations: how many there are.
    """

    stations: NDArray[np.int64]
    ever_max: NDArray[np.float64]
    area: NDArray[np.float64]
    seen: NDArray[np.int64]
    year_max: NDArray[np.float64]
    year_seen: NDArray[np.int64]
    look_area: NDArray[np.float64]
    look_seen: NDArray[np.int64]
    all_area: NDArray[np.float64]
    all_seen: NDArray[np.int64]
    all_kelp: NDArray[np.int64]
    all_stations: int = field(default=0)

    @classmethod
    def of(cls, strips: Strips) -> _Sums:
        stack = strips.stack
        r, q, k = max(1, len(stack.regions)), stack.quarters, len(stack.looks)
        years = -(-q // 4)
        i, f = np.int64, np.float64
        sums = cls(
            np.zeros(r, i),
            np.zeros(r, f),
            np.zeros((r, q), f),
            np.zeros((r, q), i),
            np.zeros((r, years), f),
            np.zeros((r, years), i),
            np.zeros((r, k), f),
            np.zeros((r, k), i),
            np.zeros(q, f),
            np.zeros(q, i),
            np.zeros(q, i),
        )
        for _, strip in strips:
            inside, counted = strip.inside.astype(f), strip.inside.astype(i)
            sums.stations += counted.sum(axis=1)
            ever = np.zeros(len(strip.rows))
            for year in range(years):
                highest, any_seen = np.zeros((2, len(strip.rows)))
                for quarter in range(4 * year, min(4 * year + 4, q)):
                    seen = ~np.isnan(strip.area[quarter])
                    area = np.where(seen, strip.area[quarter], 0).astype(f)
                    sums.area[:, quarter] += inside @ area
                    sums.seen[:, quarter] += counted @ seen.astype(i)
                    sums.all_area[quarter] += area.sum()
                    sums.all_seen[quarter] += seen.sum()
                    sums.all_kelp[quarter] += strip.presence[quarter].sum()
                    highest = np.maximum(highest, area)
                    any_seen = np.maximum(any_seen, seen)
                ever = np.maximum(ever, highest)
                sums.year_max[:, year] += inside @ highest
                sums.year_seen[:, year] += counted @ any_seen.astype(i)
            sums.ever_max += inside @ ever
            sums.look_area += strip.look_area
            sums.look_seen += strip.look_seen
            sums.all_stations += len(strip.rows)
            del strip
        return sums


def _quarters(
    stack: Stack,
    sums: _Sums,
    intervals: Intervals,
    tides: Tides | None,
    config: SeriesConfig,
) -> pd.DataFrame:
    rows = []
    looks_of = _by_quarter(stack)
    for r, region in enumerate(_names(stack)):
        stations = int(sums.stations[r])
        for quarter in range(stack.quarters):
            year, number = stack.name_of(quarter)
            looks = [k for k in looks_of[quarter] if sums.look_seen[r, k]]
            groups = [_group(stack, k) for k in looks]
            seen = int(sums.seen[r, quarter])
            row: dict[str, Any] = {
                "aoi_id": region,
                "year": year,
                "quarter": number,
                "looks": len(looks),
                **{name: groups.count(name) for name in GROUPS},
                "sensors": ", ".join(sorted({stack.looks[k].sensor or "unknown" for k in looks})),
                "stations": stations,
                "stations_seen": seen,
                "observed_share": seen / stations if stations else None,
                "area_is": "expected" if stack.expected else "presence",
                "tide_m": _mean_tide(stack, looks, tides),
            }
            reason = None
            if not stations:
                reason = "no map ever showed kelp in the region"
            elif not seen:
                reason = "the quarter was not observed"
            elif seen / stations < config.min_observed:
                reason = f"only {seen / stations:.3f} of the stations were observed"
            if reason is None:
                area = float(sums.area[r, quarter])
                low, high = intervals.of(area, area if stack.expected else None)
                full = [k for k in looks if sums.look_seen[r, k] / stations >= config.min_observed]
                best = max(full, key=lambda k: sums.look_area[r, k], default=None)
                row |= {
                    "mean_area_m2": area,
                    "area_low_m2": low,
                    "area_high_m2": high,
                    "max_area_m2": None if best is None else float(sums.look_area[r, best]),
                    "max_day": None if best is None else stack.looks[best].day.isoformat(),
                }
                reasons = [
                    intervals.reason if low is None else None,
                    "no maximum: no look saw enough of the stations" if best is None else None,
                ]
                reason = "; ".join(filter(None, reasons)) or None
            rows.append(row | {"null_reason": reason})
    return pd.DataFrame(rows, columns=list(QUARTERS)).astype(QUARTERS)


def _years(
    stack: Stack, sums: _Sums, quarters: pd.DataFrame, baseline: tuple[int, int] | None
) -> pd.DataFrame:
    """Annual figures as ecologists compute them.

    "Sum first" is the largest quarterly area of the year; "max first" sums each station's largest
    quarter, whenever that was; the maximum occupiable area does so over all years. Status is the
    year's sum-first area by the baseline's median.
    """
    rows = []
    for r, region in enumerate(_names(stack)):
        mine = quarters[quarters["aoi_id"] == region].groupby("year")["mean_area_m2"]
        highest, seen = mine.max(), mine.count()
        median = None
        if baseline:
            median = highest[highest.index.to_series().between(*baseline)].median()
        for index, year in enumerate(highest.index):
            sum_first = highest[year]
            share = sums.year_seen[r, index] / sums.stations[r] if sums.stations[r] else None
            row: dict[str, Any] = {
                "aoi_id": region,
                "year": year,
                "quarters_seen": seen[year],
                "sum_first_m2": sum_first,
                "max_first_seen_share": share,
                "max_occupiable_area_m2": sums.ever_max[r] if sums.stations[r] else None,
                "baseline_median_m2": median,
            }
            reasons = []
            if np.isnan(sum_first):
                reasons.append("no quarter was observed well enough")
            else:
                row["max_first_m2"] = sums.year_max[r, index]
            if baseline is None:
                reasons.append("no status: no baseline was named (--baseline)")
            elif median is None or np.isnan(median):
                reasons.append("no status: no year of the baseline was observed well enough")
            elif median == 0:
                reasons.append("no status: the baseline's median is 0")
            else:
                row["status"] = sum_first / median
            rows.append(row | {"null_reason": "; ".join(reasons) or None})
    return pd.DataFrame(rows, columns=list(YEARS)).astype(YEARS)


def _kelpwatch(stack: Stack, sums: _Sums) -> str:
    """The CSV of kelpwatch.org; what was not seen is an empty field, not 0 as there."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(KELPWATCH)
    for first in range(0, stack.quarters, 4):
        year = stack.name_of(first)[0]
        rows = []
        for quarter in range(first, min(first + 4, stack.quarters)):
            seen = int(sums.all_seen[quarter])
            known = [round(float(sums.all_area[quarter]), 1), int(sums.all_kelp[quarter])]
            rows.append([*(known if seen else [None, None]), seen, sums.all_stations])
            out.writerow([year, quarter - first + 1, *rows[-1]])
        columns = [[v for v in column if v is not None] for column in zip(*rows, strict=True)]
        out.writerow([year, "max", *(max(column, default=None) for column in columns)])
    return text.getvalue()


def _scenes(stack: Stack, tides: Tides | None) -> pd.DataFrame:
    """One row a map: which look it belongs to, and its turn in the look's mosaic."""
    rows = [
        {
            "scene_id": entry.scene_id,
            "acquired": entry.acquired_text,
            "sensor": entry.sensor,
            "year": look.day.year,
            "quarter": (look.day.month - 1) // 3 + 1,
            "look": number,
            "mosaic_order": order,
            "tide_m": tides.at(entry) if tides else None,
        }
        for number, look in enumerate(stack.looks, 1)
        for order, entry in enumerate(look.maps, 1)
    ]
    return pd.DataFrame(rows)


def _write_rasters(strips: Strips, looks_path: Path, persistence_path: Path) -> None:
    """How often each pixel was seen, and in which share of these looks it had kelp."""
    stack = strips.stack
    place = stack.georeference
    with (
        RasterWriter(
            looks_path, stack.shape, "float32", place, np.nan, {}, description="looks"
        ) as looks,
        RasterWriter(
            persistence_path,
            stack.shape,
            "float32",
            place,
            np.nan,
            {},
            description="share of looks with kelp",
        ) as persistence,
    ):
        for tile, strip in strips:
            looks.write(tile.y, strip.looks.astype(np.float32))
            with np.errstate(invalid="ignore"):
                share = strip.kelp.astype(np.float32) / strip.looks
            persistence.write(tile.y, share)
            del strip


def _names(stack: Stack) -> list[str]:
    return [region.id for region in stack.regions] or [EVERYWHERE]


def _by_quarter(stack: Stack) -> list[list[int]]:
    looks: list[list[int]] = [[] for _ in range(stack.quarters)]
    for k, look in enumerate(stack.looks):
        looks[stack.quarter_of(look.day)].append(k)
    return looks


def _group(stack: Stack, look: int) -> str:
    return GROUPS[group_of(stack.looks[look].sensor)]


def _mean_tide(stack: Stack, looks: Sequence[int], tides: Tides | None) -> float | None:
    if tides is None:
        return None
    known = [tide for k in looks if (tide := tides.at(stack.looks[k].maps[0])) is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Tides:
    """Heights of the water in metres at moments, seconds since 1970 UTC, in order."""

    seconds: NDArray[np.float64]
    heights: NDArray[np.float64]

    def at(self, entry: Map) -> float | None:
        """Height when a scene was taken; None without a time, or where the table has a gap."""
        if not isinstance(entry.acquired, datetime):
            return None
        moment = entry.acquired.timestamp()
        after = int(np.searchsorted(self.seconds, moment))
        if after < len(self.seconds) and self.seconds[after] == moment:
            return float(self.heights[after])
        if not 0 < after < len(self.seconds):
            return None
        if self.seconds[after] - self.seconds[after - 1] > _TIDE_GAP:
            return None
        return float(np.interp(moment, self.seconds, self.heights))


def read_tides(path: Path) -> Tides:
    """Tides of a CSV with the columns `time` (ISO 8601, UTC) and `height_m`.

    Raises:
        InputError: the file cannot be read, or a row has no time or height.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        table = pd.read_csv(path)
        absent = [name for name in ("time", "height_m") if name not in table]
        if absent:
            raise ValueError(f"no column {absent[0]}")
        moments = pd.to_datetime(table["time"], utc=True, format="ISO8601")
        heights = pd.to_numeric(table["height_m"]).to_numpy(np.float64)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a table of tides ({reason}); it needs the columns time (ISO 8601, UTC) "
            "and height_m"
        ) from error
    start = pd.Timestamp(datetime(1970, 1, 1, tzinfo=UTC))
    seconds: NDArray[np.float64] = (
        (moments - start).dt.total_seconds().to_numpy().astype(np.float64)
    )
    if not (np.isfinite(seconds) & np.isfinite(heights)).all() or not len(seconds):
        raise InputError(f"{path}: a row has no time or no height; remove it")
    order = np.argsort(seconds, kind="stable")
    return Tides(seconds[order], heights[order])
