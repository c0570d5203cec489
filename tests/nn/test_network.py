"""Preprocessing, networks, pretrained encoders and bundles."""

import json
import os
import shutil
import time
from dataclasses import asdict
from functools import partial
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from bundles import STATISTICS, tiny_bundle, tiny_spec, use_pixel_network
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from kelp.config import TrainConfig
from kelp.config.choices import Architecture
from kelp.errors import BundleError, ConfigError, StatsError, WeightsError
from kelp.inference.backends import Processor
from kelp.inference.bundle import find_bundle, load_bundle
from kelp.inference.spec import NetworkSpec
from kelp.nn.device import Float32Depthwise
from kelp.nn.model import ARCHITECTURES, KelpNet, start_from_share
from kelp.nn.preprocess import Preprocess
from kelp.nn.pretrained import load_pretrained, packaged_weights
from kelp.nn.resize import to_network, to_scene
from kelp.raster.bands import BANDS
from kelp.raster.streaming import ChannelStats

NIR, QA, DEM = (BANDS.index(name) for name in ("NIR", "QA", "DEM"))


def raw(shape=(2, 7, 9, 12), seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(1, 65536, shape).astype(np.float32))
    x[:, :QA][torch.from_numpy(rng.random((shape[0], 5, *shape[2:])) < 0.2)] = torch.nan
    x[:, QA] = torch.from_numpy((rng.random((shape[0], *shape[2:])) < 0.3).astype(np.float32))
    x[:, DEM] = torch.from_numpy(rng.integers(0, 100, (shape[0], *shape[2:])).astype(np.float32))
    x[0, DEM, 0] = torch.nan
    return x


def plain(**changes):
    values = tiny_spec(**changes).model_dump()
    return NetworkSpec(**{name: values[name] for name in NetworkSpec.model_fields})


def test_quantile_normalisation_by_hand():
    x = raw()
    out = Preprocess(plain())(x)
    stats = STATISTICS["NIR"]
    nir = x[:, NIR].nan_to_num(nan=stats.min)
    expected = ((nir - stats.q01) / (stats.q99 - stats.q01)).clamp(-10, 10)
    torch.testing.assert_close(out[:, NIR], expected)
    torch.testing.assert_close(out[:, QA], x[:, QA])


@pytest.mark.parametrize(
    ("strategy", "offset", "divisor"),
    [
        ("quantile", "q01", ("q99", "q01")),
        ("z-score", "mean", "std"),
        ("min-max", "min", ("max", "min")),
    ],
)
def test_strategies(strategy, offset, divisor):
    stats = STATISTICS["G"]
    width = (
        getattr(stats, divisor)
        if isinstance(divisor, str)
        else getattr(stats, divisor[0]) - getattr(stats, divisor[1])
    )
    x = torch.full((1, 7, 2, 2), 9000.0)
    out = Preprocess(plain(normalization_strategy=strategy, bands=("G",)))(x)
    torch.testing.assert_close(out, torch.full_like(out, (9000 - getattr(stats, offset)) / width))


@pytest.mark.parametrize(("as_nan", "fill"), [(True, STATISTICS["NIR"].min), (False, 0.0)])
@pytest.mark.parametrize("missing", [torch.nan, -32768.0])
def test_the_fill_rule(as_nan, fill, missing):
    x = torch.full((1, 7, 1, 1), missing)
    spec = plain(bands=("NIR", "QA"), fill_missing_pixels_with_torch_nan=as_nan)
    stats = STATISTICS["NIR"]
    out = Preprocess(spec)(x)
    assert out[0, 0].item() == pytest.approx((fill - stats.q01) / (stats.q99 - stats.q01))
    assert out[0, 1].item() == 1  # unknown QA is bad


@pytest.mark.parametrize(
    ("strategy", "tail"),
    [
        ("per-sample-quantile", 0.01),
        ("per-sample-min-max", 0.0),
    ],
)
@pytest.mark.parametrize("as_nan", [True, False])
def test_per_sample_strategies(strategy, tail, as_nan):
    x = raw((3, 7, 12, 15))
    x[1, NIR] = torch.nan  # nothing observed
    x[2, NIR] = 9000.0  # no range
    x[2, NIR, 0, 0] = -32768.0
    spec = plain(normalization_strategy=strategy, fill_missing_pixels_with_torch_nan=as_nan)
    out = Preprocess(spec)(x)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:, QA], x[:, QA])
    nir = x[0, NIR].numpy()
    low, high = np.nanquantile(nir, tail), np.nanquantile(nir, 1 - tail)
    filled = np.where(np.isnan(nir), np.nanmin(nir) if as_nan else 0, nir)
    expected = np.clip((filled - low) / (high - low), -10, 10).astype(np.float32)
    np.testing.assert_allclose(out[0, NIR], expected, atol=2e-5)
    assert (out[1, NIR] == 0).all()
    assert (out[2, NIR, 1:] == 0).all()
    assert out[2, NIR, 0, 0] == (0 if as_nan else -10)
    # Each sample for itself, whatever is beside it; and one cut out has a range of its own.
    torch.testing.assert_close(Preprocess(spec)(x[:1]), out[:1], rtol=0, atol=0)
    assert not torch.equal(Preprocess(spec)(x[:1, :, :5]), out[:1, :, :5])


def test_indices_are_masked_and_bands_are_not():
    statistics = {**STATISTICS, "NDVI": ChannelStats(-1, 1, 0, 0.3, -0.5, 0.5, 10, 0)}
    x = raw()
    out = {}
    for qa, water in ((False, False), (True, True)):
        spec = plain(
            spectral_indices=("NDVI",),
            statistics=statistics,
            mask_using_qa=qa,
            mask_using_water_mask=water,
        )
        out[qa] = Preprocess(spec)(x)
    torch.testing.assert_close(out[True][:, :7], out[False][:, :7])
    bad = (x[:, QA] == 1) | (x[:, DEM] > 0)
    fill = (statistics["NDVI"].min - -0.5) / 1.0
    assert (out[True][:, 7][bad] == fill).all()
    torch.testing.assert_close(out[True][:, 7][~bad], out[False][:, 7][~bad])


@settings(max_examples=20)
@given(seed=st.integers(0, 99), y=st.integers(0, 4), x=st.integers(0, 4))
def test_preprocessing_works_pixel_by_pixel(seed, y, x):
    """So that cutting a scene first, or its preprocessed channels, is the same."""
    pre, batch = Preprocess(plain()), raw(seed=seed)
    assert torch.equal(
        pre(batch)[:, :, y : y + 4, x : x + 5], pre(batch[:, :, y : y + 4, x : x + 5])
    )
    assert torch.isfinite(pre(batch)).all()


def test_statistics_must_cover_the_channels():
    few = {name: STATISTICS[name] for name in BANDS if name != "SWIR"}
    with pytest.raises(StatsError, match="lack the channel SWIR"):
        Preprocess(plain(statistics=few))


class Recorder(nn.Module):
    """Stands for the network: answers its first channel, remembers the shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        self.seen = x
        return x[:, :1]


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: Recorder())


@pytest.mark.parametrize("interpolation", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("side", [32, 96])
def test_resizing_goes_up_and_down(recorder, interpolation, side):
    net = KelpNet(plain(image_size=side, interpolation=interpolation, tile_size=(40, 56)))
    batch = torch.full((2, 7, 40, 56), 9000.0)
    p = net.probabilities(batch)
    assert net.body.seen.shape == (2, 7, side, side)
    assert p.shape == (2, 40, 56)
    torch.testing.assert_close(p, torch.full_like(p, p.mean().item()))
    assert net.resize_target(torch.zeros(2, 40, 56, dtype=torch.uint8)).shape == (2, side, side)


@pytest.mark.parametrize(
    ("shape", "network"),
    [((350, 350), (352, 352)), ((128, 128), (128, 128)), ((100, 161), (128, 192))],
)
def test_padding_keeps_pixels_in_place(recorder, shape, network):
    net = KelpNet(plain(resize_strategy="pad", image_size=352, tile_size=(350, 350)))
    batch = raw((1, 7, *shape))
    p = net.probabilities(batch)
    assert net.body.seen.shape[-2:] == network
    torch.testing.assert_close(p, torch.sigmoid(net.preprocess(batch)[:, 0]))
    target = net.resize_target(torch.ones(1, *shape, dtype=torch.uint8))
    assert target.shape[-2:] == network
    assert (target == 255).sum() == np.prod(network) - np.prod(shape)


def test_labels_and_pixels_stay_together_when_resized(recorder):
    """A bright pixel and its label land on the same pixels of the crop."""
    for interpolation in ("nearest", "bilinear"):
        net = KelpNet(plain(image_size=320, interpolation=interpolation, tile_size=(128, 128)))
        batch = torch.full((1, 7, 128, 128), 7000.0)
        mask = torch.zeros(1, 128, 128, dtype=torch.uint8)
        batch[0, 0, 40:60, 70:90], mask[0, 40:60, 70:90] = 20000.0, 1
        net(batch)
        bright = net.body.seen[0, 0] > 0.5
        agree = bright == (net.resize_target(mask)[0] == 1)
        corners = 0 if interpolation == "nearest" else 4  # a blend of four pixels
        assert (~agree).sum() <= corners, interpolation


@settings(max_examples=60)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    more=st.integers(0, 90),
    interpolation=st.sampled_from(["nearest", "nearest-exact"]),
    seed=st.integers(0, 99),
)
def test_what_the_network_copies_comes_back_exactly(height, width, more, interpolation, seed):
    x = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed))
    side = max(height, width) + more
    up = to_network(x[:, None], side, interpolation)[:, 0]
    back = to_scene(up, (height, width), interpolation)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)  # means of up to 80 copies


@pytest.mark.parametrize("interpolation", ["nearest", "nearest-exact"])
def test_no_single_pixel_is_lost_at_the_seeds_ratio(interpolation):
    x = (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.02).float()
    back = to_scene(to_network(x, 320, interpolation)[:, 0], (128, 128), interpolation)
    assert torch.equal(back >= 0.48, x[:, 0] == 1)


@settings(max_examples=40)
@given(height=st.integers(1, 60), width=st.integers(1, 60), side=st.integers(1, 120))
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_coming_back_keeps_constants_means_and_bounds(interpolation, height, width, side):
    p = torch.rand(2, side, side, generator=torch.Generator().manual_seed(side))
    back = to_scene(p, (height, width), interpolation)
    assert back.min() >= p.min() - 1e-6
    assert back.max() <= p.max() + 1e-6
    constant = to_scene(torch.full_like(p, 0.3), (height, width), interpolation)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))
    if interpolation != "nearest" and side >= max(height, width):
        torch.testing.assert_close(back.mean(), p.mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    get_args(Architecture),
)
def test_every_architecture_builds_and_runs(architecture):
    net = KelpNet(plain(architecture=architecture, image_size=128)).eval()
    with torch.inference_mode():
        assert net(raw((2, 7, 32, 32))).shape == (2, 128, 128)


def test_wrong_networks_are_named():
    with pytest.raises(ConfigError, match="did you mean tu-efficientnet_b5"):
        KelpNet(plain(encoder="efficientnet-b5"))
    with pytest.raises(ConfigError, match=r"encoder tu-resnet9000.*did you mean"):
        KelpNet(plain(encoder="tu-resnet9000"))
    with pytest.raises(ConfigError, match="fpn has no such setting"):
        KelpNet(plain(architecture="fpn", decoder_channels=(64, 32, 16)))
    net = KelpNet(plain(decoder_channels=(64, 32, 16), decoder_attention_type="scse"))
    assert net(raw((2, 7, 32, 32))).shape == (2, 64, 64)


@pytest.mark.slow
def test_the_packaged_encoder_is_really_pretrained():
    spec = plain(encoder="tu-tf_efficientnet_lite0", bands=("NIR", "R", "G", "B"))
    torch.manual_seed(0)
    net = KelpNet(spec)
    load_pretrained(net, "imagenet")
    weights = packaged_weights()
    first = net.body.encoder.model.conv_stem.weight
    torch.testing.assert_close(first[:, 1:] * 4 / 3, weights["conv_stem.weight"])
    torch.testing.assert_close(first[:, 0] * 4 / 3, weights["conv_stem.weight"].mean(dim=1))
    deep = "blocks.5.0.conv_pwl.weight"
    torch.testing.assert_close(net.body.encoder.model.state_dict()[deep], weights[deep])


@pytest.mark.slow
def test_a_local_file_of_weights(tmp_path):
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    safetensors.torch.save_file(state, tmp_path / "r.safetensors")
    torch.save(state, tmp_path / "r.pth")
    for name in ("r.safetensors", "r.pth"):
        net = KelpNet(plain(bands=("R", "G", "B")))
        load_pretrained(net, str(tmp_path / name))
        torch.testing.assert_close(net.body.encoder.model.conv1.weight, state["conv1.weight"])
    net = KelpNet(plain(encoder="tu-resnet34"))
    with pytest.raises(WeightsError, match="do not fit resnet34"):
        load_pretrained(net, str(tmp_path / "r.pth"))


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    net = KelpNet(plain())
    with pytest.raises(WeightsError, match="no such file"):
        load_pretrained(net, str(tmp_path / "absent.pth"))
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="not a file of weights"):
        load_pretrained(net, str(tmp_path / "bad.pth"))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, and a hub where nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_a_hub_that_does_not_answer_is_not_waited_for(hub_cache):
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"encoder_weights FILE.*pretrained=False"):
        load_pretrained(KelpNet(plain()), "imagenet")
    assert time.monotonic() - started < 15  # its own retries take 23 s
    assert not constants.HF_HUB_OFFLINE


def test_weights_in_the_cache_need_no_hub(hub_cache):
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    snapshot = hub_cache / "models--timm--resnet18.a1_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    net = KelpNet(plain(bands=("R", "G", "B")))
    load_pretrained(net, "imagenet")
    torch.testing.assert_close(net.body.encoder.model.conv1.weight, state["conv1.weight"])


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    return tiny_bundle(tmp_path / "run" / "artifacts" / "bundle", scores={"val/dice": 0.5})


def test_a_bundle_is_the_same_network_anywhere(bundle, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(bundle, moved)
    one, two = load_bundle(bundle), load_bundle(moved)
    assert one.spec == two.spec
    assert not one.net.module.training
    x = raw((1, 7, 32, 32))
    assert torch.equal(one.net.module.probabilities(x), two.net.module.probabilities(x))
    assert sorted(p.name for p in moved.iterdir()) == [
        "README.md",
        "bundle.json",
        "weights.safetensors",
    ]
    assert "val/dice: 0.5000" in (moved / "README.md").read_text()


def test_a_bundle_is_found_from_its_run(bundle):
    run = bundle.parent.parent
    assert find_bundle(run) == find_bundle(run / "artifacts") == find_bundle(bundle) == bundle
    with pytest.raises(BundleError, match="no complete bundle-latest"):
        find_bundle(run, "latest")
    with pytest.raises(BundleError, match="no such folder"):
        find_bundle(run / "x")


def edit(bundle, **changes):
    path = bundle / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ODD_NUMBERS = [
    {"tile_size": [-64, -64]},
    {"tile_size": [0, 32]},
    {"tile_size": [2**31, 2**31]},
    {"image_size": -32},
    {"image_size": 33},
    {"image_size": 2**70},
    {"prediction_tile": -1},
    {"prediction_overlap": -1},
    {"prediction_overlap": 32},
    {"water_levels": [1, 2]},
    {"water_levels": [-1] * 5},
    {"decoder_channels": [0, 4]},
    {"decoder_channels": [2**40]},
    {"bands": []},
    {"temperature": float("inf")},
    {"epoch": -1},
    {"statistics": {"R": asdict(STATISTICS["R"]) | {"std": -1}}},
    {"statistics": {"R": asdict(STATISTICS["R"]) | {"mean": float("nan")}}},
    {"statistics": {"R": asdict(STATISTICS["R"]) | {"max": -1}}},
]


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (lambda b: (b / "weights.safetensors").unlink(), "missing"),
        (lambda b: os.truncate(b / "weights.safetensors", 100), "altered or truncated"),
        (lambda b: (b / "bundle.json").write_text("{"), "not readable as JSON"),
        (lambda b: (b / "bundle.json").write_text("[]"), "schema version None"),
        (lambda b: edit(b, schema_version=99), "schema version 99 is unknown"),
        (lambda b: edit(b, threshold=2), "threshold"),
        (lambda b: edit(b, surprise=1), "surprise"),
        *[(partial(edit, **change), next(iter(change))) for change in ODD_NUMBERS],
        (lambda b: edit(b, bands=["NIR", "R"]), "does not fit"),
        (lambda b: (b / "bundle.json").unlink(), "no complete bundle"),
    ],
)
def test_harmed_bundles_are_refused(bundle, harm, cause):
    harm(bundle)
    with pytest.raises(BundleError, match=cause):
        load_bundle(bundle)


def test_a_killed_write_leaves_no_bundle(bundle):
    (bundle.parent / ".kelp-host-1-0a1b2c3d.partial").mkdir()
    with pytest.raises(BundleError):
        find_bundle(bundle.parent / "bundle-2")


def test_the_seeds_options_make_the_seeds_network():
    config = TrainConfig(
        data_dir="d",
        metadata_fp="m",
        output_dir="o",
        bands="R,G,B,SWIR,NIR,QA,DEM",
        image_size=320,
        resize_strategy="resize",
        interpolation="nearest",
        normalization_strategy="quantile",
    )
    assert config.bands == ("R", "G", "B", "SWIR", "NIR", "QA", "DEM")
    assert config.encoder == "tu-efficientnet_b5"


def test_another_precision_leaves_the_bundle_as_it_is(bundle):
    loaded = load_bundle(bundle)
    with torch.no_grad():
        loaded.net.module.body.conv.weight[0, 0] = 20.123  # no bf16 number
    before = {k: v.clone() for k, v in loaded.net.module.state_dict().items()}
    for precision in ("bf16-true", "16-true"):
        loaded.on(Processor("cpu", precision, 1))
    after = loaded.net.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bundle_itself_is_what_it_is(bundle, caplog):
    with caplog.at_level("INFO", "kelp"):
        assert find_bundle(bundle, "latest") == bundle
    assert "changes nothing" in caplog.text


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_network_can_be_trained_after_it_predicted(interpolation):
    """What resizing keeps from a prediction once was of no use to autograd."""
    x = torch.rand(1, 2, 23, 29)
    with torch.inference_mode():
        to_scene(to_network(x, 64, interpolation)[:, 0], (23, 29), interpolation)
    x = x.clone().requires_grad_()
    p = to_scene(to_network(x, 64, interpolation)[:, 0], (23, 29), interpolation)
    p.sum().backward()
    assert x.grad[:, 0].sum() == pytest.approx(23 * 29, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("unet", {"decoder_attention_type": "scse"}),
        ("fpn", {}),
        ("linknet", {}),
        ("manet", {}),
        ("deeplabv3+", {}),
        ("pspnet", {}),
    ],
)
def test_a_training_starts_from_little_kelp(architecture, changes):
    torch.manual_seed(0)
    spec = plain(
        architecture=architecture,
        encoder="tu-resnet18",
        decoder_channels=(256, 128, 64, 32, 16),
        image_size=64,
        tile_size=(64, 64),
        **changes,
    )
    net = KelpNet(spec).train()
    x = raw((2, 7, 64, 64))
    start_from_share(net, 0.5)
    torch.manual_seed(0)
    before = net(x)
    start_from_share(net, 0.01)
    torch.manual_seed(0)
    # The offset of all logits changed, by exactly the odds of that share, and nothing else.
    torch.testing.assert_close(net(x), before + np.log(0.01 / 0.99), atol=1e-4, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_only_depthwise_convolutions_train_in_float32(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=groups)
    x = torch.randn(2, 8, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.conv2d:
                seen.append((torch.is_autocast_enabled("cpu"), args[0].dtype))
            return function(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16), Float32Depthwise():
        made = conv(x)
    assert made.dtype == torch.bfloat16
    depthwise = groups == 8
    assert seen == [(not depthwise, torch.float32 if depthwise else torch.bfloat16)]
    made.float().sum().backward()
    slopes = x.grad.clone(), conv.weight.grad.clone()
    x.grad = conv.weight.grad = None
    conv(x.float()).sum().backward()
    for slope, exact in zip(slopes, (x.grad, conv.weight.grad), strict=True):
        torch.testing.assert_close(slope, exact, atol=0.02, rtol=0.02)


def test_without_autocast_depthwise_convolutions_keep_their_type():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    x = torch.randn(1, 4, 5, 5)
    with Float32Depthwise():
        torch.testing.assert_close(conv(x), conv(x), atol=0, rtol=0)
        assert conv.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
