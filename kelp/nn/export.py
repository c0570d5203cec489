"""`kelp export`: a bundle as one ONNX file, from raw numbers to probabilities.

The graph is traced from the very modules that train and predict, so that missing values,
indices, normalisation, resizing and the sigmoid are in it. It gets its name only after ONNX
Runtime answered as torch does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import kelp
from kelp.config import ExportConfig
from kelp.errors import ConfigError, KelpError
from kelp.inference.backends.onnx import (
    INPUT,
    OUTPUT,
    SPEC_KEY,
    SUFFIX,
    VERSION_KEY,
    WEIGHTS_KEY,
    OnnxNet,
    extra,
    weights_sha256,
)
from kelp.inference.bundle import NETWORK_FILE, find_bundle, read_spec
from kelp.inference.spec import BundleSpec
from kelp.io.files import write_bytes
from kelp.nn.bundle import load_network
from kelp.nn.model import KelpNet
from kelp.progress import Progress, silent
from kelp.raster.bands import BANDS, DEM, NODATA, OPTICAL, PIXEL_SIZE_M, QA

log = logging.getLogger("kelp")

LARGEST_DIFFERENCE: Final = 1e-3
"""How far a probability of ONNX Runtime may lie from torch's."""

# What QGIS plugins ship reads: ONNX Runtime 1.14 to 1.17 knows opset 18 and file version 8, the
# first with antialiased resizing, and not what exporters write by default.
_OPSET: Final = 18
_IR_VERSION: Final = 8

_STEPS: Final = 3


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    path: Path
    size: int
    """Of the file, in bytes."""
    parity: float
    """Largest difference found between probabilities of ONNX Runtime and torch, both float32."""

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.path}: {self.size / 1e6:.1f} MB; ONNX Runtime and torch differ by "
            f"{self.parity:.1e} at most (allowed: {LARGEST_DIFFERENCE:g})"
        )


def export(config: ExportConfig, progress: Progress = silent) -> ExportResult:
    """Write the network of a bundle as an ONNX file that kelp, QGIS and others can run.

    Without `output_path` it is the bundle's own `network.onnx`, through which `kelp predict
    --backend onnx` runs the bundle.

    Raises:
        KelpError: no bundle, an extra is missing, the network cannot be traced, or ONNX Runtime
            does not answer as torch does. No file is written then.
    """
    if config.output_path and config.output_path.suffix.lower() != SUFFIX:
        raise ConfigError(f"--output_path {config.output_path}: must end in {SUFFIX}")
    folder = find_bundle(config.run_dir, config.use_checkpoint)
    result = export_network(folder, config.output_path or folder / NETWORK_FILE, progress)
    if config.output_path:
        config.record(config.output_path.parent)
    return result


def export_network(folder: Path, path: Path, progress: Progress = silent) -> ExportResult:
    """Write the network of the bundle `folder` to `path`; see `export`."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        extra(module)
    spec = read_spec(folder)
    if spec.is_pixelwise:
        raise ConfigError(f"{folder}: boosted trees are not exported; name the run of a network")
    net = load_network(folder, spec)
    spec = spec.of_one_tile()  # as the file takes: those that prediction cuts
    net = net.described(spec)
    progress("exporting", 0, _STEPS)
    crops = parity_crops(spec)
    with torch.no_grad():
        expected = [net.probabilities(batch) for batch in crops]
    progress("exporting", 1, _STEPS)
    model = trace(net, spec)
    describe(model, spec)
    content: bytes = model.SerializeToString()
    progress("exporting", 2, _STEPS)
    parity = largest_difference(OnnxNet(content, str(path)), crops, expected)
    if not parity <= LARGEST_DIFFERENCE:  # also NaN
        raise KelpError(
            f"{path}: not written: ONNX Runtime and torch differ by {parity:.1e} in "
            f"probability, {LARGEST_DIFFERENCE:g} is allowed; update onnxscript and "
            "onnxruntime (pip install --upgrade), or use the bundle"
        )
    write_bytes(path, content)
    progress("exporting", _STEPS, _STEPS)
    if spec.tile_size[0] != spec.tile_size[1]:
        log.info("%s: Deepness in QGIS takes square tiles only", path)
    return ExportResult(path, len(content), parity)


def add_network_file(folder: Path, progress: Progress = silent) -> None:
    """Give a bundle its `network.onnx`, or say in one line why it has none.

    Call it after `save_bundle`, and again after what the network answers has changed
    (`describe_bundle`): `kelp predict --backend onnx` refuses a file of another state.
    """
    try:
        export_network(folder, folder / NETWORK_FILE, progress)
    except KelpError as error:
        (folder / NETWORK_FILE).unlink(missing_ok=True)  # of another state
        log.info("%s: without %s (%s)", folder, NETWORK_FILE, error)


class _Graph(nn.Module):
    """What is traced: `KelpNet.probabilities` with the channel axis that ONNX users expect."""

    def __init__(self, net: KelpNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, raw: Tensor) -> Tensor:
        return self.net.probabilities(raw)[:, None]


def trace(net: KelpNet, spec: BundleSpec) -> Any:
    """The ONNX model of a network: `raw` (n, 7, h, w) to `probability` (n, 1, h, w), float32.

    The number of crops is free, their height and width are the spec's tile.
    """
    # Two crops: torch takes a size of one for fixed.
    example = torch.zeros(2, len(BANDS), *spec.tile_size)
    with torch.no_grad():
        # Tables of resizing are made once and kept: made while tracing, they would be unusable.
        net.probabilities(example)
        try:
            program = torch.onnx.export(
                _Graph(net).eval(),
                (example,),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise KelpError(
                f"{spec.architecture} on {spec.encoder} cannot be traced to ONNX "
                f"({type(error.__cause__ or error).__name__}); use the bundle"
            ) from error
    if program is None:
        raise KelpError(f"{spec.architecture} on {spec.encoder}: torch gave no ONNX model")
    model = program.model_proto
    model.ir_version = _IR_VERSION
    # Where in the exporter's file system each operation came from: of no use to anyone else.
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, model.graph):
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
    del model.graph.value_info[:]
    return model


def describe(model: Any, spec: BundleSpec) -> None:
    """Write into an ONNX model what kelp and Deepness need to know of it."""
    metadata = {
        SPEC_KEY: json.dumps(spec.model_dump(mode="json"), allow_nan=False),
        VERSION_KEY: kelp.__version__,
        WEIGHTS_KEY: weights_sha256(model),
        **{key: json.dumps(value) for key, value in deepness_settings(spec).items()},
    }
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def _overlap(spec: BundleSpec) -> float:
    """Of neighbouring tiles, as `kelp predict` cuts them, in tiles."""
    shared = spec.prediction_overlap
    return 0.5 if shared is None else shared / spec.tile_size[0]


def deepness_settings(spec: BundleSpec) -> dict[str, Any]:
    """The settings that the QGIS plugin Deepness reads from a model (as JSON, by these names).

    Deepness divides every value by 255, whatever its type, then subtracts a mean and divides by
    a deviation: 0 and 1/255 give the network its raw numbers back, -32768, 0 and 1 exactly, others
    within 0.01. It takes values below the threshold for background, as kelp does.
    Source: `processing/models` in the repository PUTvision/qgis-plugin-deepness, as of 2025.
    """
    return {
        "model_type": "Segmentor",
        "class_names": {"0": "background", "1": "kelp"},
        "resolution": 100 * PIXEL_SIZE_M,  # cm
        "tile_size": spec.tile_size[0],
        "tiles_overlap": round(100 * _overlap(spec)),  # percent
        "standardization_mean": [0.0] * len(BANDS),
        "standardization_std": [1 / 255] * len(BANDS),
        "seg_thresh": spec.threshold,
        "seg_small_segment": 0,  # kelp removes nothing that is small
    }


def parity_crops(spec: BundleSpec) -> tuple[Tensor, ...]:
    """Batches of raw DN `(n, 7, h, w)` with everything that scenes hold.

    Sea in the range of the training data; single missing pixels, as NaN and as -32768; a band
    that is missing everywhere; clouds (QA = 1); land and unknown height; nothing at all.
    """
    rng = np.random.default_rng(0)
    height, width = spec.tile_size
    crops = np.empty((6, len(BANDS), height, width), dtype=np.float32)
    for i, name in enumerate(BANDS):
        stats = spec.statistics.get(name)
        low, high = (stats.q01, stats.q99) if stats else (7000, 20000)
        smooth = np.linspace(0, 1, height)[:, None] * np.linspace(0, 1, width)
        noise = rng.random((len(crops), height, width))
        crops[:, i] = np.rint(low + (high - low) * (0.5 * smooth + 0.6 * noise))
    crops[:, QA] = 0
    crops[:, DEM] = np.minimum(crops[:, DEM], 0)
    sea, specks, bandless, cloudy, coast, blank = crops  # views
    sea[: len(OPTICAL), 0] = 65535  # saturated
    holes = rng.random(specks.shape)
    specks[holes < 0.1] = np.nan
    specks[holes > 0.9] = NODATA
    bandless[BANDS.index("NIR")] = np.nan
    cloudy[QA] = rng.random((height, width)) < 0.5
    coast[DEM, :, width // 2 :] = 40
    coast[DEM, : height // 4] = np.nan
    blank[:] = np.nan
    raw = torch.from_numpy(crops)
    return raw[:1], raw[1:]


def largest_difference(net: OnnxNet, crops: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of probabilities over batches; NaN where one is not a number."""
    differences = [
        (torch.from_numpy(net.run(raw.numpy())) - p).abs().amax()
        for raw, p in zip(crops, expected, strict=True)
    ]
    return torch.stack(differences).amax().item()
