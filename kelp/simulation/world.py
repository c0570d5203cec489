"""Settings of simulated coasts: what differs from one world to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kelp.config.prep import WorldName


@dataclass(frozen=True)
class World:
    """What a coast is like. The defaults meet the published figures of the competition's tiles."""

    cover: float = 0.14
    """Median share of a pixel of a bed that kelp covers: the contrast."""
    patches: float = 1.0
    """Patches of an image, as a multiple of the published number; with smaller ones."""
    clouds: float = 0.006
    """Median share of an image under clouds."""
    mud: float = 0.05
    """Share of images with turbid water."""
    glint: float = 0.1
    """Share of images with sun glint."""
    lost: float = 0.05
    """Share of patches that volunteers miss."""
    shifted: float = 0.25
    """Share of masks that are 3 to 8 px off."""


CALIBRATED: Final = World()

WORLDS: Final[Mapping[WorldName, World]] = {
    "calibrated": CALIBRATED,
    "specks": World(cover=0.25, patches=3.0),
    "murky": World(cover=0.11, clouds=0.02, mud=0.4, glint=0.3, lost=0.12, shifted=0.4),
}
