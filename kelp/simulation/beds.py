"""Beds of kelp: where they stand at a place, and what of them grows at a date."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from kelp.raster.window import Shape
from kelp.simulation.terrain import Field, Mask, Terrain, fractal, tiles_in
from kelp.simulation.world import CALIBRATED, World

_KELP_TILES: Final = 0.65  # share of images; clouds and volunteers bring it to 0.626
_WEIBULL: Final = (0.68, 1250.0)  # shape, scale of kelp px in a tile with kelp, before losses
_CAP: Final = 16_000  # px a tile
_RICH: Final = 0.05  # share of tiles with three times as much
_LOG_SIZE_SD: Final = 2.1  # of the patches of a tile
_BEDS_LAST, _PLACES_LAST = 0.95, 0.75  # correlation of two dates: of a bed, of all kelp
_SITES: Final = 80  # a tile


@dataclass(frozen=True)
class Sites:
    """Where beds can stand at a place, in the coordinates of its terrain.

    Attributes:
        y, x: position in px.
        standing: how often there is a bed, N(0, 1).
        vigour: how large the bed tends to be, N(0, 1).
        aspect: length over width.
        abundance: how rich the place is, N(0, 1).
    """

    y: NDArray[np.intp]
    x: NDArray[np.intp]
    standing: NDArray[np.float64]
    vigour: NDArray[np.float64]
    aspect: NDArray[np.float64]
    abundance: float


def make_sites(rng: np.random.Generator, terrain: Terrain) -> Sites:
    """Draw the sites of a place, most of them near the shore."""
    count = max(12, round(_SITES * tiles_in(terrain.shape)))
    water = np.flatnonzero((terrain.offshore.ravel() > 0) & ~terrain.land.ravel())
    distance = terrain.offshore.ravel()[water]
    order = np.argsort(distance, kind="stable")
    share = np.clip(rng.normal(0.45, 0.22, count), 0.03, 0.95)
    wanted = 10 * (1 / share - 1)
    start = np.searchsorted(distance[order], wanted - 0.75)
    stop = np.searchsorted(distance[order], wanted + 0.75)
    at = start + (rng.random(count) * (stop - start)).astype(np.intp)
    at = at[(stop > start) & (at < len(water))]
    y, x = np.divmod(water[order[at]], terrain.shape[1])
    return Sites(
        y,
        x,
        rng.standard_normal(len(at)),
        rng.standard_normal(len(at)),
        rng.uniform(2, 5, len(at)),
        float(rng.standard_normal()),
    )


def _alike(
    rng: np.random.Generator, lasting: NDArray[np.float64] | float, share: float
) -> NDArray[np.float64]:
    """N(0, 1) values of a date, correlated by `share` between the dates of a place."""
    fresh = rng.standard_normal(np.shape(lasting))
    value: NDArray[np.float64] = math.sqrt(share) * np.asarray(lasting)
    value = value + math.sqrt(1 - share) * fresh
    return value


def kelp_budget(
    rng: np.random.Generator, abundance: float, tiles: float, world: World = CALIBRATED
) -> tuple[int, int]:
    """How many px of kelp and how many patches an image of `tiles` tiles has."""
    rank = float(stats.norm.cdf(_alike(rng, abundance, _PLACES_LAST)))
    spread = float(np.exp(rng.normal(0, 0.5)))
    rich = 3 if rng.random() < _RICH else 1
    if rank > _KELP_TILES:
        return 0, 0
    shape, scale = _WEIBULL
    pixels = min(_CAP, rich * scale * (-np.log1p(-rank / _KELP_TILES * 0.9999)) ** (1 / shape))
    patches = max(1, round(max(tiles, 1e-9) * 0.25 * pixels**0.54 * spread * world.patches))
    return max(1, round(pixels * tiles)), patches


def grow(
    rng: np.random.Generator,
    terrain: Terrain,
    sites: Sites,
    origin: tuple[int, int],
    world: World = CALIBRATED,
) -> NDArray[np.int32]:
    """The patches of a date: int32 `(height, width)`, 0 = none, else the number of the patch.

    Args:
        rng: randomness of the date.
        terrain: the part of the place that is in the picture.
        sites: the sites of the whole place.
        origin: `(y, x)` of the picture in the place.
        world: settings of the coast.
    """
    height, width = terrain.shape
    patches = np.zeros((height, width), dtype=np.int32)
    size = _alike(rng, sites.vigour, _BEDS_LAST)
    pixels, count = kelp_budget(rng, sites.abundance, tiles_in(terrain.shape), world)
    y, x = sites.y - origin[0], sites.x - origin[1]
    seen = np.flatnonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))
    free = (terrain.offshore > 0) & ~terrain.land
    pixels = min(pixels, int(free.sum()) // 4)
    if not pixels or not len(seen):
        return patches
    # Sites are taken by their rank in a lasting order that dates shuffle a little.
    order = seen[np.argsort(-_alike(rng, sites.standing, _BEDS_LAST)[seen])]
    chosen = order[: min(count, len(order))]
    weight = np.exp(_LOG_SIZE_SD * size[chosen])
    parts = np.maximum(1, np.rint(pixels * weight / weight.sum())).astype(int)
    for number, (site, part) in enumerate(zip(chosen, parts, strict=True), start=1):
        _fill(
            patches, free, terrain, (int(y[site]), int(x[site])), sites.aspect[site], part, number
        )
    return patches


def _fill(
    patches: NDArray[np.int32],
    free: Mask,
    terrain: Terrain,
    centre: tuple[int, int],
    aspect: float,
    pixels: int,
    number: int,
) -> None:
    """Grow one patch: the `pixels` free pixels that are nearest along the shore."""
    reach = int(np.ceil(1.3 * np.sqrt(pixels * aspect))) + 3
    y0, x0 = max(0, centre[0] - reach), max(0, centre[1] - reach)
    window = np.s_[y0 : centre[0] + reach + 1, x0 : centre[1] + reach + 1]
    offshore, room = terrain.offshore[window], free[window]
    dy = np.arange(y0, y0 + offshore.shape[0], dtype=np.float32)[:, np.newaxis] - centre[0]
    dx = np.arange(x0, x0 + offshore.shape[1], dtype=np.float32)[np.newaxis, :] - centre[1]
    gy, gx = _uphill(terrain.offshore, centre)
    across = dy * gy + dx * gx
    along = dx * gy - dy * gx
    depth = offshore - terrain.offshore[centre]  # a ribbon bends with the shore
    cost = (along / np.float32(aspect)) ** 2 + depth**2 + 0.15 * across**2
    cost = np.sqrt(cost) * np.exp(0.35 * terrain.growth[window])
    cost[~room] = np.inf
    taken = _connected(cost, (centre[0] - y0, centre[1] - x0), pixels)
    patches[window][taken] = number
    free[window][taken] = False


def _connected(cost: Field, centre: tuple[int, int], pixels: int) -> Mask:
    """About `pixels` of the cheapest pixels, in one piece around `centre`."""
    values = np.sort(cost[np.isfinite(cost)])
    wanted, piece = pixels, np.zeros(cost.shape, dtype=bool)
    for _ in range(3):  # cheap pixels elsewhere are not taken; dearer ones nearby are instead
        if not values.size:
            break
        numbered, _count = ndimage.label(cost <= values[min(wanted, values.size) - 1])
        piece = (numbered == numbered[centre]) & (numbered > 0)
        short = pixels - int(piece.sum())
        if short <= 0.1 * pixels:
            break
        wanted += short
    return piece


def _uphill(offshore: Field, centre: tuple[int, int]) -> tuple[float, float]:
    """Unit vector away from the shore."""
    y, x = centre
    near = offshore[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
    gy = float(near[-1].mean() - near[0].mean())
    gx = float(near[:, -1].mean() - near[:, 0].mean())
    length = float(np.hypot(gy, gx))
    return (gy / length, gx / length) if length > 1e-6 else (0.0, 1.0)


def density(
    rng: np.random.Generator,
    patches: NDArray[np.int32],
    world: World = CALIBRATED,
    thin: Field | None = None,
) -> Field:
    """Share of a pixel that kelp covers: float32 0-1, soft at the edges of patches.

    Args:
        rng: randomness of the image.
        patches: numbered patches of kelp, 0 = none.
        world: settings of the coast.
        thin: cover outside the patches, as a multiple of that of the scene's beds.
    """
    height, width = patches.shape
    mean = np.exp(rng.normal(np.log(world.cover), world.cover_spread))
    mean = float(np.clip(mean, world.faintest, 0.35))
    texture = fractal(rng, Shape(height, width), 1.5, 6)
    of_patch = np.exp(rng.normal(0, 0.25, patches.max() + 1)).astype(np.float32)
    cover = np.clip(mean * of_patch[patches] + 0.05 * texture, 0.01, 0.6)
    cover = np.where(patches > 0, cover, 0).astype(np.float32)
    if thin is not None:
        cover = np.maximum(cover, np.float32(mean) * thin * (patches == 0))
    soft: Field = np.float32(0.85) * ndimage.gaussian_filter(cover, 1.2, mode="nearest", truncate=3)
    # Beds thin out: half of what is measured 3 px outside of drawn edges is not blur.
    soft += np.float32(0.15) * ndimage.gaussian_filter(cover, 4, mode="nearest", truncate=2)
    return soft
