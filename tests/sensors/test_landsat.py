"""Landsat Collection 2 Level 2: names, bands and metadata by hand-written tables."""

import tarfile
from datetime import UTC, date, datetime

import numpy as np
import pytest
import rasterio
from satellites import (
    PRODUCTS,
    REAL,
    REAL_SCENES,
    SHAPE,
    copy_real,
    edit,
    layer,
    make_landsat,
    stack_of,
    tar_of,
    write_layer,
)

from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.sensors import find_scenes, landsat, open_scene

# USGS LSDS-1618 (Landsat 4-7) and LSDS-1619 (Landsat 8-9), tables of surface reflectance bands:
# the number of the file SR_B<n>.TIF. Written by hand, not taken from the code.
BAND_NUMBERS = {
    4: {"SWIR": 5, "NIR": 4, "R": 3, "G": 2, "B": 1},
    5: {"SWIR": 5, "NIR": 4, "R": 3, "G": 2, "B": 1},
    7: {"SWIR": 5, "NIR": 4, "R": 3, "G": 2, "B": 1},
    8: {"SWIR": 6, "NIR": 5, "R": 4, "G": 3, "B": 2},
    9: {"SWIR": 6, "NIR": 5, "R": 4, "G": 3, "B": 2},
}
ORDER = ("SWIR", "NIR", "R", "G", "B")


@pytest.mark.parametrize("satellite", sorted(BAND_NUMBERS))
def test_each_band_comes_from_its_file(tmp_path, satellite):
    folder = make_landsat(tmp_path, satellite)
    with open_scene(folder) as scene:
        pixels = scene.read()
    for position, band in enumerate(ORDER):
        np.testing.assert_array_equal(pixels[position], layer(BAND_NUMBERS[satellite][band]))
    assert not pixels[5].any()  # QA: 21952 is clear water
    assert np.isnan(pixels[6]).all()  # no DEM: unknown, not sea


def test_a_planted_swap_of_two_bands_is_caught(tmp_path):
    """The same check on a folder whose red and green files have changed names."""
    folder = make_landsat(tmp_path, 8)
    red, green = (folder / f"{PRODUCTS[8]}_SR_B{number}.TIF" for number in (4, 3))
    red.rename(tmp_path / "aside")
    green.rename(red)
    (tmp_path / "aside").rename(green)
    with open_scene(folder) as scene:
        pixels = scene.read()
    assert not np.array_equal(pixels[2], layer(4))
    np.testing.assert_array_equal(pixels[2], layer(3))


@pytest.mark.parametrize(
    "satellite, moment, level_tier, path_row, sun",
    [
        (4, "1983-01-10T13:52:14.171013", ("L2SP", "T1"), (2, 26), 15.13135888),
        (5, "2009-06-21T22:53:30.371063", ("L2SR", "T2"), (87, 17), None),
        (7, "2010-01-09T16:13:46.040058", ("L2SP", "T1"), (21, 30), 21.38957268),
        (8, "2019-12-01T15:13:51.861099", ("L2SP", "T1"), (8, 59), 57.08727307),
        (9, "2022-01-29T15:13:51.861099", ("L2SP", "T1"), (10, 65), 57.08727307),
    ],
)
def test_facts_come_from_name_and_mtl(tmp_path, satellite, moment, level_tier, path_row, sun):
    with open_scene(make_landsat(tmp_path, satellite)) as scene:
        facts = scene.known
    assert facts.id == facts.product_id == PRODUCTS[satellite]
    assert facts.sensor == f"landsat-{satellite}"
    assert (facts.level, facts.tier) == level_tier
    assert (facts.wrs_path, facts.wrs_row) == path_row
    # The files give 100 ns: the last digit of the microseconds may be cut or rounded.
    wanted = datetime.fromisoformat(moment).replace(tzinfo=UTC)
    assert abs((facts.acquired - wanted).total_seconds()) < 1e-5
    assert sun is None or facts.sun_elevation == pytest.approx(sun)
    assert facts.network_validated


@pytest.mark.parametrize("kind", ["json", "txt", "xml"])
def test_mtl_files_of_all_three_kinds_say_the_same(tmp_path, kind):
    folder = copy_real(tmp_path)
    name = folder.name
    for other in {"json", "txt"} - {kind}:
        (folder / f"{name}_MTL.{other}").unlink()
    if kind == "xml":
        (folder / f"{name}_MTL.xml").write_text(as_xml(REAL / name / f"{name}_MTL.txt"))
    with open_scene(folder) as scene:
        assert scene.known.acquired == datetime(2019, 12, 1, 15, 13, 51, 861099, UTC)
        assert scene.known.sun_azimuth == pytest.approx(136.31696044)
        assert scene.known.cloud_cover == pytest.approx(81.02)


def as_xml(path):
    """An MTL text file in the XML form, as the real ones of Landsat 4 to 7 have it."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    for line in path.read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            lines.append(f"<{value}>")
        elif key == "END_GROUP":
            lines.append(f"</{value}>")
        elif value:
            value = value.strip('"')
            lines.append(f"<{key}>{value}</{key}>")
    return "\n".join(lines)


@pytest.mark.parametrize("folder", REAL_SCENES, ids=lambda path: path.name[10:16])
def test_a_real_folder_is_read_as_numpy_reads_it(folder):
    with open_scene(folder) as scene:
        pixels = scene.read()
    for position, number in enumerate((6, 5, 4, 3, 2)):
        with rasterio.open(folder / f"{folder.name}_SR_B{number}.TIF") as source:
            stored = source.read(1).astype(np.float32)
            assert scene.georeference.crs == source.crs
            assert scene.georeference.transform == source.transform
        stored[stored == 0] = np.nan
        np.testing.assert_array_equal(pixels[position], stored)
    with rasterio.open(folder / f"{folder.name}_QA_PIXEL.TIF") as source:
        qa = source.read(1)
    bad = np.zeros(qa.shape, bool)
    for bit in range(6):  # fill, dilated cloud, cirrus, cloud, shadow, snow
        bad |= (qa >> bit) % 2 == 1
    assert bad.sum() > 0
    np.testing.assert_array_equal(pixels[5] == 1, bad)


@pytest.mark.parametrize("satellite", [5, 8])
def test_windows_are_the_parts_of_the_whole(tmp_path, satellite):
    from kelp.raster.window import Tile

    with open_scene(make_landsat(tmp_path, satellite)) as scene:
        whole = scene.read()
        for tile in (Tile(0, 0, 1, 1), Tile(5, 7, 20, 33), Tile(47, 39, 1, 1)):
            np.testing.assert_array_equal(scene.read(tile), whole[(slice(None), *tile.slices)])


def test_folder_archive_and_stack_hold_the_same_scene(tmp_path):
    folder = copy_real(tmp_path)
    archive = tar_of(folder)
    stack = stack_of(folder, tmp_path / "stack.tif")
    with open_scene(folder) as a, open_scene(archive) as b, open_scene(stack) as c:
        whole = a.read()
        np.testing.assert_array_equal(b.read(), whole)
        np.testing.assert_array_equal(c.read(), whole)
        assert a.georeference == b.georeference == c.georeference
        assert a.digest == b.digest
        assert a.reading == b.reading
        assert a.known == b.known


@pytest.mark.parametrize("start", ["./", "LC08/", "./LC08/"])
def test_an_archive_made_by_hand_holds_the_same_scene(tmp_path, start):
    """`tar cf scene.tar -C folder .` names its members `./…`."""
    folder = copy_real(tmp_path)
    archive = tmp_path / f"{folder.name}.tar"
    with tarfile.open(archive, "w") as opened:
        for file in sorted(folder.iterdir()):
            opened.add(file, start + file.name)
    with open_scene(folder) as a, open_scene(archive) as b:
        np.testing.assert_array_equal(b.read(), a.read())
        assert a.digest == b.digest


def test_the_digest_sees_every_part(tmp_path):
    folder = make_landsat(tmp_path, 8)
    with open_scene(folder) as scene:
        before = scene.digest
    seen = {before}
    for file in sorted(folder.glob("*.TIF")):
        with rasterio.open(file, "r+") as raster:
            values = raster.read(1)
            values[3, 3] += 1
            raster.write(values, 1)
        with open_scene(folder) as scene:
            seen.add(scene.digest)
    used = 5 + 3  # bands of kelp, and quality layers; SR_B1 and SR_B7 are not read
    assert len(seen) == 1 + used


def test_size_tells_blocks_and_bytes(tmp_path):
    with open_scene(make_landsat(tmp_path, 8)) as scene:
        assert scene.size.shape == SHAPE
        assert scene.size.block == (32, 32)
        assert scene.size.stored == 5 * 2 + 3 * 2  # VRTs have one type for all bands


def refused(path, message, **options):
    with (
        pytest.raises(InputError, match=message) as caught,
        open_scene(path, SceneOptions(**options)) as scene,
    ):
        scene.read()
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_level_1_is_refused(tmp_path):
    name = "LC08_L1TP_008059_20191201_20200825_02_T1"
    write_layer(tmp_path / name / f"{name}_B5.TIF", layer(5))
    assert find_scenes(tmp_path) == [tmp_path / name]
    refused(tmp_path / name, "level 1 product")


@pytest.mark.parametrize("file", ["B5.TIF", "sr_band5.tif", "pixel_qa.tif"])
def test_collection_1_is_refused(tmp_path, file):
    name = "LC08_L1TP_008059_20191201_20191217_01_T1"
    write_layer(tmp_path / name / f"{name}_{file}", layer(5))
    refused(tmp_path / name, "Collection 1")


def test_bands_of_two_scenes_in_one_folder_are_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    other = make_landsat(tmp_path / "other", 9)
    for file in other.glob("*_SR_B5.TIF"):
        file.rename(folder / file.name)
    text = refused(folder, "2 products")
    assert PRODUCTS[8] in text
    assert PRODUCTS[9] in text


def test_a_missing_band_is_named(tmp_path):
    folder = make_landsat(tmp_path, 7)
    (folder / f"{PRODUCTS[7]}_SR_B4.TIF").unlink()
    refused(folder, f"{PRODUCTS[7]}_SR_B4.TIF is missing")


def test_a_band_on_another_grid_is_named(tmp_path):
    folder = make_landsat(tmp_path, 8)
    write_layer(folder / f"{PRODUCTS[8]}_SR_B4.TIF", layer(4), 0, crs="EPSG:32721")
    refused(folder, "different grids")
    write_layer(folder / f"{PRODUCTS[8]}_SR_B4.TIF", layer(4, (48, 39)), 0)
    refused(folder, "different grids")


def test_an_empty_or_truncated_band_is_named(tmp_path):
    folder = make_landsat(tmp_path, 8)
    file = folder / f"{PRODUCTS[8]}_SR_B3.TIF"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    text = refused(folder, "truncated")
    assert "SR_B3.TIF" in text
    file.write_bytes(b"")
    assert "SR_B3.TIF" in refused(folder, "is empty").replace(str(folder), str(folder))


def test_a_half_downloaded_archive_is_refused(tmp_path):
    archive = tar_of(make_landsat(tmp_path, 8))
    whole = archive.read_bytes()
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    for member in members:
        middle = member.offset_data + member.size // 2
        for end in (member.offset, member.offset + 100, middle):
            archive.write_bytes(whole[:end])
            refused(archive, "cut short|not a readable tar")


def test_a_compressed_archive_is_refused(tmp_path):
    import gzip

    archive = tar_of(make_landsat(tmp_path, 8))
    packed = tmp_path / "scene.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes()))
    refused(packed, "unpack it")


@pytest.mark.parametrize("satellite", [5, 9])
@pytest.mark.parametrize("begin", ["", "reef_", "only in the MTL"])
def test_files_without_the_name_of_their_product_are_told_by_the_mtl(tmp_path, satellite, begin):
    folder = make_landsat(tmp_path, satellite)
    with open_scene(folder) as scene:
        pixels, known = scene.read(), scene.known
    bare = tmp_path / "bare"
    bare.mkdir()
    metadata = next(folder.glob("*_MTL.*"))
    for file in folder.glob("*.TIF"):
        rest = file.name.removeprefix(f"{folder.name}_")
        name = f"x{rest[::-1]}.tif" if "only" in begin else f"{begin}{rest.lower()}"
        file.rename(bare / name)
        if "only" in begin:
            metadata.write_text(metadata.read_text().replace(file.name, name))
    metadata.rename(bare / f"mtl{metadata.suffix}")
    assert find_scenes(tmp_path) == [bare]
    for path in (bare, tar_of(bare)):
        with open_scene(path) as scene:
            np.testing.assert_array_equal(scene.read(), pixels)
            assert scene.known == known.model_copy(update={"id": "bare"})
    if "only" not in begin:
        write_layer(bare / f"other_sr_b{2 if satellite == 5 else 3}.tif", layer(1))
        assert find_scenes(bare) == [bare]
        with pytest.raises(InputError, match="could both be"):
            open_scene(bare)


def test_quality_missing(tmp_path):
    folder = make_landsat(tmp_path, 8)
    (folder / f"{PRODUCTS[8]}_QA_PIXEL.TIF").unlink()
    refused(folder, "quality layer QA_PIXEL is missing")
    with open_scene(folder, SceneOptions(quality="none")) as scene:
        assert not scene.read()[5].any()


def test_without_mtl_the_name_must_do(tmp_path):
    folder = make_landsat(tmp_path, 8)
    (folder / f"{PRODUCTS[8]}_MTL.txt").unlink()
    with open_scene(folder) as scene:
        assert scene.known.acquired == date(2019, 12, 1)
        np.testing.assert_array_equal(scene.read()[1], layer(5))


def test_the_mtl_of_another_scene_is_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    mtl = folder / f"{PRODUCTS[8]}_MTL.txt"
    edit(mtl, 'LANDSAT_PRODUCT_ID = "LC08_L2SP_008059', 'LANDSAT_PRODUCT_ID = "LC08_L2SP_008060')
    refused(folder, "MTL file is that of LC08_L2SP_008060")
    mtl.rename(folder / f"{PRODUCTS[9]}_MTL.txt")
    refused(folder, f"MTL file is that of {PRODUCTS[9]}")


SWAPPED = {"MULT": "ADD", "ADD": "MULT"}


@pytest.mark.parametrize(
    "pattern, replacement",
    [
        (r"REFLECTANCE_MULT_BAND_5 = 2.75e-05", "REFLECTANCE_MULT_BAND_5 = 2.0e-05"),
        (r"REFLECTANCE_ADD_BAND_3 = -0.2", "REFLECTANCE_ADD_BAND_3 = 0.2"),
        (r"REFLECTANCE_ADD_BAND_6 = -0.2\n", "\n"),
        (
            r"REFLECTANCE_(MULT|ADD)_BAND_4",
            lambda found: f"REFLECTANCE_{SWAPPED[found[1]]}_BAND_4",
        ),
    ],
)
def test_another_scale_or_offset_is_caught(tmp_path, pattern, replacement):
    folder = make_landsat(tmp_path, 8)
    edit(folder / f"{PRODUCTS[8]}_MTL.txt", pattern, replacement)
    refused(folder, "REFLECTANCE_")


@pytest.mark.parametrize("content", ["", "<html>", "GROUP = X\nEND_GROUP = X\nEND_GROUP = X\n"])
def test_an_mtl_file_that_is_none_is_refused(tmp_path, content):
    folder = make_landsat(tmp_path, 8)
    (folder / f"{PRODUCTS[8]}_MTL.txt").write_text(content)
    refused(folder, "MTL")


def test_xml_with_entities_is_refused():
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><LANDSAT_METADATA_FILE>&a;</LANDSAT_METADATA_FILE>'
    with pytest.raises(InputError, match="entities"):
        landsat.parse_metadata("x", "x_MTL.xml", bomb)


@pytest.mark.parametrize(
    "name, rest",
    [
        ("LC08_L2SP_008059_20191201_20200825_02_T1_SR_B5.TIF", "SR_B5.TIF"),
        ("LT05_L2SR_087017_20090621_20200827_02_T2_QA_PIXEL.TIF", "QA_PIXEL.TIF"),
        ("LO08_L2SR_087017_20090621_20200827_02_RT_MTL.json", "MTL.json"),
        ("LC08_L2SP_008059_20191201_20200825_02_T1", ""),
    ],
)
def test_names_are_taken_apart(name, rest):
    product, found = landsat.parse_name(name)
    assert found == rest
    assert product.text == name[:40]


@pytest.mark.parametrize(
    "name",
    [
        "LC08_L2SP_008059_20191301_20200825_02_T1_SR_B5.TIF",  # month 13
        "XC08_L2SP_008059_20191201_20200825_02_T1_SR_B5.TIF",
        "LC08_L2SP_008059_20191201_02_T1",
        "falklands.tif",
    ],
)
def test_other_names_are_not_landsats(name):
    assert landsat.parse_name(name) is None


def test_a_stack_named_after_its_product_is_no_part_of_one(tmp_path):
    stack = stack_of(copy_real(tmp_path / "in"), tmp_path / f"{PRODUCTS[8]}.tif")
    assert find_scenes(tmp_path / "in") == [tmp_path / "in" / PRODUCTS[8]]
    assert find_scenes(stack) == [stack]
    with open_scene(stack) as scene:  # what the name says is known
        assert scene.known.sensor == "landsat-8"
        assert scene.known.acquired == date(2019, 12, 1)


def test_folders_of_folders_archives_and_rasters(tmp_path):
    first, second = make_landsat(tmp_path, 8), make_landsat(tmp_path / "aside", 9)
    archive = tar_of(second, tmp_path / f"{PRODUCTS[9]}.tar")
    stack = stack_of(copy_real(tmp_path / "aside", 1), tmp_path / "stack.tif")
    (tmp_path / "notes").mkdir()
    (tmp_path / "x_kelp.tif").write_bytes(b"")
    assert find_scenes(tmp_path) == [first, archive, stack]
    listed = tmp_path / "scenes.txt"
    listed.write_text(f"# mine\n{first}\n\n{stack}\n")
    assert find_scenes(listed) == [first, stack]


def test_a_scene_in_two_versions_is_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    later = tmp_path / folder.name.replace("_20200825_", "_20240101_")
    later.mkdir()
    for file in folder.glob("*.TIF"):
        (later / file.name.replace("_20200825_", "_20240101_")).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="in another version"):
        find_scenes(tmp_path)


def test_a_scene_as_folder_and_archive_is_refused(tmp_path):
    tar_of(make_landsat(tmp_path, 8))
    with pytest.raises(InputError, match="would also become"):
        find_scenes(tmp_path)


def test_a_polar_scene_keeps_its_crs(tmp_path):
    folder = make_landsat(tmp_path, 8, crs="EPSG:3031")
    with open_scene(folder) as scene:
        assert scene.grid.crs == "EPSG:3031"
        np.testing.assert_array_equal(scene.read()[1], layer(5))


def test_negative_northings_of_utm_north_are_right(tmp_path):
    with open_scene(make_landsat(tmp_path, 8)) as scene:
        assert scene.grid.crs == "EPSG:32621"
        assert scene.grid.transform == (30, 0, 500_000, 0, -30, -5_700_000)
