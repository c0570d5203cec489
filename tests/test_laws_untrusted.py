"""Law 9, no code from data, against what would run some."""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from bundles import tiny_spec
from laws import biased_bundle

from kelp.config import PredictConfig
from kelp.data_prep.stats import StatsFile
from kelp.errors import BundleError, ConfigError, InputError, KelpError, StatsError, WeightsError
from kelp.inference.bundle import load_bundle
from kelp.nn.bundle import save_bundle
from kelp.nn.model import KelpNet
from kelp.nn.pretrained import load_pretrained
from kelp.nn.training.history import read_checkpoint


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "pickle of today", "torch", "torch of tensors"])
def hostile(request, tmp_path):
    """A file of weights that would leave a mark, and the mark."""
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    if "pickle" in request.param:
        protocol = pickle.DEFAULT_PROTOCOL if "today" in request.param else 2
        path.write_bytes(pickle.dumps(Hostile(marker), protocol=protocol))
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


@pytest.mark.parametrize(
    "spelling",
    [
        "__import__('os').mkdir('{marker}')",
        "!!python/object/apply:os.mkdir ['{marker}']",
        "{{'schema_version': __import__('os').mkdir('{marker}')}}",
    ],
)
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
