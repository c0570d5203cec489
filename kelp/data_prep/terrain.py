"""One DEM (elevation model): its landmarks, and how well another DEM agrees with it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_LAND: Final = 0.01
"""An image with a smaller share of pixels above 0 m cannot be placed by its DEM."""

_UNKNOWN: Final = -1  # height in packed terrain
_FINE: Final = 2.0  # px, smoothing for landmarks: rounding to metres vanishes, hills stay
_COARSE: Final = 3.0  # px, smoothing for descriptions: half a pixel off changes little
_APART: Final = 8  # px: a landmark is the largest response within this distance
_RESPONSE: Final = 2e-5  # below lie flats and rounding steps
_SAMPLES: Final = np.arange(-10, 11, 5)  # px: a description is 5 x 5 heights, 5 px apart
_SPARSE: Final = 2  # px between the pixels that similarity looks at
_LAG: Final = 6  # of those pixels: rises are taken over 12 px
_EVIDENCE: Final = 10.0  # of those pixels: shared land that weighs as much as the doubt
_HOPELESS: Final = 0.2  # similarity at a voted shift below which no better shift is sought
_CLIMB: Final = 6  # px at most to a better shift
_ASIDE: Final = 24  # px: here the same terrain agrees no more, a straight shore still does

Heights = NDArray[np.int16]
"""Whole metres, `(height, width)`: 0 = sea, -1 = unknown."""


@dataclass(frozen=True)
class Terrain:
    """What is kept of one DEM: its landmarks and, packed, its heights.

    Attributes:
        shape: `(height, width)` of the DEM.
        landmarks: int64 `(n, 2)`, their `(y, x)`.
        descriptions: float32 `(n, 25)`, the smoothed heights around each.
        packed: the heights, compressed; empty when the DEM cannot place the image.
    """

    shape: tuple[int, int]
    landmarks: NDArray[np.int64]
    descriptions: NDArray[np.float32]
    packed: bytes = field(repr=False)

    @property
    def placeable(self) -> bool:
        """Whether at least 1 % of the pixels are known land."""
        return bool(self.packed)

    def heights(self) -> Heights:
        """Whole metres, int16 of `shape`, -1 = unknown."""
        return np.frombuffer(zlib.decompress(self.packed), dtype=np.int16).reshape(self.shape)


def embed(dem: NDArray[np.float32]) -> Terrain:
    """Landmarks and packed heights of a DEM.

    `dem` has shape `(height, width)`, metres; NaN and negative values are unknown, 0 is sea.
    Unknown counts as sea when landmarks are sought (it mostly is sea, beyond the DEM's extent);
    `similarity` leaves it out.
    """
    known = dem >= 0  # False for NaN, too
    heights = np.where(known, np.minimum(np.rint(dem), 32767), _UNKNOWN).astype(np.int16)
    if np.count_nonzero(heights > 0) < max(1, MIN_LAND * heights.size):
        nothing = np.empty((0, 2), np.int64), np.empty((0, len(_SAMPLES) ** 2), np.float32)
        return Terrain(heights.shape, *nothing, packed=b"")
    # Square root: a metre matters more on a beach than on a mountain. The step of half a unit
    # lets a coast tell something even where the land is flat.
    relief = np.sqrt(np.maximum(heights, 0, dtype=np.float32) / 4)
    relief += np.float32(0.5) * (heights > 0)
    landmarks = _landmarks(relief)
    around = ndimage.gaussian_filter(relief, _COARSE, mode="nearest", truncate=3)
    rows = landmarks[:, 0, None, None] + _SAMPLES[:, None]
    columns = landmarks[:, 1, None, None] + _SAMPLES
    descriptions = around[rows, columns].reshape(len(landmarks), _SAMPLES.size**2)
    return Terrain(heights.shape, landmarks, descriptions, zlib.compress(heights.tobytes(), 1))


def _landmarks(relief: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where the relief bends most in both directions, far enough from the edges to describe."""
    smooth = ndimage.gaussian_filter(relief, _FINE, mode="nearest", truncate=3)
    margin = int(_SAMPLES[-1])
    if min(relief.shape) <= 2 * margin:
        return np.empty((0, 2), np.int64)
    slope_y, slope_x = np.gradient(smooth)
    bend_yy, bend_yx = np.gradient(slope_y)
    bend_xx = np.gradient(slope_x, axis=1)
    response = np.abs(bend_yy * bend_xx - bend_yx**2)
    largest = ndimage.maximum_filter(response, 2 * _APART + 1, mode="constant")
    inner = (slice(margin, -margin),) * 2
    found = ((response == largest) & (response > _RESPONSE))[inner]
    return np.argwhere(found) + margin


def similarity(a: Heights, b: Heights, shift: tuple[int, int]) -> float:
    """How well two DEMs agree where they overlap, in [0, 1]; 1 = the same terrain, much of it.

    Pixel `(y, x)` of `a` is compared with `(y - shift[0], x - shift[1])` of `b`; every other row
    and column is looked at. Compared are the *rises* p and q of the square root of height over 12
    px down and right, where both DEMs are known: 2 sum(p q) / (sum(p p) + sum(q q)), Lin's
    concordance (Biometrics 45, 1989) about zero. Any two shores that face east correlate in
    height, but not in their rises; and unlike a correlation a concordance asks for the same
    metres, not only the same shape. It is lowered by n / (n + 10) where only n of the pixels
    looked at are land, so that two islets do not make a place.
    """
    first, second = _overlap(a.shape, b.shape, shift)
    u, v = a[first][::_SPARSE, ::_SPARSE], b[second][::_SPARSE, ::_SPARSE]
    known = np.minimum(u, v) >= 0
    land = int(np.count_nonzero(known & (np.maximum(u, v) > 0)))
    p, q = (np.sqrt(np.maximum(w, 0), dtype=np.float32) for w in (u, v))
    agree = total = 0.0
    for low, high in ((np.s_[:-_LAG], np.s_[_LAG:]), (np.s_[:, :-_LAG], np.s_[:, _LAG:])):
        both = known[low] & known[high]
        rise_p, rise_q = (p[high] - p[low]) * both, (q[high] - q[low]) * both
        agree += 2 * float(np.vdot(rise_p, rise_q))
        total += float(np.vdot(rise_p, rise_p)) + float(np.vdot(rise_q, rise_q))
    if total == 0:  # nothing but plains
        return 0.0
    return max(0.0, agree / total) * land / (land + _EVIDENCE)


def _overlap(
    a: tuple[int, ...], b: tuple[int, ...], shift: tuple[int, int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of the overlap of two images of shapes `a` and `b` in each of them."""
    starts = [(max(0, s), min(m, n + s)) for m, n, s in zip(a, b, shift, strict=True)]
    first = tuple(slice(lo, max(lo, hi)) for lo, hi in starts)
    second = tuple(
        slice(lo - s, max(lo, hi) - s) for (lo, hi), s in zip(starts, shift, strict=True)
    )
    return first, second


def best_similarity(a: Heights, b: Heights, shift: tuple[int, int]) -> float:
    """`similarity` at `shift` or at a better one uphill from there: votes lie a pixel or so off.

    It is lowered where 24 px to a side the two agree nearly as well: straight shores and plateaus
    fit at many places, so that their fitting proves little.
    """
    best = similarity(a, b, shift)
    if best < _HOPELESS:
        return best
    for _ in range(_CLIMB):
        score, there = max((similarity(a, b, s), s) for s in _around(shift, 1))
        if score <= best:
            break
        best, shift = score, there
    elsewhere = max(similarity(a, b, s) for s in _around(shift, _ASIDE))
    return best * min(1.0, 2 * (1 - elsewhere / best))


def _around(shift: tuple[int, int], step: int) -> list[tuple[int, int]]:
    """The eight shifts `step` px beside a shift."""
    steps = (-step, 0, step)
    return [(shift[0] + y, shift[1] + x) for y in steps for x in steps if y or x]
