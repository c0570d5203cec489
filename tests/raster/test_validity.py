"""One definition of "not observed" for every way in which a file can say it."""

import logging
import re

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from kelp.data_prep.tile_files import cut, encode, image_format
from kelp.errors import InputError
from kelp.raster.bands import BANDS
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.scene import Scene, read_scene
from kelp.raster.validity import canonical, observed
from kelp.raster.window import Tile

UTM = {"crs": CRS.from_epsg(32618), "transform": Affine(30, 0, 500000, 0, -30, -4000000)}
SHAPE = (24, 33)
HOLE = np.zeros(SHAPE, dtype=bool)
HOLE[:10, 4:] = True


def surface(dtype="int32", filler=0):
    """A scene of plausible values with `filler` in all bands of the hole."""
    rng = np.random.default_rng(0)
    data = rng.integers(7300, 30000, (7, *SHAPE)).astype(dtype)
    data[5] = 0
    data[6] = 3
    data[:5, HOLE] = filler
    if not dtype.startswith("u"):  # one dark band is no filler, nor are different values
        data[0, 20, 20] = 0
        data[:5, 21, 21] = (0, 1, 0, 0, 0)
    return data


def write(path, data, mask=None, alpha=None, names=BANDS, internal=True, **options):
    count = len(data) + (alpha is not None)
    profile = {"driver": "GTiff", "count": count, "dtype": data.dtype, **UTM, **options}
    shape = {"height": data.shape[1], "width": data.shape[2]}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "w", **shape, **profile) as out,
    ):
        out.write(data, list(range(1, len(data) + 1)))
        for i, name in enumerate(names, 1):
            out.set_band_description(i, name)
        if alpha is not None:
            out.write(alpha.astype(data.dtype), count)
            out.colorinterp = [*out.colorinterp[:-1], ColorInterp.alpha]
        if mask is not None:
            out.write_mask(mask)
    return path


def masked_by(kind, tmp_path, data, **options):
    """A file whose hole is told by a mask of this kind only."""
    seen = np.where(HOLE, 0, 255).astype(np.uint8)
    path = tmp_path / "scene.tif"
    if kind == "internal":
        return write(path, data, mask=seen, **options)
    if kind == "external":
        write(path, data, mask=seen, internal=False, **options)
        assert path.with_name("scene.tif.msk").is_file()
        return path
    if kind == "alpha":
        return write(path, data, alpha=seen, **options)
    source = write(tmp_path / "plain.tif", data, mask=seen, **options)
    path = tmp_path / "scene.VRT"
    rasterio.shutil.copy(source, path, driver="VRT")
    if kind == "bands":  # GDAL has a mask for each band there
        text = path.read_text()
        mask = text[text.index("<MaskBand>") : text.index("</MaskBand>") + len("</MaskBand>")]
        text = text.replace(mask, "").replace("</VRTRasterBand>", f"{mask}</VRTRasterBand>")
        path.write_text(text.replace("<MaskBand>", "<MaskBand>"))
    return path


@pytest.mark.parametrize("kind", ["internal", "external", "alpha", "virtual", "bands"])
@pytest.mark.parametrize("dtype", ["int32", "uint16", "float32"])
def test_masks_of_every_kind_mean_missing(tmp_path, kind, dtype):
    """The values below the mask look like any others."""
    data = surface(dtype, filler=8000)
    pixels = read_scene(masked_by(kind, tmp_path, data))
    np.testing.assert_array_equal(~observed(pixels), HOLE)
    assert np.isnan(pixels[:5, HOLE]).all()
    assert (pixels[5, HOLE] == 1).all()
    np.testing.assert_array_equal(pixels[:5, ~HOLE][1:], data[:5, ~HOLE][1:])


@pytest.mark.parametrize("kind", ["internal", "external", "alpha", "bands"])
def test_windows_of_a_masked_scene_are_parts_of_the_whole(tmp_path, kind):
    path = masked_by(kind, tmp_path, surface(filler=8000))
    with Scene(path) as scene:
        np.testing.assert_array_equal(scene.read(Tile(5, 2, 9, 7)), read_scene(path)[:, 5:14, 2:9])


def test_a_band_of_ours_is_no_alpha(tmp_path):
    """GDAL takes the fourth band of 8 bit files for alpha; here it is QA, and 0 is good."""
    data = np.full((4, *SHAPE), 90, dtype=np.uint8)
    data[3] = 0
    path = write(tmp_path / "a.tif", data, names=("R", "G", "NIR", "QA"))
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    assert observed(read_scene(path)).all()


def test_an_alpha_band_need_not_be_named(tmp_path):
    alpha = np.where(HOLE, 0, 255)
    path = write(tmp_path / "a.tif", surface(filler=8000), alpha=alpha, names=())
    np.testing.assert_array_equal(~observed(read_scene(path, BANDS)), HOLE)


FILLERS = [
    ("int32", 0, None),
    ("int32", 0, -32768),
    ("int32", -9999, None),
    ("int32", -2147483648, None),
    ("int32", 2147483647, None),
    ("int16", 0, None),
    ("int16", 32767, -9999),
    ("uint16", 0, 65535),
    ("uint16", 65535, None),
    ("uint16", 65535, 0),
    ("float32", 0, None),
    ("float32", -9999, None),
    ("float32", -9999, -1),
    ("float32", np.finfo("float32").min, None),
    ("float64", np.finfo("float64").min, None),
    ("float64", 0, np.nan),
]


@pytest.mark.parametrize(("dtype", "filler", "tag"), FILLERS)
def test_values_that_no_surface_has_are_not_observed(tmp_path, caplog, dtype, filler, tag):
    data = surface(dtype, filler)
    path = write(tmp_path / "a.tif", data, nodata=tag)
    pixels = read_scene(path)
    np.testing.assert_array_equal(~observed(pixels), HOLE)
    assert np.isnan(pixels[:5, HOLE]).all()
    named = tag is None and dtype == "uint16" and filler == 0
    assert len(caplog.records) == (0 if named else 1)
    assert f"36.6 % of the pixels hold {filler:g} in all optical bands" in caplog.text
    # From Python the same.
    np.testing.assert_array_equal(~observed(canonical(data)), HOLE | (canonical(data)[5] == 1))


@pytest.mark.parametrize("value", [1, 7273, 65535])
def test_values_that_a_surface_may_have_are_observed(tmp_path, caplog, value):
    """65535 is saturation in competition files, which are int32."""
    assert observed(read_scene(write(tmp_path / "a.tif", surface("int32", value)))).all()
    assert caplog.text == ""


def test_fillers_are_reported_once_and_not_for_samples(tmp_path, caplog):
    path = write(tmp_path / "a.tif", surface())
    with Scene(path) as scene:
        scene.sample(8)
    assert caplog.text == ""
    for _ in range(2):
        with Scene(path) as scene:
            for y in range(0, SHAPE[0], 6):
                scene.read(Tile(y, 0, 6, SHAPE[1]))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "36.6 %" in caplog.text


@pytest.mark.parametrize("kind", ["internal", "alpha", "bands", "fillers"])
@pytest.mark.parametrize(("dtype", "tag"), [("int32", None), ("uint16", None), ("float32", -1)])
def test_slices_keep_what_is_not_observed(tmp_path, kind, dtype, tag):
    if kind == "fillers":
        path = write(tmp_path / "scene.tif", surface(dtype, -5 if dtype != "uint16" else 65535))
    else:
        path = masked_by(kind, tmp_path, surface(dtype, 8000), nodata=tag)
    with Scene(path) as scene:
        stored, hidden, whole = scene.read_stored()
        form = image_format(scene, named=True)
        tile = Tile(3, 0, 16, 16)
        content = encode(cut(stored, tile, form, hidden), form, scene.georeference.shifted(tile))
    (tmp_path / "tile.tif").write_bytes(content)
    again = read_scene(tmp_path / "tile.tif")
    np.testing.assert_array_equal(again, whole[:, 3:19, :16])
    np.testing.assert_array_equal(~observed(again), HOLE[3:19, :16])


@pytest.mark.parametrize("kind", ["internal", "external", "alpha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_truth_and_probabilities_below_a_mask_are_not_observed(tmp_path, kind, dtype):
    kelp = np.zeros((1, *SHAPE), dtype=dtype)
    kelp[0, :12] = 1
    path = masked_by(kind, tmp_path, kelp, names=("kelp",))
    expected = np.where(HOLE, 255, kelp[0])
    np.testing.assert_array_equal(read_mask(path), expected)
    part = Tile(2, 3, 11, 9)
    np.testing.assert_array_equal(read_mask(path, part), expected[2:13, 3:12])
    np.testing.assert_array_equal(np.isnan(read_probability(path)), HOLE)


@pytest.mark.parametrize(
    ("dtype", "value", "tag"),
    [
        ("float32", np.nan, None),
        ("float32", np.nan, np.nan),
        ("float32", -3.4028234663852886e38, -3.4028234663852886e38),
        ("int8", -1, -1),
        ("uint16", 65535, 65535),
        ("uint8", 255, 0),
    ],
)
def test_missing_values_of_truth(tmp_path, dtype, value, tag):
    kelp = np.zeros((1, *SHAPE), dtype=dtype)
    kelp[0, 12:] = 1
    kelp[0, HOLE] = value
    path = write(tmp_path / "t.tif", kelp, names=(), nodata=tag)
    shallow = np.arange(SHAPE[0])[:, np.newaxis] >= 12
    np.testing.assert_array_equal(read_mask(path), np.where(HOLE, 255, np.where(shallow, 1, 0)))


def test_what_is_not_declared_missing_in_truth_is_refused(tmp_path):
    kelp = np.zeros((1, *SHAPE), dtype=np.int8)
    kelp[0, HOLE] = -1
    with pytest.raises(InputError, match="also -1"):
        read_mask(write(tmp_path / "t.tif", kelp, names=()))


def stacked(tmp_path, dtypes, names=BANDS, **options):
    """Bands of their own types in one virtual dataset, as `gdalbuildvrt -separate` makes it."""
    data = surface("int32", 9000)
    lines = []
    for i, (dtype, name) in enumerate(zip(dtypes, names, strict=True)):
        file = tmp_path / f"band{i}.tif"
        write(file, data[i : i + 1].astype(dtype), names=(), **options.get(name, {}))
        tag = options.get(name, {}).get("nodata")
        nodata = "" if tag is None else f"<NoDataValue>{tag}</NoDataValue>"
        kind = {"uint16": "UInt16", "int16": "Int16", "float32": "Float32"}[dtype]
        lines.append(
            f'<VRTRasterBand dataType="{kind}" band="{i + 1}"><Description>{name}</Description>'
            f'{nodata}<SimpleSource><SourceFilename relativeToVRT="1">{file.name}'
            "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        )
    path = tmp_path / "scene.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="{SHAPE[1]}" rasterYSize="{SHAPE[0]}">{"".join(lines)}'
        "</VRTDataset>"
    )
    return path, data


def test_bands_of_several_types_are_read(tmp_path):
    path, data = stacked(tmp_path, ["uint16"] * 5 + ["float32", "int16"], DEM={"nodata": 3})
    with Scene(path) as scene:
        stored, hidden, pixels = scene.read_stored()
        assert scene.dtype == "float32"
        assert scene.size.stored == 16
    np.testing.assert_array_equal(pixels[1:5, 0], data[1:5, 0])
    assert np.isnan(pixels[6]).all()  # its own nodata value
    np.testing.assert_array_equal(stored, data)
    assert hidden[6].all()
    np.testing.assert_array_equal(hidden[:5], data[:5] == 0)  # untagged and unsigned
    assert not hidden[5].any()


def test_what_a_virtual_scene_is_made_of_is_part_of_its_reading(tmp_path):
    """A map is not up to date when a source of its scene has changed, or a mask beside it."""
    path, _ = stacked(tmp_path, ["uint16"] * 6 + ["int16"])
    nested = tmp_path / "nested.vrt"
    nested.write_text(re.sub(r">band(\d)\.tif", ">scene.vrt", path.read_text()))
    with Scene(path) as scene, Scene(nested) as outer:
        before, around = scene.reading, outer.reading
    assert set(before["sources"]) == {f"band{i}.tif" for i in range(7)}
    assert set(around["sources"]) == {"scene.vrt", *before["sources"]}
    write(tmp_path / "band3.tif", np.full((1, *SHAPE), 9, np.uint16), names=())
    with Scene(path) as scene, Scene(nested) as outer:
        assert scene.reading != before
        assert outer.reading != around
    plain = write(tmp_path / "plain.tif", surface())
    with Scene(plain) as scene:
        assert "sources" not in scene.reading
    plain = masked_by("external", tmp_path, surface())
    with Scene(plain) as scene:
        assert set(scene.reading["sources"]) == {"scene.tif.msk"}


def test_text_that_is_not_utf_8_does_not_stop_a_scene(tmp_path):
    """As HLS files have it."""
    path = write(tmp_path / "a.tif", surface(filler=9), names=(*BANDS[:6], "DEMX"))
    path.write_bytes(path.read_bytes().replace(b"DEMX", b"D\xe9MX"))
    with Scene(path) as scene:
        assert scene.present == BANDS[:6]
        assert scene.descriptions == (*BANDS[:6], "D\ufffdMX")
        assert observed(scene.read()).all()


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_numbers_are_refused_by_name(tmp_path, dtype):
    path = write(tmp_path / "a.tif", surface().astype("complex64"), dtype=dtype)
    with pytest.raises(InputError, match=rf"a\.tif: band 1 holds complex numbers \({dtype}"):
        Scene(path)
    path = write(tmp_path / "m.tif", surface()[:1].astype("complex64"), names=(), dtype=dtype)
    for read in (read_mask, read_probability):
        with pytest.raises(InputError, match="complex numbers"):
            read(path)
