import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.data_prep.folds import STRATA, assign_folds, kelp_strata
from kelp.errors import InputError


@st.composite
def archives(draw):
    """Groups and kelp shares of images."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=60))
    groups = np.repeat(draw(st.permutations(range(len(sizes)))), sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = np.where(rng.random(len(groups)) < draw(st.floats(0, 1)), rng.random(len(groups)), 0)
    order = rng.permutation(len(groups))
    return groups[order] * 7 - 3, share[order]  # labels need not be 0, 1, 2 …


@given(archives(), st.integers(2, 12), st.integers(0, 9))
def test_no_group_is_in_two_folds_and_no_fold_is_empty(archive, n_splits, seed):
    groups, share = archive
    fold = assign_folds(groups, share, n_splits, seed)
    assert fold.shape == groups.shape
    for group in np.unique(groups):
        assert len(np.unique(fold[groups == group])) == 1
    assert sorted(set(fold.tolist())) == list(range(min(n_splits, len(np.unique(groups)))))
    np.testing.assert_array_equal(fold, assign_folds(groups, share, n_splits, seed))


@given(archives(), st.integers(2, 12))
def test_fold_sizes_differ_by_less_than_two_of_the_largest_groups(archive, n_splits):
    groups, share = archive
    largest = np.unique(groups, return_counts=True)[1].max()
    sizes = np.bincount(assign_folds(groups, share, n_splits))
    assert sizes.max() - sizes.min() < 2 * largest + STRATA


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 10))
def test_single_images_are_dealt_out_evenly(seed, n_splits):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(40, 400))
    share = np.where(rng.random(count) < 0.6, rng.random(count), 0)
    fold = assign_folds(np.arange(count), share, n_splits, seed)
    strata = kelp_strata(share)
    sizes = np.bincount(fold, minlength=n_splits)
    assert np.ptp(sizes) <= 2
    for k in range(STRATA + 1):
        assert np.ptp(np.bincount(fold[strata == k], minlength=n_splits)) <= 2


def test_an_archive_like_the_competition_is_balanced_in_images_and_kelp():
    rng = np.random.default_rng(0)
    sizes = np.concatenate(
        [np.ones(2800, int), np.full(355, 2), np.full(118, 3), rng.integers(4, 36, 70)]
    )
    groups = np.repeat(np.arange(len(sizes)), sizes)
    often = rng.random(len(sizes))[groups]  # places have much kelp or little
    share = np.where(rng.random(len(groups)) < often, rng.weibull(0.7, len(groups)) / 100, 0)
    fold = assign_folds(groups, share)
    strata = kelp_strata(share)
    assert len(set(fold.tolist())) == 10
    for chosen in (strata >= 0, strata > 0, *(strata == k for k in range(STRATA + 1))):
        counts = np.bincount(fold[chosen], minlength=10)
        assert np.ptp(counts) <= 0.03 * counts.mean() + 2


def test_the_seed_decides_between_alike_groups():
    groups, share = np.arange(100), np.zeros(100)
    folds = {tuple(assign_folds(groups, share, 5, seed).tolist()) for seed in range(4)}
    assert len(folds) == 4


def test_fewer_places_than_folds_make_fewer_folds_and_one_notice(caplog):
    with caplog.at_level(logging.WARNING, "kelp"):
        fold = assign_folds(np.array([4, 4, 9, 9, 2]), np.zeros(5), 10)
    assert sorted(set(fold.tolist())) == [0, 1, 2]
    assert [r.getMessage() for r in caplog.records] == ["3 places make 3 folds, not 10"]


@pytest.mark.parametrize("groups, said", [([], "0 places"), ([5, 5, 5], "1 place:")])
def test_under_two_places_there_are_no_folds(groups, said):
    with pytest.raises(InputError, match=said):
        assign_folds(np.array(groups, dtype=np.int64), np.zeros(len(groups)))


def test_strata_are_none_and_quarters_of_the_images_with_kelp():
    share = np.array([0, 0.1, 0.2, 0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert kelp_strata(share).tolist() == [0, 1, 1, 0, 2, 2, 3, 3, 4, 4]
    assert kelp_strata(np.zeros(3)).tolist() == [0, 0, 0]
    assert kelp_strata(np.array([])).tolist() == []
