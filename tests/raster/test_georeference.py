"""Grid identity: two rasters are laid on each other only where their grids agree."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS

from kelp.errors import InputError
from kelp.raster.georeference import Grid, require_same_grid
from kelp.raster.masks import Georeference
from kelp.raster.writer import write_mask

UTM = CRS.from_epsg(32621)
NORTH_UP = Affine(30, 0, 500_000, 0, -30, -5_700_000)
SHAPE = (256, 240)


def grid(transform=NORTH_UP, crs=UTM, shape=SHAPE):
    return Grid(shape, Georeference(crs, transform))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (grid(NORTH_UP @ Affine.translation(1000 / 30, 0)), "shifted by +33.33 columns and +0"),
        (grid(NORTH_UP @ Affine.translation(0.5, -0.5)), "shifted by +0.5 columns and -0.5 rows"),
        (grid(crs=CRS.from_epsg(32620)), "EPSG:32620 against EPSG:32621"),
        (grid(crs=CRS.from_epsg(4326)), "EPSG:4326 against EPSG:32621"),
        (grid(NORTH_UP @ Affine.scale(1 / 3)), "0.3333 x 0.3333 times as large"),
        (grid(Affine(30, 0, 500_000, 0, 30, -5_707_680)), "rows run the other way"),
        (grid(Affine(-30, 0, 507_200, 0, -30, -5_700_000)), "columns run the other way"),
        (grid(NORTH_UP @ Affine.rotation(1)), "rotated or sheared"),
        (grid(shape=(240, 256)), "240 x 256 pixels against 256 x 240 pixels (height x width)"),
    ],
)
def test_what_differs_is_said(other, words):
    assert words in grid().difference(other)


@pytest.mark.parametrize(
    "transform",
    [
        NORTH_UP,
        Affine(30, 0, 500_000, 0, 30, -5_707_680),  # both south-up
        NORTH_UP @ Affine.rotation(37) @ Affine.shear(5),
        NORTH_UP @ Affine.scale(-1, 1),
    ],
)
@settings(max_examples=25)
@given(st.floats(-0.009, 0.009), st.floats(-0.009, 0.009), st.booleans())
def test_a_hundredth_of_a_pixel_does_not_matter(transform, x, y, far):
    assert grid(transform).difference(grid(transform @ Affine.translation(x, y))) is None
    moved = Affine.translation(*((x, y + 0.02) if far else (x - 0.02, y)))
    assert grid(transform).difference(grid(transform @ moved)) is not None


def test_two_spellings_of_one_crs_are_one():
    spelled = CRS.from_proj4("+proj=utm +zone=21 +datum=WGS84 +units=m +no_defs")
    assert grid().difference(grid(crs=spelled)) is None
    feet = CRS.from_proj4("+proj=utm +zone=21 +datum=WGS84 +units=ft +no_defs")
    assert grid().difference(grid(crs=feet)) is not None
    in_feet = Affine.scale(1 / 0.3048) @ NORTH_UP
    assert grid().difference(grid(in_feet, feet)) is None


def test_without_georeference_sizes_decide(tmp_path):
    nowhere = Grid(SHAPE, Georeference())
    assert nowhere.difference(grid()) is None
    assert grid().difference(nowhere) is None
    assert grid().difference(Grid(SHAPE, Georeference(UTM, Affine.identity()))) is None
    assert nowhere.difference(Grid((1, 2), Georeference())) is not None
    # A transform without CRS is compared as it is.
    assert grid().difference(grid(crs=None)) is None
    assert grid().difference(grid(NORTH_UP @ Affine.translation(1, 0), None)) is not None


def test_files_are_named_and_may_be_laid_on_each_other_on_request(tmp_path):
    mask = np.zeros((4, 5), np.uint8)
    right, wrong = tmp_path / "right.tif", tmp_path / "wrong.tif"
    write_mask(right, mask, Georeference(UTM, NORTH_UP))
    write_mask(wrong, mask, Georeference(UTM, NORTH_UP @ Affine.translation(2, 0)))
    with pytest.raises(InputError, match=r"wrong\.tif does not .* of .*right\.tif: it is shifted"):
        require_same_grid(right, wrong)
    with pytest.raises(InputError, match="ignore_georeference"):
        require_same_grid(right, wrong)
    assert require_same_grid(right, wrong, ignore_georeference=True).shape == (4, 5)
    assert require_same_grid(right, right).georeference == Georeference(UTM, NORTH_UP)
    write_mask(wrong, mask.T)
    with pytest.raises(InputError, match=r"5 x 4 pixels against 4 x 5 pixels \(height x width\)$"):
        require_same_grid(right, wrong, ignore_georeference=True)


def test_a_raster_that_covers_no_area_matches_nothing():
    flat = grid(Affine(30, 0, 0, 0, 0, 0))
    assert flat.difference(grid()) is not None


def test_a_file_written_and_read_keeps_its_grid(tmp_path):
    """GeoTIFF stores a CRS by its keys: what comes back is the same grid."""
    path, again = tmp_path / "a.tif", tmp_path / "b.tif"
    odd = CRS.from_proj4("+proj=laea +lat_0=-51.5 +lon_0=-59.1 +datum=WGS84 +units=m")
    profile = {"driver": "GTiff", "height": 4, "width": 5, "count": 1, "dtype": "uint8"}
    for target in (path, again):
        with rasterio.open(target, "w", crs=odd, transform=NORTH_UP, **profile) as out:
            out.write(np.zeros((1, 4, 5), np.uint8))
    assert require_same_grid(path, again)
    assert (
        Grid((4, 5), Georeference(odd, NORTH_UP)).difference(require_same_grid(path, again)) is None
    )
