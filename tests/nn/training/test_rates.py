"""The course of the learning rate, by hand."""

import pytest
import torch

from kelp.config import TrainConfig
from kelp.nn.training.task import build_optimizer, build_scheduler


def rates(steps, **options):
    """The rate of each step of a run of 3 epochs."""
    config = TrainConfig(data_dir="d", metadata_fp="m", output_dir="o", epochs=3, lr=1, **options)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    scheduler = build_scheduler(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warm_restarts():
    """Cycles of 1 epoch and, with factor 2, then of 2."""
    found = rates(
        12, lr_scheduler="cosine_with_warm_restarts", lr_cycle_epochs=1, lr_cycle_factor=2
    )
    quarter = 0.5 + 0.5**1.5  # of the way down a half wave
    assert found[:4] == pytest.approx([1, quarter, 0.5, 1 - quarter])
    assert found[4] == 1
    assert found[6] == pytest.approx(quarter)
    assert min(found[5:]) > 0


def test_cyclic():
    found = rates(12, lr_scheduler="cyclic", lr_cycle_epochs=1)
    assert found == pytest.approx([0.1, 0.55, 1, 0.55] * 3)


def test_cosine_and_onecycle():
    assert rates(4, lr_scheduler="cosine")[2] == pytest.approx(0.5)
    found = rates(20, lr_scheduler="onecycle", onecycle_pct_start=0.1)
    assert found[0] == 0.5
    assert max(found) == found[1] == 1
    assert found[-1] == pytest.approx(0.5 / 100)


def test_plateau():
    config = TrainConfig(
        data_dir="d",
        metadata_fp="m",
        output_dir="o",
        lr=1,
        lr_scheduler="reduce_lr_on_plateau",
        lr_plateau_patience=1,
        lr_plateau_factor=0.5,
    )
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    scheduler = build_scheduler(optimizer, config, 10)
    seen = []
    for dice in (0.1, 0.2, 0.1, 0.1, 0.3):
        scheduler.step(dice)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [1, 1, 1, 0.5, 0.5]
