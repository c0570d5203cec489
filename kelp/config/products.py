"""Options of the commands that turn maps into answers: beds, areas, series, stac, view."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kelp.config.base import Config, option

_MAPS_HELP = "Folder of <name>_kelp.tif maps, or one map"
_AOI_HELP = "Regions: polygons with ids (.gpkg, .geojson, .parquet, .shp …)"
_AOI_ID_HELP = "Column of the regions' ids; default: the first of aoi_id, id, name, Segment_ID"
_OBSERVED_HELP = "Areas are null where less of a region was observed"
_RUN_HELP = "Run folder or bundle that made the maps: its errors at held-out sites give intervals"
_COVERAGE_HELP = "Share of new sites whose true area an interval is to hold"
_MIXED_HELP = "Take maps of different networks or thresholds together"


class BedsConfig(Config):
    """Kelp beds as polygons, with their areas."""

    predictions_dir: Path = option(help=_MAPS_HELP)
    output: Path = option(help="The file to write: .gpkg, .parquet, .fgb or .geojson")
    min_pixels: int = option(1, help="Smaller beds are left out", unit="px", ge=1)
    connectivity: Literal["8", "4"] = option(
        "8", help="8: pixels that touch at a corner are of one bed; 4: only at a side"
    )
    allow_mixed: bool = option(False, help=_MIXED_HELP)


class AreasConfig(Config):
    """Kelp area of each region in each scene, with intervals."""

    predictions_dir: Path = option(help=_MAPS_HELP)
    aoi: Path = option(help=_AOI_HELP)
    output: Path = option(help="The file to write: .csv or .parquet")
    aoi_id: str | None = option(None, help=_AOI_ID_HELP)
    min_observed: float = option(0.5, help=_OBSERVED_HELP, unit="share, 0-1", ge=0, le=1)
    run_dir: Path | None = option(None, help=_RUN_HELP)
    coverage: float = option(0.9, help=_COVERAGE_HELP, unit="0-1", gt=0, lt=1)
    allow_mixed: bool = option(False, help=_MIXED_HELP)
