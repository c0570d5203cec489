"""What lies between the ground and the file: clouds, missing data, the sensor."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.raster.bands import NODATA, OPTICAL
from kelp.raster.window import Shape
from kelp.simulation.terrain import Field, Mask, fractal, quantile_of, tiles_in
from kelp.simulation.world import CALIBRATED, World

_CLOUD: Final = np.array([20_800, 21_400, 19_200, 18_200, 18_000], dtype=np.float32)
_DARK: Final = np.float32(7300)  # what a shadow tends to
_SATURATED: Final = 65_535
_PERIOD, _TILT = 33.3, np.tan(np.deg2rad(14))  # px, of SLC-off gaps (Landsat 7 after 2003)
_STEPS: Final = (80, 140, 60, 60, 55)  # DN between the levels of an 8-bit sensor


def cloud_share(rng: np.random.Generator, shape: Shape, world: World = CALIBRATED) -> float:
    """Share of clouds and other bad pixels; of large scenes the mean of several tiles."""
    count = max(1, min(24, round(tiles_in(shape))))
    # Less than the published QA (median 0.013), which missing data and bright shores add to.
    shares = np.minimum(0.7, np.exp(rng.normal(np.log(world.clouds), 2.1, count)))
    return float(np.where(rng.random(count) < 0.04, 0, shares).mean())


def add_clouds(
    rng: np.random.Generator, optical: Field, world: World = CALIBRATED
) -> tuple[Mask, Field]:
    """Draw clouds and their shadows into `(5, h, w)` bands; gives QA and the opacity."""
    shape = Shape.of(optical)
    share = cloud_share(rng, shape, world)
    field = fractal(rng, shape, 1.5, 120)
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(5, 25)
    if not share:
        return np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
    edge = quantile_of(field, share)
    thickness = rng.uniform(0.5, 1.5)
    opacity = np.clip((field - edge + 0.15) * np.float32(thickness), 0, 1)
    opacity = ndimage.gaussian_filter(opacity, 0.7, truncate=3)
    shift = (round(far * np.sin(angle)), round(far * np.cos(angle)))
    shadow = np.roll(opacity, shift, axis=(0, 1)) * (1 - opacity) * np.float32(0.5)
    optical += shadow * (_DARK - optical)
    texture = 1 + np.float32(0.05) * field[np.newaxis]
    optical += opacity * (_CLOUD[:, np.newaxis, np.newaxis] * texture - optical)
    qa = ndimage.binary_dilation(field > edge + 0.05)
    missed = fractal(rng, shape, 1.5, 30) > 1.28
    return qa & ~missed, opacity.astype(np.float32)


def _gaps(rng: np.random.Generator, shape: Shape) -> list[Mask]:
    """SLC-off gaps, a little different in every band."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    inside = rng.random() < 0.9
    width = rng.uniform(5, 10) if inside else rng.uniform(16, 23)
    widths = width + rng.uniform(-3, 3) * (x / max(1, shape[1]))
    line = (y - _TILT * x + rng.uniform(0, _PERIOD)) % _PERIOD
    fringe = rng.uniform(0, 6) * np.array([0, 0.3, 0.5, 0.8, 1.0])
    return [(line - f) % _PERIOD < widths for f in rng.permutation(fringe)]


def _edge(rng: np.random.Generator, shape: Shape) -> list[Mask]:
    """Beyond the edge of the satellite's swath: a straight line with teeth."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    angle = rng.uniform(0, 2 * np.pi)
    towards = (y - shape[0] / 2) * np.sin(angle) + (x - shape[1] / 2) * np.cos(angle)
    reach = rng.uniform(0.0, 0.65) * min(shape)
    teeth = rng.uniform(0, 8) * (((y - _TILT * x) % _PERIOD) < _PERIOD / 2)
    fringe = rng.uniform(0, 6) * np.array([0, 0.3, 0.5, 0.8, 1.0])
    return [towards + teeth > reach + f for f in rng.permutation(fringe)]


def missing(rng: np.random.Generator, optical: Field) -> tuple[list[Mask], Mask]:
    """Missing pixels of each band, and where QA tells of them."""
    shape = Shape.of(optical)
    none = np.zeros(shape, dtype=bool)
    if rng.random() < 0.15:
        kind = rng.random()
        masks = _gaps(rng, shape) if kind < 0.6 or kind > 0.9 else [none] * 5
        if kind >= 0.6:
            masks = [a | b for a, b in zip(masks, _edge(rng, shape), strict=True)]
        told = rng.random() > 0.1
        return masks, np.logical_or.reduce(masks) if told else none
    masks = [none] * 5
    for band, chance in ((1, 0.02), (2, 0.06), (3, 0.06), (4, 0.09)):
        if rng.random() < chance:  # negative reflectance of the darkest water
            dark = optical[band] < np.quantile(optical[band, ::4, ::4], 0.002)
            masks[band] = dark & (rng.random(shape, dtype=np.float32) < 0.3)
    return masks, none


def record(rng: np.random.Generator, optical: Field, opacity: Field) -> NDArray[np.int32]:
    """Quantise, stripe, saturate and clip: what the sensor makes of `(5, h, w)` bands."""
    _, height, width = optical.shape
    if rng.random() < 0.6:
        if rng.random() < 0.5:
            rows = rng.normal(0, 1.5, -(-height // 16)).astype(np.float32)
            optical += np.repeat(rows, 16)[:height, np.newaxis]
        for band, step in enumerate(_STEPS):
            phase = np.float32(rng.uniform(0, step))
            optical[band] = np.rint((optical[band] - phase) / step) * step + phase
    out = np.clip(np.rint(optical), 1, _SATURATED).astype(np.int32)
    bright = (opacity > 0.85) | (optical[4] > 15_500)
    for band, chance in zip(range(len(OPTICAL)), (0.03, 0.03, 0.04, 0.02, 0.14), strict=True):
        if rng.random() < chance:
            lit = bright & (rng.random((height, width), dtype=np.float32) < 0.1)
            out[band][lit] = _SATURATED
    return out


def blank(pixels: NDArray[np.int32], masks: list[Mask]) -> None:
    """Put the nodata value where a band is missing, in place."""
    for plane, mask in zip(pixels, masks, strict=False):
        plane[mask] = NODATA
