from __future__ import annotations

import os

import pandas as pd
import pytest
from world import make_world

from kelp.config import SplitConfig
from kelp.data_prep.split import split_fold
from kelp.errors import ConfigError, TableError


def config(world, **options):
    values = {
        "data_dir": world.data_dir,
        "metadata_fp": world.table,
        "cv_split": 1,
        "output_dir": world.data_dir / "splits" / "split 1",
    }
    return SplitConfig(**(values | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folds_validation_images_and_masks_are_linked(tmp_path):
    world = make_world(tmp_path, n_train=5)
    steps = []
    result = split_fold(config(world), lambda *step: steps.append(step))
    assert result.count == 2
    assert names(result.images) == ["TR000001_satellite.tif", "TR000003_satellite.tif"]
    assert names(result.masks) == ["TR000001_kelp.tif", "TR000003_kelp.tif"]
    for folder in ("images", "masks"):
        for path in (result.images.parent / folder).iterdir():
            assert path.samefile(world.train_dir / folder / path.name)
    assert steps[-1] == ("splitting", 4, 4)
    assert SplitConfig.load(result.images.parent / "kelp-split.yaml") == config(world)


def test_where_links_are_impossible_files_are_copied(tmp_path, monkeypatch):
    world = make_world(tmp_path)

    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = split_fold(config(world))
    for path in result.images.iterdir():
        source = world.train_dir / "images" / path.name
        assert not path.samefile(source)
        assert path.read_bytes() == source.read_bytes()


def test_a_second_run_replaces_and_another_fold_is_refused(tmp_path):
    world = make_world(tmp_path)
    first = split_fold(config(world))
    expected = names(first.images)
    assert split_fold(config(world)) == first
    assert names(first.images) == expected
    (first.images / ".left.partial.tif").touch()
    with pytest.raises(ConfigError, match=r"holds images/TR000001_satellite\.tif, which is not"):
        split_fold(config(world, cv_split=0))
    assert names(first.masks) == ["TR000001_kelp.tif", "TR000003_kelp.tif"]
    for path in first.images.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds masks/TR000001_kelp\.tif"):
        split_fold(config(world, cv_split=0))


def test_a_link_of_a_link_is_the_file_itself(tmp_path):
    world = make_world(tmp_path)
    image = world.train_dir / "images" / "TR000001_satellite.tif"
    image.rename(tmp_path / "elsewhere.tif")
    image.symlink_to(tmp_path / "elsewhere.tif")
    made = split_fold(config(world)).images / image.name
    assert not made.is_symlink()
    assert made.samefile(tmp_path / "elsewhere.tif")


def test_bad_input_is_named(tmp_path):
    world = make_world(tmp_path)
    with pytest.raises(TableError, match=r"no fold 2; cv_split lies between 0 and 1"):
        split_fold(config(world, cv_split=2))
    with pytest.raises(ConfigError, match="holds the training images"):
        split_fold(config(world, output_dir=world.train_dir))
    table = pd.read_parquet(world.table)
    table.assign(split_1="train").to_parquet(world.table)
    with pytest.raises(TableError, match="fold 1 has no row with split_1 = val"):
        split_fold(config(world))
    table.to_parquet(world.table)
    (world.train_dir / "masks" / "TR000003_kelp.tif").unlink()
    with pytest.raises(TableError, match=r"TR000003_kelp\.tif: no such file"):
        split_fold(config(world))
    assert not config(world).output_dir.exists()


def test_a_link_that_was_not_made_is_noticed(tmp_path, monkeypatch):
    """The link test can fail: plant the fault it is for."""
    from kelp.data_prep import split

    world = make_world(tmp_path)
    monkeypatch.setattr(split, "VAL", "train")
    assert names(split_fold(config(world)).images) != [
        "TR000001_satellite.tif",
        "TR000003_satellite.tif",
    ]
