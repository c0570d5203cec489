"""Random changes of light, in training crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.nn.data.augmentation import Radiometry
from kelp.raster.bands import NODATA, OPTICAL, REFLECTANCE_OFFSET, REFLECTANCE_SCALE

COUNT = len(OPTICAL)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def crops(count=4, side=6):
    raw = torch.rand(count, 7, side, side, generator=drawn(9)) * 9000 + 7300
    raw[:, 5] = 1.0
    raw[:, 6] = -3.0
    raw[:, 1, 0, 0] = torch.nan
    raw[:, 2, 1, 1] = NODATA
    raw[:, 6, 2, 2] = NODATA
    return raw


def reflectance(raw):
    return raw[:, :COUNT].double() * REFLECTANCE_SCALE + REFLECTANCE_OFFSET


def test_nothing_is_changed_unless_asked_for():
    raw = crops()
    assert Radiometry()(raw, drawn()) is raw


@settings(max_examples=25)
@given(
    st.builds(Radiometry, *[st.floats(0, 0.3)] * 3, st.floats(0, 0.99)),
    st.integers(0, 10**6),
)
def test_qa_dem_and_missing_values_stay(radiometry, seed):
    raw = crops()
    kept = raw.clone()
    changed = radiometry(raw, drawn(seed))
    assert changed.dtype == torch.float32
    assert torch.equal(changed[:, COUNT:], raw[:, COUNT:])
    missing = raw[:, :COUNT].isnan() | (raw[:, :COUNT] == NODATA)
    now = changed[:, :COUNT].isnan() | (changed[:, :COUNT] == NODATA)
    assert (now | ~missing).all()
    # A band is lost all over a crop, and never all of them.
    lost = now.all((-2, -1))
    assert torch.equal(now, missing | lost[..., None, None])
    assert not lost.all(1).any()
    assert torch.equal(torch.nan_to_num(raw), torch.nan_to_num(kept))
    again = radiometry(raw, drawn(seed))
    assert torch.equal(torch.nan_to_num(again), torch.nan_to_num(changed))


def test_an_offset_is_one_number_a_band_and_crop_of_the_stated_size():
    raw = torch.full((4000, 7, 2, 2), 9000.0)
    added = (reflectance(Radiometry(offset=0.02)(raw, drawn())) - reflectance(raw)).numpy()
    assert np.abs(np.ptp(added, axis=(2, 3))).max() < 1e-6
    each = added[:, :, 0, 0]
    assert np.std(each, axis=0) == pytest.approx([0.02] * COUNT, rel=0.05)
    assert np.mean(each, axis=0) == pytest.approx([0.0] * COUNT, abs=0.002)
    # Haze lifts all bands together.
    assert np.corrcoef(each.T)[0, 1] == pytest.approx(0.75, abs=0.03)


def test_a_gain_is_one_factor_a_crop_on_reflectance():
    raw = crops()
    factor = (reflectance(Radiometry(gain=0.3)(raw, drawn())) / reflectance(raw)).numpy()
    valid = ~(raw[:, :COUNT].isnan() | (raw[:, :COUNT] == NODATA)).numpy()
    for crop, known in zip(factor, valid, strict=True):
        assert np.ptp(crop[known]) < 1e-3
    assert len({round(float(crop[0, 3, 3]), 4) for crop in factor}) == len(raw)


def test_noise_is_one_number_a_pixel_of_the_stated_size():
    raw = torch.full((2, 7, 100, 100), 9000.0)
    added = (reflectance(Radiometry(noise=0.005)(raw, drawn())) - reflectance(raw)).numpy()
    assert added.std() == pytest.approx(0.005, rel=0.02)
    assert abs(np.corrcoef(added[0, 0].ravel(), added[0, 1].ravel())[0, 1]) < 0.05


def test_only_bands_that_a_network_sees_are_lost_and_never_all_of_them():
    raw = torch.full((400, 7, 1, 1), 9000.0)
    lost = Radiometry(dropout=0.9, droppable=(1, 2))(raw, drawn())[:, :COUNT, 0, 0].isnan()
    assert lost.any(0).tolist() == [False, True, True, False, False]
    assert not lost[:, 1:3].all(1).any()
    assert not Radiometry(dropout=0.9, droppable=(1,))(raw, drawn()).isnan().any()


def test_bands_are_lost_as_often_as_asked_for():
    raw = torch.full((4000, 7, 1, 1), 9000.0)
    lost = Radiometry(dropout=0.2)(raw, drawn())[:, :COUNT].isnan().float().mean()
    assert float(lost) == pytest.approx(0.2, abs=0.01)
