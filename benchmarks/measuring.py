"""What the benchmarks share: paired repeats, the machine's name, tables, JSON, children."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SCENE = Path(__file__).parents[1] / "kelp" / "demo" / "data" / "LS000001_satellite.tif"
"""A real image of 350 x 350 px."""
PACKAGES = ("kelp-slicer", "torch", "numpy", "rasterio", "monai", "pytorch-toolbelt", "tiler")


def parser(text: str | None, threads: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    if threads:
        options.add_argument("--threads", type=int, default=2, help="of torch")
    return options


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(
    ways: Mapping[str, Callable[[], object]], repeats: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way, all in turn, repeatedly: what slows the machine slows all alike."""
    if warm:
        for way in ways.values():
            way()
    runs: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)  # none always runs after the same other
        for name in names[first:] + names[:first]:
            runs[name].append(seconds(ways[name]))
    return runs


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of paired ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine() -> Row:
    """Processor, cores, torch's threads, load and versions."""
    facts: Row = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }
    if "torch" in sys.modules:
        facts["torch_threads"] = sys.modules["torch"].get_num_threads()
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def report(title: str, rows: Sequence[Row], verdicts: Sequence[str], file: Path | None) -> None:
    """Print a table and what it says; write both, with the machine, as JSON."""
    facts = machine()
    print(f"\n{title}")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print_table(rows)
    for line in verdicts:
        print(line)
    if file:
        figures = {"title": title, "machine": facts, "rows": rows, "verdicts": verdicts}
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def child(script: str, *arguments: str) -> Row:
    """Run a benchmark's `--child` in a process of its own; what it prints last is JSON.

    glibc gives blocks above 256 kB back when they are freed, so that what was freed before a
    measurement is not used again unseen.
    """
    command = [sys.executable, script, "--child", *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _processor() -> str:
    """The processor, and the instructions that decide which number formats are fast."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', '?')} ({' '.join(flags)})"
