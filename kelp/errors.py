"""Everything that can go wrong because of the user's input, as one small family.

The library raises these; `kelp.cli` turns them into one line on stderr and exit status 2.
A message names the cause (the file, the value) and the way out. It is written with options as
flags (`--image_size 350`), which the command line shows; a Python caller reads parameters
(`image_size=350`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A whole command stays as it is; the dashes of other programs' flags are within words, too.
_FLAG = re.compile(
    r"(kelp [a-z]+ )?(?<![\w-])--(\w+)(?![\w-])"
    r"(?: (True|False|-?\d+(?:\.\d+)?(?:e-?\d+)?)(?![\w-]))?"
)


def _parameter(flag: re.Match[str]) -> str:
    command, name, value = flag.groups()
    if command:
        return flag[0]
    return name if value is None else f"{name}={value}"


class KelpError(Exception):
    """Bad input or usage. The message is one line: what is wrong, where, and what to do.

    Attributes:
        result: of what could be done nevertheless, as the function would have returned it.
    """

    def __init__(self, message: str = "", result: Any = None) -> None:
        super().__init__(message)
        self.result = result

    def __str__(self) -> str:
        """The message for a Python caller: options as parameters."""
        return _FLAG.sub(_parameter, self.message)

    @property
    def message(self) -> str:
        """The message with options as flags, as the command line shows it."""
        return super().__str__()

    def __format__(self, spec: str) -> str:
        """As written: an error that quotes another keeps its flags for the command line."""
        return format(self.message, spec)


class ConfigError(KelpError):
    """An option is missing, unknown, out of range, or contradicts another one."""


class InputError(KelpError):
    """A file or folder is missing, unreadable, or does not hold what it should."""


class BusyError(InputError):
    """Another process is writing the file."""


class TableError(InputError):
    """A table of images or tiles lacks a column, a row or a file it names."""


class StatsError(InputError):
    """Band statistics lack a channel or were made with other settings than the run's."""


class BundleError(InputError):
    """A model bundle is incomplete, altered, of an unknown schema, or does not fit the scene."""


class WeightsError(KelpError):
    """Pretrained weights cannot be obtained or do not fit the network."""


class TrainingError(KelpError):
    """A training ended with a network that finds nothing."""


class ProcessError(KelpError):
    """One of the processes that train together was lost: killed, or cut off from the others."""


class CoverageError(KelpError):
    """A pixel was covered by no tile. Merging never fills such a hole with a value."""


class BugError(Exception):
    """A bug ended some scenes of a run; the rest is done. One line; `kelp` exits with status 1.

    Attributes:
        result: of the rest, as the function would have returned it.
    """

    def __init__(self, message: str = "", result: Any = None) -> None:
        super().__init__(message)
        self.result = result


@contextmanager
def fit_to_travel() -> Iterator[None]:
    """An error leaves for another process alone, without what caused it.

    Once Dask is imported, pickle takes the causes along, and those of GDAL cannot be unpickled:
    a file that is no raster would look like a worker that was killed.
    """
    try:
        yield
    except Exception as error:
        error.__cause__ = error.__context__ = None
        raise
