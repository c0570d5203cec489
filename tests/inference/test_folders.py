"""Folders of scenes: what is one, what is passed over, how many files are open at a time."""

import logging
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio.shutil
from bundles import tiny_bundle, use_pixel_network
from world import coast, write_tif

from kelp.cli import main
from kelp.raster.masks import read_mask
from kelp.sensors import find_scenes, opening


def image(number=0):
    return coast((40, 50), np.random.default_rng(number))[0]


def predict(scenes, out, bundle):
    arguments = ["--data_dir", scenes, "--output_dir", out, "--run_dir", bundle, "--device", "cpu"]
    return main(["predict", *map(str, arguments)])


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    return tiny_bundle(tmp_path / "bundle")


def test_a_folder_of_virtual_scenes_is_mapped_as_their_files(tmp_path, bundle):
    plain, virtual = tmp_path / "plain", tmp_path / "virtual"
    virtual.mkdir()
    for name in ("a", "b"):
        file = write_tif(plain / f"{name}.tif", image())
        rasterio.shutil.copy(file, virtual / f"{name}.vrt", driver="VRT")
    for folder in (plain, virtual):
        assert predict(folder, tmp_path / f"{folder.name}-maps", bundle) == 0
    for name in ("a", "b"):
        one, other = (
            tmp_path / f"{kind}-maps" / f"{name}_kelp.tif" for kind in ("plain", "virtual")
        )
        np.testing.assert_array_equal(read_mask(one), read_mask(other))


def test_the_names_of_many_scenes_are_each_made_a_few_times(tmp_path, monkeypatch):
    """Comparing each name with all others takes minutes for 100,000 scenes."""
    calls = []
    name = opening.scene_name
    monkeypatch.setattr(opening, "scene_name", lambda path: calls.append(path) or name(path))
    for number in range(60):
        (tmp_path / f"{number}_satellite.tif").touch()
    assert len(find_scenes(tmp_path)) == 60
    assert len(calls) <= 5 * 60


def test_what_is_no_scene_is_named(tmp_path, caplog):
    write_tif(tmp_path / "scene.tif", image())
    (tmp_path / "link.tif").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.tif").mkdir()
    os.mkfifo(tmp_path / "pipe.tif")
    caplog.set_level(logging.WARNING, logger="kelp")
    assert find_scenes(tmp_path) == [tmp_path / "scene.tif"]
    assert caplog.messages == [
        f"{tmp_path}: not used: folder.tif (a folder), link.tif (a broken link), "
        "pipe.tif (no regular file)"
    ]


def test_a_linked_scene_has_the_name_of_the_link(tmp_path):
    """DVC, git-annex and users link to files that bear a hash or another name."""
    store, links = tmp_path / "store", tmp_path / "links"
    links.mkdir()
    for number, name in enumerate(("2011_satellite.tif", "2012_satellite.tif")):
        (links / name).symlink_to(write_tif(store / f"{number}f3a.tif", image()))
    assert [opening.scene_name(scene) for scene in find_scenes(links)] == ["2011", "2012"]
    (tmp_path / "other.tif").symlink_to(links / "2011_satellite.tif")
    (links / "third.tif").symlink_to(links / "2011_satellite.tif")
    assert opening.scene_name(tmp_path / "other.tif") == "other"
    assert len(find_scenes(links)) == 3  # two links to one file are two scenes


def test_a_path_without_a_name_of_its_own_gives_that_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "LC08").mkdir()
    monkeypatch.chdir(tmp_path / "LC08")
    assert opening.scene_name(Path()) == opening.scene_name(Path("..") / "LC08") == "LC08"


def test_long_wide_and_almost_empty_scenes_are_mapped(tmp_path, bundle):
    """`python benchmarks/soak.py` does so at 60,000 px, and looks at memory, time and files."""
    long, _ = coast((3000, 40), np.random.default_rng(0))
    empty = np.full((7, 900, 900), -32768, np.int32)
    empty[:, 300:340, 500:540] = image()[:, :, :40]
    scenes = {"long": long, "wide": long.transpose(0, 2, 1), "empty": empty}
    for name, pixels in scenes.items():
        write_tif(tmp_path / "scenes" / f"{name}.tif", pixels)
    write_tif(tmp_path / "part" / "part.tif", image()[:, :, :40])
    assert predict(tmp_path / "scenes", tmp_path / "maps", bundle) == 0
    assert predict(tmp_path / "part", tmp_path / "maps", bundle) == 0
    maps = {n: read_mask(tmp_path / "maps" / f"{n}_kelp.tif") for n in (*scenes, "part")}
    assert (maps["long"] == 1).any()
    np.testing.assert_array_equal(maps["wide"], maps["long"].T)
    np.testing.assert_array_equal(maps["empty"][300:340, 500:540], maps["part"])
    maps["empty"][300:340, 500:540] = 255
    assert (maps["empty"] == 255).all()


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_a_run_over_many_scenes_keeps_few_files_open(tmp_path, bundle):
    for number in range(44):
        write_tif(tmp_path / "scenes" / f"{number}.tif", image())
    assert predict(tmp_path / "scenes" / "0.tif", tmp_path / "warm", bundle) == 0
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name.name) for name in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, before[1]))
    try:
        assert predict(tmp_path / "scenes", tmp_path / "out", bundle) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((tmp_path / "out").glob("*_kelp.tif"))) == 44
