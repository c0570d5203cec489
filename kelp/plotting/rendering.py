"""From bands and masks to colours: plain arrays in, RGB arrays out.

A picture is uint8, shape `(height, width, 3)`. Kelp has the colour of
`kelp.raster.writer.MASK_COLORS` everywhere; what was not observed is hatched in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.plotting.style import FALSE, HATCH_DARK, HATCH_LIGHT, KELP, MISSED, NO_KELP, Color
from kelp.raster import bands, validity
from kelp.raster.bands import MASK_NODATA

Picture = NDArray[np.uint8]
Mask = NDArray[np.uint8]
_PERCENTILES: Final = (1.0, 99.0)
_SMALLEST_RANGE: Final = 0.04  # reflectance; calm water alone must not become coloured noise
_GAMMA: Final = 0.75  # lifts dark water, where kelp grows, without burning the land
_STRIPES: Final = 55  # of the hatch along the longer side
_NDVI_COLORS: Final = np.array(
    [(24, 48, 96), (92, 138, 176), (238, 234, 216), (140, 186, 96), (18, 92, 48)], dtype=np.float64
)
_NDVI_STOPS: Final = np.array([-0.4, -0.1, 0.05, 0.35, 0.8])


def stretch(plane: NDArray[np.float32], observed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Reflectance to 0-1: linear between the 1 % and 99 % quantiles of the observed pixels.

    Clouds and missing pixels do not take part in the quantiles, a range under 0.04 is widened
    about its middle, and a gamma of 0.75 lifts the dark water. NaN stays NaN.
    """
    known = plane[observed & np.isfinite(plane)]
    if not known.size:
        known = plane[np.isfinite(plane)]
    if not known.size:
        return plane
    low, high = np.percentile(known, _PERCENTILES)
    missing_range = max(0.0, _SMALLEST_RANGE - (high - low))
    low, high = low - missing_range / 2, high + missing_range / 2
    scaled: NDArray[np.float32] = np.clip((plane - low) / (high - low), 0, 1) ** _GAMMA
    return scaled.astype(np.float32)


def composite(pixels: NDArray[np.float32], names: Sequence[str]) -> Picture:
    """Three bands of a canonical array as red, green and blue, each stretched on its own.

    Pixels that lack one of the bands are hatched; clouds are shown as the sensor saw them.
    """
    return _hatched(*_colors(pixels, names))


def _colors(
    pixels: NDArray[np.float32], names: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Colours of three bands (0-255), and where one of them is missing."""
    observed = validity.observed(pixels)
    planes = [
        stretch(bands.to_reflectance(pixels[bands.position(name)]), observed) for name in names
    ]
    colors = np.stack(planes, axis=-1)
    missing: NDArray[np.bool_] = np.asarray(np.isnan(colors).any(axis=-1))
    return np.nan_to_num(colors) * 255, missing


def ndvi(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(NIR - R) / (NIR + R) of reflectance, clipped to 0.001-1.2 first; NaN = not observed.

    The clip matters over dark water, where the atmospheric correction leaves values about 0.
    """
    red, nir = (
        np.clip(bands.to_reflectance(pixels[bands.position(name)]), 0.001, 1.2)
        for name in ("R", "NIR")
    )
    index = (nir - red) / (nir + red)
    return np.where(validity.observed(pixels), index, np.nan).astype(np.float32)


def ndvi_picture(pixels: NDArray[np.float32]) -> Picture:
    """NDVI from blue (water) over pale (bare) to green (dense plants); hatched: not observed."""
    index = ndvi(pixels)
    known = np.nan_to_num(index)
    channels = [np.interp(known, _NDVI_STOPS, _NDVI_COLORS[:, k]) for k in range(3)]
    return _hatched(np.stack(channels, axis=-1), ~np.isfinite(index))


def mask_picture(mask: Mask) -> Picture:
    """A mask in its colours, not observed hatched."""
    colors = np.where((mask == 1)[..., None], KELP, NO_KELP)
    return _hatched(colors, mask == MASK_NODATA)


def error_picture(truth: Mask, prediction: Mask) -> Picture:
    """Hits, misses and false alarms on plain ground; hatched where either mask is 255."""
    colors = np.full((*truth.shape, 3), NO_KELP)
    for is_kelp, is_found, color in ((1, 1, KELP), (1, 0, MISSED), (0, 1, FALSE)):
        colors[(truth == is_kelp) & (prediction == is_found)] = color
    return _hatched(colors, (truth == MASK_NODATA) | (prediction == MASK_NODATA))


def ramp(name: Literal["viridis", "gray"], steps: int = 48, gamma: float = 1) -> Picture:
    """Colours of an even colormap from its low end to its high one, shape `(1, steps, 3)`.

    A `gamma` below 1 lifts the low end.
    """
    from matplotlib import colormaps

    colors = colormaps[name](np.linspace(0, 1, steps) ** gamma)[None, :, :3]
    return np.round(255 * colors).astype(np.uint8)


def shaded(plane: NDArray[np.float32], limits: tuple[float, float], colors: Picture) -> Picture:
    """Values in the colours of a `ramp` between two limits; those that are not finite are hatched.

    Args:
        plane: shape `(height, width)`.
        limits: values at the ends of the ramp; what lies beyond has the colour of the end.
        colors: of the ramp.
    """
    low, high = limits
    known = np.isfinite(plane)
    scaled = (np.where(known, plane, low) - low) / max(high - low, 1e-6)
    steps = colors.shape[1]
    place = np.clip((scaled * steps).astype(np.int64), 0, steps - 1)
    return _hatched(colors[0, place], ~known)


def hatch(shape: tuple[int, int]) -> Picture:
    """What stands for "not observed"."""
    return _hatched(np.zeros((*shape, 3), np.uint8), np.ones(shape, dtype=np.bool_))


def overlay_picture(pixels: NDArray[np.float32], mask: Mask) -> Picture:
    """Kelp over dimmed true colour, the edge of each patch solid; not observed is hatched."""
    picture = _backdrop(pixels, mask == MASK_NODATA)
    _paint(picture, mask == 1, KELP)
    return picture.round().astype(np.uint8)


def agreement_picture(pixels: NDArray[np.float32], truth: Mask, prediction: Mask) -> Picture:
    """Hits, misses and false alarms over dimmed true colour; hatched where either mask is 255."""
    picture = _backdrop(pixels, (truth == MASK_NODATA) | (prediction == MASK_NODATA))
    _paint(picture, (truth == 1) & (prediction == 1), KELP)
    _paint(picture, (truth == 1) & (prediction == 0), MISSED)
    _paint(picture, (truth == 0) & (prediction == 1), FALSE)
    return picture.round().astype(np.uint8)


def _backdrop(pixels: NDArray[np.float32], not_observed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """True colour, darker and greyer so that colours stand out on it, and hatched."""
    colors, missing = _colors(pixels, ("R", "G", "B"))
    grey = colors.mean(axis=-1, keepdims=True)
    return _hatched(0.8 * (0.5 * colors + 0.5 * grey), missing | not_observed).astype(np.float32)


def _paint(picture: NDArray[np.float32], where: NDArray[np.bool_], color: Color) -> None:
    inside = ndimage.binary_erosion(where, border_value=1)
    strength = np.where(inside, 0.72, 1.0)[..., None]
    painted = (1 - strength) * picture + strength * np.array(color)
    picture[where] = painted[where]


def _hatched(
    colors: NDArray[np.floating] | NDArray[np.integer], where: NDArray[np.bool_]
) -> Picture:
    """`colors` (0-255) with diagonal stripes at `where`."""
    height, width = where.shape
    period = max(4, round(max(height, width) / _STRIPES))
    rows, columns = np.ogrid[:height, :width]
    dark = (rows + columns) % period < period / 3
    stripes = np.where(dark[..., None], HATCH_DARK, HATCH_LIGHT)
    return np.where(where[..., None], stripes, colors).round().astype(np.uint8)


def shrink_pixels(pixels: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """A canonical array `step` times smaller: means of blocks; QA is 1 where half a block is.

    The last block of a row or column may be smaller. Shape `(7, ceil(h/step), ceil(w/step))`.
    """
    small = shrink_plane(pixels, step)
    if step > 1:
        small[bands.QA] = small[bands.QA] >= 0.5
    return small


def shrink_plane(plane: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """A plane `step` times smaller: means of what is known in each block, NaN where nothing is."""
    if step == 1:
        return plane
    known = np.isfinite(plane)
    number = _block_sums(known, step)
    total = _block_sums(np.where(known, plane, 0), step)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def shrink_highest(plane: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """A plane `step` times smaller: the highest of each block, NaN where none is known."""
    height, width = plane.shape
    extra = (-height % step, -width % step)
    filled = np.pad(
        np.where(np.isnan(plane), -np.inf, plane), [(0, n) for n in extra], constant_values=-np.inf
    )
    blocks = filled.reshape(filled.shape[0] // step, step, filled.shape[1] // step, step)
    highest = blocks.max(axis=(1, 3))
    return np.where(np.isfinite(highest), highest, np.nan).astype(np.float32)


def shrink_mask(mask: Mask, step: int) -> Mask:
    """A mask `step` times smaller, on which no kelp is lost: one kelp pixel makes a block kelp.

    A block without kelp is 255 when more than half of it is.
    """
    if step == 1:
        return mask
    planes = (mask == 1, mask == MASK_NODATA, np.ones_like(mask))
    kelp, unseen, number = (_block_sums(plane, step) for plane in planes)
    small = np.where(2 * unseen > number, MASK_NODATA, 0)
    return np.where(kelp > 0, 1, small).astype(np.uint8)


def shrink_errors(truth: Mask, prediction: Mask, step: int) -> Mask:
    """What blocks of `step` x `step` pixels show most: 1 hits, 2 misses, 3 false alarms.

    Without any of them a block is 255 when either mask is in more than half of it, else 0.
    """
    unseen = (truth == MASK_NODATA) | (prediction == MASK_NODATA)
    kinds = [
        (truth == 1) & (prediction == 1),
        (truth == 1) & (prediction == 0),
        (truth == 0) & (prediction == 1),
        unseen,
        np.ones_like(unseen),
    ]
    *counts, not_seen, number = _block_sums(np.stack(kinds), step)
    most = np.argmax(counts, axis=0) + 1
    empty = np.where(2 * not_seen > number, MASK_NODATA, 0)
    return np.where(np.max(counts, axis=0) > 0, most, empty).astype(np.uint8)


def _block_sums(planes: NDArray[np.generic], step: int) -> NDArray[np.float32]:
    """Sums of blocks of `step` x `step` over the last two axes; a last block may be smaller."""
    height, width = planes.shape[-2:]
    sums = np.zeros((*planes.shape[:-2], -(-height // step), -(-width // step)), dtype=np.float32)
    # Adding shifted views is several times faster than np.add.reduceat.
    for y in range(min(step, height)):
        for x in range(min(step, width)):
            part = planes[..., y::step, x::step]
            sums[..., : part.shape[-2], : part.shape[-1]] += part
    return sums
