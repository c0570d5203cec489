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
    cover_spread: float = 0.55
    """Standard deviation of the logarithm of `cover` between images."""
    faintest: float = 0.02
    """Least share of a pixel that the beds of an image cover on average."""
    canopy: float = 0.0
    """How far the look of pure kelp differs between images, as a multiple of our guess."""
    noise_spread: float = 0.0
    """Standard deviation of the logarithm of the sensor's noise between images."""
    unrest: float = 0.0
    """Share of images with masses of water of other colour, with swell, with white caps."""
    tidal: float = 0.0
    """Share of images with wet weed along the shore."""
    veils: float = 0.0
    """Share of images with veils, and of those with small clouds, that QA does not tell of."""
    misregistration: float = 0.0
    """Standard deviation of the shift between bands, px."""
    banding: float = 0.0
    """Median strength of bands along the scan lines, DN."""
    sparse: float = 0.0
    """Share of images with thin canopy around beds and along the shore, which nobody draws."""
    thinnest: float = 0.2
    thickest: float = 0.9
    """Cover of that thin canopy, as a multiple of that of the scene's beds."""
    relief: bool = False
    """Whether slopes lie in the shade."""
    adjacency: float = 0.0
    """Largest share of the light of nearby land that the air scatters into the view of water."""

    @property
    def disturbed(self) -> bool:
        """Whether scenes hold anything of `kelp.simulation.nuisance`."""
        return self.unrest > 0


CALIBRATED: Final = World()

WORLDS: Final[Mapping[WorldName, World]] = {
    "calibrated": CALIBRATED,
    "specks": World(cover=0.25, patches=3.0),
    "murky": World(cover=0.11, clouds=0.02, mud=0.4, glint=0.3, lost=0.12, shifted=0.4),
    "varied": World(
        cover_spread=0.7,
        clouds=0.01,
        mud=0.12,
        glint=0.2,
        canopy=1.0,
        noise_spread=0.5,
        unrest=0.5,
        tidal=0.6,
        veils=0.35,
        misregistration=0.3,
        banding=25,
        sparse=0.75,
        relief=True,
    ),
}
