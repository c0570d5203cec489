"""How sure a figure is: the middle 95 % of bootstrap draws of sites (Efron & Tibshirani 1993).

Sites are drawn, not images or pixels: images of one site, and pixels of one image, are not
independent witnesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FEW_SITES: Final = 8
"""With fewer sites the bootstrap's intervals are too narrow to lean on."""

_LEVEL: Final = 0.95
_MOST_UNDEFINED: Final = 0.05
"""Share of draws without a value above which there is no interval."""


def site_numbers(sites: Sequence[str]) -> tuple[int, ...]:
    """The sites of images by number, from 0, in the order of their names."""
    numbers = {site: k for k, site in enumerate(sorted(set(sites)))}
    return tuple(numbers[site] for site in sites)


class SiteBootstrap:
    """Draws of sites. One object for all that is compared: the same draws make differences paired.

    Args:
        sites: number of sites.
        draws: number of draws.
        seed: of the draws.
    """

    def __init__(self, sites: int, draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sites = sites
        self._times = rng.multinomial(sites, np.full(sites, 1 / sites), size=draws)

    def sums(self, by_site: NDArray[Any]) -> NDArray[Any]:
        """Sums of every draw, `(draws, columns)`, of `(sites, columns)`."""
        total: NDArray[Any] = self._times @ by_site
        return total


def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle 95 % of draws; `None` where more than 5 % of them have no value."""
    known = values[np.isfinite(values)]
    if len(known) < (1 - _MOST_UNDEFINED) * len(values):
        return None
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A figure and the middle 95 % of its bootstrap draws; `None` where undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: Any, draws: NDArray[np.float64]) -> Estimate:
        """From the figure itself and its draws."""
        if not np.isfinite(value):
            return cls()
        return cls(float(value), *(interval(draws) or (None, None)))

    def times(self, unit: float) -> Estimate:
        """In another unit."""
        parts = (self.value, self.low, self.high)
        return Estimate(*(None if part is None else part * unit for part in parts))

    def number(self, form: str = ".3f") -> str:
        """The figure in words."""
        return "–" if self.value is None else f"{self.value:{form}}"

    def bounds(self, form: str = ".3f") -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "–"
        return f"{self.low:{form}} to {self.high:{form}}"

    def __str__(self) -> str:
        return self.number() if self.low is None else f"{self.number()} ({self.bounds()})"

    def to_json(self) -> dict[str, float | None]:
        """By name."""
        return asdict(self)
