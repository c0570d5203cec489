"""Options of the commands that turn maps into answers: beds, areas, series, stac, view."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from kelp.config.base import Config, option

_MAPS_HELP = "Folder of <name>_kelp.tif maps, or one map"
_MIXED_HELP = "Take maps of different networks or thresholds together"


class BedsConfig(Config):
    """Kelp beds as polygons, with their areas."""

    command: ClassVar[str] = "beds"

    predictions_dir: Path = option(help=_MAPS_HELP)
    output: Path = option(help="The file to write: .gpkg, .parquet, .fgb or .geojson")
    min_pixels: int = option(1, help="Smaller beds are left out", unit="px", ge=1)
    connectivity: Literal["8", "4"] = option(
        "8", help="8: pixels that touch at a corner are of one bed; 4: only at a side"
    )
    allow_mixed: bool = option(False, help=_MIXED_HELP)
