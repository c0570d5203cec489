"""The store of packed numbers gives the bits of the files, whatever happens to it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rasterio.crs import CRS
from world import coast, opened, write_tif

from kelp.config import TrainConfig
from kelp.errors import InputError, KelpError
from kelp.nn.data import packing
from kelp.nn.data.dataset import Draw, Source, TileDataset
from kelp.nn.data.packing import FOLDER, pack
from kelp.nn.data.reading import Files, decode, encode
from kelp.progress import silent
from kelp.raster.bands import BANDS
from kelp.raster.scene import read_scene
from kelp.raster.window import Tile

HEIGHT, WIDTH = 41, 53
HERE = socket.gethostname()


def configure(folder, **options):
    values = {"data_dir": folder, "metadata_fp": folder / "x", "output_dir": folder / "out"}
    return TrainConfig(**values | {"num_workers": 0} | options)


def bits(sample):
    return [(t.dtype, tuple(t.shape), t.numpy().tobytes()) for t in sample]


def same_files(source, config, reader):
    a, b = (TileDataset([source], config.band_order, reader=r)[0] for r in (None, reader))
    return bits(a) == bits(b)


def store_of(config):
    return sorted((config.output_dir / FOLDER).glob("[!.]*.safetensors"))


# --- the bits


def odd_images():
    """Arrays as files may hold them, and how they are written."""
    rng = np.random.default_rng(0)
    plain, _ = coast((HEIGHT, WIDTH), rng)
    full = plain.copy()
    full[:2] = rng.integers(1, 65536, full[:2].shape)
    full[1, :3, :3] = [[1, 65535, -32768]] * 3
    fuller = full.copy()
    fuller[1, 5, :5] = [0, 1, 2, 3, 65535]
    qa_pixel = np.clip(plain, 0, 65535).astype(np.uint16)
    qa_pixel[5] = rng.choice([1, 21824, 22280], (HEIGHT, WIDTH), p=[0.6, 0.2, 0.2])
    qa_pixel[5, :20] = 1
    odd_qa = plain.astype(np.float32)
    odd_qa[5] = rng.choice([0, 0.5, 21824], (HEIGHT, WIDTH))
    odd_qa[5, :, 20:] = 0.5
    signs = np.clip(plain, -9, 20000).astype(np.float32)
    signs[0, :5] = -0.0
    signs[1, :5] = np.copysign(np.nan, -1)
    wide = plain.astype(np.float64)
    wide[2, 0, :3] = [1e-3, np.inf, 1e30]
    small = np.clip(plain, 0, 200).astype(np.uint8)
    return {
        "competition": (plain, {}),
        "all of 16 bits": (full, {}),
        "more than 16 bits": (fuller, {}),
        "zero is missing": (np.clip(plain, 0, 65535).astype(np.uint16), {}),
        "tagged": (np.clip(plain, -5, 32767).astype(np.int16), {"nodata": 0}),
        "bytes": (small, {}),
        "fractions": ((plain / 7).astype(np.float32), {"nodata": -9999}),
        "signs": (signs, {}),
        "wide": (wide, {}),
        "large": (plain + np.int32(1 << 25), {}),
        "QA_PIXEL": (qa_pixel, {}),
        "QA that depends on the window": (odd_qa, {}),
        "blocks": (plain, {"tiled": True, "blockxsize": 16, "blockysize": 16}),
    }


UNPACKED = {"QA that depends on the window", "unknown bands"}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Sources with all that is odd in images and masks, by name, and a reader of their store."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2, (1, HEIGHT, WIDTH)).astype(np.uint8)
    holes = mask.copy()
    holes[0, :9, ::3] = 255
    tagged = np.where(holes == 255, 7, holes).astype(np.uint8)
    masks = {
        "plain": (mask.astype(np.int8), {}),
        "holes": (holes, {}),
        "tagged": (tagged, {"nodata": 7}),
    }
    for name, (pixels, profile) in masks.items():
        write_tif(folder / "masks" / f"{name}.tif", pixels, **profile)
    sources = {}
    for number, (name, (pixels, profile)) in enumerate(odd_images().items()):
        path = write_tif(folder / "images" / f"{name}.tif", pixels, **profile)
        sources[name] = Source(path, folder / "masks" / f"{list(masks)[number % 3]}.tif")
    pixels = odd_images()["competition"][0]
    path = write_tif(folder / "images" / "no DEM.tif", pixels[:6])
    with opened(path, "r+") as dataset:
        dataset.descriptions = BANDS[:6]
    sources["no DEM"] = Source(path, folder / "masks" / "holes.tif")
    path = write_tif(folder / "images" / "unknown.tif", pixels[:3])
    sources["unknown bands"] = Source(path, folder / "masks" / "plain.tif")
    image = sources["competition"].image
    for name, wrong in {
        "large": np.pad(mask, ((0, 0), (2, 0), (2, 0))),
        "small": mask[:, 3:, 3:],
    }.items():
        path = write_tif(folder / "masks" / f"{name}.tif", wrong)
        sources[f"mask too {name}"] = Source(image, path)
    config = configure(folder)
    return sources, pack(list(sources.values()), config, silent), config


moves = st.sampled_from([0.0, 0.0, -1.0, 0.3, 0.77, 1.0])


@settings(max_examples=250)
@given(data=st.data())
def test_every_sample_has_the_bits_of_the_files(odd, data):
    sources, reader, config = odd
    source = sources[data.draw(st.sampled_from(sorted(sources)))]
    tile, shape = None, None
    if data.draw(st.booleans()):
        y, x = data.draw(st.integers(0, HEIGHT + 1)), data.draw(st.integers(0, WIDTH + 1))
        tile = Tile(y, x, data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60)))
    elif data.draw(st.booleans()):
        shape = (data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80)))
    draw = Draw(0, data.draw(moves), data.draw(moves)) if tile else 0

    def got(how):
        place = Source(source.image, source.mask, tile)
        try:
            return bits(TileDataset([place], config.band_order, shape, how)[draw])
        except KelpError as error:
            return str(error)

    assert got(reader) == got(Files(config.band_order))


def test_what_is_packed_is_packed_small(odd):
    sources, reader, _ = odd
    kinds = {
        name: np.dtype(reader.images[s.image]._stored()[:1].dtype).name
        for name, s in sources.items()
        if s.image in reader.images
    }
    assert set(sources) - set(kinds) == UNPACKED
    wide = {"more than 16 bits", "fractions", "signs", "wide", "large"}
    assert {name for name, kind in kinds.items() if kind == "float32"} == wide
    assert {name for name, kind in kinds.items() if kind == "uint8"} == {"bytes"}
    assert all(source.mask in reader.masks for source in sources.values())


def test_the_order_of_bands_is_part_of_the_key(tmp_path):
    order = ("DEM", "QA", "B", "G", "R", "NIR", "SWIR")
    image, mask = coast((20, 30), np.random.default_rng(0))
    place = {"crs": CRS.from_epsg(32719)}
    source = Source(
        write_tif(tmp_path / "a.tif", image[::-1], **place),
        write_tif(tmp_path / "a_kelp.tif", mask[np.newaxis]),
    )
    readers = {o: pack([source], configure(tmp_path, band_order=o), silent) for o in (BANDS, order)}
    for o, reader in readers.items():
        with reader.image(source.image) as packed:
            np.testing.assert_array_equal(packed.read(), read_scene(source.image, o))
        assert source.image in reader.images
    assert len(store_of(configure(tmp_path))) == 2


counts = st.integers(-30000, 30000).map(float)
zeros = st.sampled_from([0.0, -0.0, np.nan])
odd_floats = st.sampled_from([np.inf, -np.inf, 2.0**24, 2.0**24 + 2]) | st.floats(width=32)


def floats(elements):
    return arrays.arrays(np.float32, (7, 3, 2), elements=elements)


@given(floats(counts) | floats(counts | zeros) | floats(zeros) | floats(counts | odd_floats))
def test_packing_loses_no_bit(raw):
    with np.errstate(all="raise", under="ignore", over="ignore"):
        codes, low = encode(raw)
    again = codes if low is None else decode(codes, low)
    assert again.tobytes() == raw.tobytes()


@given(st.integers(-(1 << 23), 1 << 23), st.sampled_from([0, 254, 255, 65534, 65535]))
def test_the_smallest_integers_that_hold_a_range(start, span):
    raw = np.full((7, 2, 2), np.nan, np.float32)
    raw[3] = [[start, start + span], [start, np.nan]]
    kind = np.uint8 if span <= 254 else np.uint16 if span <= 65534 else np.float32
    assert encode(raw)[0].dtype == kind


# --- the store


@pytest.fixture
def images(tmp_path):
    """Twelve images and their masks."""
    rng = np.random.default_rng(2)
    sources = []
    for k in range(12):
        image, mask = coast((200, 210), rng)
        sources.append(
            Source(
                write_tif(tmp_path / f"images/{k:02d}.tif", image),
                write_tif(tmp_path / f"masks/{k:02d}.tif", mask[np.newaxis]),
            )
        )
    return sources


def test_what_is_packed_is_not_packed_again(images, tmp_path, caplog):
    config, told = configure(tmp_path), []
    caplog.set_level("INFO", "kelp")
    reader = pack(images, config, lambda *call: told.append(call))
    assert len(caplog.messages) == 1
    assert "packing 24 images and masks, about 7.6 MB" in caplog.text
    size = sum(path.stat().st_size for path in store_of(config))
    assert size == pytest.approx(12 * 200 * 210 * 15, rel=0.01)  # about what was told
    assert told[-1] == ("packing", 24, 24)
    made = {path: path.stat().st_mtime_ns for path in store_of(config)}
    assert len(made) > 1
    again = pack(images[::-1], config, silent)
    assert len(caplog.messages) == 1
    assert {path: path.stat().st_mtime_ns for path in store_of(config)} == made
    assert again == reader
    assert all(same_files(source, config, again) for source in images)


def test_workers_pack_the_same(images, tmp_path):
    contents = []
    for workers in (0, 1, 2):
        config = configure(tmp_path, num_workers=workers, output_dir=tmp_path / f"{workers}")
        pack(images, config, silent)
        places = packing._places(config.output_dir / FOLDER)
        contents.append({key: place.read().tobytes() for key, place in places.items()})
    assert contents[0] == contents[1] == contents[2]


def test_a_changed_file_is_packed_anew(images, tmp_path, caplog):
    config, source = configure(tmp_path), images[3]
    pack(images, config, silent)
    caplog.set_level("INFO", "kelp")
    facts = source.image.stat()
    content = bytearray(source.image.read_bytes())
    image, _ = coast((200, 210), np.random.default_rng(77))
    write_tif(source.image, image)
    reader = pack(images, config, silent)
    assert "packing 1 images and masks" in caplog.text
    assert same_files(source, config, reader)
    # Of the same size, only younger by a nanosecond.
    source.image.write_bytes(content)
    os.utime(source.image, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    caplog.clear()
    reader = pack(images, config, silent)
    assert "packing 1 images and masks" in caplog.text
    assert same_files(source, config, reader)


def test_so_it_is_when_only_its_tags_have_changed(images, tmp_path):
    """GDAL keeps tags beside a file that it cannot write into, and the nodata tag counts."""
    config, image = configure(tmp_path), images[0].image
    pack(images, config, silent)
    with opened(image) as dataset:
        value = dataset.read(2)[100, 100]
    image.with_name(image.name + ".aux.xml").write_text(
        f'<PAMDataset><PAMRasterBand band="2"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
        "</PAMDataset>"
    )
    reader = pack(images, config, silent)
    assert np.isnan(read_scene(image)[1, 100, 100])
    assert same_files(images[0], config, reader)
    assert image in reader.images


def test_a_file_that_changes_while_it_is_packed_is_left_out(images, tmp_path, monkeypatch):
    config, read = configure(tmp_path), packing.read_mask

    def read_and_touch(path, **options):
        mask = read(path, **options)
        if path == images[4].mask:
            os.utime(path, ns=(0, 0))
        return mask

    monkeypatch.setattr(packing, "read_mask", read_and_touch)
    reader = pack(images, config, silent)
    assert {source.mask for source in images} - reader.masks.keys() == {images[4].mask}
    assert len(reader.images) == 12


def test_files_whose_pixels_lie_elsewhere_are_not_packed(images, tmp_path):
    path = tmp_path / "images" / "all.vrt"
    with opened(images[0].image) as dataset:
        from rasterio.shutil import copy

        copy(dataset, path, driver="VRT")
    config = configure(tmp_path)
    reader = pack([Source(path, images[0].mask)], config, silent)
    assert not reader.images
    assert len(reader.masks) == 1
    assert same_files(Source(path, images[0].mask), config, reader)


def test_large_images_and_bad_masks_stay_with_their_files(images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(packing, "_LARGEST", 200 * 210)
    big, mask = coast((200, 211), np.random.default_rng(0))
    images[0] = Source(
        write_tif(tmp_path / "big.tif", big), write_tif(tmp_path / "big_kelp.tif", mask[None] + 3)
    )
    caplog.set_level("INFO", "kelp")
    config = configure(tmp_path)
    reader = pack(images, config, silent)
    assert "2 files cannot be packed" in caplog.text
    assert (len(reader.images), len(reader.masks)) == (11, 11)
    with pytest.raises(InputError, match=r"big_kelp\.tif: a mask holds 0, 1 and 255"):
        TileDataset(images, reader=reader)[0]


def test_a_damaged_file_of_the_store_is_made_anew(images, tmp_path):
    config = configure(tmp_path)
    pack(images, config, silent)
    for path, content in zip(store_of(config), [b"", b"x" * 5000], strict=False):
        path.write_bytes(content)
    path = store_of(config)[2]
    path.write_bytes(path.read_bytes()[:-1])
    reader = pack(images, config, silent)
    assert len(reader.images) == len(reader.masks) == 12
    assert all(same_files(source, config, reader) for source in images)


def test_a_store_that_is_removed_during_training_is_one_line(images, tmp_path):
    config = configure(tmp_path)
    reader = pack(images, config, silent)
    for path in store_of(config):
        path.unlink()
    with pytest.raises(InputError, match="removed or damaged during the training") as caught:
        TileDataset(images, reader=reader)[0]
    assert "\n" not in str(caught.value)


def test_no_file_stays_open_and_workers_can_be_sent_the_reader(images, tmp_path):
    config = configure(tmp_path)
    reader = pack(images, config, silent)
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.is_dir() else 0
    data = TileDataset(images, reader=reader)
    samples = [data[k] for k in range(len(data))]
    content = pickle.dumps(data)
    assert len(content) < 20_000
    sent = pickle.loads(content)  # noqa: S301
    assert bits(sent[5]) == bits(samples[5])
    if handles.is_dir():
        assert len(list(handles.iterdir())) == before


# --- bad luck


Disk = namedtuple("Disk", "total used free")


def test_a_disk_without_room_is_one_line(images, tmp_path, monkeypatch, caplog):
    config = configure(tmp_path)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: Disk(10**9, 0, 9 * 10**6))
    reader = pack(images, config, silent)
    assert len(caplog.messages) == 1
    assert "9 MB are free, about 9.5 MB are needed to pack 24 images and masks" in caplog.text
    assert not store_of(config)
    assert same_files(images[0], config, reader)


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_is_done(
    images, tmp_path, monkeypatch, caplog
):
    config, written = configure(tmp_path), []
    write = Path.write_bytes

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            write(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    reader = pack(images, config, silent)
    assert len(caplog.messages) == 1
    assert "packing stopped (" in caplog.text
    assert "No space left" in caplog.text
    assert len(store_of(config)) == 2
    assert 0 < len(reader.images) < 12
    assert not list((config.output_dir / FOLDER).glob(".*partial*"))
    assert all(same_files(source, config, reader) for source in images)


def test_a_folder_that_cannot_be_made_is_one_line(images, tmp_path, caplog):
    config = configure(tmp_path)
    config.output_dir.mkdir()
    (config.output_dir / FOLDER).write_text("a file")
    reader = pack(images, config, silent)
    assert len(caplog.messages) == 1
    assert "cannot be created" in caplog.text
    assert same_files(images[0], config, reader)


@pytest.mark.parametrize("options", [{"pack": False}, {"fast_dev_run": True}])
def test_nothing_is_written_where_it_is_not_wanted(images, tmp_path, options):
    config = configure(tmp_path, **options)
    assert isinstance(pack(images, config, silent), Files)
    assert not config.output_dir.exists()


PROGRAM = """
import logging, socket, sys
from pathlib import Path
from types import SimpleNamespace
from kelp.config import TrainConfig
from kelp.nn.data import packing

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
socket.gethostname = lambda: sys.argv[3]
images = sorted((folder / "images").iterdir())
sources = [SimpleNamespace(image=path, mask=folder / "masks" / path.name) for path in images]
write, calls = packing.atomic, []


class stopping:
    def __init__(self, path):
        self.inner = write(path)

    def __enter__(self):
        partial = self.inner.__enter__()
        calls.append(partial)
        if len(calls) == stop:
            partial.write_bytes(b"half")
            print("in the middle", flush=True)
            sys.stdin.readline()
        return partial

    def __exit__(self, *error):
        return self.inner.__exit__(*error)


packing.atomic = stopping
config = TrainConfig(
    data_dir=folder, metadata_fp=folder, output_dir=folder / "out", num_workers=0
)
reader = packing.pack(sources, config, lambda *_: None)
print(len(reader.images), len(reader.masks), "read packed", flush=True)
assert "torch" not in sys.modules  # it takes seconds to import
"""


def started(folder, stop=0, host=HERE):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, str(stop), host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def test_a_kill_in_the_middle_loses_one_file_of_the_store(images, tmp_path, caplog):
    config = configure(tmp_path)
    process = started(tmp_path, stop=3)
    until(process, "in the middle")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = config.output_dir / FOLDER
    assert len(list(folder.glob(".*partial*"))) == 1
    kept = {path: path.stat().st_mtime_ns for path in store_of(config)}
    assert len(kept) == 2
    done = len(packing._places(folder))
    caplog.set_level("INFO", "kelp")
    reader = pack(images, config, silent)
    assert f"packing {24 - done} images and masks" in caplog.text
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(folder.glob(".*partial*"))
    assert all(same_files(source, config, reader) for source in images)


def test_a_kill_when_all_is_packed_leaves_nothing_hidden(images, tmp_path):
    config = configure(tmp_path)
    pack(images, config, silent)
    (config.output_dir / FOLDER / ".lock").touch()  # the last thing that would have gone
    pack(images, config, silent)
    assert not list((config.output_dir / FOLDER).glob(".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
@pytest.mark.parametrize("host", [HERE, "b.cluster"], ids=["here", "there"])
def test_a_second_process_waits_and_finds_all_packed(images, tmp_path, host):
    """On the same host or on another one."""
    first = started(tmp_path, stop=2)
    until(first, "in the middle")
    second = started(tmp_path, host=host)
    until(second, "another process packs the images")
    first.stdin.write("\n")
    first.stdin.flush()
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert said == ["12 12 read packed\n"] * 2  # nothing more: the second packed none
    assert [process.returncode for process in (first, second)] == [0, 0]
    config = configure(tmp_path)
    assert sum(path.stat().st_size for path in store_of(config)) < 1.01 * 12 * 200 * 210 * 15
    reader = pack(images, config, silent)
    assert all(same_files(source, config, reader) for source in images)
