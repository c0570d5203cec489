"""Scenes of any name that a file system takes; others are refused before anything runs."""

import os
import shutil

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from world import coast, write_tif

from kelp.cli import main
from kelp.raster.masks import read_mask

NAMES = ["a[1]", "back\\slash", "# %20 ü 'q'", "x" * 235, "y" * 241]


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    return tiny_bundle(tmp_path / "bundle")


def predict(scenes, bundle, out, *more):
    arguments = ["--data_dir", scenes, "--output_dir", out, "--run_dir", bundle, "--device", "cpu"]
    return main(["predict", *map(str, arguments), *more])


def test_odd_names_are_predicted_and_nothing_stays_behind(tmp_path, bundle):
    scenes, out = tmp_path / "in [1]", tmp_path / "out [*]\\"
    image, _ = coast((40, 50), np.random.default_rng(0))
    write_tif(scenes / "plain.tif", image)
    for name in NAMES:
        shutil.copy(scenes / "plain.tif", scenes / f"{name}.tif")
    assert predict(scenes, bundle, out, "--save_probabilities") == 0
    maps = {f"{name}_kelp{kind}.tif" for name in ("plain", *NAMES) for kind in ("", "_prob")}
    assert {p.name for p in out.iterdir() if p.suffix == ".tif"} == maps
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    for name in NAMES:
        np.testing.assert_array_equal(
            read_mask(out / f"{name}_kelp.tif"), read_mask(out / "plain_kelp.tif")
        )


def test_a_name_too_long_for_its_map_is_one_line_and_the_rest_is_done(tmp_path, bundle, capsys):
    scenes, out = tmp_path / "in", tmp_path / "out"
    image, _ = coast((40, 50), np.random.default_rng(0))
    write_tif(scenes / "plain.tif", image)
    shutil.copy(scenes / "plain.tif", scenes / ("z" * 251 + ".tif"))
    assert predict(scenes, bundle, out) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of 2 scenes failed, the rest is done" in last
    assert "_kelp.tif: the name has 260 bytes and file systems take 255; rename" in last
    assert (out / "plain_kelp.tif").is_file()
    assert all(len(os.fsencode(p.name)) < 100 for p in out.iterdir())
