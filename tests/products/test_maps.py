"""Maps of a folder, and extras that are not installed."""

import sys
from datetime import UTC, date, datetime

import geopandas
import numpy as np
import pytest
from coasts import write_map
from shapely import box

from kelp.cli import main
from kelp.config.products import AreasConfig
from kelp.errors import InputError
from kelp.products.areas import areas
from kelp.products.maps import find_maps, open_map, trusted


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
        tmp_path,
        "X_2021-02-11",
        np.eye(3),
        acquired="2020-01-01T10:00:00+00:00",
        sensor="landsat-9",
        scene_id="Y",
    )
    found = open_map(path)
    assert (found.sensor, found.acquired_text, found.scene_id) == (
        "landsat-9",
        "2020-01-01T10:00:00Z",
        "Y",
    )


def test_a_folder_of_masks_of_another_program(tmp_path):
    for name in ("a", "b"):
        path = write_map(tmp_path, name, np.eye(3), np.eye(3), record=False)
        path.rename(tmp_path / f"{name}.tif")
    found = find_maps(tmp_path)
    assert [m.scene_id for m in found] == ["a", "b"]


def distrusted(path):
    """A map whose record says that it may be wrong."""
    record = path.with_name(path.name.replace("_kelp.tif", "_kelp.json"))
    guard = '"guard": {"ok": false, "reasons": ["too much kelp"]}'
    text = record.read_text()
    assert '"guard": null' in text
    record.write_text(text.replace('"guard": null', guard))
    return path


def test_a_map_that_may_be_wrong_is_left_out_unless_allowed(tmp_path, caplog):
    wrong, right = (write_map(tmp_path, name, np.eye(3)) for name in "AB")
    distrusted(wrong)
    maps = find_maps(tmp_path)
    assert [entry.mask for entry in trusted(maps)] == [right]
    assert f"{wrong}: may be wrong (too much kelp); left out" in caplog.text
    assert [entry.mask for entry in trusted(maps, True)] == [wrong, right]
    with pytest.raises(InputError, match=r"no map is left.*allow_distrusted=True"):
        trusted(maps[:1])


def test_the_area_of_a_map_that_may_be_wrong_is_null(tmp_path):
    distrusted(write_map(tmp_path / "maps", "A", np.eye(3)))
    aoi = tmp_path / "r.gpkg"
    polygon = box(-1e7, -1e7, 1e7, 1e7)
    geopandas.GeoDataFrame({"id": [1]}, geometry=[polygon], crs=32721).to_file(aoi)
    options = {"predictions_dir": tmp_path / "maps", "aoi": aoi, "min_observed": 0}
    for allowed, area in ((False, None), (True, 2700.0)):
        config = AreasConfig(**options, output=tmp_path / "a.csv", allow_distrusted=allowed)
        (row,) = areas(config).table.to_dict("records")
        if area is None:
            assert np.isnan(row["presence_area_m2"])
            assert "may be wrong (too much kelp)" in row["null_reason"]
        else:
            assert row["presence_area_m2"] == area


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("geopandas", ["beds", "--output", "{out}.gpkg"], "geo"),
        ("geopandas", ["areas", "--aoi", "{aoi}", "--output", "{out}.csv"], "geo"),
        ("pyogrio", ["beds", "--output", "{out}.fgb"], "geo"),
        ("netCDF4", ["series", "--output_dir", "{out}"], "series"),
        ("zarr", ["series", "--zarr", "True", "--output_dir", "{out}"], "series"),
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
