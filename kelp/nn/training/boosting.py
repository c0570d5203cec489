"""Boosted trees grown by LightGBM on drawn pixels; the same pixels and options give the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelp.config import BaselineConfig
from kelp.inference.backends.trees import lightgbm
from kelp.nn.training.pixels import PixelSample
from kelp.progress import Progress


@dataclass(frozen=True)
class Grown:
    """Trees, and how they came about."""

    text: str
    """LightGBM's text of the best of them."""
    trees: int
    """How many these are."""
    gains: dict[str, float]
    """Of each channel: by how much its splits lowered the training loss."""
    losses: dict[str, list[float]]
    """After each tree that was grown: mean log loss of the drawn pixels, by `train` and `val`."""


def grow(
    training: PixelSample,
    validation: PixelSample,
    channels: Sequence[str],
    config: BaselineConfig,
    progress: Progress,
) -> Grown:
    """Grow trees until the loss on the validation pixels has not fallen for some time.

    Args:
        training: pixels to learn from.
        validation: pixels of the validation fold.
        channels: names of the features.
        config: the options.
        progress: gets the number of trees.
    """
    library, settings = lightgbm(), _settings(config)
    data = _dataset(library, training, channels, settings)
    losses: dict[str, dict[str, list[float]]] = {}
    callbacks: list[Callable[..., None]] = [
        library.record_evaluation(losses),
        # The end is told later: fewer trees may do.
        lambda env: progress("growing trees", min(env.iteration, config.trees - 1), config.trees),
    ]
    if config.early_stopping_rounds:
        callbacks.append(library.early_stopping(config.early_stopping_rounds, verbose=False))
    booster = library.train(
        settings,
        data,
        config.trees,
        valid_sets=[data, _dataset(library, validation, channels, settings, data)],
        valid_names=["train", "val"],
        callbacks=callbacks,
    )
    progress("growing trees", config.trees, config.trees)
    best = booster.best_iteration if config.early_stopping_rounds else booster.num_trees()
    gains = booster.feature_importance("gain", iteration=best)
    return Grown(
        text=booster.model_to_string(num_iteration=best),
        trees=best,
        gains=dict(zip(channels, map(float, gains), strict=True)),
        losses={part: by_metric["binary_logloss"] for part, by_metric in losses.items()},
    )


def _settings(config: BaselineConfig) -> dict[str, Any]:
    return {
        "objective": "binary",
        "metric": "binary_logloss",
        "learning_rate": config.learning_rate,
        "num_leaves": config.leaves,
        # Kelp is rare, so the curvature of the loss is tiny: whole steps would go far beyond its
        # least value, and the first tree would be the best.
        "max_delta_step": 1.0,
        "seed": config.seed,
        "deterministic": True,
        "force_row_wise": True,  # by default the faster way is found by trying both
        "num_threads": config.threads or torch.get_num_threads(),
        "verbosity": -1,
    }


def _dataset(
    library: Any,
    sample: PixelSample,
    channels: Sequence[str],
    settings: Mapping[str, Any],
    reference: Any = None,
) -> Any:
    """Pixels as LightGBM takes them; weights of mean 1, as its limits on leaves expect."""
    return library.Dataset(
        sample.features,
        sample.kelp.astype(np.float32),
        weight=sample.weights / sample.weights.mean(),
        feature_name=list(channels),
        reference=reference,
        params=dict(settings),
    )
