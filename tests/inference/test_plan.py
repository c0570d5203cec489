"""What a prediction will take: tiles, memory and disk, known before and kept to."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bundles import tiny_bundle, tiny_spec, use_pixel_network
from hypothesis import example, given
from hypothesis import strategies as st
from laws import LAWS, predict, rasters
from world import coast, write_tif

from kelp.config import PredictConfig
from kelp.config.base import parse_bytes
from kelp.errors import ConfigError, InputError
from kelp.inference import memory
from kelp.inference.bundle import Bundle
from kelp.inference.plan import (
    SMALLEST_CACHE,
    NetworkMemory,
    check_disk,
    fit_memory,
    make_plan,
)
from kelp.inference.predictor import fitting_batch
from kelp.io.files import amount
from kelp.raster.scene import SceneSize
from kelp.tiling.strip import Slicing

MB = 10**6

# Sizes of memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("2 GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800M", 800 * MB),
        ("800MiB", 800 * 2**20),
        ("64kB", 64_000),
        ("64KiB", 65_536),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("123", 123),
        ("123B", 123),
        (" 7MB ", 7 * MB),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1,5GB", "2XB", "2GBs", "1e9", "nan", "0x10"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"as in 2GB, 800MB or 1\.5GiB"):
        parse_bytes(text)
    with pytest.raises(ConfigError, match=f"max_memory.*{re.escape(repr(text))}") as error:
        PredictConfig(data_dir="d", run_dir="r", output_dir="o", max_memory=text)
    assert "\n" not in str(error.value)


@given(st.integers(1, 10**13))
@LAWS
@example(731_100_000)
@example(1_100_000)
@example(4_400_000_000)
@example(999_999_999)
def test_an_amount_that_is_named_is_enough(size):
    """Rounded up, read back as what it says, and not far from the truth."""
    assert size <= parse_bytes(amount(size).replace(" ", "")) <= size * 1.1 + 1000


def test_amounts_of_one_decimal_are_read_back_exactly():
    for unit, name in ((10**5, "MB"), (10**8, "GB")):
        for tenths in range(10, 10000):
            assert parse_bytes(f"{tenths / 10:g}{name}") == tenths * unit


# Tiles and disk


def test_a_plan_by_hand():
    scenes = [SceneSize((350, 350), (1, 350), 28), SceneSize((100, 400), (100, 400), 14)]
    slicing = Slicing((128, 128), (64, 64), batch_size=16)
    plan = make_plan(scenes, slicing, network_pixels=2 * 320 * 320, pixel_bytes=5)
    # 350: 0 64 128 192 222; 400: 0 64 … 256 272; 100 is less than a tile.
    assert plan.tiles == 5 * 5 + 1 * 6
    assert (plan.scenes, plan.batch_size, plan.memory) == (2, 16, None)
    area = 350 * 350 + 100 * 400
    assert plan.multiplier == pytest.approx(31 * 2 * 320 * 320 / area)
    # All files, and the plain rows of the one being made, with overviews (a third more).
    assert plan.disk == int((area + 350 * 350) * 4 / 3 * 5)
    # Of single rows none is needed again; of blocks those of two rows and a quarter.
    assert plan.cache == 16 << 20
    large = [SceneSize((9000, 9000), (500, 512), 14)]
    assert make_plan(large, slicing, 1, 1).cache == int(2.25 * 500 * 9216 * 14)
    huge = [SceneSize((90000, 90000), (512, 512), 14)]
    assert make_plan(huge, slicing, 1, 1).cache == 16 << 20  # a part of a row would be no use
    assert str(plan).startswith("plan: 31 tiles of 2 scenes, ")
    assert f"{plan.multiplier:.1f} times the network pixels" in str(plan)
    assert "memory" not in str(plan)


def test_a_plan_for_nothing():
    assert make_plan([], Slicing((16, 16), (8, 8)), 1, 1).tiles == 0


def test_aligned_blocks_are_kept_once():
    """Where tiles end at the edges of blocks, only one row of blocks is in use at a time."""
    scene = [SceneSize((9000, 9000), (128, 512), 14)]
    row = 128 * 9216 * 14
    assert make_plan(scene, Slicing((128, 128), (64, 64)), 1, 1).cache == int(1.25 * row)
    assert make_plan(scene, Slicing((128, 128), (32, 32)), 1, 1).cache == int(2.25 * row)


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    plan = make_plan([SceneSize((1000, 1000), (1, 1000), 14)], Slicing((16, 16), (8, 8)), 1, 5)
    for free, enough in ((plan.disk, True), (plan.disk - 1, False), (0, False)):
        asked = []

        def usage(path, free=free, asked=asked):
            asked.append(path)
            return Usage(1, 1, free)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        if enough:
            check_disk(plan, tmp_path)
        else:
            with pytest.raises(InputError) as error:
                check_disk(plan, tmp_path)
            message = str(error.value)
            assert str(tmp_path) in message
            assert f"up to {amount(plan.disk)} may be needed" in message
            assert "output_dir" in message
            assert "\n" not in message
        assert asked == [tmp_path]


# The budget

networks = st.builds(
    NetworkMemory,
    st.integers(50 * MB, 900 * MB),
    st.integers(0, 300 * MB),
    st.integers(0, 100 * MB),
)
sizes = st.builds(
    SceneSize,
    st.tuples(st.integers(1, 30000), st.integers(1, 30000)),
    st.tuples(st.sampled_from([1, 128, 512]), st.sampled_from([64, 512])),
    st.sampled_from([7, 14, 28]),
)


@st.composite
def cases(draw):
    side = draw(st.integers(8, 300))
    overlap = draw(st.integers(0, side - 1))
    slicing = Slicing(
        (side, side),
        (min(overlap, side * 3 // 4),) * 2,
        batch_size=draw(st.integers(1, 64)),
        skip_land=draw(st.booleans()),
    )
    scenes = draw(st.lists(sizes, min_size=1, max_size=4))
    return make_plan(scenes, slicing, 1, 1), scenes, slicing, draw(networks)


def smallest(plan, scenes, slicing, network):
    with pytest.raises(ConfigError) as error:
        fit_memory(plan, 1, scenes, slicing, network)
    message = str(error.value)
    assert "\n" not in message
    named = re.search(r"the smallest that works here is ([\d.]+ [kMG]?B)", message)
    return parse_bytes(named[1].replace(" ", ""))


@LAWS
@given(cases())
def test_the_smallest_budget_that_is_named_works(case):
    plan, scenes, slicing, network = case
    budget = smallest(*case)
    fitted = fit_memory(plan, budget, scenes, slicing, network)
    assert fitted.memory <= budget
    with pytest.raises(ConfigError, match="max_memory"):
        fit_memory(plan, int(budget * 0.9) - 1000, scenes, slicing, network)


@LAWS
@given(cases(), st.lists(st.floats(1, 20), min_size=2, max_size=6))
def test_more_memory_buys_the_cache_then_larger_batches(case, factors):
    plan, scenes, slicing, network = case
    least = smallest(*case)
    bought = []
    for factor in sorted(factors):
        budget = int(least * factor)
        fitted = fit_memory(plan, budget, scenes, slicing, network)
        assert 1 <= fitted.batch_size <= slicing.batch_size
        assert network.present < fitted.memory <= budget
        bought.append((fitted.cache, fitted.batch_size))
    assert bought == sorted(bought)
    roomy = fit_memory(plan, 10**13, scenes, slicing, network)
    assert roomy.batch_size == slicing.batch_size


def test_without_room_for_a_row_of_blocks_they_are_decoded_again():
    scenes = [SceneSize((4096, 60_000), (512, 512), 14)]
    slicing = Slicing((128, 128), (64, 64))
    plan = make_plan(scenes, slicing, 1, 1)
    network = NetworkMemory(500 * MB, 10 * MB, 10 * MB)
    roomy = fit_memory(plan, 10**13, scenes, slicing, network)
    tight = fit_memory(plan, roomy.memory - 400 * MB, scenes, slicing, network)
    assert roomy.cache > 500 * MB
    assert tight.cache == SMALLEST_CACHE


def test_a_wide_scene_has_a_smaller_cache_and_does_not_take_that_of_others():
    slicing = Slicing((128, 128), (60, 60))  # rows of tiles do not end where blocks do
    need = int(2.25 * 512 * 28) * 16_384
    normal, wide = (SceneSize((4096, w), (512, 512), 28) for w in (16_384, 20_480))
    assert make_plan([normal], slicing, 1, 1).cache == need
    assert make_plan([wide], slicing, 1, 1).cache == SMALLEST_CACHE
    assert make_plan([wide, normal], slicing, 1, 1).cache == need


def test_of_a_wide_scene_the_strip_does_not_grow():
    slicing = Slicing((128, 128), (64, 64))
    nothing = NetworkMemory(0, 0, 0)

    def needs(width):
        scenes = [SceneSize((400, width), (512, 512), 14)]
        plan = make_plan(scenes, slicing, 1, 1)
        return fit_memory(plan, 10**15, scenes, slicing, nothing).memory

    growth = (needs(100_000) - needs(50_000)) / 50_000
    assert growth < 1.1 * 1.25 * 512 * 14 + 4000  # blocks, and sums


@LAWS
@given(cases(), st.integers(2, 10))
def test_memory_grows_with_the_width_not_with_the_height(case, factor):
    plan, scenes, slicing, network = case
    high = 200_000  # more than the rows that can be under way
    scenes = [SceneSize((high, s.shape[1]), s.block, s.stored) for s in scenes]
    tall = [SceneSize((high * factor, s.shape[1]), s.block, s.stored) for s in scenes]
    wide = [SceneSize((high, 30000 * factor), s.block, s.stored) for s in scenes]

    def needs(scenes):
        return fit_memory(plan, 10**15, scenes, slicing, network).memory

    assert needs(tall) == needs(scenes)
    assert needs(wide) > needs(scenes)


def test_growth_sees_an_allocation():
    def work():
        return np.ones(25 * MB).sum()  # 200 MB

    memory.growth(lambda: None)
    assert 190 * MB < memory.growth(work) < 230 * MB
    assert memory.growth(lambda: None) < 10 * MB
    peak = memory.peak()
    assert peak >= memory.resident()
    block = np.ones(25 * MB)
    assert memory.resident() >= block.nbytes
    assert memory.peak() >= memory.resident() - MB  # the system counts in lumps
    del block
    assert memory.growth(work) > 190 * MB
    assert memory.peak() >= peak  # the most ever held is not forgotten


def test_where_there_is_no_proc_the_system_is_asked(monkeypatch, tmp_path):
    """macOS and Windows; Windows alone tells its own peak."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "absent")
    monkeypatch.setattr(memory, "_highest", 0)
    block = np.ones(25 * MB)
    assert memory.resident() > block.nbytes
    assert memory.peak() >= memory.resident() - MB
    told = SimpleNamespace(rss=3, peak_wset=10**15)
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: told))
    assert (memory.resident(), memory.peak()) == (3, 10**15)
    told.peak_wset += 7
    assert memory.growth(lambda: setattr(told, "peak_wset", 2 * 10**15)) == 10**15 - 7


def test_the_peak_is_that_of_this_process_not_of_the_one_that_started_it():
    """Linux hands the highest resident set on through fork and exec: getrusage(2)."""
    block = np.ones(75 * MB)  # 600 MB
    script = "from kelp.inference import memory; print(memory.peak())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < block.nbytes


# In a process of its own: what other tests left free in this one would hide what is taken.
MEASURED = """
import numpy as np
from kelp.inference import memory
from kelp.inference.plan import NetworkMemory
network = lambda batch: np.ones(len(batch) * 5_000_000).sum()  # 40 MB a crop
found = NetworkMemory.measure(network, (16, 24), 10**12)
print(found.first, found.further, found.present - memory.resident())
"""


def test_a_network_is_measured_by_what_a_crop_more_takes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True
    )
    first, further, since = map(int, done.stdout.split())
    assert 35 * MB < first < 60 * MB
    assert 30 * MB < further < 60 * MB
    assert abs(since) < 60 * MB
    seen = []
    tight = NetworkMemory.measure(lambda batch: seen.append(len(batch)), (16, 24), 1)
    assert seen == [1, 1]  # two crops might be too much
    assert tight.further == tight.first


FRAGMENTED = """
import ctypes, numpy as np
from kelp.inference.plan import NetworkMemory
library = ctypes.CDLL(None)
library.mallopt(-3, 32 << 20), library.mallopt(-1, 1 << 30)  # keep what is freed
arrays = [np.ones(3_000_000) for _ in range(4)]
above = [np.ones(12_000) for _ in range(20)]
arrays = None  # 96 MB that the C library holds for the next who asks
measured = NetworkMemory.measure(lambda x: np.ones(len(x) * 5_000_000).sum(), (16, 24), 10**12)
print(measured.first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt(3)")
def test_memory_that_the_c_library_kept_is_not_taken_for_none():
    done = subprocess.run(
        [sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True
    )
    assert 35 * MB < int(done.stdout) < 60 * MB  # 0 before freed memory was given back


# The command


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A scene of 40 x 600 pixels, a bundle and the folder of the masks."""
    use_pixel_network(monkeypatch)
    image, _ = coast((40, 600), np.random.default_rng(1))
    return (
        write_tif(tmp_path / "X_satellite.tif", image),
        [tiny_bundle(tmp_path / "bundle")],
        tmp_path / "out",
    )


def _plans(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("plan:")]


def test_the_network_is_measured_once(scene, monkeypatch, caplog):
    """Measured again, a killed run might go on with another batch size."""
    caplog.set_level(logging.INFO, "kelp")
    measured = [NetworkMemory(300 * MB, n * MB, n * MB) for n in (60, 1, 1)]
    asked = []
    monkeypatch.setattr(
        NetworkMemory,
        "measure",
        classmethod(lambda *a: asked.append(1) or measured[len(asked) - 1]),
    )
    options = {"max_memory": "600MB", "batch_size": 32}
    predict(*scene, **options)
    first = rasters(scene[2])
    remembered = json.loads((scene[2] / "kelp-memory.json").read_text())
    assert remembered.pop("settings")
    assert NetworkMemory(**remembered) == measured[0]
    predict(*scene, **options, overwrite=True)
    assert len(asked) == 1
    assert rasters(scene[2]) == first
    one, two = _plans(caplog)
    assert one == two
    assert re.search(r"batches of (1|2|4), at most", one)
    predict(*scene, **options, tta=True)  # that is another need
    assert len(asked) == 2
    assert "batches of 32" in _plans(caplog)[2]


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"{}", b"[]", b"3", b"null", b'"settings"', b'{"settings": "x"}', b"\xff\xfe"],
)
def test_what_is_remembered_of_the_memory_may_be_damaged(scene, text):
    scene[2].mkdir()
    (scene[2] / "kelp-memory.json").write_bytes(text)
    predict(*scene, max_memory="4GB")
    assert json.loads((scene[2] / "kelp-memory.json").read_text())["present"] > MB


def test_a_full_disk_is_told_before_the_first_tile(scene, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 10))
    with pytest.raises(InputError, match=r"out: 1 kB are free, up to \d+ kB may be needed"):
        predict(*scene)
    assert rasters(scene[2]) == {}


PROGRAM = """
import pathlib, sys, threading, time
sys.path.insert(0, sys.argv.pop(1))
from bundles import PixelBody
from kelp.nn.model import ARCHITECTURES
ARCHITECTURES["unet"] = lambda spec: PixelBody(spec.channels)
from kelp.cli import main

highest = 0

def watch():  # what the process fills, as the budget counts it: not the mapped code
    global highest
    while True:
        lines = map(str.split, pathlib.Path("/proc/self/status").read_text().splitlines())
        filled = [int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")]
        highest = max(highest, 1024 * sum(filled))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
print("highest", highest)
sys.exit(status)
"""


def kelp(scene, *more):
    """`kelp predict` in a process of its own, with a network of one pixel."""
    here = str(Path(__file__).parents[1])
    path, (bundle,), out = scene
    return subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            here,
            "predict",
            f"--data_dir={path}",
            f"--run_dir={bundle}",
            f"--output_dir={out}",
            "--device=cpu",
            "--precision=32-true",
            *more,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_wide_scene_stays_within_its_memory(scene, tmp_path):
    """The whole of it would take 168 MB more than the program, at 28 bytes a pixel."""
    image, _ = coast((100, 12000), np.random.default_rng(0))
    brightest = 30_000 + np.arange(7)[:, None, None]  # alike in all bands it would be no value
    image = np.minimum(np.tile(image, (1, 5, 1)), brightest).astype("int16")
    wide = write_tif(tmp_path / "wide.tif", image, tiled=True, blockxsize=512, blockysize=128)
    scene = (wide, *scene[1:])
    options = ("--batch_size=64", "--sahi_tile_size=128", "--sahi_overlap=64", "--overwrite")
    refused = kelp(scene, "--max_memory=1MB", *options)
    (line,) = refused.stderr.strip().splitlines()
    assert refused.returncode == 2
    assert line.startswith("kelp: error: --max_memory 1 MB: the smallest that works here is")
    least = parse_bytes(re.search(r"here is ([\d.]+ [MG]B)", line)[1].replace(" ", ""))
    batches = {}
    for budget in (least, least + 150 * MB):
        done = kelp(scene, f"--max_memory={budget}", *options)
        assert done.returncode == 0, done.stderr
        highest = int(re.search(r"highest (\d+)", done.stdout)[1])
        said = re.search(r"peak memory ([\d.]+ [MG]B)", done.stdout)[1]
        batches[budget] = int(re.search(r"batches of (\d+)", done.stderr)[1])
        assert highest <= budget
        assert parse_bytes(said.replace(" ", "")) <= budget * 1.1  # rounded up to read
    small, large = batches.values()
    assert small < large <= 64


@pytest.mark.parametrize(
    ("sides", "device", "batch"),
    [
        ((64,), "cpu", 8),
        ((224,), "cpu", 8),
        ((320,), "cpu", 3),
        ((640,), "cpu", 1),
        ((2048,), "cpu", 1),
        ((64, 640), "cpu", 1),
        ((640,), "cuda", 8),
    ],
)
def test_a_batch_suits_its_processor(sides, device, batch):
    bundles = [Bundle(Path(), tiny_spec(image_size=side), None) for side in sides]
    assert fitting_batch(bundles, (32, 32), device) == batch
