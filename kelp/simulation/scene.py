"""A scene: a place at a date, as a satellite image with its true and its drawn mask.

Volunteers draw masks near the truth, with the faults that are seen in real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.raster.bands import BANDS
from kelp.raster.window import Shape
from kelp.simulation import nuisance, sensor
from kelp.simulation.beds import Sites, density, grow, make_sites
from kelp.simulation.terrain import Field, Mask, Terrain, fractal, make_terrain, quantile_of
from kelp.simulation.world import CALIBRATED, World

MARGIN: Final = 3
"""A place is this many px larger than asked for on every side: DEM and spectra are misaligned."""

# Digital numbers of Landsat Collection 2 Level 2, in the order SWIR, NIR, R, G, B.
_WATER: Final = ((7500, 7700, 7760, 8060, 8110), (200, 230, 330, 370, 380))  # mean, sd of scenes
_GROUND: Final = ((14_800, 16_350, 9950, 9800, 8900), (1100, 1200, 760, 700, 560))
_ROCK: Final = (12_500, 12_800, 10_300, 9800, 9100)
_SAND: Final = (20_000, 18_500, 16_000, 14_500, 12_500)
_SHALLOW: Final = (0, 60, 300, 700, 800)
_TURBID: Final = (0, 200, 700, 700, 500)
_SURF: Final = (1500, 3000, 4000, 4000, 4000)
_KELP: Final = (7700, 16_700, 7900, 7900, 7300)
_OPAQUE: Final = 0.15  # opacity of a cloud that hides the kelp below
_NOISE: Final = (60, 60, 50, 50, 50)


@dataclass(frozen=True)
class Place:
    """A terrain, `MARGIN` px larger than its pictures on every side, and its sites of kelp."""

    terrain: Terrain
    sites: Sites
    world: World = CALIBRATED


@dataclass(frozen=True)
class SimulatedScene:
    """An image and its masks.

    Attributes:
        pixels: int32 `(7, height, width)`, bands in the order of `kelp.raster.bands.BANDS`,
            -32768 = missing.
        truth: uint8 0/1 `(height, width)`: where kelp is, and not hidden by clouds or gaps.
        label: uint8 0/1 `(height, width)`: where volunteers draw it.
    """

    pixels: NDArray[np.int32]
    truth: NDArray[np.uint8]
    label: NDArray[np.uint8]


def simulate_scene(
    seed_or_rng: int | np.random.Generator, height: int, width: int
) -> SimulatedScene:
    """A scene of a new place, of any size; the same seed gives the same scene."""
    rng = np.random.default_rng(seed_or_rng)
    shape = Shape(height, width)
    return take_picture(rng, make_place(rng, shape), (0, 0), shape)


def make_place(rng: np.random.Generator, shape: Shape, world: World = CALIBRATED) -> Place:
    """A new place, large enough for pictures at every `(y, x)` up to `shape`."""
    terrain = make_terrain(rng, Shape(*(side + 2 * MARGIN for side in shape)))
    return Place(terrain, make_sites(rng, terrain), world)


def take_picture(
    rng: np.random.Generator, place: Place, origin: tuple[int, int], shape: Shape
) -> SimulatedScene:
    """The part of a place at `origin` `(y, x)` as it looks at one date."""
    drift = np.clip(np.rint(rng.normal(0, 1, 2)), -2, 2).astype(int)
    y, x = origin[0] + MARGIN, origin[1] + MARGIN
    dem = place.terrain.dem[y : y + shape[0], x : x + shape[1]]
    top, left = y + int(drift[0]), x + int(drift[1])
    seen = _part(place.terrain, (top, left), shape)
    patches = grow(rng, seen, place.sites, (top, left), place.world)
    own = rng.spawn(1)[0] if place.world.disturbed else None
    thin = nuisance.thin_canopy(own, patches, seen, place.world) if own else None
    cover = density(rng, patches, place.world, thin)
    optical, surf = _surface(rng, seen, cover, place.world, own)
    if own:
        nuisance.thin_clouds(own, optical, place.world)
    bright = surf | (seen.sand > 0.4)
    qa, opacity = sensor.add_clouds(rng, optical, place.world)
    flagged = rng.random(shape, dtype=np.float32) < rng.uniform(-0.1, 0.2)
    qa |= bright & flagged
    if own:
        nuisance.misregister(own, optical, place.world)
        nuisance.band_lines(own, optical, place.world)
    masks, told = sensor.missing(rng, optical)
    pixels = np.empty((len(BANDS), *shape), dtype=np.int32)
    pixels[:5] = sensor.record(rng, optical, opacity)
    sensor.blank(pixels, masks)
    pixels[5] = qa | told
    pixels[6] = dem
    rim = (opacity > 0.05) & (opacity < 0.4) & ~seen.land
    patches[(opacity > _OPAQUE) | masks[1]] = 0  # nobody can see or draw these
    lakes_too = seen.offshore == 0  # they count as land
    label = draw_labels(rng, patches, surf | rim, lakes_too, place.world)
    return SimulatedScene(pixels, (patches > 0).astype(np.uint8), label)


def _part(terrain: Terrain, origin: tuple[int, int], shape: Shape) -> Terrain:
    window = np.s_[origin[0] : origin[0] + shape[0], origin[1] : origin[1] + shape[1]]
    return Terrain(
        **{field.name: getattr(terrain, field.name)[window] for field in fields(terrain)}
    )


def _column(values: tuple[float, ...]) -> Field:
    return np.array(values, dtype=np.float32)[:, np.newaxis, np.newaxis]


def _surface(
    rng: np.random.Generator,
    seen: Terrain,
    cover: Field,
    world: World,
    own: np.random.Generator | None,
) -> tuple[Field, Mask]:
    """The five optical bands without atmosphere and sensor, and where surf breaks.

    `own` draws what disturbs a scene, where the world has that.
    """
    surf = _surf(rng, seen)
    water = _water(rng, seen, world, own)
    kelp = _column(_KELP)
    if own:
        nuisance.disturb_water(own, water, seen, world)
        kelp = nuisance.canopy(own, world, kelp)
    water += cover * (kelp - water)
    water += _column(_SURF) * surf
    land = _ground(rng, seen)
    if own:
        nuisance.shade(own, land)
        nuisance.between_tides(own, water, seen, world)
    # The sensor sees a little beyond its pixel: the shore is soft.
    share = ndimage.gaussian_filter(seen.land.astype(np.float32), 0.6, truncate=3)
    water += share * (land - water)
    if own:
        nuisance.scatter(own, water, seen, world)
    noise = rng.standard_normal(water.shape, dtype=np.float32)
    level = _column(_NOISE)
    water += noise * (level * nuisance.noise_factor(own, world) if own else level)
    return water, surf > 0.3


def _surf(rng: np.random.Generator, seen: Terrain) -> Field:
    ring = (seen.offshore > 0) & (seen.offshore <= rng.uniform(1, 2.3)) & ~seen.land
    where = fractal(rng, seen.shape, 2.0, 60) > 0.5
    strength = np.clip(0.4 + 0.3 * fractal(rng, seen.shape, 1.0, 20), 0.05, 1)
    surf: Field = (ring & where) * strength * np.float32(rng.uniform(0.2, 1.2))
    return surf


def _water(
    rng: np.random.Generator, seen: Terrain, world: World, disturbed: np.random.Generator | None
) -> Field:
    """Scene means that haze correlates, texture, shallows, and at times mud or glint."""
    mean, sd = (np.array(values) for values in _WATER)
    haze = rng.standard_normal()
    level = mean + sd * (np.sqrt(0.8) * haze + np.sqrt(0.2) * rng.standard_normal(5))
    level = np.maximum(level, 7210)
    amplitude = rng.uniform(80, 200)
    if disturbed:
        amplitude *= nuisance.calm(disturbed, world)
    common = fractal(rng, seen.shape, 1.25, 60)
    own = fractal(rng, seen.shape, 1.25, 60)
    mix = _column((0.5, 0.6, 0.9, 1.0, 1.0)) * common
    mix += _column((-0.4, -0.3, 0.2, 0.2, 0.4)) * own
    water = mix * np.float32(amplitude) + _column(tuple(level))
    floor = np.maximum(0, rng.normal(1, 0.5, 5)) * np.array(_SHALLOW)
    water += _column(tuple(floor)) * seen.shallow
    mud, glint = rng.random(2)
    patchy = np.clip(0.5 + fractal(rng, seen.shape, 2.0, 200), 0, 1.5)
    if mud < world.mud:
        water += _column(_TURBID) * patchy
    if glint < world.glint:
        water += np.float32(rng.uniform(300, 1500)) * patchy
    return water


def _ground(rng: np.random.Generator, seen: Terrain) -> Field:
    mean, sd = _GROUND
    infra, visible, own = (fractal(rng, seen.shape, 1.3, 80) for _ in range(3))
    common = np.sqrt(0.5)
    ground = np.empty((5, *seen.shape), dtype=np.float32)
    ground[0] = common * infra + common * own
    ground[1] = common * infra - common * own * 0.3 + 0.6 * visible
    for band, part in ((2, 0.98), (3, 0.95), (4, 0.92)):
        ground[band] = part * visible + np.sqrt(1 - part**2) * own
    season = rng.normal(0, 0.4, 5) + rng.normal(0, 0.4)
    ground = (ground * 0.8 + _column(tuple(season))) * _column(sd) + _column(mean)
    ground += seen.rock * (_column(_ROCK) - ground)
    ground += seen.sand * (_column(_SAND) - ground)
    return ground


_FALSE: Final = 0.03  # patches of nothing, for each true one
_ABSURD: Final = 0.0005  # of the masks


def draw_labels(
    rng: np.random.Generator,
    patches: NDArray[np.int32],
    tempting: Mask,
    land: Mask,
    world: World = CALIBRATED,
) -> NDArray[np.uint8]:
    """A volunteers' mask: uint8 0/1 `(height, width)`.

    Args:
        rng: randomness of the image.
        patches: numbered patches of kelp, 0 = none.
        tempting: bright things in the water that are taken for kelp.
        land: where nobody draws kelp, however far off the drawing is.
        world: settings of the coast.
    """
    height, width = patches.shape
    absurd, field = rng.random() < _ABSURD, None
    if absurd:
        field = fractal(rng, Shape(height, width), 1.5, 60)
        return (field > quantile_of(field, rng.uniform(0.4, 0.93))).astype(np.uint8)
    count = int(patches.max())
    kept = rng.random(count + 1) >= world.lost
    kept[0] = False
    mask = kept[patches]
    for _ in range(int(rng.binomial(count, _FALSE))):
        mask |= _false_patch(rng, tempting)
    mask = _polygons(mask)
    return (_shifted(mask, _offset(rng, world)) & ~land).astype(np.uint8)


def _polygons(mask: Mask) -> Mask:
    """Straighten edges by about a pixel; small patches stay as they are."""
    closed = ndimage.binary_closing(np.pad(mask, 2), iterations=1)[2:-2, 2:-2]
    smooth: Mask = ndimage.uniform_filter(closed.astype(np.float32), 3) > 0.5
    core = ndimage.binary_erosion(mask)
    small = mask & ~ndimage.binary_propagation(core, mask=mask) if core.any() else mask
    return smooth | small


def _false_patch(rng: np.random.Generator, tempting: Mask) -> Mask:
    places = np.flatnonzero(tempting)
    out = np.zeros(tempting.shape, dtype=bool)
    if len(places):
        y, x = np.divmod(int(rng.choice(places)), tempting.shape[1])
        size = int(np.ceil(np.sqrt(np.exp(rng.normal(3, 1)))))
        window = np.s_[max(0, y - size) : y + size + 1, max(0, x - size) : x + size + 1]
        out[window] = tempting[window]
    return out


def _offset(rng: np.random.Generator, world: World) -> tuple[int, int]:
    if rng.random() >= world.shifted:
        return int(rng.integers(-1, 2)), int(rng.integers(-1, 2))
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(3, 8)
    return round(far * np.sin(angle)), round(far * np.cos(angle))


def _shifted(mask: Mask, offset: tuple[int, int]) -> Mask:
    """The mask moved down and right by `offset`; what comes in from outside is empty."""
    height, width = mask.shape
    # Never further than the whole picture: slices would else count from the other end.
    dy = max(-height, min(height, offset[0]))
    dx = max(-width, min(width, offset[1]))
    out = np.zeros_like(mask)
    out[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = mask[
        max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)
    ]
    return out
