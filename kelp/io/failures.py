"""Files that fail among many: the others are done first, then one line names them.

What the user can mend is a `KelpError`; anything else is a bug, whose traceback goes into a log
beside the outputs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from kelp.errors import BugError, InputError, KelpError
from kelp.io import remote
from kelp.io.location import Url

T = TypeVar("T")
R = TypeVar("R")

ERRORS_FILE: Final = "kelp-errors.log"
"""Beside the outputs: tracebacks of bugs, and what failed where that is too much for one line."""
_NAMED: Final = 10


@dataclass(frozen=True)
class Failure:
    """Why a file was left out."""

    message: str
    """One line that names it."""
    traceback: str = ""
    """Of a bug; empty where the user can mend it."""

    @classmethod
    def of(cls, path: object, error: Exception) -> Self:
        """What an error says of a file."""
        if isinstance(error, KelpError):
            return cls(error.message)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls(f"{path}: a bug ({text})", "".join(traceback.format_exception(error)))


def attempt(function: Callable[[T], R], job: T) -> R | Failure:
    """`function(job)`, or why that failed. Also a bug ends the one job only."""
    try:
        return function(job)
    except Exception as error:  # noqa: BLE001  # whatever it is, the other jobs go on
        return Failure.of(job, error)


def raise_failures(
    failures: Mapping[Any, Failure],
    total: int,
    what: str,
    folder: Path | Url | None,
    result: Any = None,
) -> None:
    """Raise one error that names what failed, if anything did, when the rest is done.

    Args:
        failures: by file.
        total: how many there were.
        what: they are, in the plural.
        folder: of the outputs, where the log goes; none: no log is written.
        result: of the rest; the command line shows its summary before the error.

    Raises:
        InputError: files that the user can mend.
        BugError: some that met a bug, maybe others as well.
    """
    if not failures:
        return
    rest = ", the rest is done" if len(failures) < total else ""
    messages = list(dict.fromkeys(failure.message for failure in failures.values()))
    words = f"{len(failures)} of {total} {what} failed{rest}: {'; '.join(messages[:_NAMED])}"
    bugs = [f"{path}\n{one.traceback}" for path, one in failures.items() if one.traceback]
    left = messages[_NAMED:]
    log_file = folder / ERRORS_FILE if folder else None
    written = False
    if log_file and (bugs or left):
        with suppress(InputError):  # a full disk may be what failed
            remote.write_text(log_file, "\n".join([*bugs, *left]) + "\n")
            written = True
    where = str(log_file) if written else "an --output_dir that can be written"
    if left:
        words += f"; and {len(left)} more, see {where}"
    if bugs:
        raise BugError(f"{words}; please report it with {where}", result)
    raise InputError(words, result)
