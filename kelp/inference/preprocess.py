"""Raw digital numbers to network input: one module for training and prediction, torch and numpy.

The functions take arrays of either library and its module (`xp`); both give the same operations.
"""

from __future__ import annotations

from typing import Any, Final

from kelp.errors import StatsError
from kelp.inference.spec import NetworkSpec
from kelp.raster.bands import BANDS, NODATA, OPTICAL, QA
from kelp.raster.indices import index_planes

# Saturated or broken pixels lie dozens of ranges away; bounding them keeps bf16 and batch
# statistics sane, while 0-1 (the q01-q99 range) and the fill value stay where they are.
_LARGEST: Final = 10.0
_WATER_SPAN: Final = 1500.0
"""DN; by about as much is NIR of dense kelp above that of clear water."""


def stored_numbers(spec: NetworkSpec) -> tuple[list[float], list[float], list[float]]:
    """Fill, offset and divisor of each channel, of the spec's statistics.

    Raises:
        StatsError: they lack one of its channels.
    """
    lacking = [name for name in spec.channels if name not in spec.statistics]
    if lacking:
        raise StatsError(
            f"the statistics lack the channel {', '.join(lacking)}; make them with kelp stats "
            "for the bands and indices of the run"
        )
    stats = [spec.statistics[name] for name in spec.channels]
    match spec.normalization_strategy:
        case "quantile" | "water":
            pairs = [(s.q01, s.q99 - s.q01) for s in stats]
        case "z-score":
            pairs = [(s.mean, s.std) for s in stats]
        case "min-max":
            pairs = [(s.min, s.max - s.min) for s in stats]
        case _:  # of QA alone
            pairs = [(0.0, 1.0) for _ in stats]
    fill = [s.min if spec.fill_missing_pixels_with_torch_nan else 0.0 for s in stats]
    if spec.normalization_strategy == "water":
        for name, level in zip(OPTICAL, spec.water_levels, strict=True):
            if name in spec.channels:
                at = spec.channels.index(name)
                pairs[at] = (level, _WATER_SPAN)
                fill[at] = level if spec.fill_missing_pixels_with_torch_nan else 0.0
    return fill, [offset for offset, _ in pairs], [max(divisor, 1e-6) for _, divisor in pairs]


def channels_of(raw: Any, spec: NetworkSpec, xp: Any) -> Any:
    """Raw DN `(n, 7, h, w)`, float32, to channels `(n, channels, h, w)`, missing values NaN."""
    raw = xp.where(raw == NODATA, xp.nan, raw)
    qa = xp.nan_to_num(raw[:, QA], nan=1.0)
    planes = {name: raw[:, i] for i, name in enumerate(BANDS)} | {"QA": qa}
    channels = [planes[name] for name in spec.bands]
    channels += index_planes(spec.spectral_indices, planes, spec.index_settings)
    return xp.stack(channels, 1)


def normalised(x: Any, fill: Any, offset: Any, divisor: Any, xp: Any) -> Any:
    """Channels filled and normalised: finite numbers within ±10."""
    x = xp.where(xp.isfinite(x), x, fill)
    return xp.clip((x - offset) / divisor, -_LARGEST, _LARGEST)
