"""Cold starts: one small image through the packaged network, and `import kelp` alone.

Each run is a process of its own. With torch and without are two environments (`--python` names the
other one's interpreter, that of a plain installation); seconds of an empty Python are taken off the
import. On a busy machine look at the CPU's seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from measuring import Row, interleaved, parser, report

ROOT = Path(__file__).resolve().parent.parent
SCENE = ROOT / "kelp" / "demo" / "data" / "OL000001_satellite_georef.tif"


def main() -> None:
    options = parser(__doc__, threads=False)
    options.add_argument("--python", default=sys.executable, help="of the plain installation")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    cpu = defaultdict[str, list[float]](list)

    def timed(name: str, way: Callable[[], None]) -> Callable[[], None]:
        def run_timed() -> None:
            before = os.times()
            way()
            after = os.times()
            cpu[name].append(sum(after[2:4]) - sum(before[2:4]))  # of children

        return run_timed

    with tempfile.TemporaryDirectory() as folder:

        def predict(python: str, *more: str) -> None:
            data = [f"--data_dir={SCENE}", f"--output_dir={folder}", "--overwrite=True", *more]
            run(python, "-m", "kelp", "predict", *data, "--quiet")

        ways = {
            "plain": lambda: predict(given.python, "--backend=onnx"),
            "torch": lambda: predict(sys.executable, "--backend=torch"),
            "import kelp": lambda: run(given.python, "-c", "import kelp"),
            "python": lambda: run(given.python, "-c", ""),
        }
        found = interleaved({k: timed(k, way) for k, way in ways.items()}, given.repeats)
    medians = {name: statistics.median(runs) for name, runs in found.items()}
    busy = {name: statistics.median(runs[1:]) for name, runs in cpu.items()}  # the first warms up
    for seconds in (medians, busy):
        seconds["import kelp"] -= seconds.pop("python")
    targets = {"plain": 1.5, "torch": 4.0, "import kelp": 0.1}
    rows: list[Row] = [
        {"cold start": name, "s": medians[name], "cpu s": busy[name], "target": targets[name]}
        for name in medians
    ]
    missed = [name for name in targets if medians[name] > targets[name]]
    report("Cold start", rows, [f"missed: {', '.join(missed) or 'none'}"], given.json)


def run(python: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    subprocess.run([python, *arguments], check=True, capture_output=True, env=environment)


if __name__ == "__main__":
    main()
