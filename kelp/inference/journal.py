"""What a killed prediction leaves behind, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Final
from zipfile import BadZipFile

import numpy as np

from kelp.io.files import atomic, hidden
from kelp.tiling.merge import MergerState

_SHARE: Final = 0.05  # of the time may go into saving


@dataclass(frozen=True)
class Entry:
    """A point of a scene's prediction from which it can go on."""

    fingerprint: str
    """Stands for the inputs and settings."""
    checksums: tuple[int, ...]
    """CRC-32 of the rows above `state.top`, one for each file."""
    state: MergerState


DAMAGED: Final = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    BadZipFile,
    TokenError,
    zlib.error,
)
"""What zip and numpy raise for damaged files; numpy reads headers with Python's own tokenizer."""


def journal_path(output: Path) -> Path:
    """The journal of an output."""
    return hidden(output, ".journal")


class JournalFile:
    """A hidden file beside an output; each `save` replaces it in one step.

    Sums are exact and the network is deterministic, so a scene gone on with ends with the same
    bytes. Plain numpy arrays and JSON: nothing in it is unpickled.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._path = journal_path(output)
        self._due = 0.0

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self._path.is_file()

    def load(self) -> Entry | None:
        """The last entry; None where there is none, or none that can be read."""
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                state = MergerState(header["top"], file["sums"], file["weights"], file["left_out"])
                return Entry(header["fingerprint"], tuple(header["checksums"]), state)
        except DAMAGED:
            return None

    @property
    def is_due(self) -> bool:
        """Whether saving now would still take a small share of the time only."""
        return time.monotonic() >= self._due

    def save(self, state: MergerState, sync: Callable[[], Sequence[int]]) -> None:
        """Save an entry. `sync` secures the rows first and gives their checksums."""
        began = time.monotonic()
        header = {
            "fingerprint": self.fingerprint,
            "top": state.top,
            "checksums": list(sync()),
        }
        with atomic(self._path) as partial, partial.open("wb") as file:
            text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
            np.savez(
                file,
                header=text,
                sums=state.sums,
                weights=state.weights,
                left_out=state.left_out,
            )
        now = time.monotonic()
        self._due = now + (now - began) * (1 / _SHARE - 1)

    def discard(self) -> None:
        """Forget the scene."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
