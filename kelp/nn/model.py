"""The network: raw digital numbers in, logits or probabilities out."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable
from typing import Any, Final, Self, get_args

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kelp.config import TrainConfig
from kelp.config.choices import Architecture, Precision
from kelp.errors import ConfigError
from kelp.inference.spec import NetworkSpec
from kelp.nn.device import compute_dtype
from kelp.nn.preprocess import Preprocess
from kelp.nn.resize import pick, to_network, to_scene
from kelp.raster.bands import MASK_NODATA
from kelp.raster.window import Shape

_SMP_NAMES: Final = {"unet++": "unetplusplus", "deeplabv3+": "deeplabv3plus"}
_WITH_DECODER_CHANNELS: Final = ("unet", "unet++", "manet")
_WITH_ATTENTION: Final = ("unet", "unet++")


class KelpNet(nn.Module):
    """Preprocessing, resizing and a segmentation network in one module.

    `forward` gives logits at the network's resolution (for the loss); `probabilities` gives
    probabilities at the resolution of the input. One output channel: p = sigmoid(logit).

    A `resize` network brings its input to `image_size` x `image_size`; a `pad` network pads it
    evenly with "missing" to `image_size`, or, for an input of another size than it was trained
    on, to the next multiple of 32.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = Preprocess(spec)
        self.body = ARCHITECTURES[spec.architecture](spec)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw DN `(n, 7, h, w)` to float32 logits `(n, H, W)` at network resolution."""
        if self.spec.resize_strategy == "pad":
            x = self.preprocess(F.pad(raw, self._padding(Shape.of(raw)), value=torch.nan))
        else:
            side, interpolation = self.spec.image_size, self.spec.interpolation
            x = to_network(self.preprocess(raw), side, interpolation)
        dtype = next(self.body.parameters()).dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        logits: Tensor = self.body(x)[:, 0].float()
        return logits

    def probabilities(self, raw: Tensor) -> Tensor:
        """Raw DN `(n, 7, h, w)` to float32 probabilities `(n, h, w)` at input resolution."""
        logits = self(raw)
        if self.spec.temperature != 1:
            logits = logits / self.spec.temperature
        return self.to_input(torch.sigmoid(logits), Shape.of(raw))

    def on(self, device: torch.device, precision: Precision) -> Self:
        """The network on `device`, its weights in that precision; the caller's keeps its type."""
        dtype = compute_dtype(precision)
        if dtype == torch.float32:
            return self.to(device)
        net = copy.deepcopy(self)
        if precision.endswith("-true"):
            net.body.to(dtype)
        else:  # autocast would convert these weights again for every batch
            for module in net.body.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    module.to(dtype)
        return net.to(device)

    def described(self, spec: NetworkSpec) -> Self:
        """The same weights for another tile, size or interpolation."""
        net = copy.copy(self)
        net.spec = spec
        return net

    def to_input(self, p: Tensor, shape: Shape) -> Tensor:
        """Probabilities `(n, H, W)` at network resolution back at that of an input of `shape`.

        They are averaged down, not picked: the network saw finer pixels (see `resize`).
        """
        if self.spec.resize_strategy == "pad":
            height, width = shape
            left, _, top, _ = self._padding(shape)
            return p[:, top : top + height, left : left + width]
        return to_scene(p, shape, self.spec.interpolation)

    def resize_target(self, target: Tensor) -> Tensor:
        """A mask `(n, h, w)` uint8 at network resolution; padding is 255 (ignored)."""
        if self.spec.resize_strategy == "pad":
            return F.pad(target, self._padding(Shape.of(target)), value=MASK_NODATA)
        return pick(target, self.spec.image_size, self.spec.interpolation)

    def _padding(self, shape: Shape) -> tuple[int, int, int, int]:
        """Left, right, top and bottom padding of an input of `shape`."""
        padded = self.spec.network_shape(shape)
        extra_y, extra_x = (network - own for network, own in zip(padded, shape, strict=True))
        return extra_x // 2, extra_x - extra_x // 2, extra_y // 2, extra_y - extra_y // 2


KELP_SHARE: Final = 0.01
"""Probability of kelp that a training starts from; the competition's images hold 0.7 %."""


@torch.no_grad()
def start_from_share(net: KelpNet, share: float = KELP_SHARE) -> None:
    """Let an untrained network say `share` everywhere (Lin et al. 2017, section 4.1).

    From 0.5, a hundred times too much, the first steps only learn to say less: they push every
    weight the same way at the highest rates of the training, and a region loss has no slope left
    where they end.
    """
    heads = [m for m in net.body.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1]
    bias = heads[-1].bias if heads else None  # of attention blocks before it, too
    if bias is not None:
        bias.fill_(math.log(share / (1 - share)))


def build_smp(spec: NetworkSpec) -> nn.Module:
    """A network of segmentation_models_pytorch, with random weights.

    Raises:
        ConfigError: architecture, encoder and decoder do not go together.
    """
    check_encoder(spec.encoder)
    options: dict[str, Any] = {"encoder_depth": len(spec.decoder_channels)}
    default = TrainConfig.model_fields
    for name, architectures in (
        ("decoder_channels", _WITH_DECODER_CHANNELS),
        ("decoder_attention_type", _WITH_ATTENTION),
    ):
        value = getattr(spec, name)
        if spec.architecture in architectures:
            options[name] = None if value == "none" else value
        elif value != default[name].default:
            raise ConfigError(f"--{name}: the architecture {spec.architecture} has no such setting")
    if spec.architecture == "pspnet":  # smp's default fits three stages only
        options["upsampling"] = 2 ** len(spec.decoder_channels)
    try:
        body: nn.Module = smp.create_model(
            _SMP_NAMES.get(spec.architecture, spec.architecture),
            encoder_name=spec.encoder,
            encoder_weights=None,
            in_channels=len(spec.channels),
            classes=1,
            **options,
        )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        # smp has no error type of its own for pairs that do not go together.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--architecture {spec.architecture} cannot be built on --encoder {spec.encoder} "
            f"with {len(spec.decoder_channels)} stages ({reason}); choose another encoder"
        ) from error
    return body.to(memory_format=torch.channels_last)


ARCHITECTURES: Final[dict[str, Callable[[NetworkSpec], nn.Module]]] = dict.fromkeys(
    get_args(Architecture), build_smp
)
"""What builds the network of each architecture: `(n, channels, H, W)` to `(n, 1, H, W)` logits."""


def check_encoder(name: str) -> None:
    """Raise `ConfigError`, with the nearest names, unless timm has the encoder `tu-<name>`."""
    bare = name.removeprefix("tu-")
    if name.startswith("tu-") and timm.is_model(bare.partition(".")[0]):
        return
    known = timm.list_models()
    near = difflib.get_close_matches(bare.replace("-", "_"), known, n=3) or ["efficientnet_b5"]
    raise ConfigError(
        f"--encoder {name}: not an encoder of timm; did you mean "
        + " or ".join(f"tu-{candidate}" for candidate in near)
    )
