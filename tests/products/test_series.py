"""A series whose truth is known: every figure counted by hand, every unseen quarter null."""

import csv
import json
import re
import warnings
from datetime import date

import geopandas
import netCDF4
import numpy as np
import pandas as pd
import pytest
import rasterio
import xarray
from affine import Affine
from coasts import UTM, write_map
from pyproj import Transformer
from rasterio.crs import CRS
from shapely import box

import kelp
from kelp.cli import main
from kelp.products.series import KELPWATCH, QUARTERS, YEARS, read_tides
from kelp.products.stack import Strips
from kelp.raster.masks import Georeference

U = 255
PIXEL = 900.0


def run(folder, out, *more):
    arguments = ["--predictions_dir", f"{folder}", "--output_dir", f"{out}"]
    return main(["series", *arguments, *map(str, more)])


@pytest.fixture
def coast(tmp_path):
    """Three years over 4 x 6 pixels; stations are (1, 1), (1, 2) and (2, 4)."""
    maps = tmp_path / "maps"

    def put(name, acquired, cells, sensor="landsat-8", unseen=(), **more):
        mask, p = np.zeros((4, 6), np.uint8), np.zeros((4, 6))
        for cell, value in cells.items():
            p[cell] = value
            mask[cell] = value >= 0.5
        for cell in unseen:
            mask[cell], p[cell] = U, np.nan
        write_map(maps, name, mask, p, acquired=acquired, sensor=sensor, **more)

    a, b, c = (1, 1), (1, 2), (2, 4)
    put("a1", "2019-05-01", {a: 1, b: 0.5}, "landsat-7", [c])
    put("a2", "2019-06-20T18:30:00+00:00", {a: 0.5, c: 0.75}, unseen=[b])
    put("a3", "2019-11-02", {}, unseen=[a, b, c])
    # 2020: nothing in quarters 1, 2 and 4.
    put("b1", "2020-07-01", {a: 0.25, b: 0.25, c: 0.25})
    # 2021-03: seen, and no kelp at all.
    put("c1", "2021-03-31", {})
    put("c2", "2021-10-01", {a: 1, b: 1, c: 1}, "landsat-9")
    return maps


def test_quarters_and_years_by_hand(coast, tmp_path):
    out = tmp_path / "series"
    assert run(coast, out, "--baseline", "2019-2020") == 0
    q = pd.read_parquet(out / "quarters.parquet")
    assert list(q) == list(QUARTERS)
    assert list(zip(q["year"], q["quarter"], strict=True)) == [
        (year, quarter) for year in (2019, 2020, 2021) for quarter in (1, 2, 3, 4)
    ]
    q = q.set_index(["year", "quarter"])
    assert set(q["aoi_id"]) == {"all"}
    assert set(q["stations"]) == {3}
    second = q.loc[2019, 2]
    assert second["mean_area_m2"] == pytest.approx(PIXEL * (0.75 + 0.5 + 0.75))
    # One look of two stations (1.5 pixels), one of two (1.25).
    assert (second["max_area_m2"], second["max_day"]) == (PIXEL * 1.5, "2019-05-01")
    assert (second["looks"], second["passes7"], second["passes8"]) == (2, 1, 1)
    assert second["sensors"] == "landsat-7, landsat-8"
    assert second["observed_share"] == 1
    third = q.loc[2020, 3]
    assert third["mean_area_m2"] == pytest.approx(PIXEL * 0.75)
    assert q.loc[2021, 1]["mean_area_m2"] == 0
    assert q.loc[2021, 4]["mean_area_m2"] == PIXEL * 3
    unseen = q.loc[[(2019, 1), (2019, 3), (2019, 4), (2020, 1), (2020, 2), (2020, 4), (2021, 2)]]
    figures = ["mean_area_m2", "max_area_m2", "area_low_m2", "area_high_m2", "tide_m"]
    assert unseen[figures].isna().all(axis=None)
    assert set(unseen["null_reason"]) == {"the quarter was not observed"}
    assert (unseen["looks"] == 0).all()

    y = pd.read_parquet(out / "years.parquet").set_index("year")
    assert ["year", *y] == ["year", *(name for name in YEARS if name != "year")]
    assert y["quarters_seen"].tolist() == [1, 1, 2]
    assert y["sum_first_m2"].tolist() == pytest.approx([1800, 675, 2700])
    assert y["max_first_m2"].tolist() == pytest.approx([1800, 675, 2700])
    assert set(y["max_occupiable_area_m2"]) == {2700}
    assert set(y["baseline_median_m2"]) == {1237.5}
    assert y["status"].tolist() == pytest.approx([1800 / 1237.5, 675 / 1237.5, 2700 / 1237.5])


def test_sum_first_and_max_first_differ(tmp_path):
    """Two stations that peak in different quarters."""
    for name, day, p in (
        ("a", "2020-02-01", [0.75, 0.5]),
        ("b", "2020-08-01", [0.25, 1.0]),
    ):
        write_map(tmp_path / "m", name, np.array([p]) >= 0.5, [p], acquired=day)
    assert run(tmp_path / "m", tmp_path / "s") == 0
    y = pd.read_parquet(tmp_path / "s" / "years.parquet")
    assert (y["sum_first_m2"][0], y["max_first_m2"][0]) == (1.25 * PIXEL, 1.75 * PIXEL)
    assert y["max_occupiable_area_m2"][0] == 1.75 * PIXEL  # of two stations, 2 pixels
    assert np.isnan(y["status"][0])
    assert "no baseline was named" in y["null_reason"][0]


def test_the_station_file_is_what_clients_read(coast, tmp_path):
    """By position (kelpdecline), by name (KelpAreaIndicator, olmoearth), raw and through xarray."""
    out = tmp_path / "series"
    assert run(coast, out) == 0
    with netCDF4.Dataset(out / "stations.nc") as file:
        file.set_auto_mask(False)
        order = [name for name in file.variables if name not in file.dimensions]
        assert order[:5] == ["latitude", "longitude", "year", "quarter", "area"]
        assert order[5:] == ["passes", "passes4_5", "passes7", "passes8", "passes_other"]
        assert file["area"].dimensions == ("time", "station")
        assert file["area"]._FillValue == -1
        assert file["year"][:].tolist() == [2019] * 4 + [2020] * 4 + [2021] * 4
        assert file["quarter"][:].tolist() == [1, 2, 3, 4] * 3
        area = file["area"][:]
        assert area[1].tolist() == [675, 450, 675]
        assert area[6].tolist() == [225, 225, 225]
        assert area[8].tolist() == [0, 0, 0]
        assert area[11].tolist() == [900, 900, 900]
        assert (area[[0, 2, 3, 4, 5, 7, 9, 10]] == -1).all()
        assert file["passes"][:][1].tolist() == [2, 1, 1]
        assert file["passes7"][:][1].tolist() == [1, 1, 0]
        assert file["passes8"][:][11].tolist() == [1, 1, 1]
        x = 400_000 + 30 * (np.array([1, 2, 4]) + 0.5)
        y = 4_272_000 - 30 * (np.array([1, 1, 2]) + 0.5)
        lon, lat = Transformer.from_crs(32721, 4326, always_xy=True).transform(x, y)
        np.testing.assert_allclose(file["latitude"][:], lat, atol=1e-9)
        np.testing.assert_allclose(file["longitude"][:], lon, atol=1e-9)
    with xarray.open_dataset(out / "stations.nc") as data:
        assert data["area"].dims == ("time", "station")
        assert np.isnan(data["area"][0]).all()
        assert data["time"].dt.date.values[:2].tolist() == [date(2019, 2, 15), date(2019, 5, 15)]
        assert "not the fractional cover" in data["area"].attrs["comment"]


def test_the_grid_opens_in_gdal_and_xarray(coast, tmp_path):
    out = tmp_path / "series"
    assert run(coast, out) == 0
    with rasterio.open(f"netcdf:{out / 'grid.nc'}:area") as grid:
        assert grid.crs.to_epsg() == 32721
        assert grid.count == 12
        values = grid.read()
        row, column = grid.index(400_000 + 45, 4_272_000 - 45)
        assert values[1, row, column] == 675
        assert np.isnan(values[0]).all()
        assert (values[8][~np.isnan(values[8])] == 0).all()
        assert (~np.isnan(values[8])).sum() == 3
        assert grid.transform.a == 30
        assert grid.xy(row, column) == (400_045, 4_271_955)
    with xarray.open_dataset(out / "grid.nc") as data:
        at = data.sel(x=400_045, y=4_271_955)
        assert at["area"].values[1] == 675
        assert np.isnan(at["area"].values[0])
        assert at["footprint"] == 1
        assert data["footprint"].sum() == 3
        assert data.attrs["Conventions"] == "CF-1.11"
        assert data["area"].attrs["grid_mapping"] == "crs"
        assert data["time"].attrs["bounds"] == "time_bnds"
        passes = data["passes"].values[0]  # known: none
        assert (passes[data["footprint"].values == 1] == 0).all()
        assert np.isnan(passes[data["footprint"].values == 0]).all()


def test_the_grid_as_zarr_opens_in_gdal_and_xarray(coast, tmp_path):
    """The same as the NetCDF file, to the last attribute; unseen is fill, and not stored."""
    out = tmp_path / "series"
    assert run(coast, out, "--zarr", "True") == 0
    with (
        xarray.open_dataset(out / "grid.nc") as one,
        xarray.open_dataset(out / "grid.zarr", engine="zarr") as two,
    ):
        for name in two.data_vars:
            two[name].attrs.pop("_CRS", None)
        xarray.testing.assert_identical(one, two)
        assert np.isnan(two["area"].values[0]).all()
    assert sorted(file.name for file in (out / "grid.zarr" / "area").glob("[0-9]*")) == [
        "0.0.0",
        "1.0.0",
        "2.0.0",
    ]
    with rasterio.open(f'ZARR:"{out / "grid.zarr"}":/area') as grid:
        assert (grid.crs.to_epsg(), grid.count, grid.transform.a) == (32721, 12, 30)
        values = grid.read()
        row, column = grid.index(400_000 + 45, 4_272_000 - 45)
        assert values[1, row, column] == 675
        assert np.isnan(values[0]).all()


def test_the_csv_has_the_header_of_kelpwatch_and_empty_fields(coast, tmp_path):
    out = tmp_path / "series"
    assert run(coast, out) == 0
    text = (out / "kelpwatch.csv").read_text()
    rows = list(csv.reader(text.splitlines()))
    assert tuple(rows[0]) == KELPWATCH
    assert len(rows) == 1 + 3 * 5
    by = {(row[0], row[1]): row[2:] for row in rows[1:]}
    assert by["2019", "1"] == ["", "", "0", "3"]
    assert by["2019", "2"] == ["1800.0", "3", "3", "3"]
    assert by["2019", "max"] == ["1800.0", "3", "3", "3"]
    assert by["2020", "3"] == ["675.0", "0", "3", "3"]
    assert by["2021", "1"] == ["0.0", "0", "3", "3"]
    assert by["2021", "2"] == ["", "", "0", "3"]
    assert "\r" not in text


def test_persistence_and_looks(coast, tmp_path):
    out = tmp_path / "series"
    assert run(coast, out) == 0
    with rasterio.open(out / "looks.tif") as file:
        looks = file.read(1)
    with rasterio.open(out / "persistence.tif") as file:
        share = file.read(1)
    assert looks[0, 0] == 6
    assert (looks[1, 1], looks[1, 2], looks[2, 4]) == (5, 4, 4)
    assert share[1, 1] == pytest.approx(3 / 5)
    assert share[1, 2] == pytest.approx(2 / 4)
    assert share[0, 0] == 0


def test_never_seen_pixels_have_no_persistence(tmp_path):
    write_map(tmp_path / "m", "A", [[1, U]], acquired="2020-01-01")
    assert run(tmp_path / "m", tmp_path / "s") == 0
    with rasterio.open(tmp_path / "s" / "persistence.tif") as file:
        assert file.read(1)[0, 0] == 1
        assert np.isnan(file.read(1)[0, 1])


def test_scenes_of_one_day_are_mosaicked_and_grids_may_be_shifted(tmp_path):
    """Two rows of one path overlap: a day is one look; the first that saw a pixel counts."""
    maps = tmp_path / "m"
    below = Georeference(UTM.crs, UTM.transform @ Affine.translation(1, 2))
    one = [[U, 1, 1], [0, 1, 1], [0, U, 1]]
    write_map(
        maps,
        "N",
        one,
        np.where(np.array(one) == U, np.nan, np.array(one) * 1.0),
        acquired="2020-01-05",
        sensor="landsat-8",
    )
    two = [[1, 0], [1, 1]]
    write_map(
        maps,
        "S",
        two,
        np.array(two) * 0.5,
        georeference=below,
        acquired="2020-01-05",
        sensor="landsat-8",
    )
    assert run(maps, tmp_path / "s") == 0
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet")
    assert (q["looks"][0], q["passes8"][0], q["stations"][0]) == (1, 1, 8)
    # Pixels that N saw come from N (5 of 1), the rest from S (3 of 0.5).
    assert q["mean_area_m2"][0] == (5 * 1 + 3 * 0.5) * PIXEL
    scenes = pd.read_csv(tmp_path / "s" / "scenes.csv")
    assert scenes[["scene_id", "look", "mosaic_order"]].to_numpy().tolist() == [
        ["N", 1, 1],
        ["S", 1, 2],
    ]
    with rasterio.open(tmp_path / "s" / "looks.tif") as file:
        assert file.shape == (4, 3)
        assert file.read(1).tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]


def regions(path, **shapes):
    frame = geopandas.GeoDataFrame({"name": list(shapes)}, geometry=list(shapes.values()))
    frame.set_crs(32721).to_file(path)
    return path


def test_regions(coast, tmp_path):
    x, y = 400_000, 4_272_000
    aoi = regions(
        tmp_path / "r.gpkg",
        west=box(x, y - 120, x + 90, y),
        east=box(x + 90, y - 120, x + 180, y),
        bare=box(x, y - 30, x + 180, y),
        far=box(x + 1e5, y, x + 1.001e5, y + 100),
    )
    assert run(coast, tmp_path / "s", "--aoi", aoi) == 0
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet").set_index(
        ["aoi_id", "year", "quarter"]
    )
    assert q.loc["west", 2019, 2]["mean_area_m2"] == 1125
    assert q.loc["east", 2019, 2]["mean_area_m2"] == 675
    assert q.loc["east", 2019, 2]["looks"] == 1
    assert q.loc["east", 2019, 2]["passes7"] == 0
    for name in ("bare", "far"):
        rows = q.loc[name]
        assert rows[["mean_area_m2", "max_area_m2", "observed_share"]].isna().all(axis=None)
        assert set(rows["null_reason"]) == {"no map ever showed kelp in the region"}
    y = pd.read_parquet(tmp_path / "s" / "years.parquet").set_index(["aoi_id", "year"])
    assert y.loc["west", 2021]["sum_first_m2"] == 1800
    assert np.isnan(y.loc["bare", 2021]["sum_first_m2"])


def test_too_little_observed_is_null(coast, tmp_path):
    assert run(coast, tmp_path / "s", "--min_observed", 0.9) == 0
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet").set_index(["year", "quarter"])
    row = q.loc[2019, 2]
    assert row["mean_area_m2"] == 1800
    assert np.isnan(row["max_area_m2"])  # each look missed a station
    assert "no look saw enough" in row["null_reason"]


def test_presence_without_probabilities(tmp_path, caplog):
    write_map(tmp_path / "m", "A", [[1, 0]], acquired="2020-01-01")
    write_map(tmp_path / "m", "B", [[0, 1]], [[0.25, 0.75]], acquired="2020-02-01")
    kelp.series(kelp.config.SeriesConfig(predictions_dir=tmp_path / "m", output_dir=tmp_path / "s"))
    assert "the series is of presence areas" in caplog.text
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet")
    assert (q["area_is"][0], q["mean_area_m2"][0]) == ("presence", PIXEL)
    with netCDF4.Dataset(tmp_path / "s" / "stations.nc") as file:
        assert "upper bound" in file["area"].long_name


def test_tides(coast, tmp_path):
    tides = tmp_path / "tides.csv"
    tides.write_text(
        "time,height_m\n2019-06-20T19:00:00Z,1.0\n2019-06-20T18:00:00Z,0.5\n"
        "2019-06-20T23:30:00Z,9\n"
    )
    assert run(coast, tmp_path / "s", "--tides", tides) == 0
    scenes = pd.read_csv(tmp_path / "s" / "scenes.csv").set_index("scene_id")
    assert scenes["tide_m"]["a2"] == 0.75
    assert scenes["tide_m"].drop("a2").isna().all()  # days without a time have no tide
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet").set_index(["year", "quarter"])
    assert q.loc[2019, 2]["tide_m"] == 0.75
    assert read_tides(tides).heights.tolist() == [0.5, 1, 9]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "time,height_m\nnoon,1\n", "time,height_m\n"])
def test_bad_tides_are_one_line(coast, tmp_path, capfd, text):
    (tmp_path / "tides.csv").write_text(text)
    assert run(coast, tmp_path / "s", "--tides", tmp_path / "tides.csv") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "tides.csv" in line


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".yaml"}


def test_a_killed_run_goes_on_and_gives_the_same_bytes(coast, tmp_path, monkeypatch):
    """Strips of one row; the run is stopped in the third."""
    monkeypatch.setattr("kelp.products.stack.STRIP_ROWS", 1)
    assert run(coast, tmp_path / "whole", "--workers", 1) == 0
    out = tmp_path / "stopped"
    work, done = Strips.work, []

    def stopped(self, tile):
        if tile.y == 2:
            raise KeyboardInterrupt
        work(self, tile)

    monkeypatch.setattr(Strips, "work", stopped)
    assert run(coast, out, "--workers", 1) == 130
    assert not list(out.glob("*.nc"))

    def counted(self, tile):
        done.append(tile.y)
        work(self, tile)

    monkeypatch.setattr(Strips, "work", counted)
    assert run(coast, out, "--workers", 1) == 0
    assert done == [2, 3]
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_strips_and_workers_change_nothing(coast, tmp_path, monkeypatch):
    assert run(coast, tmp_path / "one", "--workers", 1) == 0
    monkeypatch.setattr("kelp.products.stack.STRIP_ROWS", 1)
    monkeypatch.setattr("kelp.products.netcdf.STRIP_ROWS", 1)
    assert run(coast, tmp_path / "many", "--workers", 2) == 0
    for name in ("quarters", "years"):
        one, many = (pd.read_parquet(tmp_path / k / f"{name}.parquet") for k in ("one", "many"))
        pd.testing.assert_frame_equal(one, many)
    for name in ("kelpwatch.csv", "scenes.csv", "looks.tif", "persistence.tif"):
        one, many = ((tmp_path / k / name).read_bytes() for k in ("one", "many"))
        assert one == many, name
    with (
        xarray.open_dataset(tmp_path / "one" / "grid.nc") as one,
        xarray.open_dataset(tmp_path / "many" / "grid.nc") as many,
    ):
        part = one.sel(y=many["y"], x=many["x"])
        xarray.testing.assert_equal(part["area"], many["area"])


def test_bad_input_is_one_line(tmp_path, capfd):
    def failing(name, *more):
        assert run(tmp_path / name, tmp_path / "s", *more) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert not list(tmp_path.glob("s/*.nc"))
        return line

    eye = np.eye(4)
    write_map(tmp_path / "undated", "A", eye)
    assert "no date" in failing("undated")
    write_map(tmp_path / "nowhere", "A", eye, georeference=Georeference(), acquired="2020-01-01")
    assert "no CRS" in failing("nowhere")
    for name, other in (
        ("half", Georeference(UTM.crs, UTM.transform @ Affine.translation(0.5, 0))),
        ("size", Georeference(UTM.crs, UTM.transform @ Affine.scale(1.01))),
        ("crs", Georeference(CRS.from_epsg(32720), UTM.transform)),
    ):
        write_map(tmp_path / name, "A", eye, acquired="2020-01-01")
        write_map(tmp_path / name, "B", eye, acquired="2020-02-01", georeference=other)
        assert "maps of one grid" in failing(name)
    write_map(tmp_path / "mixed", "A", eye, acquired="2020-01-01")
    write_map(tmp_path / "mixed", "B", eye, acquired="2020-02-01", threshold=0.3)
    assert "another threshold" in failing("mixed")
    assert "two years, as in 1984-2013" in failing("mixed", "--baseline", "2013")
    assert "no such folder" in failing("absent")


def test_nothing_observed_at_all(tmp_path, caplog):
    write_map(tmp_path / "m", "A", np.full((4, 4), U), acquired="2020-01-01")
    assert run(tmp_path / "m", tmp_path / "s") == 0
    q = pd.read_parquet(tmp_path / "s" / "quarters.parquet")
    assert q["mean_area_m2"].isna().all()
    assert (tmp_path / "s" / "kelpwatch.csv").read_text().splitlines()[1] == "2020,1,,,0,0"
    with warnings.catch_warnings(), xarray.open_dataset(tmp_path / "s" / "stations.nc") as data:
        assert data.sizes["station"] == 0


@pytest.fixture(scope="module")
def unseen_year(tmp_path_factory):
    """2020 under clouds, between two years that saw the one station; all files of all kinds."""
    root = tmp_path_factory.mktemp("unseen")
    for year in (2019, 2020, 2021):
        seen = year != 2020
        mask, p = ([[1, 0]], [[0.75, 0.25]]) if seen else ([[U, U]], [[np.nan, np.nan]])
        write_map(root / "m", f"A{year}", mask, p, acquired=f"{year}-02-01", sensor="landsat-8")
    x, y = 400_000, 4_272_000
    aoi = regions(root / "r.gpkg", coast=box(x, y - 30, x + 60, y))
    assert run(root / "m", root, "--aoi", aoi, "--baseline", "2019-2021", "--zarr", "True") == 0
    maps = ["--predictions_dir", f"{root / 'm'}", "--aoi", f"{aoi}", "--output"]
    for command, file in (("areas", "a.csv"), ("areas", "a.parquet"), ("view", "map.html")):
        more = ["--series_dir", f"{root}"] if command == "view" else []
        assert main([command, *maps, f"{root / file}", *more]) == 0
    return root


AREAS = ["kelp_pixels", "presence_area_m2", "expected_area_m2", "area_low_m2", "area_high_m2"]
FIGURES = {
    "quarters.parquet": ["mean_area_m2", "max_area_m2", "area_low_m2", "area_high_m2"],
    "years.parquet": ["sum_first_m2", "max_first_m2", "status"],
    "a.csv": AREAS,
    "a.parquet": AREAS,
}


@pytest.mark.parametrize(
    "file",
    [
        *FIGURES,
        "kelpwatch.csv",
        "stations.nc",
        "grid.nc",
        "grid.zarr",
        "persistence.tif",
        "map.html",
    ],
)
def test_an_unseen_quarter_is_null_in_every_file(unseen_year, file):
    """Four quarters of 2020, and the first of the years beside it, which are not null."""
    path = unseen_year / file
    if file in FIGURES:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        year = table["year"] if "year" in table else table["acquired"].str[:4].astype(int)
        assert table.loc[year == 2020, FIGURES[file]].isna().all(axis=None)
        assert table.loc[year == 2020, "null_reason"].notna().all()
        assert table.loc[year == 2021, FIGURES[file][1]].notna().any()
    elif file == "kelpwatch.csv":
        rows = [row.split(",") for row in path.read_text().splitlines()]
        assert [row[2:4] for row in rows if row[0] == "2020"] == [["", ""]] * 5
        assert [row[2] for row in rows if row[:2] == ["2021", "1"]] == ["675.0"]
    elif file == "persistence.tif":
        other = unseen_year / "m" / "A2020_kelp.tif"
        assert (
            main(
                [
                    "series",
                    "--predictions_dir",
                    f"{other}",
                    "--output_dir",
                    f"{unseen_year / 'one'}",
                ]
            )
            == 0
        )
        with rasterio.open(unseen_year / "one" / file) as raster:
            assert np.isnan(raster.read()).all()
    elif file == "map.html":
        data = json.loads(re.findall(r'"application/json">(.*?)</script>', path.read_text())[0])
        assert [row["expected"] for row in data["rows"]["coast"]] == [900.0, None, 900.0]
        values = [point["value"] for point in data["quarters"]["coast"]]
        assert (values[0], values[4:8], values[8]) == (675, [None] * 4, 675)
    else:
        with xarray.open_dataset(path, engine="zarr" if file == "grid.zarr" else None) as data:
            area = data["area"].values.reshape(data.sizes["time"], -1)
        assert np.isnan(area[4:8]).all()
        assert np.nanmax(area[8]) == 675
    if file == "stations.nc":  # as it is stored, for readers that do not mask
        with netCDF4.Dataset(path) as raw:
            raw.set_auto_mask(False)
            assert (raw["area"][4:8] == -1).all()
