"""Values that options can take, where there is a choice."""

from __future__ import annotations

from typing import Literal

Architecture = Literal[
    "unet",
    "unet++",
    "linknet",
    "fpn",
    "manet",
    "pan",
    "pspnet",
    "deeplabv3",
    "deeplabv3+",
    "segformer",
    "upernet",
]
Loss = Literal[
    "dice",
    "jaccard",
    "ce",
    "bce",
    "focal",
    "tversky",
    "focal_tversky",
    "lovasz",
    "soft_ce",
    "mcc",
    "combo",
]
Optimizer = Literal["adam", "adamw", "sgd"]
Scheduler = Literal[
    "onecycle", "cosine", "cosine_with_warm_restarts", "cyclic", "reduce_lr_on_plateau", "none"
]
Normalization = Literal[
    "quantile", "z-score", "min-max", "water", "per-sample-quantile", "per-sample-min-max"
]
ResizeStrategy = Literal["pad", "resize"]
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Metric = Literal["val/dice", "val/iou", "val/precision", "val/recall", "val/loss"]
Precision = Literal["16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true"]
Device = Literal["auto", "cpu", "cuda"]
Checkpoint = Literal["best", "latest"]
MergeMode = Literal["mean", "max", "min", "gmean"]
"""How the symmetries of the square are merged."""
