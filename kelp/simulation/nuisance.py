"""What else real scenes hold and published figures of water, land and kelp say nothing about.

Each is drawn from random numbers of its own, so that worlds without it keep their bytes. Looking
at readable real tiles told which: open water there is noisier or calmer than any one figure, banded
across the scan lines, dotted with small clouds that QA misses, and green where the tide falls.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.raster.window import Shape
from kelp.simulation.terrain import Field, Terrain, fractal, quantile_of
from kelp.simulation.world import World

# Digital numbers in the order SWIR, NIR, R, G, B.
_CLOUD: Final = (20_800, 21_400, 19_200, 18_200, 18_000)
_WEED: Final = (10_300, 12_900, 8800, 8700, 8300)  # wet rock and weed between the tides
_FOAM: Final = (900, 1800, 2300, 2300, 2200)
_MASS: Final = (40, 70, 180, 200, 180)  # sd between two masses of water
_ENDMEMBER: Final = (200, 2500, 150, 150, 200)  # sd of pure canopy between scenes
_ZERO: Final = 7273  # reflectance 0
_TILT: Final = np.tan(np.deg2rad(14))  # of scan lines in a map that points north
_DETECTORS: Final = 16  # lines of a scan, Landsat 5 and 7


def _column(values: tuple[float, ...]) -> Field:
    return np.array(values, dtype=np.float32)[:, np.newaxis, np.newaxis]


def canopy(rng: np.random.Generator, world: World, usual: Field) -> Field:
    """What a pixel full of kelp looks like in a scene, `(5, 1, 1)`."""
    drawn = rng.standard_normal(5).astype(np.float32)
    return usual + np.float32(world.canopy) * _column(_ENDMEMBER) * drawn[:, np.newaxis, np.newaxis]


def thin_canopy(
    rng: np.random.Generator, patches: NDArray[np.int32], seen: Terrain, world: World
) -> Field:
    """Cover of thin canopy beside the beds, as a multiple of that of the scene's beds.

    On real tiles the near-infrared of water without a label is raised by 300 to 800 DN around beds
    and along shores, where the drawn beds themselves are raised by 700 to 1400: volunteers draw
    what stands out in the scene.
    """
    shape = Shape.of(patches)
    thin = np.zeros(shape, dtype=np.float32)
    around, ashore = rng.random(2) < world.sparse
    water = (seen.offshore > 0) & ~seen.land
    if around and patches.any():
        distance = ndimage.distance_transform_edt(patches == 0).astype(np.float32)
        reach = np.float32(np.exp(rng.uniform(0.7, 2.9))) * (0.6 + fractal(rng, shape, 1.5, 25))
        belt = np.clip((reach - distance) / 2, 0, 1)
        thin = np.maximum(thin, belt * np.float32(rng.uniform(world.thinnest, world.thickest)))
    if ashore:
        reach = np.float32(np.exp(rng.uniform(0.7, 3.2))) * fractal(rng, shape, 1.7, 40)
        belt = np.clip((reach - seen.offshore) / 2, 0, 1)
        thin = np.maximum(thin, belt * np.float32(rng.uniform(world.thinnest, world.thickest)))
    thin *= np.clip(0.85 + 0.3 * fractal(rng, shape, 1.2, 12), 0.1, 1.2)
    return (np.clip(thin, 0, world.thickest) * water).astype(np.float32)


def noise_factor(rng: np.random.Generator, world: World) -> np.float32:
    """How noisy a sensor is beside the usual one."""
    return np.float32(np.exp(rng.normal(0, world.noise_spread)))


def calm(rng: np.random.Generator, world: World) -> float:
    """How strong the texture of the water is beside the usual one: mostly a little weaker."""
    return float(np.exp(rng.normal(-0.3, world.noise_spread)))


def disturb_water(rng: np.random.Generator, water: Field, seen: Terrain, world: World) -> None:
    """Masses of water of other colour, swell that glitters, white caps; in place."""
    masses, glitter, caps = rng.random(3) < world.unrest
    if masses:
        front = fractal(rng, seen.shape, 2.0, 250)
        sharp = np.float32(np.exp(rng.uniform(0, 2.5)))
        share = 1 / (1 + np.exp(-sharp * (front - np.float32(rng.normal(0, 0.7)))))
        common, own = rng.standard_normal(), rng.standard_normal(5)
        step = _column(_MASS) * _column(tuple(0.8 * common + 0.6 * own))
        water += step * share
    if glitter:
        y, x = np.ogrid[: seen.shape[0], : seen.shape[1]]
        angle, length = rng.uniform(0, np.pi), rng.uniform(4, 14)
        phase = 2 * np.pi * (y * np.sin(angle) + x * np.cos(angle)) / length
        wander = np.float32(2.5) * fractal(rng, seen.shape, 1.5, 40)
        where = np.clip(0.5 + fractal(rng, seen.shape, 2.0, 150), 0, 1.5)
        strength = np.float32(np.exp(rng.normal(np.log(120), 0.8)))
        field = where * (np.float32(1) + np.float32(0.5) * np.sin(phase + wander))
        water += strength * field.astype(np.float32) * _column((1.0, 1.0, 0.95, 0.9, 0.85))
    if caps:
        rate = np.exp(rng.normal(np.log(8e-4), 1.0))
        lit = rng.random(seen.shape, dtype=np.float32) < rate
        foam = ndimage.gaussian_filter(lit.astype(np.float32), 0.5, truncate=3)
        water += _column(_FOAM) * foam * np.float32(rng.uniform(0.5, 2.5))


def shade(rng: np.random.Generator, ground: Field) -> None:
    """Slopes that turn from the sun: dark land; in place."""
    slope = fractal(rng, Shape.of(ground), 1.8, 60)
    light = np.clip(1 + np.float32(rng.uniform(0.02, 0.3)) * slope, 0.15, 1.4)
    ground -= _ZERO
    ground *= light
    ground += _ZERO


def between_tides(rng: np.random.Generator, surface: Field, seen: Terrain, world: World) -> None:
    """A rim of wet rock and weed along parts of the shore, which is no kelp forest; in place."""
    if rng.random() >= world.tidal:
        return
    reach = np.float32(rng.uniform(0.8, 2.6))
    along = np.clip(0.6 + fractal(rng, seen.shape, 1.8, 50), 0, 1)
    rim = np.clip(reach + np.float32(0.5) - seen.offshore, 0, 1) * (seen.offshore > 0) * ~seen.land
    rim = ndimage.gaussian_filter((rim * along).astype(np.float32), 0.5, truncate=3)
    surface += rim * np.float32(rng.uniform(0.2, 0.9)) * (_column(_WEED) - surface)


def scatter(rng: np.random.Generator, surface: Field, seen: Terrain, world: World) -> None:
    """Light of the land that the air scatters into the view of the water beside it; in place.

    The adjacency effect raises the near-infrared of water near bright land (Kiselev, Bulgarelli &
    Heege 2015, doi:10.1016/j.rse.2014.07.025); how far and how much is our guess.
    """
    if not world.adjacency:
        return
    share = np.float32(rng.uniform(0, world.adjacency))
    far = float(np.exp(rng.uniform(1.4, 3.0)))  # px: 4 to 20
    around = [ndimage.gaussian_filter(band, far, mode="nearest", truncate=2.5) for band in surface]
    surface += share * ~seen.land * (np.stack(around) - surface)


def thin_clouds(rng: np.random.Generator, optical: Field, world: World) -> None:
    """Veils and small clouds, with their shadows, that QA says nothing of; in place."""
    shape = Shape.of(optical)
    veiled, dotted = rng.random(2) < world.veils
    cloud = _column(_CLOUD)
    if veiled:
        field = np.clip(0.3 + fractal(rng, shape, 1.9, 200), 0, 2)
        field = field + np.float32(0.15) * fractal(rng, shape, 1.4, 20) * (field > 0.1)
        thick = np.float32(np.exp(rng.normal(np.log(0.015), 0.8)))
        opacity = np.clip(thick * field, 0, 0.25)
        optical += opacity * (cloud - optical)
    if dotted:
        small = fractal(rng, shape, 1.2, float(rng.uniform(6, 25)))
        small = small + np.float32(0.8) * fractal(rng, shape, 2.0, 150)
        edge = quantile_of(small, float(np.exp(rng.normal(np.log(0.006), 1.0))))
        opacity = np.clip((small - edge) * np.float32(rng.uniform(0.4, 2.0)), 0, 1)
        opacity = ndimage.gaussian_filter(opacity, 0.6, truncate=3)
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(3, 20)
        shift = (round(far * np.sin(angle)), round(far * np.cos(angle)))
        shadow = np.roll(opacity, shift, axis=(0, 1)) * np.float32(0.4)
        optical += shadow * (np.float32(7300) - optical) * (optical > 7300)
        optical += opacity * (cloud - optical)


def misregister(rng: np.random.Generator, optical: Field, world: World) -> None:
    """Bands a fraction of a pixel beside each other: shores with coloured rims; in place."""
    if not world.misregistration:
        return
    for band in optical:
        shift = np.clip(rng.normal(0, world.misregistration, 2), -1, 1)
        band[...] = ndimage.shift(band, shift, order=1, mode="nearest")


def band_lines(rng: np.random.Generator, optical: Field, world: World) -> None:
    """Scans and detectors that see a little more or less, across a tilted scene; in place."""
    if not world.banding:
        return
    height, width = optical.shape[1:]
    y, x = np.ogrid[:height, :width]
    line = (y - _TILT * x * rng.choice((-1, 0, 1)) + 2 * width).astype(np.intp)
    for band in optical:
        strength = np.exp(rng.normal(np.log(world.banding), 0.8))
        scans = rng.normal(0, 0.7 * strength, line.max() // _DETECTORS + 1).astype(np.float32)
        detectors = rng.normal(0, 0.7 * strength, _DETECTORS).astype(np.float32)
        band += scans[line // _DETECTORS] + detectors[line % _DETECTORS]
