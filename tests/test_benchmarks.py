"""The benchmark behind the defaults of `--sahi True` runs from coasts to verdict, and goes on."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_what_benchmarks_import_from_kelp_is_there():
    """Nobody runs them all after a name has moved."""
    lacking = []
    for program in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(program.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kelp"):
                module = importlib.import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name):
                        with suppress(ModuleNotFoundError):
                            importlib.import_module(f"{node.module}.{name}")
                            continue
                        lacking.append(f"{program.name}: {node.module}.{name}")
            elif isinstance(node, ast.Constant) and re.fullmatch(r"kelp(\.\w+)+", str(node.value)):
                try:
                    pkgutil.resolve_name(node.value)
                except (ImportError, AttributeError):
                    lacking.append(f"{program.name}: {node.value}")
    assert not lacking


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
