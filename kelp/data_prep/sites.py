"""Which images show the same place? Decided by their DEM (elevation model) alone.

Water, clouds and kelp change from date to date; terrain does not. Two images of one place share
terrain at some unknown shift, so they are found as photographs are registered:

1. `embed` looks for landmarks (peaks, saddles, headlands: extrema of the Hessian's determinant)
   and describes each by the heights around it. A landmark depends on its surroundings only, so
   it is the same in every image that shows it, wherever it lies there.
2. Landmarks of like description vote for a pair of images and the shift between them.
3. `similarity` compares the heights themselves where the two images overlap at that shift.

Groups are the connected components of the pairs that are similar enough. No image is compared
with every other one, so the work grows about linearly with their number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from kelp.data_prep.terrain import Terrain, best_similarity, embed, similarity
from kelp.errors import ConfigError
from kelp.progress import Progress, silent

__all__ = [
    "DEFAULT_THRESHOLD",
    "Places",
    "Terrain",
    "embed",
    "group_terrains",
    "match",
    "similarity",
]

DEFAULT_THRESHOLD: Final = 0.5
"""Similarity from which two images show one place; `benchmarks/places.py` measures it."""

MAX_SHIFT: Final = 204
"""Largest shift, px along an axis: 200, and 2 by which each DEM may lie off its image."""

MAX_GROUP: Final = 100
"""A group of more images than this is split again at a higher threshold."""

_NEIGHBOURS: Final = 12  # like landmarks looked at for each; a group needs only to be chained
_RADIUS: Final = 0.6  # largest distance of like descriptions, sqrt(m / 4) summed over samples
_BIN: Final = 6  # px: votes for one shift may scatter this much
_MIN_VOTES: Final = 2
_CERTAIN: Final = 0.95  # similarity that is no chance
_DECODED: Final = 256  # DEMs kept unpacked, 250 kB each

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class Places:
    """Images grouped by place.

    Attributes:
        ids: int64 `(images,)`, the group of each, numbered from 0 by first appearance.
        by_dem: bool `(images,)`, False where the DEM could not place the image.
        pairs: int64 `(pairs, 2)`, the pairs of images found similar enough.
        scores: float64 `(pairs,)`, their similarity.
    """

    ids: NDArray[np.int64]
    by_dem: NDArray[np.bool_]
    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.ids.max()) + 1 if len(self.ids) else 0


def _candidates(terrains: Sequence[Terrain]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of images `(n, 2)` that landmarks vote for, first < second, and shifts `(n, 2)`."""
    counts = [len(terrain.landmarks) for terrain in terrains]
    image: NDArray[np.int64] = np.repeat(np.arange(len(terrains), dtype=np.int64), counts)
    if len(image) < 2:
        return np.empty((0, 2), np.int64), np.empty((0, 2), np.int64)
    like = _like_landmarks(np.concatenate([t.descriptions for t in terrains]), image)
    position = np.concatenate([t.landmarks for t in terrains])
    pair, shift = image[like], position[like[:, 0]] - position[like[:, 1]]
    near = np.abs(shift).max(axis=1, initial=0) <= MAX_SHIFT
    pair, shift = pair[near], shift[near]
    # A ballot is (image, image, binned shift), as one number: sorting rows would take minutes.
    side = 2 * (MAX_SHIFT // _BIN + 1) + 1
    binned = np.rint(shift / _BIN).astype(np.int64) + side // 2
    ballots = ((pair[:, 0] * len(terrains) + pair[:, 1]) * side + binned[:, 0]) * side + binned[
        :, 1
    ]
    _, one, member, votes = np.unique(
        ballots, return_index=True, return_inverse=True, return_counts=True
    )
    sums = [np.bincount(member, shift[:, axis], len(one)) for axis in (0, 1)]
    mean = np.rint(np.stack(sums, 1) / votes[:, None]).astype(np.int64)
    elected = votes >= _MIN_VOTES
    return pair[one][elected], mean[elected]


def _like_landmarks(
    descriptions: NDArray[np.float32], image: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pairs of landmarks `(n, 2)` of two images, first < second, with like descriptions."""
    # Turned to their principal axes, which changes no distance, the tree is searched in a fifth
    # of the time.
    centred = descriptions - descriptions.mean(axis=0)
    turned = centred @ np.linalg.eigh(centred.T @ centred)[1]
    distance, nearest = cKDTree(turned).query(
        turned, _NEIGHBOURS + 1, distance_upper_bound=_RADIUS, workers=-1
    )
    one, rank = np.nonzero(np.isfinite(distance))
    other = np.asarray(nearest, dtype=np.int64)[one, rank]
    apart = image[one] != image[other]
    low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
    found = np.unique(low * len(image) + high)  # each pair once, whichever found the other
    return np.stack(np.divmod(found, len(image)), axis=1)


def match(
    terrains: Sequence[Terrain], progress: Progress = silent
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of images that may show one place, int64 `(pairs, 2)`, and their similarity."""
    candidates, shifts = _candidates(terrains)
    heights = lru_cache(maxsize=_DECODED)(lambda i: terrains[i].heights())
    best: dict[tuple[int, int], float] = {}
    for done, ((a, b), (dy, dx)) in enumerate(
        zip(candidates.tolist(), shifts.tolist(), strict=True), 1
    ):
        score = best_similarity(heights(a), heights(b), (dy, dx))
        best[a, b] = max(score, best.get((a, b), 0.0))
        if done % 100 == 0 or done == len(candidates):
            progress("comparing places", done, len(candidates))
    pairs = np.array(list(best), dtype=np.int64).reshape(-1, 2)
    return pairs, np.array(list(best.values()), dtype=np.float64)


def group_terrains(
    terrains: Sequence[Terrain],
    threshold: float = DEFAULT_THRESHOLD,
    progress: Progress = silent,
) -> Places:
    """Group images by the place that their DEMs (`embed`) show.

    Args:
        terrains: about 30 kB each.
        threshold: similarity in (0, 1] from which two images show one place.
        progress: called with the comparisons.

    Raises:
        ConfigError: the threshold lies outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"--similarity_threshold lies above 0 and up to 1, not {threshold}")
    pairs, scores = match(terrains, progress)
    alike = scores >= threshold
    pairs, scores = pairs[alike], scores[alike]
    ids = _split_large(_components(len(terrains), pairs), pairs, scores)
    by_dem = np.array([terrain.placeable for terrain in terrains], dtype=bool)
    return Places(_by_appearance(ids), by_dem, pairs, scores)


def _components(images: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (images, images))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _split_large(
    ids: NDArray[np.int64],
    pairs: NDArray[np.int64],
    scores: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Split groups of more than `MAX_GROUP` images at the lowest threshold that does.

    Pairs from `_CERTAIN` on are never cut: they do show the same terrain, and cutting them would
    leak one place into two folds.
    """
    ids = ids.copy()
    for group in np.flatnonzero(np.bincount(ids) > MAX_GROUP):
        images = np.flatnonzero(ids == group)
        inside = ids[pairs[:, 0]] == group
        local, strength = np.searchsorted(images, pairs[inside]), scores[inside]

        levels = np.unique(np.minimum(strength, _CERTAIN))
        # The largest part only shrinks as the threshold grows, so halving finds it.
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            parts = _components(len(images), local[strength >= levels[middle]])
            small = np.bincount(parts).max() <= MAX_GROUP
            low, high = (low, middle) if small else (middle + 1, high)
        parts = _components(len(images), local[strength >= levels[low]])
        ids[images] = np.where(parts == parts[0], group, parts + ids.max() + 1)
        _tell_split(parts, float(levels[low]))
    return ids


def _tell_split(parts: NDArray[np.int64], level: float) -> None:
    sizes = np.bincount(parts)
    if len(sizes) == 1:
        log.warning("a place of %d images is kept whole: their terrain is the same", len(parts))
    else:
        log.warning(
            "a place of %d images, more than %d, is split at similarity %.3f into %d, the largest "
            "of %d",
            len(parts),
            MAX_GROUP,
            level,
            len(sizes),
            sizes.max(),
        )


def _by_appearance(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number groups from 0 in the order of their first image."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
