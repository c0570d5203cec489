"""Every value of every choice of `kelp train`: it learns, predicts, and survives the bundle."""

from __future__ import annotations

import typing

import pytest
import torch
from bundles import STATISTICS
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from kelp.config import TrainConfig
from kelp.inference.bundle import load_bundle, read_spec
from kelp.inference.spec import BundleSpec
from kelp.nn.bundle import load_network, save_bundle
from kelp.nn.data.dataset import Sample
from kelp.nn.device import resolve_precision, weights_dtype
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.nn.training.task import KelpTask
from kelp.raster.indices import INDICES
from kelp.raster.streaming import ChannelStats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

SIDE, STEPS = 64, 10
# Elsewhere: devices, which epoch is best, and compiling, which takes a minute each.
ELSEWHERE = {"device", "monitor_metric", "monitor_mode", "compile_mode"}
CHOICES = [
    (name, value)
    for name, field in TrainConfig.model_fields.items()
    if typing.get_origin(field.annotation) is typing.Literal and name not in ELSEWHERE
    for value in typing.get_args(field.annotation)
]
# What a choice needs around it.
BESIDE = {
    "index_input": {"spectral_indices": "NDVI,DEMWM"},
    "interpolation": {"resize_strategy": "resize", "image_size": 96},
    "lr_scheduler": {"epochs": 2},
}
FLAGS: list[tuple[str, object]] = [
    ("spectral_indices", "all"),
    ("ce_smooth_factor", 0.1),
    ("ce_class_weights", "0.5,3"),
    ("ema_decay", 0.9),
    ("accumulate_grad_batches", 2),
    ("fill_missing_pixels_with_torch_nan", False),
    ("bands", "NIR"),
    ("augment_dropout", 0.2),
    ("augment_offset", 0.01),
]


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def batch_to_learn_by_heart(side):
    """Two scenes; kelp is a square of bright NIR on dark water."""
    raw = torch.rand(2, 7, side, side, generator=torch.Generator().manual_seed(0)) * 400 + 7600
    raw[:, 5:] = 0.0
    target = torch.zeros(2, side, side, dtype=torch.uint8)
    target[0, 8:40, 8:40] = 1
    target[1, 20:60, 4:30] = 1
    raw[:, 1] += 6000 * target
    target[:, :3] = 255
    raw[:, :, -2:] = torch.nan
    return Sample(raw, target, torch.isfinite(raw[:, 1]))


@pytest.mark.parametrize(("name", "value"), CHOICES + FLAGS)
def test_it_learns_predicts_and_round_trips(name, value, tmp_path):
    small = {"decoder_channels": (32, 32, 16, 16, 16)}
    if name == "architecture" and value not in ("unet", "unet++", "manet"):
        small = {}
    side = 128 if value == "pan" else SIDE  # it pools more
    values = {
        "data_dir": tmp_path,
        "metadata_fp": tmp_path,
        "output_dir": tmp_path,
        "encoder": "tu-resnet18",
        "pretrained": False,
        "image_size": side,
        "lr": 0.05 if value == "sgd" else 2e-3,
        "precision": "32-true",
        "epochs": 1,
        "log_every_n_steps": 0,
        **small,
        **BESIDE.get(name, {}),
        name: value,
    }
    config = TrainConfig(**values)
    torch.manual_seed(0)
    batch = batch_to_learn_by_heart(side)
    spec = network_spec(config, (side, side))
    statistics = {**STATISTICS, **dict.fromkeys(INDICES, ChannelStats(-1, 1, 0, 0.3, -1, 1, 9, 0))}
    spec = spec.model_copy(update={"statistics": {k: statistics[k] for k in spec.channels}})
    net = KelpNet(spec)
    config = config.model_copy(update={"augment": name.startswith("augment_")})
    task, losses = KelpTask(net, config), Losses()
    precision = resolve_precision(config.precision, torch.device("cpu"))
    net.body.to(weights_dtype(precision))
    trainer = Trainer(
        max_epochs=config.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
        precision=precision if precision.endswith("-mixed") else "32-true",
        accumulate_grad_batches=config.accumulate_grad_batches,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    loader = DataLoader([batch] * (STEPS * config.accumulate_grad_batches), batch_size=None)
    trainer.fit(task, loader, DataLoader([batch], batch_size=None))
    assert torch.isfinite(torch.tensor(losses.seen)).all()
    assert min(losses.seen[-3:]) < 0.9 * losses.seen[0]

    net = task.scored.eval().float()
    described = BundleSpec(**spec.model_dump(), training=config.model_dump(mode="json"))
    folder = save_bundle(tmp_path / "bundle", net, described)
    with torch.inference_mode():
        p = net.probabilities(batch.raw)
        assert p.shape == batch.target.shape
        assert p.dtype == torch.float32
        assert ((p >= 0) & (p <= 1)).all()
        assert torch.equal(load_network(folder, read_spec(folder)).probabilities(batch.raw), p)
        torch.testing.assert_close(
            load_bundle(folder).net.module.probabilities(batch.raw), p, atol=2e-4, rtol=0
        )


def test_no_choice_is_left_out():
    names = {name for name, _ in CHOICES}
    assert {"architecture", "loss", "optimizer", "lr_scheduler", "normalization_strategy"} <= names
    assert len(CHOICES) > 40
