from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kelp.nn import symmetry
from kelp.nn.symmetry import SHAPE_KEEPING, SYMMETRIES

SQUARE = torch.arange(9.0).reshape(3, 3)
OBLONG = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)


def test_there_are_eight():
    assert len({tuple(symmetry.apply(SQUARE, k).flatten().tolist()) for k in SYMMETRIES}) == 8
    assert torch.equal(symmetry.apply(OBLONG, 0), OBLONG)


@pytest.mark.parametrize("k", SYMMETRIES)
@settings(max_examples=20)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_inverse_gives_the_tensor_back_bit_for_bit(k, shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    moved = symmetry.apply(x, k)
    assert torch.equal(symmetry.invert(moved, k), x)
    assert torch.equal(symmetry.apply(symmetry.invert(x, k), k), x)
    assert sorted(moved.flatten().tolist()) == sorted(x.flatten().tolist())


def test_two_in_a_row_are_another_of_the_eight():
    images = [symmetry.apply(SQUARE, k) for k in SYMMETRIES]
    for a in SYMMETRIES:
        for b in SYMMETRIES:
            both = symmetry.apply(symmetry.apply(SQUARE, a), b)
            assert sum(torch.equal(both, image) for image in images) == 1


@pytest.mark.parametrize("k", SYMMETRIES)
def test_only_even_ones_keep_the_shape(k):
    assert (symmetry.apply(OBLONG, k).shape == OBLONG.shape) == (k in SHAPE_KEEPING)


def test_nan_and_integers_are_only_moved():
    x = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    assert torch.isnan(symmetry.apply(x, 1)).sum() == 1
    assert symmetry.apply(SQUARE.to(torch.uint8), 3).dtype == torch.uint8


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_augmenting_moves_image_and_target_alike(shape):
    raw = torch.rand((40, 7, *shape), generator=torch.Generator().manual_seed(1))
    target = raw[:, 0].clone()
    moved, labels = symmetry.augment((raw, target), torch.Generator().manual_seed(0))
    assert moved.shape == raw.shape
    assert torch.equal(moved[:, 0], labels)
    allowed = SYMMETRIES if shape[0] == shape[1] else SHAPE_KEEPING
    used = {
        k
        for before, after in zip(raw, moved, strict=True)
        for k in allowed
        if torch.equal(symmetry.apply(before, k), after)
    }
    assert used == set(allowed)


def test_augmenting_repeats_itself_for_a_seed():
    raw = torch.rand((6, 7, 4, 4), generator=torch.Generator().manual_seed(1))
    once, again, other = (
        symmetry.augment((raw,), torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
