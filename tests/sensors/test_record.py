"""The record of a map: written, read back, refused."""

import json
from datetime import UTC, date, datetime

import pytest

from kelp.errors import InputError
from kelp.sensors.record import (
    Grid,
    MapRecord,
    NetworkFacts,
    QualityFacts,
    SceneFacts,
    Source,
    read_record,
    record_path,
    write_record,
)

RECORD = MapRecord(
    scene=SceneFacts(
        id="LC08_L2SP_008059_20191201_20200825_02_T1",
        sensor="landsat-8",
        acquired=datetime(2019, 12, 1, 15, 16, 51, tzinfo=UTC),
        sources=(Source(role="NIR", href="x_SR_B5.TIF", sha256="0" * 64, size=10),),
    ),
    grid=Grid(shape=(4, 5), crs="EPSG:32618", transform=(30, 0, 100, 0, -30, 200)),
    quality=QualityFacts(policy=("fill", "cloud"), share={"cloud": 0.25}, bad_share=0.3),
    network=(NetworkFacts(name="kelp-base", sha256="1" * 64),),
    threshold=0.5,
    observed_share=0.7,
    kelp_pixels=3,
)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "x_kelp.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD


def test_the_file_has_the_names_of_the_contract(tmp_path):
    path = tmp_path / "x_kelp.json"
    write_record(path, RECORD)
    found = json.loads(path.read_text())
    assert set(found) >= {
        "schema",
        "scene",
        "grid",
        "quality",
        "dem",
        "aoi",
        "excluded",
        "network",
        "backend",
        "threshold",
        "settings",
        "observed_share",
        "kelp_pixels",
        "presence_area_m2",
        "expected_area_m2",
        "guard",
        "versions",
    }
    assert found["schema"] == 1
    assert found["scene"]["acquired"] == "2019-12-01T15:16:51Z"
    assert found["presence_area_m2"] is None  # not known is null, never 0


@pytest.mark.parametrize(
    "text, wanted, day",
    [
        ("2019-12-01", date(2019, 12, 1), date(2019, 12, 1)),
        (
            "2019-12-01T23:30:00-02:00",
            datetime(2019, 12, 2, 1, 30, tzinfo=UTC),
            date(2019, 12, 2),
        ),
        ("2019-12-01T01:02:03", datetime(2019, 12, 1, 1, 2, 3, tzinfo=UTC), date(2019, 12, 1)),
    ],
)
def test_a_day_stays_a_day_and_a_moment_is_utc(tmp_path, text, wanted, day):
    scene = SceneFacts(id="x", acquired=text)
    assert scene.acquired == wanted
    assert type(scene.acquired) is type(wanted)
    assert scene.day == day
    path = tmp_path / "x_kelp.json"
    write_record(path, MapRecord(scene=scene, grid=Grid(shape=(1, 1))))
    assert read_record(path).scene == scene


def test_every_product_of_a_scene_has_the_same_record(tmp_path):
    for name in ("x_kelp.tif", "x_kelp_prob.tif", "x_kelp_spread.tif"):
        assert record_path(tmp_path / name) == tmp_path / "x_kelp.json"
    with pytest.raises(InputError, match="not the name of a map"):
        record_path(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not a record of kelp"),
        ("{}", "scene: Field required"),
        ('{"schema": 2, "scene": {"id": "x"}, "grid": {"shape": [1, 1]}}', "update kelp"),
        (
            '{"scene": {"id": "x", "acquired": "yesterday"}, "grid": {"shape": [1, 1]}}',
            "acquired",
        ),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "x_kelp.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_record(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "x_kelp.json")
