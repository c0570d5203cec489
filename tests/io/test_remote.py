"""Scenes from and maps to an object store: as from and to a disk, whatever goes wrong."""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from affine import Affine
from buckets import asked, serving
from bundles import tiny_bundle
from clusters import dask
from laws import predict, predict_command, rasters, write_scenes
from s3fs import S3FileSystem
from world import coast, opened, write_tif

import kelp
from kelp.cli import main
from kelp.config import PredictConfig, PreviewConfig, StatsConfig
from kelp.errors import ConfigError, InputError
from kelp.inference import plan
from kelp.inference.cluster import Setting, processor_of
from kelp.io import remote as rooms
from kelp.io.executors import gather
from kelp.io.location import Url, is_url, local, locate
from kelp.plotting.preview import preview
from kelp.raster.bands import BANDS

SHAPES = [(60, 70), (1030, 32), (40, 90)]  # the second one is large: its maps are COGs
MAPS = {"save_probabilities": True, "save_spread": True}


@pytest.fixture(scope="module")
def bucket():
    with serving() as store:
        yield store


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    found = write_scenes(tmp_path_factory.mktemp("scenes"), SHAPES)
    for path in found[:2]:  # the bands' names and the georeference go to the end of the file
        with opened(path, "r+") as dataset:
            dataset.descriptions = BANDS
            dataset.crs, dataset.transform = "EPSG:32611", Affine(30, 0, 300_000, 0, -30, 3_700_000)
    return found


@pytest.fixture
def bundle(tmp_path, ramp, one_thread):
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir()), "something was left in the scratch folder"


@pytest.fixture
def there(bucket, scenes, tmp_path, scratch):
    """A folder of the store with the scenes, and one for their maps."""
    return bucket.fill(f"{tmp_path.name}/scenes", scenes), f"s3://bucket/{tmp_path.name}/maps"


def told(data, bundle, out, *more):
    """The exit status of `kelp predict`."""
    return main(predict_command(data, bundle, out, *more))


def error_of(capsys):
    """The one line that told what was wrong."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("kelp: error: ")
    return line


def contents(folder):
    """All that maps hold, but for the tag that stands for how their scene is known."""
    found = {}
    for path in sorted(folder.glob("*.tif")):
        with opened(path) as dataset:
            tags = dataset.tags()
            assert tags.pop("KELP_FINGERPRINT")
            levels = [dataset.overviews(1), dataset.tags(1), dataset.descriptions]
            pixels = dataset.read().tobytes()
            found[path.name] = (str(dataset.profile), tags, levels, pixels)
    return found


@pytest.fixture
def alone(scenes, bundle, tmp_path):
    """The same scenes predicted on a disk."""
    predict(scenes[0].parent, (bundle,), tmp_path / "alone", **MAPS)
    return contents(tmp_path / "alone")


def test_maps_are_those_of_local_scenes(there, bucket, bundle, alone, tmp_path):
    data, out = there
    result = predict(data, (bundle,), out, **MAPS)
    assert result.made == 3
    assert str(result.masks[0]) == f"{out}/AA000000_kelp.tif"
    assert f"masks in {out};" in result.summary()
    assert contents(bucket.copy(out, tmp_path / "copy")) == alone
    assert len(alone) == 9
    record = (tmp_path / "copy" / "kelp-predict.yaml").read_text()
    assert f"data_dir: {data}\n" in record
    assert f"output_dir: {out}\n" in record


def test_from_the_store_to_a_disk_and_back(there, bucket, scenes, bundle, alone, tmp_path):
    data, out = there
    predict(data, (bundle,), tmp_path / "here", **MAPS)
    assert contents(tmp_path / "here") == alone
    assert not list((tmp_path / "here").glob(".*"))
    assert predict(data, (bundle,), tmp_path / "here", **MAPS).skipped == 3
    assert predict(scenes[0].parent, (bundle,), out, **MAPS).made == 3
    # By the same identity, the content's SHA-256: the very same bytes.
    assert rasters(bucket.copy(out, tmp_path / "copy")) == rasters(tmp_path / "alone")


def test_maps_of_a_store_are_verified_there_and_by_copies(
    there, bucket, scenes, bundle, tmp_path, capsys
):
    data, maps = there[0], tmp_path / "maps"
    assert told(data, bundle, maps) == 0
    capsys.readouterr()
    here = ["--predictions_dir", str(maps), "--device", "cpu"]
    for place in (data, scenes[0].parent):  # copies bear no mark of the store: sizes are compared
        assert main(["verify", "--data_dir", str(place), *here]) == 0
        assert capsys.readouterr().out.count("as its record says") == len(SHAPES)
    image = coast(SHAPES[0], np.random.default_rng(9))[0]
    bucket.fill(f"{tmp_path.name}/scenes", [write_tif(tmp_path / scenes[0].name, image)])
    assert main(["verify", "--data_dir", data, *here]) == 2
    line = error_of(capsys)
    assert f"{scenes[0].name}: changed since the map was made" in line
    assert "1 of 3 maps" in line


def test_scenes_of_a_store_have_statistics_and_pictures(there, scenes, bundle, tmp_path):
    data = there[0]
    options = {"spectral_indices": "none", "workers": 1}
    places = {"store": data, "here": scenes[0].parent}
    made = [
        kelp.compute_stats(StatsConfig(data_dir=place, output_dir=tmp_path / name, **options)).path
        for name, place in places.items()
    ]
    assert made[0].read_text() == made[1].read_text()
    predict(data, (bundle,), tmp_path / "maps")
    for name, place in places.items():
        given = {"data_dir": place, "predictions_dir": tmp_path / "maps"}
        preview(PreviewConfig(**given, output_dir=tmp_path / name))
    drawn = [[p.read_bytes() for p in sorted((tmp_path / n).glob("*.png"))] for n in places]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == len(SHAPES)


def test_what_is_finished_is_not_fetched_again(there, bucket, bundle, monkeypatch, capsys):
    data, out = there
    assert told(data, bundle, out) == 0
    before = {k: v["ETag"] for k, v in bucket.files.find(out, detail=True).items()}
    requests = asked(monkeypatch)
    assert told(data, bundle, out) == 0
    assert "0 scenes predicted (0 tiles), 3 already finished" in capsys.readouterr().out
    gets = [arguments for method, arguments in requests if method == "get_object"]
    assert gets
    for arguments in gets:
        first, _, last = arguments["Range"].removeprefix("bytes=").partition("-")
        assert int(last) - int(first) < 70_000  # a header
    puts = [arguments["Key"] for method, arguments in requests if method == "put_object"]
    assert [Path(key).name for key in puts] == ["kelp-predict.yaml"]
    assert {k: v["ETag"] for k, v in bucket.files.find(out, detail=True).items()} == before


def test_a_changed_scene_is_made_anew(there, bucket, bundle, tmp_path, capsys):
    data, out = there
    assert told(data, bundle, out) == 0
    image, _ = coast(SHAPES[0], np.random.default_rng(77))
    bucket.fill(f"{tmp_path.name}/scenes", [write_tif(tmp_path / "AA000000_satellite.tif", image)])
    assert told(data, bundle, out) == 0
    assert "1 scenes predicted" in (said := capsys.readouterr()).out
    assert f"{out}/AA000000_kelp.tif: made with other inputs or settings" in said.err
    assert told(data, bundle, out, "--decision_threshold", "0.9") == 0
    assert told(data, bundle, out, "--decision_threshold", "0.9", "--overwrite") == 0
    assert capsys.readouterr().out.count("3 scenes predicted") == 2


def test_maps_of_an_earlier_run_that_are_not_wanted_go(there, bucket, bundle):
    data, out = there
    predict(data, (bundle,), out, **MAPS)
    assert len(bucket.names(out)) == 12 + 1
    predict(data, (bundle,), out)
    assert bucket.names(out) == {
        "kelp-predict.yaml",
        *(f"AA00000{k}_kelp.{kind}" for k in range(3) for kind in ("tif", "json")),
    }


def test_bad_scenes_are_named_and_the_rest_is_done(there, bucket, bundle, tmp_path, capsys):
    data, out = there
    (tmp_path / "T_satellite.tif").write_bytes(b"no raster" * 9)
    # Its header is good; that its values are of another scale is seen when it is fetched.
    image, _ = coast((50, 50), np.random.default_rng(0))
    dark = write_tif(tmp_path / "U_satellite.tif", image // 10)
    bucket.fill(f"{tmp_path.name}/scenes", [tmp_path / "T_satellite.tif", dark])
    assert told(data, bundle, out) == 2
    error = error_of(capsys)
    assert "2 of 5 scenes failed, the rest is done" in error
    assert f"{data}/T_satellite.tif: not a readable raster ('T_satellite.tif' not rec" in error
    assert f"{data}/U_satellite.tif: looks like" in error
    assert "/tmp" not in error
    assert len([name for name in bucket.names(out) if name.endswith("_kelp.tif")]) == 3


def test_a_list_and_one_object(there, bucket, scenes, bundle, tmp_path):
    data, out = there
    lines = tmp_path / "scenes.txt"
    lines.write_text(f"{data}/{scenes[0].name}\n\n{scenes[2]}\n")
    assert predict(lines, (bundle,), out).made == 2
    assert predict(f"{data}/{scenes[0].name}", (bundle,), out).skipped == 1
    bucket.files.put_file(str(lines), f"bucket/{tmp_path.name}/scenes.txt")
    assert predict(f"s3://bucket/{tmp_path.name}/scenes.txt", (bundle,), out).skipped == 2


def test_marks_of_folders_hidden_objects_and_maps_are_no_scenes(bucket, scenes, tmp_path):
    folder = f"bucket/{tmp_path.name}"
    for name in ("", ".hidden.tif", "notes.md", "deeper/B.tif", "A_kelp.tif", "A b#1.tif"):
        bucket.files.pipe_file(f"{folder}/{name}", b"x")
    from kelp.sensors import find_scenes

    assert find_scenes(Url(f"s3://{folder}")) == [Url(f"s3://{folder}/A b#1.tif")]
    bucket.files.put_file(str(scenes[0]), f"{folder}/A b#1.tif")
    with rooms.open_raster(Url(f"s3://{folder}/A b#1.tif")) as dataset:
        assert dataset.shape == SHAPES[0]
    bucket.files.pipe_file(f"{folder}/empty/notes.md", b"x")
    with pytest.raises(InputError, match=r"/empty: holds no scene"):
        find_scenes(Url(f"s3://{folder}/empty"))


@pytest.mark.parametrize(
    "which, message",
    [
        ("data", "s3://nowhere/scenes: no such object, folder or bucket; check the URL"),
        ("folder", "s3://bucket/nothing: no such object, folder or bucket; check the URL"),
        ("out", "s3://nowhere/maps/kelp-predict.yaml: no such object, folder or bucket"),
    ],
)
def test_what_is_not_there(which, message, there, bundle, capsys):
    data, out = there
    data = {"data": "s3://nowhere/scenes", "folder": "s3://bucket/nothing"}.get(which, data)
    out = "s3://nowhere/maps" if which == "out" else out
    assert told(data, bundle, out) == 2
    assert message in error_of(capsys)


@pytest.fixture
def fresh():
    """Connections of this test are not those of others; they keep what they were made with."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def change(monkeypatch, method, function):
    """Let the store's library do something else."""
    monkeypatch.setattr(S3FileSystem, method, function)
    S3FileSystem.clear_instance_cache()


def failing(error):
    async def fail(*_, **__):
        raise error

    return fail


def no_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()


def nobody_there(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()


def no_rights(monkeypatch):
    denied = PermissionError(errno.EACCES, "Access Denied")
    change(monkeypatch, "_call_s3", failing(denied))


def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")  # already imported


@pytest.mark.parametrize(
    "fault, message",
    [
        (no_credentials, "no credentials (Unable to locate credentials); give them"),
        (nobody_there, "the store does not answer (Could not connect to the endpoint URL"),
        (no_rights, "access denied ([Errno 13] Access Denied); check the credentials"),
        (no_package, 'is missing (Install s3fs to access S3); pip install "kelp-slicer[cloud]"'),
    ],
)
@pytest.mark.parametrize("stored", ["data", "out"])
def test_a_store_that_cannot_be_used(
    fault, message, stored, there, scenes, bundle, tmp_path, monkeypatch, capsys, fresh
):
    data, out = there
    fault(monkeypatch)
    if stored == "data":
        assert told(data, bundle, tmp_path / "out") == 2
    else:
        assert told(scenes[0].parent, bundle, out) == 2
    error = error_of(capsys)
    assert message in error
    assert data in error or out in error


def test_unknown_stores_are_named():
    with pytest.raises(InputError, match="ipfs2://a/b: Protocol not known: ipfs2"):
        rooms.exists(Url("ipfs2://a/b"))
    with pytest.raises(InputError, match="abfs://a/b: the package for such URLs is missing"):
        rooms.exists(Url("abfs://a/b"))


def test_a_store_that_takes_nothing_is_found_out_before_the_work(
    there, bundle, monkeypatch, capsys, fresh
):
    data, out = there
    denied = PermissionError(errno.EACCES, "Access Denied")
    change(monkeypatch, "_pipe_file", failing(denied))
    assert told(data, bundle, out) == 2
    error = error_of(capsys)
    assert f"{out}/kelp-predict.yaml: access denied" in error
    assert "scenes failed" not in error


def test_an_interrupted_put_leaves_no_mask(there, bucket, bundle, monkeypatch, capsys, fresh):
    data, out = there
    put = S3FileSystem._put_file

    async def interrupted(self, path, to, **more):
        if "AA000001_kelp_prob" in to:
            raise ConnectionError("reset")
        await put(self, path, to, **more)

    change(monkeypatch, "_put_file", interrupted)
    assert told(data, bundle, out, "--save_probabilities") == 2
    error = error_of(capsys)
    assert f"1 of 3 scenes failed, the rest is done: {out}/AA000001_kelp_prob.tif: the " in error
    assert "the store does not answer (reset)" in error
    masks = {name for name in bucket.names(out) if name.endswith("_kelp.tif")}
    assert masks == {"AA000000_kelp.tif", "AA000002_kelp.tif"}
    change(monkeypatch, "_put_file", put)
    result = predict(data, (bundle,), out, save_probabilities=True)
    assert (result.made, result.skipped) == (1, 2)


def test_a_fetch_is_checked(there, bucket, bundle, tmp_path, monkeypatch, capsys, fresh):
    data, out = there
    get = S3FileSystem._get_file

    async def damaged(self, source, path, **more):
        await get(self, source, path, **more)
        if "AA000000" in source:
            Path(path).write_bytes(Path(path).read_bytes()[:-500])
        if "AA000002" in source:
            await self._pipe_file(source, b"another content")

    change(monkeypatch, "_get_file", damaged)
    assert told(data, bundle, out) == 2
    error = error_of(capsys)
    assert "2 of 3 scenes failed, the rest is done" in error
    assert f"{data}/AA000000_satellite.tif: " in error
    assert "bytes came; the connection may be bad" in error
    assert f"{data}/AA000002_satellite.tif: changed while it was fetched" in error


def test_a_scene_that_changes_before_it_is_fetched(there, bucket, bundle, monkeypatch, capsys):
    data, out = there
    look = rooms.look

    def changing(url):
        found = look(url)
        if "AA000001" in url.name:
            bucket.files.pipe_file(str(url), b"another content")
        return found

    monkeypatch.setattr(rooms, "look", changing)
    assert told(data, bundle, out) == 2
    assert f"{data}/AA000001_satellite.tif: changed since the run began" in error_of(capsys)


def test_a_full_scratch_disk_is_found_out_before_fetching(there, bundle, monkeypatch, capsys):
    data, out = there
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    assert told(data, bundle, out) == 2
    error = error_of(capsys)
    assert "1 of 3 scenes failed, the rest is done" in error
    assert f"{data}/AA000001_satellite.tif: " in error
    assert "300 kB are free" in error
    assert "or point TMPDIR to a larger disk" in error


def test_ctrl_c_leaves_no_mask_and_no_scratch(there, bucket, bundle, scratch):
    data, out = there
    from kelp.inference.predict import predict_scenes

    def stop(*_):
        assert list(scratch.iterdir())
        raise KeyboardInterrupt

    config = PredictConfig(data_dir=data, output_dir=out, run_dir=(bundle,), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        predict_scenes(config, stop)
    assert "AA000002_kelp.tif" not in bucket.names(out)


def test_measured_memory_is_kept_in_the_store(there, bucket, bundle):
    data, out = there
    assert predict(data, (bundle,), out, max_memory="8GB").made == 3
    assert "kelp-memory.json" in bucket.names(out)
    assert predict(data, (bundle,), out, max_memory="8GB").skipped == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--submission"], "need a local --output_dir; or fetch the masks and run kelp submit"),
        (["--preview_submission"], "need a local --output_dir"),
    ],
)
def test_archives_and_pictures_need_local_maps(options, message, there, bundle, capsys):
    data, out = there
    assert told(data, bundle, out, *options) == 2
    assert message in error_of(capsys)


def test_pictures_need_local_scenes(there, bundle, tmp_path, capsys):
    assert told(there[0], bundle, tmp_path / "out", "--preview_submission") == 2
    assert "--preview_submission: needs local scenes" in error_of(capsys)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["split", "--data_dir", "s3://b/a", "--output_dir", "o"], "--data_dir s3://b/a"),
        (["slice", "--data_dir", "d", "--output_dir", "gs://b/a"], "--output_dir gs://b/a"),
        (
            ["predict", "--data_dir", "d", "--output_dir", "o", "--run_dir", "r,s3://b/r"],
            "--run_dir s3://b/r",
        ),
        (
            ["compare", "--run_dir", "r", "--data_dir", "s3:/b", "--output_dir", "o"],
            "--data_dir s3:/b",
        ),
    ],
)
def test_other_options_refuse_urls(arguments, named, capsys):
    assert main(arguments) == 2
    assert f"{named}: takes local paths only (URLs are for --data_dir" in error_of(capsys)


def test_locations():
    url = locate("s3://bucket/scenes/")
    assert str(url / "X_satellite.tif") == "s3://bucket/scenes/X_satellite.tif"
    assert ((url / "X.tif").stem, (url / "X.tif").suffix) == ("X", ".tif")
    assert url.with_name("maps") == Url("s3://bucket/maps")
    assert not any(map(is_url, ["scenes", "/a/b", "C:/scenes", "a:b", Path("x"), None, 3]))
    assert locate(Path("a") / "b") == Path("a/b")
    with pytest.raises(InputError, match="s3://bucket/scenes: a local path is wanted"):
        local(url)
    for wrong in (Path("s3://bucket/scenes"), 3):
        with pytest.raises(ConfigError, match="data_dir: a"):
            PredictConfig(data_dir=wrong, output_dir="o", run_dir="r")
    config = PredictConfig(data_dir="s3://b/a", output_dir=Path("o"), run_dir="r")
    assert PredictConfig(**config.model_dump(mode="json")) == config
    assert config.absolute().data_dir == Url("s3://b/a")


def test_another_kind_of_store(scenes, bundle, alone, scratch, tmp_path):
    memory = fsspec.filesystem("memory")
    try:
        for path in scenes:
            memory.put_file(str(path), f"/scenes/{path.name}")
        assert predict("memory://scenes", (bundle,), "memory://maps", **MAPS).made == 3
        assert predict("memory://scenes", (bundle,), "memory://maps", **MAPS).skipped == 3
        (tmp_path / "copy").mkdir()
        for name in memory.find("/maps"):
            memory.get_file(name, str(tmp_path / "copy" / Path(name).name))
        assert contents(tmp_path / "copy") == alone
    finally:
        memory.store.clear()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A bundle that other processes can load, too."""
    folder = tmp_path_factory.mktemp("network")
    return tiny_bundle(folder / "bundle", decoder_channels=(16, 8, 8, 4, 4))


@pytest.fixture(scope="module")
def cluster(bucket, tmp_path_factory):
    with dask(tmp_path_factory.mktemp("dask"), workers=0) as cluster:
        for _ in range(2):
            cluster.add_worker(**bucket.variables)
        yield cluster


def on_cluster(data, bundle, out, cluster):
    return told(data, bundle, out, "--scheduler", str(cluster.file), "--threads", "1")


@pytest.mark.slow
def test_two_workers_make_the_same_maps(bucket, cluster, network, one_thread, tmp_path, capsys):
    bad = tmp_path / "T_satellite.tif"
    bad.write_bytes(b"no raster" * 9)
    small = write_scenes(tmp_path / "scenes", [(50, 60)] * 4)
    data, out = bucket.fill(f"{tmp_path.name}/scenes", [bad, *small]), "s3://bucket/shared-maps"
    assert on_cluster(data, network, out, cluster) == 2
    error = error_of(capsys)
    assert "1 of 5 scenes failed, the rest is done" in error
    assert f"{data}/T_satellite.tif: not a readable raster" in error
    copy = bucket.copy(out, tmp_path / "copy")
    assert len(json.loads((copy / "kelp-workers.json").read_text())) == 2
    bucket.files.rm(f"{data}/T_satellite.tif")
    assert on_cluster(data, network, out, cluster) == 0
    assert "0 scenes predicted (0 tiles), 4 already finished" in capsys.readouterr().out
    # Onto a disk that the workers share, and without them: the same bytes.
    assert on_cluster(data, network, tmp_path / "shared", cluster) == 0
    assert predict(data, (network,), tmp_path / "here", threads=1).made == 4
    assert rasters(copy) == rasters(tmp_path / "shared") == rasters(tmp_path / "here")
    assert not list((tmp_path / "shared").glob(".*"))


@pytest.mark.slow
def test_workers_that_cannot_use_the_store_are_refused(
    there, bucket, network, tmp_path, monkeypatch, capsys
):
    data, out = there
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys\nsys.modules['s3fs'] = None\n")
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    poor = {k: v for k, v in bucket.variables.items() if k != "AWS_ACCESS_KEY_ID"}
    with dask(tmp_path, workers=0) as cluster:
        cluster.add_worker(**bucket.variables, PYTHONPATH=paths)
        cluster.add_worker(**poor)
        with gather(1, str(cluster.file)) as workers:
            workers.client.wait_for_workers(2)
            config = PredictConfig(data_dir=data, output_dir=out, run_dir=network)
            setting = Setting(config.model_dump_json(), "0")
            answers = workers.client.run(processor_of, setting, 1, on_error="return")
        assert on_cluster(data, network, out, cluster) == 2
    said = sorted(map(str, answers.values()))
    assert f"{data}: no credentials (Unable to locate credentials)" in said[0]
    assert 's3fs to access S3); pip install "kelp-slicer[cloud]"' in said[1]
    assert re.search(rf"worker tcp://[\d.:]+: {data}: ", error_of(capsys))
