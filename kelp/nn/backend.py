"""torch as a backend of `kelp.inference`, which imports this module by its name only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kelp import __version__
from kelp.config.choices import Precision
from kelp.errors import BundleError
from kelp.inference.backends import DeviceName, Pixels, Processor
from kelp.inference.spec import BundleSpec, NetworkSpec
from kelp.nn import symmetry
from kelp.nn.bundle import load_network
from kelp.nn.device import autocast, resolve_device, resolve_precision
from kelp.nn.fusion import folded
from kelp.nn.model import KelpNet

_EXAMPLE: Final = 1024
"""Pixels a side of what a network is shown as it is loaded, at most."""


class TorchNet:
    """A network of torch (see `kelp.inference.backends.Net`)."""

    runtime = "torch"

    def __init__(self, module: KelpNet) -> None:
        self.module = module

    def processor(
        self, device: DeviceName, precision: Precision | None, threads: int | None
    ) -> Processor:
        """What torch offers; a precision that the device lacks is replaced, in one line."""
        found = resolve_device(device)
        number = threads or torch.get_num_threads()
        versions = (__version__, f"torch {torch.__version__}")
        return Processor(found.type, resolve_precision(precision, found), number, versions)

    def on(self, processor: Processor) -> TorchBackend:
        """The network on that device, its weights in that precision."""
        return TorchBackend(self.module, processor)

    def described(self, spec: NetworkSpec) -> TorchNet:
        """The same weights for another tile, size, interpolation or temperature."""
        return TorchNet(self.module.described(spec))


class TorchBackend:
    """A network on a device (see `kelp.inference.backends.Backend`)."""

    def __init__(self, module: KelpNet, processor: Processor) -> None:
        self.device = torch.device(processor.device)
        self.precision = processor.precision
        self.module = module.on(self.device, processor.precision)
        self._threads = processor.threads

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """Zeros; pinned for a GPU, which then fetches them by itself."""
        array: Pixels = torch.zeros(shape, pin_memory=self.device.type == "cuda").numpy()
        return array

    def probabilities(self, raw: Pixels, symmetries: Sequence[int] = (0,)) -> Pixels:
        """Raw DN `(n, 7, h, w)` to probabilities `(len(symmetries), n, h, w)`, both float32."""
        batch = torch.from_numpy(raw).to(self.device, non_blocking=True)
        with (
            _threads(self._threads),
            torch.inference_mode(),
            autocast(self.precision, self.device),
        ):
            views = [
                symmetry.invert(self.module.probabilities(symmetry.apply(batch, k)), k)
                for k in symmetries
            ]
            p: Pixels = torch.stack(views).float().cpu().numpy()
        if not np.isfinite(p).all():
            raise BundleError("the network answers with NaN; its training diverged, train it again")
        return p


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """The network has its number of threads, in the calling thread."""
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(folder: Path, spec: BundleSpec) -> TorchNet:
    """The network of a bundle, with batch normalisation folded into its convolutions.

    Raises:
        BundleError: the weights are missing, altered, or do not fit.
    """
    net = load_network(folder, spec)
    # What is folded does not depend on the size of what is shown; memory does.
    example = torch.randn(
        1,
        len(spec.channels),
        *(min(side, _EXAMPLE) for side in spec.network_shape(spec.tile_size)),
        generator=torch.Generator().manual_seed(0),
    )
    net.body = folded(net.body, example.to(memory_format=torch.channels_last))
    return TorchNet(net)
