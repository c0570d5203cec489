"""The lasting part of a place: its coast, relief, ground cover, and where kelp can grow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from kelp.raster.bands import NODATA
from kelp.raster.window import Shape

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

TILE_AREA: Final = 350 * 350
"""Area (px) that the published figures are about; larger scenes are like several tiles."""

_OFFSHORE: Final = np.float32(12.0)  # px from a reef to the shore that is not in the picture
_MEAN_HEIGHT: Final = 44.0  # m, published mean of land
_WHOLE_DEM_MISSING: Final = 0.033
_PART_DEM_MISSING: Final = 0.08


@dataclass(frozen=True)
class Terrain:
    """What of a place does not change from date to date; all arrays `(height, width)`.

    Attributes:
        land: above water.
        dem: elevation in metres, 0 at sea, -32768 beyond the extent of the elevation model.
        offshore: distance of water to the shore in px, 0 on land; float32.
        rock, sand: share of the ground that is rock or peat, or sand; float32 0-1.
        shallow: brightness of the sea floor as seen from above, 0-1.
        growth: texture that shapes the beds of kelp, about N(0, 1).
    """

    land: Mask
    dem: NDArray[np.int32]
    offshore: Field
    rock: Field
    sand: Field
    shallow: Field
    growth: Field

    @property
    def shape(self) -> Shape:
        """Height and width in px."""
        return Shape.of(self.land)


@lru_cache(maxsize=32)
def _amplitudes(grid: Shape, slope: float, outer: float) -> Field:
    """Spectrum (amplitude falls as frequency^-slope within `outer` px) for fields of sd 1."""
    fy = fft.fftfreq(grid[0])[:, np.newaxis]
    fx = fft.rfftfreq(grid[1])[np.newaxis, :]
    amplitude = (fy**2 + fx**2 + outer**-2.0) ** (-slope / 2)
    amplitude[0, 0] = 0
    # Columns but the first (and, on an even grid, the last) stand for two frequencies.
    twice = np.full(amplitude.shape[1], 2.0)
    twice[0] = 1.0
    power = 2 * (amplitude**2 * twice).sum()
    # A single pixel has no frequency but the mean, which is 0: the field of it is 0, not 0 / 0.
    scale = grid[0] * grid[1] / np.sqrt(power) if power else 0.0
    scaled: Field = (amplitude * scale).astype(np.float32)
    scaled.setflags(write=False)
    return scaled


def fractal(rng: np.random.Generator, shape: Shape, slope: float, outer: float) -> Field:
    """A random field of mean about 0 and sd about 1 with a power-law spectrum.

    Args:
        rng: source of randomness.
        shape: height and width in px.
        slope: amplitude falls as frequency^-slope; 1 is rough, 2.5 smooth.
        outer: px; beyond this distance values are unrelated.
    """
    # The field is periodic; a margin keeps opposite edges of the picture from being alike.
    grid = tuple(fft.next_fast_len(n + int(min(n // 4, outer)), real=True) for n in shape)
    amplitudes = _amplitudes((grid[0], grid[1]), slope, outer)
    noise = rng.standard_normal((*amplitudes.shape, 2), dtype=np.float32).view(np.complex64)
    noise = noise[..., 0] * amplitudes
    field: Field = fft.irfft2(noise, s=grid, overwrite_x=True)[: shape[0], : shape[1]]
    return field


def quantile_of(field: Field, share: float) -> float:
    """The value that the given share of a field lies above (from a sample: fast, not exact)."""
    sample = field.ravel()[:: max(1, field.size // 40_000)]
    return float(np.quantile(sample, 1 - min(max(share, 0.0), 1.0)))


def tiles_in(shape: Shape) -> float:
    """Area in tiles of the competition."""
    return shape[0] * shape[1] / TILE_AREA


def make_terrain(rng: np.random.Generator, shape: Shape) -> Terrain:
    """A new place of the given height and width."""
    height = _relief(rng, shape)
    void = rng.random()  # which part of the elevation model is missing, if any
    land = _land(rng, height, at_sea=void < _WHOLE_DEM_MISSING)
    if land.any():
        offshore = ndimage.distance_transform_edt(~land).astype(np.float32)
    else:  # kelp of the open sea stands on reefs
        reefs = height > quantile_of(height, 0.02)
        offshore = ndimage.distance_transform_edt(~reefs).astype(np.float32) + _OFFSHORE
    rock, sand = _cover(rng, land, offshore)
    lakes = land & (fractal(rng, shape, 2.0, 30) > 2.4)
    lakes = ndimage.binary_opening(lakes, iterations=2)
    ground = land & ~lakes
    floor = np.clip(0.6 + 0.6 * fractal(rng, shape, 1.5, 60), 0, 1)
    return Terrain(
        land=ground,
        dem=_dem(rng, land, offshore, void),
        offshore=offshore,
        rock=rock,
        sand=sand,
        shallow=(floor * np.exp(-offshore / 6)).astype(np.float32),
        growth=fractal(rng, shape, 2.25, 20),
    )


def _relief(rng: np.random.Generator, shape: Shape) -> Field:
    """Height before it is known where the sea level lies: hills, bays and islets."""
    slope = float(rng.choice((2.0, 2.25, 2.5)))  # few distinct spectra, which are kept
    relief = fractal(rng, shape, slope, 400)
    islets = np.clip(fractal(rng, shape, 2.0, 40), 0, None)
    return relief + np.float32(rng.uniform(0.0, 0.12)) * islets


def _land_share(rng: np.random.Generator) -> float:
    kind = rng.random()
    if kind < 0.06:
        return float(rng.uniform(-0.01, 0.02))
    return float(rng.uniform(0.95, 0.999) if kind > 0.97 else rng.beta(0.75, 1.5))


def _land(rng: np.random.Generator, height: Field, at_sea: bool) -> Mask:
    count = max(1, min(24, round(tiles_in(Shape.of(height)))))
    share = float(np.mean([_land_share(rng) for _ in range(count)]))
    if at_sea:  # elevation models leave out what is nearly all sea
        share = 0.1 * share - 0.02
    if share <= 0:
        return np.zeros(height.shape, dtype=bool)
    land: Mask = height > quantile_of(height, share)
    return land


def _cover(rng: np.random.Generator, land: Mask, offshore: Field) -> tuple[Field, Field]:
    """Shares of rock or peat, and of sand, on the ground."""
    shape = Shape.of(land)
    rock = np.clip(fractal(rng, shape, 1.5, 50) - 0.9, 0, 1)
    beach = land & (ndimage.distance_transform_edt(land) < 4) if land.any() else land
    sand = np.clip(3 * fractal(rng, shape, 2.0, 60) - 3, 0, 1) * beach
    return rock.astype(np.float32), sand.astype(np.float32)


def _dem(rng: np.random.Generator, land: Mask, offshore: Field, void: float) -> NDArray[np.int32]:
    shape = Shape.of(land)
    dem = np.zeros(shape, dtype=np.int32)
    if land.any():
        inland = ndimage.distance_transform_edt(land).astype(np.float32)
        hills = np.exp(0.55 * fractal(rng, shape, 2.0, 120))
        top = 1.2 * rng.exponential(_MEAN_HEIGHT) + 12
        height = top * hills * (1 - np.exp(-inland / 25))
        height += 2.5 * fractal(rng, shape, 1.0, 10)
        dem[land] = np.maximum(1, np.rint(height[land])).astype(np.int32)
    edge = fractal(rng, shape, 2.5, 300)
    if void < _WHOLE_DEM_MISSING:
        dem[:] = NODATA
    elif void < _WHOLE_DEM_MISSING + _PART_DEM_MISSING:
        far = offshore > max(8.0, float(np.quantile(offshore, 0.7)))
        dem[far & (edge > -0.3)] = NODATA
    return dem
