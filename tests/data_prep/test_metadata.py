import logging
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from fractal_world import coast
from world import opened, read_tif, write_tif

from kelp.config import MetadataConfig
from kelp.data_prep.metadata import build_metadata
from kelp.errors import InputError, KelpError, TableError
from kelp.raster.bands import BANDS
from kelp.tables import FACTS, LEFT_OUT

SHAPE = (110, 120)
# A folder with real files of the competition, which may not be passed on.
REAL_CSV = Path(os.environ.get("KELP_REAL_DATA", "."), "metadata_fTq0l2T.csv")

# Three places with two training images each, one of a fourth, and one without a DEM. The first
# test image shows the first place, the second none of them.
PLACE_OF = {"AA": 0, "AB": 1, "AC": 2, "AD": 0, "AE": 1, "AF": 2, "AG": 3, "AH": None}
TEST_PLACE_OF = {"ZA": 0, "ZB": 4}


@pytest.fixture
def data(tmp_path):
    """A data folder in competition layout."""
    rng = np.random.default_rng(0)
    for number, (tile_id, place) in enumerate((PLACE_OF | TEST_PLACE_OF).items()):
        y, x = rng.integers(0, 30, 2)
        image = rng.integers(7500, 9000, (7, *SHAPE)).astype(np.int32)
        image[5] = 0
        image[6] = -32768
        if place is not None:
            terrain = coast(place, land=0.6, shape=(SHAPE[0] + 30, SHAPE[1] + 30))
            image[6] = terrain[y : y + SHAPE[0], x : x + SHAPE[1]]
        image[5, : number + 1] = 1
        image[:5, -1] = -32768
        split = "test" if tile_id in TEST_PLACE_OF else "train"
        write_tif(tmp_path / split / "images" / f"{tile_id}_satellite.tif", image)
        if split == "train":
            mask = np.zeros((1, *SHAPE), np.int8)
            mask[0, :number, :10] = 1
            write_tif(tmp_path / split / "masks" / f"{tile_id}_kelp.tif", mask)
    return tmp_path


def run(data, **options):
    config = MetadataConfig(
        **{"data_dir": data, "output_dir": data / "out", "splits": 3, "workers": 1} | options
    )
    result = build_metadata(config)
    return result, pd.read_parquet(result.table)


def write_csv(data, rows=None, columns=("tile_id", "filename", "type", "in_train")):
    rows = rows or [
        *((i, f"{i}_satellite.tif", "satellite", i in PLACE_OF) for i in PLACE_OF | TEST_PLACE_OF),
        *((i, f"{i}_kelp.tif", "kelp", False) for i in PLACE_OF),  # the competition's trap
    ]
    path = data / "metadata.csv"
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def test_one_row_an_image_with_facts_place_folds_and_paths(data):
    told = []
    config = MetadataConfig(data_dir=data, output_dir=data / "out", splits=3, workers=1)
    result = build_metadata(config, lambda *step: told.append(step))
    table = pd.read_parquet(result.table)
    assert result.table == data / "out" / "train_val_test_dataset.parquet"
    assert (result.train, result.test, result.places, result.folds) == (8, 2, 6, 3)
    assert "8 training and 2 test images of 6 places in 3 folds" in result.summary()
    assert told[:10] == [("reading images", k, 10) for k in range(1, 11)]
    assert (data / "out" / "kelp-metadata.yaml").is_file()
    assert list(table.columns) == [
        "tile_id",
        "original_split",
        "aoi_id",
        "aoi_by_dem",
        "split_0",
        "split_1",
        "split_2",
        *FACTS,
        "image_path",
        "mask_path",
    ]
    assert table["tile_id"].tolist() == [*PLACE_OF, *TEST_PLACE_OF]
    assert table["original_split"].tolist() == ["train"] * 8 + ["test"] * 2
    row = table.set_index("tile_id").loc["AC"]
    assert row["image_path"] == "train/images/AC_satellite.tif"
    assert row["mask_path"] == "train/masks/AC_kelp.tif"
    assert (row["kelp_pixels"], row["kelp_pixels_pct"]) == (20, 20 / (110 * 120))
    assert row["has_kelp"]
    assert not row["high_kelp_pixels_pct"]
    assert row["qa_corrupted_pixels_pct"] == pytest.approx(3 / 110)
    assert row["valid_pixels_pct"] == pytest.approx(1 - 4 / 110)


def test_places_are_found_across_training_and_test_images(data):
    _, table = run(data)
    assert table["aoi_id"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 5]
    assert table["aoi_by_dem"].tolist() == [True] * 7 + [False] + [True] * 2
    assert table["dem_nan_pixels_pct"].tolist() == [0] * 7 + [1] + [0] * 2


def test_no_place_is_trained_and_validated_on_and_each_image_validates_once(data):
    _, table = run(data)
    splits = table.filter(like="split_").drop(columns="original_split", errors="ignore")
    train = table["original_split"] == "train"
    assert (splits[~train] == "test").all(axis=None)
    assert splits[train].isin(("train", "val")).all(axis=None)
    assert ((splits[train] == "val").sum(axis=1) == 1).all()
    for name in splits:
        assert (splits[name] == "val").any()
        places = table["aoi_id"]
        assert not set(places[splits[name] == "val"]) & set(places[splits[name] == "train"])


def test_test_images_have_no_facts_about_kelp(data):
    _, table = run(data)
    test = table[table["original_split"] == "test"]
    for name in ("kelp_pixels", "kelp_pixels_pct", "has_kelp", "mask_path"):
        assert test[name].isna().all()
    train = table[table["original_split"] == "train"]
    assert train["has_kelp"].astype(bool).tolist() == [False] + [True] * 7
    assert train["kelp_pixels"].to_numpy(np.int64).tolist() == [10 * k for k in range(8)]
    assert not train.isna().any(axis=None)


def test_the_table_does_not_depend_on_the_number_of_workers(data):
    one = run(data)[0].table.read_bytes()
    two = run(data, output_dir=data / "two", workers=2)[0].table.read_bytes()
    assert one == two


def test_the_csv_decides_by_the_type_of_rows(data):
    by_folders = run(data)[1]
    by_csv = run(data, metadata_fp=write_csv(data), output_dir=data / "csv")[1]
    pd.testing.assert_frame_equal(by_folders, by_csv)
    images = [(i, "", "satellite", i != "AB") for i in ("AG", "AA", "AC")]
    table = run(data, metadata_fp=write_csv(data, images))[1]
    assert table["tile_id"].tolist() == ["AA", "AC", "AG"]  # and no other file of the folders


def test_suspect_labels_are_left_out_of_the_folds_in_one_line(data, caplog):
    mask = np.zeros((1, *SHAPE), np.int8)
    mask[0, :60] = 1
    for tile_id in ("AB", "AG"):
        write_tif(data / "train/masks" / f"{tile_id}_kelp.tif", mask)
    with caplog.at_level(logging.WARNING, "kelp"):
        result, table = run(data)
    table = table.set_index("tile_id")
    assert result.left_out == 2
    assert (table.loc[["AB", "AG"], ["split_0", "split_1", "split_2"]] == LEFT_OUT).all(axis=None)
    assert (table.loc["AE", ["split_0", "split_1", "split_2"]] != LEFT_OUT).all()
    assert [r.getMessage() for r in caplog.records if "40 %" in r.getMessage()] == [
        "2 images with over 40 % kelp, mostly mislabelled, are left out of the folds (AB, AG); "
        "--keep_suspect_labels keeps them"
    ]
    result, table = run(data, keep_suspect_labels=True)
    assert result.left_out == 0
    assert not (table == LEFT_OUT).any(axis=None)


def test_fewer_places_than_folds_make_fewer_folds(data, caplog):
    with caplog.at_level(logging.WARNING, "kelp"):
        result, table = run(data, splits=10)
    assert result.folds == 5
    assert "split_5" not in table
    assert "5 places make 5 folds, not 10" in caplog.text


def test_no_test_folder_is_fine_no_training_folder_is_not(data):
    for path in (data / "test/images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="test/images: the folder holds no"):
        run(data)
    (data / "test/images").rmdir()
    assert run(data)[0].test == 0
    with pytest.raises(InputError, match="nowhere/train/images: no such folder"):
        run(data, data_dir=data / "nowhere")


def test_one_place_makes_no_folds_and_no_table(data):
    for path in (data / "train/images").iterdir():
        if path.name[:2] not in ("AA", "AD"):
            path.unlink()
    with pytest.raises(InputError, match="2 training images show 1 place: "):
        run(data)
    assert not (data / "out" / "train_val_test_dataset.parquet").exists()


@pytest.mark.parametrize("name", ["train/masks/AC_kelp.tif", "train/images/AC_satellite.tif"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_file_is_named(data, name, workers):
    path = data / name
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(KelpError, match=path.name):
        run(data, workers=workers)


def test_an_image_that_could_not_be_observed_is_named(data):
    path = data / "train/images/AC_satellite.tif"
    image = np.full((7, *SHAPE), 8000, np.int32)
    for names, said in (
        (("SWIR", "", "R", "G", "B", "QA", "DEM"), "lacks the band NIR"),
        (("SWIR", "NIR", "", "", "", "QA", "DEM"), "lacks the band R, G, B"),
    ):
        write_tif(path, image)
        with opened(path, "r+") as dataset:
            dataset.descriptions = names
        with pytest.raises(InputError, match=rf"AC_satellite\.tif: {said} .*band_order"):
            run(data)


def test_the_order_of_bands_can_be_given(data):
    expected = run(data)[1]
    order = ("DEM", "QA", "B", "G", "R", "NIR", "SWIR")
    for path in sorted(data.glob("*/images/*.tif")):
        write_tif(
            path, read_tif(path)[::-1], crs="EPSG:32610", transform=Affine(30, 0, 5, 0, -30, 9)
        )
    with pytest.raises(InputError, match="name them with band_order"):
        run(data)
    pd.testing.assert_frame_equal(run(data, band_order=order, workers=2)[1], expected)


def test_bad_masks_are_named(data):
    path = data / "train/masks/AC_kelp.tif"
    write_tif(path, np.full((1, *SHAPE), 7, np.uint8))
    with pytest.raises(InputError, match=r"AC_kelp.tif: .* 7"):
        run(data)
    write_tif(path, np.zeros((1, *SHAPE[::-1]), np.uint8))
    with pytest.raises(
        InputError, match=r"AC_kelp.tif does not .*120 x 110 pixels against 110 x 120"
    ):
        run(data)
    for part, shift in ((path, 1000), (data / "train/images/AC_satellite.tif", 0)):
        where = {"crs": "EPSG:32621", "transform": Affine(30, 0, shift, 0, -30, 0)}
        content = np.zeros((1, *SHAPE), np.uint8) if part == path else read_tif(part)
        write_tif(part, content, **where)
    with pytest.raises(InputError, match=r"AC_kelp.tif does not .* shifted by \+33.33 columns"):
        run(data, band_order=BANDS)
    run(data, ignore_georeference=True, band_order=BANDS)
    path.unlink()
    with pytest.raises(InputError, match=r"AC_kelp.tif: no such mask"):
        run(data)


def test_masks_of_0_and_255_are_refused_unless_255_is_said_to_be_kelp(data):
    wanted = run(data)[1]
    for path in sorted((data / "train/masks").glob("*.tif")):
        write_tif(path, np.where(read_tif(path) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"holds 0 and 255 only .*kelp_value=255"):
        run(data)
    pd.testing.assert_frame_equal(run(data, kelp_value=255)[1], wanted)


@pytest.mark.parametrize(
    "rows, columns, said",
    [
        ([("AA", "satellite")], ("tile_id", "type"), "lacks the column in_train"),
        ([("AA", "kelp", False)], ("tile_id", "type", "in_train"), "no row has type = satellite"),
        ([("AA", "satellite", "yes")], ("tile_id", "type", "in_train"), "in_train of AA is 'yes'"),
        ([("QQ", "satellite", True)], ("tile_id", "type", "in_train"), "QQ_satellite.tif"),
        ([("ZA", "satellite", False)] * 2, ("tile_id", "type", "in_train"), "two images called ZA"),
    ],
)
def test_a_bad_csv_is_explained(data, rows, columns, said):
    with pytest.raises(TableError, match=said):
        run(data, metadata_fp=write_csv(data, rows, columns))


@pytest.mark.skipif(not REAL_CSV.is_file(), reason="the competition's CSV is not public")
def test_the_real_csv_names_5635_training_and_1426_test_images(monkeypatch, tmp_path):
    from kelp import tables
    from kelp.data_prep import metadata

    needed = []
    monkeypatch.setattr(tables, "require_files", lambda paths, table: needed.extend(paths))
    sources = metadata._from_csv(REAL_CSV, tmp_path)
    splits = [source.split for source in sources]
    assert (splits.count("train"), splits.count("test")) == (5635, 1426)
    assert len(needed) == 2 * 5635 + 1426
