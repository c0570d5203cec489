"""A trained model as a folder of plain files: no pickle, checked by hash, movable anywhere.

`bundle.json` (everything but the weights), `weights.safetensors` (of boosted trees `model.txt`),
`README.md` (model card).
The ONNX file that `kelp export` makes of it loads alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

import kelp
from kelp.config.choices import Precision
from kelp.errors import BundleError
from kelp.inference.backends.onnx import SPEC_KEY, SUFFIX, OnnxFile
from kelp.inference.backends.trees import MODEL_FILE, PixelTrees
from kelp.inference.foldruns import FoldRuns
from kelp.inference.spec import SCHEMA_VERSION, BundleSpec
from kelp.io.files import atomic_folder, recover_folder, write_json, write_text
from kelp.nn.card import model_card
from kelp.nn.fusion import folded
from kelp.nn.model import KelpNet

log = logging.getLogger("kelp")

SPEC_FILE: Final = "bundle.json"
WEIGHTS_FILE: Final = "weights.safetensors"
CARD_FILE: Final = "README.md"

Which = Literal["best", "latest"]
_FOLDERS: Final[dict[Which, str]] = {"best": "bundle", "latest": "bundle-latest"}


class Net(Protocol):
    """What gives probabilities, whichever runtime computes them: all that prediction asks for."""

    def probabilities(self, raw: Tensor) -> Tensor:
        """Raw DN `(n, 7, h, w)` to float32 probabilities `(n, h, w)`."""

    def on(self, device: torch.device, precision: Precision) -> Net:
        """The network ready to run there; what it cannot do it says in one line."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: its folder or file, its description, and the network, ready to predict."""

    path: Path
    spec: BundleSpec
    net: Net
    _ready: dict[object, Net] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device, precision: Precision) -> Net:
        """The network ready to run there: made once, it is kept for the next scene."""
        wish = device, precision
        if wish not in self._ready:
            self._ready[wish] = self.net.on(*wish)
        return self._ready[wish]

    def described(self, spec: BundleSpec) -> Bundle:
        """The same weights for another tile, size or interpolation; not of an ONNX file."""
        assert isinstance(self.net, KelpNet | PixelTrees)
        return Bundle(self.path, spec, self.net.described(spec))


def save_bundle(
    folder: Path, net: KelpNet | PixelTrees, spec: BundleSpec, attachments: Sequence[Path] = ()
) -> Path:
    """Write a bundle; it appears under `folder` only when complete, replacing an older one.

    `attachments` (the statistics file) are copied into it under their own names.
    """
    with atomic_folder(folder) as partial:
        weights, versions = partial / _weights_file(spec), _versions()
        if isinstance(net, PixelTrees):
            write_text(weights, net.text)
            versions["lightgbm"] = net.version
        else:
            state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
            safetensors.torch.save_file(state, weights)
        spec = spec.model_copy(update={"weights_sha256": _sha256(weights), "versions": versions})
        for file in attachments:
            shutil.copyfile(file, partial / file.name)
        describe_bundle(partial, spec)
    return folder


def describe_bundle(folder: Path, spec: BundleSpec) -> None:
    """Write what a bundle says of its weights: `bundle.json` and the model card."""
    write_text(folder / CARD_FILE, model_card(spec, SPEC_FILE))
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))


def find_bundle(path: Path, which: Which = "best") -> Path:
    """The bundle folder of a run folder, its `artifacts/`, or a bundle itself."""
    name = _FOLDERS[which]
    candidates = (path / "artifacts" / name, path / name)
    for folder in (path, *candidates):
        recover_folder(folder, SPEC_FILE)
    if (path / SPEC_FILE).is_file():
        if path.name != name and which != "best":
            log.info("%s: is a bundle itself; --use_checkpoint %s changes nothing", path, which)
        return path
    for candidate in candidates:
        if (candidate / SPEC_FILE).is_file():
            return candidate
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; name a run folder or a bundle")
    if folds := FoldRuns.read(path):
        names = ", ".join(run.run for run in folds.runs.values())
        raise BundleError(f"{path}: the parent of runs of all folds; name one of them: {names}")
    raise BundleError(
        f"{path}: holds no complete {name}; the run may have been killed before its first epoch "
        "ended (go on with kelp train --resume_from), or this is no run folder"
    )


def load_bundle(path: Path | str, which: Which = "best") -> Bundle:
    """Load a bundle for prediction. Nothing in it is executed or unpickled.

    Args:
        path: a run folder, its `artifacts/`, a bundle, or an ONNX file of `kelp export`.
        which: the bundle of the best epoch, or of the latest, where `path` is a run.

    Raises:
        BundleError: a file is missing, the schema is unknown, or the weights were altered.
    """
    path = Path(path)
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return _load_onnx(path)
    folder = find_bundle(path, which)
    spec = read_spec(folder)
    if spec.is_pixelwise:
        return Bundle(folder, spec, _load_trees(folder, spec))
    net = load_network(folder, spec)
    example = torch.randn(
        1,
        len(spec.channels),
        *spec.network_shape(spec.tile_size),
        generator=torch.Generator().manual_seed(0),
    )
    net.body = folded(net.body, example.to(memory_format=torch.channels_last))
    return Bundle(folder, spec, net)


def load_network(folder: Path, spec: BundleSpec) -> KelpNet:
    """The network of a bundle in evaluation mode, its weights checked by hash."""
    weights = _checked_weights(folder, spec)
    net = KelpNet(spec)
    try:
        net.load_state_dict(safetensors.torch.load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{weights}: does not fit the network of {SPEC_FILE}") from error
    return net.eval().to(memory_format=torch.channels_last)


def _load_trees(folder: Path, spec: BundleSpec) -> PixelTrees:
    weights = _checked_weights(folder, spec)
    try:
        text = weights.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{weights}: cannot be read as text; copy the bundle again") from error
    return PixelTrees(text, spec, str(weights))


def _weights_file(spec: BundleSpec) -> str:
    return MODEL_FILE if spec.is_pixelwise else WEIGHTS_FILE


def _checked_weights(folder: Path, spec: BundleSpec) -> Path:
    """The file of the weights, if it is the one that was saved."""
    weights = folder / _weights_file(spec)
    if not weights.is_file():
        raise BundleError(f"{weights}: missing; copy the whole bundle folder")
    if _sha256(weights) != spec.weights_sha256:
        raise BundleError(
            f"{weights}: altered or truncated (its SHA-256 is not the one in {SPEC_FILE}); "
            "copy the bundle again"
        )
    return weights


def _load_onnx(path: Path) -> Bundle:
    file = OnnxFile.read(path)
    spec = _parse_spec(file.metadata[SPEC_KEY], f"{path} ({SPEC_KEY})")
    if file.net.tile != spec.tile_size:
        raise BundleError(f"{path}: tiles of its graph and its {SPEC_KEY} differ; export it again")
    # Another runtime's probabilities differ in the last digits: outputs made with it are told
    # from those of the bundle itself.
    versions = spec.versions | {"runtime": f"ONNX Runtime {file.net.version}"}
    return Bundle(path, spec.model_copy(update={"versions": versions}), file.net)


def read_spec(folder: Path) -> BundleSpec:
    """Read and check `bundle.json`."""
    path = folder / SPEC_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable as JSON; copy the bundle again") from error
    return _parse_spec(text, str(path))


def _parse_spec(text: str, path: str) -> BundleSpec:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{path}: not readable as JSON; copy the bundle again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version} is unknown to kelp {kelp.__version__} "
            f"(it reads {SCHEMA_VERSION}); use the kelp that wrote the bundle"
        )
    try:
        return BundleSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}; copy the bundle again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {
        "kelp": kelp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
