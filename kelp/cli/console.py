"""Progress at the terminal: a bar, or plain lines in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from kelp.errors import KelpError
from kelp.progress import Progress, silent

_SECONDS_BETWEEN_LINES: Final = 10.0
_GDAL_LOG: Final = "rasterio._env.log_error"


@contextmanager
def reporting(quiet: bool) -> Iterator[Progress]:
    """The progress callback of a command: a bar on a terminal, log lines elsewhere, or nothing.

    Notices and warnings of the library go to stderr; `quiet` keeps only warnings.
    """
    log = logging.getLogger("kelp")
    handler = _handler()
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    hooks = sys.excepthook, sys.unraisablehook
    # rasterio logs each message of GDAL as UTF-8; of one that is not (a file's name or tag, cut)
    # Cython prints a traceback by both hooks. What matters in it is raised as an error, too.
    sys.excepthook = lambda kind, *rest: kind is UnicodeDecodeError or hooks[0](kind, *rest)
    sys.unraisablehook = lambda told: told.object == _GDAL_LOG or hooks[1](told)
    try:
        from rasterio import Env

        with ExitStack() as stack:
            stack.enter_context(Env())  # outside of one GDAL and PROJ write to stderr themselves
            _use_own_projections(log)
            if quiet:
                yield silent
            elif sys.stderr.isatty():
                yield stack.enter_context(_bar())
            else:
                yield _lines(log)
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        log.removeHandler(handler)
        log.setLevel(level)


def _use_own_projections(log: logging.Logger) -> None:
    """Leave PROJ's database that another program named, if this PROJ cannot read it.

    QGIS and others set the variables for all that they start. Without its database PROJ takes most
    CRS for local ones.
    """
    named = {name: os.environ[name] for name in ("PROJ_DATA", "PROJ_LIB") if name in os.environ}
    if not named:
        return
    from rasterio.crs import CRS
    from rasterio.env import PROJDataFinder, set_proj_data_search_path
    from rasterio.errors import CRSError

    try:
        CRS.from_epsg(4326)
    except CRSError as error:
        told = ", ".join(f"{name}={value}" for name, value in named.items())
        own = PROJDataFinder().search_wheel()
        if own is None:
            raise KelpError(f"{told}: {' '.join(str(error).split())}; unset it") from error
        for name in named:
            del os.environ[name]  # for processes that are started from here
        set_proj_data_search_path(own)
        log.info("%s: of another PROJ than rasterio's, which now uses its own database", told)


def _handler() -> logging.Handler:
    if not sys.stderr.isatty():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("kelp: %(message)s"))
        return handler

    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    class _AboveTheBar(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"kelp: {record.getMessage()}", markup=False)

    return _AboveTheBar()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _lines(log: logging.Logger) -> Progress:
    """A line when a stage ends and, for long ones, every ten seconds."""
    last: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        started = last.setdefault(stage, now)
        if done >= total or now - started > _SECONDS_BETWEEN_LINES:
            last[stage] = now
            log.info("%s: %d of %d", stage, done, total)

    return progress
