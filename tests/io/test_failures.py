"""One image cannot end a run: the others are done as if it were not there, then it is named."""

import json

import pandas as pd
import pytest
from world import make_world

from kelp import tables
from kelp.cli import main
from kelp.data_prep import metadata, slicing, stats
from kelp.errors import BugError, InputError
from kelp.evaluation import scoring
from kelp.io.failures import ERRORS_FILE, Failure, raise_failures

BAD = "TR000002"
# The module whose reader of images or masks meets the planted bug, and its name there.
READERS = {
    "metadata": (metadata, "read_mask"),
    "slice": (slicing, "read_mask"),
    "stats": (stats, "open_scene"),
    "evaluate": (scoring, "read_mask"),
    "report": (scoring, "read_mask"),
}


def run(command, world, out):
    train = world.train_dir
    options = {
        "metadata": [f"--data_dir={world.data_dir}", "--workers=1"],
        "slice": [f"--data_dir={train}", f"--metadata_fp={world.table}", "--image_size=32"],
        "stats": [f"--data_dir={train}", "--workers=1", "--spectral_indices=NDVI"],
        "evaluate": [f"--gt_dir={train / 'masks'}", f"--preds_dir={train / 'masks'}"],
        "report": [f"--gt_dir={train / 'masks'}", f"--preds_dir={train / 'masks'}"],
    }[command]
    options += ["--workers=1"] if command in ("slice", "evaluate") else []
    return main([command, *options, f"--output_dir={out}", "--quiet"])


def found(command, out):
    """What a command made, without what names folders and times."""
    if command in ("metadata", "slice"):
        table = {"metadata": tables.IMAGES_TABLE, "slice": tables.TILES_TABLE}[command]
        rows = pd.read_parquet(out / table)
        return rows.drop(columns=[c for c in rows if "path" in c or "split_" in c])
    names = {"evaluate": "scores.json", "report": "report.json", "stats": "*.json"}
    (file,) = out.glob(names[command])
    return json.loads(file.read_text())


def same(one, other):
    return one.equals(other) if isinstance(one, pd.DataFrame) else one == other


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path, n_train=4, n_test=0)


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("cause", ["file", "bug"])
def test_the_others_are_done_and_it_is_named(command, cause, world, tmp_path, monkeypatch, capfd):
    files = [
        world.train_dir / "masks" / f"{BAD}_kelp.tif",
        world.train_dir / "images" / f"{BAD}_satellite.tif",
    ]
    bad = files[command == "stats"]
    if cause == "file":
        bad.write_bytes(b"no raster")
    else:
        module, name = READERS[command]
        read = getattr(module, name)

        def broken(path, *args, **options):
            return 1 / 0 if path == bad else read(path, *args, **options)

        monkeypatch.setattr(module, name, broken)
    out = tmp_path / "out"
    assert run(command, world, out) == (2 if cause == "file" else 1)
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "places make" not in x)
    assert "1 of 4 " in line
    assert "failed, the rest is done: " in line
    assert BAD in line
    log = out / ERRORS_FILE
    assert log.exists() == (cause == "bug")
    if cause == "bug":
        assert "a bug (ZeroDivisionError: division by zero)" in line
        assert f"please report it with {log}" in line
        assert "Traceback (most recent call last):" in log.read_text()

    monkeypatch.undo()
    for path in files:
        path.unlink()
    rows = pd.read_parquet(world.table)
    rows[rows["tile_id"] != BAD].to_parquet(world.table, index=False)
    assert run(command, world, tmp_path / "without") == 0
    assert same(found(command, out), found(command, tmp_path / "without"))


@pytest.mark.parametrize("command", ["metadata", "slice", "stats", "evaluate", "report"])
def test_where_all_fail_there_is_nothing_but_one_line(command, world, tmp_path, capfd):
    for folder in ("images", "masks"):
        for path in (world.train_dir / folder).iterdir():
            path.write_bytes(b"no raster")
    assert run(command, world, tmp_path / "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "4 of 4 " in line
    assert "the rest" not in line
    assert not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_evaluate_without_a_folder_shows_the_figures_of_the_rest(world, capfd):
    masks = world.train_dir / "masks"
    (masks / f"{BAD}_kelp.tif").write_bytes(b"no raster")
    assert main(["evaluate", f"--gt_dir={masks}", f"--preds_dir={masks}", "--quiet"]) == 2
    told = capfd.readouterr()
    assert told.out.startswith("3 images ")
    assert "1 of 4 images failed, the rest is done" in told.err


def test_many_failures_are_ten_in_the_line_and_all_in_the_log(tmp_path):
    failures = {number: Failure(f"{number}.tif: bad") for number in range(12)}
    with pytest.raises(InputError) as caught:
        raise_failures(failures, 20, "scenes", tmp_path, "the rest")
    log = tmp_path / ERRORS_FILE
    assert str(caught.value).startswith("12 of 20 scenes failed, the rest is done: 0.tif: bad; ")
    assert str(caught.value).endswith(f"9.tif: bad; and 2 more, see {log}")
    assert caught.value.result == "the rest"
    assert log.read_text() == "10.tif: bad\n11.tif: bad\n"


def test_a_bug_is_told_where_no_log_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    failures = {"a": Failure.of("a.tif", ZeroDivisionError("x"))}
    for folder in (None, tmp_path / "file"):
        with pytest.raises(BugError, match=r"a\.tif: a bug .* with an --output_dir that can be"):
            raise_failures(failures, 2, "scenes", folder)
