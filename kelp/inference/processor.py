"""What a network runs on. Maps must not depend on which process made them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

import kelp
from kelp.config import PredictConfig
from kelp.config.choices import Precision
from kelp.nn.device import resolve_device, resolve_precision


@dataclass(frozen=True)
class Processor:
    """What the network runs on; other bits come from another."""

    device: str
    precision: Precision
    threads: int
    versions: tuple[str, ...] = field(default_factory=lambda: (kelp.__version__, torch.__version__))

    @classmethod
    def here(cls, config: PredictConfig, threads: int | None = None) -> Processor:
        """That of this process. `threads`: those it may use; None = as many as torch takes."""
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        return cls(device.type, precision, config.threads or threads or torch.get_num_threads())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The network has its number of threads, in the calling thread."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
