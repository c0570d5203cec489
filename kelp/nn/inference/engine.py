"""The sliced engine: tiles out of scenes, through any network, merged into one map.

It knows no torch: the network is a callable on arrays. Scenes are read strip by strip and
finished rows leave at once, so memory grows with width x tile, not with height x width. Batches
have one fixed shape and run across strips and scenes, so that many small images keep the network
as busy as one large scene, and a pixel's value does not depend on what else is predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kelp.bands import BANDS, DEM, observed, reflected
from kelp.errors import KelpError
from kelp.grid import Shape, Tile, TileGrid
from kelp.merge import Blend, StripMerger

Pixels = NDArray[np.float32]

Predict = Callable[[Pixels], Pixels]
"""Raw DN `(n, 7, h, w)` (canonical, NaN = missing) to probabilities `(n, h, w)`."""


class Source(Protocol):
    """Where a scene's pixels come from."""

    @property
    def shape(self) -> Shape:
        """Height and width."""

    def read(self, tile: Tile, /) -> Pixels:
        """A window inside the scene as a canonical array `(7, height, width)`."""


class Sink(Protocol):
    """Where a scene's probabilities go."""

    def write(self, y: int, rows: Pixels) -> None:
        """Take rows `(n, width)` from row `y` on: float32 in [0, 1], NaN = not observed."""

    def close(self) -> None:
        """The scene is complete."""


@dataclass(frozen=True)
class Slicing:
    """How scenes are cut and merged."""

    tile: Shape
    overlap: Shape
    blend: Blend = "mean"
    batch_size: int = 8
    qa_as_nodata: bool = True
    skip_land: bool = False
    """Do not run tiles that are all land (DEM > 0); their pixels are 0."""


@dataclass
class Counts:
    """What an engine did."""

    tiles: int = 0
    """Tiles of all scenes."""
    predicted: int = 0
    """Tiles that the network saw."""
    unobserved: int = 0
    """Tiles without one observed pixel, not run."""
    land: int = 0
    """Tiles that are all land, not run on request."""
    batches: int = 0


@dataclass(eq=False)
class _Scene:
    """A scene on its way: what is read but not yet written."""

    sink: Sink
    grid: TileGrid
    merger: StripMerger
    outstanding: dict[int, int] = field(default_factory=dict)
    """Tiles of each begun row of tiles that are not yet merged."""
    seen: deque[NDArray[np.bool_]] = field(default_factory=deque)
    """Observed planes, one row each, from the merger's top on."""
    failed: bool = False
    """It could not be read or written; what remains of it is left out."""

    def settle(self) -> None:
        """Hand on the rows that no later tile touches."""
        rows = self.grid.rows
        while self.outstanding and next(iter(self.outstanding.values())) == 0:
            y = next(iter(self.outstanding))
            del self.outstanding[y]
            done = rows.index(y) + 1
            if done < len(rows):
                self._write(rows[done])
            else:
                self._write(self.grid.shape[0])
                self.sink.close()

    def _write(self, end: int) -> None:
        top = self.merger.top
        merged = self.merger.take(end)
        seen = np.array([self.seen.popleft() for _ in range(len(merged))])
        # Observed pixels without a vote lie in tiles left out as land: certainly no kelp.
        self.sink.write(top, np.where(seen, np.nan_to_num(merged, nan=0.0), np.float32(np.nan)))


class Engine:
    """Runs scenes through a network. `run` each scene, then `finish`.

    A tile's vote is weighted by its window and by the share of observed input it had; tiles
    without an observed pixel are not run. A scene smaller than a tile is reflected up to it.

    Args:
        predict: the network.
        slicing: how scenes are cut and merged.
        tiles_done: called with the number of tiles that each batch finished.
    """

    def __init__(
        self, predict: Predict, slicing: Slicing, tiles_done: Callable[[int], None] | None = None
    ) -> None:
        self.counts = Counts()
        self.failures: list[tuple[Sink, KelpError]] = []
        self._predict = predict
        self._slicing = slicing
        self._tiles_done = tiles_done
        self._batch = np.zeros((slicing.batch_size, len(BANDS), *slicing.tile), dtype=np.float32)
        self._waiting: list[tuple[_Scene, Tile, float]] = []

    def run(self, source: Source, sink: Sink) -> None:
        """Read a scene and predict its tiles; the last ones may wait for the next scene's.

        A scene that cannot be read or written ends up in `failures`; the others go on.
        """
        grid = TileGrid(source.shape, self._slicing.tile, self._slicing.overlap)
        scene = _Scene(sink, grid, StripMerger(source.shape, self._slicing.blend))
        try:
            self._read(scene, source)
        except KelpError as error:
            self._fail(scene, error)

    def finish(self) -> None:
        """Predict the tiles that still wait; the batch is filled up with the last one."""
        if self._waiting:
            self._flush()

    def _read(self, scene: _Scene, source: Source) -> None:
        strip = _Strip(source, self._slicing.tile)
        for y in scene.grid.rows:
            pixels, fresh = strip.at(y)
            seen = observed(pixels, self._slicing.qa_as_nodata)
            scene.seen.extend(seen[fresh, : source.shape[1]])
            tiles = scene.grid.row(y)
            scene.outstanding[y] = len(tiles)
            for tile in tiles:
                columns = slice(tile.x, tile.right)
                self._take(scene, tile, pixels[:, :, columns], seen[:, columns])
                if scene.failed:
                    return
            self._settle(scene)

    def _take(self, scene: _Scene, tile: Tile, pixels: Pixels, seen: NDArray[np.bool_]) -> None:
        self.counts.tiles += 1
        unobserved = not seen.any()
        land = not unobserved and self._slicing.skip_land and bool((pixels[DEM] > 0).all())
        if unobserved or land:
            self.counts.unobserved += unobserved
            self.counts.land += land
            scene.merger.leave_out(tile)
            scene.outstanding[tile.y] -= 1
            if self._tiles_done:
                self._tiles_done(1)
            return
        self._batch[len(self._waiting)] = pixels
        self._waiting.append((scene, tile, float(seen.mean())))
        if len(self._waiting) == len(self._batch):
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        count = len(waiting)
        # One fixed shape: kernels, and so the last bits of a result, depend on it.
        self._batch[count:] = self._batch[count - 1]
        probabilities = self._predict(self._batch)
        self.counts.batches += 1
        self.counts.predicted += count
        for (scene, tile, validity), values in zip(waiting, probabilities, strict=False):
            scene.merger.add(tile, values, validity)
            scene.outstanding[tile.y] -= 1
        for scene in dict.fromkeys(scene for scene, _, _ in waiting):
            self._settle(scene)
        if self._tiles_done:
            self._tiles_done(count)

    def _settle(self, scene: _Scene) -> None:
        try:
            scene.settle()
        except KelpError as error:
            self._fail(scene, error)

    def _fail(self, scene: _Scene, error: KelpError) -> None:
        """Give a scene up: its waiting tiles leave the batch, the others close the gap."""
        scene.failed = True
        self.failures.append((scene.sink, error))
        kept = [slot for slot, entry in enumerate(self._waiting) if entry[0] is not scene]
        self._batch[: len(kept)] = self._batch[kept]
        self._waiting = [self._waiting[slot] for slot in kept]


class _Strip:
    """A row of tiles of a scene, read so that each row of pixels is fetched once."""

    def __init__(self, source: Source, tile: Shape) -> None:
        self._source = source
        self._tile = tile
        self._pixels = np.zeros((len(BANDS), 0, source.shape[1]), dtype=np.float32)
        self._top = 0

    def at(self, y: int) -> tuple[Pixels, slice]:
        """Pixels of the tiles that begin at row `y`, and which of their rows are new."""
        height, width = self._source.shape
        bottom = min(y + self._tile[0], height)
        kept = self._pixels[:, y - self._top :]
        first = y + kept.shape[1]
        new = self._source.read(Tile(first, 0, bottom - first, width))
        self._pixels = np.concatenate([kept, new], axis=1)
        self._top = y
        pixels = reflected(self._pixels, *self._tile)
        return pixels, slice(first - y, bottom - y)
