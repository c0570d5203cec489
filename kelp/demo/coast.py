"""The demo's coast: three years of simulated scenes of one place, from scenes to answers."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
import rasterio
from affine import Affine
from rasterio.crs import CRS

from kelp.config import (
    AreasConfig,
    BedsConfig,
    PredictConfig,
    SeriesConfig,
    TuneConfig,
    ViewConfig,
)
from kelp.errors import InputError
from kelp.io.files import atomic, output_folder
from kelp.products.areas import areas
from kelp.products.beds import beds
from kelp.products.series import series
from kelp.products.view import view
from kelp.progress import Progress, silent
from kelp.raster.bands import BANDS, NODATA
from kelp.raster.masks import Georeference
from kelp.raster.window import Shape
from kelp.raster.writer import write_mask
from kelp.simulation.scene import make_place, take_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

log = logging.getLogger("kelp")

# Two looks in some quarters, one in others, none in the second quarter of 2022.
DATES: Final = tuple(
    date.fromisoformat(f"{year}-{day}")
    for year, days in (
        (2021, ("02-11", "05-02", "05-18", "08-22", "11-10")),
        (2022, ("01-29", "03-02", "09-10", "11-29")),
        (2023, ("02-17", "04-06", "07-27", "08-28", "12-02")),
    )
    for day in days
)

_PLACE: Final = Georeference(CRS.from_epsg(32721), Affine(30, 0, 400_000, 0, -30, 4_272_000))


@dataclass(frozen=True)
class Coast:
    """What the demo made of the coast.

    Attributes:
        folder: holds the maps and all products.
        quarters: the table of `kelp series`.
        truth_m2: true area of each look's day, as far as the sensor could see.
        page: the page of `kelp view`.
    """

    folder: Path
    quarters: pd.DataFrame
    truth_m2: dict[date, float]
    page: Path


def can_make_products() -> bool:
    """Whether the extras [geo] and [series] are installed."""
    return all(importlib.util.find_spec(name) for name in ("geopandas", "netCDF4", "pyproj"))


def make_coast(
    folder: Path,
    run_dir: Path,
    labelled: tuple[Path, Path],
    seed: int,
    size: int = 256,
    progress: Progress = silent,
) -> Coast:
    """Simulate a coast, map it, and make beds, areas, a series and a page of the maps.

    Args:
        folder: for everything.
        run_dir: the network's run.
        labelled: scenes of other places that no training saw, and their truth: for threshold,
            calibration, and the errors behind intervals.
        seed: of the coast.
        size: side of its scenes.
        progress: gets each step.
    """
    scenes, truth = _simulate(folder, seed, size)
    _tune(folder / "tuning", run_dir, labelled, progress)
    maps = _map(scenes, folder / "maps", run_dir, progress)
    aoi = _regions(folder, size)
    beds(BedsConfig(predictions_dir=maps, output=folder / "beds.gpkg", min_pixels=2), progress)
    areas(
        AreasConfig(predictions_dir=maps, aoi=aoi, output=folder / "areas.csv", run_dir=run_dir),
        progress,
    )
    found = series(
        SeriesConfig(
            predictions_dir=maps,
            output_dir=folder / "series",
            run_dir=run_dir,
            baseline=f"{DATES[0].year}-{DATES[-1].year}",
            workers=1,
        ),
        progress,
    )
    page = view(
        ViewConfig(
            predictions_dir=maps,
            output=folder / "map.html",
            data_dir=scenes,
            series_dir=folder / "series",
            run_dir=run_dir,
            title="Kelp off a simulated coast",
        ),
        progress,
    )
    return Coast(folder, found.quarters, truth, page.path)


def _tune(output: Path, run_dir: Path, labelled: tuple[Path, Path], progress: Progress) -> None:
    """Threshold and calibration, kept in the bundle."""
    from kelp.nn.comparison.tune import tune

    scenes, truth = labelled
    try:
        tune(
            TuneConfig(data_dir=scenes, gt_dir=truth, run_dir=(run_dir,), output_dir=output),
            progress,
        )
    except InputError as error:  # a handful of images may be without kelp
        log.info("demo: no calibration: %s", error)


def _map(scenes: Path, output: Path, run_dir: Path, progress: Progress) -> Path:
    from kelp.inference.predict import predict_scenes

    predict_scenes(
        PredictConfig(
            data_dir=scenes,
            output_dir=output,
            run_dir=(run_dir,),
            save_probabilities=True,
            overwrite=True,
        ),
        progress,
    )
    return output


def _simulate(folder: Path, seed: int, size: int) -> tuple[Path, dict[date, float]]:
    """Scenes of the coast with a georeference, their truth, and the true area of each date."""
    rng = np.random.default_rng([seed, 17])
    scenes, truths = (output_folder(folder / name) for name in ("scenes", "truth"))
    # A place with something to see: of six, the one that shows most kelp in three looks.
    shape = Shape(size, size)
    places = [make_place(rng, shape) for _ in range(6)]
    shown = [
        sum(int(take_picture(rng, place, (0, 0), shape).truth.sum()) for _ in range(3))
        for place in places
    ]
    place = places[int(np.argmax(shown))]
    profile = {"driver": "GTiff", "dtype": "int32", "count": len(BANDS), "nodata": NODATA}
    profile |= {"height": size, "width": size, "compress": "deflate", **_PLACE.profile}
    true_m2 = {}
    for day in DATES:
        scene = take_picture(rng, place, (0, 0), shape)
        with (
            atomic(scenes / f"coast_{day}_satellite.tif") as partial,
            rasterio.open(partial, "w", **profile) as out,
        ):
            out.write(scene.pixels)
            out.descriptions = BANDS
        write_mask(truths / f"coast_{day}_kelp.tif", scene.truth, _PLACE)
        true_m2[day] = float(scene.truth.sum()) * 900
    return scenes, true_m2


def _regions(folder: Path, size: int) -> Path:
    """Two regions, north and south."""
    import geopandas
    from shapely import box

    assert _PLACE.transform is not None
    x, y, half = _PLACE.transform.c, _PLACE.transform.f, size * 15
    frame = geopandas.GeoDataFrame(
        {"name": ["north", "south"]},
        geometry=[box(x, y - half, x + 2 * half, y), box(x, y - 2 * half, x + 2 * half, y - half)],
        crs=_PLACE.crs.to_wkt(),
    )
    path = folder / "regions.gpkg"
    with atomic(path) as partial:
        frame.to_file(partial, layer="regions")
    return path


def true_quarters(coast: Coast) -> list[float | None]:
    """The true area of each row of `coast.quarters`: the mean of its looks; None without one."""
    out: list[float | None] = []
    for row in coast.quarters.itertuples():
        looks = [
            area
            for day, area in coast.truth_m2.items()
            if (day.year, (day.month - 1) // 3 + 1) == (row.year, row.quarter)
        ]
        out.append(float(np.mean(looks)) if looks else None)
    return out


def draw_quarters(axes: Axes, coast: Coast) -> None:
    """The series with its intervals, gaps left open, and the truth beside it."""
    rows = coast.quarters
    when = rows["year"] + (rows["quarter"] - 0.5) / 4
    known = rows["area_low_m2"].notna()
    axes.vlines(
        when[known],
        rows["area_low_m2"][known] / 1e6,
        rows["area_high_m2"][known] / 1e6,
        color="#0b5cad",
        alpha=0.3,
        lw=6,
        label="90 % interval",
    )
    axes.plot(when, rows["mean_area_m2"] / 1e6, "o-", color="#0b5cad", label="mapped")
    truth: Sequence[float] = [
        np.nan if area is None else area / 1e6 for area in true_quarters(coast)
    ]
    axes.plot(when, truth, "D", color="#d1495b", ms=5, mfc="none", mew=1.6, label="truth")
    unseen = when[rows["mean_area_m2"].isna()]
    axes.plot(unseen, np.zeros(len(unseen)), "x", color="#77838f", label="not observed")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("kelp, km²")
    axes.set_xticks(sorted({day.year for day in DATES}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend(frameon=False, fontsize=9)
