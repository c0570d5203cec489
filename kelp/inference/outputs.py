"""What becomes of a scene's probabilities: one threshold, then files that appear complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from kelp.inference.guard import GuardLimits
from kelp.inference.records import Figures
from kelp.io.files import DAMAGED_ARRAYS, LONGEST_NAME, atomic, hidden
from kelp.io.location import Url
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import Georeference
from kelp.raster.probability import CODES, quantise
from kelp.raster.window import Shape
from kelp.raster.writer import COG_SIDE, RasterWriter, remove_rows
from kelp.sensors.record import MapRecord, record_path, write_record
from kelp.sensors.rules import Rules
from kelp.tables import MASK_SUFFIX, PROBABILITY_SUFFIX, SPREAD_SUFFIX
from kelp.tiling.engine import WriteRows
from kelp.tiling.merge import MergerState, to_mask

log = logging.getLogger("kelp")

ProbabilityType = Literal["float32", "uint8"]

_SHARE: Final = 0.05  # of the time may go into saving

P = TypeVar("P", bound=Path | Url)


def probability_path(mask: P) -> P:
    """The probability raster that belongs to a mask."""
    return _beside(mask, PROBABILITY_SUFFIX)


def spread_path(mask: P) -> P:
    """The raster of the spread of tiles that belongs to a mask."""
    return _beside(mask, SPREAD_SUFFIX)


def _beside(mask: P, suffix: str) -> P:
    found = mask.with_name(mask.name.removesuffix(MASK_SUFFIX) + suffix)
    return cast("P", found)  # of the mask's kind


class Outputs:
    """Sink of one scene: its mask and, on request, its probabilities and the spread of tiles.

    A large scene with a fingerprint keeps a journal: what a killed process left of the same
    inputs and settings is resumed by `open`. Until then nothing is touched.

    Args:
        shape: `(height, width)` of the scene.
        georeference: where it lies.
        mask: the file of the mask.
        threshold: kelp where p is at least this.
        tags: metadata of the files.
        probabilities: type of the probabilities to write beside the mask; None = none.
        fingerprint: of inputs and settings, to the last bit; None = no journal.
        resume: whether what an earlier process left is resumed.
        spread: whether `write_spread` is wanted.
        deliver: called with the finished files, the mask first.
        record: what is known of the map; None = no record is written.
        rules: what is no kelp whatever the networks say.
        calibrated: whether probabilities are calibrated.
        limits: what the network's maps look like elsewhere, for the record's guard.
    """

    def __init__(
        self,
        shape: Shape,
        georeference: Georeference,
        mask: Path,
        threshold: float,
        tags: Mapping[str, str],
        probabilities: ProbabilityType | None = None,
        fingerprint: str | None = None,
        resume: bool = True,
        spread: bool = False,
        deliver: Callable[[Sequence[Path]], None] | None = None,
        record: MapRecord | None = None,
        rules: Rules | None = None,
        calibrated: bool = False,
        limits: GuardLimits | None = None,
    ) -> None:
        def writer(
            path: Path, kind: str, scale: float | None = None, description: str = ""
        ) -> RasterWriter:
            nodata = MASK_NODATA if kind == "uint8" else np.nan
            return RasterWriter(path, shape, kind, georeference, nodata, tags, scale, description)

        self.threshold = threshold
        self._mask = writer(mask, "uint8")
        self._scaled = probabilities == "uint8"
        self._probabilities = self._spread = None
        if probabilities:
            scale = 1 / CODES if self._scaled else None
            self._probabilities = writer(
                probability_path(mask), probabilities, scale, "probability of kelp"
            )
        if spread:
            self._spread = writer(spread_path(mask), "float32", description="spread of tiles")
        self._writers = [w for w in (self._mask, self._probabilities, self._spread) if w]
        self._begun = False
        self._deliver = deliver
        self._record = record
        self._rules = rules
        self._calibrated = calibrated
        self._limits = limits
        self.finished: MapRecord | None = None
        """The record, once the files are closed."""
        self._figures = Figures(mask, shape, georeference, threshold) if record else None
        self._journal: JournalFile | None = None
        self.start: MergerState | None = None
        """What `open` found to resume from."""
        self._height = shape[0]
        self._resume = resume
        if fingerprint and max(shape) > COG_SIDE:
            self._journal = JournalFile(mask, fingerprint)

    def open(self) -> Self:
        """Take over what an earlier process left, before the first row is written.

        Raises:
            BusyError: another process is writing the files.
        """
        if self._journal and self._journal.exists:
            self.start = self._recover(self._journal)
        return self

    def _recover(self, journal: JournalFile) -> MergerState | None:
        """What an earlier process left, if it is wanted and fits to the last bit."""
        entry = journal.load()
        if entry is None:
            return None
        self._begin(entry.state.top)  # from here on no other process touches them
        reason = "what an earlier run left of it is damaged"
        if entry.fingerprint != journal.fingerprint:
            reason = "an earlier run began it with other inputs or settings"
        elif not self._resume:
            reason = "an earlier run was stopped in it"
        elif entry.checksums == tuple(writer.checksum for writer in self._writers):
            log.info("%s: resumed at row %d of %d", self._mask.path, entry.state.top, self._height)
            if self._figures:
                self._figures.rows[...] = entry.figures
            if self._rules:
                self._rules.counts.update(entry.removed)
            return entry.state
        log.info("%s: %s; starting over", self._mask.path, reason)
        journal.discard()
        self._begin()
        return None

    def _begin(self, kept: int = 0) -> None:
        self._begun = True
        for writer in self._writers:
            writer.begin(kept)

    def _end(self, keep: bool) -> None:
        self._begun = False
        for writer in self._writers:
            if keep:
                writer.suspend()
            else:
                writer.discard()

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        """Write rows `(n, width)` of probabilities from row `y` on."""
        if not self._begun:
            self._begin()
        if self._rules:
            rows = self._rules.apply(y, rows)
        if self._figures:
            self._figures.add(y, rows)
        self._mask.write(y, to_mask(rows, self.threshold))
        if self._probabilities:
            self._probabilities.write(y, quantise(rows) if self._scaled else rows)

    @property
    def write_spread(self) -> WriteRows | None:
        """Writes rows `(n, width)` of the spread, after their probabilities; None = not wanted."""
        return self._spread.write if self._spread else None

    def commit(self, state: Callable[[], MergerState]) -> None:
        """Save what is needed to go on from here, unless that was done a moment ago."""
        if self._journal and self._journal.is_due:
            self._journal.save(
                state(),
                self._sync,
                self._figures.rows if self._figures else None,
                self._rules.counts if self._rules else None,
            )

    def _sync(self) -> list[int]:
        for writer in self._writers:
            writer.sync()
        return [writer.checksum for writer in self._writers]

    def close(self) -> None:
        """Finish the files; the mask last: it is what marks a scene as finished."""
        written = [writer.path for writer in self._writers]
        for writer in reversed(self._writers):
            if writer is self._mask and self._record and self._figures:
                written.append(record_path(self._mask.path))
                self.finished = self._figures.complete(
                    self._record, self._rules, self._calibrated, self._limits
                )
                write_record(written[-1], self.finished)
            writer.finish()
        for path in products(self._mask.path):
            if path not in written:  # of an earlier run, it would not belong to the mask
                path.unlink(missing_ok=True)
                remove_rows(path)
        if self._journal:
            self._journal.discard()
        self._end(keep=False)
        if self._rules:
            self._rules.close()
        if self._deliver:
            self._deliver(written)

    def abandon(self) -> None:
        """Stop, if not closed. What a journal speaks of stays for the next process."""
        if self._begun:
            self._end(keep=self._journal is not None and self._journal.exists)
        if self._rules:
            self._rules.close()


@dataclass(frozen=True)
class Entry:
    """A point of a scene's prediction from which it can be resumed."""

    fingerprint: str
    """Stands for the inputs and settings."""
    checksums: tuple[int, ...]
    """CRC-32 of the rows above `state.top`, one for each file."""
    state: MergerState
    figures: NDArray[np.float64]
    """For the record: of the rows above `state.top`."""
    removed: dict[str, int]
    """What rules have taken away so far."""


def journal_path(output: Path) -> Path:
    """The journal of an output."""
    return hidden(output, ".journal")


class JournalFile:
    """A hidden file beside an output; each `save` replaces it in one step.

    Sums are exact and the network is deterministic, so a resumed scene ends with the same bytes.
    Plain numpy arrays and JSON: nothing in it is unpickled.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._path = journal_path(output)
        self._due = 0.0

    @property
    def exists(self) -> bool:
        """Whether there may be something to resume."""
        return self._path.is_file()

    def load(self) -> Entry | None:
        """The last entry; None where there is none, or none that can be read."""
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                state = MergerState(header["top"], file["sums"], file["weights"], file["left_out"])
                checksums, removed = tuple(header["checksums"]), dict(header["removed"])
                return Entry(header["fingerprint"], checksums, state, file["figures"], removed)
        except DAMAGED_ARRAYS:
            return None

    @property
    def is_due(self) -> bool:
        """Whether saving now would still take a small share of the time only."""
        return time.monotonic() >= self._due

    def save(
        self,
        state: MergerState,
        sync: Callable[[], Sequence[int]],
        figures: NDArray[np.float64] | None = None,
        removed: Mapping[str, int] | None = None,
    ) -> None:
        """Save an entry. `sync` secures the rows first and gives their checksums."""
        began = time.monotonic()
        header = {
            "fingerprint": self.fingerprint,
            "top": state.top,
            "checksums": list(sync()),
            "removed": dict(removed or {}),
        }
        with atomic(self._path) as partial, partial.open("wb") as file:
            text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
            np.savez(
                file,
                header=text,
                sums=state.sums,
                weights=state.weights,
                left_out=state.left_out,
                figures=np.zeros(0) if figures is None else figures,
            )
        now = time.monotonic()
        self._due = now + (now - began) * (1 / _SHARE - 1)

    def discard(self) -> None:
        """Remove it."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def sections_folder(mask: Path) -> Path:
    """Where finished sections of a scene wait for the others."""
    return hidden(mask, ".sections")


def clean_up(mask: Path) -> None:
    """Remove what was needed to make a scene that is finished now."""
    shutil.rmtree(sections_folder(mask), ignore_errors=True)
    free = [remove_rows(path) for path in products(mask)]
    if all(free):
        journal_path(mask).unlink(missing_ok=True)


def products(mask: Path) -> tuple[Path, ...]:
    """All files that may belong to a scene."""
    names: tuple[Path, ...] = (mask, probability_path(mask), spread_path(mask))
    if mask.name.endswith(MASK_SUFFIX):
        names = (*names, record_path(mask))
    return tuple(path for path in names if len(os.fsencode(path.name)) <= LONGEST_NAME)
