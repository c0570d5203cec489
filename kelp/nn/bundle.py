"""Writing bundles and their model cards, and reading their networks with torch.

See `kelp.inference.bundle`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

import kelp
from kelp.config import TrainConfig
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


_FRONT_MATTER: Final = (
    "---",
    "library_name: kelp-slicer",
    "pipeline_tag: image-segmentation",
    "tags: [remote-sensing, landsat, kelp]",
    "---",
    "",
)
"""What Hugging Face's hub reads of a card."""

_LIMITS: Final = (
    "- Scores are agreement with the labels it was validated on. Volunteer labels of kelp",
    "  are themselves noisy; a score near 0.7 may be close to what they allow.",
    "- It has seen the sensors, coasts and seasons of its training data only.",
)


def model_card(spec: BundleSpec, spec_file: str) -> str:
    """The card as Markdown; `spec_file` is the name of the file that holds the rest."""
    return "\n".join(
        [
            *_FRONT_MATTER,
            "# Kelp canopy segmentation model",
            "",
            f"Made by `{_maker(spec)}`; apply it with `kelp predict --run_dir <this folder>`.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _facts(spec, spec_file)),
            "",
            "## Scores on the validation fold",
            "",
            _scored(spec),
            "",
            *(_score_lines(spec.scores) or ["None recorded."]),
            "",
            "## Limits",
            "",
            *([f"- {limit}" for limit in spec.limits] or _LIMITS),
            *_pixelwise_lines(spec),
            *_calibration_lines(spec),
            "- The map shows presence, not canopy area.",
            "- Tides hide canopy: do not compare dates without them.",
            "",
        ]
    )


def _facts(spec: BundleSpec, spec_file: str) -> list[tuple[str, str]]:
    data = spec.training
    return [
        *(_trees(spec) if spec.is_pixelwise else _network(spec)),
        ("Input", f"{', '.join(spec.channels)}; raw Landsat Collection-2 Level-2 integers"),
        ("Normalisation", f"{spec.normalization_strategy}, numbers in {spec_file}"),
        ("Threshold", f"{spec.threshold:g}"),
        ("Tuned on", spec.tuning.get("scenes", "nothing: the threshold is the usual one")),
        ("Trained on", _data(spec)),
        *(_tree_options(data) if spec.is_pixelwise else _options(data)),
        ("Made with", ", ".join(f"{name} {v}" for name, v in spec.versions.items()) or "unknown"),
    ]


def _maker(spec: BundleSpec) -> str:
    return str(spec.training.get("command", f"kelp {'baseline' if spec.is_pixelwise else 'train'}"))


def _scored(spec: BundleSpec) -> str:
    """What the scores are of."""
    if "command" in spec.training:
        return f"Pooled over the observed pixels of {spec.tuning['scenes']}, clean truth."
    which = "all trees" if spec.is_pixelwise else f"epoch {spec.epoch}"
    return f"Of {which}, pooled over the observed pixels; kelp where the probability is >= 0.5."


def _network(spec: BundleSpec) -> list[tuple[str, str]]:
    how = f"tiles of {spec.tile_size[0]} x {spec.tile_size[1]} px" if spec.sahi else "whole images"
    return [
        ("Network", f"{spec.architecture}, encoder {spec.encoder}"),
        ("Applied to", f"{how}, {spec.resize_strategy} to {spec.image_size} px"),
        ("Epoch", str(spec.epoch)),
    ]


def _trees(spec: BundleSpec) -> list[tuple[str, str]]:
    return [
        ("Model", f"{spec.epoch} boosted trees (LightGBM)"),
        ("Applied to", "each pixel on its own"),
    ]


def _data(spec: BundleSpec) -> str:
    """Folder, table, fold and how many rows of it."""
    data, rows = spec.training, spec.rows
    if "command" in data:
        return f"{rows['train']:,} simulated scenes ({data['scenes']})"
    where = f"{data.get('data_dir', 'unknown')}, fold {data.get('cv_split', '?')}"
    if "metadata_fp" in data:
        where += f" of {data['metadata_fp']}"
    if {"train", "val"} <= rows.keys():
        kind = "tiles" if spec.sahi else "images"
        where += f": {rows['train']:,} {kind}, validated on {rows['val']:,} others"
    return where


def _options(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options of `kelp train` that make the most of a difference; the file has them all."""
    if "encoder_weights" not in data:
        return []
    # Options that a run of an older version lacks did what their defaults do.
    data = {name: field.default for name, field in TrainConfig.model_fields.items()} | dict(data)
    start = f"weights {data['encoder_weights']}" if data["pretrained"] else "random weights"
    course = "" if data["lr_scheduler"] == "none" else f", {data['lr_scheduler']}"
    drawn = f"{data['samples_per_epoch']:,} drawn by weight each epoch"
    parts = (
        (data["accumulate_grad_batches"], "batches make a step"),
        (data["devices"], "processes"),
        (data["num_nodes"], "machines"),
    )
    times = "".join(f", {number} {words}" for number, words in parts if number != 1)
    averaged = "SWA" if data["swa"] else f"EMA {data['ema_decay']:g}" if data["ema_decay"] else ""
    return [
        ("Started from", start),
        ("Loss", data["loss"]),
        (
            "Optimizer",
            f"{data['optimizer']}, rate {data['lr']:g}{course}, "
            f"weight decay {data['weight_decay']:g}",
        ),
        (
            "Steps",
            f"at most {data['epochs']} epochs, batches of {data['batch_size']}{times}; "
            f"{data['precision']}",
        ),
        ("Samples", drawn if data["use_weighted_sampler"] else "each row once an epoch"),
        ("Augmentation", _augmentation(data)),
        *([("Average of weights", averaged)] if averaged else []),
        ("Best epoch by", data["monitor_metric"]),
        ("Seed", str(data["seed"])),
    ]


def _augmentation(data: Mapping[str, Any]) -> str:
    words = {"augment": "turned and mirrored", "random_crops": "cut anywhere near their place"}
    changes = [text for name, text in words.items() if data[name]]
    for name in ("offset", "gain", "noise", "dropout"):
        if size := data[f"augment_{name}"]:
            changes.append(f"{name} {size:g}")
    return ", ".join(changes) or "none"


def _tree_options(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name.replace("_", " ").capitalize(), str(data[name]))
        for name in ("pixels_per_image", "trees", "leaves", "learning_rate", "seed")
        if name in data
    ]


def _pixelwise_lines(spec: BundleSpec) -> list[str]:
    if not spec.is_pixelwise:
        return []
    return ["- It sees no shapes, only each pixel's numbers: a baseline to compare networks with."]


def _calibration_lines(spec: BundleSpec) -> list[str]:
    if error := spec.tuning.get("expected_calibration_error"):
        return [f"- Expected calibration error {error:.4f} on the scenes above; elsewhere more."]
    if spec.temperature == 1:
        return ["- Probabilities are not calibrated."]
    return [
        f"- Probabilities are calibrated (temperature {spec.temperature:.3g}) on the scenes above;",
        "  elsewhere they may be off.",
    ]


def _score_lines(scores: Mapping[str, float]) -> list[str]:
    return [f"- {name}: {value:.4f}" for name, value in sorted(scores.items())]
