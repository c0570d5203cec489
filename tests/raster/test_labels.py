"""What masks mean by 255, NaN and nodata tags."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kelp.errors import InputError
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import read_mask
from kelp.raster.probability import CODES, code_of, dequantise, quantise

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write(path, values, nodata=None):
    values = np.atleast_2d(values)
    height, width = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1}
    with rasterio.open(path, "w", dtype=values.dtype, nodata=nodata, **profile) as out:
        out.write(values, 1)
    return path


@pytest.mark.parametrize(
    ("values", "nodata", "kelp_value", "wanted"),
    [
        (np.uint8([0, 1, 255]), None, 1, [0, 1, 255]),
        (np.uint8([0, 1, 3]), 3, 1, [0, 1, 255]),
        (np.float32([0, 1, np.nan]), np.nan, 1, [0, 1, 255]),
        (np.float32([0, 1, np.nan]), None, 1, [0, 1, 255]),
        (np.float32([0, 1, -9999]), -9999, 1, [0, 1, 255]),
        (np.float64([0, 1, -1.7e308]), -1.7e308, 1, [0, 1, 255]),
        (np.int16([0, 1, -1]), -1, 1, [0, 1, 255]),
        (np.uint8([0, 255, 7]), 7, 255, [0, 1, 255]),
        (np.uint8([0, 255, 0]), 255, 255, [0, 1, 0]),  # who gives the value knows better
        (np.uint8([0, 2, 255]), None, 2, [0, 1, 255]),
        (np.uint8([0, 1, 1]), 0, 1, [0, 1, 1]),  # a tag that calls kelp-free pixels nodata
    ],
)
def test_what_a_mask_says(tmp_path, values, nodata, kelp_value, wanted):
    path = write(tmp_path / "T_kelp.tif", values, nodata)
    np.testing.assert_array_equal(read_mask(path, kelp_value=kelp_value), [wanted])


@pytest.mark.parametrize(
    ("values", "kelp_value", "words"),
    [
        (np.int16([0, 1, -1]), 1, "holds 0, 1 and 255 .*, this one also -1"),
        (np.uint8([0, 1, 255]), 255, r"holds 0, 255 \(kelp_value\) and nodata, .* also 1"),
        (np.float32([0, 0.5, 1]), 1, "also 0.5"),
    ],
)
def test_other_values_are_refused(tmp_path, values, kelp_value, words):
    path = write(tmp_path / "T_kelp.tif", values)
    with pytest.raises(InputError, match=words):
        read_mask(path, kelp_value=kelp_value)


def test_a_data_set_of_0_and_255_is_refused(tmp_path):
    masks = [
        write(tmp_path / f"{k}_kelp.tif", np.uint8([[0, 0], [0, 255 * (k > 0)]])) for k in range(3)
    ]
    with pytest.raises(InputError, match=r"1_kelp\.tif: .* none of the 3 masks .*kelp_value=255"):
        require_kelp_value(masks)
    require_kelp_value(masks, kelp_value=255)
    require_kelp_value(masks[:1])  # no kelp, all of it seen: that may be
    tagged = write(tmp_path / "tagged_kelp.tif", np.uint8([0, 255]), 255)
    require_kelp_value([tagged])
    with pytest.raises(InputError, match="kelp_value"):
        require_kelp_value([*masks, tagged])
    kelp = write(tmp_path / "kelp_kelp.tif", np.uint8([0, 1]))
    require_kelp_value([*masks, kelp])


def test_a_mask_longer_than_what_is_read_at_once(tmp_path):
    values = np.zeros((1200, 3), np.uint8)
    values[600:610] = 255
    with pytest.raises(InputError, match="kelp_value=255"):
        require_kelp_value([write(tmp_path / "a_kelp.tif", values)])
    values[1199, 2] = 1
    require_kelp_value([write(tmp_path / "b_kelp.tif", values)])


@given(hnp.arrays(np.float32, 7, elements=st.floats(0, 1, width=32) | st.just(np.nan)))
def test_codes_are_the_nearest_ones(p):
    codes = quantise(p)
    np.testing.assert_array_equal(codes == 255, np.isnan(p))
    again = dequantise(codes)
    np.testing.assert_array_equal(np.isnan(again), np.isnan(p))
    assert (np.abs(again - p)[np.isfinite(p)] <= 0.5 / CODES + 1e-6).all()
    np.testing.assert_array_equal(quantise(again), codes)


@pytest.mark.parametrize(("threshold", "code"), [(0, 1), (0.5, 125), (0.502, 126), (1, 250)])
def test_the_code_of_a_threshold(threshold, code):
    assert code_of(threshold) == code


@given(st.integers(1, CODES))
def test_a_threshold_that_is_a_code_is_that_code(code):
    assert code_of(code / CODES) == code
