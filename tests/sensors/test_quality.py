"""Quality bits by hand-written tables, policies, and masks from elsewhere."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from satellites import CRS, PRODUCTS, REAL_SCENES, SHAPE, TRANSFORM, make_landsat, write_layer
from world import write_tif

from kelp.config.scenes import SceneOptions
from kelp.errors import ConfigError, InputError
from kelp.sensors import landsat, open_scene
from kelp.sensors.quality import parse_policy

# USGS LSDS-1618 and LSDS-1619: layer, lowest bit, number of bits, value that counts.
# Written by hand, not taken from the code. RADSAT: saturation of the five bands that kelp reads.
OLI = {
    "fill": ("QA_PIXEL", [0]),
    "dilated_cloud": ("QA_PIXEL", [1]),
    "cirrus": ("QA_PIXEL", [2]),
    "cloud": ("QA_PIXEL", [3]),
    "shadow": ("QA_PIXEL", [4]),
    "snow": ("QA_PIXEL", [5]),
    "saturated": ("QA_RADSAT", [1, 2, 3, 4, 5]),
    "occluded": ("QA_RADSAT", [11]),
}
TM = {
    "fill": ("QA_PIXEL", [0]),
    "dilated_cloud": ("QA_PIXEL", [1]),
    "cloud": ("QA_PIXEL", [3]),
    "shadow": ("QA_PIXEL", [4]),
    "snow": ("QA_PIXEL", [5]),
    "saturated": ("QA_RADSAT", [0, 1, 2, 3, 4]),
    "dropped": ("QA_RADSAT", [9]),
}
TABLES = {4: TM, 5: TM, 7: TM, 8: OLI, 9: OLI}


@pytest.mark.parametrize("satellite", sorted(TABLES))
def test_each_flag_is_its_bits_and_no_other(satellite):
    flags = landsat.FLAGS[satellite]
    table = TABLES[satellite]
    assert set(flags) == {*table} | ({"high_aerosol"} if satellite >= 8 else set())
    for name, (layer, bits) in table.items():
        assert flags[name].layer == layer
        for bit in range(16):
            values = np.array([0, 1 << bit], np.uint16)
            assert flags[name].holds(values).tolist() == [False, bit in bits], (name, bit)


def test_high_aerosol_is_level_3_of_bits_6_and_7():
    flag = landsat.FLAGS[8]["high_aerosol"]
    assert flag.layer == "SR_QA_AEROSOL"
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(flag.holds(values), values >> 6 == 3)


def bits_scene(tmp_path, satellite, **options):
    """A scene whose first row holds each bit of QA_PIXEL, the second each of QA_RADSAT."""
    qa = np.full(SHAPE, 1 << 6, np.uint16)
    radsat = np.zeros(SHAPE, np.uint16)
    qa[0, :16] = [1 << bit for bit in range(16)]
    radsat[1, :16] = [1 << bit for bit in range(16)]
    folder = make_landsat(tmp_path, satellite, qa=qa, radsat=radsat)
    with open_scene(folder, SceneOptions(**options)) as scene:
        bad = scene.read()[5] == 1
        assert bad[2:].sum() == 0
        return set(np.flatnonzero(bad[0])), set(np.flatnonzero(bad[1])), scene.policy


@pytest.mark.parametrize(
    "satellite, quality, pixel, radsat",
    [
        (8, "", {0, 1, 2, 3, 4, 5}, set()),
        (7, "", {0, 1, 3, 4, 5}, set()),
        (8, "none", set(), set()),
        (8, "cloud", {3}, set()),
        (8, "fill,cloud,shadow", {0, 3, 4}, set()),
        (8, "saturated", set(), {1, 2, 3, 4, 5}),
        (5, "saturated", set(), {0, 1, 2, 3, 4}),
        (8, "occluded,snow", {5}, {11}),
        (4, "dropped", set(), {9}),
        (7, "cirrus,cloud", {3}, set()),  # cirrus does not exist there
    ],
)
def test_policies_take_what_they_name(tmp_path, satellite, quality, pixel, radsat):
    found_pixel, found_radsat, _ = bits_scene(tmp_path, satellite, quality=quality)
    assert (found_pixel, found_radsat) == (pixel, radsat)


def test_a_planted_swap_of_two_bits_is_caught(tmp_path):
    """Cloud and snow swapped in the file: the table above sees it."""
    qa = np.full(SHAPE, 1 << 6, np.uint16)
    qa[0, 0] = 1 << 5
    folder = make_landsat(tmp_path, 8, qa=qa)
    with open_scene(folder, SceneOptions(quality="cloud")) as scene:
        assert not scene.read()[5].any()


@pytest.mark.parametrize("folder", REAL_SCENES, ids=lambda path: path.name[10:16])
@pytest.mark.parametrize("quality", ["cloud", "fill,shadow,high_aerosol", "fill,saturated"])
def test_shares_are_those_that_numpy_counts(folder, quality):
    with open_scene(folder, SceneOptions(quality=quality)) as scene:
        facts = scene.quality
        bad = scene.read()[5] == 1
    assert facts.policy == tuple(parse_policy(quality.split(",")))
    assert facts.bad_share == pytest.approx(bad.mean())

    def layer(name):
        with rasterio.open(folder / f"{folder.name}_{name}.TIF") as source:
            return source.read(1)

    pixel, radsat, aerosol = layer("QA_PIXEL"), layer("QA_RADSAT"), layer("SR_QA_AEROSOL")
    for name, (where, bits) in OLI.items():
        values = {"QA_PIXEL": pixel, "QA_RADSAT": radsat}[where]
        share = np.mean([np.any([v >> b & 1 for b in bits]) for v in values.ravel().tolist()])
        assert facts.share[name] == pytest.approx(share), name
    assert facts.share["high_aerosol"] == pytest.approx((aerosol >> 6 == 3).mean())


@pytest.mark.parametrize("satellite", [5, 8])
def test_the_order_of_names_changes_nothing(tmp_path, satellite):
    """The fingerprint of a map is made of `reading`: the same bits are the same map."""
    folder = make_landsat(tmp_path, satellite)

    def words(quality):
        with open_scene(folder, SceneOptions(quality=quality)) as scene:
            return scene.reading, scene.policy

    default = ("fill", "dilated_cloud", "cirrus", "cloud", "shadow", "snow")
    assert words(default) == words(default[::-1]) == words(())
    assert words(("shadow", "cloud", "fill")) == words(("fill", "shadow", "cloud"))
    assert words(("shadow", "cloud")) != words(("shadow", "cloud", "fill"))
    if satellite == 5:  # which has no cirrus
        assert words(tuple(name for name in default if name != "cirrus")) == words(())


def test_an_unknown_bit_is_named():
    with pytest.raises(ConfigError, match="no bit 'clouds'"):
        parse_policy(["clouds"])
    with pytest.raises(ConfigError, match="none stands alone"):
        parse_policy(["none", "cloud"])


def test_a_flag_whose_layer_is_missing_is_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    (folder / f"{PRODUCTS[8]}_QA_RADSAT.TIF").unlink()
    with open_scene(folder) as scene:  # the default does not need it
        assert "saturated" not in scene.quality.share
    with (
        pytest.raises(InputError, match="QA_RADSAT is missing"),
        open_scene(folder, SceneOptions(quality="saturated")),
    ):
        pass


def test_a_cloud_mask_takes_the_place_of_cloud_bits(tmp_path):
    qa = np.full(SHAPE, 1 << 6, np.uint16)
    qa[0, 0], qa[0, 1] = 1 << 3, 1  # cloud, fill
    folder = make_landsat(tmp_path, 8, qa=qa)
    mask = np.zeros(SHAPE, np.uint8)
    mask[5, 6], mask[7, 8] = 1, 3
    path = write_layer(tmp_path / "masks" / f"{PRODUCTS[8]}_mask.tif", mask)
    for given in (path, path.parent):
        with open_scene(folder, SceneOptions(cloud_mask=given)) as scene:
            bad = {tuple(place) for place in np.argwhere(scene.read()[5] == 1).tolist()}
            assert bad == {(0, 1), (5, 6), (7, 8)}
            assert scene.quality.bad_share == pytest.approx(3 / mask.size)
            assert scene.quality.cloud_mask.sha256
    with open_scene(folder, SceneOptions(cloud_mask=path, quality="cloud")) as scene:
        bad = {tuple(place) for place in np.argwhere(scene.read()[5] == 1).tolist()}
        assert bad == {(0, 0), (5, 6), (7, 8)}


def test_a_cloud_mask_of_another_grid_is_warped_and_bad_where_it_knows_nothing(tmp_path):
    folder = make_landsat(tmp_path, 8)
    # Pixels of 60 m over the upper half only; one of them is cloud, one is nodata.
    mask = np.zeros((SHAPE[0] // 4, SHAPE[1] // 2), np.uint8)
    mask[2, 3], mask[4, 5] = 1, 255
    path = write_layer(
        tmp_path / "mask.tif", mask, nodata=255, transform=TRANSFORM @ Affine.scale(2)
    )
    with open_scene(folder, SceneOptions(cloud_mask=path)) as scene:
        bad = scene.read()[5] == 1
    wanted = np.zeros(SHAPE, bool)
    wanted[4:6, 6:8] = wanted[8:10, 10:12] = wanted[SHAPE[0] // 2 :] = True
    np.testing.assert_array_equal(bad, wanted)


def test_a_cloud_mask_that_does_not_fit_is_refused(tmp_path):
    folder = make_landsat(tmp_path, 8)
    small = write_layer(tmp_path / "small.tif", np.zeros((4, 4), np.uint8), crs=None)
    stack = write_tif(tmp_path / "stack.tif", np.zeros((7, *SHAPE), np.int32))
    for path, message in (
        (small, "must have the scene's 48 x 40 pixels"),
        (stack, "cloud_mask .*stack.tif: a mask has one band, this file has 7"),
        (tmp_path / "none.tif", "no such file"),
        (tmp_path, "holds no mask"),
    ):
        with (
            pytest.raises(InputError, match=message),
            open_scene(folder, SceneOptions(cloud_mask=path)),
        ):
            pass


def test_policies_hold_for_stacked_rasters_with_qa_pixel(tmp_path):
    values = np.full((6, *SHAPE), 8000, np.int32)
    values[5] = 1 << 6
    values[5, 0, :6] = [1 << bit for bit in range(6)]
    path = tmp_path / "stack.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=6,
        height=SHAPE[0],
        width=SHAPE[1],
        dtype="int32",
        crs=CRS,
        transform=TRANSFORM,
    ) as out:
        out.write(values)
        for number, band in enumerate(("SWIR", "NIR", "R", "G", "B", "QA"), start=1):
            out.set_band_description(number, band)
    for quality, wanted in (
        ("", {0, 1, 2, 3, 4, 5}),
        ("cloud,snow", {3, 5}),
        ("none", set()),
    ):
        with open_scene(path, SceneOptions(quality=quality)) as scene:
            assert set(np.flatnonzero(scene.read()[5][0] == 1)) == wanted
