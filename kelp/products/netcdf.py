"""Files of a series: stations as SBC LTER's clients read them, and a CF grid, also as Zarr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from kelp import __version__
from kelp.errors import InputError
from kelp.io.files import atomic, atomic_folder
from kelp.products.maps import require
from kelp.products.stack import GROUPS, SENSOR_GROUPS, STRIP_ROWS, Stack, Strip, Strips
from kelp.raster.window import Tile

_EPOCH: Final = date(1970, 1, 1)
_UNITS: Final = "days since 1970-01-01"
_CHUNK: Final = 512
_STATIONS: Final = 4096
_QUARTERS: Final = 4
"""Quarters of a chunk of Zarr: a file each would be many files."""
_CACHE: Final = 4_000_000
"""Bytes of written chunks that HDF5 keeps for a variable; its own default is far larger."""
_COMPRESSED: Final[dict[str, Any]] = {"zlib": True, "complevel": 1, "chunk_cache": _CACHE}
_MIDDLE: Final = {1: (2, 15), 2: (5, 15), 3: (8, 15), 4: (11, 15)}
"""Month and day that stand for a quarter."""


def _area_attributes(stack: Stack, **more: str) -> dict[str, str]:
    """What `area` means."""
    if stack.expected:
        name = "expected kelp canopy area of the pixel"
        what = "calibrated probability x ground area of the pixel"
    else:
        name = "kelp presence area of the pixel, an upper bound"
        what = "presence (0 or 1) x ground area of the pixel"
    return {
        "long_name": name,
        "comment": f"mean over the looks of the quarter of {what}; not the fractional cover of SBC "
        "LTER's area",
        "units": "m2",
        "cell_methods": "time: mean",
        **more,
    }


def write_stations(path: Path, strips: Strips, counts: NDArray[np.int64], source: str) -> None:
    """Write `time x station`; the order of variables is that which clients count on.

    kelpdecline's reader takes variables by position: latitude, longitude, year, quarter, and the
    fifth as the figure. Unseen is -1 (`_FillValue`), never 0.
    """
    stack = strips.stack
    total = int(counts.sum())
    with _dataset(path) as file:
        _station_variables(file, stack, total)
        file.setncatts(_about(stack, "Kelp canopy by quarter, stations", source))
        start = 0
        for count, (_, strip) in zip(counts, strips, strict=True):
            if not count:
                continue
            here = slice(start, start + int(count))
            lat, lon = _degrees(stack, strip.rows, strip.columns)
            file["latitude"][here], file["longitude"][here] = lat, lon
            file["area"][:, here] = np.where(np.isnan(strip.area), -1, strip.area)
            file["passes"][:, here] = strip.passes.sum(axis=0, dtype=np.int16)
            for k, name in enumerate(GROUPS):
                file[name][:, here] = strip.passes[k]
            file.sync()  # else written chunks pile up in memory
            start += int(count)
            del strip


def _station_variables(file: Any, stack: Stack, total: int) -> None:
    """Dimensions and variables of the stations' file, in its order."""
    file.createDimension("time", stack.quarters)
    file.createDimension("station", total)
    _time(file, stack, bounds=False)
    along = {"chunksizes": (min(_STATIONS, total),)} if total else {}
    both = dict(_COMPRESSED)
    if total:
        both["chunksizes"] = (stack.quarters, min(_STATIONS, total))
    for name, unit in (("latitude", "degrees_north"), ("longitude", "degrees_east")):
        variable = file.createVariable(name, "f8", ("station",), zlib=True, **along)
        words = f"{name} of the pixel's centre, WGS 84"
        variable.setncatts({"standard_name": name, "units": unit, "long_name": words})
    names = [stack.name_of(q) for q in range(stack.quarters)]
    for k, (name, words) in enumerate((("year", "year"), ("quarter", "quarter of the year, 1-4"))):
        variable = file.createVariable(name, "i4", ("time",))
        variable.setncatts({"long_name": words, "units": "1"})
        variable[:] = [pair[k] for pair in names]
    places = {"coordinates": "latitude longitude"}
    area = file.createVariable("area", "f4", ("time", "station"), fill_value=-1, **both)
    area.setncatts(_area_attributes(stack, **places))
    for name in ("passes", *GROUPS):
        passes = file.createVariable(name, "i2", ("time", "station"), **both)
        sensors = ", ".join(SENSOR_GROUPS.get(name, ()))
        of = f" of {sensors}" if sensors else "" if name == "passes" else " of other sensors"
        passes.setncatts({"long_name": f"looks averaged{of}", "units": "1", **places})


def write_grid(path: Path, strips: Strips, box: tuple[int, ...], source: str) -> None:
    """Write `time x y x x` (CF-1.11) over the part of the lattice that holds stations.

    Chunks without a station are not stored: they read as fill, which is "not observed".
    """
    stack = strips.stack
    # Whole chunks from a strip's border on, so that none is written twice.
    top, left = box[0] // STRIP_ROWS * STRIP_ROWS, box[1] // _CHUNK * _CHUNK
    right = min(stack.shape[1], -(-(box[3] + 1) // _CHUNK) * _CHUNK)
    window = Tile(top, left, box[2] + 1 - top, right - left)
    transform = stack.georeference.transform
    assert transform is not None
    if transform.b or transform.d:
        raise InputError(f"{path}: a turned grid cannot be written as NetCDF; warp the maps first")
    with _dataset(path) as file:
        sizes = {"time": stack.quarters, "nv": 2, "y": window.height, "x": window.width}
        for name, size in sizes.items():
            file.createDimension(name, size)
        _time(file, stack, bounds=True)
        _axes(file, stack, window)
        _grid_variables(file, stack, window)
        file.setncatts(_about(stack, "Kelp canopy by quarter, grid", source))
        for tile, strip in strips:
            _write_strip(file, tile.y, strip, window)
            del strip


def _axes(file: Any, stack: Stack, window: Tile) -> None:
    """Centres of rows and columns, and the CRS they are in."""
    transform = stack.georeference.transform
    assert transform is not None
    crs = CRS.from_user_input(stack.georeference.crs)
    degrees = bool(crs.is_geographic)
    metres = "m" if degrees or crs.linear_units_factor[1] == 1 else str(crs.linear_units)
    x = transform.c + transform.a * (window.x + np.arange(window.width) + 0.5)
    y = transform.f + transform.e * (window.y + np.arange(window.height) + 0.5)
    for name, values in (("y", y), ("x", x)):
        variable = file.createVariable(name, "f8", (name,))
        axis = {"y": "latitude", "x": "longitude"}[name]
        kind = axis if degrees else f"projection_{name}_coordinate"
        unit = {"y": "degrees_north", "x": "degrees_east"}[name] if degrees else metres
        variable.setncatts({"standard_name": kind, "units": unit, "axis": name.upper()})
        variable[:] = values
    west = transform.c + transform.a * window.x
    north = transform.f + transform.e * window.y
    _grid_mapping(file, crs, (west, transform.a, 0.0, north, 0.0, transform.e))


def _grid_variables(file: Any, stack: Stack, window: Tile) -> None:
    """Variables of the pixels, empty."""
    chunks = (1, min(STRIP_ROWS, window.height), min(_CHUNK, window.width))
    options = _COMPRESSED | {"chunksizes": chunks}
    mapping = {"grid_mapping": "crs"}
    area = file.createVariable("area", "f4", ("time", "y", "x"), fill_value=np.nan, **options)
    area.setncatts(_area_attributes(stack, **mapping))
    passes = file.createVariable("passes", "i2", ("time", "y", "x"), fill_value=-1, **options)
    passes.setncatts({"long_name": "looks averaged", "units": "1", **mapping})
    footprint = file.createVariable(
        "footprint", "i1", ("y", "x"), zlib=True, complevel=1, chunksizes=chunks[1:]
    )
    footprint.setncatts(
        {
            "long_name": "pixels that had kelp in at least one map",
            "flag_values": np.array([0, 1], np.int8),
            "flag_meanings": "outside inside",
            **mapping,
        }
    )


def _write_strip(file: Any, row: int, strip: Strip, window: Tile) -> None:
    """Write the stations of a strip that begins at this row; chunks that hold none are left out."""
    rows, columns = strip.rows - window.y, strip.columns - window.x
    y0 = row - window.y
    counts = strip.passes.sum(axis=0, dtype=np.int16)
    for chunk in np.unique(columns // _CHUNK):
        chosen = columns // _CHUNK == chunk
        x0 = int(chunk) * _CHUNK
        x1, y1 = min(x0 + _CHUNK, window.width), min(y0 + STRIP_ROWS, window.height)
        at = rows[chosen] - y0, columns[chosen] - x0
        marks = np.zeros((y1 - y0, x1 - x0), np.int8)
        marks[at] = 1
        file["footprint"][y0:y1, x0:x1] = marks
        for quarter in range(len(strip.area)):
            values = np.full(marks.shape, np.nan, np.float32)
            values[at] = strip.area[quarter, chosen]
            times = np.full(marks.shape, -1, np.int16)
            times[at] = counts[quarter, chosen]
            file["area"][quarter, y0:y1, x0:x1] = values
            file["passes"][quarter, y0:y1, x0:x1] = times


def write_zarr(path: Path, grid: Path) -> None:
    """Write the grid of a NetCDF file as Zarr: the same variables, a year a chunk.

    Format 2, which GDAL reads from 3.4 on; 3.10 fails on format 3. Chunks of fill are not stored.
    """
    netcdf = require("netCDF4", "series", "reading NetCDF")
    zarr, codecs = (require(name, "series", "writing Zarr") for name in ("zarr", "numcodecs"))
    with netcdf.Dataset(grid) as file, atomic_folder(path) as partial:
        file.set_auto_maskandscale(False)
        group = zarr.create_group(partial, zarr_format=2, attributes=_attributes(file))
        for name, variable in file.variables.items():
            attributes = _attributes(variable) | {"_ARRAY_DIMENSIONS": list(variable.dimensions)}
            if mapping := attributes.get("grid_mapping"):  # GDAL before 3.10 looks here
                attributes["_CRS"] = {"wkt": file[mapping].crs_wkt}
            stored = variable.chunking()
            chunks = list(variable.shape if stored == "contiguous" else stored)
            if variable.dimensions[:1] == ("time",):
                chunks[0] = min(_QUARTERS, variable.shape[0])
            array = group.create_array(
                name,
                shape=variable.shape,
                dtype=variable.dtype,
                chunks=tuple(chunks),
                fill_value=attributes.pop("_FillValue", None),
                attributes=attributes,
                compressors=codecs.Zlib(level=1),
            )
            starts = (range(0, n, step) for n, step in zip(variable.shape, chunks, strict=True))
            for corner in product(*starts):
                block = tuple(slice(k, k + n) for k, n in zip(corner, chunks, strict=True))
                array[block] = variable[block]
        zarr.consolidate_metadata(partial)


def _attributes(of: Any) -> dict[str, Any]:
    """Attributes of a NetCDF file or variable as JSON knows them."""
    values = {name: of.getncattr(name) for name in of.ncattrs()}
    return {
        k: v.tolist() if isinstance(v, np.generic | np.ndarray) else v for k, v in values.items()
    }


@contextmanager
def _dataset(path: Path) -> Iterator[Any]:
    netcdf = require("netCDF4", "series", "writing NetCDF")
    with atomic(path) as partial, netcdf.Dataset(partial, "w", format="NETCDF4") as file:
        yield file


def _time(file: Any, stack: Stack, bounds: bool) -> None:
    names = [stack.name_of(q) for q in range(stack.quarters)]
    variable = file.createVariable("time", "i4", ("time",))
    variable.setncatts(
        {
            "standard_name": "time",
            "long_name": "middle of the quarter",
            "units": _UNITS,
            "calendar": "standard",
            "axis": "T",
            "units_metadata": "leap_seconds: none",
        }
    )
    variable[:] = [_days(date(year, *_MIDDLE[quarter])) for year, quarter in names]
    if bounds:
        variable.bounds = "time_bnds"
        limits = file.createVariable("time_bnds", "i4", ("time", "nv"))
        limits[:] = [
            [_days(date(y, 3 * q - 2, 1)), _days(date(y + (q == 4), 3 * q % 12 + 1, 1))]
            for y, q in names
        ]


def _days(day: date) -> int:
    return (day - _EPOCH).days


def _degrees(
    stack: Stack, rows: NDArray[np.int32], columns: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latitude and longitude, WGS 84, of pixel centres."""
    assert stack.georeference.transform is not None
    a, b, c, d, e, f = tuple(stack.georeference.transform)[:6]
    x, y = columns + 0.5, rows + 0.5
    lon, lat = reproject(
        stack.georeference.crs, CRS.from_epsg(4326), a * x + b * y + c, d * x + e * y + f
    )
    return np.array(lat), np.array(lon)


def _grid_mapping(file: Any, crs: CRS, geotransform: tuple[float, ...]) -> None:
    """The CRS, in CF's words where pyproj knows them, as WKT, and as GDAL looks for it."""
    variable = file.createVariable("crs", "i4", ())
    wkt = crs.to_wkt()
    attributes = require("pyproj", "series", "the CRS of a grid").CRS.from_wkt(wkt).to_cf()
    attributes |= {"crs_wkt": wkt, "spatial_ref": wkt}
    attributes["GeoTransform"] = " ".join(f"{value!r}" for value in geotransform)
    variable.setncatts({name: value for name, value in attributes.items() if value != ""})


def _about(stack: Stack, title: str, source: str) -> dict[str, str]:
    sensors = sorted({look.sensor or "unknown" for look in stack.looks})
    return {
        "Conventions": "CF-1.11",
        "title": title,
        "source": f"{source}; sensors: {', '.join(sensors)}",
        "institution": "not stated",
        "history": f"kelp {__version__} series",
        "references": "https://kelp-slicer.readthedocs.io",
        "comment": "Unseen is missing, never 0. Sensors are not harmonised with each other.",
    }
