"""Real products in, maps and their records out, through `kelp predict`."""

import json

import numpy as np
import pytest
import rasterio
from bundles import tiny_bundle, use_pixel_network
from laws import predict_command
from rasterio.warp import transform as reproject
from satellites import (
    CRS,
    PRODUCTS,
    REAL_SCENES,
    TRANSFORM,
    copy_real,
    layer,
    make_landsat,
    stack_of,
    tar_of,
    write_layer,
)

from kelp.cli import main
from kelp.sensors.elevation import Elevation
from kelp.sensors.record import read_record

SHAPE = (100, 90)


@pytest.fixture(autouse=True)
def _pixel_network(monkeypatch):
    use_pixel_network(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle", bands=("SWIR", "NIR", "R", "G", "B"))


def predict(data, bundle, out, *more):
    return main(predict_command(data, bundle, out, "--quiet", *more))


def read(path):
    with rasterio.open(path) as source:
        return source.read(1)


def bad_by_hand(folder, bits=range(6)):
    """Fill, dilated cloud, cirrus, cloud, shadow and snow, bit by bit with numpy."""
    qa = read(folder / f"{folder.name}_QA_PIXEL.TIF")
    bad = np.zeros(qa.shape, bool)
    for bit in bits:
        bad |= (qa >> bit) % 2 == 1
    return bad


def missing_by_hand(folder):
    """Pixels without NIR, or with fewer than three optical values: 0 is missing."""
    planes = [read(folder / f"{folder.name}_SR_B{n}.TIF") != 0 for n in (6, 5, 4, 3, 2)]
    return ~planes[1] | (np.sum(planes, axis=0) < 3)


def test_a_folder_of_real_products_becomes_maps(bundle, tmp_path):
    out = tmp_path / "maps"
    assert predict(REAL_SCENES[0].parent, bundle, out, "--soft_labels") == 0
    for folder in REAL_SCENES:
        path = out / f"{folder.name}_kelp.tif"
        mask, p = read(path), read(out / f"{folder.name}_kelp_prob.tif")
        with (
            rasterio.open(path) as made,
            rasterio.open(folder / f"{folder.name}_SR_B5.TIF") as source,
        ):
            assert made.crs == source.crs
            assert made.transform == source.transform
        unseen = bad_by_hand(folder) | missing_by_hand(folder)
        np.testing.assert_array_equal(mask == 255, unseen)
        np.testing.assert_array_equal(np.isnan(p), unseen)
        record = read_record(out / f"{folder.name}_kelp.json")
        assert record.scene.sensor == "landsat-8"
        assert record.scene.id == folder.name
        assert record.observed_share == pytest.approx(1 - unseen.mean())
        assert record.kelp_pixels == (mask == 1).sum()
        pixel = abs(record.grid.transform[0] * record.grid.transform[4])
        assert record.presence_area_m2 == pytest.approx(record.kelp_pixels * pixel, rel=3e-3)
        assert record.quality.bad_share == pytest.approx(bad_by_hand(folder).mean())
        roles = {source.role for source in record.scene.sources}
        assert roles >= {"SWIR", "NIR", "R", "G", "B", "QA_PIXEL", "metadata"}
    assert len(read_record(out / f"{REAL_SCENES[0].name}_kelp.json").network[0].sha256) == 64


def test_the_same_scene_in_every_form_gives_the_same_map(bundle, tmp_path):
    folder = copy_real(tmp_path)
    item = folder / f"{folder.name}_SR_stac.json"
    archive = tar_of(folder)
    stack = stack_of(folder, tmp_path / "stack" / f"{folder.name}.tif")
    maps, records = {}, {}
    for form, data in {"folder": folder, "tar": archive, "item": item, "stack": stack}.items():
        out = tmp_path / "out" / form
        assert predict(data, bundle, out) == 0
        maps[form] = (out / f"{folder.name}_kelp.tif").read_bytes()
        records[form] = read_record(out / f"{folder.name}_kelp.json")
        np.testing.assert_array_equal(
            read(out / f"{folder.name}_kelp.tif"),
            read(tmp_path / "out" / "folder" / f"{folder.name}_kelp.tif"),
        )
    assert maps["folder"] == maps["tar"] == maps["item"]  # to the last byte, tags and all
    assert records["folder"] == records["tar"]
    assert records["stack"].kelp_pixels == records["folder"].kelp_pixels
    assert (read(tmp_path / "out" / "folder" / f"{folder.name}_kelp.tif") == 1).any()


@pytest.mark.parametrize("satellite", [4, 5, 7, 9])
def test_every_landsat_becomes_a_map(bundle, tmp_path, satellite):
    folder = make_landsat(tmp_path, satellite, SHAPE)
    assert predict(folder, bundle, tmp_path / "out") == 0
    assert (read(tmp_path / "out" / f"{PRODUCTS[satellite]}_kelp.tif") != 255).all()
    record = read_record(tmp_path / "out" / f"{PRODUCTS[satellite]}_kelp.json")
    assert record.scene.sensor == f"landsat-{satellite}"


def test_bits_can_be_let_go(bundle, tmp_path):
    folder = copy_real(tmp_path)
    for quality, bits in (("fill,shadow", [0, 4]), ("none", [])):
        out = tmp_path / quality
        assert predict(folder, bundle, out, "--quality", quality) == 0
        unseen = bad_by_hand(folder, bits) | missing_by_hand(folder)
        np.testing.assert_array_equal(read(out / f"{folder.name}_kelp.tif") == 255, unseen)


def test_a_finished_map_is_left_alone_until_something_changes(bundle, tmp_path):
    folder = make_landsat(tmp_path, 8, SHAPE)
    out = tmp_path / "out"
    mask = out / f"{PRODUCTS[8]}_kelp.tif"
    assert predict(folder, bundle, out) == 0
    first = mask.stat().st_mtime_ns, (out / f"{PRODUCTS[8]}_kelp.json").read_bytes()
    assert predict(folder, bundle, out) == 0
    assert mask.stat().st_mtime_ns == first[0]
    assert predict(folder, bundle, out, "--overwrite") == 0
    assert (out / f"{PRODUCTS[8]}_kelp.json").read_bytes() == first[1]  # the same bytes
    again = mask.stat().st_mtime_ns
    assert predict(folder, bundle, out, "--quality", "cloud") == 0
    assert mask.stat().st_mtime_ns != again
    (out / f"{PRODUCTS[8]}_kelp.json").unlink()
    again = mask.stat().st_mtime_ns
    assert predict(folder, bundle, out, "--quality", "cloud") == 0
    assert mask.stat().st_mtime_ns != again
    assert (out / f"{PRODUCTS[8]}_kelp.json").is_file()


def polygon(path, *corners):
    ring = [TRANSFORM @ corner for corner in (*corners, corners[0])]
    crs = {"type": "name", "properties": {"name": CRS}}
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    return path


def square(path, top, left, bottom, right):
    return polygon(path, (left, top), (right, top), (right, bottom), (left, bottom))


def test_an_area_of_interest(bundle, tmp_path):
    folder = make_landsat(tmp_path, 8, SHAPE)
    aoi = square(tmp_path / "aoi.geojson", 20, 30, 60, 70)
    assert predict(folder, bundle, tmp_path / "whole", "--soft_labels") == 0
    assert predict(folder, bundle, tmp_path / "part", "--soft_labels", "--aoi", aoi) == 0
    whole, part = (
        read(tmp_path / name / f"{PRODUCTS[8]}_kelp_prob.tif") for name in ("whole", "part")
    )
    inside = np.zeros(SHAPE, bool)
    inside[20:60, 30:70] = True
    np.testing.assert_array_equal(part[inside], whole[inside])
    assert np.isnan(part[~inside]).all()
    record = read_record(tmp_path / "part" / f"{PRODUCTS[8]}_kelp.json")
    assert record.aoi.share == pytest.approx(inside.mean())
    assert record.observed_share == pytest.approx(inside.mean())


@pytest.mark.parametrize("corners", [(40, 50, 70, 85), (0, 0, 9, 200), (121, 181, 130, 190)])
def test_an_area_of_an_anchored_scene(tmp_path, monkeypatch, corners):
    """Water cells of 10 px: the area needs those around its tiles, and is mapped as ever."""
    monkeypatch.setattr("kelp.raster.water.CELL", 10)
    monkeypatch.setattr("kelp.raster.water.EVERY", 2)
    anchored = tiny_bundle(
        tmp_path / "anchored", bands=("SWIR", "NIR", "R", "G", "B"), anchoring="local"
    )
    shape = (130, 200)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    qa = np.where((rows // 7 + columns // 9) % 5 == 0, 22280, 21952).astype(np.uint16)
    folder = make_landsat(tmp_path, 8, shape, qa)
    for number in range(2, 7):  # haze from corner to corner
        path = folder / f"{folder.name}_SR_B{number}.TIF"
        haze = 3 * rows + (columns - 90) ** 2 // 20
        write_layer(path, (read(path) + haze).astype(np.uint16), 0)
    aoi = square(tmp_path / "aoi.geojson", *corners)
    assert predict(folder, anchored, tmp_path / "whole", "--soft_labels") == 0
    assert predict(folder, anchored, tmp_path / "part", "--soft_labels", "--aoi", aoi) == 0
    inside = np.zeros(shape, bool)
    top, left, bottom, right = corners
    inside[top:bottom, left:right] = True
    for product in ("kelp", "kelp_prob"):
        whole, part = (
            read(tmp_path / name / f"{folder.name}_{product}.tif") for name in ("whole", "part")
        )
        assert part[inside].tobytes() == whole[inside].tobytes()
    assert np.isfinite(part[inside]).any()
    whole, part = (
        read_record(tmp_path / name / f"{folder.name}_kelp.json") for name in ("whole", "part")
    )
    assert (whole.water.read_share, whole.quality.over) == (0.5, "scene")
    assert part.water.read_share < 0.3
    assert part.water.clear_pixels < whole.water.clear_pixels
    assert part.quality.over == "area"
    bad = bad_by_hand(folder)
    assert part.quality.bad_share == pytest.approx(bad[inside].mean())
    assert part.quality.share["cloud"] == pytest.approx(bad[inside].mean())
    assert whole.quality.bad_share == pytest.approx(bad.mean())


def test_excluded_polygons_and_land_are_no_kelp_and_counted(bundle, tmp_path):
    folder = make_landsat(tmp_path, 8, SHAPE)
    ports = square(tmp_path / "ports.geojson", 10, 10, 30, 50)
    elevation = np.zeros(SHAPE, np.float32)
    elevation[:, 60:] = 8
    dem = write_layer(tmp_path / "dem.tif", elevation)
    plain = tmp_path / "plain"
    assert predict(folder, bundle, plain, "--dem", dem) == 0
    before = read(plain / f"{PRODUCTS[8]}_kelp.tif")
    ruled = tmp_path / "ruled"
    more = ("--dem", dem, "--land", "zero", "--exclude", ports, "--land_tolerance", "2")
    assert predict(folder, bundle, ruled, *more) == 0
    after = read(ruled / f"{PRODUCTS[8]}_kelp.tif")
    excluded, inland = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    excluded[10:30, 10:50] = inland[:, 62:] = True
    np.testing.assert_array_equal(after, np.where(excluded | inland, 0, before))
    assert (before[excluded] == 1).any()
    record = read_record(ruled / f"{PRODUCTS[8]}_kelp.json")
    assert record.excluded.pixels == excluded.sum()
    assert record.excluded.kelp_pixels == (before[excluded] == 1).sum()
    assert record.land.pixels == inland.sum()
    assert [source.href for source in record.dem.sources] == ["dem.tif"]
    assert record.kelp_pixels == (after == 1).sum()


def test_a_rule_of_land_warps_no_elevation_again(bundle, tmp_path, monkeypatch):
    folder = make_landsat(tmp_path, 8, SHAPE)
    dem = write_layer(tmp_path / "dem.tif", np.full(SHAPE, 8, np.float32))
    warped, counted = [], Elevation._warped
    monkeypatch.setattr(
        Elevation, "_warped", lambda self, cell: warped.append(cell) or counted(self, cell)
    )
    assert predict(folder, bundle, tmp_path / "out", "--dem", dem, "--land", "zero") == 0
    assert (read(tmp_path / "out" / f"{PRODUCTS[8]}_kelp.tif") == 0).all()
    assert len(warped) == 1


def test_one_bad_scene_is_named_and_the_others_are_done(bundle, tmp_path, capfd):
    good = make_landsat(tmp_path / "in", 8, SHAPE)
    bad = make_landsat(tmp_path / "in", 9, SHAPE)
    (bad / f"{PRODUCTS[9]}_SR_B2.TIF").unlink()
    assert predict(tmp_path / "in", bundle, tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "SR_B2.TIF is missing" in error
    assert (tmp_path / "out" / f"{good.name}_kelp.tif").is_file()


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (("--land", "zero"), "no elevation"),
        (("--dem", "nowhere"), "nowhere"),
        (("--aoi", "nowhere.gpkg"), "nowhere.gpkg"),
        (("--quality", "clouds"), "no bit 'clouds'"),
        (("--cloud_mask", "nowhere.tif"), "nowhere.tif"),
        (("--sign", "nowhere:f"), "nowhere"),
        (("--dem_sea_where_absent",), "goes with"),
        (("--band_order", "R,G,B"), "is for rasters"),
    ],
)
def test_bad_options_are_one_line(bundle, tmp_path, capfd, more, cause):
    folder = make_landsat(tmp_path, 8, SHAPE)
    assert predict(folder, bundle, tmp_path / "out", *more) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert cause in error


def test_the_python_functions_take_products_too(bundle, tmp_path):
    import kelp

    folder = make_landsat(tmp_path, 8, SHAPE)
    loaded = kelp.load_bundle(bundle)
    kelp.predict(loaded, folder, tmp_path / "x_kelp.tif", device="cpu", precision="32-true")
    assert predict(folder, bundle, tmp_path / "out") == 0
    np.testing.assert_array_equal(
        read(tmp_path / "x_kelp.tif"), read(tmp_path / "out" / f"{PRODUCTS[8]}_kelp.tif")
    )


def test_pictures_of_products(bundle, tmp_path):
    make_landsat(tmp_path / "in", 8, SHAPE)
    assert predict(tmp_path / "in", bundle, tmp_path / "out") == 0
    given = {"data_dir": "in", "predictions_dir": "out", "output_dir": "pictures"}
    arguments = [f"--{name}={tmp_path / folder}" for name, folder in given.items()]
    assert main(["preview", *arguments, "--quiet"]) == 0
    assert (tmp_path / "pictures" / f"{PRODUCTS[8]}.png").is_file()


def test_the_layers_of_the_helper_are_all_different():
    """Else bands that are mixed up would not show; and degrees are where the scene lies."""
    assert len({int(layer(n)[0, 0]) for n in range(1, 8)}) == 7
    (longitude,), (latitude,) = reproject(CRS, "EPSG:4326", [TRANSFORM.c], [TRANSFORM.f])
    assert (round(longitude), round(latitude)) == (-57, -51)
