from __future__ import annotations

import typing

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional

from kelp.config.choices import Loss
from kelp.nn.losses import LossSettings, build_loss

NAMES = typing.get_args(Loss)
OVERLAPS = ("dice", "jaccard", "tversky")
SETTINGS = LossSettings(smooth_factor=0.05, class_weights=(0.5, 3.0))


@st.composite
def batches(draw):
    """Logits and targets of one non-square shape; 0, 1 and 255 all likely."""
    shape = draw(st.tuples(*(st.integers(1, n) for n in (3, 9, 7))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = torch.from_numpy(rng.normal(0, 4, shape).astype(np.float32))
    target = torch.from_numpy(rng.choice(np.array([0, 0, 1, 255], np.uint8), shape))
    return logits, target


def random_batch(seed=0, shape=(2, 6, 9)):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, shape).astype(np.float32))
    return logits, torch.from_numpy(rng.choice(np.array([0, 1, 255], np.uint8), shape))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(batch=batches(), noise=st.floats(-50, 50))
def test_left_out_pixels_change_nothing(name, batch, noise):
    logits, target = batch
    loss = build_loss(name, SETTINGS)
    changed = torch.where(target == 255, logits + noise, logits).requires_grad_()
    value = loss(changed, target)
    value.backward()
    assert torch.isfinite(value)
    assert value >= 0
    torch.testing.assert_close(value, loss(logits, target))
    assert (changed.grad[target == 255] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
def test_a_batch_without_valid_pixels_costs_nothing_and_keeps_the_graph(name, poison):
    logits = torch.full((2, 3, 5), poison, requires_grad=True)
    value = build_loss(name, SETTINGS)(logits, torch.full((2, 3, 5), 255, dtype=torch.uint8))
    assert value.item() == 0
    value.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope(name):
    logits, target = random_batch()
    loss = build_loss(name, SETTINGS)
    point = logits.clone().requires_grad_()
    loss(point, target).backward()
    for seed in range(5):
        way = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        step = 1e-2 * way
        slope = (loss(logits + step, target) - loss(logits - step, target)) / 2e-2
        # Lovász is piecewise linear: where pixels change their order there is a kink.
        atol = 5e-3 if name == "lovasz" else 2e-4
        torch.testing.assert_close((point.grad * way).sum(), slope, rtol=2e-2, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_false_kelp_on_a_kelp_free_batch_costs_and_is_pushed_down(name):
    target = torch.zeros((2, 8, 5), dtype=torch.uint8)
    quiet = torch.full((2, 8, 5), -6.0)
    loud = quiet.clone()
    loud[0, 2:4] = 1.0
    loud.requires_grad_()
    loss = build_loss(name)
    value = loss(loud, target)
    assert value > loss(quiet, target) + 0.01
    value.backward()
    if name == "lovasz":  # where nothing is true, the index is lost to the first false pixel
        assert loud.grad[0, 2:4].max() > 0
    else:
        assert (loud.grad[0, 2:4] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_right_is_cheaper_than_wrong(name):
    _, target = random_batch()
    right = torch.where(target == 1, 8.0, -8.0)
    loss = build_loss(name)
    assert loss(right, target) < 0.05 < loss(-right, target)


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        ("dice", 0.5, 0.5),
        ("jaccard", 1, 1),
        ("tversky", 0.3, 0.7),
    ],
)
def test_overlap_losses_on_hard_predictions_are_the_formula(name, alpha, beta):
    logits, target = random_batch(3)
    hard = torch.where(logits > 0, 100.0, -100.0)
    hit = ((logits > 0) & (target == 1)).sum().item()
    false = ((logits > 0) & (target == 0)).sum().item()
    missed = ((logits <= 0) & (target == 1)).sum().item()
    expected = 1 - (hit + 0.5) / (hit + alpha * false + beta * missed + 0.5)
    assert build_loss(name)(hard, target).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_losses_pool_the_batch(name):
    """One loss over all pixels, as the score: not a mean over images."""
    logits, target = random_batch(5)
    flat = (1, 2 * 6, 9)
    loss = build_loss(name)
    torch.testing.assert_close(
        loss(logits, target), loss(logits.reshape(flat), target.reshape(flat))
    )


def test_bce_is_torchs_on_valid_pixels():
    logits, target = random_batch(7)
    valid = target != 255
    truth = target[valid].float()
    expected = functional.binary_cross_entropy_with_logits(
        logits[valid],
        truth * 0.9 + 0.05,
        weight=torch.where(truth == 1, 3.0, 0.5),
    )
    torch.testing.assert_close(build_loss("bce", SETTINGS)(logits, target), expected)


def test_ce_is_torchs_on_valid_pixels():
    logits, target = random_batch(8)
    valid = target != 255
    two = torch.stack((torch.zeros_like(logits[valid]), logits[valid]), dim=1)
    expected = functional.cross_entropy(
        two, target[valid].long(), weight=torch.tensor([0.5, 3.0]), label_smoothing=0.05
    )
    torch.testing.assert_close(build_loss("ce", SETTINGS)(logits, target), expected)
    torch.testing.assert_close(build_loss("ce")(logits, target), build_loss("bce")(logits, target))


def test_focal_is_the_papers_formula():
    logits, target = random_batch(9)
    valid = (target != 255).numpy()
    p = 1 / (1 + np.exp(-logits.numpy()[valid].astype(np.float64)))
    kelp = target.numpy()[valid] == 1
    right = np.where(kelp, p, 1 - p)
    expected = (-np.where(kelp, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)).mean()
    assert build_loss("focal")(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_combo_is_dice_and_bce():
    logits, target = random_batch(10)
    expected = build_loss("dice")(logits, target) + build_loss("bce", SETTINGS)(logits, target)
    torch.testing.assert_close(build_loss("combo", SETTINGS)(logits, target), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bit_logits_are_summed_in_thirty_two(name, dtype):
    """Over 300,000 pixels a float16 sum is infinite and a bfloat16 one stands still."""
    logits = torch.full((1, 500, 600), 2.0, dtype=dtype)
    target = torch.zeros((1, 500, 600), dtype=torch.uint8)
    target[:, :100] = 1
    loss = build_loss(name)
    value = loss(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), target))
