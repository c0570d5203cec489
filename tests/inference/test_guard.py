"""The guard after prediction: maps unlike those of held-out scenes are named, and kept."""

import json

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from world import coast, write_tif

from kelp.cli import main
from kelp.inference.bundle import read_spec
from kelp.inference.guard import FEW_MAPS, FEW_PIXELS, GuardLimits, check
from kelp.nn.bundle import describe_bundle
from kelp.raster.masks import read_mask
from kelp.sensors.record import WaterFacts

LIMITS = GuardLimits(kelp_share=0.1, certainty=0.7, water={"NIR": (7000, 8000)})
WATER = WaterFacts(levels={"NIR": (7500, 7600)}, clear_pixels=9000)


@pytest.mark.parametrize(
    ("kelp", "certainty", "water", "words"),
    [
        (1000, 0.8, WATER, []),
        (1001, 0.8, WATER, ["10.0% of the observed pixels are kelp"]),
        (1000, 0.69, WATER, ["mean probability of 0.69"]),
        (
            500,
            0.8,
            WaterFacts(levels={"NIR": (6990, 7600)}),
            ["training: NIR 6990 to 7600 (there 7000 to 8000)"],
        ),
        (
            500,
            0.8,
            WaterFacts(levels={"NIR": (7500, 8001)}),
            ["training: NIR 7500 to 8001 (there 7000 to 8000)"],
        ),
        (500, 0.8, WaterFacts(levels={"R": (1, 2)}), []),  # a band without limits
        (500, 0.8, WaterFacts(fallback="no clear water found"), ["no clear water found"]),
        (500, 0.8, None, []),
        (5000, 0.1, WaterFacts(fallback="none"), ["kelp", "probability", "none"]),
        (FEW_PIXELS - 1, 0.1, WaterFacts(fallback="none"), []),
    ],
)
def test_a_map_unlike_others_is_not_ok(kelp, certainty, water, words):
    found = check(10_000, kelp, certainty, water, LIMITS)
    assert found.ok == (not words)
    assert len(found.reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, found.reasons, strict=True))


def test_without_limits_nothing_is_said():
    assert check(10, 10, 0.5, None, None) is None


def test_limits_leave_room_and_need_enough_scenes():
    low = np.full((FEW_MAPS, 5), 7500.0)
    high = low + np.linspace(0, 400, FEW_MAPS)[:, np.newaxis]
    limits = GuardLimits().with_water(low, high)
    assert limits.water["NIR"] == (7400, 8000)
    assert GuardLimits().with_water(low, high + 1600).water["R"] == (7300, 9700)  # a tenth
    low[0] = np.nan  # no clear water there
    assert GuardLimits().with_water(low, high).water == {}
    share = np.linspace(0.01, 0.2, FEW_MAPS)
    assert limits.with_maps(share, share + 0.5) == limits.model_copy(
        update={"kelp_share": 0.25, "certainty": 0.48}
    )
    assert limits.with_maps(share[1:], share[1:]) == limits


def test_bands_in_each_others_place_are_named():
    """Each band's level is one that training has seen; their order is not."""
    haze = np.random.default_rng(0).normal(0, 300, (200, 1)).round()
    water = np.array([7500, 7700, 7760, 8060, 8110]) + haze
    limits = GuardLimits().with_water(water - 20, water + 20)

    def reasons(levels):
        bands = ("SWIR", "NIR", "R", "G", "B")
        facts = WaterFacts(levels={b: (x - 20, x + 20) for b, x in zip(bands, levels, strict=True)})
        return check(10_000, 500, 0.9, facts, limits).reasons

    assert reasons(water[0]) == ()
    (reason,) = reasons(water[0][[4, 1, 2, 3, 0]])  # SWIR and B
    assert reason.endswith("bands in another order")
    assert "SWIR less NIR 410 (there -300 to -100)" in reason
    lacking = WaterFacts(levels={"SWIR": (7500, 7500), "R": (7760, 7760)})
    assert check(10_000, 500, 0.9, lacking, limits).ok


def test_predict_names_the_map_keeps_it_and_records_why(tmp_path, monkeypatch, capfd):
    """A network that marks whatever is brighter in NIR, and limits that know better."""
    use_pixel_network(monkeypatch)
    pixels, _ = coast((64, 64), np.random.default_rng(0))
    scene = tmp_path / "scenes" / "A_satellite.tif"
    write_tif(scene, pixels)
    bundle = tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "out"
    arguments = [
        "predict",
        f"--data_dir={scene.parent}",
        f"--run_dir={bundle}",
        f"--output_dir={out}",
        "--overwrite=True",
    ]
    record = out / "A_kelp.json"
    assert main(arguments) == 0
    assert json.loads(record.read_text())["guard"] is None
    kelp = json.loads(record.read_text())["kelp_pixels"]
    assert kelp >= FEW_PIXELS
    for share, ok in (((kelp - 1) / 64**2, False), (1.0, True)):
        limits = GuardLimits(kelp_share=share, certainty=0)
        describe_bundle(bundle, read_spec(bundle).model_copy(update={"guard": limits}))
        capfd.readouterr()
        assert main(arguments) == 0
        said = capfd.readouterr().err
        guard = json.loads(record.read_text())["guard"]
        assert guard["ok"] == ok
        assert ("A_kelp.tif: may be wrong: " in said) == (not ok)
        assert (read_mask(out / "A_kelp.tif") == 1).sum() == kelp
