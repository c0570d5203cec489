import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.enums import Resampling
from world import opened

from kelp.errors import ConfigError, InputError
from kelp.io.files import open_locked
from kelp.io.location import Url
from kelp.raster.bands import BANDS
from kelp.raster.masks import Georeference, georeference_of, read_mask, read_tags
from kelp.raster.scene import Scene, read_scene
from kelp.raster.validity import canonical, decode_qa, observed
from kelp.raster.window import Shape, Tile
from kelp.raster.writer import RasterWriter, rows_path, write_mask

UTM = Georeference(CRS.from_epsg(32618), Affine(30, 0, 500000, 0, -30, -4000000))
SHAPE = (23, 31)


def write(path, data, **options):
    data = np.asarray(data)
    descriptions = options.pop("descriptions", None)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(data),
        height=data.shape[1],
        width=data.shape[2],
        dtype=data.dtype,
        **options,
    ) as out:
        out.write(data)
        for i, text in enumerate(descriptions or (), 1):
            out.set_band_description(i, text)
    return path


@pytest.fixture
def raw():
    rng = np.random.default_rng(3)
    data = rng.integers(1, 65536, (7, *SHAPE)).astype(np.int32)
    data[5] = rng.random(SHAPE) < 0.3
    data[6] = rng.integers(0, 200, SHAPE)
    data[1, 2:4] = -32768
    data[6, 0] = -32768
    return data


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_competition_file_needs_no_names(tmp_path, raw):
    pixels = read_scene(write(tmp_path / "a.tif", raw))
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(pixels), raw == -32768)
    np.testing.assert_array_equal(pixels[raw != -32768], raw[raw != -32768])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_georeferenced_and_shuffled_files_read_the_same(tmp_path, raw):
    plain = read_scene(write(tmp_path / "plain.tif", raw))
    order = [3, 0, 6, 5, 2, 1, 4]
    names = [BANDS[i] for i in order]
    described = write(tmp_path / "d.tif", raw[order], descriptions=names, **UTM.profile)
    ordered = write(tmp_path / "o.tif", raw[order], **UTM.profile)
    for pixels in (read_scene(described), read_scene(ordered, names)):
        np.testing.assert_array_equal(pixels, plain)


def test_unnamed_bands_with_a_crs_are_refused(tmp_path, raw):
    path = write(tmp_path / "u.tif", raw, **UTM.profile)
    with pytest.raises(InputError, match=r"u\.tif.*band_order"):
        Scene(path)
    with pytest.raises(InputError, match="7 bands, band_order names 2"):
        Scene(path, ("R", "G"))
    with pytest.raises(ConfigError, match="unknown band 'X'"):
        Scene(path, ("SWIR", "NIR", "R", "G", "B", "QA", "X"))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_windows_are_parts_of_the_whole(tmp_path, raw):
    path = write(tmp_path / "a.tif", raw)
    with Scene(path) as scene:
        assert scene.shape == SHAPE
        window = scene.read(Tile(4, 7, 11, 13))
    np.testing.assert_array_equal(window, read_scene(path)[:, 4:15, 7:20])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    ("dtype", "tag", "missing"),
    [
        ("uint16", None, 0),
        ("uint16", 65535, 65535),
        ("int16", None, -32768),
        ("float32", None, np.nan),
        ("float32", -9999, -9999),
    ],
)
def test_every_spelling_of_missing_becomes_nan(tmp_path, dtype, tag, missing):
    data = np.full((7, *SHAPE), 500, dtype=dtype)
    data[5:] = 0
    data[:5, 3, 4] = missing
    pixels = read_scene(write(tmp_path / "a.tif", data, nodata=tag))
    assert np.isnan(pixels[:5, 3, 4]).all()
    assert np.isnan(pixels).sum() == 5
    assert (pixels[5:] == 0).all()


def test_a_nodata_tag_of_zero_spares_qa_and_dem(tmp_path):
    data = np.zeros((7, *SHAPE), dtype=np.int16)
    pixels = read_scene(
        write(tmp_path / "a.tif", data, nodata=0, descriptions=BANDS, **UTM.profile)
    )
    assert np.isnan(pixels[:5]).all()
    assert (pixels[5:] == 0).all()


def test_qa_pixel_bits():
    # clear land, clear water, fill, dilated cloud, cirrus, cloud, shadow, snow (LSDS-1619)
    values = np.array([21824, 21952, 1, 2, 4, 8, 16, 32], dtype=np.float32)
    np.testing.assert_array_equal(decode_qa(values), [0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(decode_qa(np.array([0, 1, np.nan], np.float32)), [0, 1, 1])


def test_what_counts_as_observed():
    pixels = canonical(np.full((7, 1, 6), 1000.0))
    pixels[5] = 0
    pixels[1, 0, 0] = np.nan  # no NIR
    pixels[[0, 2], 0, 1] = np.nan  # three of five left
    pixels[[0, 2, 3], 0, 2] = np.nan  # two left
    pixels[6, 0, 3] = np.nan  # the DEM never decides
    pixels[5, 0, 4] = 1  # cloud
    np.testing.assert_array_equal(observed(pixels)[0], [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(observed(pixels, qa_as_nodata=False)[0], [0, 1, 0, 1, 1, 1])


def test_a_missing_dem_is_a_notice_another_band_an_error(tmp_path, caplog):
    data = np.full((6, *SHAPE), 900, dtype=np.int16)
    data[5] = 0
    path = write(tmp_path / "a.tif", data, descriptions=BANDS[:6], **UTM.profile)
    with Scene(path) as scene:
        scene.require(BANDS)
        assert "no DEM band" in caplog.text
        assert np.isnan(scene.read()[6]).all()
    path = write(tmp_path / "b.tif", data[:5], descriptions=BANDS[:5], **UTM.profile)
    with Scene(path) as scene, pytest.raises(InputError, match="lacks the band QA"):
        scene.require(("NIR", "QA"))


def test_unreadable_files_are_named(tmp_path, raw):
    with pytest.raises(InputError, match="no such file"):
        Scene(tmp_path / "absent.tif")
    (tmp_path / "text.tif").write_text("not a raster")
    with pytest.raises(InputError, match=r"text\.tif: not a readable raster"):
        Scene(tmp_path / "text.tif")
    whole = write(tmp_path / "whole.tif", raw, descriptions=BANDS, **UTM.profile)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.tif"):
        read_scene(cut)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_masks_hold_three_values(tmp_path):
    values = np.array([[0, 1, 255], [1, 1, 0]], dtype=np.uint8)
    write_mask(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif"), values)
    write(tmp_path / "bad.tif", np.array([[[0, 7]]], dtype=np.uint8))
    with pytest.raises(InputError, match=r"bad\.tif.*also 7"):
        read_mask(tmp_path / "bad.tif")
    write(tmp_path / "two.tif", np.zeros((2, 3, 4), dtype=np.uint8))
    with pytest.raises(InputError, match="one band"):
        read_mask(tmp_path / "two.tif")
    write(tmp_path / "tag.tif", np.array([[[0, 1, -1]]], dtype=np.int8), nodata=-1)
    np.testing.assert_array_equal(read_mask(tmp_path / "tag.tif"), [[0, 1, 255]])


def test_a_mask_keeps_its_place_and_its_tags(tmp_path):
    path = tmp_path / "m.tif"
    write_mask(path, np.zeros(SHAPE, dtype=np.uint8), UTM, {"KELP_X": "1"})
    assert georeference_of(path) == UTM
    assert read_tags(path)["KELP_X"] == "1"
    with rasterio.open(path) as dataset:
        assert dataset.nodata == 255
        assert dataset.colormap(1)[1] != dataset.colormap(1)[0]
    shifted = UTM.shifted(Tile(2, 3, 1, 1))
    assert shifted.transform @ (0, 0) == UTM.transform @ (3, 2)


def test_no_georeference_is_invented(tmp_path):
    write_mask(tmp_path / "m.tif", np.zeros(SHAPE, dtype=np.uint8))
    assert georeference_of(tmp_path / "m.tif") == Georeference()


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 255), ("float32", float("nan"))])
def test_a_large_raster_is_a_valid_cog(tmp_path, dtype, nodata):
    shape = (300, 1100)
    rows = (np.arange(shape[0] * shape[1]).reshape(shape) % 2).astype(dtype)
    path = tmp_path / "big.tif"
    with RasterWriter(path, shape, dtype, UTM, nodata, {"A": "b"}) as out:
        out.write(0, rows[:100])
        out.write(100, rows[100:])
    script = os.path.join(os.path.dirname(sys.executable), "rio")  # noqa: PTH118, PTH120
    done = subprocess.run([script, "cogeo", "validate", path], capture_output=True, text=True)
    assert "is a valid cloud optimized GeoTIFF" in done.stdout, done.stdout + done.stderr
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(1), rows)
        assert dataset.overviews(1)
        assert dataset.tags()["A"] == "b"
        if dtype == "uint8":
            assert dataset.colormap(1)[1] == (255, 190, 30, 255)
    assert georeference_of(path) == UTM
    assert [p.name for p in tmp_path.iterdir()] == ["big.tif"]


@pytest.mark.parametrize("shape", [(1040, 1088), (1029, 1027)])
def test_overviews_of_a_mask_are_those_of_gdal_by_mode(tmp_path, shape):
    mask = np.random.default_rng(1).choice(np.uint8([0, 1, 255]), shape, p=[0.4, 0.4, 0.2])
    mask[:300] = mask[:, :101] = mask[:, -30:] = 255  # as outside an area of interest
    write_mask(tmp_path / "ours.tif", mask, UTM)
    # An odd last row is one of pixels half unobserved; GDAL would shift all the others for it.
    even = np.pad(mask, [(0, -side % 4) for side in shape], constant_values=255)
    theirs = write(tmp_path / "theirs.tif", even[np.newaxis], nodata=255, **UTM.profile)
    with rasterio.open(theirs, "r+") as dataset:
        dataset.build_overviews([2, 4], Resampling.mode)
    for level in (0, 1):
        ours, expected = (
            rasterio.open(tmp_path / name, overview_level=level) for name in ("ours.tif", theirs)
        )
        with ours, expected:
            height, width = ours.shape
            assert (height, width) == tuple(-(-side // 2 ** (level + 1)) for side in shape)
            np.testing.assert_array_equal(ours.read(1), expected.read(1)[:height, :width])


@pytest.mark.parametrize("side", [40, 1100])
def test_a_writer_that_fails_leaves_nothing(tmp_path, side):
    path = tmp_path / "m.tif"

    def interrupted():
        with RasterWriter(path, (8, side), "uint8", UTM, 255, {}) as out:
            out.write(0, np.zeros((4, side), dtype=np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", [40, 1100])
@pytest.mark.parametrize("fault", ["describe", "copy", "verify"])
def test_a_failure_at_the_end_keeps_the_older_file(tmp_path, monkeypatch, side, fault):
    path = tmp_path / "m.tif"
    write_mask(path, np.ones((8, side), dtype=np.uint8))
    before = path.read_bytes()
    rows = np.zeros((8, side), dtype=np.uint8)

    def broken(*arguments, **options):
        raise KeyboardInterrupt

    def interrupted():
        with RasterWriter(path, rows.shape, "uint8", UTM, 255, {}) as out:
            out.write(0, rows)
            if fault == "copy":
                monkeypatch.setattr(rasterio.shutil, "copy", broken)
            elif fault == "verify":
                monkeypatch.setattr(out, "_verify", broken)
            else:
                monkeypatch.setattr(out, "_description", broken)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.tif"]


@pytest.mark.parametrize("side", [400, 1100])
def test_a_disk_that_fills_up_on_closing_is_noticed(tmp_path, side):
    """GDAL says nothing then; a limit on the size of files stands for the full disk."""
    script = f"""
import resource, sys
import numpy as np
from pathlib import Path
from kelp.errors import InputError
from kelp.raster.writer import write_mask
mask = np.random.default_rng(0).integers(0, 2, ({side}, {side})).astype(np.uint8)
path = Path(sys.argv[1])
write_mask(path, mask)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 800,) * 2)
path.unlink()
try:
    write_mask(path, mask)
except InputError as error:
    sys.exit(0 if "cannot be written" in str(error) else str(error))
sys.exit("written without a word")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m.tif"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    side=st.integers(1, 20),
    seed=st.integers(0),
)
def test_a_sample_is_made_of_the_scenes_own_pixels(tmp_path_factory, height, width, side, seed):
    data = np.random.default_rng(seed % 2**32).integers(
        1, 60000, (7, height, width), dtype=np.int32
    )
    data[5:] = 0
    path = tmp_path_factory.mktemp("s") / "a.tif"
    write(path, data, descriptions=BANDS, **UTM.profile)
    with Scene(path) as scene:
        sample = scene.sample(side)
    assert max(sample.shape[1:]) <= side
    assert np.isin(sample[0], data[0]).all()


def test_threads_do_not_undo_each_others_silence(tmp_path):
    """A warning is an error here; each thread opens files without a georeference."""
    path = tmp_path / "a.tif"
    write_mask(path, np.zeros(SHAPE, dtype=np.uint8))

    def read(_):
        for _ in range(60):
            read_mask(path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(8)))


class _Shaky(fsspec.AbstractFileSystem):
    """A store that answers on good days only; nothing is in it."""

    protocol = "shaky"
    good = True
    cachable = False

    def info(self, path, **_):
        if self.good:
            raise FileNotFoundError(path)
        raise OSError("503 Slow Down")


def test_a_store_that_does_not_answer_is_not_one_without_tags(monkeypatch):
    """Else a finished map would be made again."""
    fsspec.register_implementation("shaky", _Shaky, clobber=True)
    assert read_tags(Url("shaky://maps/a.tif")) == {}
    monkeypatch.setattr(_Shaky, "good", False)
    with pytest.raises(InputError, match="503 Slow Down"):
        read_tags(Url("shaky://maps/a.tif"))


def test_files_without_tags_of_ours(tmp_path):
    assert read_tags(tmp_path / "absent.tif") == {}
    (tmp_path / "half.tif").write_bytes(b"II*\0")
    assert read_tags(tmp_path / "half.tif") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_map_that_may_not_be_read_is_not_one_without_tags(tmp_path):
    write_mask(tmp_path / "m.tif", np.zeros(SHAPE, dtype=np.uint8))
    (tmp_path / "m.tif").chmod(0)
    with pytest.raises(InputError, match="reading is not allowed"):
        read_tags(tmp_path / "m.tif")


def test_a_writer_that_stops_takes_no_rows_of_the_next(tmp_path):
    """The next one waits for the lock, and gets it when the first lets go."""
    path = tmp_path / "m.tif"
    for _ in range(50):
        first = RasterWriter(path, SHAPE, "uint8", UTM, 255, {})
        first.begin()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(open_locked, rows_path(path), wait=True)
            first.discard()
            with waiting.result() as file:
                file.write(b"rows")
                file.flush()
                assert rows_path(path).read_bytes() == b"rows"
                rows_path(path).unlink()


@pytest.mark.parametrize("side", [40, 1100])
def test_bands_say_what_they_hold_and_their_statistics(tmp_path, side):
    """QGIS shows the description, and computes statistics where there are none."""
    p = np.linspace(0, 1, side * 30, dtype=np.float32).reshape(side, 30)
    p[5:9] = np.nan
    path = tmp_path / "p.tif"
    with RasterWriter(
        path, p.shape, "float32", Georeference(), np.nan, {}, description="probability of kelp"
    ) as out:
        out.write(0, p)
    known = p[~np.isnan(p)].astype(np.float64)
    with opened(path) as dataset:
        assert dataset.descriptions == ("probability of kelp",)
        found = {k: float(v) for k, v in dataset.tags(1).items()}
    assert found["STATISTICS_MINIMUM"] == 0
    assert found["STATISTICS_MAXIMUM"] == 1
    assert found["STATISTICS_MEAN"] == pytest.approx(known.mean())
    assert found["STATISTICS_STDDEV"] == pytest.approx(known.std())
    assert found["STATISTICS_VALID_PERCENT"] == pytest.approx(100 * known.size / p.size, abs=1e-3)
    write_mask(tmp_path / "m_kelp.tif", np.zeros((side, 30), np.uint8))
    with opened(tmp_path / "m_kelp.tif") as dataset:
        assert dataset.descriptions == ("kelp",)


def test_a_shape_is_a_plain_tuple_to_the_header_of_a_file(tmp_path):
    path = tmp_path / "rows.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, Shape.of(np.zeros((7, 3, 4))))
    rows.flush()
    assert np.load(path).shape == Shape(3, 4) == (3, 4)
