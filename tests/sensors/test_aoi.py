"""Polygons on the grid of a scene."""

import json

import numpy as np
import pytest
from affine import Affine
from rasterio.warp import transform
from satellites import CRS, SHAPE, TRANSFORM, make_landsat

from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.raster.window import Tile
from kelp.sensors import open_scene
from kelp.sensors.aoi import Polygons


def to_map(rows, columns):
    return [TRANSFORM @ (column, row) for row, column in zip(rows, columns, strict=True)]


def square(top, left, bottom, right):
    """Corners of pixels as a ring in the scene's CRS."""
    return to_map((top, top, bottom, bottom, top), (left, right, right, left, left))


def in_degrees(ring):
    xs, ys = transform(CRS, "EPSG:4326", *map(list, zip(*ring, strict=True)))
    return [list(corner) for corner in zip(xs, ys, strict=True)]


def write_geojson(path, *polygons):
    """GeoJSON as RFC 7946 has it: degrees, each polygon a list of rings in the scene's CRS."""
    features = [
        {
            "type": "Feature",
            "properties": {},
            "geometry": {"type": "Polygon", "coordinates": [in_degrees(ring) for ring in rings]},
        }
        for rings in polygons
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def polygons_of(path, shape=SHAPE):
    return Polygons(path, shape, CRS, TRANSFORM, "--aoi")


def test_pixels_whose_centre_lies_inside_belong(tmp_path):
    path = write_geojson(
        tmp_path / "a.geojson",
        [square(5, 6, 20, 30), square(8, 10, 12, 14)],  # with a hole
        [square(40.4, 0, 60, 3.6)],  # over the edge
    )
    wanted = np.zeros(SHAPE, bool)
    wanted[5:20, 6:30] = True
    wanted[8:12, 10:14] = False
    wanted[40:, :4] = True
    found = polygons_of(path)
    np.testing.assert_array_equal(found.mask(Tile(0, 0, *SHAPE)), wanted)
    assert found.pixels == wanted.sum()
    assert found.share == pytest.approx(wanted.mean())
    for tile in (Tile(0, 0, 5, 5), Tile(7, 9, 20, 30), Tile(47, 39, 1, 1)):
        np.testing.assert_array_equal(found.mask(tile), wanted[tile.slices])


def test_formats_of_ogr_and_their_crs(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    from shapely.geometry import Polygon

    ring = square(5, 6, 20, 30)
    wanted = np.zeros(SHAPE, bool)
    wanted[5:20, 6:30] = True
    frame = geopandas.GeoDataFrame(geometry=[Polygon(ring)], crs=CRS)
    for crs in (CRS, "EPSG:4326", "EPSG:3857", "EPSG:32721"):
        for name in ("a.gpkg", "a.shp", "a.fgb"):
            path = tmp_path / f"{crs[5:]}-{name}"
            frame.to_crs(crs).to_file(path)
            np.testing.assert_array_equal(polygons_of(path).mask(Tile(0, 0, *SHAPE)), wanted)


def test_long_edges_bend_as_the_projection_does(tmp_path):
    """A parallel over 3 degrees is a curve in UTM: a straight line would be 600 m off."""
    shape, affine = (200, 200), Affine(1000, 0, 400_000, 0, -1000, -5_600_000)
    path = tmp_path / "a.geojson"
    ring = [[-59.5, -51.5], [-54.5, -51.5], [-54.5, -50], [-59.5, -50], [-59.5, -51.5]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    found = Polygons(path, shape, CRS, affine, "--aoi").mask(Tile(0, 0, *shape))
    rows, columns = np.mgrid[:200, :200] + 0.5
    x, y = affine.c + columns * 1000, affine.f - rows * 1000
    longitude, latitude = transform(CRS, "EPSG:4326", x.ravel().tolist(), y.ravel().tolist())
    longitude, latitude = np.array(longitude), np.array(latitude)
    wanted = (latitude > -51.5) & (latitude < -50) & (longitude > -59.5) & (longitude < -54.5)
    assert (found.ravel() != wanted).mean() < 1e-3


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "not a GeoJSON file"),
        ("[]", "not a GeoJSON file"),
        ('{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        ('{"type": "Point", "coordinates": [1, 2]}', "holds no polygon"),
    ],
)
def test_files_without_polygons_are_refused(tmp_path, content, message):
    path = tmp_path / "a.geojson"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        polygons_of(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_another_format_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        polygons_of(tmp_path / "none.gpkg")
    path = tmp_path / "a.gpkg"
    path.write_text("no vector file")
    with pytest.raises(InputError, match="not a readable vector file"):
        polygons_of(path)


def test_an_area_beside_the_scene_or_in_the_other_hemisphere_is_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    for mirror in (1, -1):
        ring = [[x + 2 * (mirror == 1), mirror * y] for x, y in in_degrees(square(5, 6, 20, 30))]
        path = tmp_path / "a.geojson"
        path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        with (
            pytest.raises(InputError, match="does not touch the scene") as caught,
            open_scene(folder, SceneOptions(aoi=path)),
        ):
            pass
        assert ("51.5°N" in str(caught.value)) == (mirror == -1)
        assert "the scene at 51.5°S-51.5°S" in str(caught.value)


def test_a_scene_without_georeference_takes_no_polygons(tmp_path):
    path = write_geojson(tmp_path / "a.geojson", [square(5, 6, 20, 30)])
    with pytest.raises(InputError, match="no georeference"):
        Polygons(path, SHAPE, None, None, "--aoi")


def test_the_scene_carries_its_area(tmp_path):
    path = write_geojson(tmp_path / "a.geojson", [square(0, 0, 24, 40)])
    with open_scene(make_landsat(tmp_path, 8), SceneOptions(aoi=path)) as scene:
        assert scene.area_facts.share == 0.5
        assert scene.area_facts.source.href == "a.geojson"
        with_area = scene.digest
    with open_scene(tmp_path / scene.path.name) as scene:
        assert scene.area is None
        assert scene.digest != with_area
