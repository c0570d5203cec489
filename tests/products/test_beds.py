"""Beds: polygons whose pixels are exactly those of the mask."""

import json

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet
import pyogrio
import pytest
import rasterio.features
from affine import Affine
from coasts import UTM, random_map, write_map
from geopandas.testing import assert_geodataframe_equal
from rasterio.crs import CRS
from scipy import ndimage
from shapely import Polygon

import kelp
from kelp.cli import main
from kelp.products.beds import beds_of, smoothed
from kelp.products.maps import open_map
from kelp.raster.masks import Georeference

NAN = np.nan


def test_figures_of_two_beds(tmp_path):
    mask = np.zeros((12, 14), np.uint8)
    mask[2:4, 2:5] = 1  # 6 pixels
    mask[9:12, 6] = 1  # 3 pixels that touch the lower edge
    mask[10, 8] = 255  # two columns beside it: near, not touching
    p = np.where(mask == 1, 0.75, 0.1)
    p[3, 4] = 1.0
    spread = np.where(mask == 1, 0.2, 0)
    write_map(tmp_path, "A", mask, p, spread, acquired="2023-02-01", sensor="landsat-8")
    table = beds_of(open_map(tmp_path / "A_kelp.tif"))
    assert table["bed_id"].tolist() == ["A/1", "A/2"]
    assert table["pixels"].tolist() == [6, 3]
    assert table["presence_area_m2"].tolist() == [5400, 2700]
    assert table["expected_area_m2"].tolist() == pytest.approx([(5 * 0.75 + 1) * 900, 2.25 * 900])
    assert table["mean_p"].tolist() == pytest.approx([(5 * 0.75 + 1) / 6, 0.75])
    assert table["max_p"].tolist() == [1.0, 0.75]
    assert table["spread"].tolist() == pytest.approx([0.2, 0.2])
    assert table["touches_edge"].tolist() == [False, True]
    assert table["touches_unobserved"].tolist() == [False, False]
    # Around the second bed lie rows 6 to 11 and columns 3 to 9, without the bed: 39, one unseen.
    assert table["observed_share"].tolist() == pytest.approx([1, 38 / 39])
    assert set(table["acquired"]) == {"2023-02-01"}
    assert set(table["sensor"]) == {"landsat-8"}
    assert set(table["threshold"]) == {0.5}
    assert table.crs.to_epsg() == 32721
    assert table.geometry.iloc[0].bounds == (400_060, 4_271_880, 400_150, 4_271_940)


@pytest.mark.parametrize("connectivity", [8, 4])
@pytest.mark.parametrize("seed", range(4))
def test_polygons_are_valid_and_hold_exactly_the_kelp_pixels(tmp_path, connectivity, seed):
    mask, p = random_map(seed)
    write_map(tmp_path, "A", mask, p)
    table = beds_of(open_map(tmp_path / "A_kelp.tif"), connectivity=connectivity)
    structure = np.ones((3, 3)) if connectivity == 8 else None
    assert len(table) == ndimage.label(mask == 1, structure)[1]
    assert table.geometry.is_valid.all()
    assert table["pixels"].sum() == (mask == 1).sum()
    assert (table.geometry.area == table["pixels"] * 900).all()
    again = rasterio.features.rasterize(
        zip(table.geometry, range(1, len(table) + 1), strict=True),
        out_shape=mask.shape,
        transform=UTM.transform,
    )
    assert ((again > 0) == (mask == 1)).all()
    assert table["expected_area_m2"].sum() == pytest.approx(p[mask == 1].sum() * 900)


@pytest.mark.parametrize("ending", ["gpkg", "geojson"])
def test_smooth_outlines_leave_the_figures_alone(tmp_path, ending):
    mask, p = random_map(3)
    write_map(tmp_path / "maps", "A", mask, p)
    arguments = ["--predictions_dir", f"{tmp_path / 'maps'}", "--output"]
    tables = {}
    for metres in (0, 60):
        path = tmp_path / f"{metres}" / f"beds.{ending}"
        assert main(["beds", *arguments, f"{path}", "--smooth", f"{metres}"]) == 0
        tables[metres] = geopandas.read_file(path).to_crs(UTM.crs)
    exact, smooth = tables[0], tables[60]
    pd.testing.assert_frame_equal(exact.drop(columns="geometry"), smooth.drop(columns="geometry"))
    assert smooth.geometry.is_valid.all()
    assert not smooth.geometry.is_empty.any()
    corners = [len(table.geometry.get_coordinates()) for table in (exact, smooth)]
    assert corners[1] < 0.8 * corners[0]
    holes = [table.geometry.explode().interiors.map(len).sum() for table in (exact, smooth)]
    assert holes[0] == holes[1]
    moved = exact.boundary.hausdorff_distance(smooth.boundary)
    assert 0 < moved.max() < 90


@pytest.mark.parametrize("code", [4326, 2225])  # degrees; US survey feet
def test_smoothing_is_in_metres_in_every_crs(tmp_path, code):
    saw = Polygon([(0, 0), (1000, 0), (1000, 500), (500, 540), (0, 500)])  # 40 m high
    place = geopandas.GeoSeries([saw], crs=32610).translate(500_000, 4_200_000)
    there = place.to_crs(code)
    assert len(smoothed(there, 30).iloc[0].exterior.coords) == 6
    assert len(smoothed(there, 50).iloc[0].exterior.coords) == 5


def test_strips_change_nothing(tmp_path, monkeypatch):
    """A bed that crosses many strips is one bed; figures are those of the whole."""
    mask, p = random_map(7, (90, 40), 0.45)
    mask[10:80, 20] = 1
    p[10:80, 20] = 0.9
    entry = open_map(write_map(tmp_path, "A", mask, p))
    whole = beds_of(entry, min_pixels=2)
    strips = type(entry).strips
    for rows in (1, 2, 7):
        monkeypatch.setattr(type(entry), "strips", lambda self, rows=rows: strips(self, rows))
        parts = beds_of(entry, min_pixels=2)
        assert_geodataframe_equal(parts, whole, check_less_precise=True)
    assert whole["pixels"].min() == 2


@pytest.mark.parametrize("seed", range(3))
def test_the_share_observed_around_a_bed(tmp_path, seed):
    """By brute force: dilate each bed by three pixels and look."""
    mask, p = random_map(seed, (30, 25), 0.1)
    mask[5:9, 5:9] = 255
    entry = open_map(write_map(tmp_path, "A", mask, p))
    table = beds_of(entry)
    labels, count = ndimage.label(mask == 1, np.ones((3, 3)))
    for k in range(1, count + 1):
        bed = labels == k
        ring = ndimage.binary_dilation(bed, np.ones((7, 7))) & ~bed
        near = ndimage.binary_dilation(bed, np.ones((3, 3)))
        assert table["observed_share"][k - 1] == pytest.approx((mask[ring] != 255).mean())
        assert table["touches_unobserved"][k - 1] == (mask[near] == 255).any()


def test_areas_are_those_of_the_ground(tmp_path):
    mask = np.ones((10, 10), np.uint8)
    mercator = Georeference(CRS.from_epsg(3857), Affine(30, 0, -6.4e6, 0, -30, -6.737e6))
    table = beds_of(open_map(write_map(tmp_path, "A", mask, georeference=mercator)))
    # Scale of Web Mercator at 51.6 S: 1 / cos(latitude), squared.
    assert table["presence_area_m2"][0] == pytest.approx(100 * 900 * np.cos(0.9017) ** 2, rel=0.01)


@pytest.mark.parametrize("ending", ["gpkg", "fgb", "geojson", "parquet"])
def test_files_are_read_by_others(tmp_path, ending):
    mask, p = random_map(1)
    write_map(tmp_path / "maps", "A", mask, p, acquired="2023-02-01T13:45:10+00:00")
    write_map(tmp_path / "maps", "B", mask[::-1], p[::-1])
    output = tmp_path / "out" / f"beds.{ending}"
    assert main(["beds", "--predictions_dir", f"{tmp_path}/maps", "--output", f"{output}"]) == 0
    if ending == "parquet":
        table = geopandas.read_parquet(output)
        facts = json.loads(pyarrow.parquet.read_metadata(output).metadata[b"geo"])
        assert facts["version"] == "1.1.0"
        assert "bbox" in facts["columns"]["geometry"]["covering"]
    else:
        table = pyogrio.read_dataframe(output)
    assert table["pixels"].sum() == 2 * (mask == 1).sum()
    assert table.geometry.is_valid.all()
    assert table.crs.to_epsg() == (4326 if ending == "geojson" else 32721)
    moments = {pd.Timestamp(value).isoformat() for value in table["acquired"].dropna()}
    assert moments == {"2023-02-01T13:45:10+00:00"}
    assert (output.parent / "kelp-beds.yaml").is_file()
    assert not list(output.parent.glob(".*"))


@pytest.mark.parametrize("ending", ["fgb", "geojson", "parquet"])
def test_the_same_maps_give_the_same_bytes(tmp_path, ending):
    mask, p = random_map(1)
    write_map(tmp_path / "maps", "A", mask, p)
    for name in ("one", "two"):
        kelp.beds(
            kelp.config.BedsConfig(
                predictions_dir=tmp_path / "maps", output=tmp_path / f"{name}.{ending}"
            )
        )
    one, two = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
    assert one == two


def test_no_kelp_is_an_empty_layer_and_no_probabilities_are_null(tmp_path):
    write_map(tmp_path / "none", "A", np.zeros((5, 5)))
    output = tmp_path / "none.gpkg"
    assert main(["beds", "--predictions_dir", f"{tmp_path}/none", "--output", f"{output}"]) == 0
    table = pyogrio.read_dataframe(output)
    assert len(table) == 0
    assert "presence_area_m2" in table
    write_map(tmp_path / "some", "A", np.eye(5))
    table = beds_of(open_map(tmp_path / "some" / "A_kelp.tif"))
    assert len(table) == 1
    assert table[["expected_area_m2", "mean_p", "max_p", "spread"]].isna().all(axis=None)


def test_uncalibrated_probabilities_give_no_expected_area(tmp_path):
    mask, p = random_map(1)
    table = beds_of(open_map(write_map(tmp_path, "A", mask, p, calibrated=False)))
    assert table["expected_area_m2"].isna().all()
    assert table["mean_p"].notna().all()


def test_a_map_of_another_program(tmp_path):
    mask, _ = random_map(2)
    path = write_map(tmp_path, "A", mask, record=False)
    path = path.rename(tmp_path / "LC08_L2SP_224097_20230115_20230124_02_T1.tif")
    table = beds_of(open_map(path))
    assert table["pixels"].sum() == (mask == 1).sum()
    assert set(table["acquired"]) == {"2023-01-15"}
    assert set(table["sensor"]) == {"landsat-8"}
    assert table["network"].isna().all()


def failing(capfd, folder, output, *more):
    arguments = ["--predictions_dir", f"{folder}", "--output", f"{output}", *more]
    assert main(["beds", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert not output.exists()
    return line


def test_bad_input_is_one_line(tmp_path, capfd):
    mask, p = random_map(1, (9, 9))
    out = tmp_path / "o" / "beds.gpkg"
    assert "no such folder" in failing(capfd, tmp_path / "absent", out)
    maps = tmp_path / "maps"
    write_map(maps, "A", mask, p)
    assert ".gpkg, .parquet, .fgb or .geojson" in failing(capfd, maps, tmp_path / "beds.shp")

    write_map(tmp_path / "thresholds", "A", mask, p)
    write_map(tmp_path / "thresholds", "B", mask, p, threshold=0.4)
    assert "another threshold" in failing(capfd, tmp_path / "thresholds", out)
    write_map(tmp_path / "networks", "A", mask, p)
    write_map(tmp_path / "networks", "B", mask, p, network="other")
    assert "another network" in failing(capfd, tmp_path / "networks", out)
    kelp.beds(
        kelp.config.BedsConfig(predictions_dir=tmp_path / "networks", output=out, allow_mixed=True)
    )
    out.unlink()

    write_map(tmp_path / "twice", "A", mask, p)
    write_map(tmp_path / "twice", "B", mask, p, scene_id="A")
    assert "two maps of the scene A" in failing(capfd, tmp_path / "twice", out)

    other = Georeference(CRS.from_epsg(32720), UTM.transform)
    write_map(tmp_path / "crs", "A", mask, p)
    write_map(tmp_path / "crs", "B", mask, p, georeference=other)
    assert "another CRS" in failing(capfd, tmp_path / "crs", out)
    write_map(tmp_path / "nowhere", "A", mask, p, georeference=Georeference())
    assert "no CRS" in failing(capfd, tmp_path / "nowhere", out)

    write_map(tmp_path / "shifted", "A", mask, p)
    shifted = Georeference(UTM.crs, UTM.transform @ Affine.translation(1, 0))
    write_map(tmp_path / "other", "A", mask, p, georeference=shifted)
    (tmp_path / "other" / "A_kelp_prob.tif").replace(tmp_path / "shifted" / "A_kelp_prob.tif")
    assert "its pixels are not those of" in failing(capfd, tmp_path / "shifted", out)

    write_map(tmp_path / "hole", "A", mask, np.full(mask.shape, NAN))
    assert "no probability where" in failing(capfd, tmp_path / "hole", out)
    (maps / "A_kelp.json").write_text("{}")
    assert "not a record of kelp" in failing(capfd, maps, out)


def test_maps_of_several_crs_go_into_geojson(tmp_path):
    mask, p = random_map(1, (9, 9))
    write_map(tmp_path / "crs", "A", mask, p)
    other = Georeference(CRS.from_epsg(32720), UTM.transform)
    write_map(tmp_path / "crs", "B", mask, p, georeference=other)
    output = tmp_path / "beds.geojson"
    assert main(["beds", "--predictions_dir", f"{tmp_path}/crs", "--output", f"{output}"]) == 0
    assert pyogrio.read_dataframe(output)["pixels"].sum() == 2 * (mask == 1).sum()
