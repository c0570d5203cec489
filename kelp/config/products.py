"""Options of the commands that turn maps into answers: beds, areas, series, stac, view, report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from kelp.config.base import Config, option
from kelp.config.shared import (
    BandOrderOptions,
    BootstrapOptions,
    PixelSizeOptions,
    TruthOptions,
    WorkerOptions,
)

_AOI_HELP = "Regions: polygons with ids (.gpkg, .geojson, .parquet, .shp …)"


class MapOptions(Config):
    """The maps to work on."""

    predictions_dir: Path = option(help="Folder of <name>_kelp.tif maps, or one map")


class MixedMapOptions(MapOptions):
    """Maps whose areas are compared."""

    allow_mixed: bool = option(False, help="Take maps of different networks or thresholds together")
    allow_distrusted: bool = option(
        False, help="Take maps, too, that may be wrong as their own records say (guard)"
    )


class RegionOptions(MixedMapOptions):
    """How areas of regions are measured, and how sure they are."""

    aoi_id: str | None = option(
        None,
        help="Column of the regions' ids; default: the first of aoi_id, id, name, Segment_ID",
    )
    min_observed: float = option(
        0.5,
        help="Areas are null where less of a region (of series: of its stations) was observed",
        unit="share, 0-1",
        ge=0,
        le=1,
    )
    run_dir: Path | None = option(
        None,
        help="Run folder, bundle or packaged network that made the maps: its errors at held-out "
        "sites give intervals; default: the packaged one, where it made them",
    )
    coverage: float = option(
        0.9,
        help="Share of new sites whose true area an interval is to hold",
        unit="0-1",
        gt=0,
        lt=1,
    )


class OptionalRegionOptions(RegionOptions):
    """Regions, or everywhere."""

    aoi: Path | None = option(None, help=f"{_AOI_HELP}; default: everywhere, as one")


class BedsConfig(MixedMapOptions):
    """Kelp beds as polygons, with their areas."""

    output: Path = option(help="The file to write: .gpkg, .parquet, .fgb or .geojson")
    min_pixels: int = option(1, help="Smaller beds are left out", unit="px", ge=1)
    connectivity: Literal["8", "4"] = option(
        "8", help="8: pixels that touch at a corner are of one bed; 4: only at a side"
    )
    smooth: float = option(
        0.0,
        help="For display: outlines simplified, moved by about this much; areas stay those of the "
        "pixels. 0: the outlines of the pixels",
        unit="m",
        ge=0,
    )


class AreasConfig(RegionOptions):
    """Kelp area of each region in each scene, with intervals."""

    aoi: Path = option(help=_AOI_HELP)
    output: Path = option(help="The file to write: .csv or .parquet")


class SeriesConfig(OptionalRegionOptions, WorkerOptions):
    """Quarterly and yearly series of a coast: stations, grid, tables, persistence."""

    output_dir: Path = option(help="Folder for the files of the series")
    zarr: bool = option(False, help="Also the grid as Zarr, grid.zarr beside grid.nc")
    baseline: str | None = option(
        None, help="Years whose median is status 1, as in 1984-2013; default: no status"
    )
    tides: Path | None = option(
        None, help="CSV of tides: time (ISO 8601, UTC) and height_m, at most three hours apart"
    )

    @field_validator("baseline")
    @classmethod
    def _two_years(cls, value: str | None) -> str | None:
        if value is not None:
            years = re.fullmatch(r"(\d{4})-(\d{4})", value.strip())
            if years is None or years[1] > years[2]:
                raise ValueError("a baseline is two years, as in 1984-2013")
        return value

    @property
    def baseline_years(self) -> tuple[int, int] | None:
        """First and last year of the baseline."""
        if self.baseline is None:
            return None
        first, last = self.baseline.strip().split("-")
        return int(first), int(last)


class ViewConfig(OptionalRegionOptions):
    """One self-contained HTML page: maps, beds, a slider over dates, areas as a chart."""

    output: Path = option(help="The page to write: .html")
    data_dir: Path | None = option(None, help="Folder of the scenes (.tif), for pictures")
    series_dir: Path | None = option(None, help="Folder of kelp series, for its quarters")
    beds: bool = option(True, help="Outlines of beds with their figures (needs geopandas)")
    side: int = option(
        900, help="Longest side of a picture; larger maps are shrunk", unit="px", ge=64
    )
    title: str = option("Kelp maps", help="Title of the page")


class StacConfig(MapOptions):
    """A STAC item for each map, and a collection of them."""

    output_dir: Path = option(help="Folder for the items and collection.json")
    run_dir: Path | None = option(
        None, help="Run folder, bundle or packaged network that made the maps: an item, too"
    )
    collection_id: str = option("kelp-maps", help="Id of the collection")
    license: str = option("other", help="Licence of the maps, as SPDX names it")


class ReportConfig(BootstrapOptions, BandOrderOptions, PixelSizeOptions, TruthOptions):
    """One self-contained page about masks and their truth: scores, curves, pictures, settings."""

    gt_dir: Path = option(help="Folder of true <tile_id>_kelp.tif masks")
    preds_dir: Path = option(
        help="Folder of predicted <tile_id>_kelp.tif masks; with <tile_id>_kelp_prob.tif beside "
        "them also curves and calibration"
    )
    output_dir: Path = option(help="Folder for report.html and report.json")
    data_dir: Path | None = option(None, help="Folder of the scenes, for pictures and land")
    run_dir: Path | None = option(
        None, help="Run or bundle that made them: model card, settings, training curves"
    )
    title: str = option("Kelp maps against truth", help="Title of the page")
    pictures: int = option(
        2, help="Pictures of the worst and of the best scenes", unit="each", ge=0
    )
    map_scenes: int = option(
        12,
        help="Scenes on the map of the page, the worst first: masks, errors, probabilities and "
        "beds to move about in. 0: no map, and a page without scripts",
        unit="scenes",
        ge=0,
    )
