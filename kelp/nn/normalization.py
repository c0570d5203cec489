"""The range of each sample's observed values, for per-sample normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

PER_SAMPLE: Final[Mapping[str, float]] = {"per-sample-min-max": 0.0, "per-sample-quantile": 0.01}
"""Per-sample strategies of `--normalization_strategy`, and the share cut off at either end."""


def sample_range(x: Tensor, tail: float) -> tuple[Tensor, Tensor, Tensor]:
    """Least value, lower bound and width of the range of each channel of each sample.

    Args:
        x: channels `(n, c, h, w)`; what is not finite is missing.
        tail: share of the observed values below the lower bound, and above the upper one;
            between values they are interpolated linearly, as numpy's quantiles are.

    Returns:
        Three tensors `(n, c, 1, 1)`; 0, 0 and 1 where nothing is observed.
    """
    values = torch.where(torch.isfinite(x), x, torch.inf).flatten(2)
    count = torch.isfinite(x).flatten(2).sum(dim=2, keepdim=True)
    if tail:  # sorted, as torch.nanquantile takes only 16 million numbers and cannot be exported
        ordered = values.sort(dim=2).values
        least, low, high = (_quantile(ordered, count, share) for share in (0.0, tail, 1 - tail))
    else:
        least = low = values.amin(dim=2, keepdim=True)
        high = torch.where(torch.isinf(values), -torch.inf, values).amax(dim=2, keepdim=True)
    seen = count > 0
    return (
        torch.where(seen, least, 0.0)[..., None],
        torch.where(seen, low, 0.0)[..., None],
        torch.where(seen, high - low, 1.0)[..., None],
    )


def _quantile(ordered: Tensor, count: Tensor, share: float) -> Tensor:
    """Of the first `count` numbers `(n, c, 1)` of each ordered row `(n, c, numbers)`."""
    position = share * (count - 1).clamp(min=0).float()
    below = position.floor()
    low = ordered.gather(2, below.long())
    high = ordered.gather(2, position.ceil().long())
    return low + (position - below) * (high - low)
