"""Areas by region and scene: counted by hand, null where nothing was seen, with intervals."""

import json

import geopandas
import numpy as np
import pandas as pd
import pytest
from affine import Affine
from coasts import random_map, write_map
from rasterio.crs import CRS
from shapely import LineString, Polygon, box

import kelp
from kelp.cli import main
from kelp.io.location import PACKAGED
from kelp.products.areas import COLUMNS, measure
from kelp.products.maps import open_map
from kelp.products.regions import read_regions
from kelp.raster.masks import Georeference

X, Y = 400_000, 4_272_000
AREAS = ["presence_area_m2", "expected_area_m2", "area_low_m2", "area_high_m2"]


def rectangle(rows, columns):
    """A region of whole pixels of the maps in `coasts`."""
    (top, bottom), (left, right) = rows, columns
    return box(X + 30 * left, Y - 30 * bottom, X + 30 * right, Y - 30 * top)


def write_regions(path, shapes, crs=32721, **columns):
    columns = columns or {"name": [f"r{k}" for k in range(len(shapes))]}
    frame = geopandas.GeoDataFrame(columns, geometry=list(shapes), crs=crs)
    frame.to_file(path)
    return path


def run(folder, aoi, output, *more):
    arguments = ["--predictions_dir", f"{folder}", "--aoi", f"{aoi}", "--output", f"{output}"]
    return main(["areas", *arguments, *more])


def table_of(folder, aoi, output, *more):
    assert run(folder, aoi, output, *more) == 0
    reader = pd.read_csv if output.suffix == ".csv" else pd.read_parquet
    return reader(output)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_counted_by_hand(tmp_path, ending):
    mask = np.zeros((20, 20), np.uint8)
    mask[2:4, 2:7] = 1
    mask[2, 10] = 255
    mask[15:, :] = 255
    p = np.where(mask == 1, 0.75, 0.01)
    p[mask == 255] = np.nan
    maps = tmp_path / "maps"
    write_map(maps, "B", mask, p, acquired="2023-03-01", sensor="landsat-8")
    write_map(maps, "A", np.roll(mask, 5, 0), np.roll(p, 5, 0), acquired="2022-03-01")
    shapes = [
        rectangle((0, 5), (0, 15)),  # 75 pixels, 1 unseen, 10 kelp
        rectangle((10, 20), (0, 10)),  # half unseen in B
        rectangle((14, 20), (0, 10)),  # five sixths unseen in B
        rectangle((15, 20), (3, 9)),  # nothing seen in B
        rectangle((0, 4), (15, 25)),  # half beyond the edge
        rectangle((50, 60), (0, 10)),  # elsewhere
        box(X + 31, Y - 40, X + 40, Y - 31),  # holds no centre of a pixel
    ]
    aoi = write_regions(tmp_path / "r.gpkg", shapes)
    table = table_of(maps, aoi, tmp_path / "out" / f"areas.{ending}")
    assert list(table) == list(COLUMNS)
    assert table["scene_id"].tolist() == ["A", "B"] * 7
    assert table["acquired"].tolist() == ["2022-03-01", "2023-03-01"] * 7
    b = table[table["scene_id"] == "B"].set_index("aoi_id")
    assert b["observed_share"].round(4).tolist()[:6] == [0.9867, 0.5, 0.1667, 0, 0.5, 0]
    assert np.isnan(b["observed_share"]["r6"])
    assert b["pixels"].tolist() == [75, 100, 60, 30, 40, 100, 0]
    assert b["unobserved_pixels"].fillna(-1).tolist() == [1, 50, 50, 30, 20, 100, -1]
    assert b["kelp_pixels"].fillna(-1).tolist() == [10, 0, -1, -1, 0, -1, -1]
    assert b["presence_area_m2"].fillna(-1).tolist() == [9000, 0, -1, -1, 0, -1, -1]
    expected = b["expected_area_m2"]
    assert expected["r0"] == pytest.approx(900 * (10 * 0.75 + 64 * 0.01), abs=0.06)
    assert expected["r1"] == pytest.approx(900 * 50 * 0.01)
    null = b.loc[["r2", "r3", "r5", "r6"]]
    assert null[["kelp_pixels", *AREAS]].isna().all(axis=None)
    assert null["null_reason"].tolist() == [
        "only 0.167 of the region was observed",
        "nothing of the region was observed",
        "nothing of the region was observed",
        "the region holds no centre of a pixel",
    ]
    assert "no bundle was named" in b["null_reason"]["r0"]
    assert b[["area_low_m2", "area_high_m2"]].isna().all(axis=None)
    assert (tmp_path / "out" / "kelp-areas.yaml").is_file()


def test_nulls_are_empty_fields_of_the_csv(tmp_path):
    write_map(tmp_path / "maps", "A", np.full((5, 5), 255))
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 5), (0, 5))])
    table_of(tmp_path / "maps", aoi, tmp_path / "a.csv", "--min_observed", "0")
    line = (tmp_path / "a.csv").read_text().splitlines()[1]
    assert line == "r0,A,,,25,0.0,25,,,,,,nothing of the region was observed"


def test_observed_and_empty_is_zero(tmp_path):
    write_map(tmp_path / "maps", "A", np.zeros((5, 5)), np.zeros((5, 5)))
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 5), (0, 5))])
    table = table_of(tmp_path / "maps", aoi, tmp_path / "a.csv")
    assert table[["kelp_pixels", *AREAS[:2]]].to_numpy().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("code", [4326, 3857, 32720])
def test_regions_of_another_crs(tmp_path, code):
    mask, p = random_map(0, (80, 70))
    entry = open_map(write_map(tmp_path, "A", mask, p))
    shape = Polygon([(X + 200, Y - 300), (X + 1900, Y - 250), (X + 1700, Y - 2100)])
    (same,) = read_regions(write_regions(tmp_path / "same.gpkg", [shape]))
    frame = geopandas.GeoDataFrame({"id": [1]}, geometry=[shape], crs=32721).to_crs(code)
    frame.to_file(tmp_path / "other.gpkg")
    (other,) = read_regions(tmp_path / "other.gpkg")
    assert other.id == "1"
    one, two = measure(entry, same), measure(entry, other)
    assert one.kelp > 300
    assert abs(one.pixels - two.pixels) <= 2
    assert abs(one.kelp - two.kelp) <= 2


def test_parts_of_a_map_add_up(tmp_path):
    """Regions that share borders share no pixel, and none is lost."""
    mask, p = random_map(3, (64, 64))
    entry = open_map(write_map(tmp_path, "A", mask, p))
    middle = (X + 1001.3, Y - 877.7)
    corners = [(X, Y), (X + 1920, Y), (X + 1920, Y - 1920), (X, Y - 1920)]
    shapes = [Polygon([middle, corners[k], corners[(k + 1) % 4]]) for k in range(4)]
    regions = read_regions(write_regions(tmp_path / "r.gpkg", shapes))
    found = [measure(entry, region) for region in regions]
    assert sum(m.kelp for m in found) == (mask == 1).sum()
    assert sum(m.observed for m in found) == (mask != 255).sum()
    assert sum(m.pixels for m in found) == mask.size
    assert sum(m.expected_m2 for m in found) == pytest.approx(900 * np.nansum(p))
    assert sum(m.presence_m2 for m in found) == 900 * (mask == 1).sum()


def bundle(folder, sites=30, sha=None, factor=1.2):
    folder.mkdir()
    pairs = [
        {
            "site": f"s{k}",
            "scene": f"s{k}",
            "presence_m2": 2e5,
            "expected_m2": 1e5,
            "truth_m2": (1e5 + 9000) * (factor if k % 2 else 1 / factor) - 9000,
        }
        for k in range(sites)
    ]
    spec = {"weights_sha256": sha or f"{3:064x}", "held_out_sites": pairs}
    (folder / "bundle.json").write_text(json.dumps(spec))
    return folder


def test_intervals_come_from_the_bundle(tmp_path, capfd):
    mask = np.zeros((20, 20), np.uint8)
    mask[:10] = 1
    p = np.where(mask == 1, 0.75, 0.0)
    write_map(tmp_path / "maps", "A", mask, p)
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 20), (0, 20))])
    out = tmp_path / "a.csv"
    table = table_of(tmp_path / "maps", aoi, out, "--run_dir", f"{bundle(tmp_path / 'b')}")
    expected = 200 * 0.75 * 900
    assert table["expected_area_m2"][0] == expected
    assert table["area_low_m2"][0] == pytest.approx((expected + 9000) / 1.2 - 9000, abs=1)
    assert table["area_high_m2"][0] == pytest.approx((expected + 9000) * 1.2 - 9000, abs=1)
    assert table["null_reason"].isna().all()
    wild = bundle(tmp_path / "wild", factor=10)
    table = table_of(tmp_path / "maps", aoi, out, "--run_dir", f"{wild}")
    assert table["area_high_m2"][0] == 400 * 900  # there is no more than was observed
    few = bundle(tmp_path / "few", sites=8)
    table = table_of(tmp_path / "maps", aoi, out, "--run_dir", f"{few}")
    assert table["area_low_m2"].isna().all()
    assert "at 8 held-out sites, 9 are needed" in table["null_reason"][0]
    # Without probabilities, from the errors of presence areas.
    write_map(tmp_path / "bare", "A", mask)
    table = table_of(tmp_path / "bare", aoi, out, "--run_dir", f"{tmp_path / 'b'}")
    assert table["presence_area_m2"][0] == 180_000
    assert table["expected_area_m2"].isna().all()
    assert table["area_high_m2"][0] == pytest.approx((189_000) * 129_000 / 209_000 - 9000, rel=0.2)
    capfd.readouterr()
    wrong = bundle(tmp_path / "wrong", sha="0" * 64)
    assert run(tmp_path / "maps", aoi, out, "--run_dir", f"{wrong}") == 2
    assert "not the network that made" in capfd.readouterr().err


def test_the_packaged_network_is_named_as_for_prediction(tmp_path, capfd):
    write_map(tmp_path / "maps", "A", np.eye(5), record=False)
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 5), (0, 5))])
    table = table_of(tmp_path / "maps", aoi, tmp_path / "a.csv", "--run_dir", "coasts")
    assert table["area_low_m2"][0] < 5 * 900 < table["area_high_m2"][0]
    assert run(tmp_path / "maps", aoi, tmp_path / "a.csv", "--run_dir", "coast") == 2
    assert "no packaged network" in capfd.readouterr().err


def test_maps_of_the_packaged_network_have_intervals_unasked(tmp_path):
    write_map(tmp_path / "maps", "A", np.eye(5))
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 5), (0, 5))])
    table = table_of(tmp_path / "maps", aoi, tmp_path / "a.csv")
    assert table["area_low_m2"].isna().all()  # of another network
    record = tmp_path / "maps" / "A_kelp.json"
    content = json.loads(record.read_text())
    weights = json.loads((PACKAGED / "coasts" / "bundle.json").read_text())["weights_sha256"]
    content["network"] = [{"name": "coasts", "sha256": weights, "weight": 1.0}]
    record.write_text(json.dumps(content))
    table = table_of(tmp_path / "maps", aoi, tmp_path / "a.csv")
    assert table["area_low_m2"][0] < 5 * 900 < table["area_high_m2"][0]


def test_mixed_sensors_are_named(tmp_path, caplog):
    for name, sensor in (("A", "landsat-5"), ("B", "landsat-8")):
        write_map(tmp_path / "maps", name, np.eye(5), sensor=sensor)
    aoi = write_regions(tmp_path / "r.gpkg", [rectangle((0, 5), (0, 5))])
    config = kelp.config.AreasConfig(
        predictions_dir=tmp_path / "maps", aoi=aoi, output=tmp_path / "a.csv"
    )
    kelp.areas(config)
    assert "landsat-5 and landsat-8 together" in caplog.text


BOWTIE = Polygon([(X, Y), (X + 300, Y - 300), (X + 300, Y), (X, Y - 300)])
GOOD = rectangle((0, 5), (0, 5))


@pytest.mark.parametrize(
    ("shapes", "columns", "more", "cause"),
    [
        ([GOOD], {"x": [1]}, [], "no column aoi_id, id, name to name its polygons"),
        ([GOOD], {"name": ["a"]}, ["--aoi_id", "label"], "no column label"),
        ([GOOD, GOOD], {"name": ["a", "a"]}, [], "two polygons have the name a"),
        ([GOOD, GOOD], {"name": ["a", None]}, [], "a polygon has no name"),
        ([BOWTIE.buffer(0), BOWTIE], {"name": ["a", "b"]}, [], "region b is not a valid polygon"),
        ([Polygon([(0, 0), (1, 1), (0, 0)])], {"name": ["a"]}, [], "region a has no area"),
        (
            [LineString(GOOD.exterior)],
            {"name": ["a"]},
            [],
            "region a is a LineString",
        ),
    ],
)
def test_bad_regions_are_one_line(tmp_path, capfd, shapes, columns, more, cause):
    write_map(tmp_path / "maps", "A", np.eye(5))
    aoi = tmp_path / "r.gpkg"
    geopandas.GeoDataFrame(columns, geometry=shapes, crs=32721).to_file(aoi)
    assert run(tmp_path / "maps", aoi, tmp_path / "a.csv", *more) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert cause in line
    assert "r.gpkg" in line
    assert not (tmp_path / "a.csv").exists()


def test_bad_input_is_one_line(tmp_path, capfd):
    write_map(tmp_path / "maps", "A", np.eye(5))
    write_map(tmp_path / "nowhere", "A", np.eye(5), georeference=Georeference())
    aoi = write_regions(tmp_path / "r.gpkg", [GOOD])
    (tmp_path / "text.gpkg").write_text("no polygons")
    out = tmp_path / "a.csv"
    for folder, regions, output, cause in (
        ("maps", tmp_path / "absent.gpkg", out, "no such file"),
        ("maps", tmp_path / "text.gpkg", out, "not a readable vector file"),
        ("maps", aoi, tmp_path / "a.xlsx", ".csv or .parquet"),
        ("nowhere", aoi, out, "has no CRS"),
        ("absent", aoi, out, "no such folder"),
    ):
        assert run(tmp_path / folder, regions, output) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert cause in line
        assert not output.exists()


def test_ground_area_of_a_mercator_map(tmp_path):
    mercator = Georeference(CRS.from_epsg(3857), Affine(30, 0, -6.4e6, 0, -30, -6.737e6))
    write_map(tmp_path / "maps", "A", np.ones((10, 10)), georeference=mercator)
    shape = box(-6.4e6, -6.737e6 - 300, -6.4e6 + 300, -6.737e6)
    aoi = write_regions(tmp_path / "r.gpkg", [shape], 3857)
    table = table_of(tmp_path / "maps", aoi, tmp_path / "a.csv")
    assert table["kelp_pixels"][0] == 100
    assert table["presence_area_m2"][0] == pytest.approx(90_000 * np.cos(0.9017) ** 2, rel=0.01)
