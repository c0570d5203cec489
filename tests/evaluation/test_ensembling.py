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

from kelp.config import EnsembleConfig
from kelp.errors import InputError
from kelp.evaluation.ensembling import ensemble, mixtures, weighted_mean
from kelp.raster.masks import Georeference, georeference_of, read_mask, read_probability
from kelp.raster.writer import RasterWriter, write_mask
from kelp.tiling.merge import to_mask

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


def test_a_scene_of_several_strips(tmp_path):
    rng = np.random.default_rng(5)
    votes = rng.random((2, 1100, 3), dtype=np.float32)
    for folder, vote in zip("ab", votes, strict=True):
        write_both(tmp_path / folder, "T", vote)
    run(tmp_path, "a", "b")
    mean = weighted_mean(votes, [0.5, 0.5])
    np.testing.assert_array_equal(read_probability(tmp_path / "out/T_kelp_prob.tif"), mean)
    np.testing.assert_array_equal(read_mask(tmp_path / "out/T_kelp.tif"), mean >= 0.5)


def test_the_georeference_is_kept_and_another_one_refused(tmp_path):
    mask = np.zeros((3, 5), np.uint8)
    write_mask(tmp_path / "a/T_kelp.tif", mask)  # without a place: takes the others'
    write_mask(tmp_path / "b/T_kelp.tif", mask, UTM)
    write_mask(tmp_path / "c/T_kelp.tif", mask, ELSEWHERE)
    run(tmp_path, "a", "b")
    assert georeference_of(tmp_path / "out/T_kelp.tif") == UTM
    with pytest.raises(InputError, match=r"c/T_kelp\.tif does not .*b/T_kelp\.tif: .* \+1 col"):
        run(tmp_path, "a", "b", "c", out="no")


def test_other_scenes_sizes_and_folders_are_refused_by_name(tmp_path):
    write_mask(tmp_path / "a/T_kelp.tif", np.zeros((3, 5), np.uint8))
    write_mask(tmp_path / "a/U_kelp.tif", np.zeros((3, 5), np.uint8))
    write_mask(tmp_path / "b/T_kelp.tif", np.zeros((3, 5), np.uint8))
    with pytest.raises(InputError, match=r"b: lacks U, which another folder holds"):
        run(tmp_path, "a", "b")
    write_mask(tmp_path / "b/U_kelp.tif", np.zeros((5, 3), np.uint8))
    with pytest.raises(InputError, match=r"b/U_kelp\.tif does .*a/U_kelp\.tif: 5 x 3 "):
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


class Coast:
    """Two networks on labelled scenes: one sees kelp through noise, the other mostly noise."""

    def __init__(self, root: Path, scenes: int = 8, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        for number in range(scenes):
            truth = np.zeros((40, 50), np.uint8)
            truth[5 + number : 20 + number, 10:30] = 1
            for name, noise in (("good", 0.25), ("poor", 0.6)):
                soft = np.clip(0.2 + 0.4 * truth + noise * rng.normal(size=truth.shape), 0, 1)
                write_both(root / name, f"S{number}", soft)
            truth[0, :5] = 255
            write_mask(root / "truth" / f"S{number}_kelp.tif", truth)


def fit(root: Path, *names: str, out: str = "out", **options: object):
    return ensemble(
        EnsembleConfig(
            predictions_dirs=tuple(root / name for name in names),
            output_dir=root / out,
            gt_dir=root / "truth",
            **options,
        )
    )


def dice_of(folder: Path, truth: Path) -> float:
    tp = wrong = 0
    for path in sorted(truth.glob("*.tif")):
        right, said = read_mask(path), read_mask(folder / path.name)
        seen = right != 255
        tp += int(((right == 1) & (said == 1)).sum())
        wrong += int(((right != said) & seen).sum())
    return 2 * tp / (2 * tp + wrong)


def test_weights_are_fitted_to_truth(tmp_path):
    Coast(tmp_path)
    found = fit(tmp_path, "good", "poor").fitted
    assert found.weights[0] > found.weights[1] > 0
    assert found.held_out > found.held_out_equal
    assert found.dice >= max(found.dice_equal, *found.dice_alone)
    # The figures are those of the maps: nothing but rounding to 1/250 lies between.
    assert dice_of(tmp_path / "out", tmp_path / "truth") == pytest.approx(found.dice, abs=2e-3)
    for weights, wanted in (((1, 1), found.dice_equal), ((1, 0), found.dice_alone[0])):
        merged = [
            run(tmp_path, "good", "poor", weights=weights, at=at, out=f"w{weights[1]}-{at}")
            and dice_of(tmp_path / f"w{weights[1]}-{at}", tmp_path / "truth")
            for at in (0.3, 0.36, 0.4, 0.44, 0.5)
        ]
        assert max(merged) <= wanted + 2e-3


def test_what_was_fitted_is_applied_to_other_folders(tmp_path):
    Coast(tmp_path)
    found = fit(tmp_path, "good", "poor").fitted
    record = tmp_path / "out" / "kelp-ensemble.yaml"
    again = EnsembleConfig.load(record, {"output_dir": tmp_path / "again"})
    assert again.weights == found.weights
    assert again.decision_threshold == found.threshold
    ensemble(again)
    for path in sorted((tmp_path / "again").glob("*_kelp.tif")):
        assert (read_mask(path) == read_mask(tmp_path / "out" / path.name)).all()


def test_equal_networks_keep_equal_weights(tmp_path):
    Coast(tmp_path)
    found = fit(tmp_path, "good", "good", "good").fitted
    assert found.weights == (1 / 3, 1 / 3, 1 / 3)
    assert found.dice == found.dice_equal == found.dice_alone[0]
    assert "equal weights are kept" in found.summary()


def test_one_folder_gets_a_threshold(tmp_path):
    Coast(tmp_path)
    assert fit(tmp_path, "good").fitted.weights == (1.0,)


def test_pixels_that_no_network_saw_or_no_one_labelled(tmp_path):
    Coast(tmp_path)
    before = fit(tmp_path, "good", "poor").fitted
    soft = read_probability(tmp_path / "good" / "S0_kelp_prob.tif")
    soft[0, :5] = 0.99  # not labelled
    write_soft(tmp_path / "good" / "S0_kelp_prob.tif", soft)
    assert fit(tmp_path, "good", "poor").fitted == before
    soft[6, 12] = NAN  # then the other network decides alone
    write_soft(tmp_path / "good" / "S0_kelp_prob.tif", soft)
    found = fit(tmp_path, "good", "poor").fitted
    assert dice_of(tmp_path / "out", tmp_path / "truth") == pytest.approx(found.dice, abs=2e-3)


def test_images_of_one_site_stay_together(tmp_path):
    Coast(tmp_path)
    table = tmp_path / "table.csv"
    rows = [f"S{number},{'AB'[number % 2]}\n" for number in range(8)]
    table.write_text("tile_id,aoi_id\n" + "".join(rows))
    assert fit(tmp_path, "good", "poor", metadata_fp=table).fitted.sites == 2
    table.write_text("tile_id,aoi_id\n" + "".join(f"S{number},A\n" for number in range(8)))
    with pytest.raises(InputError, match="all labelled scenes are of one site"):
        fit(tmp_path, "good", "poor", metadata_fp=table)


def test_truth_must_fit_and_hold_kelp(tmp_path):
    Coast(tmp_path)
    for path in (tmp_path / "truth").glob("*.tif"):
        write_mask(path, np.zeros((40, 50), np.uint8))
    with pytest.raises(InputError, match="no labelled pixel is kelp"):
        fit(tmp_path, "good", "poor")
    write_mask(tmp_path / "truth" / "S3_kelp.tif", np.zeros((40, 51), np.uint8))
    with pytest.raises(InputError, match=r"S3_kelp\.tif does not .* 40 x 51 pixels"):
        fit(tmp_path, "good", "poor")
    for path in (tmp_path / "truth").glob("*.tif"):
        path.rename(path.with_name(f"X{path.name}"))
    with pytest.raises(InputError, match="no truth of a scene"):
        fit(tmp_path, "good", "poor")


@pytest.mark.parametrize(("count", "least"), [(1, 1), (2, 21), (3, 200), (5, 100), (12, 12)])
def test_mixtures_are_few_and_hold_the_equal_and_the_single_ones(count, least):
    found = mixtures(count)
    assert least <= len(found) <= 301
    assert np.allclose(found.sum(axis=1), 1)
    assert (found >= 0).all()
    assert np.allclose(found[0], 1 / count)
    assert len(np.unique(found.round(9), axis=0)) == len(found)
    assert {tuple(row) for row in np.eye(count)} <= {tuple(row) for row in found}
