"""Options that say how a scene is read; every command that reads scenes has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from kelp.config.base import Config, Names, option, split
from kelp.config.shared import BandOrderOptions
from kelp.errors import ConfigError
from kelp.io.location import Location


class SceneOptions(BandOrderOptions):
    """How scenes are read: their bands, bad pixels, elevation, and the area that counts."""

    quality: Names = option(
        (),
        help="Quality bits that make a pixel not observed: fill, cloud, dilated_cloud, cirrus, "
        "shadow, snow, saturated, dropped, occluded, high_aerosol, or none; default: the first "
        "six that the sensor has",
    )
    cloud_mask: Path | None = option(
        None,
        help="Raster whose values other than 0 are not observed, in place of the sensor's cloud "
        "bits; or a folder of such rasters, <scene name>*.tif",
    )
    dem: Path | None = option(
        None, help="Elevation in metres: a raster, or a folder of tiles, of any CRS"
    )
    dem_sea_where_absent: bool = option(
        False, help="--dem: outside all tiles the elevation is 0 (sea), not unknown"
    )
    aoi: Path | None = option(
        None, help="Polygons outside which nothing is read or observed (GeoJSON, GeoPackage, …)"
    )
    sign: str | None = option(
        None, help="MODULE:FUNCTION that signs the URLs of STAC assets: takes one, gives one"
    )


def _box(value: Any) -> Any:
    """Four numbers out of `W,S,E,N`."""
    parts = split(value)
    return None if value is None else tuple(float(part) for part in parts)


class SearchConfig(Config):
    """A list of scenes from a STAC service or catalogue."""

    stac: str = option(help="URL of a STAC API, or URL or path of a static catalogue")
    collection: str | None = option(None, help="Name of the collection; default: all")
    bbox: Annotated[tuple[float, float, float, float] | None, BeforeValidator(_box)] = option(
        None, help="West, south, east, north; west > east: across the antimeridian", unit="degrees"
    )
    aoi: Path | None = option(None, help="Polygons whose bounds are searched, in place of --bbox")
    datetime: str | None = option(
        None, help="A day, or a span A/B, as in 2024-05-01/2024-09-30; .. is open"
    )
    max_cloud: float | None = option(
        None, help="Most cloud cover, by the producer's figure", unit="percent", ge=0, le=100
    )
    output: Path = option(Path("scenes.txt"), help="The list to write, one address a line")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.bbox is None) == (self.aoi is None):
            raise ConfigError("--bbox, --aoi: exactly one of them is needed")
        if self.bbox is not None:
            west, south, east, north = self.bbox
            if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
                raise ConfigError("--bbox: W,S,E,N in degrees, south below north")
        return self


class InfoConfig(SceneOptions):
    """What kelp sees in scenes, before anything is run."""

    data_dir: Location = option(help="A scene, a folder of scenes, a .txt list, or a URL")
    sahi_tile_size: int = option(
        128, help="Side of the tiles that are counted, half of which they share", unit="px", ge=8
    )
    json_output: bool = option(False, help="JSON in place of text", aliases=("json",))
