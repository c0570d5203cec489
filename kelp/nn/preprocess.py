"""Raw digital numbers to network input: the one module that training and prediction both call."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from kelp.errors import StatsError
from kelp.inference.spec import NetworkSpec
from kelp.nn.normalization import PER_SAMPLE, sample_range
from kelp.raster.bands import BANDS, NODATA, QA
from kelp.raster.indices import index_planes

# Saturated or broken pixels lie dozens of ranges away; bounding them keeps bf16 and batch
# statistics sane, while 0-1 (the q01-q99 range) and the fill value stay where they are.
_LARGEST: Final = 10.0


class Preprocess(nn.Module):
    """Bands and indices, filled and normalised.

    `forward` takes raw DN as a canonical batch `(n, 7, h, w)`, float32, NaN (or -32768) = missing,
    and returns `(n, channels, h, w)`, float32 and finite. Pixel by pixel: it commutes with
    cutting, turning and mirroring (per-sample normalisation: not with cutting). The numbers are
    buffers, so they move with the model.

    Missing values stay NaN through the indices, then become their channel's stored minimum
    (or 0, as the spec says) before normalising: `(x - q01) / (q99 - q01)` for quantile,
    `(x - mean) / std` for z-score, `(x - min) / (max - min)` for min-max; the divisor is at
    least 1e-6.

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
        lacking = [name for name in spec.channels if name not in spec.statistics]
        if lacking:
            raise StatsError(
                f"the statistics lack the channel {', '.join(lacking)}; make them with kelp stats "
                "for the bands and indices of the run"
            )
        self.spec = spec
        stats = [spec.statistics[name] for name in spec.channels]
        match spec.normalization_strategy:
            case "quantile":
                pairs = [(s.q01, s.q99 - s.q01) for s in stats]
            case "z-score":
                pairs = [(s.mean, s.std) for s in stats]
            case "min-max":
                pairs = [(s.min, s.max - s.min) for s in stats]
            case _:  # of QA alone
                pairs = [(0.0, 1.0) for _ in stats]
        fill = [s.min if spec.fill_missing_pixels_with_torch_nan else 0.0 for s in stats]
        for name, values in (
            ("fill", fill),
            ("offset", [offset for offset, _ in pairs]),
            ("divisor", [max(divisor, 1e-6) for _, divisor in pairs]),
        ):
            # Not in the weights file: the numbers live in bundle.json, once.
            column = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)
        own = torch.tensor([name != "QA" for name in spec.channels]).view(1, -1, 1, 1)
        self.register_buffer("own", own, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """`(n, 7, h, w)` raw DN to `(n, channels, h, w)` network input, both float32."""
        raw = torch.where(raw == NODATA, torch.nan, raw.float())
        qa = torch.nan_to_num(raw[:, QA], nan=1.0)
        planes = {name: raw[:, i] for i, name in enumerate(BANDS)} | {"QA": qa}
        channels = [planes[name] for name in self.spec.bands]
        channels += index_planes(self.spec.spectral_indices, planes, self.spec.index_settings)
        x = torch.stack(channels, dim=1)
        fill, offset, divisor = self._numbers(x)
        x = torch.where(torch.isfinite(x), x, fill)
        return ((x - offset) / divisor).clamp(-_LARGEST, _LARGEST)

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
