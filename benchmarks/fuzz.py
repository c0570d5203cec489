"""Changed files of every kind, many of them: read, or refused in one line.

    python benchmarks/fuzz.py [--cases 50000] [--kinds vrt,mtl] [--first 0]

The cases of `tests/fuzzing`, which runs the first 200 of each kind. A fault is an exception that is
no `KelpError`, a message of several lines, a warning, a word of a C library on stderr, a new file,
more than 1 GB, or more than 20 seconds. A fault's number makes the same case again:
`--kinds vrt --first 44 --cases 1`. A crash of the interpreter is found as well: each kind runs in a
process of its own. Exit status 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing.kinds import KINDS, cases


def _run_here(kind: str, first: int, count: int, told: Path) -> None:
    with told.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for fault in cases(kind, range(first, first + count), Path(folder)):
            print(fault, file=file, flush=True)
        os.chdir("/")


def main() -> int:
    """Run the cases and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=50_000, help="of all kinds together")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first case of a kind")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    count = max(1, options.cases // len(kinds))
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "faults"
        for kind in kinds:
            began = time.perf_counter()
            told.write_text("", encoding="utf-8")
            arguments = (kind, options.first, count, told)
            # A fork has imported all that takes a minute on a busy machine.
            process = get_context("fork").Process(target=_run_here, args=arguments)
            process.start()
            process.join()
            seconds = time.perf_counter() - began
            faults = told.read_text(encoding="utf-8")
            number, crashed = faults.count(f"{kind}, "), process.exitcode
            print(f"{kind}: {count:,} cases, {number} faults, exit {crashed}, {seconds:.0f} s")
            print(faults, end="", flush=True)
            status = status or bool(number or crashed)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
