"""Elevation from elsewhere: warped by windows, mosaicked, void as unknown."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.warp import transform
from satellites import CRS, SHAPE, TRANSFORM, make_landsat, write_layer
from world import write_tif

from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.raster.window import Tile
from kelp.sensors import open_scene
from kelp.sensors.elevation import Elevation

SECOND = 1 / 3600


def centres(shape=SHAPE, affine=TRANSFORM, crs=CRS):
    """Longitude and latitude of every pixel of the scene."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    x = affine.c + (columns + 0.5) * affine.a
    y = affine.f + (rows + 0.5) * affine.e
    longitude, latitude = transform(crs, "EPSG:4326", x.ravel().tolist(), y.ravel().tolist())
    return np.array(longitude).reshape(shape), np.array(latitude).reshape(shape)


def plane(longitude, latitude):
    """Metres: a slope that bilinear interpolation keeps exactly."""
    return 2e4 * (longitude + 57) + 1e4 * (latitude + 51.45) + 400


def write_dem(
    path, west, south, east, north, value=plane, nodata=None, step=SECOND, dtype="float32"
):
    """A raster in degrees whose pixels hold `value` at their centres."""
    columns, rows = round((east - west) / step), round((north - south) / step)
    affine = Affine(step, 0, west, 0, -step, north)
    longitude, latitude = np.meshgrid(
        west + (np.arange(columns) + 0.5) * step, north - (np.arange(rows) + 0.5) * step
    )
    values = np.broadcast_to(value(longitude, latitude), longitude.shape).astype(dtype)
    return write_layer(path, values, nodata, "EPSG:4326", affine)


def read_dem(folder, window=None, **options):
    with open_scene(folder, SceneOptions(**options)) as scene:
        return scene.read(window)[6], scene.elevation


@pytest.fixture
def folder(tmp_path):
    return make_landsat(tmp_path / "scene", 8)


def box():
    longitude, latitude = centres()
    return longitude.min(), latitude.min(), longitude.max(), latitude.max()


def test_a_dem_in_degrees_lies_on_the_grid_in_whole_metres(tmp_path, folder):
    west, south, east, north = box()
    dem = write_dem(tmp_path / "dem.tif", west - 0.01, south - 0.01, east + 0.01, north + 0.01)
    found, facts = read_dem(folder, dem=dem)
    wanted = plane(*centres())
    assert np.ptp(wanted) > 100
    # Rounded; and GDAL places pixels to 1/8 of one, on a slope of 9 m a pixel.
    assert np.abs(found - wanted).max() <= 0.5 + 9 / 8
    assert (found == np.round(found)).all()
    assert facts.known_share == 1
    assert [source.href for source in facts.sources] == ["dem.tif"]


def test_windows_are_the_parts_of_the_whole(tmp_path, folder):
    west, south, east, north = box()
    dem = write_dem(tmp_path / "dem.tif", west - 0.01, south - 0.01, east + 0.01, north + 0.01)
    whole, _ = read_dem(folder, dem=dem)
    for tile in (Tile(0, 0, 5, 40), Tile(11, 7, 20, 13), Tile(47, 39, 1, 1)):
        part, _ = read_dem(folder, tile, dem=dem)
        np.testing.assert_array_equal(part, whole[tile.slices])


def test_a_large_scene_by_strips_and_windows_is_the_same(tmp_path):
    shape = (300, 1100)
    folder = make_landsat(tmp_path / "scene", 8, shape)
    longitude, latitude = centres(shape)
    dem = write_dem(
        tmp_path / "dem.tif",
        longitude.min() - 0.01,
        latitude.min() - 0.01,
        longitude.max() + 0.01,
        latitude.max() + 0.01,
        step=3 * SECOND,
    )
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        strips = [scene.read(Tile(y, 0, min(50, 300 - y), 1100))[6] for y in range(0, 300, 50)]
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        np.testing.assert_array_equal(np.concatenate(strips), scene.read()[6])
        for tile in (Tile(290, 1000, 10, 100), Tile(60, 1020, 70, 10), Tile(0, 0, 1, 1)):
            part = scene.read(tile)[6]
            np.testing.assert_array_equal(part, np.concatenate(strips)[tile.slices])


@pytest.mark.parametrize("spoilt", [None, "no file", "no room", "too high"])
def test_what_was_warped_is_kept_where_there_is_room(tmp_path, monkeypatch, spoilt):
    """A prediction reads a scene twice; kept or warped again, the elevations are the same."""
    shape = (600, 70)
    folder = make_landsat(tmp_path / "scene", 8, shape)
    longitude, latitude = centres(shape)

    def holed(longitude, latitude):
        heights = plane(longitude, latitude) + 40_000 * (spoilt == "too high")
        return np.where(longitude * 3600 % 20 < 3, -9999, heights)

    dem = write_dem(
        tmp_path / "dem.tif", longitude.min() - 0.01, latitude.min() - 0.01,
        longitude.max() + 0.01, latitude.max() + 0.01, holed, nodata=-9999,
    )  # fmt: skip
    if spoilt == "no file":

        def refuse(**_):
            raise FileNotFoundError("no usable temporary directory")

        monkeypatch.setattr("kelp.sensors.elevation.tempfile.TemporaryFile", refuse)
    elif spoilt == "no room":
        monkeypatch.setattr("kelp.sensors.elevation._MOST", 10_000)
    warped, counted = [], Elevation._warped
    monkeypatch.setattr(
        Elevation, "_warped", lambda self, cell: warped.append(cell) or counted(self, cell)
    )
    parts = [Tile(y, 0, 50, 70) for y in range(0, 600, 50)]
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        first, second = (np.concatenate([scene.read(t)[6] for t in parts]) for _ in range(2))
    assert 0 < np.isnan(first).sum() < first.size
    assert first.tobytes() == second.tobytes()
    assert len(set(warped)) == 5
    assert (len(warped) == 5) == (spoilt is None)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
@pytest.mark.parametrize("crs", [CRS, "EPSG:3031"])
def test_without_voids_near_it_a_cell_is_the_same(tmp_path, monkeypatch, dtype, crs):
    """GDAL is faster where no pixel may be void: a hole, and the file's border, are found."""
    shape = (500, 1100)
    x, y = transform("EPSG:4326", crs, [-57.1], [-51.6])
    affine = Affine(30, 0, round(x[0]), 0, -30, round(y[0]))
    longitude, latitude = centres(shape, affine, crs)
    hole = longitude[200, 300], latitude[200, 300]

    def holed(longitude, latitude):
        near = np.hypot(longitude - hole[0], latitude - hole[1]) < 3 * SECOND
        return np.where(near, -999, plane(longitude, latitude) * np.sin(3e4 * longitude) / 5)

    dem = write_dem(
        tmp_path / "dem.tif", longitude.min() - 0.01, latitude.min() - 0.01,
        longitude.max() - 0.01, latitude.max() + 0.01, holed, nodata=-999, dtype=dtype,
    )  # fmt: skip
    chosen, decide = [], Elevation._is_whole
    monkeypatch.setattr(
        Elevation, "_is_whole", lambda *given: chosen.append(decide(*given)) or chosen[-1]
    )
    with closing(Elevation(dem, shape, crs, affine)) as elevation:
        found = elevation.read(Tile(0, 0, *shape))
    assert {*chosen} == {True, False}
    monkeypatch.setattr(Elevation, "_is_whole", lambda *_: False)
    with closing(Elevation(dem, shape, crs, affine)) as elevation:
        wanted = elevation.read(Tile(0, 0, *shape))
    np.testing.assert_array_equal(found, wanted)
    assert 10 < np.isnan(wanted).sum() < wanted.size / 4


def test_what_threads_share_is_open_until_the_last_has_closed_it(tmp_path, folder):
    west, south, east, north = box()
    dem = write_dem(tmp_path / "dem.tif", west - 0.01, south - 0.01, east + 0.01, north + 0.01)
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        expected = scene.read()[6]
        shared = scene.share_elevation()
    with ThreadPoolExecutor(2) as threads:
        rows = [Tile(y, 0, 1, SHAPE[1]) for y in range(SHAPE[0])]
        found = np.concatenate(list(threads.map(shared.read, rows)))
    np.testing.assert_array_equal(found, expected)
    shared.close()


def test_a_sample_of_a_scene_warps_nothing(tmp_path, monkeypatch, folder):
    west, south, east, north = box()
    dem = write_dem(tmp_path / "dem.tif", west - 0.01, south - 0.01, east + 0.01, north + 0.01)
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        with monkeypatch.context() as patched:
            patched.setattr(Elevation, "_warped", None)
            assert np.isnan(scene.sample(8)[6]).all()
        assert np.isfinite(scene.read()[6]).all()


def tiles(tmp_path, names=("west", "east")):
    """Two tiles that meet in the middle of the scene."""
    west, south, east, north = box()
    middle = round((west + east) / 2 / SECOND) * SECOND
    path = tmp_path / "tiles"
    spans = {"west": (middle - 90 * SECOND, middle), "east": (middle, middle + 90 * SECOND)}
    for name in names:
        left, right = spans[name]
        write_dem(path / f"{name}.tif", left, south - 0.01, right, north + 0.01)
    return path, middle


def test_tiles_are_put_together(tmp_path, folder):
    path, _ = tiles(tmp_path)
    found, facts = read_dem(folder, dem=path)
    assert np.abs(found - plane(*centres())).max() < 5  # half a tile's pixel at the seam
    assert np.isfinite(found).all()
    assert {source.href for source in facts.sources} == {"west.tif", "east.tif"}


def test_outside_the_tiles_the_elevation_is_unknown_unless_sea_is_asked_for(tmp_path, folder):
    path, middle = tiles(tmp_path, ["west"])
    inside = centres()[0] < middle
    found, facts = read_dem(folder, dem=path)
    assert 0.3 < facts.known_share < 0.7
    assert (np.isfinite(found) == inside).mean() > 0.97  # but for a column at the seam
    sea, _ = read_dem(folder, dem=path, dem_sea_where_absent=True)
    assert np.isfinite(sea).all()
    far = centres()[0] > middle + SECOND
    assert (sea[far] == 0).all()
    near = centres()[0] < middle - SECOND
    np.testing.assert_array_equal(sea[near], found[near])


def test_void_stays_unknown_even_where_absent_tiles_are_sea(tmp_path, folder):
    west, south, east, north = box()
    hole_at = (west + east) / 2, (south + north) / 2

    def holed(longitude, latitude):
        hole = (abs(longitude - hole_at[0]) < 5 * SECOND) & (
            abs(latitude - hole_at[1]) < 5 * SECOND
        )
        return np.where(hole, -32768, 7)

    dem = write_dem(
        tmp_path / "n.tif",
        west - 0.01,
        south - 0.01,
        east + 0.01,
        north + 0.01,
        holed,
        dtype="int16",
    )
    for sea in (False, True):
        found, _ = read_dem(folder, dem=dem, dem_sea_where_absent=sea)
        assert 4 < np.isnan(found).sum() < 200
        assert (found[np.isfinite(found)] == 7).all()


def test_only_tiles_near_the_scene_are_opened(tmp_path, folder):
    longitude, latitude = centres()
    south, west = int(np.floor(latitude.min())), int(np.floor(longitude.min()))
    path = tmp_path / "glo30"
    name = f"Copernicus_DSM_COG_10_S{-south:02}_00_W{-west:03}_00_DEM.tif"
    write_dem(path / name, west, south, west + 1, south + 1, lambda x, y: 3 + 0 * x, step=1 / 60)
    # Files of other places: no rasters, so opening one of them would fail.
    for far in ("S10_00_W060", "N51_00_W057", "S52_00_E057"):
        (path / f"Copernicus_DSM_COG_10_{far}_00_DEM.tif").write_text("not a raster")
    (path / "N51W057.hgt").write_text("not a raster")
    found, facts = read_dem(folder, dem=path)
    assert (found == 3).all()
    assert [source.href for source in facts.sources] == [name]


def test_a_dem_beside_the_scene_is_refused(tmp_path, folder):
    dem = write_dem(tmp_path / "dem.tif", 10, 10, 10.1, 10.1, step=1 / 600)
    with pytest.raises(InputError, match="does not cover the scene"):
        read_dem(folder, dem=dem)
    with pytest.raises(InputError, match="no such file"):
        read_dem(folder, dem=tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no raster"):
        read_dem(folder, dem=empty)
    with pytest.raises(InputError, match="goes with"):
        read_dem(folder, dem_sea_where_absent=True)
    bare = write_layer(tmp_path / "bare.tif", np.zeros((4, 4), np.int16), crs=None)
    with pytest.raises(InputError, match="has no CRS"):
        read_dem(folder, dem=bare)
    stack = write_tif(
        tmp_path / "stack.tif", np.zeros((7, *SHAPE), np.int32), crs=CRS, transform=TRANSFORM
    )
    with pytest.raises(InputError, match="a raster of elevation has one band, this file has 7"):
        read_dem(folder, dem=stack)


def test_a_scene_at_the_antimeridian_has_tiles_of_both_sides(tmp_path):
    """UTM zone 60 reaches over 180 degrees; the tiles beyond are called W180."""
    x, y = transform("EPSG:4326", "EPSG:32760", [180.0], [-44.0])
    affine = Affine(30, 0, round(x[0] / 30) * 30 - 600, 0, -30, round(y[0] / 30) * 30 + 600)
    folder = make_landsat(tmp_path / "scene", 8, crs="EPSG:32760", transform=affine)
    path = tmp_path / "tiles"
    here = {"step": 1 / 1200}
    write_dem(path / "e.tif", 179.9, -44.1, 180, -43.9, lambda x, y: 1 + 0 * x, **here)
    write_dem(path / "w.tif", -180, -44.1, -179.9, -43.9, lambda x, y: 2 + 0 * x, **here)
    found, facts = read_dem(folder, dem=path)
    assert facts.known_share == 1
    longitude, _ = centres(affine=affine, crs="EPSG:32760")
    assert (found[longitude > 0] == 1).all()
    assert (longitude < 0).any()
    assert (found[longitude < 0] == 2).all()


def test_the_digest_knows_the_dem(tmp_path, folder):
    west, south, east, north = box()
    dem = write_dem(tmp_path / "dem.tif", west - 0.01, south - 0.01, east + 0.01, north + 0.01)
    digests = set()
    for options in ({}, {"dem": dem}):
        with open_scene(folder, SceneOptions(**options)) as scene:
            digests.add(scene.digest)
    with rasterio.open(dem, "r+") as raster:
        raster.write(raster.read(1) + 1, 1)
    with open_scene(folder, SceneOptions(dem=dem)) as scene:
        digests.add(scene.digest)
    assert len(digests) == 3
