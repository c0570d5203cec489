from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kelp.evaluation.confusion import Confusion
from kelp.nn.metrics import Found, KelpScores, monitored


def brute_force(p, target, observed):
    counts = dict.fromkeys(("tn", "fp", "fn", "tp"), 0)
    for value, truth, seen in zip(p.ravel(), target.ravel(), observed.ravel(), strict=True):
        if seen and truth != 255:
            guess = value >= 0.5
            counts[("t" if guess == truth else "f") + ("p" if guess else "n")] += 1
    return Confusion(**counts)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), batches=st.integers(1, 3))
def test_counts_are_those_of_a_loop_over_pixels(seed, batches):
    rng = np.random.default_rng(seed)
    scores, parts = KelpScores(), []
    for _ in range(batches):
        shape = (rng.integers(1, 3), rng.integers(1, 8), rng.integers(1, 6))
        p = rng.choice(np.array([0.0, 0.3, 0.5, 0.5001, 1.0], np.float32), shape)
        target = rng.choice(np.array([0, 1, 255], np.uint8), shape)
        observed = rng.random(shape) < 0.8
        scores.update(*(torch.from_numpy(x) for x in (p, target, observed)))
        parts.append((p, target, observed))
    joined = (np.concatenate([x.ravel() for x in part]) for part in zip(*parts, strict=True))
    expected = brute_force(*joined)
    assert scores.confusion() == expected


def test_scores_are_the_formulas():
    confusion = Confusion(tp=8, fp=3, fn=5, tn=100)
    assert (
        monitored(confusion)
        == confusion.scores()
        == pytest.approx({"dice": 16 / 24, "iou": 8 / 16, "precision": 8 / 11, "recall": 8 / 13})
    )


@pytest.mark.parametrize(
    ("confusion", "score"),
    [
        (Confusion(tn=9), 1.0),  # nothing there, nothing found
        (Confusion(), 1.0),  # nothing observed
        (Confusion(fp=4, tn=9), 0.0),  # only false alarms
        (Confusion(fn=4, tn=9), 0.0),  # all missed
    ],
)
def test_scores_are_never_nan(confusion, score):
    assert set(monitored(confusion).values()) == {score}


def test_counting_is_exact_where_float32_is_not():
    scores = KelpScores()
    ones = torch.ones((1, 4096, 4096))
    target = torch.ones((1, 4096, 4096), dtype=torch.uint8)
    scores.update(ones, target, target.bool())  # 2^24: the next float32 integer is 2 further
    one = torch.ones((1, 1, 1))
    scores.update(one, one.to(torch.uint8), one.bool())
    assert scores.confusion().tp == 2**24 + 1


def test_probabilities_in_half_precision_and_the_threshold_itself():
    scores = KelpScores()
    p = torch.tensor([[[0.5, 0.4980]]], dtype=torch.bfloat16)
    scores.update(p, torch.ones((1, 1, 2), dtype=torch.uint8), torch.ones((1, 1, 2), dtype=bool))
    assert scores.confusion() == Confusion(tp=1, fn=1)


def test_reset_forgets():
    scores = KelpScores()
    one = torch.ones((1, 1, 1))
    scores.update(one, one.to(torch.uint8), one.bool())
    scores.reset()
    assert scores.confusion() == Confusion()


def test_what_a_network_finds_at_any_threshold():
    scores = KelpScores()
    target = torch.zeros((1, 10, 10), dtype=torch.uint8)
    target[0, 0, :4] = 1
    target[0, 9] = 255
    p = torch.full((1, 10, 10), 0.03)
    p[0, 0, :3] = 0.15  # nothing reaches 0.5, and three of four kelp pixels stand out
    p[0, 5, 5] = 0.15
    scores.update(p, target, torch.ones_like(target, dtype=torch.bool))
    found = scores.found()
    assert found == Found(kelp=4, everything=pytest.approx(8 / 94), best=pytest.approx(6 / 8))
    assert scores.confusion().dice == 0
    scores.reset()
    scores.update(torch.full((1, 10, 10), 0.3), target, torch.ones_like(target, dtype=torch.bool))
    assert scores.found() == Found(4, pytest.approx(8 / 94), pytest.approx(8 / 94))


@pytest.mark.parametrize(
    ("found", "enough"),
    [
        (Found(kelp=4, everything=0.02, best=0.06), True),
        (Found(kelp=4, everything=0.02, best=0.04), False),  # less than is asked for
        (Found(kelp=4, everything=0.3, best=0.3), False),  # says the same everywhere
        (Found(kelp=0, everything=0.0, best=0.0), True),  # nothing there to be found
    ],
)
def test_a_network_that_says_the_same_everywhere_finds_nothing(found, enough):
    assert found.enough(0.05) is enough
