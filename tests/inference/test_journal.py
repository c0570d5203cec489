"""A scene whose process was killed, at any point, ends with the bytes of an undisturbed run."""

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import LAWS
from sliced import ArrayScene, ramp, random_scene

from kelp.errors import InputError
from kelp.inference.outputs import JournalFile, Outputs, clean_up, journal_path
from kelp.io.files import discard_partials
from kelp.raster.bands import DEM
from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter, rows_path
from kelp.tiling.engine import AHEAD, Engine, Job
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import MergerState
from kelp.tiling.strip import Slicing

SHAPE = (70, 1040)
SLICING = Slicing((16, 16), (8, 8), "hann", batch_size=48, skip_land=True)
COLUMNS = len(TileGrid(SHAPE, 16, 8).columns)
KINDS = (None, "float32", "uint8", "spread")
"""Type of the probabilities beside the mask; "spread" is both float32 files."""


def _wide_scene():
    pixels = random_scene(SHAPE, islands=0.1)
    pixels[:5, 20:50, 300:500] = np.nan  # tiles that are not observed
    pixels[DEM, 10:60, 700:900] = 3  # tiles that are all land
    return pixels


PIXELS = _wide_scene()


class Killed(BaseException):
    """As sudden as Ctrl-C."""


def predict(folder, kind=None, fingerprint="f", network=ramp, pixels=PIXELS, slicing=SLICING):
    """What `kelp predict` does with one scene; None if it is finished, else the tiles run."""
    mask = folder / "X_kelp.tif"
    discard_partials(folder)
    if mask.is_file():
        clean_up(mask)
        return None
    tags = {"KELP_FINGERPRINT": fingerprint}
    spread = kind == "spread"
    soft = "float32" if spread else kind
    shape = pixels.shape[1:]
    sink = Outputs(shape, Georeference(), mask, 0.5, tags, soft, fingerprint, spread=spread).open()
    engine = Engine(network, slicing)
    try:
        engine.run([Job(ArrayScene(pixels), sink, sink, sink.write_spread)])
        for _, error in engine.failures:
            raise error
    finally:
        sink.abandon()
    return engine.counts


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For each kind: the files of an undisturbed run, and how many tiles its network saw."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("undisturbed")
        counts = predict(folder, kind)
        assert counts.land > 0
        assert counts.unobserved > 0
        made[kind] = contents(folder), counts.predicted
        names = ["X_kelp.tif", "X_kelp_prob.tif", "X_kelp_spread.tif"]
        number = {None: 1, "spread": 3}.get(kind, 2)
        assert set(made[kind][0]) == set(names[:number])
    return made


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(JournalFile, "is_due", True)


def fail_at(monkeypatch, owner, name, call, error):
    """Let the `call`-th call of a method raise; returns the list of calls."""
    calls = []
    real = getattr(owner, name)

    def method(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, method)
    return calls


# Killed by the system


def _snapshots(folder, kind, store, monkeypatch):
    """Every state of the disk during a run, each with the number of tiles run until then.

    A killed process leaves what lies on the disk; what it had in its buffers is lost.
    """
    taken, known, seen = [], set(), [0]

    def network(batch):
        seen[0] += len(batch)
        return ramp(batch)

    def snapshot():
        files = contents(folder)
        state = hashlib.sha256(repr(sorted(files.items())).encode()).digest()
        if state not in known:
            known.add(state)
            target = store / str(len(taken))
            shutil.copytree(folder, target)
            taken.append((target, seen[0]))

    def watch(owner, name):
        real = getattr(owner, name)

        def method(*arguments, **options):
            snapshot()
            result = real(*arguments, **options)
            snapshot()
            return result

        monkeypatch.setattr(owner, name, method)

    for name in ("begin", "write", "sync", "finish", "discard"):
        watch(RasterWriter, name)
    for owner, name in ((JournalFile, "save"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
        watch(owner, name)
    predict(folder, kind, network=network)
    monkeypatch.undo()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_state_of_the_disk(kind, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(JournalFile, "is_due", True)
    out = tmp_path / "out"
    out.mkdir()
    taken = _snapshots(out, kind, tmp_path, monkeypatch)
    monkeypatch.setattr(JournalFile, "is_due", True)
    files, total = undisturbed[kind]
    assert contents(out) == files
    assert len(taken) > 25
    resumed = set()
    for folder, seen in taken:
        counts = predict(folder, kind)
        assert contents(folder) == files, folder.name  # the right bytes, and nothing else
        if counts:
            resumed.add(counts.resumed)
            again = seen + counts.predicted - total
            # The row that was not yet saved, and what had been run but not merged.
            assert again <= COLUMNS + (AHEAD + 1) * SLICING.batch_size
    # One start at each row of tiles.
    assert resumed == {row * COLUMNS for row in range(len(TileGrid(SHAPE, 16, 8).rows))}


def test_what_a_journal_speaks_of_is_on_the_disk(tmp_path, always_due, monkeypatch):
    """Rows so short that many of them wait in a buffer: they are flushed, then synced, first."""
    pixels = random_scene((1030, 9), missing=0.0)
    synced, saved = [], []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().stat().st_size)
        fsync(descriptor)

    def check(partial, target):
        if target == journal_path(tmp_path / "X_kelp.tif"):
            with np.load(partial) as file:
                header = json.loads(file["header"].tobytes())
            for name, size, checksum in zip(
                ("X_kelp.tif", "X_kelp_prob.tif"), (9, 36), header["checksums"], strict=True
            ):
                held = rows_path(tmp_path / name).read_bytes()[: header["top"] * size]
                assert len(held) == header["top"] * size
                assert zlib.crc32(held) == checksum
                assert len(held) in synced
            synced.clear()
            saved.append(header["top"])
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", check)
    predict(tmp_path, "float32", pixels=pixels, slicing=Slicing((16, 16), (8, 8)))
    assert saved == list(TileGrid((1030, 9), 16, 8).rows[1:])


# Stopped by an error


FAULTS = {
    "write": (RasterWriter, "write"),
    "sync": (RasterWriter, "sync"),
    "save": (JournalFile, "save"),
    "finish": (RasterWriter, "finish"),
    "verify": (RasterWriter, "_verify"),
    "discard": (JournalFile, "discard"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_at_any_call(fault, undisturbed, always_due, tmp_path):
    files, _ = undisturbed["float32"]
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, *FAULTS[fault], call, Killed())
            if call > 1 and not (folder.parent / str(call - 1)).is_dir():
                break
            try:
                predict(folder, "float32")
            except Killed:
                pass
            else:
                assert len(calls) < call
                break
        predict(folder, "float32")
        assert contents(folder) == files
    assert call > 1


def test_a_network_that_fails_at_any_batch(undisturbed, always_due, tmp_path):
    files, total = undisturbed[None]
    batches = -(-total // SLICING.batch_size)
    for call in range(1, batches + 1):
        calls = []

        def network(batch, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return ramp(batch)

        with pytest.raises(Killed):
            predict(tmp_path, network=network)
        assert not list(tmp_path.glob("[!.]*"))
        # What an exception left merged is saved: no batch before the last ones is lost.
        counts = predict(tmp_path)
        ran = (call - 1) * SLICING.batch_size
        assert ran + counts.predicted - total <= COLUMNS + SLICING.batch_size
        assert contents(tmp_path) == files
        (tmp_path / "X_kelp.tif").unlink()


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_full_disk_is_one_line_and_then_gone_on_from(
    call, undisturbed, always_due, tmp_path, monkeypatch
):
    fail_at(monkeypatch, os, "fsync", call, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match=r"X_kelp.*cannot be written \(No space left on device\)"):
        predict(tmp_path, "uint8")
    assert not list(tmp_path.glob("[!.]*"))
    counts = predict(tmp_path, "uint8")
    assert bool(counts.resumed) == (call > 3)  # mask, probabilities, journal: a save is 3 syncs
    assert contents(tmp_path) == undisturbed["uint8"][0]


@settings(LAWS, max_examples=12)
@given(
    width=st.integers(1, 40),
    options=st.fixed_dictionaries(
        {
            "tile": st.tuples(st.integers(20, 90), st.integers(5, 30)),
            "overlap": st.tuples(st.integers(0, 19), st.integers(0, 4)),
            "blend": st.sampled_from(["mean", "hann"]),
            "batch_size": st.integers(1, 12),
            "skip_land": st.booleans(),
        }
    ),
    kind=st.sampled_from(KINDS),
    stops=st.lists(st.integers(1, 40), max_size=4),
    saving=st.integers(0, 2**32 - 1),
)
@example(1, {"tile": (90, 5), "overlap": (0, 0), "batch_size": 3}, None, [1, 2, 3], 1)
def test_stopped_again_and_again(tmp_path_factory, width, options, kind, stops, saving):
    """Tall scenes of any width, cut in any way, saved every now and then."""
    pixels = random_scene((1030, width), seed=width, islands=0.2)
    slicing = Slicing(**options)
    rng = np.random.default_rng(saving)
    folder = tmp_path_factory.mktemp("stopped")
    expected = tmp_path_factory.mktemp("expected")
    predict(expected, kind, pixels=pixels, slicing=slicing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JournalFile, "is_due", property(lambda self: rng.random() < 0.5))
        for stop in [*stops, 10**6]:
            left = itertools.count(stop, -1)

            def network(batch, left=left):
                if next(left) == 0:
                    raise Killed
                return ramp(batch)

            try:
                predict(folder, kind, network=network, pixels=pixels, slicing=slicing)
            except Killed:
                continue
            break
    assert contents(folder) == contents(expected)


# What another process left does not fit


@pytest.fixture
def half_done(tmp_path, always_due):
    """A folder with a scene that was stopped in the middle; both of its files are wanted."""
    _stop_half_way(tmp_path)
    assert rows_path(tmp_path / "X_kelp.tif").stat().st_size >= 16 * SHAPE[1]
    assert journal_path(tmp_path / "X_kelp.tif").is_file()
    return tmp_path


def _stop_half_way(folder, kind="float32"):
    batches = itertools.count(1)

    def network(batch):
        if next(batches) == 10:
            raise Killed
        return ramp(batch)

    with pytest.raises(Killed):
        predict(folder, kind, network=network)


def _notices(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kelp"]


def test_going_on_is_said_in_one_line(half_done, undisturbed, caplog):
    caplog.set_level(logging.INFO, "kelp")
    counts = predict(half_done, "float32")
    row = TileGrid(SHAPE, 16, 8).rows[counts.resumed // COLUMNS]
    assert row > 0
    assert _notices(caplog) == [f"{half_done / 'X_kelp.tif'}: resumed at row {row} of 70"]
    assert counts.tiles == len(TileGrid(SHAPE, 16, 8))
    assert contents(half_done) == undisturbed["float32"][0]


def test_other_inputs_or_settings_start_over_and_say_so(half_done, tmp_path_factory, caplog):
    caplog.set_level(logging.INFO, "kelp")
    other = PIXELS.copy()
    other[1] = other[1][::-1]
    counts = predict(half_done, "float32", "other", pixels=other)
    assert counts.resumed == 0
    (line,) = _notices(caplog)
    assert "X_kelp.tif" in line
    assert "other inputs or settings; starting over" in line
    expected = tmp_path_factory.mktemp("expected")
    predict(expected, "float32", "other", pixels=other)
    assert contents(half_done) == contents(expected)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", [None, "uint8", "float32"])
def test_nothing_is_left_where_fewer_files_are_wanted(
    kind, finished, always_due, tmp_path, tmp_path_factory
):
    """Other files are another setting, and so another fingerprint."""
    if finished:
        predict(tmp_path, "spread")
        (tmp_path / "X_kelp.tif").unlink()  # as `kelp predict` finds it made with other settings
    else:
        _stop_half_way(tmp_path, "spread")
    assert (len(contents(tmp_path)) > 1) or not finished
    predict(tmp_path, kind, "other")
    expected = tmp_path_factory.mktemp("expected")
    predict(expected, kind, "other")
    assert contents(tmp_path) == contents(expected)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


ROWS_DAMAGE = {
    "a flipped bit": _flip,
    "truncated": lambda path: os.truncate(path, 3 * SHAPE[1] + 5),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", ["X_kelp.tif", "X_kelp_prob.tif"])
@pytest.mark.parametrize("damage", ROWS_DAMAGE)
def test_damaged_rows_start_over(half_done, undisturbed, file, damage, caplog):
    caplog.set_level(logging.INFO, "kelp")
    ROWS_DAMAGE[damage](rows_path(half_done / file))
    counts = predict(half_done, "float32")
    assert counts.resumed == 0
    (line,) = _notices(caplog)
    assert "damaged; starting over" in line
    assert contents(half_done) == undisturbed["float32"][0]


def test_rows_longer_than_the_journal_knows_are_cut(half_done, undisturbed):
    with rows_path(half_done / "X_kelp.tif").open("ab") as file:
        file.write(b"\x07" * 5000)
    assert predict(half_done, "float32").resumed > 0
    assert contents(half_done) == undisturbed["float32"][0]


class _Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def _with_bomb(path, folder, member):
    """The journal with one of its arrays replaced by a pickled object."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays[member] = np.array([_Bomb(folder)], dtype=object)
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize("member", ["header", "sums", "weights", "left_out"])
def test_a_journal_is_never_unpickled(half_done, undisturbed, member, tmp_path_factory):
    marker = tmp_path_factory.mktemp("bomb") / "exploded"
    path = journal_path(half_done / "X_kelp.tif")
    _with_bomb(path, marker, member)
    with pytest.raises(ValueError, match="allow_pickle"), np.load(path) as file:
        file[member]  # the bomb is there
    assert predict(half_done, "float32").resumed == 0
    assert not marker.exists()
    assert contents(half_done) == undisturbed["float32"][0]


JOURNAL_DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
    "a pickle": lambda data: b"\x80\x04K\x01.",
    "zeros": lambda data: bytes(len(data)),
    "a flipped bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
}


@pytest.mark.parametrize("damage", JOURNAL_DAMAGE)
def test_a_damaged_journal_starts_over(half_done, undisturbed, damage):
    path = journal_path(half_done / "X_kelp.tif")
    path.write_bytes(JOURNAL_DAMAGE[damage](path.read_bytes()))
    assert predict(half_done, "float32").resumed == 0
    assert contents(half_done) == undisturbed["float32"][0]


def test_any_flipped_bit_of_a_journal_is_noticed(tmp_path):
    """Or it does not matter: then all is read as it was written."""
    journal = JournalFile(tmp_path / "X_kelp.tif", "f")
    state = MergerState(
        8, np.arange(3.0)[None], np.ones((1, 3), np.float32), np.zeros((1, 3), np.bool_)
    )
    journal.save(state, lambda: [1, 2])
    path = journal_path(tmp_path / "X_kelp.tif")
    good = path.read_bytes()
    wrong = Counter()
    for place, bit in (divmod(number, 8) for number in range(0, 8 * len(good), 5)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        try:
            entry = journal.load()
        except Exception as error:  # noqa: BLE001 - any is a failure, they are counted
            wrong[f"raises {type(error).__name__}"] += 1
            continue
        if entry is not None and not (
            (entry.fingerprint, entry.checksums, entry.state.top) == ("f", (1, 2), 8)
            and entry.state.sums.tobytes() == state.sums.tobytes()
            and entry.state.weights.tobytes() == state.weights.tobytes()
            and entry.state.left_out.tobytes() == state.left_out.tobytes()
        ):
            wrong["is believed"] += 1
    assert not wrong


@settings(LAWS, max_examples=100)
@given(data=st.binary(max_size=300), beginning=st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY"]))
def test_any_bytes_in_place_of_a_journal_are_no_entry(tmp_path_factory, data, beginning):
    folder = tmp_path_factory.mktemp("bytes")
    journal_path(folder / "X_kelp.tif").write_bytes(beginning + data)
    assert JournalFile(folder / "X_kelp.tif", "f").load() is None


@pytest.mark.parametrize(
    "header", [b"{}", b"[]", b"3", b'{"top": 8}', b'{"fingerprint": "f", "top": "x"}', b"\xff"]
)
def test_a_journal_of_another_make_is_no_entry(tmp_path, header):
    file = io.BytesIO()
    text = np.frombuffer(header, np.uint8)
    np.savez(file, header=text, sums=np.zeros(1), weights=np.zeros(1), left_out=np.zeros(1))
    journal_path(tmp_path / "X_kelp.tif").write_bytes(file.getvalue())
    assert JournalFile(tmp_path / "X_kelp.tif", "f").load() is None


def test_forget_leaves_nothing_hidden(half_done):
    assert list(half_done.glob(".*"))
    clean_up(half_done / "X_kelp.tif")
    assert not list(half_done.iterdir())


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """Due at once, then only after 19 times what saving took."""
    now = [100.0]
    monkeypatch.setattr("kelp.inference.outputs.time.monotonic", lambda: now[0])
    journal = JournalFile(tmp_path / "X_kelp.tif", "f")
    state = MergerState(0, np.zeros((0, 3)), np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
    assert journal.is_due

    def sync():
        now[0] += 2.0
        return [0]

    journal.save(state, sync)
    now[0] += 37.9
    assert not journal.is_due
    now[0] += 0.2
    assert journal.is_due


def test_a_small_scene_has_no_journal(tmp_path, always_due):
    pixels = random_scene((90, 70))
    calls = itertools.count(1)

    def network(batch):
        assert not list(tmp_path.glob(".*journal*"))
        if next(calls) == 2:
            raise Killed
        return ramp(batch)

    with pytest.raises(Killed):
        predict(tmp_path, pixels=pixels, network=network)
    assert not list(tmp_path.iterdir())
    assert predict(tmp_path, pixels=pixels).resumed == 0
