"""Which images show the same place? Decided by their DEM (elevation model) alone.

Water, clouds and kelp change from date to date; terrain does not. Two images of one place share
terrain at some unknown shift, so they are found the way photographs are registered:

1. `embed` looks for landmarks (peaks, saddles, headlands: extrema of the Hessian's determinant)
   and describes each by the heights around it. Landmarks depend on their surroundings only, so
   they are the same in every image that shows them, wherever they lie in it.
2. Landmarks with like descriptions vote for a pair of images and a shift between them.
3. `similarity` compares the heights themselves where the two images overlap at that shift
   (concordance correlation: 1 only where shape *and* metres agree).

Groups are the connected components of the pairs that are similar enough. No image is compared
with every other one, so the work grows about linearly with their number.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from kelp.errors import ConfigError
from kelp.progress import Progress, silent

DEFAULT_THRESHOLD: Final = 0.9
"""Similarity above which two images show one place; `benchmarks/places.py` measures it."""

MIN_LAND: Final = 0.01
"""An image with a smaller share of pixels above 0 m cannot be placed by its DEM."""

MAX_SHIFT: Final = 204
"""Largest shift searched: 200 px, and 2 px by which each DEM may lie off its image."""

MAX_GROUP: Final = 100
"""A group of more images than this is split at a higher threshold."""

_UNKNOWN: Final = -1  # unknown height in packed terrain
_SMOOTH: Final = 2.0  # px: integer metres and resampling noise vanish, hills stay
_APART: Final = 6  # px: landmarks are the largest response within this radius
_RESPONSE: Final = 1e-3
_STEP: Final = 5  # px between the samples of a description, 5 x 5 of them
_REACH: Final = 2 * _STEP
_NEIGHBOURS: Final = 12
_RADIUS: Final = 0.6
_BIN: Final = 4  # px: votes for one shift may scatter this far
_EVIDENCE: Final = 20  # px of land in the overlap that weigh as much as a doubt

logger = logging.getLogger("kelp")
