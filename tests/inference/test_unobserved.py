"""What a scene does not show is 255 and NaN in its maps, however the file says so."""

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from bundles import tiny_bundle, use_pixel_network
from rasterio.crs import CRS

from kelp.cli import main
from kelp.raster.bands import BANDS
from kelp.raster.masks import read_mask, read_probability

SHAPE = (60, 70)
HOLE = np.zeros(SHAPE, dtype=bool)
HOLE[:24] = True
UTM = {"crs": CRS.from_epsg(32719), "transform": Affine(30, 0, 400000, 0, -30, 5000000)}


def scene(path, dtype, filler, mask=False, **options):
    data = np.full((7, *SHAPE), 9000, dtype=dtype)
    data[1, :, 30:] = 14000  # kelp
    data[5:] = 0
    data[:5, HOLE] = filler
    profile = {"count": 7, "height": SHAPE[0], "width": SHAPE[1], "dtype": dtype}
    with rasterio.open(path, "w", driver="GTiff", **profile, **UTM, **options) as out:
        out.write(data)
        out.descriptions = BANDS
        if mask:
            out.write_mask(np.where(HOLE, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "filler", "options"),
    [
        ("int32", -32768, {}),
        ("int32", 9000, {"mask": True}),
        ("float32", 0, {}),
        ("int32", -9999, {"nodata": -1}),
        ("uint16", 65535, {}),
    ],
)
def test_a_hole_is_not_observed_in_maps(tmp_path, monkeypatch, capsys, dtype, filler, options):
    use_pixel_network(monkeypatch)
    # The check of the scale sees a sample, of which the hole has another share.
    monkeypatch.setattr("kelp.inference.checks._SAMPLE_SIDE", 8)
    (tmp_path / "in").mkdir()
    scene(tmp_path / "in" / "a.tif", dtype, filler, **options)
    # As a virtual dataset, in capitals, the same.
    rasterio.shutil.copy(tmp_path / "in" / "a.tif", tmp_path / "in" / "b.VRT", driver="VRT")
    bundle = tiny_bundle(tmp_path / "bundle")
    arguments = f"predict --data_dir {tmp_path / 'in'} --output_dir {tmp_path / 'out'} "
    arguments += f"--run_dir {bundle} --save_probabilities --device cpu"
    assert main(arguments.split()) == 0
    expected = np.where(HOLE, 255, np.arange(SHAPE[1]) >= 30)
    for name in ("a", "b"):
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / f"{name}_kelp.tif"), expected)
        p = read_probability(tmp_path / "out" / f"{name}_kelp_prob.tif")
        np.testing.assert_array_equal(np.isnan(p), HOLE)
    notices = capsys.readouterr().err.count("40 % of the pixels hold")
    assert notices == (0 if options.get("mask") or filler == -32768 else 2)
