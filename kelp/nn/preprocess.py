"""Raw digital numbers to network input, as a module of torch; see `kelp.inference.preprocess`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kelp.inference.preprocess import channels_of, normalised, stored_numbers
from kelp.inference.spec import NetworkSpec
from kelp.nn.normalization import PER_SAMPLE, sample_range


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
    (`kelp.nn.normalization`). QA, which is 0 or 1, keeps its stored ones: a sample that is cloudy
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
