"""Maps of a folder, and extras that are not installed."""

import sys
from datetime import UTC, date, datetime

import geopandas
import numpy as np
import pytest
from coasts import write_map
from shapely import box

from kelp.cli import main
from kelp.products.maps import find_maps, open_map


@pytest.mark.parametrize(
    ("name", "sensor", "acquired"),
    [
        ("LC08_L2SP_224097_20230115_20230124_02_T1", "landsat-8", date(2023, 1, 15)),
        ("LT05_L2SP_042036_19990704_20200908_02_T1", "landsat-5", date(1999, 7, 4)),
        (
            "HLS.S30.T21FVC.2023015T134510.v2.0",
            "hls-s30",
            datetime(2023, 1, 15, 13, 45, 10, tzinfo=UTC),
        ),
        ("coast_2021-02-11", None, date(2021, 2, 11)),
        ("coast-20210211-b", None, date(2021, 2, 11)),
        ("coast_20211341", None, None),
        ("coast_120210211", None, None),
        ("AB123456", None, None),
    ],
)
def test_what_a_name_tells_without_a_record(tmp_path, name, sensor, acquired):
    found = open_map(write_map(tmp_path, name, np.eye(3), record=False))
    assert (found.sensor, found.acquired, found.scene_id) == (sensor, acquired, name)


def test_a_record_wins_over_the_name(tmp_path):
    path = write_map(
        tmp_path, "X_2021-02-11", np.eye(3), acquired="2020-01-01T10:00:00+00:00",
        sensor="landsat-9", scene_id="Y",
    )  # fmt: skip
    found = open_map(path)
    assert (found.sensor, found.acquired_text, found.scene_id) == (
        "landsat-9", "2020-01-01T10:00:00Z", "Y"
    )  # fmt: skip


def test_a_folder_of_masks_of_another_program(tmp_path):
    for name in ("a", "b"):
        path = write_map(tmp_path, name, np.eye(3), np.eye(3), record=False)
        path.rename(tmp_path / f"{name}.tif")
    found = find_maps(tmp_path)
    assert [m.scene_id for m in found] == ["a", "b"]


def test_a_map_that_its_guard_distrusts_is_named(tmp_path, caplog):
    path = write_map(tmp_path, "A", np.eye(3))
    record = path.with_name("A_kelp.json")
    text = record.read_text()
    distrust = '"guard": {"ok": false, "reasons": ["too much kelp"]}'
    record.write_text(text.replace('"guard": null', distrust))
    assert record.read_text() != text
    find_maps(tmp_path)
    assert "A_kelp.tif: the record warns of the map itself" in caplog.text


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("geopandas", ["beds", "--output", "{out}.gpkg"], "geo"),
        ("geopandas", ["areas", "--aoi", "{aoi}", "--output", "{out}.csv"], "geo"),
        ("pyogrio", ["beds", "--output", "{out}.fgb"], "geo"),
        ("netCDF4", ["series", "--output_dir", "{out}"], "series"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    tmp_path, monkeypatch, capfd, module, arguments, extra
):
    write_map(tmp_path / "maps", "A_2020-01-01", np.eye(4))
    aoi = tmp_path / "r.gpkg"
    frame = geopandas.GeoDataFrame({"id": [1]}, geometry=[box(0, 0, 1, 1)], crs=32721)
    frame.to_file(aoi)
    monkeypatch.setitem(sys.modules, module, None)
    filled = [part.format(out=tmp_path / "out", aoi=aoi) for part in arguments]
    assert main([*filled, "--predictions_dir", f"{tmp_path / 'maps'}"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert f'pip install "kelp-slicer[{extra}]"' in line
    assert not list(tmp_path.glob("out*"))
