from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from kelp.errors import InputError, TableError
from kelp.raster.masks import open_dataset
from kelp.tables import (
    PROBABILITY_SUFFIX,
    SPREAD_SUFFIX,
    output_name,
    read_table,
    require_files,
    tile_id_of,
    write_table,
)


@pytest.mark.parametrize(
    ("name", "mask", "tile_id"),
    [
        ("AB01_satellite.tif", "AB01_kelp.tif", "AB01"),
        ("AB01_satellite.TIF", "AB01_kelp.tif", "AB01"),
        ("AB01_Satellite.Tif", "AB01_kelp.tif", "AB01"),
        ("bay.tif", "bay_kelp.tif", "bay"),
        ("Bay.TIF", "Bay_kelp.tif", "Bay"),
        ("bay.v2_satellite.tif", "bay.v2_kelp.tif", "bay.v2"),
    ],
)
def test_names_of_products_do_not_depend_on_the_case_of_the_suffix(name, mask, tile_id):
    path = Path("folder") / name
    assert output_name(path) == mask
    assert output_name(path, PROBABILITY_SUFFIX) == mask.replace("_kelp", "_kelp_prob")
    assert output_name(path, SPREAD_SUFFIX) == mask.replace("_kelp", "_kelp_spread")
    assert tile_id_of(path) == tile_id
    assert tile_id_of(Path(mask)) == tile_id
    assert tile_id_of(Path(mask.replace("_kelp.tif", "_KELP_PROB.TIF"))) == tile_id
    assert tile_id_of(Path(mask.replace("_kelp.tif", "_kelp_spread.tif"))) == tile_id


def texts(*values):
    """A column of texts of these bytes, which need not be UTF-8."""
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    buffers = pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(values))
    return pa.StringArray.from_buffers(len(values), *buffers)


GOOD = texts(b"AA", b"BB")


@pytest.mark.parametrize(
    "column",
    [
        texts(b"A\xff", b"BB"),
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), texts(b"A\xff", b"BB")),
        pa.array([b"A\xff", b"BB"]),
        pa.array([["AA"], ["BB"]]),
        pa.array([{"a": 1}, {"a": 2}]),
    ],
    ids=["text", "dictionary", "bytes", "lists", "structures"],
)
@pytest.mark.parametrize("name", ["tile_id", "split_0"])
def test_columns_that_hold_no_text_are_refused(tmp_path, name, column):
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.table({"tile_id": GOOD, "split_0": GOOD, name: column}), path)
    with pytest.raises(TableError, match=r"UTF|holds") as error:
        read_table(path, ("tile_id", "split_0"))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff",
        b"1",
        b"{}",
        b'{"columns": [[]]}',
        b"[" * 100_000,
        b'{"index_columns": ["x"], "columns": [], "column_indexes": []}',
    ],
)
def test_what_pandas_noted_about_a_table_is_not_needed(tmp_path, note):
    path = tmp_path / "table.parquet"
    table = pa.table({"tile_id": GOOD, "x": [1, 2]})
    parquet.write_table(table.replace_schema_metadata({b"pandas": note}), path)
    assert read_table(path, ("tile_id",)).to_dict("list") == {"tile_id": ["AA", "BB"], "x": [1, 2]}


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = pd.DataFrame({"tile_id": ["A", "B"], "x": [1, 2], "f": [0.5, None], "b": [True, False]})
    write_table(table, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet", ("x",)), table)


def test_names_that_no_file_can_have_are_absent_files(tmp_path):
    path = tmp_path / ("x" * 5000)
    with pytest.raises(TableError, match="no such file, but"):
        require_files([path], tmp_path / "table.parquet")
    with pytest.raises(InputError, match="no such file"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        (["tile_id", "x"], ["A", None], "no tile_id"),
        (["tile_id", "tile_id"], ["A", "B"], "not a readable table"),
    ],
)
def test_rows_without_a_name_and_columns_of_one_name_are_refused(tmp_path, names, ids, message):
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(ids), pa.array(["a", "b"])], names), path)
    with pytest.raises(TableError, match=message):
        read_table(path, ("tile_id",))
