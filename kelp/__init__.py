"""kelp finds small things in big satellite images: sliced training and prediction.

Importing this package is light: every function below is imported on first use.

    import kelp

    bundle = kelp.load_bundle("mlruns/kelp/<run>")
    p = kelp.predict_array(bundle, scene)  # (bands, h, w) raw values -> (h, w) probabilities
    kelp.predict(bundle, "scene.tif", "scene_kelp.tif", tile=128, overlap=64, blend="hann")
    kelp.predict_scenes(kelp.config.PredictConfig(data_dir=..., output_dir=..., run_dir=...))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kelp.data_prep.metadata import build_metadata
    from kelp.data_prep.slicing import slice_dataset
    from kelp.data_prep.split import split_fold
    from kelp.data_prep.stats import compute_stats
    from kelp.errors import KelpError
    from kelp.evaluation.ensembling import ensemble
    from kelp.evaluation.scoring import evaluate
    from kelp.inference.arrays import predict, predict_array
    from kelp.inference.predict import predict_scenes
    from kelp.nn.bundle import load_bundle
    from kelp.nn.comparison.compare import compare
    from kelp.nn.comparison.tune import tune
    from kelp.nn.export import export
    from kelp.nn.search.run import sweep
    from kelp.nn.training.baseline import train_baseline
    from kelp.nn.training.fit import train
    from kelp.nn.training.folds import train_folds
    from kelp.plotting.reports.run import make_report
    from kelp.products.areas import areas
    from kelp.products.beds import beds
    from kelp.products.submission import submit
    from kelp.simulation.layout import simulate

_HOMES = {
    "KelpError": "kelp.errors",
    "areas": "kelp.products.areas",
    "beds": "kelp.products.beds",
    "build_metadata": "kelp.data_prep.metadata",
    "compare": "kelp.nn.comparison.compare",
    "compute_stats": "kelp.data_prep.stats",
    "ensemble": "kelp.evaluation.ensembling",
    "evaluate": "kelp.evaluation.scoring",
    "export": "kelp.nn.export",
    "load_bundle": "kelp.nn.bundle",
    "make_report": "kelp.plotting.reports.run",
    "predict": "kelp.inference.arrays",
    "predict_array": "kelp.inference.arrays",
    "predict_scenes": "kelp.inference.predict",
    "simulate": "kelp.simulation.layout",
    "slice_dataset": "kelp.data_prep.slicing",
    "split_fold": "kelp.data_prep.split",
    "submit": "kelp.products.submission",
    "sweep": "kelp.nn.search.run",
    "train": "kelp.nn.training.fit",
    "train_baseline": "kelp.nn.training.baseline",
    "train_folds": "kelp.nn.training.folds",
    "tune": "kelp.nn.comparison.tune",
}

__all__ = [
    "KelpError",
    "__version__",
    "areas",
    "beds",
    "build_metadata",
    "compare",
    "compute_stats",
    "ensemble",
    "evaluate",
    "export",
    "load_bundle",
    "make_report",
    "predict",
    "predict_array",
    "predict_scenes",
    "simulate",
    "slice_dataset",
    "split_fold",
    "submit",
    "sweep",
    "train",
    "train_baseline",
    "train_folds",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "config":  # a package of its own, there without another import
        return importlib.import_module("kelp.config")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kelp' has no attribute {name!r}")
