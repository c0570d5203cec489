"""What makes an output be made again, and what does not."""

import shutil
from dataclasses import replace

import pytest
from bundles import STATISTICS
from laws import biased_bundle, predict, rasters, use_ramp_network, write_scenes
from world import read_tif, write_tif

import kelp
from kelp.nn import device
from kelp.raster.bands import BANDS


def rebuilt(**changes):
    """Save another bundle in the place of the first."""
    return lambda w: biased_bundle(w.bundle, **{"bias": 0.25, **changes})


def other_pixels(w):
    raw = read_tif(w.scene)
    raw[BANDS.index("NIR"), 40, 40] += 1
    write_tif(w.scene, raw)


class Work:
    """A bundle, a scene, a folder of outputs."""

    def __init__(self, root):
        (self.scene,) = write_scenes(root / "scenes", [(50, 70)])
        self.bundle, self.out = biased_bundle(root / "bundle", 0.25), root / "out"

    def predict(self, **options):
        options = {"sahi_overlap": 16, "run_dir": self.bundle, **options}
        return predict(self.scene.parent, options.pop("run_dir"), self.out, **options).made


@pytest.fixture
def work(tmp_path, monkeypatch):
    use_ramp_network(monkeypatch)
    # As on a CPU that has it; elsewhere the request would fall back to float32.
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    return Work(tmp_path)


SWAPPED = ("SWIR", "NIR", "G", "R", "B", "QA", "DEM")


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"sahi_tile_size": 40}, None),
        ({"sahi_overlap": 15}, None),
        ({"blend": "mean"}, None),
        ({"qa_as_nodata": False}, None),
        ({"land": "skip"}, None),
        ({"decision_threshold": 0.41}, None),
        ({"precision": "bf16-mixed"}, None),
        ({"precision": "bf16-true"}, None),
        ({"tta": True}, None),
        ({"band_order": SWAPPED}, None),
        ({"overwrite": True}, None),
        ({"save_probabilities": True}, None),
        ({"save_spread": True}, None),
        ({}, rebuilt(bias=0.26)),
        ({}, rebuilt(threshold=0.41)),
        ({}, rebuilt(statistics={**STATISTICS, "G": replace(STATISTICS["G"], q99=20001)})),
        ({}, rebuilt(normalization_strategy="z-score")),
        ({}, other_pixels),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_whatever_the_output_depends_on_makes_it_anew(work, options, change):
    assert work.predict() == 1
    assert work.predict() == 0
    if change:
        change(work)
    assert work.predict(**options) == 1
    assert work.predict(**{**options, "overwrite": False}) == 0


def test_the_way_of_merging_symmetries_and_every_bundle_count(work):
    assert work.predict(tta=True) == 1
    assert work.predict(tta=True, tta_merge_mode="max") == 1
    assert work.predict(tta=True, tta_merge_mode="max") == 0
    other = biased_bundle(work.out.parent / "other", 1.0)
    assert work.predict(run_dir=(work.bundle, other)) == 1
    assert work.predict(run_dir=(work.bundle, other)) == 0
    assert work.predict(run_dir=(work.bundle, work.bundle)) == 1


def test_another_version_makes_outputs_anew(work, monkeypatch):
    assert work.predict() == 1
    monkeypatch.setattr(kelp, "__version__", "0.0.0.other")
    assert work.predict() == 1


def test_what_the_output_does_not_depend_on_leaves_it(work, tmp_path):
    assert work.predict() == 1
    before = rasters(work.out)
    moved = tmp_path / "moved"
    shutil.copytree(work.bundle, moved)
    assert work.predict(run_dir=moved) == 0
    assert work.predict(tta_merge_mode="max") == 0  # without --tta
    assert work.predict(decision_threshold=0.4, sahi_tile_size=32) == 0  # as by default
    assert work.predict(use_checkpoint="latest") == 0  # it is a bundle itself
    assert work.predict(batch_size=7) == 0  # law 5: the last bits of a probability at most
    assert work.predict(threads=2) == 0
    retuned = biased_bundle(
        tmp_path / "retuned",
        0.25,
        threshold=0.41,
        tuning={"threshold": 0.41},
        scores={"val/dice": 0.7},
        epoch=9,
        training={"lr": 0.1},
    )
    assert work.predict(run_dir=retuned, decision_threshold=0.4) == 0
    assert rasters(work.out) == before


def test_the_latest_bundle_is_the_one_that_predicts(work, tmp_path):
    run = tmp_path / "run"
    folders = {
        "best": biased_bundle(run / "artifacts" / "bundle", 0.25),
        "latest": biased_bundle(run / "artifacts" / "bundle-latest", -1.5, epoch=3),
    }
    made = {}
    for which, folder in folders.items():
        assert work.predict(run_dir=run, use_checkpoint=which, save_probabilities=True) == 1
        made[which] = rasters(work.out)
        shutil.rmtree(work.out)
        assert work.predict(run_dir=folder, save_probabilities=True) == 1
        assert rasters(work.out) == made[which]
    assert made["best"] != made["latest"]
    shutil.rmtree(work.out)
    work.predict(run_dir=run, save_probabilities=True)  # best is what nobody asks for
    assert rasters(work.out) == made["best"]
