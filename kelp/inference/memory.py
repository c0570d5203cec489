"""Memory of this process: what it fills itself, without the program code mapped from files.

Pages of libraries are shared and can be dropped by the system at any time; with a CUDA build of
torch they are hundreds of megabytes that no limit on a job has to hold. Where the system does not
tell them apart (not Linux), they count as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

_PROC: Final = Path("/proc/self")
_M_MMAP_THRESHOLD: Final = -3  # malloc.h of glibc
_highest = 0


def resident() -> int:
    """Bytes that the process fills now."""
    try:
        return _status("RssAnon") + _status("RssShmem")
    except OSError:
        return int(_memory_info().rss)


def peak() -> int:
    """The most bytes that the process ever filled; where no system tells, that was seen here."""
    global _highest
    try:
        now = _status("VmHWM") - _status("RssFile")
    except OSError:
        info = _memory_info()
        now = int(getattr(info, "peak_wset", info.rss))  # of Windows
    _highest = max(_highest, now)
    return _highest


def growth(work: Callable[[], object]) -> int:
    """How many bytes more than before the process fills, at most, while `work` runs.

    What the C library has kept of freed arrays is given back before: `work` would use it again,
    and seem to need nothing.
    """
    give_back()
    before = peak()
    try:
        (_PROC / "clear_refs").write_text("5")  # Linux: the peak starts again from here
    except OSError:
        work()
        return peak() - before
    before = resident()
    work()
    return max(0, _status("VmHWM") - _status("RssFile") - before)


def give_back() -> None:
    """From now on give freed arrays back to the system, where the C library can be told so.

    glibc keeps what is freed below a threshold that it raises as a program runs: with several
    threads hundreds of megabytes that nobody uses.
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        library.malloc_trim(0)


def _memory_info() -> Any:
    """What the system tells of this process where there is no /proc."""
    import psutil  # Linux does without

    return psutil.Process().memory_info()


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes (man 5 proc)."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
