"""Batch normalisation folded into the convolutions before it: the same function in fewer passes."""

from __future__ import annotations

import copy
import logging
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

log = logging.getLogger("kelp")

_TOLERANCE: Final = 1e-3  # of the largest answer: far above rounding, far below a wrong network


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
