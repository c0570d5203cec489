"""Contact sheets: whole pixels, the colours of the legend, few bytes, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from world import coast, rgb_of

from kelp.plotting import rendering, style
from kelp.plotting.canvas import Canvas
from kelp.plotting.sheets import SheetTile, error_sheet, input_rows, input_sheet
from kelp.raster import bands, validity
from kelp.raster.bands import BANDS
from kelp.raster.indices import INDICES, IndexSettings
from kelp.raster.streaming import ChannelStats

SETTINGS = IndexSettings("dn", mask_using_qa=True, mask_using_water_mask=True)


def tile(side=32, seed=0, name="AB123456", place="x 0, y 32"):
    """A shore with kelp, clouds, and pixels without data."""
    image, mask = coast((side, side), np.random.default_rng(seed))
    pixels = validity.canonical(image.astype(np.float32))
    seen = validity.observed(pixels, qa_as_nodata=False)
    truth = np.where(seen, mask, 255).astype(np.uint8)
    return SheetTile(name, place, pixels, truth, validity.observed(pixels) & (truth != 255))


def near(pixels, color, most=8):
    """Pixels of a colour, a palette's error aside."""
    return (abs(pixels.astype(int) - color) <= most).all(axis=-1)


def statistics(names):
    return {name: ChannelStats(0, 1, 0, 1, 7000.0, 12000.0, 9, 0) for name in BANDS} | {
        name: ChannelStats(0, 1, 0, 1, index.low, index.high, 9, 0)
        for name, index in INDICES.items()
        if name in names
    }


def test_every_error_has_its_place_and_its_colour():
    shown = tile()
    found = shown.truth.copy()
    found[(shown.truth == 1) & (np.arange(32) % 2 == 0)] = 0  # misses
    found[20:24, 20:24] = 1  # some of them false alarms
    p = np.where(found == 1, 0.9, 0.1).astype(np.float32)
    page = rgb_of(error_sheet([shown], [p], 0.5, "Epoch 1"))
    times, gap, label, margin = 7, 6, 132, 16
    left = margin + label + 4 * (32 * times + gap)
    top = 46 + 2 * 17 + gap - 17  # a heading, one line of titles
    errors = page[top : top + 32 * times, left : left + 32 * times]
    small = errors[3::times, 3::times]
    np.testing.assert_array_equal(errors, small.repeat(times, 0).repeat(times, 1))  # whole pixels
    truth = np.where(shown.observed, shown.truth, 255)
    for is_kelp, is_found, color in (
        (1, 1, style.KELP),
        (1, 0, style.MISSED),
        (0, 1, style.FALSE),
        (0, 0, style.NO_KELP),
    ):
        where = (truth == is_kelp) & (found == is_found)
        assert where.any()
        np.testing.assert_array_equal(near(small, color), where)
    hatched = near(small, style.HATCH_DARK) | near(small, style.HATCH_LIGHT)
    np.testing.assert_array_equal(hatched, truth == 255)


@pytest.mark.parametrize("side", [32, 128, 350])
def test_sheets_of_epochs_are_small_and_always_the_same(side):
    tiles = [tile(side, seed) for seed in range(6)]
    p = [np.random.default_rng(k).random((side, side), np.float32) for k in range(6)]
    png = error_sheet(tiles, p, 0.5, "Epoch 1", "val/dice 0.5")
    assert png == error_sheet(tiles, p, 0.5, "Epoch 1", "val/dice 0.5")
    # Noise, which no network draws so evenly, is the worst of pictures.
    smooth = error_sheet(tiles, [np.full_like(x, 0.3) for x in p], 0.5, "Epoch 1")
    assert len(smooth) < 300_000
    height, width, _ = rgb_of(png).shape
    assert height < 1800
    assert width < 1700


def test_thin_kelp_of_large_tiles_is_not_lost():
    shown = tile(350)
    truth = np.zeros((350, 350), np.uint8)
    truth[:, 101] = 1
    shown = SheetTile("a", "", shown.pixels, truth, np.ones((350, 350), bool))
    page = rgb_of(error_sheet([shown], [truth * np.float32(0.9)], 0.5, "Epoch 1"))
    assert near(page[60:-60], style.KELP).sum() >= 2 * 160  # in the truth, and as hits
    bright = rendering.ramp("viridis")[0, int(0.9 * 48)]
    assert near(page[60:-60], bright).sum() >= 160


@pytest.mark.parametrize("count", [0, 2, 20, 40])
def test_input_sheets_show_every_channel_and_wrap(count):
    tiles, names = [tile(), tile(seed=1)], (*BANDS, *list(INDICES)[:count])
    rows = input_rows(tiles, names, statistics(names), SETTINGS)
    labels = [row.label[0] for row in rows]
    assert labels[:3] == ["True colour", "Colour-infrared", "SWIR composite"]
    assert labels[3:] == [*names, "Truth"]
    assert all(len(row.pictures) == 2 for row in rows)
    height, width, _ = rgb_of(input_sheet(tiles, names, statistics(names), SETTINGS, "In")).shape
    blocks = -(-len(rows) // 16)
    assert 134 * -(-len(rows) // blocks) < height < 16 * 150 + 120
    assert width == max(16 + blocks * (132 + 2 * 134 + 16), 760)


def test_input_sheets_show_what_the_network_gets():
    shown = tile()
    rows = input_rows([shown], ("NIR", "NDVI"), statistics(("NDVI",)), SETTINGS)
    by_name = {row.label[0]: row for row in rows}
    assert by_name["NIR"].label == ("NIR", "-0.008 to 0.130", "reflectance")
    masked = by_name["NDVI"].pictures[0][shown.pixels[bands.QA] == 1]  # as in training
    assert masked.size
    assert {tuple(c) for c in masked.tolist()} <= {style.HATCH_DARK, style.HATCH_LIGHT}


def test_shades_and_their_ends():
    gray = rendering.ramp("gray")
    plane = np.float32([[-5, 0, 0.5, 1, 9, np.nan, np.inf]])
    (colors,) = rendering.shaded(plane, (0, 1), gray)
    np.testing.assert_array_equal(colors[[0, 1]], gray[0, [0, 0]])
    np.testing.assert_array_equal(colors[[3, 4]], gray[0, [-1, -1]])
    np.testing.assert_array_equal(colors[2], gray[0, 24])
    assert {tuple(c) for c in colors[5:].tolist()} <= {style.HATCH_DARK, style.HATCH_LIGHT}
    assert rendering.shaded(plane, (2, 2), gray).shape == (1, 7, 3)  # nothing to divide by


def test_the_highest_and_the_mean_of_blocks():
    plane = np.float32([[1, 2, 3], [np.nan, 4, 5], [np.nan, np.nan, 6]])
    np.testing.assert_array_equal(rendering.shrink_highest(plane, 2), [[4, 5], [np.nan, 6]])
    np.testing.assert_allclose(rendering.shrink_plane(plane, 2), [[7 / 3, 4], [np.nan, 6]])
    assert rendering.shrink_plane(plane, 1) is plane


def test_a_page_of_photographs_keeps_plain_colours():
    page = Canvas(40, 60)
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    page.paste(noise, 5, 0, photo=True)
    page.paste(np.full((8, 8, 3), style.MISSED, np.uint8), 5, 40)
    page.words("x $y_1$ {z}", 30, 58, side="right")  # no formula
    pixels = rgb_of(page.png(40))
    assert near(pixels[5:13, 40:48], style.MISSED).all()
    assert abs(pixels[5:35, :30].astype(int) - noise).mean() < 24


def test_a_photograph_does_not_look_as_if_it_meant_something():
    """Colours near those of the legend come out as colours of photographs."""
    page = Canvas(40, 80)
    photo = np.array([style.MISSED, style.KELP, (90, 90, 200)], np.uint8)
    photo = np.clip(photo.astype(int) + 12, 0, 255).astype(np.uint8)[None].repeat(10, axis=0)
    page.paste(photo, 0, 0, photo=True)
    page.paste(np.full((8, 8, 3), style.MISSED, np.uint8), 0, 40)
    pixels = rgb_of(page.png(40))
    assert not near(pixels[:10, :3], style.MISSED, most=0).any()
    assert near(pixels[:10, :3], photo, most=4).all()


def test_blocks_of_errors_show_what_they_hold_most_of():
    truth = np.array([[1, 1, 0, 0], [1, 0, 0, 255], [0, 0, 255, 255], [0, 0, 255, 0]], np.uint8)
    found = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 255, 0, 0]], np.uint8)
    assert rendering.shrink_errors(truth, found, 2).tolist() == [[2, 3], [0, 255]]
    each = rendering.shrink_errors(truth, found, 1)
    assert each.tolist() == [[1, 2, 3, 0], [2, 0, 0, 255], [0, 0, 255, 255], [0, 255, 255, 0]]
