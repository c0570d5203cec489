"""`kelp tune`: threshold and temperature, fitted as prediction is done, kept where they help."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import PixelBody, tiny_bundle, use_pixel_network
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

import kelp
from kelp.cli import main
from kelp.config import PredictConfig, TuneConfig
from kelp.errors import ConfigError, InputError
from kelp.evaluation.thresholds import parts_of
from kelp.inference.bundle import load_bundle, read_spec
from kelp.nn.bundle import describe_bundle
from kelp.nn.comparison.counted import (
    EDGES,
    THRESHOLDS,
    Counted,
    Tuned,
    as_threshold,
    best_temperature,
    count,
    dice,
)
from kelp.nn.comparison.sums import Draws
from kelp.nn.model import ARCHITECTURES
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.writer import write_mask


def tune(folder, run, **options):
    values = {
        "data_dir": folder / "images",
        "gt_dir": folder / "masks",
        "metadata_fp": folder / "places.parquet",
        "run_dir": (run,),
        "output_dir": folder / "tuned",
        "precision": "32-true",
        "device": "cpu",
        "draws": 200,
    }
    return kelp.tune(TuneConfig(**(values | options)))


@pytest.fixture
def run(labelled, monkeypatch):
    """A network that is right at 0.1, and far too sure of it: kelp is where the logit is -2.2."""
    use_pixel_network(monkeypatch)
    return tiny_bundle(labelled / "bundle", threshold=0.9)


# Counting


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_outcomes_are_those_of_each_threshold(seed):
    rng = np.random.default_rng(seed)
    p = special.expit(rng.normal(-1, 3, (20, 30))).astype(np.float32)
    p[rng.random(p.shape) < 0.1] = np.nan
    p[0, :3] = 0, 1, 1e-38
    truth = rng.choice([0, 1, 255], p.shape, p=[0.7, 0.2, 0.1]).astype(np.uint8)
    pixels, missed = count(p, truth)
    assert pixels.sum() == (np.isfinite(p) & (truth != 255)).sum()
    outcomes = Counted(pixels[None], np.array([missed])).outcomes()[0]
    logits = special.logit(p.astype(np.float64))
    for k in rng.integers(len(THRESHOLDS), size=5):
        said = np.nan_to_num(logits, nan=-np.inf) >= EDGES[THRESHOLDS[k]]
        tp = (said & (truth == 1)).sum()
        fp = (said & (truth == 0)).sum()
        fn = (~said & (truth == 1)).sum()
        assert tuple(outcomes[:, k]) == (tp, fp, fn)
        assert dice(outcomes)[k] == pytest.approx(2 * tp / max(2 * tp + fp + fn, 1))


def test_thresholds_are_told_in_few_digits():
    told = [as_threshold(k) for k in range(len(THRESHOLDS))]
    assert told == sorted(set(told))
    assert told[0] == pytest.approx(0.001, rel=0.1)
    assert told[-1] == pytest.approx(0.999, rel=0.001)
    assert 0.5 in told


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_an_overconfident_network_is_found(temperature):
    rng = np.random.default_rng(0)
    honest = rng.normal(-2, 2, 400_000)
    truth = (rng.random(len(honest)) < special.expit(honest)).astype(np.uint8)
    p = special.expit(honest * temperature).astype(np.float32)
    pixels, _ = count(p[None], truth[None])
    assert best_temperature(pixels) == pytest.approx(temperature, rel=0.03)
    was = Counted(pixels[None], np.zeros(1, np.int64)).calibration_error()
    again = special.expit(special.logit(p.astype(np.float64)) / temperature).astype(np.float32)
    now = Counted(count(again[None], truth[None])[0][None], np.zeros(1, np.int64))
    assert now.calibration_error() < 0.003
    assert was > 0.01 or temperature == 1


def test_what_was_not_observed_is_missed_but_does_not_calibrate():
    p = np.full((4, 4), np.nan, np.float32)
    p[0] = 0.5
    truth = np.ones((4, 4), np.uint8)
    pixels, missed = count(p, truth)
    assert (pixels.sum(), missed) == (4, 12)
    tp, fp, fn = Counted(pixels[None], np.array([missed])).outcomes()[0][:, 0]
    assert (tp, fp, fn) == (4, 0, 12)


def tuned(by_place, threshold, temperature=(1.0, 1.0)):
    counted = Counted(np.array(by_place), np.zeros(len(by_place), np.int64))
    part = parts_of(len(by_place), 0)
    draws = Draws(len(by_place), 200, 0)
    best = as_threshold(int(dice(counted.outcomes().sum(axis=0)).argmax()))
    return Tuned(
        "run", Path(), "scenes", counted, counted, temperature, (threshold, best), part, draws, 1
    )


def place(seed, kelp=True):
    rng = np.random.default_rng(seed)
    honest = rng.normal(-2, 2, (1, 5000))
    truth = (rng.random(honest.shape) < special.expit(honest)) & kelp
    return count(special.expit(honest).astype(np.float32), truth.astype(np.uint8))[0]


def test_an_old_threshold_moves_with_the_temperature():
    places = [place(k) for k in range(6)]
    best = tuned(places, 0.5).threshold[1]
    one = tuned(places, best, (1.0, 2.5))
    assert not one.gains
    assert (
        one.kept == one.carried == pytest.approx(special.expit(special.logit(best) / 2.5), rel=0.01)
    )
    assert tuned(places, 1.0, (1.0, 2.5)).carried == 1
    assert tuned(places, 0.3).carried == 0.3


def test_with_one_place_the_threshold_stays():
    one = tuned([place(1)], 0.9)
    assert not one.gains
    assert one.kept == 0.9
    assert one.scores()["difference"][0] == 0


def test_places_without_kelp_fit_nothing():
    places = [place(1), *(place(k, kelp=False) for k in range(2, 9))]
    one = tuned(places, 0.4)
    # A third of the draws miss the one place with kelp.
    assert one.threshold_interval() is None
    # That place is judged at the old threshold, since the others have nothing to fit to.
    old, fitted = one._outcomes
    assert (old[0] == fitted[0]).all()
    low, high = tuned([place(k) for k in range(8)], 0.4).threshold_interval()
    assert 0.1 < low < high < 0.9


# The network


def test_temperature_divides_logits(labelled, monkeypatch):
    use_pixel_network(monkeypatch)
    plain = load_bundle(tiny_bundle(labelled / "a", resize_strategy="pad", image_size=32))
    hot = plain.described(plain.spec.model_copy(update={"temperature": 4.0}))
    raw = torch.rand(2, 7, 32, 32) * 9000 + 7000
    wanted = plain.net.module.to_input(torch.sigmoid(plain.net.module(raw) / 4), (32, 32))
    assert torch.equal(hot.net.module.probabilities(raw), wanted)
    assert not torch.equal(plain.net.module.probabilities(raw), wanted)


# The command


def test_what_was_fitted_is_what_prediction_uses(labelled, run, capsys):
    weights = (run / "weights.safetensors").read_bytes()
    result = tune(labelled, run)
    spec = read_spec(run)
    (one,) = result.tuned
    assert one.gains
    assert (one.places, one.images) == (6, 12)
    assert spec.threshold == one.threshold[1] != 0.9
    assert spec.temperature == one.temperature[1]
    assert spec.tuning["pooled_dice"]["difference"]["value"] > 0
    assert (run / "weights.safetensors").read_bytes() == weights
    card = (run / "README.md").read_text()
    assert f"| Threshold | {spec.threshold:g} |" in card
    assert str(labelled / "images") in card

    # The masks of kelp predict have the Dice that the fit promises, to the width of a class.
    out = labelled / "out"
    kelp.predict_scenes(
        PredictConfig(
            data_dir=labelled / "images",
            output_dir=out,
            run_dir=(run,),
            precision="32-true",
            device="cpu",
            save_probabilities=True,
        )
    )
    counts = np.zeros(3, np.int64)
    for path in sorted((labelled / "masks").glob("*.tif")):
        said, truth = read_mask(out / path.name) == 1, read_mask(path)
        p = read_probability(out / path.name.replace("_kelp", "_kelp_prob"))
        assert (said == (np.nan_to_num(p) >= spec.threshold)).all()
        counts += [
            (said & (truth == 1)).sum(),
            (said & (truth == 0)).sum(),
            (~said & (truth == 1)).sum(),
        ]
    best = dice(one.after.outcomes().sum(axis=0)).max()
    assert 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]) == pytest.approx(best, abs=2e-3)

    told = json.loads((labelled / "tuned" / "tuning.json").read_text())["networks"]
    assert told[0]["threshold"]["after"] == spec.threshold
    page = (labelled / "tuned" / "report.html").read_text()
    assert page.count("<img") == 2
    assert f"At a probability of {spec.threshold:g}" in page
    assert f"{spec.threshold:g} on gains +0." in result.summary()

    # Tuned again, nothing is left to gain, and what was predicted stays valid.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    again = tune(labelled, run).tuned[0]
    bundle = {"temperature": spec.temperature, "threshold": spec.threshold}
    describe_bundle(run, read_spec(run).model_copy(update=bundle))
    assert read_spec(run).tuning != spec.tuning
    kelp.predict_scenes(
        PredictConfig(
            data_dir=labelled / "images",
            output_dir=out,
            run_dir=(run,),
            precision="32-true",
            device="cpu",
            save_probabilities=True,
        )
    )
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tif")} == made
    assert again.temperature == (spec.temperature, pytest.approx(spec.temperature, rel=0.03))
    assert abs(again.scores()["difference"][0]) < 0.02
    assert again.kept == pytest.approx(spec.threshold, abs=0.03)


def test_nothing_is_stored_unless_wished_for(labelled, run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = tune(labelled, run, store=False, temperature=False)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert result.tuned[0].temperature == (1, 1)
    assert "not stored" in result.summary()


def test_a_threshold_that_gains_nothing_elsewhere_stays(labelled, monkeypatch):
    """Noise: each place has another best threshold."""
    best = tune(labelled, make(labelled, monkeypatch, 0.5), store=False, temperature=False)
    threshold = best.tuned[0].threshold[1]
    run = make(labelled, monkeypatch, threshold)
    one = tune(labelled, run, temperature=False).tuned[0]
    assert one.scores()["difference"][0] <= 0
    assert not one.gains
    assert one.kept == read_spec(run).threshold == threshold


def make(folder, monkeypatch, threshold):
    use_pixel_network(monkeypatch)
    return tiny_bundle(folder / f"bundle{threshold}", threshold=threshold)


class Sure(PixelBody):
    """As sure of its false alarms as of its hits: no temperature calibrates it."""

    def forward(self, x):
        return torch.where(super().forward(x) > -5, 30.0, -30.0)


def test_a_temperature_that_calibrates_no_better_is_not_kept(labelled, monkeypatch, caplog):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: Sure(spec.channels))
    run = tiny_bundle(labelled / "bundle")
    with caplog.at_level("INFO", "kelp"):
        one = tune(labelled, run).tuned[0]
    calibrates = one.after.calibration_error() < one.before.calibration_error()
    assert calibrates or one.temperature == (1.0, 1.0)
    assert calibrates or "would calibrate no better" in caplog.text


def test_wrong_input(labelled, run, capsys):
    folders = [f"--gt_dir={labelled / 'masks'}", f"--output_dir={labelled / 'o'}"]
    assert main(["tune", f"--run_dir={run}", *folders]) == 2
    assert "--data_dir and --gt_dir belong together" in capsys.readouterr().err
    for path in (labelled / "masks").glob("*.tif"):
        write_mask(path, np.zeros((100, 90), np.uint8))
    before = read_spec(run)
    with pytest.raises(InputError, match="no kelp to be seen in any scene"):
        tune(labelled, run)
    assert read_spec(run) == before
    with pytest.raises(ConfigError, match="run_dir is missing"):
        tune(labelled, run, run_dir=())
