"""torch as a backend of `kelp.inference`, which imports this module by its name only."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kelp import __version__
from kelp.config.choices import Precision
from kelp.errors import BundleError
from kelp.inference.backends import DeviceName, Pixels, Processor
from kelp.inference.spec import BundleSpec, NetworkSpec
from kelp.nn import symmetry
from kelp.nn.bundle import load_network
from kelp.nn.device import autocast, resolve_device, resolve_precision
from kelp.nn.model import KelpNet
from kelp.raster.window import Shape

log = logging.getLogger("kelp")

_EXAMPLE: Final = 1024
"""Pixels a side of what a network is shown as it is loaded, at most."""
_TOLERANCE: Final = 1e-3  # of the largest answer: far above rounding, far below a wrong network


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
        *(min(side, _EXAMPLE) for side in spec.network_shape(Shape(*spec.tile_size))),
        generator=torch.Generator().manual_seed(0),
    )
    net.body = folded(net.body, example.to(memory_format=torch.channels_last))
    return TorchNet(net)


@torch.no_grad()
def folded(net: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a network in evaluation mode without the normalisations that can be folded.

    Which one follows which convolution is observed while the network runs `example`, not guessed
    from names, and the copy must give the same answer; else the network itself is returned.
    """
    copied = copy.deepcopy(net)
    pairs, answer = _observe(copied, example)
    places = {
        child: (parent, name)
        for parent in copied.modules()
        for name, child in parent.named_children()
    }
    for conv, norm in pairs.items():
        assert norm.running_mean is not None  # only such are paired
        assert norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        # timm's normalisations hold the activation as well: that stays.
        parent, name = places[norm]
        setattr(parent, name, nn.Sequential(*norm.children()))
    if (copied(example) - answer).abs().max() <= _TOLERANCE * answer.abs().max():
        return copied
    log.debug("batch normalisation is not folded: the network would answer differently")
    return net


def _observe(net: nn.Module, example: Tensor) -> tuple[dict[nn.Conv2d, nn.BatchNorm2d], Tensor]:
    """Convolutions whose output goes straight into a normalisation; the network's answer."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept: its id stays its own
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def leave(module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            conv, _ = made.get(id(inputs[0]), (None, None))
            if conv is not None:
                pairs[conv] = module

    hooks = [module.register_forward_hook(leave) for module in net.modules()]
    hooks += [module.register_forward_pre_hook(enter) for module in net.modules()]
    try:
        answer: Tensor = net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs, answer
