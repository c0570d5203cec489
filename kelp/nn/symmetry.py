"""The eight symmetries of the square, as exact operations on the last two axes of a tensor.

Symmetry `k` of 0 … 7 mirrors left-right when `k >= 4`, then turns by `k % 4` quarters. The odd
ones swap height and width. Pixels are only moved, never resampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kelp.inference.backends import SHAPE_KEEPING, SYMMETRIES


def apply(x: Tensor, k: int) -> Tensor:
    """`x` of shape `(..., h, w)`, moved by symmetry `k`; `(..., w, h)` for odd `k`."""
    return torch.rot90(x.flip(-1) if k >= 4 else x, k % 4, (-2, -1))


def invert(x: Tensor, k: int) -> Tensor:
    """Undo `apply(x, k)`."""
    turned = torch.rot90(x, -(k % 4), (-2, -1))
    return turned.flip(-1) if k >= 4 else turned


def augment(batch: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Move each sample of a batch by a symmetry of its own, the same in all tensors.

    Args:
        batch: tensors `(B, ..., h, w)` that belong together (images, targets).
        generator: draws the symmetries, on the CPU.
    """
    count, (height, width) = len(batch[0]), batch[0].shape[-2:]
    allowed = SYMMETRIES if height == width else SHAPE_KEEPING
    drawn = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return tuple(torch.stack([apply(x[i], allowed[k]) for i, k in enumerate(drawn)]) for x in batch)
