"""`kelp tune`: threshold and temperature, fitted as prediction is done, kept where they help."""

import json

import numpy as np
import pytest
import torch
from bundles import PixelBody, tiny_bundle, use_pixel_network
from scipy import special

import kelp
from kelp.cli import main
from kelp.config import PredictConfig, TuneConfig
from kelp.errors import ConfigError, InputError
from kelp.evaluation.calibration import EDGES
from kelp.evaluation.intervals import read_held_out
from kelp.inference import guard
from kelp.inference.bundle import load_bundle, read_spec
from kelp.nn.bundle import describe_bundle
from kelp.nn.model import ARCHITECTURES
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.scene import read_scene
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
    one = result.tuned[0].calibration
    assert one.gains
    assert (one.sites, result.tuned[0].images) == (6, 12)
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
    best = np.nanmax(one.after.total().dice())
    assert 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]) == pytest.approx(best, abs=2e-3)

    told = json.loads((labelled / "tuned" / "tuning.json").read_text())["networks"]
    assert told[0]["threshold"]["after"] == spec.threshold
    page = (labelled / "tuned" / "report.html").read_text()
    assert page.count("<img") == 2
    assert f"At a probability of {spec.threshold:g}" in page
    assert f"{spec.threshold:g} on gains +0." in result.summary()

    # Tuned again, nothing is left to gain, and what was predicted stays valid.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    again = tune(labelled, run).tuned[0].calibration
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
    assert abs(again.scores["difference"].value) < 0.02
    assert again.kept == pytest.approx(spec.threshold, abs=0.03)


def test_held_out_areas_are_those_of_the_maps(labelled, run):
    """Of every scene, with thresholds of other sites, over what is labelled and observed."""
    truth = read_mask(labelled / "masks" / "K03_kelp.tif")
    truth[:10] = 255
    write_mask(labelled / "masks" / "K03_kelp.tif", truth)
    found = tune(labelled, run).tuned[0]
    spec = read_spec(run)
    assert spec.held_out_sites == found.held_out
    assert len(found.held_out) == 12
    assert len({one.site for one in found.held_out}) == 6
    one = next(one for one in found.held_out if one.scene == "K03")
    bundle = load_bundle(run)
    p = kelp.predict_array(bundle, read_scene(labelled / "images" / "K03_satellite.tif"))
    known = np.isfinite(p) & (truth != 255)
    assert one.observed_share == pytest.approx(known.sum() / (truth != 255).sum(), abs=1e-4)
    assert one.truth_m2 == 900 * (known & (truth == 1)).sum()
    assert one.expected_m2 == pytest.approx(900 * float(p[known].sum()), rel=0.01)
    first = found.calibration.held_out_classes[1]  # K02 and K03 are of the second site
    threshold = special.expit(EDGES[first])
    assert one.presence_m2 == 900 * (p[known] >= threshold).sum()
    assert read_held_out(run).pairs == found.held_out


def test_right_maps_become_limits_of_the_guard(labelled, run, monkeypatch):
    monkeypatch.setattr(guard, "FEW_MAPS", 3)
    for path in sorted((labelled / "masks").iterdir()):  # land is kelp to it: not labelled here
        scene = labelled / "images" / path.name.replace("_kelp", "_satellite")
        truth = read_mask(path)
        truth[read_scene(scene)[6] > 0] = 255
        write_mask(path, truth)
    tune(labelled, run)
    limits = read_spec(run).guard
    out = labelled / "out"
    kelp.predict_scenes(
        PredictConfig(
            data_dir=labelled / "images", output_dir=out, run_dir=(run,), save_probabilities=True
        )
    )
    shares, certainties = {}, []
    for path in sorted(out.glob("K??_kelp.tif")):
        mask = read_mask(path)
        mask[read_mask(labelled / "masks" / path.name) == 255] = 255
        p = read_probability(path.with_name(f"{path.stem}_prob.tif"))
        if (mask == 1).sum() >= guard.FEW_PIXELS:
            shares[path.name] = (mask == 1).sum() / (mask != 255).sum()
            certainties.append(p[mask == 1].mean())
    assert limits.kelp_share == pytest.approx(1.25 * max(shares.values()), rel=0.02)
    assert limits.certainty == pytest.approx(min(certainties) - 0.03, abs=0.02)

    # A map that is wrong must not excuse the next one.
    painted = max(shares, key=shares.get)
    truth = read_mask(labelled / "masks" / painted)
    write_mask(labelled / "masks" / painted, np.where(truth == 1, np.uint8(0), truth))
    tune(labelled, run)
    del shares[painted]
    assert read_spec(run).guard.kelp_share == pytest.approx(1.25 * max(shares.values()), rel=0.02)


def test_too_few_maps_say_nothing_of_what_is_unusual(labelled, run):
    tune(labelled, run)
    assert read_spec(run).guard is None


def test_nothing_is_stored_unless_wished_for(labelled, run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = tune(labelled, run, store=False, temperature=False)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert result.tuned[0].calibration.temperature == (1, 1)
    assert "not stored" in result.summary()


def test_a_threshold_that_gains_nothing_elsewhere_stays(labelled, monkeypatch):
    """Noise: each place has another best threshold."""
    best = tune(labelled, make(labelled, monkeypatch, 0.5), store=False, temperature=False)
    threshold = best.tuned[0].calibration.threshold[1]
    run = make(labelled, monkeypatch, threshold)
    one = tune(labelled, run, temperature=False).tuned[0].calibration
    assert one.scores["difference"].value <= 0
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
        one = tune(labelled, run).tuned[0].calibration
    calibrates = one.errors[1] < one.errors[0]
    assert calibrates or one.temperature == (1.0, 1.0)
    assert calibrates or "would calibrate no better" in caplog.text


def test_wrong_input(labelled, run, capsys):
    folders = [f"--gt_dir={labelled / 'masks'}", f"--output_dir={labelled / 'o'}"]
    assert main(["tune", f"--run_dir={run}", *folders]) == 2
    assert "--data_dir and --gt_dir belong together" in capsys.readouterr().err
    for path in (labelled / "masks").glob("*.tif"):
        write_mask(path, np.zeros((100, 90), np.uint8))
    before = read_spec(run)
    with pytest.raises(InputError, match="no scene shows kelp"):
        tune(labelled, run)
    assert read_spec(run) == before
    with pytest.raises(ConfigError, match="run_dir is missing"):
        tune(labelled, run, run_dir=())
