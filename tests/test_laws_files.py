"""The laws of kelp on files, each against the fault that would break it.

8 nothing half-written, 9 no code from data, and what makes an output be made anew.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import safetensors.torch
import torch
from bundles import STATISTICS, tiny_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAWS, biased_bundle, predict, rasters, use_ramp_network, write_scenes
from rasterio.errors import RasterioIOError
from rasterio.io import DatasetReader, DatasetWriter
from world import read_tif, write_tif

import kelp
from kelp.bands import BANDS
from kelp.config import PredictConfig
from kelp.errors import (
    BundleError,
    ConfigError,
    InputError,
    KelpError,
    StatsError,
    WeightsError,
)
from kelp.files import atomic
from kelp.nn import device
from kelp.nn.bundle import load_bundle, save_bundle
from kelp.nn.model import KelpNet
from kelp.nn.pretrained import load_pretrained
from kelp.nn.training.epochs import read_checkpoint
from kelp.raster import Georeference, RasterWriter, write_mask
from kelp.stats import StatsFile


@pytest.fixture
def ramp(monkeypatch):
    use_ramp_network(monkeypatch)


# --- law 8: nothing half-written


def break_at_every_call(points, work, error):
    """Do `work` again and again, failing at its first, its second … call of `points`.

    Yields after each failure; ends when `work` came through without meeting one.
    """
    for last in count():
        calls, failed = iter(range(last)), []

        def fused(call, calls=calls, failed=failed):
            def wrapper(*args, **kwargs):
                if not failed and next(calls, None) is None:
                    failed.append(call)
                    raise error
                return call(*args, **kwargs)

            return wrapper

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in points:
                patch.setattr(owner, name, fused(getattr(owner, name)))
            try:
                work()
            except (KelpError, type(error)):
                yield last
            else:
                assert not failed, "the failure was swallowed"
                return


ERRORS = [OSError(errno.ENOSPC, "No space left"), MemoryError(), KeyboardInterrupt()]
RASTER_POINTS = [
    (rasterio, "open"), (rasterio.shutil, "copy"), (DatasetWriter, "write"),
    (DatasetWriter, "write_colormap"), (DatasetWriter, "update_tags"), (DatasetReader, "read"),
    (os, "fsync"), (Path, "replace"),
]  # fmt: skip


@pytest.mark.parametrize("error", [RasterioIOError("disk"), *ERRORS], ids=repr)
@pytest.mark.parametrize(("width", "dtype"), [(31, "uint8"), (31, "float32"), (1030, "uint8")])
def test_a_raster_fails_at_any_call_and_the_older_one_stays(tmp_path, error, width, dtype):
    path = tmp_path / "m.tif"
    write_mask(path, np.ones((4, 5), np.uint8))
    old = path.read_bytes()
    new = np.arange(12 * width).reshape(12, width) % 2

    def work():
        with RasterWriter(path, new.shape, dtype, Georeference(), 255, {"A": "b"}) as out:
            for y in range(0, 12, 3):
                out.write(y, new[y : y + 3])

    failures = 0
    for _ in break_at_every_call(RASTER_POINTS, work, error):
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.tif": old}
        failures += 1
    assert failures >= 9  # open, tags, four writes, reading back, flushing, renaming
    np.testing.assert_array_equal(read_tif(path)[0], new)


@settings(LAWS, max_examples=25)
@given(
    parts=st.lists(st.binary(max_size=40), max_size=6),
    stop=st.integers(0, 6),
    error=st.sampled_from(ERRORS),
    old=st.none() | st.binary(max_size=40),
)
def test_a_file_fails_between_any_two_writes(tmp_path_factory, parts, stop, error, old):
    path = tmp_path_factory.mktemp("atomic") / "new" / "f.bin"
    before = {}
    if old is not None:
        path.parent.mkdir()
        path.write_bytes(old)
        before = {"f.bin": old}

    def work(stop):
        with atomic(path) as partial, partial.open("wb") as file:
            for i, part in enumerate([*parts, b""]):
                if i == stop:
                    raise error
                file.write(part)
                file.flush()

    def content():
        return {p.name: p.read_bytes() for p in path.parent.iterdir()}

    if stop <= len(parts):
        with pytest.raises((InputError, type(error))):
            work(stop)
        assert content() == before
    for _ in break_at_every_call([(os, "fsync"), (Path, "replace")], lambda: work(None), error):
        assert content() == before
    assert content() == {"f.bin": b"".join(parts)}


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_bundle_fails_at_any_call_and_the_older_one_stays(tmp_path, error):
    folder, extra = tmp_path / "run" / "bundle", tmp_path / "s.json"
    extra.write_text("{}")
    biased_bundle(folder, 0.25)
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    spec = tiny_spec(epoch=2)
    net = KelpNet(spec)
    points = [
        (safetensors.torch, "save_file"), (hashlib, "file_digest"), (Path, "write_text"),
        (shutil, "copyfile"),
    ]  # fmt: skip
    failures = 0
    for _ in break_at_every_call(points, lambda: save_bundle(folder, net, spec, [extra]), error):
        assert [p.name for p in folder.parent.iterdir()] == ["bundle"]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
        failures += 1
    assert failures == 5
    assert load_bundle(folder).spec.epoch == 2
    assert (folder / "s.json").is_file()


# --- law 9: no code from data


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "torch", "torch of tensors"])
def hostile(request, tmp_path):
    """A file of weights that would leave a mark, and the mark."""
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Hostile(marker), protocol=2))
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        tensors = {"conv1.weight": torch.zeros(1)} if "tensors" in request.param else {}
        torch.save({**tensors, "state_dict": Hostile(marker)}, path)
        torch.load(path, weights_only=False)
    marker.rmdir()  # it does work
    return path, marker


@pytest.mark.usefixtures("ramp")
def test_a_pickle_is_no_weights_file(hostile, tmp_path):
    pickled, marker = hostile
    bundle = biased_bundle(tmp_path / "bundle", 0)
    shutil.copy(pickled, bundle / "weights.safetensors")
    described = json.loads((bundle / "bundle.json").read_text())
    described["weights_sha256"] = hashlib.sha256(pickled.read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(described))
    with pytest.raises(BundleError, match="does not fit"):
        load_bundle(bundle)
    assert not marker.exists()


def test_a_pickle_is_no_encoder_and_no_checkpoint(hostile, tmp_path):
    pickled, marker = hostile
    net = KelpNet(tiny_spec(decoder_channels=(16, 8, 8, 4)))
    for name in ("w.pth", "w.pt", "w.bin", "w.safetensors"):
        shutil.copy(pickled, tmp_path / name)
        with pytest.raises(WeightsError, match=name):
            load_pretrained(net, str(tmp_path / name))
    checkpoints = tmp_path / "artifacts" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(pickled, checkpoints / "last.ckpt")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "artifacts")
    assert not marker.exists()


@pytest.mark.parametrize("spelling", [
    "__import__('os').mkdir('{marker}')",
    "!!python/object/apply:os.mkdir ['{marker}']",
    "{{'schema_version': __import__('os').mkdir('{marker}')}}",
])  # fmt: skip
def test_text_that_looks_like_python_is_only_text(tmp_path, spelling):
    marker = tmp_path / "executed"
    text = spelling.format(marker=marker)
    spec = tiny_spec(decoder_channels=(16, 8, 8, 4))
    bundle = save_bundle(tmp_path / "bundle", KelpNet(spec), spec)
    described = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(bundle)
    for name in ("encoder", "architecture", "bands", "threshold"):
        (bundle / "bundle.json").write_text(json.dumps({**described, name: text}))
        with pytest.raises(KelpError, match=name):
            load_bundle(bundle)
    statistics = tmp_path / "s.json"
    statistics.write_text(text)
    with pytest.raises(StatsError, match=r"s\.json"):
        StatsFile.load(statistics)
    (tmp_path / "c.yaml").write_text(f"data_dir: d\nrun_dir: r\noutput_dir: o\nblend: {text}\n")
    with pytest.raises(ConfigError):
        PredictConfig.load(tmp_path / "c.yaml")
    assert not marker.exists()


# --- what makes an output be made anew, and what does not


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
        ({"blend": "hann"}, None),
        ({"batch_size": 7}, None),
        ({"qa_as_nodata": False}, None),
        ({"land": "skip"}, None),
        ({"decision_threshold": 0.41}, None),
        ({"precision": "bf16-mixed"}, None),
        ({"precision": "bf16-true"}, None),
        ({"tta": True}, None),
        ({"band_order": SWAPPED}, None),
        ({"overwrite": True}, None),
        ({"save_probabilities": True}, None),
        ({}, rebuilt(bias=0.26)),
        ({}, rebuilt(threshold=0.41)),
        ({}, rebuilt(statistics={**STATISTICS, "G": replace(STATISTICS["G"], q99=20001)})),
        ({}, rebuilt(normalization_strategy="z-score")),
        ({}, other_pixels),
        ({}, lambda w: torch.set_num_threads(torch.get_num_threads() + 1)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_whatever_the_output_depends_on_makes_it_anew(work, options, change):
    assert work.predict() == 1
    assert work.predict() == 0
    threads = torch.get_num_threads()
    try:
        if change:
            change(work)
        assert work.predict(**options) == 1
        assert work.predict(**{**options, "overwrite": False}) == 0
    finally:
        torch.set_num_threads(threads)


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
