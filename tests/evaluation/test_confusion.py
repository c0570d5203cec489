"""Counts: each figure against a naive count, patches against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from world import drawing

from kelp.evaluation.confusion import (
    PATCH_SIZES,
    Confusion,
    Figures,
    ImageFigures,
    PatchCounts,
    mean_dice,
)

masks = st.tuples(st.integers(1, 9), st.integers(1, 7)).flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 255]))] * 2
    )
)


def count(truth, prediction, observed_only: bool = False) -> Confusion:
    counted = Confusion.of(truth, prediction)
    return counted.observed if observed_only else Confusion(*counted[:4])


def count_patches(truth, prediction, observed_only: bool = False):
    return Figures.of(truth, prediction, observed_only).patches


def naive_counts(truth: np.ndarray, prediction: np.ndarray, observed_only: bool) -> Confusion:
    tp = fp = fn = tn = 0
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t == 255 or (observed_only and p == 255):
            continue
        tp += t == 1 and p == 1
        fp += t == 0 and p == 1
        fn += t == 1 and p != 1
        tn += t == 0 and p != 1
    return Confusion(tp, fp, fn, tn)


def naive_patches(truth: np.ndarray, prediction: np.ndarray, observed_only: bool) -> list:
    """Patches by flood fill."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(truth == 1), strict=True)}
    classes = [[0, 0] for _ in PATCH_SIZES]
    while left:
        patch, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            patch.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        said = [int(prediction[p]) for p in patch]
        judged = [s for s in said if s != 255] if observed_only else said
        if not judged:
            continue
        size = next(k for k, most in enumerate((4, 16, 64, 10**9)) if len(patch) <= most)
        classes[size][0] += 1
        classes[size][1] += said.count(1) >= len(judged) / 2
    return [tuple(c) for c in classes]


@given(masks, st.booleans())
def test_counts_and_patches_are_the_naive_ones(pair, observed_only):
    truth, prediction = pair
    assert count(truth, prediction, observed_only) == naive_counts(truth, prediction, observed_only)
    patches = count_patches(truth, prediction, observed_only)
    assert [tuple(p) for p in patches] == naive_patches(truth, prediction, observed_only)


tall = st.tuples(st.integers(1, 30), st.integers(1, 7)).flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 1, 255]))] * 2,
        st.lists(st.integers(0, shape[0]), max_size=4),
    )
)


@given(tall)
def test_strips_change_no_figure(image):
    truth, prediction, cuts = image
    whole, strips = ImageFigures(), ImageFigures()
    whole.add(truth, prediction)
    for rows in zip(np.split(truth, sorted(cuts)), np.split(prediction, sorted(cuts)), strict=True):
        strips.add(*rows)
    assert strips.figures() == whole.figures()


def test_a_patch_through_many_strips_is_one():
    """A U whose arms meet in the last row, and a planted fault: strips that do not know it."""
    truth = np.zeros((9, 5), np.uint8)
    truth[:, [0, 4]] = truth[8] = 1
    image = ImageFigures()
    for row in truth:
        image.add(row[np.newaxis], row[np.newaxis])
    assert image.figures()[0].patches == ((0, 0), (0, 0), (1, 1), (0, 0))
    assert count_patches(truth[:8], truth[:8]) == ((0, 0), (2, 2), (0, 0), (0, 0))


def test_the_mean_over_images_scores_an_empty_one_as_1():
    assert mean_dice([0.5, None, float("nan")]) == pytest.approx(2.5 / 3)
    assert mean_dice([]) is None


@given(st.tuples(*[st.integers(0, 50)] * 4))
def test_figures_are_their_formulas(cells):
    counts = Confusion(*cells)
    tp, fp, fn, _ = cells
    assert counts.dice == (2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None)
    assert counts.iou == (tp / (tp + fp + fn) if tp + fp + fn else None)
    assert counts.precision == (tp / (tp + fp) if tp + fp else None)
    assert counts.recall == (tp / (tp + fn) if tp + fn else None)
    if counts.dice is not None and counts.iou is not None:
        assert counts.dice == pytest.approx(2 * counts.iou / (1 + counts.iou))
    if counts.precision and counts.recall:
        harmonic = 2 / (1 / counts.precision + 1 / counts.recall)
        assert counts.dice == pytest.approx(harmonic)


@given(st.lists(masks, min_size=1, max_size=5))
def test_pooled_figures_are_those_of_all_pixels_at_once(pairs):
    total = Figures()
    for truth, prediction in pairs:
        total = total.plus(Figures.of(truth, prediction))
    truth = np.concatenate([t.ravel() for t, _ in pairs])
    prediction = np.concatenate([p.ravel() for _, p in pairs])
    assert Confusion(*total.confusion[:4]) == naive_counts(truth, prediction, False)
    each = [naive_counts(t, p, False).dice for t, p in pairs]
    assert total.mean_image_dice == pytest.approx(np.mean([1 if d is None else d for d in each]))


def test_a_perfect_prediction_scores_one_and_nothing_found_zero():
    truth = drawing("##.. ?... ...#")
    perfect = Figures.of(truth, np.where(truth == 255, 1, truth).astype(np.uint8))
    assert (perfect.pooled_dice, perfect.confusion.iou, perfect.mean_image_dice) == (1, 1, 1)
    nothing = Figures.of(truth, np.zeros_like(truth))
    assert (nothing.pooled_dice, nothing.confusion.recall) == (0, 0)
    assert nothing.confusion.precision is None


def test_empty_truth_and_empty_prediction_score_one_in_the_mean_only():
    nothing = np.zeros((3, 5), np.uint8)
    empty = Figures.of(nothing, nothing)
    assert (empty.mean_image_dice, empty.pooled_dice) == (1, None)
    false_alarm = nothing.copy()
    false_alarm[0, 0] = 1
    assert Figures.of(nothing, false_alarm).mean_image_dice == 0
    assert Figures().mean_image_dice is None


def test_not_observed_counts_as_no_kelp_and_is_left_out_of_the_second_figures():
    truth, prediction = drawing("#### ...."), drawing("##?? .?#.")
    assert count(truth, prediction) == Confusion(tp=2, fp=1, fn=2, tn=3)
    assert count(truth, prediction, observed_only=True) == Confusion(tp=2, fp=1, fn=0, tn=2)


# Three patches: 4 px (bottom left, joined by a corner), 5 px and 1 px.
TRUTH = drawing(
    """
    #####.....
    ..........
    .......#..
    ##........
    ..#.......
    ..#.......
    """
)


def test_patches_by_hand():
    prediction = drawing(
        """
        ##........
        ..........
        ..........
        .#........
        ..#.......
        ..........
        """
    )
    # 5 px: 2 of 5 is under a half. 4 px: 2 of 4 is enough. 1 px: missed.
    assert count_patches(TRUTH, prediction) == ((2, 1), (1, 0), (0, 0), (0, 0))
    # A third pixel of the first is enough, too.
    prediction[0, 4] = 1
    assert count_patches(TRUTH, prediction) == ((2, 1), (1, 1), (0, 0), (0, 0))


def test_diagonal_neighbours_are_one_patch(monkeypatch):
    found = count_patches(TRUTH, TRUTH)
    assert found == ((2, 2), (1, 1), (0, 0), (0, 0))
    # Planted fault: with 4 neighbours the corner patch falls apart.
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    from kelp.evaluation import confusion

    monkeypatch.setattr(confusion, "_EIGHT_NEIGHBOURS", cross)
    assert count_patches(TRUTH, TRUTH) == ((3, 3), (1, 1), (0, 0), (0, 0))


@pytest.mark.parametrize(
    "pixels, size", [(1, 0), (4, 0), (5, 1), (16, 1), (17, 2), (64, 2), (65, 3), (300, 3)]
)
def test_patch_sizes_at_their_limits(pixels, size):
    truth = np.zeros((3, 310), np.uint8)
    truth[1, :pixels] = 1
    wanted = [PatchCounts()] * len(PATCH_SIZES)
    wanted[size] = PatchCounts(1, 1)
    assert list(count_patches(truth, truth)) == wanted


def test_a_patch_under_cloud_is_missed_or_not_judged():
    truth, prediction = drawing("####.#"), drawing("#?????")
    assert count_patches(truth, prediction) == ((2, 0), (0, 0), (0, 0), (0, 0))
    # Of what was seen of the first, all was found; the second was not seen.
    seen = count_patches(truth, prediction, observed_only=True)
    assert seen == ((1, 1), (0, 0), (0, 0), (0, 0))
