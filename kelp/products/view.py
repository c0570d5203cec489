"""`kelp view`: maps, beds and areas as one HTML page that needs no network; the map of a report.

Leaflet is inlined. Maps are laid out in metres of their own CRS, so that no pixel is resampled;
there is no base map, which would need a server.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from kelp import __version__
from kelp.config.products import ViewConfig
from kelp.config.scenes import SceneOptions
from kelp.errors import ConfigError, InputError
from kelp.io.files import output_folder, write_text
from kelp.io.location import Url
from kelp.plotting import rendering, style
from kelp.products.areas import (
    Intervals,
    Measured,
    intervals_of,
    measure,
    measure_whole,
    reason_for,
    warn_of_mixed_sensors,
)
from kelp.products.beds import beds_of
from kelp.products.maps import Map, find_maps, require, require_comparable
from kelp.products.regions import Region, read_regions
from kelp.progress import Progress, silent
from kelp.raster.area import linear_unit
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import read_mask
from kelp.sensors.opening import find_scenes, open_scene, scene_name
from kelp.tables import output_name, read_table

log = logging.getLogger("kelp")

WHOLE: Final = "Whole map"
"""Name of the region where none is given."""

LARGEST_BEDS: Final = 300
"""Beds of a map on the page at most, the largest ones."""

_VALUES: Final = ("mean_area_m2", "area_low_m2", "area_high_m2")
_RAMP: Final = 48
_DEGREE_M: Final = 111_320.0
"""Metres in a degree of longitude at the equator (and, within 1 %, of latitude)."""


@dataclass(frozen=True)
class View:
    """The page, and what is on it."""

    path: Path
    maps: int
    beds: int

    def summary(self) -> str:
        """One line for the terminal."""
        size = self.path.stat().st_size / 1e6
        maps, beds = (
            f"{n} {what}{'s' * (n != 1)}" for n, what in ((self.maps, "map"), (self.beds, "bed"))
        )
        return f"wrote {self.path}: {maps}, {beds}, {size:.1f} MB"


@dataclass(frozen=True)
class Beside:
    """What is drawn beside a map: its scene, its true mask, and how they are read."""

    scene: Path | Url | None = None
    truth: Path | None = None
    kelp_value: int = 1
    options: SceneOptions | None = None


@dataclass(frozen=True)
class _Frame:
    """From a CRS to metres on the page: the lower left corner of all maps, and units in metres.

    Attributes:
        west: of the corner, in units of the CRS.
        south: likewise.
        x_m: metres of a unit eastward.
        y_m: likewise northward.
        extent: width and height of all maps in metres.
    """

    west: float
    south: float
    x_m: float
    y_m: float
    extent: tuple[float, float]

    def place(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Metres east and north of the corner."""
        return (x - self.west) * self.x_m, (y - self.south) * self.y_m


def view(config: ViewConfig, progress: Progress = silent) -> View:
    """Write one HTML page about a folder of maps.

    Raises:
        ConfigError: the output does not end in .html.
        InputError: a map cannot be used, or maps do not go together.
        BundleError: `run_dir` holds no bundle, or not that of the maps.
    """
    if config.output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {config.output}: a page is written as .html")
    maps = sorted(
        find_maps(config.predictions_dir), key=lambda m: (m.acquired_text or "9", m.scene_id)
    )
    require_comparable(maps, config.allow_mixed)
    regions = read_regions(config.aoi, config.aoi_id) if config.aoi else []
    intervals = intervals_of(config.run_dir, maps, config.coverage)
    warn_of_mixed_sensors(maps)
    quarters = _quarters(config.series_dir) if config.series_dir else None
    beside = {name: Beside(scene) for name, scene in _scenes(config.data_dir, maps).items()}
    frame = _frame(maps)
    data = _data(config, maps, [frame] * len(maps), beside, regions, intervals, progress)
    data["quarters"] = quarters
    output_folder(config.output.parent)
    parts = {
        "title": html.escape(config.title),
        "generator": f"kelp {__version__}",
        "about": html.escape(_about(maps)),
        "view_css": _asset("view.css"),
        "map": _section(data),
    }
    write_text(config.output, _filled("view.html", parts))
    config.record(config.output.parent)
    count = sum(len(m["beds"]["features"]) for m in data["maps"] if m["beds"])
    return View(config.output, len(maps), count)


def map_section(
    maps: Sequence[Map],
    beside: Mapping[str, Beside],
    config: ViewConfig,
    progress: Progress = silent,
) -> str:
    """The map as a part of another page, as HTML with its styles and scripts.

    Maps that do not all meet the first one are shown one on the other, each from its lower left
    corner.

    Args:
        maps: in the order of the slider.
        beside: what is drawn beside a map, by its mask's name.
        config: `side`, `beds`, `run_dir` and what decides whether an area is null.
        progress: progress callback.

    Raises:
        InputError: a map or what lies beside it cannot be used.
        BundleError: `run_dir` holds no bundle, or not that of the maps.
    """
    intervals = intervals_of(config.run_dir, maps, config.coverage)
    frames = [_frame(maps)] * len(maps) if _meet(maps) else [_frame([entry]) for entry in maps]
    return _section(_data(config, maps, frames, beside, [], intervals, progress))


def _data(
    config: ViewConfig,
    maps: Sequence[Map],
    frames: Sequence[_Frame],
    beside: Mapping[str, Beside],
    regions: Sequence[Region],
    intervals: Intervals,
    progress: Progress,
) -> dict[str, Any]:
    """What the page's script reads."""
    with_beds = config.beds and _can_have_beds(maps)
    names = [region.id for region in regions] or [WHOLE]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shown = []
    for at, (entry, frame) in enumerate(zip(maps, frames, strict=True)):
        progress("drawing maps", at, len(maps))
        drawn = _draw(entry, frame, config.side, beside.get(entry.mask.name, Beside()))
        drawn["beds"] = _beds(entry, frame, config.output) if with_beds else None
        shown.append(drawn)
        measured = [measure(entry, region) for region in regions] or [measure_whole(entry)]
        for name, found in zip(names, measured, strict=True):
            rows[name].append(_row(at, entry, found, intervals, config))
    progress("drawing maps", len(maps), len(maps))
    return {
        "maps": shown,
        "bounds": [[0.0, 0.0], [round(max(f.extent[k] for f in frames), 2) for k in (1, 0)]],
        "regions": names,
        "rows": rows,
        "coverage": config.coverage,
        "quarters": None,
        "colors": {
            "kelp": style.web_color(style.KELP),
            "water": style.web_color(style.NO_KELP),
            "missed": style.web_color(style.MISSED),
            "false": style.web_color(style.FALSE),
            "ramp": [style.web_color(tuple(c)) for c in _ramp()[::8].tolist()],
        },
    }


def _frame(maps: Sequence[Map]) -> _Frame:
    """Where the page's origin lies, and how far maps of one CRS reach."""
    first = maps[0].georeference.crs
    corners = []
    for entry in maps:
        if entry.georeference.crs != first:
            raise InputError(
                f"{entry.mask}: lies in another CRS than {maps[0].mask.name}; a page shows maps "
                "of one"
            )
        if entry.is_turned:
            raise InputError(f"{entry.mask}: its grid is turned; warp it first (gdalwarp)")
        corners.append(_corners(entry))
    west, south = (min(c[k] for c in corners) for k in (0, 1))
    east, north = (max(c[k] for c in corners) for k in (2, 3))
    x_m = y_m = 1.0
    if first is not None and first.is_geographic:
        y_m = _DEGREE_M
        x_m = _DEGREE_M * float(np.cos(np.radians((south + north) / 2)))
    elif first is not None:
        x_m = y_m = linear_unit(first) or 1.0
    return _Frame(west, south, x_m, y_m, ((east - west) * x_m, (north - south) * y_m))


def _meet(maps: Sequence[Map]) -> bool:
    """Whether all maps lie in one CRS and overlap the first."""
    first = maps[0].georeference.crs
    if any(entry.georeference.crs != first for entry in maps):
        return False
    corners = np.array([_corners(entry) for entry in maps])
    low = np.maximum(corners[:, :2], corners[0, :2])
    high = np.minimum(corners[:, 2:], corners[0, 2:])
    return bool((low < high).all())


def _corners(entry: Map) -> tuple[float, float, float, float]:
    """West, south, east and north end, in units of the CRS; in assumed metres without one."""
    height, width = entry.shape
    transform = entry.georeference.transform
    if transform is None or entry.georeference.crs is None:
        return 0.0, 0.0, width * entry.pixel_size, height * entry.pixel_size
    x, y = zip(*(transform @ corner for corner in ((0, 0), (width, height))), strict=True)
    return min(x), min(y), max(x), max(y)


def _draw(entry: Map, frame: _Frame, side: int, beside: Beside) -> dict[str, Any]:
    """The pictures of a map as PNGs in data URLs, and what the page says of it."""
    step = -(-max(entry.shape) // side)
    tiles = list(entry.strips(step * max(1, 512 // step)))
    mask = np.concatenate([rendering.shrink_mask(entry.read(tile), step) for tile in tiles])
    hatch = rendering.hatch(mask.shape)[..., 0] == style.HATCH_LIGHT[0]
    pictures = {"mask": _png(mask, [style.NO_KELP, style.KELP], hatch)}
    if entry.probability:
        p = np.concatenate([_shrunk(entry, tile, step) for tile in tiles])
        levels = np.where(np.isnan(p), MASK_NODATA, np.rint(np.nan_to_num(p) * (_RAMP - 1)))
        pictures["p"] = _png(levels, _ramp().tolist(), hatch)
    if beside.truth:
        codes = [
            rendering.shrink_errors(
                read_mask(beside.truth, tile, beside.kelp_value), entry.read(tile), step
            )
            for tile in tiles
        ]
        colors = [style.NO_KELP, style.KELP, style.MISSED, style.FALSE]
        pictures["errors"] = _png(np.concatenate(codes), colors, hatch)
    if beside.scene:
        with open_scene(beside.scene, beside.options) as source:
            if source.shape != entry.shape:
                raise InputError(
                    f"{beside.scene}: its pixels are not those of {entry.mask}; name the maps' own "
                    "scenes"
                )
            pixels = np.concatenate(
                [rendering.shrink_pixels(source.read(tile), step) for tile in tiles], axis=1
            )
        pictures["scene"] = _photo(rendering.composite(pixels, ("R", "G", "B")))
    # Blocks of the last row and column may reach over the map's edge: so does the picture.
    west, south, east, north = _corners(entry)
    across, down = (east - west) / entry.shape.width, (north - south) / entry.shape.height
    left, bottom = frame.place(west, north - down * step * mask.shape[0])
    right, top = frame.place(west + across * step * mask.shape[1], north)
    return {
        "name": entry.scene_id,
        "date": _date_words(entry),
        "year": _decimal_year(entry),
        "sensor": entry.sensor,
        "bounds": [[round(bottom, 2), round(left, 2)], [round(top, 2), round(right, 2)]],
        **pictures,
    }


def _shrunk(entry: Map, tile: Any, step: int) -> NDArray[np.float32]:
    p = entry.read_probability(tile)
    assert p is not None
    return rendering.shrink_plane(p, step)


def _ramp() -> NDArray[np.uint8]:
    return rendering.ramp("viridis", _RAMP).reshape(-1, 3)


def _png(codes: NDArray[Any], colors: Sequence[Sequence[int]], hatch: NDArray[np.bool_]) -> str:
    """Codes 0, 1 … in their colours, 255 hatched."""
    unseen = len(colors) + np.where(hatch, 1, 0)
    places = np.where(codes == MASK_NODATA, unseen, codes).astype(np.uint8)
    image = Image.fromarray(places, mode="P")
    image.putpalette(
        [part for color in (*colors, style.HATCH_DARK, style.HATCH_LIGHT) for part in color]
    )
    return _url(image, "png")


def _photo(picture: NDArray[np.uint8]) -> str:
    return _url(Image.fromarray(picture), "webp", quality=80)


def _url(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _can_have_beds(maps: Sequence[Map]) -> bool:
    try:
        require("geopandas", "geo", "beds")
    except ConfigError as error:
        log.info("no beds on the page: %s", error)
        return False
    return all(entry.georeference.on_earth for entry in maps)


def _beds(entry: Map, frame: _Frame, output: Path) -> dict[str, Any]:
    """The largest beds of a map as GeoJSON in metres of the page."""
    shapely = require("shapely", "geo", "beds")
    table = beds_of(entry, scratch=output_folder(output.parent))
    if len(table) > LARGEST_BEDS:
        log.info(
            "%s: the page shows the %d largest of its %d beds", entry.mask, LARGEST_BEDS, len(table)
        )
        table = table.nlargest(LARGEST_BEDS, "pixels")

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(frame.place(points[:, 0], points[:, 1]), axis=1).round(1)

    shapes = shapely.transform(table.geometry.to_numpy(), moved)
    wanted = [
        "bed_id",
        "pixels",
        "presence_area_m2",
        "expected_area_m2",
        "mean_p",
        "observed_share",
        "touches_edge",
        "touches_unobserved",
    ]
    facts = json.loads(table[wanted].to_json(orient="records", double_precision=4))
    return {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": fact, "geometry": json.loads(shapely.to_geojson(s))}
            for fact, s in zip(facts, shapes, strict=True)
        ],
    }


def _row(
    at: int, entry: Map, found: Measured, intervals: Intervals, config: ViewConfig
) -> dict[str, Any]:
    """Figures of a region in one map; null together, with the reason."""
    row: dict[str, Any] = dict.fromkeys(("expected", "presence", "low", "high"))
    row |= {"at": at, "observed": found.observed_share, "note": found.why_null(config)}
    if row["note"] is None:
        low, high = intervals.of(found.presence_m2, found.expected_m2, found.observed_m2)
        row |= {"expected": found.expected_m2, "presence": found.presence_m2}
        row |= {"low": low, "high": high, "note": reason_for(entry, intervals, low)}
    return row


def _quarters(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Quarters of `kelp series`, by region."""
    path = folder / "quarters.parquet"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --series_dir names a folder of kelp series")
    columns = ("year", "quarter", "aoi_id", "null_reason", *_VALUES)
    table = read_table(path, columns)
    odd = [name for name in ("year", "quarter", *_VALUES) if table[name].dtype.kind not in "if"]
    if odd:
        raise InputError(f"{path}: {odd[0]} is no number; make the table again with kelp series")
    out: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        value, low, high = (None if pd.isna(row[name]) else float(row[name]) for name in _VALUES)
        known = row["null_reason"] if value is None else f"{value / 1e6:.3f} km²"
        label = f"{row['year']} Q{row['quarter']}: {known}"
        x = row["year"] + (row["quarter"] - 0.5) / 4
        point = {"x": x, "value": value, "low": low, "high": high, "label": label}
        out.setdefault(WHOLE if row["aoi_id"] == "all" else row["aoi_id"], []).append(point)
    return out


def _date_words(entry: Map) -> str | None:
    """`2019-01-15 13:40 UTC`, or the day alone."""
    if isinstance(entry.acquired, datetime):
        return entry.acquired.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return entry.acquired_text


def _decimal_year(entry: Map) -> float | None:
    if entry.day is None:
        return None
    start = datetime(entry.day.year, 1, 1, tzinfo=UTC).date()
    return round(entry.day.year + (entry.day - start).days / 365.25, 4)


def _scenes(data_dir: Path | None, maps: Sequence[Map]) -> dict[str, Path | Url]:
    """The scene of each map, by the mask's name."""
    if data_dir is None:
        return {}
    known = {output_name(Path(f"{scene_name(s)}.tif")): s for s in find_scenes(data_dir)}
    found = {m.mask.name: known[m.mask.name] for m in maps if m.mask.name in known}
    if len(found) < len(maps):
        log.info("%s: holds scenes of %d of %d maps", data_dir, len(found), len(maps))
    return found


def _about(maps: Sequence[Map]) -> str:
    networks = sorted({m.network for m in maps if m.network})
    made = f"Maps made with {', '.join(networks)}. " if networks else ""
    return (
        f"{made}Page made by kelp {__version__}. Presence area counts pixels whole and is an upper "
        "bound; expected area sums calibrated probability x pixel area. Areas are ground areas of "
        "what was observed; nothing is extrapolated."
    )


def _section(data: Mapping[str, Any]) -> str:
    """The map, its slider, charts and table as HTML with their styles and scripts."""
    leaflet = _asset("leaflet.js").replace("//# sourceMappingURL=leaflet.js.map", "")
    parts = {
        "leaflet_css": _asset("leaflet.css"),
        "map_css": _asset("map.css"),
        "leaflet_js": leaflet,
        "map_js": _asset("map.js"),
        # Inside a script nothing of the data may end it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return _filled("map.html", parts)


def _asset(name: str) -> str:
    return (files("kelp.products") / "page" / name).read_text(encoding="utf-8")


def _filled(name: str, parts: Mapping[str, str]) -> str:
    """A page or a part of one; what is put in is not looked at for names again."""
    first, *pieces = _asset(name).split("{{")
    named = (piece.partition("}}") for piece in pieces)
    return "".join([first, *(parts[key] + rest for key, _, rest in named)])
