"""Merging prediction folders: one mean, one threshold, no vote where nothing was seen."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.crs import CRS

from kelp import ensembling
from kelp.config import EnsembleConfig
from kelp.ensembling import ensemble, weighted_mean
from kelp.errors import InputError
from kelp.merge import to_mask
from kelp.raster import Georeference, georeference_of, read_mask, read_probability
from kelp.writer import RasterWriter, write_mask

UTM = Georeference(CRS.from_epsg(32621), Affine(30, 0, 500_000, 0, -30, -5_700_000))
ELSEWHERE = Georeference(CRS.from_epsg(32621), Affine(30, 0, 500_030, 0, -30, -5_700_000))
NAN = np.float32("nan")


NOWHERE = Georeference()


def write_soft(path: Path, values: object, reference: Georeference = NOWHERE) -> None:
    soft = np.asarray(values, np.float32)
    with RasterWriter(path, soft.shape, "float32", reference, np.nan, {}) as out:
        out.write(0, soft)


def write_both(folder: Path, name: str, values: object, at: float = 0.5) -> None:
    soft = np.asarray(values, np.float32)
    write_soft(folder / f"{name}_kelp_prob.tif", soft)
    write_mask(folder / f"{name}_kelp.tif", to_mask(soft, at))


def run(tmp_path: Path, *names: str, weights: tuple[float, ...] = (), at: float = 0.5, out="out"):
    return ensemble(
        EnsembleConfig(
            predictions_dirs=tuple(tmp_path / name for name in names),
            output_dir=tmp_path / out,
            weights=weights,
            decision_threshold=at,
        )
    )


votes = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    elements=st.one_of(st.just(NAN), st.floats(0, 1, width=32)),
)


@given(votes, st.data())
def test_the_mean_is_the_naive_weighted_mean_of_what_was_seen(votes, data):
    weights = data.draw(st.lists(st.floats(0.01, 9), min_size=len(votes), max_size=len(votes)))
    mean = weighted_mean(votes, weights)
    for y, x in np.ndindex(*mean.shape):
        seen = [(w, float(v)) for w, v in zip(weights, votes[:, y, x], strict=True) if v == v]
        if not seen:
            assert np.isnan(mean[y, x])
            continue
        naive = sum(w * v for w, v in seen) / sum(w for w, _ in seen)
        assert mean[y, x] == pytest.approx(naive, abs=1e-6)


@given(
    hnp.arrays(np.float32, (2, 3), elements=st.floats(0, 1, width=32)),
    st.lists(st.floats(0.01, 9), min_size=1, max_size=6),
)
def test_equal_votes_give_that_vote_whatever_the_weights(vote, weights):
    scaled = np.array(weights) / np.sum(weights)
    np.testing.assert_array_equal(weighted_mean([vote] * len(weights), scaled), vote)


def test_a_vote_of_weight_zero_is_not_there():
    kept, dropped = np.float32([[0.25, NAN]]), np.float32([[1.0, 1.0]])
    np.testing.assert_array_equal(weighted_mean([kept, dropped], [1, 0]), kept)


def test_the_threshold_includes_its_own_value_in_float32():
    # 0.48 in float32 is a little less than 0.48; it must still count as "at least 0.48".
    soft = np.float32([[0.48, 0.47999, NAN]])
    np.testing.assert_array_equal(to_mask(soft, 0.48), [[1, 0, 255]])


def test_probabilities_are_averaged_before_the_threshold(tmp_path):
    # By hand: means 0.6, 0.4, 0.9 (one folder saw it), not observed. Averaging masks
    # instead (planted fault) would give 1 votes of 0.5 in the first two columns alike.
    write_both(tmp_path / "a", "T", [[0.9, 0.6, NAN, NAN]])
    write_both(tmp_path / "b", "T", [[0.3, 0.2, 0.9, NAN]])
    result = run(tmp_path, "a", "b")
    np.testing.assert_array_equal(read_mask(tmp_path / "out/T_kelp.tif"), [[1, 0, 1, 255]])
    soft = read_probability(tmp_path / "out/T_kelp_prob.tif")
    np.testing.assert_allclose(soft, [[0.6, 0.4, 0.9, NAN]], rtol=1e-6)
    assert result.masks == (tmp_path / "out/T_kelp.tif",)
    assert result.probabilities == (tmp_path / "out/T_kelp_prob.tif",)
    assert "probabilities of 2 folders into 1 masks" in result.summary()
    assert (tmp_path / "out/kelp-ensemble.yaml").is_file()


def test_weights_are_scaled_and_the_first_counts_once(tmp_path):
    # 3:1 is a mean of 0.25; a first weight counted twice would say 6:1 -> 0.14, or 0.4.
    write_both(tmp_path / "a", "T", [[0.0, 1.0]])
    write_both(tmp_path / "b", "T", [[1.0, 0.0]])
    run(tmp_path, "a", "b", weights=(3, 1))
    soft = read_probability(tmp_path / "out/T_kelp_prob.tif")
    np.testing.assert_array_equal(soft, np.float32([[0.25, 0.75]]))


def test_two_equal_folders_behave_as_one(tmp_path):
    rng = np.random.default_rng(3)
    soft = rng.random((17, 29), dtype=np.float32)
    soft[rng.random(soft.shape) < 0.1] = NAN
    for folder in ("a", "b", "c"):
        write_both(tmp_path / folder, "T", soft, at=0.37)
    run(tmp_path, "a", at=0.37, out="one")
    run(tmp_path, "a", "b", "c", weights=(0.7, 2, 0.1), at=0.37, out="three")
    for name in ("T_kelp.tif", "T_kelp_prob.tif"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    np.testing.assert_array_equal(
        read_mask(tmp_path / "one/T_kelp.tif"), read_mask(tmp_path / "a/T_kelp.tif")
    )


def test_masks_vote_where_a_folder_lacks_a_probability(tmp_path, caplog):
    write_both(tmp_path / "a", "T", [[0.9, 0.9, NAN, 0.1]])
    write_mask(tmp_path / "b/T_kelp.tif", np.uint8([[1, 0, 255, 0]]))
    write_mask(tmp_path / "c/T_kelp.tif", np.uint8([[1, 0, 1, 255]]))
    with caplog.at_level(logging.INFO, logger="kelp"):
        result = run(tmp_path, "a", "b", "c")
    assert "masks are merged" in caplog.text
    np.testing.assert_array_equal(read_mask(tmp_path / "out/T_kelp.tif"), [[1, 0, 1, 0]])
    assert result.probabilities == ()
    assert not (tmp_path / "out/T_kelp_prob.tif").exists()


def test_probabilities_alone_are_enough(tmp_path):
    for folder in ("a", "b"):
        write_soft(tmp_path / folder / "T_kelp_prob.tif", [[0.7, 0.2]])
    run(tmp_path, "a", "b")
    np.testing.assert_array_equal(read_mask(tmp_path / "out/T_kelp.tif"), [[1, 0]])


def test_a_tie_of_masks_counts_as_kelp_at_one_half(tmp_path):
    write_mask(tmp_path / "a/T_kelp.tif", np.uint8([[1], [0]]))
    write_mask(tmp_path / "b/T_kelp.tif", np.uint8([[0], [0]]))
    run(tmp_path, "a", "b")
    np.testing.assert_array_equal(read_mask(tmp_path / "out/T_kelp.tif"), [[1], [0]])


def test_strips_are_only_a_way_of_reading(tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    for folder in ("a", "b"):
        write_both(tmp_path / folder, "T", rng.random((23, 11), dtype=np.float32))
    run(tmp_path, "a", "b", out="whole")
    monkeypatch.setattr(ensembling, "_ROWS", 4)
    run(tmp_path, "a", "b", out="strips")
    for read, name in ((read_mask, "T_kelp.tif"), (read_probability, "T_kelp_prob.tif")):
        np.testing.assert_array_equal(
            read(tmp_path / "whole" / name), read(tmp_path / "strips" / name)
        )


def test_the_georeference_is_kept_and_another_one_refused(tmp_path):
    mask = np.zeros((3, 5), np.uint8)
    write_mask(tmp_path / "a/T_kelp.tif", mask)  # without a place: takes the others'
    write_mask(tmp_path / "b/T_kelp.tif", mask, UTM)
    write_mask(tmp_path / "c/T_kelp.tif", mask, ELSEWHERE)
    run(tmp_path, "a", "b")
    assert georeference_of(tmp_path / "out/T_kelp.tif") == UTM
    with pytest.raises(InputError, match=r"c/T_kelp\.tif and .*b/T_kelp\.tif lie in different"):
        run(tmp_path, "a", "b", "c", out="no")


def test_other_scenes_sizes_and_folders_are_refused_by_name(tmp_path):
    write_mask(tmp_path / "a/T_kelp.tif", np.zeros((3, 5), np.uint8))
    write_mask(tmp_path / "a/U_kelp.tif", np.zeros((3, 5), np.uint8))
    write_mask(tmp_path / "b/T_kelp.tif", np.zeros((3, 5), np.uint8))
    with pytest.raises(InputError, match=r"b: lacks U, which another folder holds"):
        run(tmp_path, "a", "b")
    write_mask(tmp_path / "b/U_kelp.tif", np.zeros((5, 3), np.uint8))
    with pytest.raises(InputError, match=r"b/U_kelp\.tif has 5 x 3 .*a/U_kelp\.tif 3 x 5"):
        run(tmp_path, "a", "b")
    assert not (tmp_path / "out/U_kelp.tif").exists()
    with pytest.raises(InputError, match="one of the inputs"):
        run(tmp_path, "a", "b", out="b")
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path, "a", "nowhere")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/scene.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"d: the folder holds no \*_kelp\.tif"):
        run(tmp_path, "d")


def test_a_file_that_holds_no_probabilities_leaves_no_mask(tmp_path):
    for folder, top in (("a", 1.0), ("b", 87.0)):
        write_soft(tmp_path / folder / "T_kelp_prob.tif", [[0.5, top]])
    with pytest.raises(InputError, match=r"b/T_kelp_prob\.tif: .* between 0 and 1, .* 87"):
        run(tmp_path, "a", "b")
    assert list((tmp_path / "out").iterdir()) == []
