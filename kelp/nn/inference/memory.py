"""Memory of this process, as the system counts it (resident set)."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc/self")
_highest = 0


def resident() -> int:
    """Bytes that the process holds now; where the system does not tell, the most it ever held."""
    try:
        pages = int((_PROC / "statm").read_text().split()[1])
    except OSError:
        return peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most bytes that the process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(_highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def growth(work: Callable[[], object]) -> int:
    """How many bytes more than before the process holds, at most, while `work` runs."""
    global _highest
    _highest = peak()
    try:
        (_PROC / "clear_refs").write_text("5")  # Linux: the peak begins anew, from here
        before = resident()
        work()
        status = (_PROC / "status").read_text()
    except OSError:
        before = peak()
        work()
        return peak() - before
    high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(high.split()[1]) * 1024 - before
