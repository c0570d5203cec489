"""Maps as an xarray dataset, read by windows when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.products.maps import Map, find_maps, open_map, require
from kelp.products.stack import lattice_of
from kelp.raster.bands import MASK_NODATA
from kelp.raster.window import Tile


def to_xarray(maps: Path | str | Sequence[Path | str]) -> Any:
    """Maps of one grid as an `xarray.Dataset` with the dimensions `time, y, x`.

    `kelp` is 0, 1 or NaN (not observed); `probability` is there where every map has one. Nothing is
    read before it is used, and then only the windows that are used. `spatial_ref` holds the CRS as
    rioxarray looks for it; `scene_id` and `sensor` lie along `time`, which is NaT where unknown.

    Args:
        maps: a folder of maps, one map, or several files.

    Raises:
        ConfigError: xarray is not installed.
        InputError: a map is unreadable, has no CRS, or its pixels are not those of the others.
    """
    xarray = require("xarray", "series", "to_xarray")
    if isinstance(maps, Path | str):
        entries = find_maps(Path(maps))
    else:
        entries = [open_map(Path(path)) for path in maps]
    if not entries:
        raise InputError("no map was named; name a folder or at least one file")
    entries.sort(key=lambda m: (m.acquired_text or "9", m.scene_id))
    place, shape, offsets = lattice_of(entries)
    transform = place.transform
    assert transform is not None
    if transform.b or transform.d:
        raise InputError(f"{entries[0].mask}: its grid is turned; warp it first (gdalwarp)")
    names = ["kelp"]
    if all(entry.probability for entry in entries):
        names.append("probability")
    lazy = xarray.core.indexing.LazilyIndexedArray
    arrays = {
        name: (("time", "y", "x"), lazy(_array(xarray, entries, offsets, shape, name)))
        for name in names
    }
    wkt = place.crs.to_wkt()
    geotransform = " ".join(str(value) for value in transform.to_gdal())
    coordinates = {
        "time": [_moment(entry) for entry in entries],
        "y": transform.f + transform.e * (np.arange(shape[0]) + 0.5),
        "x": transform.c + transform.a * (np.arange(shape[1]) + 0.5),
        "scene_id": ("time", [entry.scene_id for entry in entries]),
        "sensor": ("time", [entry.sensor or "" for entry in entries]),
        "spatial_ref": (
            (),
            0,
            {"crs_wkt": wkt, "spatial_ref": wkt, "GeoTransform": geotransform},
        ),
    }
    found = xarray.Dataset(arrays, coordinates)
    for name in names:
        found[name].attrs["grid_mapping"] = "spatial_ref"
    return found


def _moment(entry: Map) -> np.datetime64:
    when = entry.acquired
    if when is None:
        return np.datetime64("NaT", "ns")
    if not isinstance(when, datetime):
        when = datetime.combine(when, time(), UTC)
    return np.datetime64(when.astimezone(UTC).replace(tzinfo=None), "ns")


def _array(
    xarray: Any,
    entries: Sequence[Map],
    offsets: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    name: str,
) -> Any:
    """An array of xarray over the files, as its guide to new backends asks for."""

    def read(key: tuple[Any, ...]) -> NDArray[np.float32]:
        times, rows, columns = key
        chosen = np.arange(len(entries))[times]
        y, x = np.arange(shape[0])[rows], np.arange(shape[1])[columns]
        if not (np.size(chosen) and np.size(y) and np.size(x)):
            return np.empty((*np.shape(chosen), *np.shape(y), *np.shape(x)), np.float32)
        top, left = int(np.min(y)), int(np.min(x))
        tile = Tile(top, left, int(np.max(y)) - top + 1, int(np.max(x)) - left + 1)
        planes = [
            _window(entries[k], offsets[k], tile, name)[
                np.ix_(np.ravel(y - top), np.ravel(x - left))
            ]
            for k in np.ravel(chosen)
        ]
        stacked = np.stack(planes)
        return stacked.reshape(*np.shape(chosen), *np.shape(y), *np.shape(x))

    class Files(xarray.backends.BackendArray):  # type: ignore[misc]
        def __init__(self) -> None:
            self.shape = (len(entries), *shape)
            self.dtype = np.dtype(np.float32)

        def __getitem__(self, key: Any) -> Any:
            return xarray.core.indexing.explicit_indexing_adapter(
                key, self.shape, xarray.core.indexing.IndexingSupport.BASIC, read
            )

    return Files()


def _window(entry: Map, offset: tuple[int, int], tile: Tile, name: str) -> NDArray[np.float32]:
    """A window of the lattice, NaN where the map does not reach or saw nothing."""
    out = np.full((tile.height, tile.width), np.nan, np.float32)
    row, column = offset
    there = tile.intersection(Tile(row, column, *entry.shape))
    if there is None:
        return out
    part, here = there.moved(-row, -column), there.slices_in(tile)
    if name == "probability":
        p = entry.read_probability(part)
        assert p is not None
        out[here] = p
    else:
        mask = entry.read(part)
        out[here] = np.where(mask == MASK_NODATA, np.nan, mask)
    return out
