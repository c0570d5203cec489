"""Where the network runs and in which number format; training and prediction ask here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from kelp.config.choices import CompileMode, Precision
from kelp.errors import ConfigError
from kelp.inference.backends import cpu_has_bf16

log = logging.getLogger("kelp")

_DTYPES: Final = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}


def resolve_device(name: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """The device of `--device`; `auto` is the GPU where there is one.

    Raises:
        ConfigError: `cuda` without a usable GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA GPU; use --device cpu")
    return torch.device("cuda")


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 without emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_bf16()


def resolve_precision(precision: Precision | None, device: torch.device) -> Precision:
    """The number format that `device` really offers; a fallback is said in one line.

    Args:
        precision: as requested; None (predict's default) is `bf16-mixed` where the device has it.
        device: where the network runs.
    """
    if precision is None:
        return "bf16-mixed" if has_bf16(device) else "32-true"
    number, _, kind = precision.partition("-")
    offered: Precision = precision
    if number == "16" and device.type == "cpu":  # CPUs do not compute in float16
        offered = "bf16-mixed" if kind == "mixed" else "bf16-true"
    if offered.startswith("bf16") and not has_bf16(device):
        offered = "32-true"
    if offered != precision:
        kind = "CPU" if device.type == "cpu" else "GPU"
        log.info("--precision %s: this %s lacks it; using %s", precision, kind, offered)
    return offered


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network's forward pass runs.

    `*-mixed` casts operation by operation; in `*-true` the weights themselves have another
    type (`weights_dtype`) and nothing is cast.
    """
    if precision.endswith("-mixed"):
        return torch.autocast(device.type, dtype=_DTYPES[precision.partition("-")[0]])
    return nullcontext()


class Float32Depthwise(TorchFunctionMode):
    """Depthwise convolutions in float32 where autocast on a CPU would take bfloat16; for training.

    oneDNN falls back to reference code for their gradients in bfloat16: up to a hundred times
    slower than in float32, and most of a step of an EfficientNet. A context manager.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one function of torch."""
        kwargs = kwargs or {}
        if func is not F.conv2d or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        x, *others = args
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        if x.device.type != "cpu" or groups == 1 or groups != x.shape[1]:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(x.float(), *others, **kwargs).to(x.dtype)


def compute_dtype(precision: Precision) -> torch.dtype:
    """Type in which convolutions are computed."""
    return _DTYPES[precision.partition("-")[0]]


def weights_dtype(precision: Precision) -> torch.dtype:
    """Type in which the network's weights are kept."""
    return _DTYPES[precision.partition("-")[0]] if precision.endswith("-true") else torch.float32


def compile_network(body: nn.Module, mode: CompileMode, device: torch.device) -> bool:
    """Compile a network in place, names of its weights included; whether that could be done.

    What a machine lacks (a C++ compiler, Triton) shows only when something is compiled: so that
    is tried on a single operation first, and where it fails one line says so.
    """
    try:
        torch.compile(_probe)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        log.info(
            "--compile True: torch cannot compile here (%s); training continues without it", reason
        )
        return False
    body.compile(mode=mode)
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
