"""Raw digital numbers to network input, as a module of torch; see `kelp.inference.preprocess`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from kelp.inference.preprocess import channels_of, normalised, stored_numbers
from kelp.inference.spec import NetworkSpec

PER_SAMPLE: Final[Mapping[str, float]] = {"per-sample-min-max": 0.0, "per-sample-quantile": 0.01}
"""Per-sample strategies of `--normalization_strategy`, and the share cut off at either end."""


class Preprocess(nn.Module):
    """Bands and indices, filled and normalised.

    `forward` takes raw DN as a canonical batch `(n, 7, h, w)`, float32, NaN (or -32768) = missing,
    and returns `(n, channels, h, w)`, float32 and finite. Pixel by pixel: it commutes with
    cutting, turning and mirroring (per-sample normalisation: not with cutting). The numbers are
    buffers, so they move with the model.

    Missing values stay NaN through the indices, then become their channel's stored minimum
    (or 0, as the spec says) before normalising: `(x - q01) / (q99 - q01)` for quantile,
    `(x - mean) / std` for z-score, `(x - min) / (max - min)` for min-max; the divisor is at
    least 1e-6. `water`: optical bands `(x - level) / 1500`, missing ones 0, with the spec's levels
    of clear water, so that kelp, which lifts NIR by some 1000 DN, is of size 1; other channels as
    in quantile.

    The per-sample strategies take these numbers from the observed values of each sample instead
    (`kelp.nn.preprocess`). QA, which is 0 or 1, keeps its stored ones: a sample that is cloudy
    all over must not look like a clear one.

    Raises:
        StatsError: the spec's statistics lack one of its channels.
    """

    fill: Tensor
    offset: Tensor
    divisor: Tensor
    own: Tensor

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, values in zip(("fill", "offset", "divisor"), stored_numbers(spec), strict=True):
            # Not in the weights file: the numbers live in bundle.json, once.
            column = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)
        own = torch.tensor([name != "QA" for name in spec.channels]).view(1, -1, 1, 1)
        self.register_buffer("own", own, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """`(n, 7, h, w)` raw DN to `(n, channels, h, w)` network input, both float32."""
        x: Tensor = channels_of(raw.float(), self.spec, torch)
        x = normalised(x, *self._numbers(x), torch)
        return x

    def _numbers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill, offset and divisor: of the spec's statistics, or of each sample."""
        strategy = self.spec.normalization_strategy
        if strategy not in PER_SAMPLE:
            return self.fill, self.offset, self.divisor
        least, low, width = sample_range(x, PER_SAMPLE[strategy])
        if not self.spec.fill_missing_pixels_with_torch_nan:
            least = torch.zeros_like(least)
        return (
            torch.where(self.own, least, self.fill),
            torch.where(self.own, low, self.offset),
            torch.where(self.own, width.clamp(min=1e-6), self.divisor),
        )


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
