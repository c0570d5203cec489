"""Ground area of pixels, against polygons measured by pyproj."""

import tracemalloc

import numpy as np
import pytest
from affine import Affine
from pyproj import Geod
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from kelp.errors import InputError
from kelp.raster.area import GroundArea
from kelp.raster.masks import Georeference
from kelp.tiling.grid import Tile

WGS84 = CRS.from_epsg(4326)
GEOD = Geod(ellps="WGS84")


def densified(height, width, n=60):
    """The outline of a raster in pixels, as many points: edges are curves on the ground."""
    up, along = np.linspace(0, height, n), np.linspace(0, width, n)
    x = np.concatenate([along, np.full(n, width), along[::-1], np.zeros(n)])
    y = np.concatenate([np.zeros(n), up, np.full(n, height), up[::-1]])
    return x, y


def measured(crs, transform, height, width):
    lon, lat = reproject(crs, WGS84, *(transform @ densified(height, width)))
    return abs(GEOD.polygon_area_perimeter(lon, lat)[0])


def placed(code, lat, lon, side):
    crs = CRS.from_user_input(code)
    (x,), (y,) = reproject(WGS84, crs, [lon], [lat])
    return crs, Affine(side, 0, x, 0, -side, y)


# code, side of a pixel in its units, longitude to test at, latitudes
MANY = [
    ("EPSG:32721", 30, -56.0, (-79, -51.7, -33, -10, -1)),
    ("EPSG:32610", 30, -120.1, (1, 20, 34, 48, 80)),
    ("EPSG:3857", 30, -58.8, (-80, -51.7, 0, 34, 70)),
    ("EPSG:3395", 30, 147.0, (-80, -43, 1, 34, 70)),
    ("EPSG:4326", 0.0003, 179.999, (-85, -51.7, 0, 34, 70)),
    ("EPSG:4258", 0.0003, 10.0, (36, 45, 55, 65, 75)),
    ("EPSG:4269", 0.25, -120.0, (30, 34, 45, 55, 75)),
    ("EPSG:3031", 30, 77.0, (-89.9, -80, -75, -65, -55)),
    ("EPSG:3413", 30, -45.0, (89.9, 80, 70, 65, 60)),
    ("EPSG:3995", 500, 20.0, (89, 80, 70, 65, 60)),
    ("EPSG:6933", 1000, 20.0, (-80, -51.7, 0, 34, 70)),
    ("EPSG:3577", 30, 147.0, (-43, -38, -30, -20, -12)),
    ("EPSG:3035", 30, 5.0, (40, 45, 50, 60, 70)),
    ("EPSG:3310", 30, -120.0, (33, 34, 37, 40, 41.5)),
    ("EPSG:5070", 30, -96.0, (25, 30, 37, 45, 48)),
    ("EPSG:3034", 30, 10.0, (36, 45, 52, 60, 70)),
    ("EPSG:2263", 100, -74.0, (40.5, 40.6, 40.7, 40.8, 40.9)),
    ("EPSG:27700", 30, -4.0, (50, 52, 54, 56, 58)),
    ("EPSG:2193", 30, 170.0, (-47, -45, -43, -41, -36)),
    ("EPSG:3994", 30, 170.0, (-60, -47, -41, -30, -10)),
    ("ESRI:54009", 1000, 30.0, (-60, -30, 0, 30, 60)),
    ("ESRI:54008", 1000, 30.0, (-60, -30, 0, 30, 60)),
]


@pytest.mark.parametrize(
    ("code", "side", "lon", "lat"), [(c, s, x, y) for c, s, x, lats in MANY for y in lats]
)
def test_area_in_every_crs_is_that_of_the_ellipsoid(code, side, lon, lat):
    crs, transform = placed(code, lat, lon, side)
    height, width = 7, 5
    area = GroundArea.of(Georeference(crs, transform), (height, width))
    everything = area.total(np.ones((height, width), bool), Tile(0, 0, height, width))
    assert everything == pytest.approx(measured(crs, transform, height, width), rel=0.005)


def test_542_pixels_of_30_m_on_the_ground_are_half_a_square_kilometre_in_every_crs():
    """The field case: Web Mercator made 1.270 km2 of 0.488 km2 at 51.7 S."""
    expected = 542 * 900
    for code, side in (
        ("EPSG:32721", (30.0, 30.0)),
        ("EPSG:3857", (30 / np.cos(np.radians(51.7)),) * 2),
        ("EPSG:4326", (30 / (111_320 * np.cos(np.radians(51.7))), 30 / 111_265)),
    ):
        crs, transform = placed(code, -51.7, -57.5, 1)
        transform = Affine(side[0], 0, transform.c, 0, -side[1], transform.f)
        area = GroundArea.of(Georeference(crs, transform), (30, 30))
        mask = np.zeros((30, 30), bool)
        mask.flat[:542] = True
        assert area.total(mask, Tile(0, 0, 30, 30)) == pytest.approx(expected, rel=0.005), code


def test_utm_and_equal_area_take_the_affine_and_others_are_measured():
    for code, side, lon, lat, source in (
        ("EPSG:32721", 30, -57.0, -51.7, "affine"),
        ("EPSG:6933", 1000, 20.0, 50, "affine"),
        ("EPSG:3857", 30, -57.0, -51.7, "geodesic"),
        ("EPSG:3857", 30, -57.0, 0.0, "geodesic"),  # the ellipsoid: 0.7 % even at the equator
        ("EPSG:4326", 0.0003, -57.0, -51.7, "geodesic"),
        ("EPSG:3031", 30, 77.0, -71.0, "affine"),  # at its true scale
        ("EPSG:3031", 30, 77.0, -65.0, "geodesic"),
    ):
        crs, transform = placed(code, lat, lon, side)
        area = GroundArea.of(Georeference(crs, transform), (40, 40))
        assert area.source == source, (code, lat)
        assert (area.pixel_m2 is None) == (source == "geodesic")


def test_areas_of_a_large_raster_vary_by_row_as_the_ground_does():
    crs, transform = placed("EPSG:3857", -40, 140.0, 30)
    area = GroundArea.of(Georeference(crs, transform), (60_000, 900))
    for y in (0, 12_345, 59_990):
        tile = Tile(y, 300, 10, 10)
        there = transform @ Affine.translation(tile.x, tile.y)
        value = area.total(np.ones((10, 10), bool), tile)
        assert value == pytest.approx(measured(crs, there, 10, 10), rel=1e-5)


def test_rotated_south_up_and_one_pixel_rasters():
    crs, transform = placed("EPSG:4326", -51.7, -58, 0.0003)
    for turned in (
        transform @ Affine.rotation(30),
        transform @ Affine.scale(1, -1),
    ):
        area = GroundArea.of(Georeference(crs, turned), (1, 1))
        value = area.total(np.ones((1, 1), bool), Tile(0, 0, 1, 1))
        assert value == pytest.approx(measured(crs, turned, 1, 1), rel=1e-5)


def test_feet_are_converted_and_no_crs_assumes_a_size():
    crs, transform = placed("EPSG:2263", 40.7, -74, 100)  # US survey feet
    assert GroundArea.of(Georeference(crs, transform), (9, 9)).pixel_m2 == pytest.approx(
        (100 * 1200 / 3937) ** 2
    )
    nowhere = GroundArea.of(Georeference(), (9, 9))
    assert (nowhere.source, nowhere.pixel_m2) == ("assumed", 900)
    assert nowhere.words == "30 m pixels assumed, no CRS"
    assert GroundArea.of(Georeference(None, transform), (9, 9), 10).pixel_m2 == 100


def test_shares_count_in_proportion():
    area = GroundArea.of(Georeference(), (4, 4))
    p = np.full((4, 4), 0.25, np.float32)
    assert area.total(p, Tile(0, 0, 4, 4)) == pytest.approx(4 * 900)


def test_a_raster_outside_its_crs_is_an_error_not_a_number():
    transform = Affine(1, 0, 0, 0, -1, 95)
    with pytest.raises(InputError, match="outside its CRS's domain"):
        GroundArea.of(Georeference(CRS.from_epsg(4326), transform), (3, 3))


def test_areas_of_a_wide_window_take_the_memory_of_their_pixels():
    """A matrix of columns x nodes took 1.25 GB of 100,000 columns."""
    crs, transform = placed("EPSG:32610", 50, -120.0, 30)
    area = GroundArea.of(Georeference(crs, transform), (64, 50_000))
    assert area.source == "geodesic"
    tracemalloc.start()
    pixels = area.pixels(Tile(0, 0, 2, 50_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * pixels.nbytes
    np.testing.assert_array_equal(pixels[:, 20_000:20_100], area.pixels(Tile(0, 20_000, 2, 100)))
