"""Merging the probabilities of overlapping tiles, in memory that grows with width x tile only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError, CoverageError
from kelp.raster.bands import MASK_NODATA
from kelp.raster.window import Blend, Shape, Tile

# Votes are whole multiples of 2^-42 (value unit x weight unit), summed as float64: whole numbers
# below 2^53 add up exactly there, so the sum does not depend on the order of tiles, and a
# constant stays that constant. 2^10 tiles may lie on a pixel, and `TileGrid` allows no more. 2^-30
# is finer than float32 near 1.
# Squares of votes are rounded to the same unit and summed in the same way.
_VALUE_UNIT: Final = np.float32(2.0**30)
_WEIGHT_UNIT: Final = 2.0**12
_LARGEST_VALUE: Final = 2.0  # probabilities, give or take the last bits of a resampling
# A square loses half a unit, so tiles that agree may seem to vary by that much.
_LEAST_VARIANCE: Final = 2.0**-30
_CHUNK: Final = 1 << 15
"""Pixels that are averaged at a time."""
_VOTES: Final = 1 << 16
"""Pixels of tiles that are added at a time: what is worked on stays in the cache."""


def window(blend: Blend, height: int, width: int) -> NDArray[np.float64]:
    """Weight of each pixel of a tile's vote, in (0, 1], shape `(height, width)`.

    `mean` is uniform. `hann` is the separable Hann window sin²(π (i + ½) / n), which trusts the
    middle of a tile more than its rim (Pielawski & Wählby 2020, PLOS ONE 15(3): e0229839).
    Raises `ConfigError` for any other name.
    """
    match blend:
        case "mean":
            return np.ones((height, width))
        case "hann":
            rows = np.sin(np.pi * (np.arange(height) + 0.5) / height) ** 2
            columns = np.sin(np.pi * (np.arange(width) + 0.5) / width) ** 2
            return np.outer(rows, columns)
        case _:
            raise ConfigError(f"blend: choose mean or hann, not {blend!r}")


def to_mask(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """Kelp where p >= threshold: uint8, 0, 1, or 255 where p is NaN.

    The only place where kelp decides, after tiles, symmetries and networks are averaged. The
    threshold is compared in float32, so that a stored 0.48 counts as at least 0.48.
    """
    mask = (probabilities >= np.float32(threshold)).view(np.uint8)
    mask[np.isnan(probabilities)] = MASK_NODATA
    return mask


@dataclass(frozen=True)
class MergerState:
    """What a `StripMerger` still holds: enough for another process to go on with the scene."""

    top: int
    """First row not yet taken."""
    sums: NDArray[np.float64]
    """Of votes and, with the spread, of their squares: `(planes, rows, width)`."""
    weights: NDArray[np.float32]
    left_out: NDArray[np.bool_]

    @classmethod
    def empty(cls, top: int, width: int, planes: int) -> MergerState:
        """Nothing yet, from row `top` on."""
        return cls(
            top,
            np.zeros((planes, 0, width)),
            np.zeros((0, width), dtype=np.float32),
            np.zeros((0, width), dtype=np.bool_),
        )

    @property
    def bottom(self) -> int:
        """First row below those that are held."""
        return self.top + len(self.weights)

    def joined(self, other: MergerState) -> MergerState:
        """What one merger would hold, had it been given the tiles of both.

        Exact, as all sums are whole numbers. Raises `ValueError` unless both hold the same rows.
        """
        if (self.top, self.bottom) != (other.top, other.bottom):
            raise ValueError(f"rows {self.top}-{self.bottom} beside {other.top}-{other.bottom}")
        return MergerState(
            self.top,
            self.sums + other.sums,
            self.weights + other.weights,
            self.left_out | other.left_out,
        )


class StripMerger:
    """Weighted mean of overlapping tiles of one scene, handed out row by row from the top.

    `add` a tile's values (or `leave_out` the tile), `take` rows that no later tile touches. On
    request also the spread: the standard deviation of a pixel's votes, weighted as the mean is. It
    is right within 0.00004, and exactly 0 where votes are equal, or only one.

    Laws: merging the tiles of an array gives the array back (within 2^-30), for every window,
    validity and order of tiles; a pixel covered by no tile raises `CoverageError`, one covered
    only by tiles left out on purpose is NaN.

    Args:
        shape: `(height, width)` of the scene; parts of tiles outside it are dropped.
        blend: the window of a tile's vote.
        state: what another merger of the same scene held.
        spread: whether `take_planes` gives the spread as well; doubles the sums that are held.
    """

    def __init__(
        self,
        shape: Shape,
        blend: Blend = "mean",
        state: MergerState | None = None,
        spread: bool = False,
    ) -> None:
        window(blend, 1, 1)  # an unknown one is said at once
        self.shape = shape
        self.blend: Blend = blend
        self._window: NDArray[np.float64] = np.zeros((0, 0))
        self._vote: tuple[float, NDArray[np.float64], NDArray[np.float32]]
        """Of the last validity: its rounded weights, in both number formats."""
        self._vote = (0.0, np.zeros((0, 0)), np.zeros((0, 0), dtype=np.float32))
        state = state or MergerState.empty(0, shape[1], 2 if spread else 1)
        self.top = state.top  # first row not yet taken
        # Rows from `top` on, of which `_held` are in use; those below them are 0.
        self._sums, self._weights = state.sums.copy(), state.weights.copy()
        self._left_out = state.left_out.copy()
        self._held = len(state.weights)
        # Of some tiles: new arrays for each would cost more than the sums.
        self._rounded = np.zeros((0, 0, 0), dtype=np.float32)
        self._votes = np.zeros((0, 0, 0))

    def add(self, tile: Tile, values: NDArray[np.floating], validity: float = 1.0) -> None:
        """Add a tile's vote.

        Args:
            tile: where the tile lies.
            values: probabilities (numbers within ±2), shape `(tile.height, tile.width)`.
            validity: the share of observed input the tile had, in (0, 1].
        """
        self.add_row((tile,), values[np.newaxis], (validity,))

    def add_row(
        self, tiles: Sequence[Tile], values: NDArray[np.floating], validities: Sequence[float]
    ) -> None:
        """Add the votes of tiles side by side: the sums of `add`, in fewer and larger steps.

        Args:
            tiles: where they lie: one row, at equal distances from left to right, inside the scene
                (one alone may stick out).
            values: of each, as for `add`: `(n, height, width)`.
            validities: of each, as for `add`.
        """
        steps = {(b.y - a.y, b.x - a.x) for a, b in pairwise(tiles)}
        inside = all((0, 0) < step < (1, 0) for step in steps) and tiles[-1].right <= self.shape[1]
        if len(steps) > 1 or (steps and not inside):
            raise ValueError(f"{tiles} do not lie side by side in the scene")
        if values.shape != (len(tiles), *tiles[0].shape):
            raise ValueError(f"values of shape {values.shape} for {len(tiles)} of {tiles[0]}")
        if not max(-values.min(), values.max()) <= _LARGEST_VALUE:  # NaN is caught, too
            raise ValueError(f"values of {tiles} are not numbers within ±{_LARGEST_VALUE:g}")
        most = max(1, _VOTES // values[0].size)
        if self._votes.shape[1:] != values.shape[1:] or len(self._votes) < min(most, len(tiles)):
            self._rounded = np.empty((most, *values.shape[1:]), dtype=np.float32)
            self._votes = np.empty(self._rounded.shape)
        for first in range(0, len(tiles), most):
            some = slice(first, first + most)
            self._add(tiles[some], values[some], validities[some])

    def _add(
        self, tiles: Sequence[Tile], values: NDArray[np.floating], validities: Sequence[float]
    ) -> None:
        """Add votes of as many tiles as are worked on at a time."""
        rounded, votes = self._rounded[: len(tiles)], self._votes[: len(tiles)]
        np.multiply(values, _VALUE_UNIT, out=rounded, casting="same_kind")
        np.rint(rounded, out=rounded)
        votes[...] = rounded
        weights, whole = self._weigh(values.shape[1:], validities)
        if len(self._sums) > 1:
            squares = np.rint(votes * votes / _VALUE_UNIT)
            squares *= weights
            self._scatter(1, tiles, squares)
        votes *= weights
        self._scatter(0, tiles, votes)
        self._scatter(None, tiles, np.broadcast_to(whole, votes.shape))

    def _scatter(
        self, plane: int | None, tiles: Sequence[Tile], parts: NDArray[np.floating]
    ) -> None:
        """Add `(n, height, width)` to a plane of sums, or to the weights.

        Tiles that do not overlap are added at once.
        """
        first = self._inside(tiles[0])
        total: NDArray[Any] = self._weights if plane is None else self._sums[plane]
        stride = tiles[1].x - first.x if len(tiles) > 1 else max(1, first.width)
        apart = -(-first.width // stride)
        down, across = total.strides
        for k in range(min(apart, len(tiles))):
            own = parts[k::apart, : first.height, : first.width]
            into = np.ndarray(
                own.shape,
                total.dtype,
                total,
                (first.y - self.top) * down + (first.x + k * stride) * across,
                (apart * stride * across, down, across),
            )
            into += own

    def leave_out(self, tile: Tile) -> None:
        """Note that a tile was left out on purpose: its pixels are no holes."""
        inside = self._inside(tile)
        self._left_out[inside.y - self.top : inside.bottom - self.top, inside.slices[1]] = True

    def take(self, end: int) -> NDArray[np.float32]:
        """Rows `top … end` of the merged scene, float32; NaN where all tiles were left out.

        Raises `CoverageError` when a pixel of them was covered by no tile.
        """
        mean: NDArray[np.float32] = self.take_planes(end)[0]
        return mean

    def take_planes(self, end: int, columns: slice = slice(None)) -> NDArray[np.float32]:
        """As `take`, `(planes, rows, width)`: the mean and, where asked for, the spread.

        Of some columns only, if they are given; NaN in the others.
        """
        (planes,) = self.take_pieces(end, self.shape[0], columns)
        return planes

    def take_pieces(
        self, end: int, most: int, columns: slice = slice(None)
    ) -> Iterator[NDArray[np.float32]]:
        """As `take_planes`, of at most `most` rows at a time; all are taken after the last."""
        end = min(end, self.shape[0])
        self._reach(end)
        count, width = end - self.top, self.shape[1]
        left, right, _ = columns.indices(width)
        step = max(1, _CHUNK // max(right - left, 1))  # what is worked on stays in the cache
        for top in range(0, max(count, 1), most):
            bottom = min(top + most, count)
            planes = np.empty((len(self._sums), bottom - top, width), dtype=np.float32)
            planes[..., :left] = planes[..., max(left, right) :] = np.nan
            for first in range(top, bottom if left < right else top, step):
                some = slice(first, min(first + step, bottom))
                out = planes[:, first - top : some.stop - top, left:right]
                self._average((some, slice(left, right)), out)
            yield planes
        self._drop(count)

    def _average(self, at: tuple[slice, slice], out: NDArray[np.float32]) -> None:
        """Mean and spread of rows and columns of the buffers, into `(planes, rows, columns)`."""
        weights = self._weights[at].astype(np.float64)
        unvoted = weights == 0
        if unvoted.any():
            holes = unvoted & ~self._left_out[at]
            if holes.any():
                y, x = np.argwhere(holes)[0] + (at[0].start, at[1].start)
                raise CoverageError(f"no tile covers the pixel at row {self.top + y}, column {x}")
            weights[unvoted] = np.nan  # where all tiles were left out
        weights *= _VALUE_UNIT
        mean = self._sums[(0, *at)] / weights
        out[0] = mean
        if len(out) > 1:
            variance = self._sums[(1, *at)] / weights
            mean *= mean
            variance -= mean
            variance[variance < _LEAST_VARIANCE] = 0
            np.sqrt(variance, out=variance)
            out[1] = variance

    def cut(self, end: int) -> MergerState:
        """Rows `top … end` as sums, to which another merger may still have tiles to add."""
        end = min(end, self.shape[0])
        self._reach(end)
        count = end - self.top
        sums, weights = self._sums[:, :count].copy(), self._weights[:count].copy()
        state = MergerState(self.top, sums, weights, self._left_out[:count].copy())
        self._drop(count)
        return state

    def state(self) -> MergerState:
        """What was added to rows that are not yet taken: views, right until the next call."""
        held = self._held
        return MergerState(
            self.top, self._sums[:, :held], self._weights[:held], self._left_out[:held]
        )

    def _drop(self, count: int) -> None:
        """Forget the first `count` rows; the others move up, in the same memory."""
        kept = self._held - count
        for plane in (*self._sums, self._weights, self._left_out):
            plane[:kept] = plane[count : self._held]
            plane[kept : self._held] = 0
        self._held = kept
        self.top += count

    def _weigh(
        self, shape: tuple[int, ...], validities: Sequence[float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Weights of votes, whole numbers, at least 1: of all alike, or of each; twice."""
        if self._window.shape != shape:
            self._window = window(self.blend, *shape)
            self._vote = (0.0, *self._vote[1:])
        validity = validities[0]
        if any(other != validity for other in validities):
            units = np.array(validities)[:, np.newaxis, np.newaxis] * _WEIGHT_UNIT
        elif validity == self._vote[0]:
            return self._vote[1:]
        else:
            units = np.array(validity * _WEIGHT_UNIT)
        weights = np.maximum(np.rint(self._window * units), 1)
        found = weights, weights.astype(np.float32)
        if not units.ndim:
            self._vote = (validity, *found)
        return found

    def _inside(self, tile: Tile) -> Tile:
        """The part of a tile inside the scene, whose rows are held from then on."""
        if tile.y < self.top:
            raise ValueError(f"{tile} begins above row {self.top}, which was already taken")
        inside = tile.clipped(self.shape)
        self._reach(inside.bottom)
        return inside

    def _reach(self, bottom: int) -> None:
        """Hold rows down to row `bottom`."""
        self._held = max(self._held, bottom - self.top)
        missing = self._held - len(self._weights)
        if missing > 0:
            grow = ((0, missing), (0, 0))
            self._sums = np.pad(self._sums, ((0, 0), *grow))
            self._weights = np.pad(self._weights, grow)
            self._left_out = np.pad(self._left_out, grow)
