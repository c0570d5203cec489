"""The submission archive: the competition's bytes, in order, the same every time."""

from __future__ import annotations

import hashlib
import os
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from kelp.config import SubmitConfig
from kelp.errors import InputError
from kelp.products.submission import mask_bytes, submit, write_submission
from kelp.raster.masks import Georeference
from kelp.raster.writer import write_mask

SIDE = 350


def make_masks(folder: Path, tile_ids: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = {}
    for tile_id in tile_ids:
        masks[tile_id] = rng.choice(np.uint8([0, 1, 255]), (SIDE, SIDE), p=[0.8, 0.15, 0.05])
        write_mask(folder / f"{tile_id}_kelp.tif", masks[tile_id])
    return masks


@contextmanager
def plain(file: MemoryFile, **profile: object) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with file.open(**profile) as dataset:
            yield dataset


def test_an_empty_mask_has_the_bytes_of_the_competitions_own_labels():
    content = mask_bytes(np.zeros((SIDE, SIDE), np.uint8))
    assert len(content) == 2545
    assert hashlib.md5(content).hexdigest() == "72bad993b1a6fede6acfea561da9ff22"
    assert mask_bytes(np.full((SIDE, SIDE), 255, np.uint8)) == content


def test_members_hold_zero_and_one_only_sorted_and_without_georeference(tmp_path):
    masks = make_masks(tmp_path / "in", ["ZZ000001", "AA000002", "MM000003"])
    result = submit(SubmitConfig(predictions_dir=tmp_path / "in", output_dir=tmp_path / "out"))
    assert result.path == tmp_path / "out" / "submission.tar"
    assert (tmp_path / "out" / "kelp-submit.yaml").is_file()
    with tarfile.open(result.path) as tar:
        names = tar.getnames()
        assert names == ["AA000002_kelp.tif", "MM000003_kelp.tif", "ZZ000001_kelp.tif"]
        for member in tar.getmembers():
            assert (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
            with MemoryFile(tar.extractfile(member).read()) as file, plain(file) as dataset:
                assert (dataset.count, dataset.dtypes, dataset.crs) == (1, ("int8",), None)
                assert dataset.compression.name == "lzw"
                mask = masks[member.name.removesuffix("_kelp.tif")]
                np.testing.assert_array_equal(dataset.read(1), mask == 1)
    assert result.masks == 3
    assert result.kelp_pixels == sum(int((m == 1).sum()) for m in masks.values())
    assert result.not_observed_pixels == sum(int((m == 255).sum()) for m in masks.values())
    assert f"{result.kelp_pixels:,} kelp pixels" in result.summary()


def test_the_same_masks_give_the_same_bytes(tmp_path):
    make_masks(tmp_path, ["AA000001", "BB000002"])
    files = sorted(tmp_path.glob("*_kelp.tif"))
    write_submission(files, tmp_path / "one" / "submission.tar")
    for path in files:
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    write_submission(files[::-1], tmp_path / "two" / "submission.tar")
    one, two = (tmp_path / n / "submission.tar" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    # Planted fault: one other pixel is another archive.
    mask = mask_bytes(np.zeros((SIDE, SIDE), np.uint8))
    assert mask not in one.read_bytes()


def test_the_georeference_of_a_prediction_stays_out(tmp_path):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    reference = Georeference(CRS.from_epsg(32621), Affine(30, 0, 500_000, 0, -30, -5_700_000))
    write_mask(tmp_path / "AA000001_kelp.tif", mask, reference)
    write_submission([tmp_path / "AA000001_kelp.tif"], tmp_path / "submission.tar")
    with tarfile.open(tmp_path / "submission.tar") as tar:
        assert tar.extractfile("AA000001_kelp.tif").read() == mask_bytes(mask)


@pytest.mark.parametrize("shape", [(349, 350), (350, 351), (128, 128)])
def test_another_size_is_refused_by_name_and_leaves_nothing(tmp_path, shape):
    make_masks(tmp_path / "in", ["AA000001"])
    write_mask(tmp_path / "in" / "BB000002_kelp.tif", np.zeros(shape, np.uint8))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=rf"BB000002_kelp.tif has {shape[0]} x {shape[1]} .*350"):
        submit(SubmitConfig(predictions_dir=tmp_path / "in", output_dir=out))
    assert list(out.iterdir()) == []


def test_a_failure_keeps_the_archive_that_was_there(tmp_path):
    make_masks(tmp_path, ["AA000001"])
    good, archive = tmp_path / "AA000001_kelp.tif", tmp_path / "submission.tar"
    write_submission([good], archive)
    before = archive.read_bytes()
    bad = tmp_path / "BB000002_kelp.tif"
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(InputError, match=r"BB000002_kelp\.tif"):
        write_submission([good, bad], archive)
    assert archive.read_bytes() == before


def test_other_values_missing_folders_twins_and_nothing_are_refused(tmp_path):
    with MemoryFile() as file:
        profile = {"driver": "GTiff", "height": SIDE, "width": SIDE, "count": 1, "dtype": "uint8"}
        with plain(file, **profile) as dataset:
            dataset.write(np.full((SIDE, SIDE), 7, np.uint8), 1)
        (tmp_path / "AA000001_kelp.tif").write_bytes(bytes(file.read()))
    with pytest.raises(InputError, match=r"AA000001_kelp\.tif.*also 7"):
        write_submission([tmp_path / "AA000001_kelp.tif"], tmp_path / "submission.tar")
    with pytest.raises(InputError, match="no such folder"):
        submit(SubmitConfig(predictions_dir=tmp_path / "no", output_dir=tmp_path))
    twins = [tmp_path / "a" / "X_kelp.tif", tmp_path / "b" / "X_kelp.tif"]
    with pytest.raises(InputError, match="masks of one image"):
        write_submission(twins, tmp_path / "submission.tar")
    with pytest.raises(InputError, match="too long"):
        write_submission([tmp_path / f"{'X' * 95}_kelp.tif"], tmp_path / "submission.tar")
    with pytest.raises(InputError, match="at least one mask"):
        write_submission([], tmp_path / "submission.tar")


def test_a_folder_of_probabilities_alone_is_no_submission(tmp_path):
    (tmp_path / "AA000001_kelp_prob.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no \*_kelp.tif"):
        submit(SubmitConfig(predictions_dir=tmp_path, output_dir=tmp_path))
