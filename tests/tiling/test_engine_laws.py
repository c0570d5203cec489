"""The laws of the sliced engine, for any size, cut, validity and order."""

import copy
import itertools
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from laws import LAWS
from sliced import NIR, ArrayScene, exact, ramp, random_scene

from kelp.errors import CoverageError, InputError
from kelp.raster.bands import DEM, QA, reflected
from kelp.raster.validity import observed
from kelp.tiling.engine import AHEAD, Engine, Job
from kelp.tiling.grid import TileGrid, origins
from kelp.tiling.merge import MergerState
from kelp.tiling.strip import Slicing, Strip


def run(scenes, slicing, predict=exact, spread=False):
    jobs = [ArrayScene(pixels) for pixels in scenes]
    engine = Engine(predict, slicing)
    engine.run(Job(job, job, spread=job.write_spread if spread else None) for job in jobs)
    assert not engine.failures
    assert all(job.closed == 1 for job in jobs)
    return jobs, engine.counts


def _slicings(most, land=False):
    """Cuts with tiles of at most `most` pixels a side; at least every fourth pixel begins one."""

    def build(height, width, shared, others):
        overlap = tuple(
            min(int(side * part), side - 1)
            for side, part in zip((height, width), shared, strict=True)
        )
        return Slicing((height, width), overlap, **others)

    others = {
        "blend": st.sampled_from(["mean", "hann"]),
        "batch_size": st.integers(1, 17),
        "qa_as_nodata": st.booleans(),
    }
    if land:
        others |= {"skip_land": st.just(True), "land_tolerance": st.integers(0, 9)}
    sides, shares = st.integers(1, most), st.floats(0, 0.75)
    return st.builds(build, sides, sides, st.tuples(shares, shares), st.fixed_dictionaries(others))


small = st.tuples(st.integers(1, 60), st.integers(1, 60))
missing = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
seeds = st.integers(0, 2**16)


def naive(pixels, slicing, predict, seed=0):
    """Map and spread by their definition: all tiles, in any order, summed in one array."""
    shape = pixels.shape[1:]
    grown = reflected(pixels, *slicing.tile)
    seen = observed(grown, slicing.qa_as_nodata)
    sums, squares, weights = np.zeros((3, *grown.shape[1:]))
    window = np.ones(slicing.tile)
    if slicing.blend == "hann":
        down, across = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in slicing.tile)
        window = down[:, None] * across
    runs = 0
    tiles = list(TileGrid(shape, slicing.tile, slicing.overlap))
    for index in np.random.default_rng(seed).permutation(len(tiles)):
        tile = tiles[index]
        share = seen[tile.slices].mean()
        top, left = max(tile.y - slicing.land_tolerance, 0), max(tile.x - slicing.land_tolerance, 0)
        around = slice(top, tile.bottom + slicing.land_tolerance)
        land = (pixels[DEM, around, left : tile.right + slicing.land_tolerance] > 0).all()
        if share and not (slicing.skip_land and land):
            runs += 1
            # Counted in units of 2^-12, at least one of them.
            weight = np.maximum(np.rint(window * share * 4096), 1)
            vote = predict(grown[None, :, *tile.slices])[0].astype(np.float64)
            sums[tile.slices] += weight * vote
            squares[tile.slices] += weight * vote**2
            weights[tile.slices] += weight
    inside = slice(shape[0]), slice(shape[1])
    weights, seen = weights[inside], seen[inside]
    mean, square = (
        np.divide(plane[inside], weights, out=np.zeros(shape), where=weights > 0)
        for plane in (sums, squares)
    )
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return np.where(seen, mean, np.nan), np.where(seen, spread, np.nan), runs


# Coverage, identity, constancy


@settings(LAWS, max_examples=80)
@given(small, _slicings(24), missing, seeds)
@example((1, 1), Slicing((16, 16), (8, 8)), 0.0, 0)
@example((1, 1), Slicing((1, 1), (0, 0)), 0.0, 0)
@example((1, 60), Slicing((16, 16), (8, 8), "hann"), 0.2, 0)
@example((60, 1), Slicing((16, 16), (8, 8), "hann"), 0.2, 0)
@example((60, 1), Slicing((1, 16), (0, 8)), 0.2, 0)
def test_every_observed_pixel_has_the_exact_value_and_no_other_has_one(shape, slicing, gone, seed):
    pixels = random_scene(shape, seed, gone)
    (job,), counts = run([pixels], slicing)
    seen = observed(pixels, slicing.qa_as_nodata)
    np.testing.assert_array_equal(np.isnan(job.result), ~seen)
    np.testing.assert_allclose(job.result[seen], exact(pixels[None])[0][seen], rtol=0, atol=1e-6)
    assert counts.tiles == len(TileGrid(shape, slicing.tile, slicing.overlap))


@settings(LAWS, max_examples=5)
@given(
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.integers(40, 200),
    st.sampled_from([0.25, 0.5]),
    st.sampled_from(["mean", "hann"]),
)
@example((700, 1), 128, 0.5, "hann")
@example((1, 700), 128, 0.5, "hann")
@example((699, 350), 128, 0.5, "mean")
@example((350, 700), 127, 0.25, "hann")
def test_the_same_up_to_700_pixels(shape, tile, shared, blend):
    pixels = random_scene(shape, missing=0.3)
    overlap = int(tile * shared)
    slicing = Slicing((tile, tile), (overlap, overlap), blend, batch_size=5)
    (job,), _ = run([pixels], slicing)
    seen = observed(pixels)
    np.testing.assert_array_equal(np.isnan(job.result), ~seen)
    np.testing.assert_allclose(job.result[seen], exact(pixels[None])[0][seen], rtol=0, atol=1e-6)


@settings(LAWS, max_examples=30)
@given(small, _slicings(24), missing, st.floats(0, 1, width=32))
def test_a_constant_stays_that_constant_to_the_bit(shape, slicing, gone, constant):
    """To a unit of 2^-30, in which votes are counted: half of it at most is lost."""
    (job,), _ = run(
        [random_scene(shape, missing=gone)],
        slicing,
        lambda batch: np.full((len(batch), *batch.shape[2:]), constant, np.float32),
    )
    values = np.unique(job.result[~np.isnan(job.result)])
    assert len(values) <= 1
    np.testing.assert_allclose(values, constant, rtol=0, atol=2.0**-31)


@settings(LAWS, max_examples=50)
@given(small, _slicings(20), missing, seeds)
def test_tiles_that_disagree_are_weighed_by_window_and_validity(shape, slicing, gone, seed):
    pixels = random_scene(shape, seed, gone)
    (job,), counts = run([pixels], slicing, ramp, spread=True)
    expected, spread, runs = naive(pixels, slicing, ramp, seed)
    assert counts.predicted == runs
    np.testing.assert_array_equal(np.isnan(job.result), np.isnan(expected))
    np.testing.assert_allclose(job.result, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(job.spread), np.isnan(expected))
    np.testing.assert_allclose(job.spread, spread, rtol=1e-6, atol=4e-5)
    (alone,), _ = run([pixels], slicing, ramp)
    assert alone.result.tobytes() == job.result.tobytes()
    assert (alone.spread == -1).all()  # not asked for


def test_a_pixel_that_no_tile_covers_is_an_error(monkeypatch):
    def gap(size, *others):
        return (0, 34) if size == 50 else origins(size, *others)

    monkeypatch.setattr("kelp.tiling.grid.origins", gap)
    job = ArrayScene(random_scene((40, 50)))
    engine = Engine(exact, Slicing((16, 16), (8, 8)))
    engine.run([Job(job, job)])
    ((_, error),) = engine.failures
    assert isinstance(error, CoverageError)
    assert not job.closed


# Order and batches


@settings(LAWS, max_examples=25)
@given(
    st.lists(small, min_size=2, max_size=5),
    _slicings(16),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
    missing,
)
def test_order_of_scenes_and_batch_size_change_no_bit(shapes, slicing, batch_size, order, gone):
    scenes = [random_scene(shape, seed, gone) for seed, shape in enumerate(shapes)]
    alone = [run([pixels], slicing, ramp, spread=True)[0][0] for pixels in scenes]
    places = list(range(len(scenes)))
    order.shuffle(places)
    other = Slicing(**{**vars(slicing), "batch_size": batch_size})
    together, _ = run([scenes[place] for place in places], other, ramp, spread=True)
    for place, job in zip(places, together, strict=True):
        assert job.result.tobytes() == alone[place].result.tobytes()
        assert job.spread.tobytes() == alone[place].spread.tobytes()


@settings(LAWS, max_examples=25)
@given(st.lists(small, min_size=1, max_size=4), _slicings(16, land=True), missing, seeds)
def test_counts_add_up(shapes, slicing, gone, seed):
    sizes, done = set(), []

    def network(batch):
        sizes.add(batch.shape)
        return exact(batch)

    jobs = [ArrayScene(random_scene(s, seed + i, gone, 0.5)) for i, s in enumerate(shapes)]
    engine = Engine(network, slicing, done.append)
    engine.run(Job(job, job) for job in jobs)
    counts = engine.counts
    total = sum(len(TileGrid(shape, slicing.tile, slicing.overlap)) for shape in shapes)
    assert counts.tiles == sum(done) == total
    assert counts.predicted + counts.unobserved + counts.land == total
    assert counts.resumed == 0
    assert sizes <= {(slicing.batch_size, 7, *slicing.tile)}
    assert counts.predicted <= counts.batches * slicing.batch_size
    assert bool(counts.batches) == bool(counts.predicted)


# Land


@settings(LAWS, max_examples=50)
@given(small, _slicings(16, land=True), st.sampled_from([0.0, 0.3]), seeds)
def test_land_is_what_has_no_water_within_the_tolerance(shape, slicing, gone, seed):
    """And what no skipped tile touches does not change."""
    pixels = random_scene(shape, seed, gone, islands=0.6)
    (job,), counts = run([pixels], slicing, ramp, spread=True)
    expected, spread, runs = naive(pixels, slicing, ramp, seed)
    assert counts.predicted == runs
    np.testing.assert_array_equal(np.isnan(job.result), np.isnan(expected))
    np.testing.assert_array_equal(job.result == 0, expected == 0)
    np.testing.assert_allclose(job.spread, spread, rtol=1e-6, atol=4e-5)
    (kept,), all_counts = run([pixels], Slicing(**{**vars(slicing), "skip_land": False}), ramp)
    assert all_counts.predicted == runs + counts.land
    untouched = np.ones(shape, bool)
    for tile in TileGrid(shape, slicing.tile, slicing.overlap):
        top, left = max(tile.y - slicing.land_tolerance, 0), max(tile.x - slicing.land_tolerance, 0)
        rows = slice(top, tile.bottom + slicing.land_tolerance)
        if (pixels[DEM, rows, left : tile.right + slicing.land_tolerance] > 0).all():
            untouched[tile.slices] = False
    assert job.result[untouched].tobytes() == kept.result[untouched].tobytes()


@pytest.mark.parametrize("side", ["above", "below", "left", "right"])
@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_one_pixel_of_water_within_the_tolerance_keeps_a_tile(side, tolerance):
    """The tile in the middle of nine, and water just inside or just outside its margin."""
    for distance in range(tolerance + 2):
        pixels = random_scene((30, 36), missing=0.0)
        pixels[QA], pixels[DEM] = 0, 4
        y, x = {
            "above": (10 - distance, 17),
            "below": (19 + distance, 17),
            "left": (14, 12 - distance),
            "right": (14, 23 + distance),
        }[side]
        pixels[DEM, y, x] = [np.nan, 0, -1][distance % 3]  # unknown is not land, either
        slicing = Slicing((10, 12), (0, 0), skip_land=True, land_tolerance=tolerance)
        (job,), _ = run([pixels], slicing)
        middle = job.result[10:20, 12:24]
        assert (middle > 0).all() if distance <= tolerance else (middle == 0).all()


# Reading


@settings(LAWS, max_examples=60)
@given(small, _slicings(20, land=True), st.booleans(), st.data())
def test_a_strip_reads_each_row_once_and_tells_of_it_once(shape, slicing, land, data):
    slicing = Slicing(**{**vars(slicing), "skip_land": land})
    margin = slicing.land_tolerance if land else 0
    grid = TileGrid(shape, slicing.tile, slicing.overlap)
    first = data.draw(st.integers(0, len(grid.rows) - 1))
    scene = ArrayScene(random_scene(shape))
    strip = Strip(scene, slicing, grid.rows[first])
    told = []
    for y in grid.rows[first:]:
        told.extend(strip.advance(y))
        held = reflected(scene.pixels[:, y : y + slicing.tile[0]], *slicing.tile)
        runs = list(strip.runs())
        assert tuple(tile for run in runs for tile in run.tiles) == grid.row(y)
        for run in runs:
            for k, (tile, validity) in enumerate(zip(run.tiles, run.validity, strict=True)):
                part = held[:, :, tile.x : tile.right]
                assert run.pixels is None or run.pixels[k].tobytes() == part.tobytes()
                seen = observed(part, slicing.qa_as_nodata)
                assert validity == seen.sum() / seen.size
                assert run.pixels is not None or run.land or not validity
    rows = [row for tile in scene.windows for row in range(tile.y, tile.bottom)]
    assert rows == list(range(max(0, grid.rows[first] - margin), shape[0]))
    assert {(tile.x, tile.width) for tile in scene.windows} == {(0, shape[1])}
    expected = observed(scene.pixels[:, grid.rows[first] :], slicing.qa_as_nodata)
    np.testing.assert_array_equal(np.array(told), expected)


@settings(LAWS, max_examples=60)
@given(small, _slicings(20, land=True), missing, seeds, st.integers(1, 40), st.data())
def test_a_wide_scene_in_panels_has_the_same_map(shape, slicing, gone, seed, panel, data):
    """Whole or in an area, with land or without; a read is never wider than a panel."""
    pixels = random_scene(shape, seed, gone, islands=0.3)
    wanted = np.ones(shape, bool)
    if data.draw(st.booleans()):
        wanted = np.random.default_rng(seed).random(shape) < 0.01
    results = []
    for widest in (shape[1], 1):
        scene = ArrayScene(pixels)
        scene.block = (1, 1)
        scene.area = SimpleNamespace(mask=lambda tile: wanted[tile.slices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kelp.tiling.strip.WIDEST", widest)
            patch.setattr("kelp.tiling.strip.PANEL", panel)
            engine = Engine(ramp, slicing)
            engine.run([Job(scene, scene, spread=scene.write_spread)])
        assert not engine.failures
        counts = vars(engine.counts)
        results.append([scene.result.tobytes(), scene.spread.tobytes()])
        results[-1] += [counts[name] for name in ("tiles", "predicted", "land", "unobserved")]
    margin = slicing.land_tolerance if slicing.skip_land else 0
    widths = {tile.width for tile in scene.windows}
    assert max(widths, default=0) <= max(panel, slicing.tile[1]) + 2 * margin
    assert results[0] == results[1]


def test_of_an_empty_panel_shared_rows_are_not_read_again(monkeypatch):
    monkeypatch.setattr("kelp.tiling.strip.WIDEST", 1)
    monkeypatch.setattr("kelp.tiling.strip.PANEL", 40)
    pixels = random_scene((100, 200), missing=0.0)
    pixels[QA] = 0
    pixels[:5, :, :120] = np.nan
    scene = ArrayScene(pixels)
    scene.block = (1, 1)
    Engine(exact, Slicing((20, 20), (10, 10))).run([Job(scene, scene)])
    read = np.zeros(scene.shape, dtype=int)
    for tile in scene.windows:
        read[tile.slices] += 1
    assert (read[:, :90] <= 2).all()
    assert (read[:, 5:25] == 1).all()
    assert read[50, 130] == 2
    np.testing.assert_allclose(scene.result[:, 120:], exact(pixels[None])[0][:, 120:], atol=1e-6)


# Memory


def most_rows(slicing, width):
    """Rows of a scene that may be held: a tile, its margin, and batches under way.

    Of these there are at most `2 * AHEAD + 2`; each begins and ends in a row of tiles, and
    waits for as many rows as fill a batch.
    """
    columns = len(TileGrid((1, width), (1, slicing.tile[1]), (0, slicing.overlap[1])).columns)
    stride = slicing.tile[0] - slicing.overlap[0]
    ahead = (2 * AHEAD + 2) * (math.ceil(slicing.batch_size / columns) + 1)
    return slicing.tile[0] + slicing.land_tolerance + ahead * stride


def slowly(batch):
    time.sleep(0.002)  # reading runs as far ahead as it may
    return exact(batch)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
@pytest.mark.parametrize("share", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("skip_land", [False, True])
def test_rows_held_do_not_grow_with_the_height(batch_size, share, skip_land):
    """Nor where almost nothing is run: tiles that wait for others would hold back all below."""
    rng = np.random.default_rng(3)
    pixels = random_scene((2000, 40), missing=0.0)
    pixels[QA] = 0
    keep = rng.random(len(pixels[0]) // 16) < share
    keep[0] = True
    gone = ~keep.repeat(16)
    if skip_land:
        pixels[DEM, gone] = 9
    else:
        pixels[NIR, gone] = np.nan
    slicing = Slicing((16, 16), (8, 8), batch_size=batch_size, skip_land=skip_land)
    (job,), _ = run([pixels], slicing, slowly)
    assert job.held <= most_rows(slicing, 40)


def test_scenes_held_do_not_grow_with_their_number():
    """A folder of clouds after one clear scene: none waits for the clear one's batch to fill."""
    clear = random_scene((16, 20), missing=0.0)
    clear[QA] = 0
    cloud = np.full((7, 16, 20), np.nan, np.float32)
    jobs = [ArrayScene(clear), *(ArrayScene(cloud) for _ in range(300))]
    open_at_most = 0

    def draw():
        nonlocal open_at_most
        for number, job in enumerate(jobs):
            open_at_most = max(open_at_most, number - sum(other.closed for other in jobs))
            yield Job(job, job)

    Engine(slowly, Slicing((16, 16), (8, 8), batch_size=8)).run(draw())
    assert all(job.closed for job in jobs)
    assert open_at_most <= (2 * AHEAD + 2) * 8


# Errors


class Broken(Exception):
    """Neither bad input nor a bug that anybody expects."""


def _fail(*arguments):
    raise Broken


def _fail_late(real, calls):
    def method(*arguments):
        if next(calls) >= 3:
            raise Broken
        return real(*arguments)

    return method


@pytest.mark.parametrize(
    "where", ["read", "network", "write", "close", "jobs", "progress", "start"]
)
@pytest.mark.parametrize("late", [False, True])
def test_an_error_is_reported_and_leaves_no_thread(where, late):
    def our_threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("kelp")]

    jobs = [ArrayScene(random_scene((60, 50), seed)) for seed in range(6)]
    broken = jobs[3 * late]
    calls = itertools.count()
    network, progress = slowly, lambda tiles: None
    if where in ("read", "write", "close"):
        real = getattr(broken, where)
        late_there = late and where != "close"
        setattr(broken, where, _fail_late(real, calls) if late_there else _fail)
    elif where == "network":
        network = _fail_late(exact, calls) if late else _fail
    elif where == "progress":
        progress = _fail_late(lambda tiles: None, calls) if late else _fail

    class NoJournal:
        @property
        def start(self):
            raise Broken

        commit = _fail

    def draw():
        for job in jobs:
            if where == "jobs" and job is broken:
                raise Broken
            yield Job(job, job, NoJournal() if where == "start" and job is broken else None)

    engine = Engine(network, Slicing((16, 16), (8, 8), batch_size=3), progress)
    if where in ("read", "write", "close", "start"):  # one scene cannot end a run
        engine.run(draw())
        ((sink, error),) = engine.failures
        assert sink is broken
        assert isinstance(error, Broken)
        assert [job.closed for job in jobs if job is not broken] == [1] * 5
    else:
        with pytest.raises(Broken):
            engine.run(draw())
    assert not our_threads()
    assert not broken.closed


def test_an_input_error_in_any_scene_spares_the_others():
    jobs = [ArrayScene(random_scene((60, 50), seed)) for seed in range(5)]

    def failing(real, at):
        calls = itertools.count()

        def method(*arguments):
            if next(calls) == at:
                raise InputError("bad")
            return real(*arguments)

        return method

    jobs[1].read = failing(jobs[1].read, 2)
    jobs[3].write = failing(jobs[3].write, 1)
    slicing = Slicing((16, 16), (8, 8), batch_size=7)
    engine = Engine(ramp, slicing)
    engine.run(Job(job, job) for job in jobs)
    assert {id(sink) for sink, _ in engine.failures} == {id(jobs[1]), id(jobs[3])}
    for good in (0, 2, 4):
        (alone,), _ = run([jobs[good].pixels], slicing, ramp)
        assert jobs[good].result.tobytes() == alone.result.tobytes()
        assert jobs[good].closed == 1
    assert not jobs[1].closed
    assert not jobs[3].closed


# Going on


def test_what_two_threads_count_at_a_time_is_all_counted():
    """The network counts a batch while the reading thread adds tiles that were found finished."""
    reading, ran = threading.Event(), threading.Event()
    calls = []

    class Slow(int):
        """A number whose addition the network overtakes."""

        added = 0

        def __radd__(self, other):
            type(self).added += 1
            if self.added == 2:  # of `tiles` and `resumed` the second
                reading.set()
                assert ran.wait(10)
            return other + int(self)

    def network(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            assert reading.wait(10)
        elif len(calls) == 3:
            ran.set()
        return exact(batch)

    engine = Engine(network, Slicing((4, 4), (0, 0), batch_size=1))
    scene = ArrayScene(random_scene((4, 12), missing=0))

    def jobs():
        yield Job(scene, scene)
        engine.skip(Slow(5))

    engine.run(jobs())
    counts = engine.counts
    assert (counts.tiles, counts.predicted, counts.resumed, counts.batches) == (8, 3, 5, 3)


@settings(LAWS, max_examples=30)
@given(small, _slicings(16, land=True), missing, seeds, st.data())
def test_from_any_row_of_tiles_on_the_rest_is_the_same(shape, slicing, gone, seed, data):
    """Whatever part of it the first process had done."""
    pixels = random_scene(shape, seed, gone, islands=0.3)
    states = []

    class Keep:
        start = None

        def commit(self, state):
            states.append(copy.deepcopy(state()))

    whole = ArrayScene(pixels)
    Engine(ramp, slicing).run([Job(whole, whole, Keep())])
    grid = TileGrid(shape, slicing.tile, slicing.overlap)
    assert [state.top for state in states] == list(grid.rows[1:])
    assume(states)
    state: MergerState = data.draw(st.sampled_from(states))
    rest = ArrayScene(pixels)
    rest.written = state.top
    journal = Keep()
    journal.start = state
    engine = Engine(ramp, slicing)
    engine.run([Job(rest, rest, journal)])
    assert rest.result[state.top :].tobytes() == whole.result[state.top :].tobytes()
    done = grid.rows.index(state.top)
    assert engine.counts.resumed == done * len(grid.columns)
    counts = engine.counts
    assert counts.tiles == len(grid)
    assert counts.tiles == counts.resumed + counts.predicted + counts.unobserved + counts.land
