"""Probabilities on the disk: float32, or in steps of 0.004 in a quarter of the room."""

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from laws import LAWS, predict
from world import coast, opened, write_tif

import kelp
from kelp.inference.outputs import Outputs
from kelp.raster.masks import Georeference, read_mask, read_probability


def _write(folder, p, kind, threshold=0.48):
    sink = Outputs(p.shape, Georeference(), folder / "X_kelp.tif", threshold, {}, kind)
    half = p.shape[0] // 2
    if half:
        sink.write(0, p[:half])
    sink.write(half, p[half:])
    sink.close()
    return folder / "X_kelp_prob.tif"


values = st.floats(0, 1, width=32) | st.just(float("nan"))
maps = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=values
)


@LAWS
@given(maps)
def test_uint8_is_at_most_0_002_off(tmp_path_factory, p):
    path = _write(tmp_path_factory.mktemp("p"), p, "uint8")
    with opened(path) as file:
        stored = file.read(1)
        assert (stored.dtype, file.nodata) == (np.uint8, 255)
        assert file.scales == (pytest.approx(0.004, abs=1e-12),)
        assert file.offsets == (0.0,)
        as_others_read_it = stored * file.scales[0] + file.offsets[0]
        coloured = file.colorinterp[0].name
    np.testing.assert_array_equal(stored == 255, np.isnan(p))
    seen = ~np.isnan(p)
    assert stored[seen].max(initial=0) <= 250
    np.testing.assert_allclose(as_others_read_it[seen], p[seen], rtol=0, atol=0.002 + 1e-7)
    assert coloured == "gray"  # no mask, no palette
    # What is decided is decided on the exact numbers.
    mask = read_mask(path.with_name("X_kelp.tif"))
    np.testing.assert_array_equal(mask[seen], p[seen] >= np.float32(0.48))


@LAWS
@given(maps)
def test_float32_is_exact(tmp_path_factory, p):
    path = _write(tmp_path_factory.mktemp("p"), p, "float32")
    with opened(path) as file:
        assert np.isnan(file.nodata)
        assert file.scales == (1.0,)
    np.testing.assert_array_equal(read_probability(path), p)


@LAWS
@given(maps)
def test_uint8_is_read_back_as_probabilities(tmp_path_factory, p):
    path = _write(tmp_path_factory.mktemp("p"), p, "uint8")
    back = read_probability(path)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(back), np.isnan(p))
    np.testing.assert_allclose(back, p, rtol=0, atol=0.002 + 1e-6)


def test_the_scale_and_nodata_of_a_large_map_and_its_overviews(tmp_path):
    """A COG of which one half is not observed: its overviews average only what is."""
    p = np.full((1100, 1040), np.nan, np.float32)
    p[:, :515] = np.linspace(0, 1, 1100, dtype=np.float32)[:, None]
    path = _write(tmp_path, p, "uint8")
    with opened(path) as file:
        assert file.scales == (pytest.approx(0.004, abs=1e-12),)
        factors = file.overviews(1)
        assert factors
        small = file.read(1, out_shape=(1100 // factors[0], 1040 // factors[0]))
        left, right = small[:, : 515 // factors[0]], small[:, -(515 // factors[0]) :]
    assert (right == 255).all()
    assert left.max() <= 250
    rows = np.linspace(0, 1, len(left))[:, None]
    np.testing.assert_allclose(left * 0.004, np.broadcast_to(rows, left.shape), atol=0.01)


def test_the_command_writes_what_it_would_in_float32(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    image, _ = coast((60, 80), np.random.default_rng(1))
    scene = write_tif(tmp_path / "X_satellite.tif", image)
    bundles = [tiny_bundle(tmp_path / "bundle")]
    predict(scene, bundles, tmp_path / "a", save_probabilities=True)
    predict(scene, bundles, tmp_path / "b", save_probabilities=True, probability_dtype="uint8")
    exact = read_probability(tmp_path / "a" / "X_kelp_prob.tif")
    with opened(tmp_path / "b" / "X_kelp_prob.tif") as file:
        stored, scale = file.read(1), file.scales[0]
    np.testing.assert_array_equal(stored == 255, np.isnan(exact))
    seen = stored < 255
    assert np.unique(stored[seen]).size > 20
    np.testing.assert_allclose(stored[seen] * scale, exact[seen], rtol=0, atol=0.002 + 1e-6)
    masks = [(tmp_path / out / "X_kelp.tif") for out in "ab"]
    np.testing.assert_array_equal(*map(read_mask, masks))


def test_an_ensemble_takes_both_kinds(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    image, _ = coast((60, 80), np.random.default_rng(1))
    scene = write_tif(tmp_path / "X_satellite.tif", image)
    bundles = [tiny_bundle(tmp_path / "bundle")]
    for kind in ("float32", "uint8"):
        predict(scene, bundles, tmp_path / kind, save_probabilities=True, probability_dtype=kind)
    config = kelp.config.EnsembleConfig(
        predictions_dirs=(tmp_path / "float32", tmp_path / "uint8"),
        output_dir=tmp_path / "both",
        decision_threshold=0.4,
    )
    kelp.ensemble(config)
    one = read_mask(tmp_path / "float32" / "X_kelp.tif")
    both = read_mask(tmp_path / "both" / "X_kelp.tif")
    np.testing.assert_array_equal(one == 255, both == 255)
    assert (one != both).mean() < 0.01
