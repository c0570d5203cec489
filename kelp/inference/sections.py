"""A large scene in sections that are predicted apart and put together: the same bytes as in one go.

Rows of pixels that tiles of two sections touch are handed over as sums, which are exact (see
`StripMerger`): no tile is run twice. A finished section lies in two hidden files beside the
scene's mask until all are there.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.errors import InputError
from kelp.inference.outputs import sections_folder
from kelp.io.files import DAMAGED_ARRAYS, atomic
from kelp.raster.window import Blend, Shape
from kelp.tiling.engine import Edge, Section, Sink, WriteRows, take_final
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import MergerState, StripMerger
from kelp.tiling.strip import Pixels

_SECTIONS: Final = 16
"""Of a scene, so that a few workers share it evenly."""
_FEWEST_TILES: Final = 32
_MOST_TILES: Final = 2048
"""Of a section: what a worker that dies may lose."""


def sections_of(grid: TileGrid, batch_size: int, first: int = 0) -> list[Section]:
    """Sections of the rows of tiles from `first` on.

    They follow from the scene and its tiles alone, so that another number of workers finds the
    finished ones. No row of pixels is touched by tiles of three.
    """
    rows, columns = grid.rows, len(grid.columns)
    tiles = min(max(len(grid) // _SECTIONS, _FEWEST_TILES), _MOST_TILES)
    wanted = max(1, tiles // columns)
    # The last batch is filled up: of the next sizes the one that wastes least.
    wanted = min(range(wanted, 2 * wanted + 1), key=lambda n: -(n * columns) % batch_size / n)
    found: list[Section] = []
    start = end = first
    while end < len(rows):
        end += 1
        above = rows[start - 1] + grid.tile[0] if start else 0
        clear = end < len(rows) and rows[end] >= above
        if clear and end - start >= wanted and len(rows) - end >= wanted:
            found.append(Section(start, end))
            start = end
    return [*found, Section(start, end)]


class SectionFile:
    """A finished section of a scene: a plain file of rows, and what its neighbours need.

    Args:
        mask: the scene's mask.
        section: its rows of tiles.
        fingerprint: stands for inputs and settings.
    """

    def __init__(self, mask: Path, section: Section, fingerprint: str) -> None:
        self.section = section
        name = sections_folder(mask) / f"{section.first}-{section.end}"
        self._rows = name.with_suffix(".rows")
        self._edges = name.with_suffix(".npz")
        self._fingerprint = fingerprint

    @property
    def exists(self) -> bool:
        """Whether it is finished, with the same inputs and settings."""
        return self._header() is not None

    def _header(self) -> dict[str, Any] | None:
        with suppress(*DAMAGED_ARRAYS):
            with self._edges.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header: dict[str, Any] = json.loads(file["header"].tobytes())
            size = self._rows.stat().st_size
            if header["fingerprint"] == self._fingerprint and header["size"] == size:
                return header
        return None

    def sink(self, spread: bool) -> SectionSink:
        """What fills it; it exists when that is closed."""
        return SectionSink(self._rows, self._edges, self._fingerprint, spread)

    def edges(self) -> list[Edge]:
        """What it shares with its neighbours, from the top down."""
        with self._edges.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            count = sum(name.startswith("top") for name in file.files)
            return [
                Edge(
                    MergerState(
                        int(file[f"top{k}"]),
                        file[f"sums{k}"],
                        file[f"weights{k}"],
                        file[f"left_out{k}"],
                    ),
                    file[f"observed{k}"],
                )
                for k in range(count)
            ]

    def copy(self, write: Callable[[Pixels], None], width: int, planes: int) -> None:
        """Hand its rows `(planes, n, width)` on, a few at a time.

        Raises `InputError` where they are not what was written.
        """
        header = self._header() or {}
        checksum = 0
        with self._rows.open("rb") as file:
            # Rows of one plane lie together as they were written: mean, then spread, n at a time.
            while head := file.read(8):
                count = int(np.frombuffer(head, dtype=np.int64)[0])
                block = np.frombuffer(file.read(4 * planes * count * width), dtype=np.float32)
                checksum = zlib.crc32(block.data, checksum)
                write(block.reshape(planes, count, width))
        if checksum != header.get("checksum"):
            shutil.rmtree(self._rows.parent, ignore_errors=True)
            raise InputError(f"{self._rows}: damaged; run the same command again")


class SectionSink:
    """Takes a section's rows, and what it shares with its neighbours, into two files."""

    def __init__(self, rows: Path, edges: Path, fingerprint: str, spread: bool) -> None:
        self._paths = rows, edges
        self._fingerprint = fingerprint
        self._spread = spread
        self._edges: list[Edge] = []
        self._checksum = 0
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def write(self, y: int, rows: Pixels) -> None:
        """Take rows of the mean."""
        self._append(np.int64(len(rows)).tobytes())
        self._take(rows)

    @property
    def write_spread(self) -> WriteRows | None:
        """Takes the same rows of the spread, after `write`; None = not wanted."""
        return (lambda y, rows: self._take(rows)) if self._spread else None

    def edge(self, edge: Edge) -> None:
        """Take rows that another section has tiles in, too."""
        self._edges.append(edge)

    def close(self) -> None:
        """Give the files their names; the edges last: they vouch for the rows."""
        self._append(b"")  # it may have no rows of its own
        size = self._file.tell() if self._file else 0
        self._stack.close()
        header = {"fingerprint": self._fingerprint, "checksum": self._checksum, "size": size}
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        }
        for k, edge in enumerate(self._edges):
            arrays |= {
                f"top{k}": np.array(edge.state.top),
                f"sums{k}": edge.state.sums,
                f"weights{k}": edge.state.weights,
                f"left_out{k}": edge.state.left_out,
                f"observed{k}": edge.observed,
            }
        with atomic(self._paths[1]) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub has no arrays of names

    def abandon(self) -> None:
        """Leave no file, unless it was closed."""
        with suppress(_Abandoned), self._stack:
            raise _Abandoned

    def _take(self, rows: Pixels) -> None:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        self._checksum = zlib.crc32(rows.data, self._checksum)
        self._append(rows.data)

    def _append(self, data: bytes | memoryview) -> None:
        if self._file is None:
            partial = self._stack.enter_context(atomic(self._paths[0]))
            self._file = self._stack.enter_context(partial.open("wb"))
        try:
            self._file.write(data)
        except OSError as error:
            raise InputError(
                f"{self._paths[0].parent}: cannot be written ({error.strerror or error}); "
                "check the folder's permissions and the free space"
            ) from error


class _Abandoned(Exception):
    """Makes `atomic` drop its file."""


@dataclass(frozen=True)
class Stitching:
    """How sections of a scene are stitched."""

    shape: Shape
    blend: Blend
    spread: bool

    def stitch(
        self,
        files: Sequence[SectionFile],
        begun: MergerState | None,
        sink: Sink,
        write_spread: WriteRows | None,
    ) -> None:
        """Hand all rows of the sections on, from the top down, and close the sink.

        Args:
            files: the sections, in order.
            begun: sums that an unfinished prediction in one go left above the first.
            sink: takes the rows.
            write_spread: takes those of the spread.
        """
        y = begun.top if begun else 0

        def write(planes: Pixels) -> None:
            nonlocal y
            sink.write(y, planes[0])
            if write_spread:
                write_spread(y, planes[1])
            y += planes.shape[1]

        above = begun
        for file in files:
            edges = file.edges()
            if above is not None:
                # The head may have come in parts; together they are the rows of the tail above.
                heads = [edge for edge in edges if edge.state.top < above.bottom]
                edges = edges[len(heads) :]
                write(self._joined(above, heads))
            file.copy(write, self.shape[1], 1 + self.spread)
            above = edges[0].state if edges else None
        sink.close()

    def _joined(self, above: MergerState, heads: Sequence[Edge]) -> Pixels:
        """The rows that two sections share, final."""
        if not heads:
            return np.zeros((1 + self.spread, 0, self.shape[1]), dtype=np.float32)
        states = [edge.state for edge in heads]
        head = MergerState(
            states[0].top,
            np.concatenate([state.sums for state in states], axis=1),
            np.concatenate([state.weights for state in states]),
            np.concatenate([state.left_out for state in states]),
        )
        joined = above.joined(head)
        merger = StripMerger(self.shape, self.blend, joined, spread=self.spread)
        observed = np.concatenate([edge.observed for edge in heads])
        (planes,) = take_final(merger, observed, len(observed))
        return planes
