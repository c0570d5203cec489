from __future__ import annotations

import ast
import operator
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kelp.cli import main
from kelp.data_prep.catalogue import formula
from kelp.errors import ConfigError
from kelp.raster.bands import BANDS, OPTICAL
from kelp.raster.indices import (
    INDICES,
    IndexSettings,
    channel_names,
    get_index,
    index_planes,
    mask_index,
    parse_indices,
)

# Worked out by hand from the definitions: for reflectance SWIR .1, NIR .4, R .1, G .2, B .05 and
# for the numbers SWIR 16, NIR 8, R 2, G 4, B 5 taken as they are; DEM 12 m.
BY_HAND = {
    "DEMWM": (12, 12),
    "NDVI": (0.6, 0.6),
    "ATSAVI": (0.30256 / 0.750472, 6.7466 / 11.922472),
    "AVI": (0.7, 14),
    "CI": (0.5, -1.5),
    "ClGreen": (1, 1),
    "GBNDVI": (3 / 13, -1 / 17),
    "GVMI": (0.38 / 0.62, -7.92 / 24.12),
    "IPVI": (0.8, 0.8),
    "KIVU": (-0.25, 0.75),
    "MCARI": (1.04, 20.8),
    "MVI": (4, 0.5),
    "NormNIR": (4 / 7, 4 / 7),
    "PNDVI": (1 / 15, -3 / 19),
    "SABI": (1.2, 2 / 3),
    "WDRVI": (-3 / 7, -3 / 7),
    "mCRIG": (6, -0.4),
    # These from the catalogue of Awesome Spectral Indices (spyndex 0.12), but FAI and RBNDVI.
    "FAI": (0.3, 2.92),
    "NDWI": (-0.3333333, -0.3333333),
    "MNDWI": (0.3333333, -0.6),
    "NDMI": (0.6, -0.3333333),
    "NDTI": (-0.3333333, -0.3333333),
    "GNDVI": (0.3333333, 0.3333333),
    "BNDVI": (0.7777778, 0.2307692),
    "GRNDVI": (0.1428571, 0.1428571),
    "RBNDVI": (0.4545455, 0.06666667),
    "EVI2": (0.4573171, 1.086957),
    "SAVI": (0.45, 0.8571429),
    "OSAVI": (0.4545455, 0.5905512),
    "AFRI1600": (0.7167382, -0.137931),
    "BWDRVI": (-0.1111111, -0.7241379),
    "CVI": (1, 1),
    "GLI": (0.4545455, 0.06666667),
    "SR": (4, 4),
    "DVI": (0.3, 6),
    "FCVI": (0.2833333, 4.333333),
    "NIRv": (0.24, 4.8),
    "NormR": (0.1428571, 0.1428571),
    "NormG": (0.2857143, 0.2857143),
    "GCC": (0.5714286, 0.3636364),
}
REFLECTANCE = {"SWIR": 0.1, "NIR": 0.4, "R": 0.1, "G": 0.2, "B": 0.05}
NUMBERS = {"SWIR": 16.0, "NIR": 8.0, "R": 2.0, "G": 4.0, "B": 5.0}
SHAPE = (2, 3)


def planes(values, dem=12.0):
    full = {**values, "QA": 0.0, "DEM": dem}
    return {name: np.full(SHAPE, full[name], np.float32) for name in BANDS}


def dn(reflectance):
    return {name: (value + 0.2) / 2.75e-5 for name, value in reflectance.items()}


def compute(name, bands, index_input="reflectance"):
    """One index, without masks."""
    (plane,) = index_planes([name], bands, IndexSettings(index_input, False, False))
    return plane


def tensors(bands):
    return {name: torch.from_numpy(plane.copy()) for name, plane in bands.items()}


def test_the_registry_holds_the_contracts_indices():
    assert set(INDICES) == set(BY_HAND)
    for name, index in INDICES.items():
        assert index.name == name
        assert index.low < index.high
        assert set(index.bands) <= set(BANDS)
        assert index.source
        assert index.long_name


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name):
    expected, raw = BY_HAND[name]
    values = compute(name, planes(dn(REFLECTANCE)))
    assert values.dtype == np.float32
    assert values.shape == SHAPE
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    np.testing.assert_allclose(compute(name, planes(NUMBERS), "dn"), raw, rtol=2e-5)


# Every value a band of a scene can have, the awkward ones often.
stored = st.one_of(
    st.integers(-32767, 65535).map(float),
    st.sampled_from([np.nan, 0.0, 7272.0, 7273.0, 7274.0, 65535.0, -1.0, np.inf, -np.inf, 3e38]),
    st.floats(-40_000, 70_000, width=32),
)
scenes = hnp.arrays(np.float32, (7, 3, 5), elements=stored)


@pytest.mark.parametrize("index_input", ["reflectance", "dn"])
@settings(derandomize=True)
@given(pixels=scenes)
def test_numpy_and_torch_agree_and_nothing_is_infinite(index_input, pixels):
    bands = dict(zip(BANDS, pixels, strict=True))
    for name, index in INDICES.items():
        ours = compute(name, bands, index_input)
        theirs = compute(name, tensors(bands), index_input)
        np.testing.assert_array_equal(ours, theirs.numpy(), err_msg=name)
        assert not np.isinf(ours).any()
        missing = np.isnan(np.stack([bands[b] for b in index.bands])).any(axis=0)
        assert np.isnan(ours[missing]).all()
        if index_input == "reflectance":
            seen = ours[~np.isnan(ours)]
            assert ((seen >= np.float32(index.low)) & (seen <= np.float32(index.high))).all()


@settings(derandomize=True)
@given(pixels=hnp.arrays(np.float32, (7, 3, 5), elements=st.integers(-32767, 65535).map(float)))
def test_reflectance_indices_exist_wherever_their_bands_do(pixels):
    bands = dict(zip(BANDS, pixels, strict=True))
    for name in INDICES:
        assert np.isfinite(compute(name, bands)).all()


def test_zero_denominators_are_missing():
    bands = planes(dict.fromkeys(OPTICAL, 0.0))
    constants = {"ATSAVI", "GVMI", "EVI2", "SAVI", "OSAVI"}  # in the denominator
    no_ratio = {"DEMWM", "AVI", "DVI", "FCVI", "FAI"}
    for name in sorted(set(INDICES) - constants - no_ratio):
        assert np.isnan(compute(name, bands, "dn")).all(), name
    # Opposite numbers cancel in the denominator, too.
    assert np.isnan(compute("NDVI", planes({**NUMBERS, "NIR": -2.0}), "dn")).all()


@pytest.mark.parametrize(
    ("name", "reflectance", "bound"),
    [
        ("CI", {"R": 0.0, "B": 0.5}, "low"),
        ("ClGreen", {"NIR": 0.9, "G": -0.1}, "high"),
        ("mCRIG", {"NIR": 0.9, "B": 0.0, "G": 0.2}, "high"),
        ("mCRIG", {"NIR": 0.9, "B": 0.2, "G": 0.0}, "low"),
        ("MVI", {"NIR": 0.9, "SWIR": 0.0}, "high"),
    ],
)
def test_indices_are_clipped_to_their_range(name, reflectance, bound):
    values = compute(name, planes(dn({**REFLECTANCE, **reflectance})))
    assert (values == getattr(INDICES[name], bound)).all()


def test_reflectance_is_clipped_before_ratios():
    # Below zero counts as 0.001, above 1.2 as 1.2.
    values = compute("NDVI", planes(dn({**REFLECTANCE, "NIR": -0.05, "R": 0.003})))
    np.testing.assert_allclose(values, (0.001 - 0.003) / 0.004, rtol=1e-4)
    values = compute("AVI", planes({**dn(REFLECTANCE), "NIR": 65535.0}))
    np.testing.assert_allclose(values, 2.0)  # 2.4 - 0.1, clipped
    values = compute("IPVI", planes({**dn(REFLECTANCE), "NIR": 65535.0}))
    np.testing.assert_allclose(values, 1.2 / 1.3, rtol=1e-5)


def test_elevation_below_the_sea_and_unknown():
    dem = np.array([[-3.0, 0.0, np.nan]], np.float32)
    np.testing.assert_array_equal(compute("DEMWM", {"DEM": dem}), [[0, 0, np.nan]])


QA = np.array([[0, 1, 0, 1, 0]], np.float32)
LAND = np.array([[0, 0, 5, 5, np.nan]], np.float32)


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize(
    ("qa", "water", "kept"),
    [
        (False, False, [1, 1, 1, 1, 1]),
        (True, False, [1, 0, 1, 0, 1]),
        (False, True, [1, 1, 0, 0, 1]),
        (True, True, [1, 0, 0, 0, 1]),
    ],
)
def test_masks_leave_out_bad_pixels_and_land_but_not_unknown_dem(as_torch, qa, water, kept):
    values = np.arange(5, dtype=np.float32)[None]
    before = values.copy()
    wrap = torch.from_numpy if as_torch else np.asarray
    masked = mask_index(wrap(values), wrap(QA), wrap(LAND), qa, water)
    expected = np.where(np.array([kept], bool), before, np.nan)
    np.testing.assert_array_equal(np.asarray(masked), expected)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("as_torch", [False, True])
def test_index_planes_are_computed_then_masked_and_bands_stay(as_torch):
    rng = np.random.default_rng(5)
    pixels = rng.integers(1, 65535, (7, 4, 6)).astype(np.float32)
    pixels[5] = rng.integers(0, 2, (4, 6))
    pixels[6] = rng.integers(-1, 2, (4, 6))
    before = pixels.copy()
    bands = dict(zip(BANDS, pixels, strict=True))
    names = ("SABI", "DEMWM", "NDVI")
    settings = IndexSettings("dn", mask_using_qa=True, mask_using_water_mask=False)
    got = index_planes(names, tensors(bands) if as_torch else bands, settings)
    np.testing.assert_array_equal(pixels, before)
    for name, plane in zip(names, got, strict=True):
        expected = compute(name, bands, "dn")
        if name != "DEMWM":
            expected = np.where(pixels[5] == 1, np.nan, expected)
        np.testing.assert_array_equal(np.asarray(plane), expected)


def test_the_land_mask_itself_is_not_masked():
    bands = planes(dn(REFLECTANCE))
    elevation, ndvi = index_planes(["DEMWM", "NDVI"], bands, IndexSettings("dn", True, True))
    assert (elevation == 12).all()
    assert np.isnan(ndvi).all()


def test_batches_of_tensors():
    batch = torch.rand(4, 7, 3, 5) * 20_000
    bands = {name: batch[:, i] for i, name in enumerate(BANDS)}
    for plane in index_planes(tuple(INDICES), bands, IndexSettings("dn", True, True)):
        assert plane.shape == (4, 3, 5)
        assert plane.dtype == torch.float32


def test_parse_indices():
    assert parse_indices("all") == parse_indices(("ALL",)) == tuple(INDICES)
    assert parse_indices("none") == parse_indices(()) == parse_indices("") == ()
    assert parse_indices(" ndvi, MCRIG ") == parse_indices(["NDVI", "mCRIG"]) == ("NDVI", "mCRIG")
    assert channel_names(("NIR", "R"), ("NDVI",)) == ("NIR", "R", "NDVI")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("NDVY", "'NDVY': did you mean NDVI"),
        ("zzz", "'zzz': choose from DEMWM, NDVI"),
        ("NDVI,ndvi", "NDVI is named twice"),
        ("all,NDVI", "'all'"),
        ("NDVI,none", "'none'"),
    ],
)
def test_wrong_names_are_explained(names, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_indices(names)
    assert "\n" not in str(error.value)


def test_names_are_known_in_any_case():
    assert get_index("ndvi") is INDICES["NDVI"]


@pytest.mark.parametrize("formula", ["NIR ** 2", "min(NIR, 0)", "-NIR", "NIR.real", "NIR / 'R'"])
def test_a_formula_holds_nothing_but_arithmetic(formula):
    wrong = replace(INDICES["NDVI"], formula=formula)
    with pytest.raises((ValueError, TypeError)):
        wrong.evaluate(planes(NUMBERS))


def test_formulas_are_written_down():
    written = {name: formula(index) for name, index in INDICES.items()}
    assert written["NDVI"] == "(NIR - R) / (NIR + R)"
    assert written["DEMWM"] == "max(DEM, 0)"
    assert written["WDRVI"] == "(0.1 NIR - R) / (0.1 NIR + R)"
    assert written["GBNDVI"] == "(NIR - (G + B)) / (NIR + G + B)"
    assert written["CVI"] == "(NIR / G) (R / G)"
    assert written["NIRv"] == "NIR ((NIR - R) / (NIR + R))"
    assert written["FAI"] == "NIR - (R + 0.22 (SWIR - R))"


@pytest.mark.parametrize("name", sorted(set(INDICES) - {"DEMWM"}))
def test_what_is_written_is_what_is_computed(name):
    """Numbers into the written formula: products are spelled by a space."""
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula(INDICES[name]))
    tree = ast.parse(text, mode="eval").body
    assert arithmetic(tree, REFLECTANCE) == pytest.approx(BY_HAND[name][0], rel=1e-4)


def arithmetic(node, values):
    match node:
        case ast.Name(id=name):
            return values[name]
        case ast.Constant(value=number):
            return number
        case ast.BinOp(left=left, op=op, right=right):
            of = {
                ast.Add: operator.add,
                ast.Sub: operator.sub,
                ast.Mult: operator.mul,
                ast.Div: operator.truediv,
            }
            return of[type(op)](arithmetic(left, values), arithmetic(right, values))
    raise AssertionError(ast.dump(node))


def test_the_command_lists_them(capsys):
    assert main(["indices", "--names=fai,NDVI"]) == 0
    out = capsys.readouterr().out
    assert "FAI  Floating Algae Index\n    = NIR - (R + 0.22 (SWIR - R))" in out
    assert "doi:10.1016/j.rse.2009.05.012" in out
    assert "MNDWI" not in out
    assert main(["indices"]) == 0
    assert capsys.readouterr().out.count("    = ") == len(INDICES)
    assert main(["indices", "--names=NDVY"]) == 2
    assert "did you mean NDVI" in capsys.readouterr().err
