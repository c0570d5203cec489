"""Writing bundles, and reading their networks with torch; see `kelp.inference.bundle`."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

import kelp
from kelp.errors import BundleError
from kelp.inference.backends.trees import PixelTrees
from kelp.inference.bundle import (
    CARD_FILE,
    SPEC_FILE,
    checked_weights,
    weights_path,
)
from kelp.inference.spec import BundleSpec
from kelp.io.files import atomic_folder, file_sha256, write_json, write_text
from kelp.nn.card import model_card
from kelp.nn.model import KelpNet


def save_bundle(
    folder: Path, net: KelpNet | PixelTrees, spec: BundleSpec, attachments: Sequence[Path] = ()
) -> Path:
    """Write a bundle; it appears under `folder` only when complete, replacing an older one.

    `attachments` (the statistics file) are copied into it under their own names.
    """
    with atomic_folder(folder) as partial:
        weights, versions = weights_path(partial, spec), _versions()
        if isinstance(net, PixelTrees):
            write_text(weights, net.text)
            versions["lightgbm"] = net.version
        else:
            state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
            safetensors.torch.save_file(state, weights)
        update = {"weights_sha256": file_sha256(weights), "versions": versions}
        spec = spec.model_copy(update=update)
        for file in attachments:
            shutil.copyfile(file, partial / file.name)
        describe_bundle(partial, spec)
    return folder


def describe_bundle(folder: Path, spec: BundleSpec) -> None:
    """Write what a bundle says of its weights: `bundle.json` and the model card."""
    write_text(folder / CARD_FILE, model_card(spec, SPEC_FILE))
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))


def load_network(folder: Path, spec: BundleSpec) -> KelpNet:
    """The network of a bundle in evaluation mode, its weights checked by hash."""
    weights = checked_weights(folder, spec)
    net = KelpNet(spec)
    try:
        net.load_state_dict(safetensors.torch.load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{weights}: does not fit the network of {SPEC_FILE}") from error
    return net.eval().to(memory_format=torch.channels_last)


def _versions() -> dict[str, str]:
    return {
        "kelp": kelp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
