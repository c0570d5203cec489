"""The sliced engine: tiles out of scenes, through any network, merged into one map.

It knows no torch: the network is a callable on arrays. Scenes are read strip by strip and
finished rows leave at once, so memory grows with width x tile, not with height x width. Batches
have one fixed shape and run across strips and scenes, so that many small images keep the network
as busy as one large scene, and a pixel's value does not depend on what else is predicted.

Three things happen at a time: one thread reads the next batches, the caller's thread runs the
network, and one thread merges and writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kelp.raster.bands import BANDS
from kelp.raster.window import RasterSource, Tile
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import MergerState, StripMerger
from kelp.tiling.strip import PIECE, Pixels, Run, Slicing, Strip

Predict = Callable[[Pixels], Pixels]
"""Raw DN `(n, 7, h, w)` (canonical, NaN = missing) to probabilities `(n, h, w)`."""

AHEAD: Final = 2
"""Batches that are read before the network wants them, and that wait to be merged."""


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
        """All rows above `state().top` were written; called after each row of tiles.

        The arrays of the state are the merger's own, which changes them after the call.
        """


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

    source: RasterSource
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

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(getattr(self, one.name) + getattr(other, one.name) for one in fields(Counts))
        )


@dataclass(eq=False)
class _Scene:
    """A scene on its way: what is read but not yet written."""

    job: Job
    grid: TileGrid
    merger: StripMerger
    row: int
    """The row of tiles that is being merged."""
    end: int
    """The row of tiles to stop before."""
    head: int
    """First row of pixels that no tile above the section touches."""
    merged: int = 0
    """Its tiles that are merged."""
    seen: deque[NDArray[np.bool_]] = field(default_factory=deque)
    """Observed planes, one row each, from the merger's top on."""
    failed: bool = False
    """It could not be read or written; what remains of it is left out."""

    @classmethod
    def of(cls, job: Job, slicing: Slicing) -> _Scene:
        grid = slicing.grid(job.source.shape)
        spread = job.spread is not None
        section = job.section or Section(0, len(grid.rows))
        row, head = section.first, 0
        state = job.journal.start if job.journal else None
        if state:
            row = grid.rows.index(state.top)
        elif row:
            state = MergerState.empty(grid.rows[row], grid.shape[1], 1 + spread)
            head = grid.rows[row - 1] + grid.tile[0]
        merger = StripMerger(grid.shape, slicing.blend, state, spread=spread)
        return cls(job, grid, merger, row, section.end, head)

    def merge(self, entry: _Entry, values: Pixels | None) -> None:
        """Merge tiles side by side; they come in the order of the grid."""
        tiles = entry.tiles
        if values is None:
            first = tiles[0]
            span = Tile(first.y, first.x, first.height, tiles[-1].right - first.x)
            self.merger.leave_out(span)
        else:
            self.merger.add_row(tiles, values, entry.validity)
        self.merged += len(tiles)
        if self.merged == len(self.grid.columns):
            self._flush_row()

    def _flush_row(self) -> None:
        """Hand on the rows that no later tile touches."""
        self.merged = 0
        self.row += 1
        rows, tile = self.grid.rows, self.grid.tile[0]
        end = self.grid.shape[0] if self.row == len(rows) else rows[self.row]
        if self.merger.top < self.head:
            self._hand_over(min(end, self.head))
        if self.merger.top < end:
            y = self.merger.top
            observed = np.array([self.seen.popleft() for _ in range(end - y)])
            for planes in take_final(self.merger, observed, max(1, PIECE // self.grid.shape[1])):
                self.job.sink.write(y, planes[0])
                if self.job.spread:
                    self.job.spread(y, planes[1])
                y += planes.shape[1]
        if self.row == self.end:
            if self.row < len(rows):
                self._hand_over(rows[self.row - 1] + tile)
            self.job.sink.close()
        elif self.job.journal:
            self.job.journal.commit(self.merger.state)

    def _hand_over(self, end: int) -> None:
        """Hand on rows, up to `end`, to which a neighbouring section has tiles to add."""
        state = self.merger.cut(end)
        observed = np.array([self.seen.popleft() for _ in range(len(state.weights))])
        if self.job.edge:
            self.job.edge(Edge(state, observed))


def take_final(merger: StripMerger, observed: NDArray[np.bool_], most: int) -> Iterator[Pixels]:
    """The next rows of a scene, final: `(planes, rows, width)`, of an observed plane's rows.

    At most `most` rows at a time.
    """
    seen = np.flatnonzero(observed.any(axis=0))
    columns = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
    first = 0
    for planes in merger.take_pieces(merger.top + len(observed), most, columns):
        missing = ~observed[first : first + planes.shape[1], columns]
        first += planes.shape[1]
        for plane in planes[..., columns]:
            # Observed pixels without a vote lie in tiles left out as land: certainly no kelp.
            plane[np.isnan(plane)] = 0.0
            plane[missing] = np.nan
        yield planes


@dataclass(frozen=True)
class _Entry:
    """Tiles side by side on their way through the network, or left out."""

    scene: _Scene
    tiles: tuple[Tile, ...]
    validity: list[float]
    """Share of observed pixels of each."""
    first: int | None
    """Place of the first of them in the batch; None = left out."""

    def of(self, probabilities: Pixels | None) -> Pixels | None:
        """Their part of what the network made of the batch."""
        if self.first is None or probabilities is None:
            return None
        return probabilities[self.first : self.first + len(self.tiles)]


class _Batch:
    """Tiles on their way through the network, with those around them that are left out."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.entries: list[_Entry] = []
        self.count = 0
        self.resumed = 0
        """Tiles that an earlier process had finished."""

    @property
    def full(self) -> bool:
        return self.count == len(self.pixels)

    def add(self, scene: _Scene, run: Run, done: int = 0) -> int:
        """Take a run's tiles, from number `done` on, as far as there is room; how many are done.

        All of those that are left out.
        """
        if run.pixels is None:
            self.entries.append(_Entry(scene, run.tiles, run.validity, None))
            return len(run.tiles)
        end = min(len(run.tiles), done + len(self.pixels) - self.count)
        some = slice(done, end)
        self.pixels[self.count : self.count + end - done] = run.pixels[some]
        self.entries.append(_Entry(scene, run.tiles[some], run.validity[some], self.count))
        self.count += end - done
        return end

    def is_late(self, scene: _Scene, row: int) -> bool:
        """Whether, at the end of a row of tiles, it must not wait for more.

        Without tiles left out it fills up every few rows. Where most are left out, those that
        wait would hold back all the rows below them, in memory.
        """
        if not self.count:
            return bool(self.entries or self.resumed)
        if len({id(entry.scene) for entry in self.entries}) > len(self.pixels):
            return True  # or scenes that are all left out would stay open without end
        columns = len(scene.grid.columns)
        patience = -(-len(self.pixels) // columns)
        oldest = next((entry.tiles[0].y for entry in self.entries if entry.scene is scene), None)
        return oldest is not None and scene.grid.rows.index(oldest) <= row - patience


class Engine:
    """Runs scenes through a network.

    A tile's vote is weighted by its window and by the share of observed input it had; tiles
    without an observed pixel are not run. A scene smaller than a tile is reflected up to it.

    Args:
        predict: the network.
        slicing: how scenes are cut and merged.
        tiles_done: called, in the caller's thread, with the number of tiles just finished.
        allocate: makes the array of a batch (pinned memory, where the network wants it).
    """

    def __init__(
        self,
        predict: Predict,
        slicing: Slicing,
        tiles_done: Callable[[int], None] | None = None,
        allocate: Callable[[tuple[int, ...]], Pixels] | None = None,
    ) -> None:
        self._predict = predict
        self._slicing = slicing
        self.reset(tiles_done)
        shape = (slicing.batch_size, len(BANDS), *slicing.tile)
        make = allocate or (lambda shape: np.zeros(shape, dtype=np.float32))
        # One is in the network, the others are being read.
        self._buffers = deque(make(shape) for _ in range(AHEAD + 1))

    def reset(self, tiles_done: Callable[[int], None] | None = None) -> None:
        """Start counting from zero."""
        # One for each thread: nothing is counted by two.
        self._read_counts, self._network_counts, self._merge_counts = Counts(), Counts(), Counts()
        self.failures: list[tuple[Sink, Exception]] = []
        self._tiles_done = tiles_done

    @property
    def counts(self) -> Counts:
        """What was done since the last `reset`."""
        return self._read_counts + self._network_counts + self._merge_counts

    def skip(self, tiles: int) -> None:
        """Count tiles that were found finished; for what gives the jobs, in the reading thread."""
        self._read_counts.tiles += tiles
        self._read_counts.resumed += tiles

    def run(self, jobs: Iterable[Job]) -> None:
        """Predict scenes. `jobs` is drawn from in the reading thread, a scene at a time.

        A scene whose reading, merging or writing raises ends up in `failures`; the others go on.
        What the network raises ends the run: it would meet every scene.
        """
        with ExitStack() as stack:
            batches = stack.enter_context(closing(self._batches(jobs)))
            # After Ctrl-C no further batch is read, but what the network has done is not lost.
            reading = ThreadPoolExecutor(1, thread_name_prefix="kelp-read")
            stack.callback(reading.shutdown, cancel_futures=True)
            merging = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="kelp-merge"))
            ahead = deque(reading.submit(self._read, batches) for _ in range(AHEAD))
            merged: deque[Future[int]] = deque()
            while batch := ahead.popleft().result():
                ahead.append(reading.submit(self._read, batches))
                if len(merged) == AHEAD:
                    self._advance(merged.popleft().result())
                probabilities = self._run_network(batch)
                merged.append(merging.submit(self._merge, batch, probabilities))
            for done in merged:
                self._advance(done.result())

    def _read(self, batches: Generator[_Batch, None, None]) -> _Batch | None:
        began = perf_counter()
        batch = next(batches, None)
        self._read_counts.reading += perf_counter() - began
        return batch

    def _batches(self, jobs: Iterable[Job]) -> Generator[_Batch, None, None]:
        """All tiles of all scenes, in batches; runs in the reading thread."""
        batch = self._new_batch()
        for job in jobs:
            try:
                scene = _Scene.of(job, self._slicing)
            except Exception as error:  # noqa: BLE001  # also a bug ends its scene only
                self.failures.append((job.sink, error))
                continue
            begun = job.section.first if job.section else 0
            resumed = (scene.row - begun) * len(scene.grid.columns)
            batch.resumed += resumed
            self.skip(resumed)
            strip = Strip(job.source, self._slicing, scene.merger.top)
            for row, y in enumerate(scene.grid.rows[scene.row : scene.end], scene.row):
                if scene.failed:
                    break
                try:
                    scene.seen.extend(strip.advance(y))
                    for run in strip.runs():
                        self._count(run)
                        done = 0
                        while done < len(run.tiles):
                            done = batch.add(scene, run, done)
                            if batch.full:
                                yield batch
                                batch = self._new_batch()
                except Exception as error:  # noqa: BLE001
                    self._fail(scene, error)
                    break
                if batch.is_late(scene, row):
                    yield batch
                    batch = self._new_batch()
        yield batch

    def _new_batch(self) -> _Batch:
        self._buffers.rotate()
        return _Batch(self._buffers[0])

    def _count(self, run: Run) -> None:
        count = len(run.tiles)
        self._read_counts.tiles += count
        if run.pixels is None:
            self._read_counts.land += count * run.land
            self._read_counts.unobserved += count * (not run.land)

    def _run_network(self, batch: _Batch) -> Pixels | None:
        if not batch.count:
            return None
        # One fixed shape: kernels, and so the last bits of a result, depend on it.
        batch.pixels[batch.count :] = batch.pixels[batch.count - 1]
        self._network_counts.batches += 1
        self._network_counts.predicted += batch.count
        began = perf_counter()
        probabilities = self._predict(batch.pixels)
        self._network_counts.network += perf_counter() - began
        return probabilities

    def _merge(self, batch: _Batch, probabilities: Pixels | None) -> int:
        """Merge and write what a batch finished; runs in the merging thread."""
        began = perf_counter()
        for entry in batch.entries:
            if entry.scene.failed:
                continue
            try:
                entry.scene.merge(entry, entry.of(probabilities))
            except Exception as error:  # noqa: BLE001
                self._fail(entry.scene, error)
        self._merge_counts.writing += perf_counter() - began
        return sum(len(entry.tiles) for entry in batch.entries) + batch.resumed

    def _advance(self, tiles: int) -> None:
        if self._tiles_done and tiles:
            self._tiles_done(tiles)

    def _fail(self, scene: _Scene, error: Exception) -> None:
        """Give a scene up; its tiles that are under way are dropped."""
        scene.failed = True
        self.failures.append((scene.job.sink, error))
