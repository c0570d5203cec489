"""Random changes of a training crop's optical bands, as light, haze and a failing sensor make them.

A network that has met few scenes takes the level of their water for a law; it then sees kelp all
over the first scene that is brighter. Drawn on the batch, on its device, in surface reflectance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kelp.raster.bands import NODATA, OPTICAL, REFLECTANCE_OFFSET, REFLECTANCE_SCALE

_COUNT = len(OPTICAL)
_OWN = 0.5  # part of each band alone in the offset's standard deviation, next to the common one


@dataclass(frozen=True)
class Radiometry:
    """How far crops are changed; nothing by default.

    Attributes:
        offset: standard deviation of what is added, reflectance: mostly the same in all bands
            (haze, sun glint), to a lesser part each band's own.
        gain: standard deviation of the logarithm of the factor on all bands.
        noise: standard deviation of what is added to each pixel of each band, reflectance.
        dropout: chance of a band to be missing all over a crop; one at least is left.
        droppable: positions of the bands that may be missing: those that a network looks at.
    """

    offset: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    dropout: float = 0.0
    droppable: tuple[int, ...] = tuple(range(_COUNT))

    def __call__(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Raw DN `(n, 7, h, w)`, float32, NaN or -32768 = missing, changed alike; a new tensor.

        Args:
            raw: a canonical batch; QA, DEM and missing values stay as they are.
            generator: draws the changes, on the CPU.
        """
        if not (self.offset or self.gain or self.noise or self.dropout):
            return raw
        drawn = torch.randn(len(raw), _COUNT + 2, 1, 1, generator=generator)
        dropped = torch.rand(len(raw), _COUNT, 1, 1, generator=generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        drawn, dropped = drawn.to(raw.device), dropped.to(raw.device)
        gain = (self.gain * drawn[:, :1]).exp()
        offset = (1 - _OWN**2) ** 0.5 * drawn[:, 1:2] + _OWN * drawn[:, 2:]
        optical = raw[:, :_COUNT]
        changed = (optical * REFLECTANCE_SCALE + REFLECTANCE_OFFSET) * gain + self.offset * offset
        if self.noise:
            # One number a pixel: where the batch lies.
            local = torch.Generator(raw.device).manual_seed(seed)
            noise = torch.empty_like(changed).normal_(generator=local)
            changed += self.noise * noise
        changed = (changed - REFLECTANCE_OFFSET) / REFLECTANCE_SCALE
        if self.dropout and self.droppable:
            seen = list(self.droppable)
            last = dropped[:, seen].amax(1, keepdim=True)
            lost = torch.zeros_like(dropped, dtype=torch.bool)
            lost[:, seen] = (dropped[:, seen] < self.dropout) & (dropped[:, seen] < last)
            changed = torch.where(lost, torch.nan, changed)
        changed = torch.where(optical == NODATA, optical, changed)
        return torch.cat([changed, raw[:, _COUNT:]], 1)
