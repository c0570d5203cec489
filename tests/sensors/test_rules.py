"""Pixels that are "no kelp" whatever a network says."""

import json

import numpy as np
import pytest
from satellites import CRS, SHAPE, TRANSFORM

from kelp.sensors.aoi import Polygons
from kelp.sensors.rules import Rules


def probabilities(seed=0):
    rng = np.random.default_rng(seed)
    p = rng.random(SHAPE).astype(np.float32)
    p[rng.random(SHAPE) < 0.2] = np.nan
    return p


def by_rows(rules, p, rows):
    return np.concatenate([rules.apply(y, p[y : y + rows]) for y in range(0, len(p), rows)])


def far_from_water(water, tolerance):
    """Land whose square of 2 x tolerance + 1 pixels holds no water; pixel by pixel."""
    inland = np.zeros(water.shape, bool)
    for y, x in np.argwhere(~water):
        near = water[
            max(0, y - tolerance) : y + tolerance + 1, max(0, x - tolerance) : x + tolerance + 1
        ]
        inland[y, x] = not near.any()
    return inland


@pytest.mark.parametrize("rows", [1, 5, 48])
@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_land_far_from_water_is_no_kelp(rows, tolerance):
    rng = np.random.default_rng(1)
    elevation = np.full(SHAPE, 4, np.float32)
    elevation[rng.random(SHAPE) < 0.02] = 0
    elevation[10:14, 5:9] = np.nan  # unknown counts as water
    p = probabilities()
    rules = Rules(SHAPE, 0.5, elevation=lambda t: elevation[t.slices], tolerance=tolerance)
    found = by_rows(rules, p, rows)
    inland = far_from_water(~(elevation > 0), tolerance)
    wanted = np.where(inland & np.isfinite(p), 0, p)
    np.testing.assert_array_equal(found, wanted)
    removed = rules.removed("land")
    assert removed.pixels == (inland & np.isfinite(p)).sum()
    assert removed.kelp_pixels == (inland & (p >= 0.5)).sum() > 0
    assert removed.tolerance == tolerance
    assert rules.removed("excluded") is None


def test_elevation_is_read_no_farther_than_something_is_observed():
    """Of a small area of interest; its land is that of the whole scene."""
    rng = np.random.default_rng(1)
    elevation = np.where(rng.random(SHAPE) < 0.02, 0, 4).astype(np.float32)
    p, part = np.full((2, *SHAPE), 0.7, np.float32)
    outside = np.ones(SHAPE, bool)
    outside[20:29, 11:17] = False
    part[outside] = np.nan
    read = np.zeros(SHAPE, bool)

    def watched(tile):
        read[tile.slices] = True
        return elevation[tile.slices]

    whole = by_rows(Rules(SHAPE, 0.5, elevation=lambda t: elevation[t.slices]), p, 4)
    found = by_rows(Rules(SHAPE, 0.5, elevation=watched), part, 4)
    np.testing.assert_array_equal(found, np.where(outside, np.nan, whole))
    assert {0, np.float32(0.7)} == {*whole[~outside].tolist()}
    wanted = np.zeros(SHAPE, bool)
    wanted[17:35, 8:20] = True  # four rows at a time, and three px around
    np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize("rows", [1, 7, 48])
def test_excluded_polygons_are_no_kelp_and_not_observed_stays(tmp_path, rows):
    path = tmp_path / "ports.geojson"
    ring = [TRANSFORM @ corner for corner in ((5, 10), (30, 10), (30, 20), (5, 20), (5, 10))]
    crs = {"type": "name", "properties": {"name": CRS}}
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    p = probabilities()
    rules = Rules(SHAPE, 0.5, Polygons(path, SHAPE, CRS, TRANSFORM, "--exclude"))
    found = by_rows(rules, p, rows)
    wanted = p.copy()
    inside = wanted[10:20, 5:30]
    inside[np.isfinite(inside)] = 0
    np.testing.assert_array_equal(found, wanted)
    removed = rules.removed("excluded")
    assert removed.pixels == np.isfinite(p[10:20, 5:30]).sum()
    assert removed.kelp_pixels == (p[10:20, 5:30] >= 0.5).sum()
    assert removed.source.href == "ports.geojson"


def test_without_rules_nothing_changes():
    p = probabilities()
    np.testing.assert_array_equal(by_rows(Rules(SHAPE, 0.5), p, 7), p)
