"""What the sliced engine is asked to do: scenes or sections of them, and where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kelp.tiling.merge import MergerState
from kelp.tiling.strip import Pixels, Source

WriteRows = Callable[[int, Pixels], None]
"""Takes rows `(n, width)` from row `y` on, as `Sink.write` does."""


class Sink(Protocol):
    """Where a scene's probabilities go."""

    def write(self, y: int, rows: Pixels) -> None:
        """Take rows `(n, width)` from row `y` on: float32 in [0, 1], NaN = not observed."""

    def close(self) -> None:
        """The scene is complete."""


class Journal(Protocol):
    """What lets another process go on with a scene."""

    @property
    def start(self) -> MergerState | None:
        """What an earlier process left, whose sink holds the rows above it; None = nothing."""

    def commit(self, state: Callable[[], MergerState]) -> None:
        """All rows above `state().top` were written; called after each row of tiles."""


@dataclass(frozen=True)
class Edge:
    """Rows that the tiles of another section of the scene touch, too: sums, not yet a mean."""

    state: MergerState
    observed: NDArray[np.bool_]
    """Shape `(rows, width)`."""


@dataclass(frozen=True)
class Section:
    """Rows of tiles of a scene that are predicted apart from the others."""

    first: int
    end: int
    """The row of tiles after the last."""


@dataclass(frozen=True)
class Job:
    """A scene to predict, or a section of one."""

    source: Source
    sink: Sink
    journal: Journal | None = None
    spread: WriteRows | None = None
    """Takes the spread of tiles' probabilities (see `StripMerger`), after the sink its rows; NaN
    = not observed. None: it is not worked out."""
    section: Section | None = None
    """None: all rows of tiles."""
    edge: Callable[[Edge], None] | None = None
    """Takes, from the top down, what a section shares with its neighbours; the sink gets the rest.
    """


@dataclass
class Counts:
    """What engines did."""

    tiles: int = 0
    """Tiles of all scenes."""
    predicted: int = 0
    """Tiles that the network saw."""
    unobserved: int = 0
    """Tiles without one observed pixel, not run."""
    land: int = 0
    """Tiles that are all land, not run on request."""
    resumed: int = 0
    """Tiles that an earlier process had finished."""
    batches: int = 0
    reading: float = 0.0
    """Seconds of reading; they run beside those of the network and of writing."""
    network: float = 0.0
    """Seconds in the network."""
    writing: float = 0.0
    """Seconds of merging and writing."""

    def add(self, other: Counts) -> None:
        """Count in what another engine did."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
