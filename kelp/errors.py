"""Everything that can go wrong because of the user's input, as one small family.

The library raises these; `kelp.cli` turns them into one line on stderr and exit status 2.
A message names the cause (the file, the value) and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KelpError(Exception):
    """Bad input or usage. The message is one line: what is wrong, where, and what to do."""


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
