"""Scenes and networks of numpy for the tests of the sliced engine."""

import threading

import numpy as np

from kelp.raster.bands import BANDS, DEM, QA
from kelp.raster.validity import canonical
from kelp.raster.window import Tile

NIR = BANDS.index("NIR")


def random_scene(shape, seed=0, missing=0.2, islands=0.0):
    """A canonical array: missing numbers here and there, blocks of cloud, `islands` of land."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 65535, (len(BANDS), *shape)).astype(np.float32)
    pixels[:QA][rng.random((QA, *shape)) < missing] = np.nan
    pixels[QA] = _blocks(rng, shape) < 0.1
    pixels[DEM] = np.where(_blocks(rng, shape) < islands, 5, rng.integers(-2, 1, shape))
    return pixels


def noisy_scene(shape, seed=0, holes=0.2):
    """A canonical array of stored numbers: holes, bad pixels and elevations at random."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 65535, (len(BANDS), *shape)).astype(np.float64)
    raw[QA] = rng.random(shape) < 0.1
    raw[DEM] = rng.integers(-2, 50, shape)
    raw[:QA][rng.random((5, *shape)) < holes] = -32768
    return canonical(raw)


def _blocks(rng, shape, side=13):
    """Random numbers that are the same in blocks of `side` pixels."""
    coarse = rng.random([-(-n // side) for n in shape])
    return coarse.repeat(side, axis=0).repeat(side, axis=1)[: shape[0], : shape[1]]


def exact(batch):
    """The exact network: NIR as a probability."""
    return np.nan_to_num(batch[:, NIR], nan=0.0) / np.float32(65535)


def ramp(batch):
    """A network whose answer depends on where in its tile a pixel lies: tiles disagree."""
    height, width = batch.shape[2:]
    rows = np.linspace(0, 0.3, height, dtype=np.float32)[:, None]
    columns = np.linspace(0, 0.2, width, dtype=np.float32)
    return exact(batch) / 2 + rows + columns


class ArrayScene:
    """A canonical array as source, and as sink of its probabilities; it notes what is asked."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.shape = pixels.shape[1:]
        self.windows: list[Tile] = []
        self.result, self.spread = np.full((2, *self.shape), -1, np.float32)
        self.closed = self.written = self.held = 0
        self._lock = threading.Lock()

    def read(self, tile):
        assert 0 <= tile.y <= tile.bottom <= self.shape[0]
        with self._lock:
            self.windows.append(tile)
            self.held = max(self.held, tile.bottom - self.written)
        return self.pixels[:, *tile.slices]

    def write(self, y, rows):
        assert not self.closed
        assert y == self.written  # from the top on, without gaps
        with self._lock:
            self.result[y : y + len(rows)] = rows
            self.written = y + len(rows)

    def write_spread(self, y, rows):
        assert y + len(rows) == self.written  # of rows that were just written
        self.spread[y : self.written] = rows

    def close(self):
        assert self.written == self.shape[0]
        self.closed += 1
