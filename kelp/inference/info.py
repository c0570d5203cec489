"""`kelp info`: what kelp sees in scenes, before anything is run."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.config.scenes import InfoConfig
from kelp.errors import InputError, KelpError
from kelp.io.files import json_text
from kelp.io.location import Url
from kelp.progress import Progress, silent
from kelp.raster.bands import BANDS, OPTICAL, REFLECTANCE_OFFSET, REFLECTANCE_SCALE
from kelp.raster.masks import decoding
from kelp.raster.validity import observed
from kelp.raster.window import Tile
from kelp.sensors import SensorScene, find_scenes, open_scene
from kelp.tiling.grid import TileGrid

log = logging.getLogger("kelp")

_CACHE: Final = 64 << 20
_WINDOWS: Final = 8
_SIDE: Final = 32
"""Pixels a side of the windows, 8 x 8 of them, from which values are taken."""
_ROWS: Final = 256


@dataclass(frozen=True)
class SceneInfo:
    """What is known of one scene."""

    values: dict[str, Any]
    """As JSON has it."""

    def __str__(self) -> str:
        v = self.values
        scene, grid, quality = v["scene"], v["grid"], v["quality"]
        taken = scene["acquired"] or "unknown date"
        product = [scene["sensor"] or "unknown sensor", scene["level"], scene["tier"], taken]
        lines = [f"{scene['id']}: {', '.join(str(part) for part in product if part)}"]
        if not scene["network_validated"]:
            lines.append("  note      no network of kelp was validated on this sensor")
        height, width = grid["shape"]
        step = f" of {abs(grid['transform'][0]):g}" if grid["transform"] else ""
        lines.append(f"  grid      {height:,} x {width:,} px{step}, {grid['crs'] or 'no CRS'}")
        lines.append(f"  bands     {', '.join(v['bands'])}; stored as {v['dtype']}")
        medians = [
            f"{name} {found['median']:,.0f} ({found['reflectance']:.3f})"
            for name, found in v["observed_values"].items()
            if found["median"] is not None
        ]
        lines.append(f"  values    {', '.join(medians) or 'no observed pixel in the sample'}")
        shares = [
            f"{name} {100 * share:.1f} %{'*' * (name in quality['policy'])}"
            for name, share in quality["share"].items()
        ]
        quality_text = ", ".join(shares) or ", ".join(quality["policy"]) or "none"
        lines.append(f"  quality   {quality_text}")
        lines.append(
            f"            bad by the bits that count (*): {100 * quality['bad_share']:.1f} %"
            + " of the area" * (quality["over"] == "area")
        )
        dem = v["dem"]
        if dem is None:
            lines.append(
                f"  DEM       {'its own band' if 'DEM' in v['bands'] else 'none: unknown'}"
            )
        else:
            rest = "sea" if dem["sea_where_absent"] else "unknown"
            lines.append(
                f"  DEM       {len(dem['sources'])} files, {100 * dem['known_share']:.0f} % of the "
                f"scene, the rest {rest}"
            )
        if v["aoi"]:
            lines.append(f"  area      {100 * v['aoi']['share']:.1f} % of the scene")
        cost = v["cost"]
        lines.append(
            f"  cost      {cost['tiles']:,} of {cost['all_tiles']:,} tiles of {cost['tile']} px "
            f"(overlap {cost['overlap']}) have an observed pixel"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class InfoResult:
    """What is known of all scenes."""

    scenes: tuple[SceneInfo, ...]
    as_json: bool = False

    def summary(self) -> str:
        """Text for the terminal, or JSON."""
        if self.as_json:
            return json_text([scene.values for scene in self.scenes]).rstrip("\n")
        return "\n".join(str(scene) for scene in self.scenes)


def info(config: InfoConfig, progress: Progress = silent) -> InfoResult:
    """Look at every scene of a folder, list or catalogue; see `InfoConfig`.

    Raises:
        InputError: some cannot be read; the others have been reported to the logger by then.
    """
    scenes = find_scenes(config.data_dir)
    found: list[SceneInfo] = []
    failures: list[str] = []
    for done, location in enumerate(scenes, start=1):
        try:
            found.append(look_at(location, config))
        except KelpError as error:
            failures.append(error.message)
        progress("looking", done, len(scenes))
    if failures:
        for one in found:
            log.info("%s", one)
        raise InputError(
            f"{len(failures)} of {len(scenes)} scenes cannot be read: {'; '.join(failures)}"
        )
    return InfoResult(tuple(found), config.json_output)


def look_at(location: Path | Url, config: InfoConfig) -> SceneInfo:
    """What is known of one scene. Reads its quality layers whole, a sample of its bands."""
    with decoding(_CACHE), open_scene(location, config) as scene:
        scene.check()
        quality = scene.quality
        facts = scene.known.model_dump(mode="json", exclude={"sources"})
        tile, overlap = config.sahi_tile_size, config.sahi_tile_size // 2
        grid = TileGrid(scene.shape, tile, overlap)
        return SceneInfo(
            {
                "scene": facts,
                "grid": scene.grid.model_dump(mode="json"),
                "bands": list(scene.present),
                "dtype": scene.dtype,
                "observed_values": _values(scene),
                "quality": quality.model_dump(mode="json"),
                "dem": scene.elevation.model_dump(mode="json") if scene.elevation else None,
                "aoi": scene.area_facts.model_dump(mode="json") if scene.area_facts else None,
                "cost": {
                    "tile": tile,
                    "overlap": overlap,
                    "all_tiles": len(grid),
                    "tiles": _tiles(scene, grid),
                },
            }
        )


def _values(scene: SensorScene) -> dict[str, dict[str, float | None]]:
    """Medians of observed pixels of windows spread over the scene."""
    height, width = min(_SIDE, scene.shape.height), min(_SIDE, scene.shape.width)
    rows = np.linspace(0, scene.shape.height - height, _WINDOWS).astype(int).tolist()
    columns = np.linspace(0, scene.shape.width - width, _WINDOWS).astype(int).tolist()
    parts = []
    for y in dict.fromkeys(rows):
        for x in dict.fromkeys(columns):
            pixels = scene.read(Tile(y, x, height, width))
            parts.append(pixels[:, observed(pixels)])
    sample = np.concatenate(parts, axis=1)
    found: dict[str, dict[str, float | None]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a band without a pixel
        medians = np.nanmedian(sample, axis=1) if sample.size else np.full(len(BANDS), np.nan)
    for name, median in zip(BANDS, medians.tolist(), strict=True):
        if name in scene.present and name in OPTICAL:
            known = bool(np.isfinite(median))
            value = median * REFLECTANCE_SCALE + REFLECTANCE_OFFSET
            found[name] = {
                "median": median if known else None,
                "reflectance": round(value, 6) if known else None,
            }
    return found


def _tiles(scene: SensorScene, grid: TileGrid) -> int:
    """Tiles with an observed pixel, by strips: the scene is read once."""
    count, top = 0, 0
    held: NDArray[np.bool_] = np.zeros((0, scene.shape.width), dtype=np.bool_)
    for y in grid.rows:
        bottom = min(y + grid.tile.height, scene.shape.height)
        held, top = held[y - top :], y
        while top + len(held) < bottom:
            first = top + len(held)
            held = np.concatenate([held, _seen(scene, first, min(_ROWS, bottom - first))])
        columns = np.any(held[: bottom - y], axis=0)
        ends = [(x, x + grid.tile.width) for x in grid.columns]
        count += sum(bool(np.any(columns[left:right])) for left, right in ends)
    return count


def _seen(scene: SensorScene, y: int, rows: int) -> NDArray[np.bool_]:
    window = Tile(y, 0, rows, scene.shape.width)
    if scene.area is None:
        return observed(scene.read(window))
    inside = scene.area.mask(window)
    if not inside.any():
        return inside
    columns = np.flatnonzero(inside.any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    seen = np.zeros_like(inside)
    seen[:, left:right] = observed(scene.read(Tile(y, left, rows, right - left)))
    return seen & inside
