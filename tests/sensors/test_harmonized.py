"""HLS v2.0 granules and Sentinel-2 L2A folders, on Landsat's Collection 2 scale."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
import rasterio
from bundles import tiny_bundle, use_pixel_network
from satellites import CRS, SHAPE, TRANSFORM, write_layer

from kelp.cli import main
from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.sensors import find_scenes, hls, open_scene, sentinel2
from kelp.sensors.record import read_record

# HLS v2.0 User Guide: bands of each product. Written by hand.
HLS_BANDS = {
    "L30": {"SWIR": "B06", "NIR": "B05", "R": "B04", "G": "B03", "B": "B02"},
    "S30": {"SWIR": "B11", "NIR": "B8A", "R": "B04", "G": "B03", "B": "B02"},
}
FILES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B11", "B12")
S2_BANDS = {"SWIR": "B11", "NIR": "B8A", "R": "B04", "G": "B03", "B": "B02"}


def to_dn(reflectance):
    """Collection 2 integers, reflectance = DN x 2.75e-5 - 0.2 (LSDS-1619)."""
    return (reflectance + 0.2) / 2.75e-5


def stored(name):
    """Stored values of a band: reflectance x 10,000, some of them negative."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (100 * FILES.index(name) - 50 + rows + columns).astype(np.int16)


def make_hls(root, kind, fmask=None):
    granule = f"HLS.{kind}.T21FVC.2024032T133215.v2.0"
    for name in FILES:
        values = stored(name)
        values[0, 0] = -9999
        write_layer(root / granule / f"{granule}.{name}.tif", values, -9999)
    layer = np.full(SHAPE, 0b0110_0000, np.uint8) if fmask is None else fmask
    write_layer(root / granule / f"{granule}.Fmask.tif", layer, 255)
    return root / granule


@pytest.mark.parametrize("kind", ["L30", "S30"])
def test_hls_bands_have_the_reflectance_of_their_files(tmp_path, kind):
    folder = make_hls(tmp_path, kind)
    assert find_scenes(tmp_path) == [folder]
    with open_scene(folder) as scene:
        pixels = scene.read()
        facts = scene.known
    for position, name in enumerate(HLS_BANDS[kind].values()):
        wanted = to_dn(stored(name) * 1e-4)
        assert np.isnan(pixels[position, 0, 0])
        wanted[0, 0] = np.nan
        np.testing.assert_allclose(pixels[position], wanted, rtol=1e-6)
    assert facts.sensor == f"hls-{kind.lower()}"
    assert facts.tile == "21FVC"
    assert facts.acquired == datetime(2024, 2, 1, 13, 32, 15, tzinfo=UTC)
    assert not facts.network_validated


def test_the_linear_maps_are_those_of_the_arithmetic():
    assert (round(hls.GAIN, 4), round(hls.OFFSET, 1)) == (3.6364, 7272.7)
    gain, offset = sentinel2.scale_of(10_000, -1000)
    assert (round(gain, 4), round(offset, 1)) == (3.6364, 3636.4)
    gain, offset = sentinel2.scale_of(10_000, 0)
    assert (round(gain, 4), round(offset, 1)) == (3.6364, 7272.7)


@pytest.mark.parametrize(
    "quality, bad",
    [
        # LP DAAC: bit 0 cirrus, 1 cloud, 2 adjacent, 3 shadow, 4 snow, 5 water, 6-7 aerosol
        ("", lambda v: v == 255 or v & 0b0001_1111),
        ("cloud", lambda v: v != 255 and v & 0b10),
        ("fill", lambda v: v == 255),
        ("dilated_cloud,shadow", lambda v: v != 255 and v & 0b1100),
        ("high_aerosol", lambda v: v != 255 and v >> 6 == 3),
        ("snow,cirrus", lambda v: v != 255 and v & 0b1_0001),
        ("none", lambda v: False),
    ],
)
def test_bits_of_fmask(tmp_path, quality, bad):
    fmask = np.zeros(SHAPE, np.uint8)
    fmask.ravel()[:256] = np.arange(256)
    folder = make_hls(tmp_path, "L30", fmask)
    with open_scene(folder, SceneOptions(quality=quality)) as scene:
        found = scene.read()[5].ravel()[:256] == 1
    assert found.tolist() == [bool(bad(v)) for v in range(256)]


def test_hls_folders_that_are_not_whole_are_refused(tmp_path):
    folder = make_hls(tmp_path, "S30")
    (folder / f"{folder.name}.B8A.tif").unlink()
    with pytest.raises(InputError, match=r"B8A\.tif is missing"):
        open_scene(folder)
    other = make_hls(tmp_path / "other", "L30")
    for file in other.iterdir():
        file.rename(folder / file.name)
    with pytest.raises(InputError, match="2 HLS granules"):
        open_scene(folder)
    old = tmp_path / "old"
    write_layer(old / "HLS.L30.T21FVC.2024032T133215.v1.5.B04.tif", stored("B04"), -9999)
    with pytest.raises(InputError, match=r"not of HLS version 2\.0"):
        open_scene(old)


SAFE = "S2B_MSIL2A_20240201T133209_N{baseline}_R081_T21FVC_20240201T170000.SAFE"
OFFSETS = "".join(
    f'<BOA_ADD_OFFSET band_id="{number}">-1000</BOA_ADD_OFFSET>' for number in range(13)
)


def make_safe(root, baseline="0510", offsets=OFFSETS, scl=None):
    """A SAFE folder with its 20 m bands as JPEG 2000."""
    name = SAFE.format(baseline=baseline)
    images = root / name / "GRANULE" / "L2A_T21FVC_A000000_20240201T133209" / "IMG_DATA" / "R20m"
    images.mkdir(parents=True)
    layers = {band: (stored(band) + 1200).astype(np.uint16) for band in S2_BANDS.values()}
    for values in layers.values():
        values[0, 0] = 0
    layers["SCL"] = np.full(SHAPE, 6, np.uint8) if scl is None else scl
    for band, values in layers.items():
        path = images / f"T21FVC_20240201T133209_{band}_20m.jp2"
        with rasterio.open(
            path,
            "w",
            driver="JP2OpenJPEG",
            count=1,
            height=SHAPE[0],
            width=SHAPE[1],
            dtype=values.dtype,
            crs=CRS,
            transform=TRANSFORM,
            QUALITY="100",
            REVERSIBLE="YES",
        ) as out:
            out.write(values, 1)
    (root / name / "MTD_MSIL2A.xml").write_text(
        '<?xml version="1.0"?><n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa'
        '.int/PSD/User_Product_Level-2A.xsd"><n1:General_Info><Product_Info>'
        "<PRODUCT_START_TIME>2024-02-01T13:32:09.024Z</PRODUCT_START_TIME>"
        f"<PRODUCT_URI>{name}</PRODUCT_URI><PROCESSING_BASELINE>{baseline[:2]}.{baseline[2:]}"
        "</PROCESSING_BASELINE></Product_Info><Product_Image_Characteristics>"
        '<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">10000'
        "</BOA_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST><BOA_ADD_OFFSET_VALUES_LIST>"
        f"{offsets}</BOA_ADD_OFFSET_VALUES_LIST></Product_Image_Characteristics>"
        "</n1:General_Info></n1:Level-2A_User_Product>"
    )
    return root / name


@pytest.mark.parametrize(
    "baseline, offsets, added",
    [("0510", OFFSETS, -1000), ("0400", OFFSETS, -1000), ("0214", "", 0)],
)
def test_sentinel_2_bands_have_the_reflectance_of_their_files(tmp_path, baseline, offsets, added):
    folder = make_safe(tmp_path, baseline, offsets)
    assert find_scenes(tmp_path) == [folder]
    with open_scene(folder) as scene:
        pixels = scene.read()
        facts = scene.known
        assert scene.georeference.transform == TRANSFORM
    for position, band in enumerate(S2_BANDS.values()):
        wanted = to_dn((stored(band) + 1200.0 + added) / 10_000)
        wanted[0, 0] = np.nan
        np.testing.assert_allclose(pixels[position], wanted, rtol=1e-6)
    assert facts.id == folder.name.removesuffix(".SAFE")
    assert facts.product_id == folder.name
    assert facts.acquired == datetime(2024, 2, 1, 13, 32, 9, 24000, tzinfo=UTC)
    assert not facts.network_validated


def test_only_some_classes_are_bad(tmp_path):
    """Kelp is often class 4, 5 or 7, dark water 2 or 6: none of them is bad."""
    scl = np.zeros(SHAPE, np.uint8)
    scl.ravel()[:12] = np.arange(12)
    folder = make_safe(tmp_path, scl=scl)
    for quality, wanted in (
        ("", [0, 1, 3, 8, 9, 10, 11]),
        ("cloud", [8, 9]),
        ("fill,saturated,shadow", [0, 1, 3]),
        ("cirrus,snow", [10, 11]),
    ):
        with open_scene(folder, SceneOptions(quality=quality)) as scene:
            bad = np.flatnonzero(scene.read()[5].ravel()[:12] == 1)
        assert bad.tolist() == wanted


@pytest.mark.parametrize(
    "offsets",
    [
        "",
        '<BOA_ADD_OFFSET band_id="1">-1000</BOA_ADD_OFFSET>',
        OFFSETS.replace('"8">-1000', '"8">-500'),
    ],
)
def test_a_missing_or_uneven_offset_is_refused(tmp_path, offsets):
    with pytest.raises(InputError, match="BOA_ADD_OFFSET"):
        open_scene(make_safe(tmp_path, "0510", offsets))


def test_sentinel_2_folders_that_are_not_whole_are_refused(tmp_path):
    folder = make_safe(tmp_path)
    metadata = folder / "MTD_MSIL2A.xml"
    text = metadata.read_text()
    metadata.unlink()
    with pytest.raises(InputError, match=r"MTD_MSIL2A\.xml is missing"):
        open_scene(folder)
    metadata.write_text(text[:300])
    with pytest.raises(InputError, match="not the metadata"):
        open_scene(folder)
    metadata.write_text(text)
    next(folder.rglob("*_B11_20m.jp2")).unlink()
    with pytest.raises(InputError, match="the band B11 of 20 m"):
        open_scene(folder)
    raw = tmp_path / SAFE.format(baseline="0510").replace("L2A", "L1C")
    raw.mkdir()
    with pytest.raises(InputError, match="Level 1C"):
        open_scene(raw)


@pytest.mark.parametrize("make", [make_hls, make_safe], ids=["hls", "sentinel-2"])
def test_every_product_of_a_map_says_that_no_network_was_validated(tmp_path, monkeypatch, make):
    use_pixel_network(monkeypatch)
    bundle = tiny_bundle(tmp_path / "bundle", bands=("SWIR", "NIR", "R", "G", "B"))
    folder = make(tmp_path, "S30") if make is make_hls else make(tmp_path)
    maps, name = tmp_path / "maps", folder.name.removesuffix(".SAFE")
    given = [f"--data_dir={folder}", f"--run_dir={bundle}", f"--output_dir={maps}"]
    assert main(["predict", *given, "--device=cpu", "--precision=32-true"]) == 0
    with rasterio.open(maps / f"{name}_kelp.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (CRS, TRANSFORM, SHAPE)
        values = mask.read(1)
    assert values[0, 0] == 255
    assert (values[1:, 1:] != 255).all()
    record = read_record(maps / f"{name}_kelp.json")
    assert not record.scene.network_validated
    assert main(["stac", f"--predictions_dir={maps}", f"--output_dir={tmp_path / 'stac'}"]) == 0
    (item,) = (tmp_path / "stac").rglob(f"{name}*.json")
    assert json.loads(item.read_text())["properties"]["kelp:network_validated"] is False
