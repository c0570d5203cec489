"""Whether a map may be trusted, as far as scene and map themselves show.

A network is sure of itself also where it has never been. What its maps of held-out scenes looked
like is kept in its bundle; a map outside of that is kept, too, but its record says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from kelp.raster.bands import OPTICAL
from kelp.sensors.record import GuardFacts, WaterFacts

FEW_PIXELS: Final = 100
"""Of less kelp nothing is said: a few false pixels are not a false map."""


_ROOM_DN: Final = 100
_ROOM: Final = 0.1
"""Beyond the clear water that was seen: the scenes that come are more than those that were."""

FEW_MAPS: Final = 20
"""Of fewer maps or scenes nobody can tell what is unusual."""


class GuardLimits(BaseModel):
    """What a network's maps of held-out scenes looked like, with some room."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    kelp_share: float = Field(default=1.0, ge=0, le=1)
    """Largest share of observed pixels that is kelp."""
    certainty: float = Field(default=0.0, ge=0, le=1)
    """Smallest mean probability of pixels that are kelp."""
    water: dict[str, tuple[float, float]] = {}
    """Lowest and highest level of clear water, DN, by band; empty: not compared."""
    contrast: dict[str, tuple[float, float]] = {}
    """The same of differences between bands of one scene, such as `SWIR less NIR`: haze lifts all
    bands alike, bands in each other's place do not."""

    def with_maps(self, kelp_share: NDArray[np.float64], certainty: NDArray[np.float64]) -> Self:
        """The limits with those of maps of scenes that training has not seen.

        Args:
            kelp_share: of the observed pixels of each map, `(n,)`.
            certainty: mean probability of its pixels of kelp, `(n,)`.
        """
        if len(kelp_share) < FEW_MAPS:
            return self
        found = {
            "kelp_share": round(min(1.0, 1.25 * float(kelp_share.max())), 4),
            "certainty": round(max(0.0, float(certainty.min()) - 0.03), 4),
        }
        return self.model_copy(update=found)

    def with_water(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Self:
        """The limits with those of the clear water of scenes.

        Args:
            low: lowest DN over each scene, bands in `OPTICAL` order, `(n, 5)`; NaN = unknown.
            high: highest.
        """
        known = np.isfinite(low).all(axis=1)
        if known.sum() < FEW_MAPS:
            return self
        middle = (low[known] + high[known]) / 2
        found = {
            "water": dict(zip(OPTICAL, _range(low[known], high[known]), strict=True)),
            "contrast": dict(zip(_PAIRS, _range(*[-np.diff(middle)] * 2), strict=True)),
        }
        return self.model_copy(update=found)


_PAIRS: Final = tuple(f"{one} less {other}" for one, other in pairwise(OPTICAL))


def _range(low: NDArray[np.float64], high: NDArray[np.float64]) -> list[tuple[float, float]]:
    """From the lowest to the highest of each column, with some room."""
    least, most = low.min(axis=0), high.max(axis=0)
    room = np.maximum(_ROOM_DN, _ROOM * (most - least))
    ends = zip(np.floor(least - room), np.ceil(most + room), strict=True)
    return [(float(a), float(b)) for a, b in ends]


def check(
    observed: int,
    kelp: int,
    certainty: float,
    water: WaterFacts | None,
    limits: GuardLimits | None,
) -> GuardFacts | None:
    """Compare a map with those of held-out scenes.

    Args:
        observed: observed pixels of the map.
        kelp: pixels of kelp.
        certainty: mean probability of the pixels of kelp; anything where there are none.
        water: clear water of the scene; None where the network does not go by it.
        limits: of the network's bundle.

    Returns:
        None where the bundle has no limits.
    """
    if limits is None:
        return None
    if kelp < FEW_PIXELS:
        return GuardFacts()
    reasons = []
    if kelp > limits.kelp_share * observed:
        reasons.append(
            f"{kelp / observed:.1%} of the observed pixels are kelp, in held-out maps at most "
            f"{limits.kelp_share:.1%}"
        )
    if certainty < limits.certainty:
        reasons.append(
            f"kelp has a mean probability of {certainty:.2f}, in held-out maps at least "
            f"{limits.certainty:.2f}"
        )
    if water is not None:
        if water.fallback:
            reasons.append(water.fallback)
        if foreign := _foreign(water.levels, limits.water):
            reasons.append(f"clear water is unlike that of training: {foreign}")
        elif foreign := _foreign(_contrasts(water.levels), limits.contrast):
            reasons.append(
                f"clear water has other colours than that of training: {foreign}: turbid water, or "
                "bands in another order"
            )
    return GuardFacts(ok=not reasons, reasons=tuple(reasons))


def _contrasts(levels: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Differences between bands that follow each other, of the middle of each; given twice."""
    middle = {band: (low + high) / 2 for band, (low, high) in levels.items()}
    pairs = zip(_PAIRS, pairwise(OPTICAL), strict=True)
    return {
        name: (middle[one] - middle[other],) * 2
        for name, (one, other) in pairs
        if one in middle and other in middle
    }


def _foreign(
    levels: Mapping[str, tuple[float, float]], known: Mapping[str, tuple[float, float]]
) -> str:
    """What of clear water lies outside of what the network has learnt from, in words."""
    words = []
    for band, (low, high) in levels.items():
        least, most = known.get(band, (low, high))
        if low < least or high > most:
            found = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
            words.append(f"{band} {found} (there {least:.0f} to {most:.0f})")
    return ", ".join(words)
