"""The Processing provider in a real QGIS, by `qgis_process`; `make qgis` installs one."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import geopandas
import pandas as pd
import pytest
from coasts import random_map, write_map
from shapely import box

import kelp

ROOT = Path(kelp.__file__).parent.parent
PLUGIN = ROOT / "qgis" / "kelp_slicer"

# Debian's wrapper of 3.22 hands on an option of the desktop that this program does not know.
QGIS = shutil.which("qgis_process.bin") or shutil.which("qgis_process")
needs_qgis = pytest.mark.skipif(
    "KELP_QGIS" not in os.environ or QGIS is None,
    reason="needs QGIS: make qgis",
)


@pytest.fixture
def qgis(tmp_path):
    """Runs `qgis_process` in a profile of its own, with the plugin and this kelp."""
    plugins = tmp_path / "home" / ".local/share/QGIS/QGIS3/profiles/default/python/plugins"
    shutil.copytree(PLUGIN, plugins / PLUGIN.name)
    program = tmp_path / "kelp"
    here, python = shlex.quote(str(ROOT)), shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={here} exec {python} -m kelp "$@"\n')
    program.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": f"{tmp_path / 'home'}",
        "QT_QPA_PLATFORM": "offscreen",
        "KELP_PROGRAM": f"{program}",
        "LANG": "C.UTF-8",
        "XDG_RUNTIME_DIR": f"{tmp_path}",
    }

    def run(*arguments):
        return subprocess.run(
            [QGIS, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    assert "kelp_slicer" in run("plugins", "enable", "kelp_slicer").stdout
    return run


@needs_qgis
def test_beds_and_areas(qgis, tmp_path):
    mask, p = random_map(0)
    write_map(tmp_path / "maps", "A", mask, p)
    listed = qgis("list").stdout
    assert all(f"kelp:{name}" in listed for name in ("predict", "beds", "areas"))
    beds = tmp_path / "beds.gpkg"
    maps = f"--predictions_dir={tmp_path / 'maps'}"
    done = qgis("run", "kelp:beds", maps, f"--output={beds}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert geopandas.read_file(beds)["pixels"].sum() == (mask == 1).sum()
    assert beds.with_suffix(".qml").is_file()
    x, y = 400_000, 4_272_000
    frame = geopandas.GeoDataFrame(
        {"name": ["a"]}, geometry=[box(x, y - 1800, x + 1500, y)], crs=32721
    )
    frame.to_file(tmp_path / "r.gpkg")
    done = qgis(
        "run",
        "kelp:areas",
        maps,
        f"--aoi={tmp_path / 'r.gpkg'}",
        "--aoi_id=name",
        f"--output={tmp_path / 'areas.csv'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "areas.csv")
    assert table["kelp_pixels"].tolist() == [(mask == 1).sum()]
    assert not list(tmp_path.glob("*.regions.gpkg"))


@needs_qgis
def test_an_error_of_kelp_is_the_error_of_qgis(qgis, tmp_path):
    (tmp_path / "empty").mkdir()
    done = qgis(
        "run",
        "kelp:beds",
        f"--predictions_dir={tmp_path / 'empty'}",
        f"--output={tmp_path / 'beds.gpkg'}",
    )
    assert done.returncode != 0
    assert "holds no" in done.stdout + done.stderr


def test_parameters_are_options_of_the_commands():
    """Without QGIS: what the provider hands on exists."""
    import ast

    from kelp import config

    tree = ast.parse((PLUGIN / "plugin.py").read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.run_kelp":
                    found[node.name] = {key.value for key in call.args[0].keys}
    assert set(found) == {"Predict", "Beds", "Areas"}
    for name, options in found.items():
        assert options <= set(getattr(config, f"{name}Config").model_fields)
