"""Cross-validation folds that keep the images of a place together, and are alike otherwise."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError

STRATA: Final = 4
"""Classes of images with kelp, by the share of kelp; images without are a class of their own."""

log = logging.getLogger("kelp")


def kelp_strata(kelp_share: NDArray[np.float64]) -> NDArray[np.int64]:
    """Class of each image: 0 = no kelp, 1-4 = quarter of the images with kelp, by its share."""
    share = np.asarray(kelp_share, dtype=np.float64)
    with_kelp = share > 0
    strata = np.zeros(len(share), dtype=np.int64)
    if with_kelp.any():
        bounds = np.quantile(share[with_kelp], np.arange(1, STRATA) / STRATA)
        strata[with_kelp] = 1 + np.searchsorted(bounds, share[with_kelp], side="left")
    return strata


def assign_folds(
    groups: NDArray[np.int64], kelp_share: NDArray[np.float64], n_splits: int = 10, seed: int = 42
) -> NDArray[np.int64]:
    """The fold that validates on each image, int64 `(images,)`, numbered from 0.

    Laws: all images of a group are in one fold; every fold has an image; the same arguments give
    the same folds. Folds are balanced in their number of images, of images with kelp, and of
    images of each kelp class (`kelp_strata`): the largest groups first, each goes where it makes
    the folds least unequal. Fewer groups than `n_splits` make fewer folds, which one line says.

    Args:
        groups: the place of each image, any integers.
        kelp_share: share of kelp in each image, 0-1.
        n_splits: number of folds.
        seed: decides between groups that are alike.

    Raises:
        InputError: fewer than two groups.
    """
    _, member = np.unique(groups, return_inverse=True)
    count = int(member.max()) + 1 if len(member) else 0
    if count < 2:
        raise InputError(
            f"{len(member)} training images show {count} place{'s' * (count != 1)}: folds without "
            "leakage need at least two; add images of other places"
        )
    if count < n_splits:
        log.warning("%d places make %d folds, not %d", count, count, n_splits)
        n_splits = count
    strata = kelp_strata(kelp_share)
    classes = [strata == k for k in range(STRATA + 1)]
    counted = [np.ones(len(member)), strata > 0, *classes]  # images, those with kelp, by class
    sums = [np.bincount(member, weights, count) for weights in counted]
    contents = np.stack(sums, axis=1).astype(np.float64)
    # Alike groups follow each other, so that each kind is dealt out evenly like cards.
    shuffled = np.random.default_rng(seed).permutation(count)
    keys = [shuffled, *contents[:, :1:-1].T, contents[:, 0]]
    order = np.lexsort([-key for key in keys])
    return _deal(contents, order, n_splits)[member]


def _deal(
    contents: NDArray[np.float64], order: NDArray[np.int64], n_splits: int
) -> NDArray[np.int64]:
    """Fold of each group: in `order`, where the folds' sums of squared shares grow least."""
    shares = contents / np.maximum(contents.sum(axis=0), 1)
    folds = np.empty(len(contents), dtype=np.int64)
    filled = np.zeros((n_splits, contents.shape[1]))
    for group in order:
        # (filled + share)^2 - filled^2, without what is the same for all folds; 0 in an empty one
        growth = np.round(filled @ shares[group], 12)
        folds[group] = fold = int(np.lexsort([filled[:, 0], growth])[0])
        filled[fold] += shares[group]
    return folds
