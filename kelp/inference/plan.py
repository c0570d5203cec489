"""What a prediction will take, worked out before its first tile: tiles, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import ConfigError, InputError
from kelp.inference import memory
from kelp.io.files import amount
from kelp.raster.bands import BANDS
from kelp.raster.scene import SceneSize
from kelp.raster.window import Shape
from kelp.tiling.engine import AHEAD
from kelp.tiling.grid import TileGrid
from kelp.tiling.strip import PIECE, WIDEST, Slicing, panel_width, strip_rows

_CANONICAL: Final = 4 * len(BANDS)
"""Bytes of a pixel inside kelp."""
_MERGING: Final = 8 + 4 + 1
"""Bytes of a pixel that waits for tiles: sum, weight, whether it was left out."""
_MERGING_SPREAD: Final = 8
"""The sum of squares."""
SMALLEST_CACHE: Final = 16 << 20
_LARGEST_CACHE: Final = 512 << 20
_LARGEST_CACHE_WIDE: Final = 256 << 20
"""Without a budget, and of a scene in panels: where more is needed, blocks are decoded again for
each row of tiles. A part of what is needed would hold no block long enough."""
_SLACK: Final = 1.1
"""Allocators round up."""


@dataclass(frozen=True)
class Plan:
    """What a prediction will take."""

    scenes: int
    tiles: int
    batch_size: int
    """Crops in a batch, after the budget."""
    multiplier: float
    """Network pixels for each scene pixel: the cost beside one whole-image pass."""
    disk: int
    """Bytes at most that outputs and what is kept while they are made take."""
    cache: int
    """Bytes for decoded blocks of the files that are read."""
    memory: int | None = None
    """Bytes that the process will hold at most; None = not worked out."""

    def __str__(self) -> str:
        parts = [
            f"plan: {self.tiles:,} tiles of {self.scenes:,} scene{'s' * (self.scenes != 1)}",
            f"{self.multiplier:.1f} times the network pixels of one whole-image pass",
            f"at most {amount(self.disk)} on disk",
        ]
        if self.memory is not None:
            parts.append(f"batches of {self.batch_size}, at most {amount(self.memory)} of memory")
        return ", ".join(parts)


def make_plan(
    scenes: Sequence[SceneSize], slicing: Slicing, network_pixels: int, pixel_bytes: int
) -> Plan:
    """A plan without a budget.

    Args:
        scenes: their sizes.
        slicing: how they are cut.
        network_pixels: what all networks and symmetries see of a tile, in their own pixels.
        pixel_bytes: of the outputs, for each pixel.
    """
    tiles = sum(len(slicing.grid(scene.shape)) for scene in scenes)
    areas = [scene.shape[0] * scene.shape[1] for scene in scenes]
    return Plan(
        scenes=len(scenes),
        tiles=tiles,
        batch_size=slicing.batch_size,
        multiplier=tiles * network_pixels / max(sum(areas), 1),
        disk=output_bytes(scenes, pixel_bytes),
        cache=max(
            (
                need
                for need, scene in zip(_caches(scenes, slicing), scenes, strict=True)
                if need <= (_LARGEST_CACHE if scene.shape[1] <= WIDEST else _LARGEST_CACHE_WIDE)
            ),
            default=SMALLEST_CACHE,
        ),
    )


def output_bytes(scenes: Sequence[SceneSize], pixel_bytes: int) -> int:
    """Bytes at most that outputs and what is kept while they are made take."""
    areas = [scene.shape[0] * scene.shape[1] for scene in scenes]
    # Overviews add a third; the rows of the largest lie beside it until it is done, its mask's
    # overviews below them.
    return int((sum(areas) + max(areas, default=0)) * 4 / 3 * pixel_bytes)


@dataclass(frozen=True)
class NetworkMemory:
    """What the network needs, measured in bytes."""

    present: int
    """The process with the network loaded, doing nothing."""
    first: int
    """More, while it runs a batch of one crop."""
    further: int
    """More again, for each further crop of a batch."""

    @classmethod
    def measure(
        cls, network: Callable[[NDArray[np.float32]], object], tile: Shape, budget: int
    ) -> NetworkMemory:
        """Run a batch of one crop, and one of two where `budget` bytes allow it."""

        def run(count: int) -> int:
            batch = np.zeros((count, len(BANDS), *tile), dtype=np.float32)
            return memory.growth(lambda: network(batch))

        run(1)  # what is made once stays: kernels, reordered weights
        memory.give_back()
        present = memory.resident()
        first = run(1)
        # A network that needs no memory to speak of still needs its input and output.
        further = max(run(2) - first, first // 2) if present + 2 * first <= budget else first
        return cls(present, first, further)


def fit_memory(
    plan: Plan,
    budget: int,
    scenes: Sequence[SceneSize],
    slicing: Slicing,
    network: NetworkMemory,
    spread: bool = False,
) -> Plan:
    """The plan with the largest batch, at most that of `plan`, that keeps to `budget`.

    `spread`: whether the spread of tiles is worked out, too.

    Raises:
        ConfigError: not even batches of one crop fit; names the smallest budget that works.
    """

    def total(batch: int, cache: int) -> int:
        cut = replace(slicing, batch_size=batch)
        work = network.first + (batch - 1) * network.further + _buffers(cut) + cache
        work += max(_scene_bytes(scene, cut, spread) for scene in scenes)
        return network.present + int(_SLACK * work)

    cache = max(_caches(scenes, slicing))
    if total(1, cache) > budget:
        cache = SMALLEST_CACHE  # blocks are then decoded several times, which costs time only
    if total(1, cache) > budget:
        # Measured again, the program may take a little more: what is named must work then, too.
        least = int(1.02 * total(1, cache))
        raise ConfigError(
            f"--max_memory {amount(budget)}: the smallest that works here is {amount(least)} "
            f"({amount(network.present)} for the program and its network, the rest for tiles and "
            "rows); smaller tiles need less"
        )
    batch = slicing.batch_size
    while batch > 1 and total(batch, cache) > budget:
        batch = (batch + 1) // 2
    return replace(plan, batch_size=batch, cache=cache, memory=total(batch, cache))


def check_disk(plan: Plan, folder: Path) -> None:
    """Raise `InputError` where the disk of `folder` has no room for the outputs."""
    check_space(folder, plan.disk, "choose another --output_dir")


def check_space(folder: Path, need: int, way_out: str) -> None:
    """Raise `InputError` where the disk of `folder` has no room for `need` bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{folder}: {amount(free)} are free, up to {amount(need)} may be needed; "
            f"free some space, or {way_out}"
        )


def _buffers(slicing: Slicing) -> int:
    """Bytes of the batches under way, and of their probabilities."""
    pixels = slicing.batch_size * slicing.tile[0] * slicing.tile[1]
    return (AHEAD + 1) * pixels * _CANONICAL + (AHEAD + 1) * pixels * 4


def _scene_bytes(scene: SceneSize, slicing: Slicing, spread: bool) -> int:
    """Bytes of a scene under way: its strip, rows being read, merged and written."""
    height, width = scene.shape
    tile, stride = min(slicing.tile[0], height), min(slicing.stride[0], height)
    rows, panel = min(strip_rows(slicing), height), panel_width(slicing, scene.shape, scene.block)
    strip = rows * (panel * _CANONICAL + width)
    at_once = stride if panel == width else rows  # rows that are read
    read = max(PIECE, at_once * scene.block[1] if scene.block[1] < panel else panel)
    reading = min(at_once * panel, read) * (scene.stored + 2 * _CANONICAL)
    # Rows of tiles that are read but not yet merged: batches under way, and one to be filled.
    columns = len(
        TileGrid(Shape(1, width), Shape(1, slicing.tile[1]), Shape(0, slicing.overlap[1]))
    )
    ahead = -(-(2 * AHEAD + 2) * slicing.batch_size // columns) + 1
    sums = _MERGING + spread * _MERGING_SPREAD
    overlap = min(slicing.overlap[0], height)  # a copy for a neighbouring section
    merging = width * ((tile + overlap) * sums + min(tile + ahead * stride, height))
    written = min(stride * width, max(PIECE, width))
    writing = written * (48 + spread * 28)
    small = max(width, slicing.tile[1]) / width  # reflected up to a tile
    return int(small * (strip + reading + merging + writing))


def _caches(scenes: Sequence[SceneSize], slicing: Slicing) -> list[int]:
    """Bytes of decoded blocks to keep, of each scene, so that none is decoded twice."""
    stride = slicing.stride[0]
    needs = []
    for scene in scenes:
        # Of single rows none is needed again. Where a read ends inside a row of blocks, two of
        # them are in use at a time.
        aligned = scene.block[0] % stride == 0 and slicing.overlap[0] % stride == 0
        rows = 0.0 if scene.block[0] == 1 else 1.25 if aligned else 2.25
        needs.append(max(SMALLEST_CACHE, int(scene.row_of_blocks * rows)))
    return needs
