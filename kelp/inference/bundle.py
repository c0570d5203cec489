"""A trained model as a folder of plain files: no pickle, checked by hash, movable anywhere.

`bundle.json` (everything but the weights), `weights.safetensors` (of boosted trees `model.txt`),
`network.onnx` (the network for ONNX Runtime), `README.md` (model card). An ONNX file that
`kelp export` makes of a bundle is loaded like one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from kelp import __version__
from kelp.errors import BundleError, KelpError
from kelp.inference.backends import Backend, Net, Processor
from kelp.inference.backends.onnx import SPEC_KEY, SUFFIX, OnnxFile
from kelp.inference.backends.trees import MODEL_FILE, PixelTrees
from kelp.inference.foldruns import FoldRuns, runs_of
from kelp.inference.spec import SCHEMA_VERSION, BundleSpec
from kelp.io import imported
from kelp.io.files import file_sha256, parse_json, recover_folder
from kelp.io.location import packaged

log = logging.getLogger("kelp")

SPEC_FILE: Final = "bundle.json"
WEIGHTS_FILE: Final = "weights.safetensors"
NETWORK_FILE: Final = "network.onnx"
CARD_FILE: Final = "README.md"

DEFAULT_NETWORK: Final = "coasts"
"""What `kelp predict` without `--run_dir` runs."""

Which = Literal["best", "latest"]
BackendName = Literal["auto", "torch", "onnx"]
_FOLDERS: Final[dict[Which, str]] = {"best": "bundle", "latest": "bundle-latest"}
_TORCH: Final = "kelp.nn.backend"
"""By name: prediction must not need it."""


class Bundle:
    """A loaded bundle.

    Attributes:
        path: its folder or file.
        spec: its description.
        net: the network.
    """

    def __init__(self, path: Path, spec: BundleSpec, net: Net) -> None:
        self.path = path
        self.spec = spec
        self.net = net
        self._ready: dict[Processor, Backend] = {}

    def on(self, processor: Processor) -> Backend:
        """The network ready to run there: made once, it is kept for the next scene."""
        if processor not in self._ready:
            self._ready[processor] = self.net.on(processor)
        return self._ready[processor]

    def described(self, spec: BundleSpec) -> Bundle:
        """The same weights for another tile, size or interpolation.

        Raises:
            BundleError: the runtime cannot change them: that of an ONNX file.
        """
        return Bundle(self.path, spec, self.net.described(spec))


def load_bundle(path: Path | str, which: Which = "best", backend: BackendName = "auto") -> Bundle:
    """Load a bundle for prediction. Nothing in it is executed or unpickled.

    Args:
        path: a run folder, its `artifacts/`, a bundle, or an ONNX file of `kelp export`.
        which: the bundle of the best epoch, or of the latest, where `path` is a run.
        backend: what computes the network. `auto`: torch where it is installed, else ONNX
            Runtime. Boosted trees have a runtime of their own.

    Raises:
        BundleError: a file is missing, the schema is unknown, or the weights were altered.
        KelpError: the backend is not installed.
    """
    path = packaged(Path(path))
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        if backend == "torch":
            raise KelpError(f"{path}: an ONNX file runs in ONNX Runtime only; leave --backend out")
        return _load_onnx(path)
    folder = find_bundle(path, which)
    spec = read_spec(folder)
    if spec.is_pixelwise:
        return Bundle(folder, spec, _load_trees(folder, spec))
    if backend == "onnx" or (backend == "auto" and not _has_torch()):
        return _load_network_file(folder, spec)
    if not _has_torch():
        raise KelpError('--backend torch: torch is missing; pip install "kelp-slicer[train]"')
    net: Net = imported(_TORCH).load(folder, spec)
    return Bundle(folder, spec, net)


def load_bundles(
    run_dir: Sequence[Path], which: Which = "best", backend: BackendName = "auto"
) -> list[Bundle]:
    """The bundles of runs; of the parent of a cross-validation, those of all folds."""
    return [load_bundle(path, which, backend) for path in runs_of(run_dir)]


def find_bundle(path: Path, which: Which = "best") -> Path:
    """The bundle folder of a run folder, its `artifacts/`, or a bundle itself."""
    path = packaged(path)
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
        "ended (resume it with kelp train --resume_from), or this is no run folder"
    )


def read_spec(folder: Path) -> BundleSpec:
    """Read and check `bundle.json`."""
    path = folder / SPEC_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable as JSON; copy the bundle again") from error
    return _parse_spec(text, str(path))


def weights_path(folder: Path, spec: BundleSpec) -> Path:
    """The file of a bundle's weights, as it should be."""
    return folder / (MODEL_FILE if spec.is_pixelwise else WEIGHTS_FILE)


def checked_weights(folder: Path, spec: BundleSpec) -> Path:
    """The file of the weights, if it is the one that was saved.

    Raises:
        BundleError: it is missing, or was altered.
    """
    weights = weights_path(folder, spec)
    if not weights.is_file():
        raise BundleError(f"{weights}: missing; copy the whole bundle folder")
    if file_sha256(weights) != spec.weights_sha256:
        raise BundleError(
            f"{weights}: altered or truncated (its SHA-256 is not the one in {SPEC_FILE}); "
            "copy the bundle again"
        )
    return weights


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _load_trees(folder: Path, spec: BundleSpec) -> PixelTrees:
    weights = checked_weights(folder, spec)
    try:
        text = weights.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{weights}: cannot be read as text; copy the bundle again") from error
    return PixelTrees(text, spec, str(weights))


def _load_onnx(path: Path) -> Bundle:
    file = OnnxFile.read(path)
    spec = _parse_spec(file.metadata[SPEC_KEY], f"{path} ({SPEC_KEY})")
    if file.net.tile != spec.tile_size:
        raise BundleError(f"{path}: tiles of its graph and its {SPEC_KEY} differ; export it again")
    return Bundle(path, spec, file.net)


def _load_network_file(folder: Path, spec: BundleSpec) -> Bundle:
    """A bundle through its ONNX file, which must be of these weights."""
    path = folder / NETWORK_FILE
    if not path.is_file():
        raise BundleError(
            f"{folder}: holds no {NETWORK_FILE}; make one with kelp export --run_dir {folder} "
            f'--output_path {path}, or use torch (pip install "kelp-slicer[train]")'
        )
    known = _load_onnx(path)
    exported = spec.of_one_tile()
    if (exported.network(), spec.weights_sha256) != (
        known.spec.network(),
        known.spec.weights_sha256,
    ):
        raise BundleError(
            f"{path}: made of another state of the bundle than {SPEC_FILE} tells; make it again "
            f"with kelp export --run_dir {folder} --output_path {path}"
        )
    applied = spec.at_scale(spec.prediction_tile) if spec.prediction_tile else spec
    return Bundle(folder, applied, known.net)


def _parse_spec(text: str, path: str) -> BundleSpec:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{path}: not readable as JSON; copy the bundle again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {version} is unknown to kelp {__version__} "
            f"(it reads {SCHEMA_VERSION}); use the kelp that wrote the bundle"
        )
    try:
        return BundleSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}; copy the bundle again") from error
