"""Elevations, cloud masks and files of products that a mask of their own hides in part."""

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from satellites import SHAPE as SENSOR_SHAPE
from satellites import make_landsat

from kelp.raster.window import Tile
from kelp.sensors import open_scene
from kelp.sensors.elevation import Elevation
from kelp.sensors.quality import CloudMask

UTM = CRS.from_epsg(32618)
PLACE = Affine(30, 0, 500000, 0, -30, -4000000)
SHAPE = (24, 33)
HOLE = np.zeros(SHAPE, dtype=bool)
HOLE[4:10, 8:20] = True
VOID = (20, 25)


def masked(folder, values, kind, nodata=None, crs=UTM):
    """A raster whose hole is told by a mask of this kind, and one pixel by nodata."""
    seen = np.where(HOLE, 0, 255)
    count = 1 + ("alpha" in kind)
    path = folder / "layer.tif"
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind != "external"),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=SHAPE[0],
            width=SHAPE[1],
            dtype=values.dtype,
            nodata=nodata,
            crs=crs,
            transform=PLACE,
        ) as out,
    ):
        out.write(values, 1)
        # With "both" the mask tells of the right half only, alpha of the left one.
        left = np.arange(SHAPE[1]) < 14
        if "alpha" in kind:
            out.colorinterp = (ColorInterp.gray, ColorInterp.alpha)
            out.write(np.where(left | (kind == "alpha"), seen, 255).astype(values.dtype), 2)
        if kind != "alpha":
            out.write_mask(np.where(left & ("both" in kind), 255, seen).astype(np.uint8))
    if kind == "virtual":
        rasterio.shutil.copy(path, folder / "layer.vrt", driver="VRT")
        return folder / "layer.vrt"
    return path


KINDS = ["internal", "external", "alpha", "virtual", "both, alpha"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodata", [None, -9999.0, 5000.0])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_masked_elevation_is_unknown(tmp_path, kind, nodata, shift):
    """What lies below the mask reaches no pixel, between the pixels of the source either."""
    values = np.full(SHAPE, 100, np.float32)
    values[HOLE] = 5000
    values[VOID] = -32768 if nodata is None else nodata
    path = masked(tmp_path, values, kind, nodata)
    elevation = Elevation(path, SHAPE, UTM, PLACE @ Affine.translation(shift, shift))
    whole = elevation.read(Tile(0, 0, *SHAPE))
    elevation.close()
    assert set(np.unique(whole[np.isfinite(whole)])) == {100}
    unknown = HOLE | (np.indices(SHAPE) == np.reshape(VOID, (2, 1, 1))).all(axis=0)
    if shift == 0:
        np.testing.assert_array_equal(np.isnan(whole), unknown)
    else:  # the middle of four is unknown where all four are
        four = unknown[:-1, :-1] & unknown[1:, :-1] & unknown[:-1, 1:] & unknown[1:, 1:]
        assert np.isnan(whole[:-1, :-1][four]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodata", [None, 0, 255])
@pytest.mark.parametrize("crs", [UTM, None], ids=["placed", "plain"])
def test_a_masked_pixel_of_a_cloud_mask_is_not_clear(tmp_path, kind, nodata, crs):
    values = np.zeros(SHAPE, np.uint8)
    values[1, 1] = 2
    path = masked(tmp_path, values, kind, nodata, crs)
    mask = CloudMask(path, SHAPE, UTM, PLACE)
    bad = mask.read(Tile(0, 0, *SHAPE))
    window = mask.read(Tile(3, 5, 9, 12))
    mask.close()
    wanted = HOLE.copy()
    wanted[1, 1] = True
    np.testing.assert_array_equal(bad, wanted)
    np.testing.assert_array_equal(window, wanted[3:12, 5:17])


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "msk"])
@pytest.mark.parametrize("role", ["SR_B5", "SR_B2", "QA_PIXEL", "QA_RADSAT"])
def test_what_a_part_of_a_product_hides_is_missing_or_bad(tmp_path, internal, role):
    folder = make_landsat(tmp_path, 8)
    hole = np.zeros(SENSOR_SHAPE, bool)
    hole[5:9, 7:20] = True
    with open_scene(folder) as scene:
        digest = scene.digest
    path = folder / f"{folder.name}_{role}.TIF"
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file,
    ):
        file.write_mask(np.where(hole, 0, 255).astype(np.uint8))
    with open_scene(folder) as scene:
        pixels = scene.read()
        part = scene.read(Tile(3, 4, 12, 9))
        bad_share = scene.quality.bad_share
        assert scene.digest != digest
        assert any(source.role == "mask" for source in scene.sources) != internal
    assert part.tobytes() == pixels[:, 3:15, 4:13].tobytes()
    for band, file in enumerate(("SR_B6", "SR_B5", "SR_B4", "SR_B3", "SR_B2")):
        missing = hole if file == role else np.zeros_like(hole)
        np.testing.assert_array_equal(np.isnan(pixels[band]), missing)
    counts = role == "QA_PIXEL"  # no bit of QA_RADSAT counts by default
    np.testing.assert_array_equal(pixels[5] == 1, hole if counts else np.zeros_like(hole))
    assert bad_share == pytest.approx(hole.mean() * counts)
