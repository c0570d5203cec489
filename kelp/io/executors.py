"""Work spread over processes: results in order, and a prompt, clean end in every case."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, TypeVar

from kelp.errors import ConfigError, KelpError, fit_to_travel

if TYPE_CHECKING:
    from pathlib import Path

    from kelp.io.cluster import Cluster

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(workers: int, jobs: int) -> int:
    """How many processes to use: `workers` (0 = one for each core), not more than jobs."""
    return max(1, min(workers or cores(), jobs))


@contextmanager
def gather(workers: int, scheduler: str | None) -> Iterator[int | Cluster]:
    """Where `spread` is to work: that many processes of this machine, or a cluster.

    Raises:
        ConfigError: a cluster is wished and Dask is not installed, or no scheduler answers.
    """
    if scheduler is None:
        yield workers
        return
    try:
        from kelp.io.cluster import connect
    except ImportError:
        raise ConfigError(
            f"--scheduler {scheduler}: clusters need Dask; "
            'pip install "kelp-slicer[dask]", or leave the option out'
        ) from None
    with connect(scheduler) as cluster:
        yield cluster


def require_shared(workers: int | Cluster, folder: Path) -> None:
    """Raise `KelpError` naming a worker of a cluster that does not see this folder."""
    if not isinstance(workers, int):
        workers.require_shared(folder)


def spread(
    function: Callable[[T], R], jobs: Sequence[T], workers: int | Cluster
) -> Generator[R, None, None]:
    """`map(function, jobs)` over processes, in the order of `jobs`.

    With one worker it runs in this process. When the caller stops early, on an error, on Ctrl-C
    and even when this process is killed, the workers end at once, in the middle of their work:
    `function` must leave nothing half-written under a final name.

    Args:
        function: a module-level function, or a partial of one.
        jobs: its arguments, small ones: they travel to the workers.
        workers: processes; 0 = one for each core. Or a cluster, see `gather`.

    Raises:
        KelpError: a worker process was killed from outside. Errors of `function` as they are.
    """
    if not isinstance(workers, int):
        yield from workers.map(function, jobs)
        return
    workers = worker_count(workers, len(jobs))
    if workers == 1:
        yield from map(function, jobs)
        return
    chunk = max(1, min(8, len(jobs) // (8 * workers)))
    context = _context()
    alive, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _follow, (alive, lifeline))
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads, also those of idle BLAS pools.
            warnings.simplefilter("ignore", DeprecationWarning)
            results = pool.map(partial(_call, function), jobs, chunksize=chunk)
        yield from results
    except BrokenProcessPool:
        lifeline.close()
        raise KelpError(
            f"a worker process was killed, most likely for lack of memory; try --workers "
            f"{workers // 2}"
        ) from None
    except BaseException:
        lifeline.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        lifeline.close()
        alive.close()


def _call(function: Callable[[T], R], job: T) -> R:
    with fit_to_travel():
        return function(job)


def _context() -> BaseContext:
    # A fork starts in milliseconds, where a fresh interpreter takes a second to import rasterio.
    # The workers read and write rasters and use no threads of the parent.
    return get_context("fork" if sys.platform == "linux" else "spawn")


def _follow(alive: Connection, lifeline: Connection) -> None:
    """Make this worker end with its parent, and leave Ctrl-C to the parent."""
    lifeline.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    # The parent never sends anything: the pipe ends when it closes its end, or dies.
    alive.poll(None)
    os._exit(1)
