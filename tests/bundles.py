"""A network small enough for tests: real preprocessing, real files, one 1x1 convolution."""

from pathlib import Path

import torch
from torch import nn

from kelp.inference.spec import BundleSpec
from kelp.nn.bundle import save_bundle
from kelp.nn.model import ARCHITECTURES, KelpNet
from kelp.raster.bands import BANDS
from kelp.raster.streaming import ChannelStats

STATISTICS = {
    **{name: ChannelStats(6000, 30000, 9000, 1500, 7000, 20000, 1000, 0) for name in BANDS},
    "QA": ChannelStats(0, 1, 0, 1, 0, 1, 1000, 0),
    "DEM": ChannelStats(0, 300, 20, 30, 0, 200, 1000, 0),
}


class PixelBody(nn.Module):
    """A network that decides pixel by pixel: more NIR than red is kelp."""

    def __init__(self, channels: tuple[str, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(len(channels), 1, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.fill_(-0.5)
            self.conv.weight[0, channels.index("NIR")] = 20
            self.conv.weight[0, channels.index("R")] = -20

    def forward(self, x):
        return self.conv(x)


def use_pixel_network(monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: PixelBody(spec.channels))


def tiny_spec(**changes) -> BundleSpec:
    values = {
        "bands": BANDS,
        "spectral_indices": (),
        "index_input": "dn",
        "mask_using_qa": True,
        "mask_using_water_mask": True,
        "fill_missing_pixels_with_torch_nan": True,
        "normalization_strategy": "quantile",
        "interpolation": "nearest",
        "architecture": "unet",
        "decoder_channels": (256, 128, 64, 32, 16),
        "decoder_attention_type": "none",
        "statistics": STATISTICS,
        "sahi": True,
        "tile_size": (32, 32),
        "image_size": 64,
        "resize_strategy": "resize",
        "encoder": "tu-resnet18",
        "threshold": 0.4,
    }
    return BundleSpec(**{**values, **changes})


def tiny_bundle(folder: Path, **changes) -> Path:
    """Save a bundle; the caller decides which body it has (see `use_pixel_network`)."""
    torch.manual_seed(0)
    spec = tiny_spec(**changes)
    return save_bundle(folder, KelpNet(spec), spec)


def mlflow_client(output_dir: Path):
    """The store of the runs in a folder."""
    from kelp.nn.training.tracking import quiet_libraries

    with quiet_libraries():
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
