import logging

import numpy as np
import pytest
from fractal_world import REACH, SHAPE, coast
from numpy.typing import NDArray

from kelp.data_prep import sites
from kelp.data_prep.sites import embed, group_terrains, similarity
from kelp.errors import ConfigError


def group_places(dems, *threshold):
    return group_terrains([embed(dem) for dem in dems], *threshold)


def image(terrain: NDArray[np.float32], y: int, x: int) -> NDArray[np.float32]:
    return terrain[y : y + SHAPE[0], x : x + SHAPE[1]].copy()


def test_images_of_a_place_are_grouped_at_any_shift_and_others_are_not():
    rng = np.random.default_rng(0)
    dems, truth = [], []
    for place in range(12):
        terrain = coast(place, land=rng.uniform(0.2, 0.95))
        for _ in range(3):
            dems.append(image(terrain, *rng.integers(0, REACH + 1, 2)))
            truth.append(place)
    grouped = group_places(dems)
    assert grouped.ids.tolist() == truth  # numbered by first appearance
    assert grouped.by_dem.all()
    assert len(grouped) == 12
    assert (grouped.scores > sites.DEFAULT_THRESHOLD).all()


def test_full_size_images_that_share_only_a_corner_are_found():
    terrain = coast(3, land=0.6, shape=(550, 550))
    dems = [terrain[:350, :350], terrain[200:, 200:], coast(4, shape=(350, 350))]
    assert group_places(dems).ids.tolist() == [0, 0, 1]


def test_resampling_noise_and_unknown_sea_do_not_hide_a_place():
    from scipy import ndimage

    rng = np.random.default_rng(5)
    dems = []
    for place in range(6):
        terrain = coast(place + 50, land=0.6)
        dems.append(image(terrain, 0, 40))
        moved = ndimage.shift(terrain, (0.4, -0.3), order=1, mode="nearest")
        noisy = np.rint(moved + rng.normal(0, 0.5, moved.shape)).astype(np.float32)
        other = image(np.where(moved < 0.3, 0, np.maximum(noisy, 1)), 31, 3)
        other[:60][other[:60] <= 0] = np.nan
        other[:, 150:][other[:, 150:] <= 0] = -32768  # unknown as well
        dems.append(other)
    assert group_places(dems).ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_images_without_known_land_are_places_of_their_own():
    blank = np.full(SHAPE, np.nan, np.float32)
    sea = np.zeros(SHAPE, np.float32)
    islet = sea.copy()
    islet[80:90, 90:100] = np.arange(1, 101).reshape(10, 10)  # 100 px, 0.26 %
    grouped = group_places([blank, sea, islet, blank, sea, islet])
    assert grouped.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert not grouped.by_dem.any()


@pytest.mark.parametrize("pixels, placeable", [(378, True), (377, False)])
def test_one_per_cent_of_land_places_an_image(pixels, placeable):
    dem = np.zeros(SHAPE, np.float32)
    dem.flat[:pixels] = 5
    assert embed(dem).placeable is placeable


def test_small_images_and_none_at_all():
    assert len(group_places([])) == 0
    tiny = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    assert group_places([tiny, tiny]).ids.tolist() == [0, 1]  # nothing to hold on to
    assert group_places([tiny]).by_dem.tolist() == [True]


def test_small_islands_of_two_places_are_not_taken_for_one():
    assert len(group_places([coast(seed, land=0.03) for seed in range(30, 45)])) == 15


def test_straight_shores_and_plateaus_are_not_taken_for_one_place():
    """Low information: the same beach and plateau, cut by another bay and another cliff."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    dems = []
    for k in range(4):
        beach = np.where(columns < 50 + 8 * k, 2, 0).astype(np.float32)
        beach[20 + 30 * k : 40 + 30 * k, 40:] = 0
        beach[:, 190:] = 40 + 10 * k
        dems.append(beach + (rows > 120 - 17 * k) * (columns > 180) * np.float32(25))
    assert len(group_places(dems)) == 4


def test_similarity_is_one_for_the_same_terrain_and_about_zero_for_another():
    terrain = coast(1).astype(np.int16)
    a, b = terrain[:180, :210], terrain[17:197, 5:215]
    assert similarity(a, b, (17, 5)) > 0.99
    assert similarity(b, a, (-17, -5)) == similarity(a, b, (17, 5))
    assert similarity(a, b, (25, 5)) < 0.9  # eight pixels off
    assert similarity(a, coast(2).astype(np.int16)[:180, :210], (0, 0)) < 0.4


def test_similarity_asks_for_the_same_metres():
    terrain = coast(1).astype(np.int16)
    assert similarity(terrain, 4 * terrain, (0, 0)) == pytest.approx(0.8, abs=0.01)  # 2ab/(a2+b2)


def test_similarity_leaves_unknown_out_and_trusts_little_land_less():
    terrain = coast(1).astype(np.int16)
    gappy = terrain.copy()
    gappy[30:90, 50:130] = -1
    assert similarity(terrain, gappy, (0, 0)) > 0.99
    assert similarity(terrain, np.full_like(terrain, -1), (0, 0)) == 0
    assert similarity(terrain, terrain, (500, 0)) == 0  # no overlap
    dot = np.zeros((60, 70), np.int16)
    dot[20:26, 30:36] = 9
    assert similarity(dot, dot, (0, 0)) < sites.DEFAULT_THRESHOLD


def test_heights_survive_packing():
    dem = coast(8, land=0.9)[:50, :77]
    dem[3, 4], dem[5, 6], dem[7, 8] = np.nan, -32768, 40000
    heights = embed(dem).heights()
    assert heights.shape == (50, 77)
    assert (heights[3, 4], heights[5, 6], heights[7, 8]) == (-1, -1, 32767)
    rest = np.isfinite(dem) & (dem >= 0) & (dem < 32767)
    np.testing.assert_array_equal(heights[rest], dem[rest])


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ConfigError, match="similarity_threshold"):
        group_places([], threshold)


def test_groups_do_not_depend_on_the_order_of_images():
    dems = [image(coast(k // 2), 30 * (k % 2), 20 * (k % 2)) for k in range(8)]
    order = np.random.default_rng(0).permutation(8)
    ids = group_places(dems).ids
    again = group_places([dems[k] for k in order]).ids
    same = ids[:, None] == ids[None]
    np.testing.assert_array_equal(again[:, None] == again[None], same[np.ix_(order, order)])


def clique(images, score):
    pairs = [(a, b) for i, a in enumerate(images) for b in images[i + 1 :]]
    return pairs, [score] * len(pairs)


def matched(monkeypatch, *parts):
    """Make `match` find these pairs and similarities."""
    pairs = np.array([pair for part in parts for pair in part[0]])
    scores = np.array([score for part in parts for score in part[1]])
    monkeypatch.setattr(sites, "match", lambda terrains, progress: (pairs, scores))


def test_a_group_of_more_than_100_is_split_where_it_hangs_together_least(monkeypatch, caplog):
    one, two, three = list(range(80)), list(range(80, 150)), list(range(150, 153))
    bridges = [(79, 80), (78, 81)], [0.7, 0.62]
    matched(monkeypatch, clique(one, 0.8), clique(two, 0.9), clique(three, 0.61), bridges)
    with caplog.at_level(logging.WARNING, "kelp"):
        grouped = group_terrains([embed(np.zeros((2, 3), np.float32))] * 153)
    assert grouped.ids.tolist() == [0] * 80 + [1] * 70 + [2] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "a place of 150 images, more than 100, is split at similarity 0.800 into 2, "
        "the largest of 80"
    ]


def test_a_large_group_of_the_very_same_terrain_is_never_cut(monkeypatch, caplog):
    matched(monkeypatch, clique(list(range(120)), 0.99))
    with caplog.at_level(logging.WARNING, "kelp"):
        grouped = group_terrains([embed(np.zeros((2, 3), np.float32))] * 120)
    assert len(grouped) == 1
    assert "kept whole" in caplog.text


def test_a_higher_threshold_joins_less():
    terrain = coast(9, land=0.7)
    rough = terrain + np.random.default_rng(0).normal(0, 3, terrain.shape).astype(np.float32)
    dems = [image(terrain, 0, 0), image(np.where(terrain > 0, np.maximum(rough, 1), 0), 20, 20)]
    assert len(group_places(dems, 0.6)) == 1
    assert len(group_places(dems, 0.999)) == 2
