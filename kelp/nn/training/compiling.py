"""`--compile`: the network through torch.compile, where that works."""

from __future__ import annotations

import logging

import torch
from torch import nn

from kelp.config.choices import CompileMode

log = logging.getLogger("kelp")


def compile_network(body: nn.Module, mode: CompileMode, device: torch.device) -> bool:
    """Compile a network in place, names of its weights included; whether that could be done.

    What a machine lacks (a C++ compiler, Triton) shows only when something is compiled: so that
    is tried on a single operation first, and where it fails one line says so.
    """
    try:
        torch.compile(_probe)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        log.info("--compile True: torch cannot compile here (%s); going on without", reason)
        return False
    body.compile(mode=mode)
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
