"""`kelp predict` through its command line, with a network of one pixel."""

import errno
import itertools
import json
import os
import time

import numpy as np
import pytest
import rasterio
from affine import Affine
from bundles import STATISTICS, tiny_bundle, use_pixel_network
from laws import predict_command
from rasterio.crs import CRS
from world import coast, read_tif, write_tif

import kelp
from kelp.cli import main
from kelp.errors import InputError
from kelp.inference.predictor import Predictor
from kelp.io.files import host
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference, georeference_of, read_mask
from kelp.raster.scene import Scene, read_scene
from kelp.raster.statistics import About, StatsFile
from kelp.raster.validity import observed

PLACE = {"crs": CRS.from_epsg(32719), "transform": Affine(30, 0, 400000, 0, -30, -5700000)}


@pytest.fixture(autouse=True)
def _pixel_network(monkeypatch):
    use_pixel_network(monkeypatch)


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    rng = np.random.default_rng(5)
    for i, shape in enumerate([(70, 50), (70, 50), (20, 90)]):
        image, _ = coast(shape, rng)
        write_tif(folder / f"AA00000{i}_satellite.tif", image)
    return folder


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle")


def predict(scenes, bundle, out, *more):
    return main(predict_command(scenes, bundle, out, "--quiet", *more))


def masks(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tif"))}


def test_masks_are_the_threshold_of_the_probabilities(scenes, bundle, tmp_path):
    assert predict(scenes, bundle, tmp_path / "out", "--soft_labels") == 0
    for path in sorted(scenes.iterdir()):
        name = path.name.removesuffix("_satellite.tif")
        mask = read_mask(tmp_path / "out" / f"{name}_kelp.tif")
        p = read_tif(tmp_path / "out" / f"{name}_kelp_prob.tif")[0]
        seen = observed(read_scene(path))
        assert mask.shape == seen.shape
        np.testing.assert_array_equal(mask == 255, ~seen)
        np.testing.assert_array_equal(np.isnan(p), ~seen)
        np.testing.assert_array_equal(mask[seen], p[seen] >= np.float32(0.4))
        assert 0 < (mask == 1).sum() < mask.size
    assert (tmp_path / "out" / "kelp-predict.yaml").is_file()


def test_a_second_run_skips_and_changes_nothing(scenes, bundle, tmp_path, capsys):
    out = tmp_path / "out"
    predict(scenes, bundle, out)
    before, times = masks(out), [p.stat().st_mtime_ns for p in sorted(out.glob("*.tif"))]
    assert predict(scenes, bundle, out) == 0
    assert "0 scenes predicted" in capsys.readouterr().out.splitlines()[-1]
    assert [p.stat().st_mtime_ns for p in sorted(out.glob("*.tif"))] == times
    assert predict(scenes, bundle, out, "--overwrite") == 0
    assert masks(out) == before


def test_changed_settings_make_outputs_anew(scenes, bundle, tmp_path, capfd):
    out = tmp_path / "out"
    predict(scenes, bundle, out)
    before = masks(out)
    assert main(predict_command(scenes, bundle, out, "--decision_threshold=0.9")) == 0
    assert "other inputs or settings; making it again" in capfd.readouterr().err
    assert masks(out) != before


def test_batch_size_and_alone_or_together_make_no_difference(scenes, bundle, tmp_path):
    predict(scenes, bundle, tmp_path / "a", "--batch_size", 8)
    predict(scenes, bundle, tmp_path / "b", "--batch_size", 3)
    predict(scenes / "AA000001_satellite.tif", bundle, tmp_path / "c")
    for name in masks(tmp_path / "a"):
        np.testing.assert_array_equal(
            read_mask(tmp_path / "a" / name), read_mask(tmp_path / "b" / name)
        )
    assert masks(tmp_path / "c").items() <= masks(tmp_path / "a").items()


def test_the_same_pixels_with_and_without_georeference(tmp_path, bundle):
    image, _ = coast((60, 80), np.random.default_rng(1))
    write_tif(tmp_path / "plain" / "X.tif", image)
    path = write_tif(tmp_path / "geo" / "X.tif", image, **PLACE)
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = BANDS
    assert predict(tmp_path / "plain", bundle, tmp_path / "a") == 0
    assert predict(tmp_path / "geo", bundle, tmp_path / "b") == 0
    np.testing.assert_array_equal(
        read_mask(tmp_path / "a" / "X_kelp.tif"), read_mask(tmp_path / "b" / "X_kelp.tif")
    )
    assert georeference_of(tmp_path / "b" / "X_kelp.tif") == Georeference(**PLACE)
    assert georeference_of(tmp_path / "a" / "X_kelp.tif") == Georeference()


@pytest.mark.parametrize("blend", ["mean", "hann"])
def test_slices_agree_with_the_whole_image_for_a_pixel_network(scenes, tmp_path, blend):
    whole = tiny_bundle(
        tmp_path / "w", sahi=False, tile_size=(70, 50), image_size=96, resize_strategy="pad"
    )
    predict(scenes, whole, tmp_path / "whole")
    predict(
        scenes,
        whole,
        tmp_path / "sliced",
        "--sahi_tile_size",
        32,
        "--sahi_overlap",
        5,
        "--blend",
        blend,
    )
    for name in masks(tmp_path / "whole"):
        np.testing.assert_array_equal(
            read_mask(tmp_path / "whole" / name), read_mask(tmp_path / "sliced" / name)
        )


def test_an_ensemble_of_a_bundle_with_itself_is_that_bundle(scenes, bundle, tmp_path):
    predict(scenes, bundle, tmp_path / "one")
    predict(scenes, f"{bundle},{bundle}", tmp_path / "two")
    for name in masks(tmp_path / "one"):
        np.testing.assert_array_equal(
            read_mask(tmp_path / "one" / name), read_mask(tmp_path / "two" / name)
        )


def test_qa_as_nodata_false_maps_what_is_under_clouds(scenes, bundle, tmp_path):
    predict(scenes, bundle, tmp_path / "a")
    predict(scenes, bundle, tmp_path / "b", "--no-qa-as-nodata")
    for path in sorted(scenes.iterdir()):
        name = path.name.replace("_satellite", "_kelp")
        seen = observed(read_scene(path), qa_as_nodata=False)
        np.testing.assert_array_equal(read_mask(tmp_path / "b" / name) == 255, ~seen)
        assert (read_mask(tmp_path / "a" / name) == 255).sum() > (~seen).sum()


def test_an_image_without_data_is_not_observed(tmp_path, bundle):
    write_tif(tmp_path / "s" / "N_satellite.tif", np.full((7, 40, 45), -32768, np.int32))
    assert predict(tmp_path / "s", bundle, tmp_path / "out") == 0
    assert (read_mask(tmp_path / "out" / "N_kelp.tif") == 255).all()


def test_a_bad_file_is_named_and_the_others_are_done(scenes, bundle, tmp_path, capfd):
    good = (scenes / "AA000001_satellite.tif").read_bytes()
    (scenes / "AB_satellite.tif").write_bytes(good[: len(good) // 2])
    write_tif(scenes / "AC_satellite.tif", np.ones((3, 40, 40), np.int32))
    assert predict(scenes, bundle, tmp_path / "out") == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "AB_satellite.tif" in error[0]
    assert "AC_satellite.tif" in error[0]
    assert "2 of 5 scenes failed" in error[0]
    assert sorted(masks(tmp_path / "out")) == [f"AA00000{i}_kelp.tif" for i in range(3)]
    assert not [p for p in (tmp_path / "out").iterdir() if "partial" in p.name]


def test_a_mask_that_cannot_be_written_is_named_and_the_others_are_done(
    scenes, bundle, tmp_path, capfd
):
    out = tmp_path / "out"
    (out / "AA000000_kelp.tif").mkdir(parents=True)
    assert predict(scenes, bundle, out, "--batch_size", 16) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "AA000000_kelp.tif: cannot be written" in error[0]
    assert sorted(p.name for p in out.glob("*.tif") if p.is_file()) == [
        "AA000001_kelp.tif",
        "AA000002_kelp.tif",
    ]


@pytest.mark.parametrize("when", ["looking at it", "predicting it"])
def test_a_bug_in_one_scene_is_logged_and_the_others_are_done(
    scenes, bundle, tmp_path, capfd, monkeypatch, when
):
    """Planted: reading the second scene divides by zero, at once or only when it is predicted."""
    read = Scene.read

    def broken(scene, tile=None):
        if scene.path.name.startswith("AA000001") and (when == "looking at it" or looked):
            return 1 / 0
        looked.extend([1] * scene.path.name.startswith("AA000001"))
        return read(scene, tile)

    looked = []
    monkeypatch.setattr(Scene, "read", broken)
    out = tmp_path / "out"
    (scenes / "AB_satellite.tif").write_bytes(b"no raster")
    assert predict(scenes, bundle, out) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "2 of 4 scenes failed, the rest is done" in line
    assert "AA000001_satellite.tif: a bug (ZeroDivisionError: division by zero)" in line
    assert "AB_satellite.tif: not a readable raster" in line
    text = (out / "kelp-errors.log").read_text()
    assert "AA000001_satellite.tif\nTraceback (most recent call last):" in text
    assert "AB_" not in text
    assert sorted(masks(out)) == ["AA000000_kelp.tif", "AA000002_kelp.tif"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_probabilities_of_an_earlier_run_do_not_stay(scenes, bundle, tmp_path):
    out = tmp_path / "out"
    predict(scenes, bundle, out, "--soft_labels")
    predict(scenes, bundle, out, "--decision_threshold", "0.9")
    assert not list(out.glob("*_prob.tif"))


def test_what_a_killed_run_left_is_cleaned_up(scenes, bundle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for suffix in (".tif", ".vrt", ".tif.ovr.tmp"):
        (out / f".kelp-{host()}-{os.getpid()}-0a1b2c3d.partial{suffix}").write_text("half")
    assert predict(scenes, bundle, out) == 0
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_the_record_holds_what_was_resolved(scenes, bundle, tmp_path):
    predict(scenes, bundle, tmp_path / "out")
    record = kelp.config.PredictConfig.load(tmp_path / "out" / "kelp-predict.yaml")
    assert (record.decision_threshold, record.precision) == (0.4, "32-true")
    assert (record.sahi_tile_size, record.sahi_overlap) == (32, 16)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (lambda dn: dn * 2.75e-5 - 0.2, "reflectance 0-1"),
        (lambda dn: (dn * 2.75e-5 - 0.2) * 10000, "Collection-1"),
    ],
)
def test_another_scale_is_named(scenes, bundle, tmp_path, capfd, values, named):
    pixels = read_scene(scenes / "AA000000_satellite.tif").astype(np.float32)
    pixels[:5] = values(pixels[:5])
    path = write_tif(tmp_path / "r" / "R_satellite.tif", pixels)
    assert predict(tmp_path / "r", bundle, tmp_path / "out") == 2
    assert named in capfd.readouterr().err
    loaded = kelp.load_bundle(bundle)
    with pytest.raises(InputError, match=f"R_satellite.tif: looks like {named}"):
        kelp.predict(loaded, path, tmp_path / "m.tif")
    with pytest.raises(InputError, match=f"the array: looks like {named}"):
        kelp.predict_array(loaded, pixels)
    assert not (tmp_path / "m.tif").exists()


def land_and_sea(land=(11_000, 14_000, 8900, 8700, 8400), sea=(7500, 7700, 7760, 8060, 8110)):
    """Optical DN of a coast in the order SWIR, NIR, R, G, B; the left half is land."""
    pixels = np.zeros((7, 40, 60), np.int32)
    pixels[:5] = np.array(sea)[:, np.newaxis, np.newaxis]
    pixels[:5, :, :30] = np.array(land)[:, np.newaxis, np.newaxis]
    pixels[6, :, :30] = 12
    return pixels


def test_bands_in_another_order_are_named_on_the_right_scale(bundle, caplog):
    """Each band's values are such as others hold: land and sea tell them apart."""
    loaded = kelp.load_bundle(bundle)
    pixels = land_and_sea()
    with pytest.raises(
        InputError, match=r"brighter than sea by SWIR 290, NIR 640, .* B 3500: bands"
    ):
        kelp.predict_array(loaded, pixels[[4, 3, 2, 1, 0, 5, 6]])
    kelp.predict_array(loaded, pixels[[0, 2, 1, 3, 4, 5, 6]])  # NIR and R
    assert caplog.text.count("bands in another order (--band_order), or snow") == 1
    caplog.clear()
    for good in (
        pixels,
        land_and_sea(sea=(7506, 7444, 9285, 10_159, 9391)),  # turbid: brighter than land
        pixels[:, :, 20:42],  # too little sea to tell
    ):
        kelp.predict_array(loaded, good)
    assert "order" not in caplog.text
    kelp.predict_array(loaded, land_and_sea(land=(8500, 19_000, 20_000, 20_500, 20_800)))
    assert "or snow" in caplog.text


def test_the_statistics_folder_is_only_a_check(scenes, tmp_path, capfd):
    bundle = tiny_bundle(tmp_path / "b", stats_file="s.json")
    folder = tmp_path / "stats"
    folder.mkdir()
    args = ("--dataset_stats_dir", folder)
    assert predict(scenes, bundle, tmp_path / "o", *args) == 0  # the file is not there
    about = About(None, 1, True, True, "nan", "reflectance", "0")
    StatsFile(STATISTICS, about).save(folder / "s.json")
    assert predict(scenes, bundle, tmp_path / "o", *args) == 0
    changed = json.loads((folder / "s.json").read_text())
    changed["NIR"]["q99"] += 1
    (folder / "s.json").write_text(json.dumps(changed))
    capfd.readouterr()
    assert predict(scenes, bundle, tmp_path / "o", *args) == 2
    assert "other numbers for NIR" in capfd.readouterr().err


def test_submission_and_previews(tmp_path, bundle):
    image, _ = coast((350, 350), np.random.default_rng(2))
    for i in range(3):
        write_tif(tmp_path / "s" / f"BB00000{i}_satellite.tif", image)
    out = tmp_path / "out"
    args = ("--preview_submission", "--preview_first_n=2")
    assert predict(tmp_path / "s", bundle, out, *args) == 0
    first = (out / "submission.tar").read_bytes()
    assert sorted(p.name for p in (out / "previews").iterdir()) == ["BB000000.png", "BB000001.png"]
    assert predict(tmp_path / "s", bundle, out, *args) == 0
    assert (out / "submission.tar").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"run_dir": "nowhere"}, "nowhere: no such folder"),
        ({"sahi_tile_size": "16", "sahi_overlap": "16"}, "must be smaller"),
        ({"sahi_overlap": "40"}, "--sahi_overlap 40: must be"),
        ({"decision_threshold": "1.5"}, "--decision_threshold"),
        ({"band_order": "R,G"}, "--band_order names 2"),
        ({"band_order": "SWIR,NIR,R,G,B,QA,XX"}, "unknown band 'XX'"),
        ({"blend": "cosine"}, "--blend"),
        ({"dataset_stats_dir": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(scenes, bundle, tmp_path, capfd, arguments, cause):
    given = {"data_dir": scenes, "run_dir": bundle, "output_dir": tmp_path / "out", **arguments}
    status = main(["predict", *(f"--{name}={value}" for name, value in given.items()), "--quiet"])
    error = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(error) == 1, error
    assert cause in error[0]


def test_two_scenes_that_would_share_a_mask_are_refused(scenes, bundle, tmp_path, capfd):
    (scenes / "AA000000.tif").write_bytes((scenes / "AA000000_satellite.tif").read_bytes())
    assert predict(scenes, bundle, tmp_path / "out") == 2
    assert "would also become AA000000_kelp.tif" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(scenes, bundle, tmp_path, capfd):
    out = tmp_path / "ro"
    out.mkdir(mode=0o500)
    assert predict(scenes, bundle, out) == 2
    assert "not writable" in capfd.readouterr().err


def test_a_clock_that_jumps_changes_nothing(scenes, bundle, tmp_path, monkeypatch):
    """By years, backwards and forwards, at every look at it."""
    predict(scenes, bundle, tmp_path / "steady")
    jumps = itertools.cycle((0, 1e8, -1e8))
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + next(jumps))
    left = tmp_path / "jumping" / f".kelp-elsewhere_1-1-{'0' * 8}.partial.tif"
    left.parent.mkdir()
    left.touch()
    os.utime(left, (4e9, 4e9))  # by another host's clock
    assert predict(scenes, bundle, tmp_path / "jumping") == 0
    assert left.exists()
    left.unlink()
    assert masks(tmp_path / "jumping") == masks(tmp_path / "steady")


@pytest.mark.parametrize("cause", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_takes_nothing_any_more(scenes, bundle, tmp_path, capfd, monkeypatch, cause):
    """Remounted, its permissions lost, over quota: one line; afterwards all as ever."""
    fsync = os.fsync

    def lost(handle):
        raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(os, "fsync", lost)
    out = tmp_path / "out"
    assert predict(scenes, bundle, out) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"cannot be written ({os.strerror(cause)})" in line
    monkeypatch.setattr(os, "fsync", fsync)
    assert predict(scenes, bundle, out) == 0
    assert len(masks(out)) == 3
    assert not list(out.glob(".*"))


def test_an_output_folder_that_is_a_file(scenes, bundle, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert predict(scenes, bundle, tmp_path / "file") == 2
    assert "cannot be created" in capfd.readouterr().err


def test_ctrl_c_leaves_finished_masks_only(scenes, bundle, tmp_path, monkeypatch, capfd):
    calls = []

    def interrupted(self, raw):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return np.zeros((len(raw), *raw.shape[2:]), np.float32)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    out = tmp_path / "out"
    assert predict(scenes, bundle, out, "--batch_size", 4) == 130
    assert "stopped" in capfd.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["AA000000_kelp.json", "AA000000_kelp.tif"]
    monkeypatch.undo()


def test_the_python_api(scenes, bundle, tmp_path):
    loaded = kelp.load_bundle(bundle)
    path = scenes / "AA000000_satellite.tif"
    raw = read_tif(path)
    options = {"precision": "32-true", "device": "cpu"}
    p = kelp.predict_array(loaded, raw, **options)
    counts = kelp.predict(loaded, path, tmp_path / "m.tif", **options)
    assert counts.predicted > 0
    predict(path, bundle, tmp_path / "out")
    expected = read_mask(tmp_path / "out" / "AA000000_kelp.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif"), expected)
    np.testing.assert_array_equal(np.isnan(p), expected == 255)
    np.testing.assert_array_equal(p[expected < 255] >= np.float32(0.4), expected[expected < 255])
    with pytest.raises(kelp.KelpError, match="lacks the bands B, G"):
        kelp.predict_array(loaded, raw[:3], names=("SWIR", "NIR", "R"))


def test_two_bad_images_among_200(bundle, tmp_path, capfd):
    """One corrupt, one of another band count: 198 are done, the two are named, exit 2."""
    image, _ = coast((24, 24), np.random.default_rng(3))
    folder = tmp_path / "many"
    for k in range(200):
        write_tif(folder / f"M{k:03d}_satellite.tif", image if k != 70 else image[:4])
    corrupt = folder / "M150_satellite.tif"
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    assert predict(folder, bundle, tmp_path / "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "2 of 200 scenes failed" in line
    assert "M070_satellite.tif" in line
    assert "M150_satellite.tif" in line
    done = {path.name for path in (tmp_path / "out").glob("*_kelp.tif")}
    assert len(done) == 198
    assert not {"M070_kelp.tif", "M150_kelp.tif"} & done
