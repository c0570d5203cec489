"""Seconds per crop of one network on the CPU: torch, ONNX Runtime and OpenVINO, float32 and less.

    python benchmarks/backends.py [--encoder tu-efficientnet_b5] [--threads 2] [--repeats 7]

Every backend gets the same batch of raw 128 px crops of the packaged Landsat scene and does all of
the work: preprocessing, resizing to 320 px, the network, resizing back. They run in turn,
repeatedly, in one process, each after the others, so that a busy machine slows all alike; figures
are medians, ratios are medians of paired runs. int8 is ONNX Runtime's static quantisation,
calibrated on other crops of the scene. Backends that are not installed are skipped. Weights are
random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from numpy.typing import NDArray

from kelp.config import ExportConfig, TrainConfig
from kelp.data_prep.stats import channel_statistics
from kelp.inference.bundle import load_bundle
from kelp.inference.predictor import Predictor
from kelp.inference.spec import BundleSpec
from kelp.nn.bundle import save_bundle
from kelp.nn.device import has_bf16
from kelp.nn.export import export
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS
from kelp.raster.indices import IndexSettings
from kelp.raster.scene import read_scene

TILE, CROP = 128, 320
CPU = torch.device("cpu")

Batch = NDArray[np.float32]
Predict = Callable[[Batch], Batch]


def scene() -> Batch:
    return read_scene(measuring.SCENE)


def crops_of(pixels: Batch, count: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    places = rng.integers(0, np.array(pixels.shape[1:]) - TILE, (count, 2))
    return np.stack([pixels[:, y : y + TILE, x : x + TILE] for y, x in places])


def make_files(folder: Path, encoder: str, pixels: Batch) -> tuple[Path, Path]:
    options = {"image_size": CROP, "encoder": encoder, "sahi": True}
    config = TrainConfig(data_dir=folder, metadata_fp=folder, output_dir=folder, **options)
    network = network_spec(config, (TILE, TILE)).model_dump()
    spec = BundleSpec.model_validate(
        {
            **network,
            "statistics": channel_statistics([pixels], BANDS, IndexSettings("dn", True, True)),
        }
    )
    torch.manual_seed(0)
    bundle = save_bundle(folder / "bundle", KelpNet(spec), spec)
    onnx = folder / "model.onnx"
    print(export(ExportConfig(run_dir=bundle, output_path=onnx)).summary())
    return bundle, onnx


def with_openvino(file: Path, threads: int, precision: str) -> Predict:
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda raw: compiled(raw)[0][:, 0]


class Calibration:
    """What ONNX Runtime's calibration reads: batches until None."""

    def __init__(self, crops: Batch) -> None:
        self._crops = iter(crops[:, None])

    def get_next(self) -> dict[str, Batch] | None:
        """One crop, or None when all were given."""
        crop = next(self._crops, None)
        return None if crop is None else {"raw": crop}


def with_int8(file: Path, crops: Batch, threads: int) -> Predict:
    runtime = importlib.import_module("onnxruntime")
    quantization = importlib.import_module("onnxruntime.quantization")
    prepared, small = file.with_stem("prepared"), file.with_stem("int8")
    importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
        file, prepared
    )
    quantization.quantize_static(
        prepared,
        small,
        Calibration(crops),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],  # with sums, products and sigmoids it was no faster
        per_channel=True,
        nodes_to_exclude=outside_the_body(prepared),
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    return lambda raw: session.run(None, {"raw": raw})[0][:, 0]


def outside_the_body(file: Path) -> list[str]:
    """Nodes before the first convolution and after the last: raw numbers do not fit eight bits."""
    nodes = importlib.import_module("onnx").load(file).graph.node
    convolutions = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    first, last = convolutions[0], convolutions[-1]
    return [node.name for i, node in enumerate(nodes) if not first <= i <= last]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def measure(backends: dict[str, Predict], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds per crop of every run, the backends in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for predict in backends.values():
        predict(batch)
    for _ in range(repeats):
        for name, predict in backends.items():
            start = time.perf_counter()
            predict(batch)
            seconds[name].append((time.perf_counter() - start) / len(batch))
    return seconds


def report(seconds: dict[str, list[float]], outputs: dict[str, Batch]) -> list[dict[str, Any]]:
    reference, rows = "torch float32", []
    for name, runs in seconds.items():
        ratios = [a / b for a, b in zip(seconds[reference], runs, strict=True)]
        difference = np.abs(outputs[name] - outputs[reference]).max()
        rows.append(
            {
                "backend": name,
                "s_per_crop": round(statistics.median(runs), 4),
                "times_faster": round(statistics.median(ratios), 2),
                "largest_difference": float(f"{difference:.1e}"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="tu-efficientnet_b5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=16, help="crops; 0: no int8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pixels = scene()
    batch = crops_of(pixels, options.batch, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        bundle_path, file = make_files(Path(folder), options.encoder, pixels)
        bundle = load_bundle(bundle_path)
        backends: dict[str, Predict] = {
            "torch float32": Predictor(bundle, device="cpu", precision="32-true"),
            "ONNX Runtime float32": Predictor(load_bundle(file), device="cpu", precision="32-true"),
        }
        if has_bf16(CPU):
            backends["torch bfloat16"] = Predictor(bundle, device="cpu", precision="bf16-mixed")
        if installed("openvino"):
            backends["OpenVINO float32"] = with_openvino(file, options.threads, "f32")
            if has_bf16(CPU):
                backends["OpenVINO bfloat16"] = with_openvino(file, options.threads, "bf16")
        if options.calibration:
            # The calibration also measures numbers it does not quantise, and NaN has no range.
            crops = np.nan_to_num(crops_of(pixels, options.calibration, seed=1), nan=9000)
            backends["ONNX Runtime int8"] = with_int8(file, crops, options.threads)
        outputs = {name: np.array(predict(batch)) for name, predict in backends.items()}
        rows = report(measure(backends, batch, options.repeats), outputs)
    print(f"{options.encoder}, {options.threads} threads, batch {options.batch}, {cpu_name()}")
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for row in rows:
        print(
            f"{row['backend']:22} {row['s_per_crop']:.3f} s per crop, "
            f"{row['times_faster']:.2f} times torch float32, "
            f"p differs by {row['largest_difference']:.0e} at most"
        )
    print(json.dumps(rows))


def cpu_name() -> str:
    """The processor, and the instructions that decide which number formats are fast."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value for key, value in facts.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', '?').strip()} ({' '.join(flags)})"


if __name__ == "__main__":
    main()
