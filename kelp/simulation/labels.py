"""What volunteers draw: masks near the truth, with the faults that are seen in real ones."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kelp.raster.window import Shape
from kelp.simulation.terrain import Mask, fractal, quantile_of
from kelp.simulation.world import CALIBRATED, World

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
