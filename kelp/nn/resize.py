"""Between the resolution of a scene and that of the network: up, and exactly back."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kelp.config.choices import Interpolation
from kelp.raster.window import Shape


def to_network(x: Tensor, side: int, interpolation: Interpolation) -> Tensor:
    """Channels `(n, c, h, w)` resampled to `(n, c, side, side)`."""
    if interpolation in ("nearest", "nearest-exact"):
        return pick(x, side, interpolation)
    # Shrinking without antialiasing would drop specks.
    shrinks = side < max(x.shape[-2:])
    return F.interpolate(x, size=(side, side), mode=interpolation, antialias=shrinks)


def pick(x: Tensor, side: int, interpolation: Interpolation) -> Tensor:
    """The last two axes of `x` at `side` x `side` by copying pixels, also of whole numbers.

    Any interpolation but `nearest` copies by the rule of `nearest-exact`, pixel centres on
    pixel centres: what a mask needs beside an image that was interpolated.
    """
    rows = _origins(x.shape[-2], side, interpolation).to(x.device)
    columns = _origins(x.shape[-1], side, interpolation).to(x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept from a prediction, it must serve a training, too
def _origins(size: int, side: int, interpolation: Interpolation) -> Tensor:
    """From which of `size` pixels each of `side` is copied: torch's rules, in whole numbers.

    torch computes them in float32, and its kernels round differently.
    """
    j = torch.arange(side)
    if interpolation == "nearest":
        return j * size // side
    return (2 * j + 1) * size // (2 * side)


def to_scene(p: Tensor, shape: Shape, interpolation: Interpolation) -> Tensor:
    """Probabilities `(n, H, W)` of the network as `(n, h, w)` of the scene, float32.

    Each scene pixel gets the mean of the network pixels that show it: those that `nearest`
    copied from it, or those that lie in its area, by the share that does. So a network that
    answers its input exactly gives the scene back: for `nearest`, and sides not below the
    scene's, `to_scene(to_network(x)) == x`. Equal bins of whole pixels (adaptive pooling) would
    lend a quarter of single pixels to their neighbours at the ratio 128 : 320.
    """
    rows = _back(shape[0], p.shape[-2], interpolation).to(p.device)
    columns = _back(shape[1], p.shape[-1], interpolation).to(p.device)
    with torch.autocast(p.device.type, enabled=False):
        return rows @ p.float() @ columns.T


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _back(size: int, side: int, interpolation: Interpolation) -> Tensor:
    """Weights `(size, side)` of network pixels in scene pixels along an axis; rows sum to 1."""
    if side < size:  # the network saw coarser pixels: interpolate between them
        eye = torch.eye(side)[:, None]
        return F.interpolate(eye, size=size, mode="linear")[:, 0].T.contiguous()
    if interpolation in ("nearest", "nearest-exact"):
        weights = F.one_hot(_origins(size, side, interpolation), size).T.float()
    else:
        edges = torch.arange(side + 1, dtype=torch.float64) * (size / side)
        pixel = torch.arange(size, dtype=torch.float64)[:, None]
        overlap = torch.minimum(edges[1:], pixel + 1) - torch.maximum(edges[:-1], pixel)
        weights = overlap.clamp_min(0).float()
    return weights / weights.sum(dim=1, keepdim=True)
