"""The benchmark behind the defaults of `--sahi True` runs from coasts to verdict, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_should_i_slice_in_small(tmp_path):
    program, work, table = ROOT / "benchmarks" / "should_i_slice.py", tmp_path / "w", tmp_path / "t"
    command = [sys.executable, str(program), "--quick", f"--work_dir={work}", f"--json={table}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stderr
    assert "\nIn training: " in first.stdout
    assert "At prediction: Do not slice" in first.stdout  # after so little training
    lines = {row[""]: row["0"] for row in json.loads(table.read_text("utf-8"))["rows"]}
    assert lines["scenes"] == "specks"
    for name in ("whole", "sliced", "gain", "over the seed's merge", "over the enlarged image"):
        assert lines[name].endswith(")"), name  # an interval
    assert lines["cost"] > lines["cost of the enlarged image"] > 1
    made = {path: path.stat().st_mtime_ns for path in work.rglob("bundle.json")}
    assert made

    # What is finished is not done again.
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in work.rglob("bundle.json")} == made
    assert {row[""]: row["0"] for row in json.loads(table.read_text("utf-8"))["rows"]} == lines
