"""`kelp baseline`: honest probabilities of single pixels, in a bundle that every command takes."""

import hashlib
import json
import logging
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import mlflow_client, tiny_bundle, tiny_spec, use_pixel_network
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS
from scipy import special
from slicing_world import config as slicing
from world import coast, opened, write_tif

import kelp
from kelp.cli import main
from kelp.config import (
    BaselineConfig,
    CompareConfig,
    ExportConfig,
    PredictConfig,
    TuneConfig,
)
from kelp.data_prep.slicing import slice_dataset
from kelp.errors import BundleError, ConfigError, InputError, KelpError, TableError
from kelp.inference.backends.trees import PixelTrees, checked_model, features
from kelp.nn.data.dataset import Source
from kelp.nn.preprocess import Preprocess
from kelp.nn.training import pixels
from kelp.nn.training.baseline import grow
from kelp.nn.training.pixels import PixelSample, draw, sample_pixels
from kelp.progress import silent
from kelp.raster.bands import BANDS
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.scene import read_scene


def options(world, output_dir, store):
    output_dir.mkdir(exist_ok=True)
    shutil.copy(store, output_dir)
    return {
        "data_dir": world.data_dir,
        "metadata_fp": world.table,
        "output_dir": output_dir,
        "num_workers": 0,
        "pixels_per_image": 1000,
        "trees": 60,
        "threads": 1,
    }


@pytest.fixture
def configure(world, empty_store, tmp_path):
    def make(**changes):
        return BaselineConfig(**options(world, tmp_path / "runs", empty_store) | changes)

    return make


@pytest.fixture(scope="module")
def run(world, empty_store, tmp_path_factory):
    """One run, with indices, that many tests look at."""
    given = options(world, tmp_path_factory.mktemp("run"), empty_store)
    indices = {"spectral_indices": "NDVI,FAI", "leaves": 7}
    config, calls = BaselineConfig(**given | indices), []
    return config, kelp.train_baseline(config, lambda *call: calls.append(call)), calls


@pytest.fixture
def bundle(run, tmp_path):
    """A bundle that may be spoilt."""
    return shutil.copytree(run[1].bundle, tmp_path / "bundle")


def tiny_config(**changes):
    return BaselineConfig(data_dir="d", metadata_fp="m", output_dir="o", threads=1, **changes)


# A run


def test_the_toy_is_learnt_and_the_run_is_like_any_other(run):
    config, result, calls = run
    assert result.scores["val/dice"] > 0.9
    assert result.run_dir == config.output_dir / "kelp" / result.run_id
    artifacts = result.run_dir / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {
        "bundle",
        "stats",
        "confusion_matrix.json",
        "confusion_matrix.png",
        "feature_importances.json",
        "feature_importances.png",
    }
    assert BaselineConfig.load(result.run_dir / "kelp-baseline.yaml") == config
    importances = json.loads((artifacts / "feature_importances.json").read_text())
    assert list(importances) == list(result.importances)
    assert next(iter(importances)) in ("NIR", "NDVI", "FAI")
    assert sum(row["share"] for row in importances.values()) == pytest.approx(1)
    assert (artifacts / "feature_importances.png").read_bytes().startswith(b"\x89PNG")
    assert f"val/dice {result.scores['val/dice']:.4f}" in result.summary()
    assert str(result.run_dir) in result.summary()
    stages = dict.fromkeys(stage for stage, _, _ in calls)
    assert list(stages) == ["statistics", "drawing pixels", "growing trees", "scoring"]
    assert all(calls[-1][1:] == (2, 2) for _ in stages)


def test_the_store_has_options_curves_and_scores(run):
    config, result, _ = run
    store = mlflow_client(config.output_dir)
    recorded = store.get_run(result.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["trees"] == "60"
    assert recorded.data.metrics["val/dice"] == pytest.approx(result.scores["val/dice"])
    curve = store.get_metric_history(result.run_id, "train/loss_step")
    assert [point.step for point in curve][:2] == [1, 11]
    assert curve[1].value < curve[0].value


def test_the_bundle_describes_itself(run):
    _, result, _ = run
    names = {path.name for path in result.bundle.iterdir()}
    assert {"bundle.json", "model.txt", "README.md"} < names
    assert len(names) == 4  # and the statistics
    loaded = kelp.load_bundle(result.run_dir)
    assert loaded.spec.is_pixelwise
    assert loaded.spec.channels == (*BANDS, "NDVI", "FAI")
    assert loaded.spec.scores == result.scores
    assert "lightgbm" in loaded.spec.versions
    card = (result.bundle / "README.md").read_text()
    assert f"{result.trees} boosted trees" in card
    assert "kelp baseline" in card
    assert "each pixel on its own" in card


def val_images(world):
    rows = pd.read_parquet(world.table).query("split_0 == 'val'")
    return [world.data_dir / path for path in rows["image_path"]]


def truth_of(image):
    return image.parent.parent / "masks" / image.name.replace("_satellite", "_kelp")


def test_the_bundle_scores_what_was_logged(run, world):
    """Law 10: what prediction makes of the validation images is what training judged."""
    _, result, _ = run
    loaded = kelp.load_bundle(result.bundle)
    counts = np.zeros(3)
    for image in val_images(world):
        p, truth = kelp.predict_array(loaded, read_scene(image)), read_mask(truth_of(image)) == 1
        seen, said = np.isfinite(p), p >= 0.5
        counts += [(said & truth).sum(), (said & ~truth & seen).sum(), (~said & truth & seen).sum()]
    tp, fp, fn = counts
    assert result.scores["val/dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
    confusion = json.loads((result.run_dir / "artifacts/confusion_matrix.json").read_text())
    assert [confusion[k] for k in ("true_positive", "false_positive", "false_negative")] == [
        tp,
        fp,
        fn,
    ]


def test_the_same_seed_gives_the_same_bytes(configure):
    first = kelp.train_baseline(configure(num_workers=2, pixels_per_image=200))
    again = kelp.train_baseline(configure(pixels_per_image=200))
    other = kelp.train_baseline(configure(pixels_per_image=200, seed=1))
    models = [(result.bundle / "model.txt").read_bytes() for result in (first, again, other)]
    assert models[0] == models[1]
    trees = [model.partition(b"\nparameters:")[0] for model in models]  # below, the seed is told
    assert trees[0] != trees[2]
    assert first.scores == again.scores


def test_nothing_of_the_validation_rows_is_learnt(configure, world, tmp_path):
    """Validation images turned to noise with other masks: the same trees, to the last byte."""
    spoilt = shutil.copytree(world.data_dir, tmp_path / "spoilt")
    for image in val_images(replace(world, data_dir=spoilt)):
        for path in (image, truth_of(image)):
            with opened(path, "r+") as file:
                pixels = file.read()
                file.write(pixels[:, ::-1] if path == image else 1 - pixels)
    same = {"early_stopping_rounds": 0, "trees": 5}
    clean = kelp.train_baseline(configure(**same))
    other = kelp.train_baseline(configure(data_dir=spoilt, **same))
    assert clean.trees == other.trees == 5
    assert clean.scores != other.scores
    models = [(result.bundle / "model.txt").read_bytes() for result in (clean, other)]
    assert models[0] == models[1]


def test_a_table_of_tiles(configure, world, tmp_path):
    table = slice_dataset(slicing(world, output_dir=tmp_path / "sahi")).table
    result = kelp.train_baseline(configure(data_dir=table.parent, metadata_fp=table, sahi=True))
    assert result.scores["val/dice"] > 0.9
    spec = kelp.load_bundle(result.run_dir).spec
    assert (spec.sahi, spec.tile_size) == (True, (32, 32))


def test_a_fold_without_kelp_is_one_line(configure, world, tmp_path):
    bare = shutil.copytree(world.data_dir, tmp_path / "bare")
    for path in (bare / "train" / "masks").iterdir():
        with opened(path, "r+") as file:
            file.write(np.zeros_like(file.read()))
    with pytest.raises(TableError, match="no observed kelp in the training rows of fold 0"):
        kelp.train_baseline(configure(data_dir=bare))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_line(configure, world, tmp_path, workers):
    cut = shutil.copytree(world.data_dir, tmp_path / "cut")
    mask = truth_of(val_images(replace(world, data_dir=cut))[0])
    write_tif(mask, np.zeros((1, 20, 20), np.int8))
    config = configure(data_dir=cut, num_workers=workers)
    with pytest.raises(InputError, match=f"^{mask} does not lie on .*: 20 x 20 pixels") as error:
        kelp.train_baseline(config)
    assert "\n" not in str(error.value)
    assert not (config.output_dir / "kelp").exists()  # found before a run begins


def test_ctrl_c_leaves_a_closed_run_without_a_bundle(configure):
    def stop(stage, done, total):
        if stage == "growing trees":
            raise KeyboardInterrupt

    config = configure()
    with pytest.raises(KeyboardInterrupt):
        kelp.train_baseline(config, stop)
    (run_dir,) = (config.output_dir / "kelp").iterdir()
    assert mlflow_client(config.output_dir).get_run(run_dir.name).info.status == "KILLED"
    assert not (run_dir / "artifacts" / "bundle").exists()


def test_clouds_all_over_the_validation_images_are_one_line(configure, world, tmp_path):
    cloudy = shutil.copytree(world.data_dir, tmp_path / "cloudy")
    for image in val_images(replace(world, data_dir=cloudy)):
        with opened(image, "r+") as file:
            pixels = file.read()
            pixels[5] = 1
            file.write(pixels)
    with pytest.raises(TableError, match="no observed pixels in the validation rows of fold 0"):
        kelp.train_baseline(configure(data_dir=cloudy))


def test_the_command(run, world, empty_store, tmp_path, capfd):
    output_dir = options(world, tmp_path / "runs", empty_store)["output_dir"]
    places = f"--data_dir={world.data_dir}", f"--metadata_fp={world.table}"
    command = ["baseline", *places, f"--output_dir={output_dir}", "--quiet", "--num_workers=0"]
    command += ["--trees=2", "--pixels_per_image=50", "--bands=NIR,R"]
    assert main(command) == 0
    shown, errors = capfd.readouterr()
    assert "trained 2 trees on 100 pixels of 2 images" in shown
    assert "val/dice 0." in shown
    assert errors == ""
    assert main([*command, "--cv_split", "7"]) == 2
    assert main([*command, "--cv_split", "all"]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert all("--cv_split" in line or "split_7" in line for line in errors)


# Drawing pixels


@LAWS
@given(seed=st.integers(0, 10**6), count=st.integers(2, 120), share=st.floats(0, 1))
def test_drawn_pixels_stand_for_all_that_are_observed(seed, count, share):
    random = np.random.default_rng(seed)
    kelp_here = random.random((8, 9)) < share
    observed = random.random((8, 9)) < random.choice([0, 0.3, 0.9])
    places, weights = draw(kelp_here, observed, count, random)
    assert len(places) == min(count, observed.sum())
    assert (np.diff(places) > 0).all()
    assert observed.ravel()[places].all()
    drawn = kelp_here.ravel()[places]
    for wanted in (True, False):
        found, kept = (observed & (kelp_here == wanted)).sum(), (drawn == wanted).sum()
        assert weights[drawn == wanted].sum() == pytest.approx(found if kept else 0)
        assert kept >= min(found, count // 2)  # neither class pushes the other out


def test_drawing_sees_only_what_is_observed_and_does_as_prediction(world):
    """The features of drawn pixels are those of the whole image, bit by bit."""
    image = world.train_dir / "images" / "TR000000_satellite.tif"
    source = Source(image, truth_of(image))
    spec = tiny_spec(tile_size=(50, 70), image_size=96)
    preprocess, config = Preprocess(spec), tiny_config(num_workers=0, pixels_per_image=300)
    drawn = sample_pixels([source], preprocess, config, 0, silent)
    whole = features(spec, read_scene(image))
    places, _ = draw(
        read_mask(truth_of(image)) == 1,
        pixels.TileDataset([source])[0].observed.numpy(),
        300,
        np.random.default_rng((config.seed, 0, 0)),
    )
    assert np.array_equal(drawn.features[0], whole[places])
    assert drawn.features[0].shape == (300, 7)
    assert (drawn.features[0][:, BANDS.index("QA")] == 0).all()  # clouds are not observed


def honest_sample(rng, count, images=6):
    """Rare kelp, by chance, in images of which few pixels are drawn; and p as it is."""
    rows, truths, weights = [], [], []
    for _ in range(images):
        x = rng.normal(size=(20_000, 2)).astype(np.float32)
        truth = rng.random(len(x)) < special.expit(2 * x[:, 0] - 4.5)
        places, stands_for = draw(truth, np.ones_like(truth), count, rng)
        rows.append(x[places])
        truths.append(truth[places])
        weights.append(stands_for)
    return PixelSample(rows, np.concatenate(truths), np.concatenate(weights))


def test_probabilities_are_honest_after_a_lopsided_draw():
    """A third of the drawn pixels are kelp, of all 3 %: the weights make up for it."""
    rng = np.random.default_rng(0)
    training, validation = honest_sample(rng, 1800), honest_sample(rng, 1800, 3)
    assert training.kelp.mean() > 0.25
    config = tiny_config(leaves=8)
    grown = grow(training, validation, ("a", "b"), config, silent)
    trees = model_of(grown.text)
    x = rng.normal(size=(50_000, 2)).astype(np.float32)
    true, p = special.expit(2 * x[:, 0] - 4.5), special.expit(trees.predict(x, raw_score=True))
    assert p.mean() == pytest.approx(true.mean(), rel=0.1)
    for low, high in ((0, 0.02), (0.02, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
        inside = (p >= low) & (p < high)
        assert true[inside].mean() == pytest.approx(p[inside].mean(), rel=0.25)
    # Rare classes do not send the first steps beyond the least loss.
    assert (np.diff(grown.losses["train"]) < 0).all()
    assert grown.trees > 20
    assert len(grown.losses["val"]) - grown.trees in (0, config.early_stopping_rounds)


def model_of(text):
    import lightgbm

    return lightgbm.Booster(model_str=checked_model(text, 2))


# Prediction


@pytest.mark.parametrize(
    "way",
    [
        {"tile": 16, "overlap": 0},
        {"tile": 16, "overlap": 9, "blend": "mean"},
        {"tile": 32, "overlap": 16, "blend": "hann"},
        {"tile": 200},
        {"tta": "mean", "tile": 40},
        {"batch_size": 1},
        {"batch_size": 5, "tile": 24},
    ],
)
def test_tiles_make_no_difference_at_all(run, way):
    loaded = kelp.load_bundle(run[1].bundle)
    scene, _ = coast((83, 61), np.random.default_rng(9))
    whole = kelp.predict_array(loaded, scene)
    assert 0.01 < (whole > 0.5).mean() < 0.5
    assert np.array_equal(kelp.predict_array(loaded, scene, **way), whole, equal_nan=True)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # nor do threads
    try:
        assert np.array_equal(kelp.predict_array(loaded, scene, **way), whole, equal_nan=True)
    finally:
        torch.set_num_threads(before)


def predict(world, run_dir, output_dir, **changes):
    return kelp.predict_scenes(
        PredictConfig(
            data_dir=world.data_dir / "test" / "images",
            run_dir=run_dir,
            output_dir=output_dir,
            device="cpu",
            precision="32-true",
            save_probabilities=True,
            **changes,
        )
    )


def test_kelp_predict_takes_the_run_and_a_moved_bundle(run, world, bundle, tmp_path):
    result = predict(world, (run[1].run_dir,), tmp_path / "a")
    moved = predict(world, (bundle,), tmp_path / "b", sahi_tile_size=24)
    assert result.counts.tiles == 2  # one for each image: nothing is computed twice
    for one, other in zip(result.masks, moved.masks, strict=True):
        assert np.array_equal(read_mask(one), read_mask(other))
        assert (read_mask(one) == 1).any()


def test_it_goes_with_a_network_of_other_tiles(run, world, tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    network = tiny_bundle(tmp_path / "network")
    both = predict(world, (network, run[1].bundle), tmp_path / "both", sahi_overlap=0)
    alone = [
        predict(world, (one,), tmp_path / f"{k}", sahi_tile_size=32, sahi_overlap=0)
        for k, one in enumerate((network, run[1].bundle))
    ]
    for k, path in enumerate(both.probabilities):
        mean = np.mean([read_probability(one.probabilities[k]) for one in alone], axis=0)
        assert np.allclose(read_probability(path), mean, atol=1e-6, equal_nan=True)


# Other commands


def test_tune_and_compare_take_the_run(run, bundle, tmp_path):
    tuned = kelp.tune(TuneConfig(run_dir=[bundle], output_dir=tmp_path / "tuned", draws=100))
    kept = kelp.load_bundle(bundle).spec
    assert kept.temperature == tuned.tuned[0].calibration.temperature[1]
    assert "boosted trees" in (bundle / "README.md").read_text()
    result = kelp.compare(
        CompareConfig(run_dir=[run[1].bundle], output_dir=tmp_path / "compared", draws=100)
    )
    ways = [one.name for one in result.comparison.evaluations]
    assert ways == ["whole image", "sliced 128 px, overlap 64 px, hann"]
    assert result.comparison.evaluations[0].multiplier == pytest.approx(70 / 50)  # square tiles
    assert "Do not slice, no gain can be shown: +0.000" in result.text


def test_compare_puts_it_beside_a_network(run, world, tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    result = kelp.compare(
        CompareConfig(
            run_dir=[tiny_bundle(tmp_path / "network"), run[1].bundle],
            draws=100,
            data_dir=world.train_dir / "images",
            gt_dir=world.train_dir / "masks",
            output_dir=tmp_path / "compared",
        )
    )
    ways = [one.name for one in result.comparison.evaluations]
    assert [name for name in ways if name.startswith("bundle: ")] == [
        "bundle: whole image",
        "bundle: sliced 128 px, overlap 64 px, hann",
    ]
    assert any(name.startswith("network: ") for name in ways)
    # It was trained on whole images, but is no answer to how a network should be trained.
    assert result.advice.training is None


def test_temperature_cools_the_probabilities(run):
    net = kelp.load_bundle(run[1].bundle).net
    raw = coast((20, 30), np.random.default_rng(2))[0][None].astype(np.float32)
    halved = net.described(net.spec.model_copy(update={"temperature": 2.0}))
    logits = special.logit(net.probabilities(raw).astype(np.float64))
    expected = special.expit(logits / 2)
    assert np.allclose(halved.probabilities(raw), expected, atol=1e-6)


def test_it_is_not_exported(run, tmp_path):
    config = ExportConfig(run_dir=run[1].bundle, output_path=tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="boosted trees are not exported"):
        kelp.export(config)


# Damage


def test_an_altered_or_missing_model_is_one_line(bundle):
    model = bundle / "model.txt"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.txt: altered or truncated"):
        kelp.load_bundle(bundle)
    model.unlink()
    with pytest.raises(BundleError, match=r"model\.txt: missing; copy the whole bundle folder"):
        kelp.load_bundle(bundle)


def rewrite(bundle, change):
    """Alter the model, and the hash with it: what LightGBM itself would have to notice."""
    content = change((bundle / "model.txt").read_bytes())
    (bundle / "model.txt").write_bytes(content)
    spec = json.loads((bundle / "bundle.json").read_text())
    spec["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(spec))


def replaced(pattern, by):
    def change(content):
        import re

        text, count = re.subn(pattern, by, content.decode(), count=1, flags=re.MULTILINE)
        assert count == 1
        return text.encode()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 3],  # ends LightGBM's process
        lambda content: b"",
        lambda content: b"garbage",
        lambda content: b"\xff\xfe" + content,
        replaced(r"^left_child=\d+", "left_child=0"),  # a circle
        replaced(r"^left_child=\d+", "left_child=999"),
        replaced(r"^right_child=-?\d+", "right_child=-999"),
        replaced(r"^split_feature=\d+", "split_feature=99"),
        replaced(r"^split_feature=\d+", "split_feature=-1"),
        replaced(r"^split_feature=\d+", "split_feature=99999999999999999999"),
        replaced(r"^threshold=\S+", "threshold=nan"),
        replaced(r"^leaf_value=\S+", "leaf_value=1 2"),
        replaced(r"^leaf_value=\S+", "leaf_value=one"),
        replaced(r"^decision_type=\d+", "decision_type=1"),
        replaced(r"^num_leaves=\d+", "num_leaves=1000000000"),
        replaced(r"^num_leaves=\d+", "num_leaves=x"),
        replaced(r"^num_cat=0", "num_cat=1"),
        replaced(r"^is_linear=0", "is_linear=1"),
        replaced(r"^max_feature_idx=\d+", "max_feature_idx=3"),
        replaced(r"^feature_names=\S+ ", "feature_names="),
        replaced(r"^objective=.*", "objective=regression"),
        replaced(r"^num_class=1", "num_class=2"),
    ],
)
def test_a_damaged_model_is_one_line_and_no_crash(bundle, change):
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=r"model\.txt: .*; copy the bundle again") as error:
        kelp.load_bundle(bundle)
    assert "\n" not in str(error.value)


def test_wrong_sizes_in_the_head_are_not_followed(bundle, run):
    """LightGBM would look for trees where `tree_sizes` says; it never sees that line."""
    rewrite(bundle, replaced(r"^tree_sizes=\d+", "tree_sizes=99999999"))
    raw = coast((20, 30), np.random.default_rng(2))[0][None].astype(np.float32)
    whole = kelp.load_bundle(run[1].bundle).net.probabilities(raw)
    np.testing.assert_array_equal(kelp.load_bundle(bundle).net.probabilities(raw), whole)


@settings(LAWS, max_examples=150)
@given(data=st.data())
def test_no_typing_error_gets_through_to_lightgbm(run, data):
    """Any few letters of the model changed: refused, or trees that do answer."""
    text = (run[1].bundle / "model.txt").read_text()
    text = text.partition("\nfeature_importances")[0]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.sampled_from("0123456789- .=xeE\n"))
        text = text[:place] + letter + text[place + 1 :]
    spec = kelp.load_bundle(run[1].bundle).spec
    try:
        net = PixelTrees(text, spec, "model.txt")
    except BundleError:
        return
    assert net.probabilities(np.full((1, 7, 4, 4), 9000, np.float32)).shape == (1, 1, 4, 4)


# What may be missing


def test_without_lightgbm_one_line_names_the_extra(run, configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    for attempt in (
        lambda: kelp.train_baseline(configure()),
        lambda: kelp.load_bundle(run[1].run_dir),
    ):
        with pytest.raises(KelpError, match=r'pip install "kelp-slicer\[baseline\]"') as error:
            attempt()
        assert "\n" not in str(error.value)


def test_a_gpu_is_not_used_and_one_line_says_so(run, caplog):
    caplog.set_level(logging.INFO, "kelp")
    net = kelp.load_bundle(run[1].bundle).net
    found = net.processor("cpu", "bf16-mixed", 1)
    assert (found.device, found.precision, found.threads) == ("cpu", "32-true", 1)
    assert caplog.messages == []
    assert net.processor("cuda", "bf16-mixed", 1) == found
    assert caplog.messages == [
        f"{run[1].bundle / 'model.txt'}: boosted trees are computed on the CPU"
    ]
