"""A scene in sections: the same bytes as in one go, whatever the cuts, the land and the clouds."""

import numpy as np
import pytest
from bundles import tiny_bundle, use_pixel_network
from hypothesis import given
from hypothesis import strategies as st
from laws import LAWS, Memory, predict, rasters
from world import coast, write_tif

from kelp.config import PredictConfig
from kelp.inference.bundle import load_bundles
from kelp.inference.inputs import survey
from kelp.inference.outputs import sections_folder
from kelp.inference.predictor import Predictor
from kelp.inference.sections import SectionFile, Stitching, sections_of
from kelp.inference.work import Runner, WorkItem, WorkQueue
from kelp.tiling.engine import Engine, Job, Section
from kelp.tiling.grid import TileGrid
from kelp.tiling.strip import Slicing


@LAWS
@given(
    st.integers(1, 900),
    st.integers(1, 300),
    st.integers(1, 40),
    st.data(),
    st.integers(1, 9),
)
def test_sections_are_all_rows_of_tiles_and_no_pixel_lies_in_three(h, w, tile, data, batch):
    overlap = data.draw(st.integers(0, tile - 1))
    grid = TileGrid((h, w), tile, overlap)
    first = data.draw(st.integers(0, len(grid.rows) - 1))
    sections = sections_of(grid, batch, first)
    rows = [row for section in sections for row in range(section.first, section.end)]
    assert rows == list(range(first, len(grid.rows)))
    for above, below in zip(sections, sections[2:], strict=False):
        assert grid.rows[above.end - 1] + grid.tile[0] <= grid.rows[below.first]


def in_one_go(scene, network, slicing):
    sink, spread = Memory(scene), Memory(scene)
    Engine(network, slicing).run([Job(sink, sink, spread=spread.write)])
    return sink.result, spread.result


def in_sections(scene, network, slicing, sections, folder):
    files = [SectionFile(folder / "X_kelp.tif", section, "print") for section in sections]
    source = Memory(scene)
    for file in reversed(files):  # the order does not matter
        sink = file.sink(spread=True)
        job = Job(source, sink, None, sink.write_spread, file.section, sink.edge)
        Engine(network, slicing).run([job])
        assert file.exists
    mean, spread = Memory(scene), Memory(scene)
    Stitching(scene.shape[1:], slicing.blend, True).stitch(files, None, mean, spread.write)
    return mean.result, spread.result


def network(batch):
    """Depends on the whole tile, so that a tile out of place is seen."""
    nir = np.nan_to_num(batch[:, 1]) / 20000
    return np.clip(nir * 0.5 + nir.mean(axis=(1, 2), keepdims=True) * 0.5, 0, 1).astype(np.float32)


@LAWS
@given(
    st.tuples(st.integers(20, 90), st.integers(8, 60)),
    st.integers(6, 20),
    st.data(),
    st.sampled_from(["mean", "hann"]),
    st.booleans(),
)
def test_any_cut_gives_the_same_numbers(tmp_path_factory, shape, tile, data, blend, skip_land):
    overlap = data.draw(st.integers(0, tile - 1))
    scene, _ = coast(shape, np.random.default_rng(shape[0]))
    slicing = Slicing((tile, tile), (overlap, overlap), blend, 4, skip_land=skip_land)
    grid = TileGrid(shape, tile, overlap)
    # Cuts at random, where the law of sections allows them.
    sections, start = [], 0
    for end in range(1, len(grid.rows)):
        above = grid.rows[start - 1] + tile if start else 0
        if grid.rows[end] >= above and data.draw(st.booleans()):
            sections.append(Section(start, end))
            start = end
    last = grid.rows[start - 1] + tile if start else 0
    if sections and last > grid.rows[-1] + tile:
        return
    sections.append(Section(start, len(grid.rows)))
    folder = tmp_path_factory.mktemp("cut")
    expected = in_one_go(scene, network, slicing)
    found = in_sections(scene, network, slicing, sections, folder)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A scene large enough to be cut, a bundle, and a run of them."""
    use_pixel_network(monkeypatch)
    image, _ = coast((1100, 120), np.random.default_rng(4))
    folder = tmp_path / "scenes"
    folder.mkdir()
    write_tif(folder / "L_satellite.tif", image)
    return folder, tiny_bundle(tmp_path / "bundle")


def set_up(scene, out, **options):
    folder, bundle = scene
    out.mkdir(exist_ok=True)
    config = PredictConfig(
        data_dir=folder,
        run_dir=bundle,
        output_dir=out,
        device="cpu",
        precision="32-true",
        save_probabilities=True,
        save_spread=True,
        **options,
    )
    bundles = load_bundles(config.run_dir)
    tasks, failures = survey(
        {folder / "L_satellite.tif": out / "L_kelp.tif"}, (), [one.spec for one in bundles]
    )
    assert not failures
    return Runner(config, Predictor.of(config, bundles)), tasks


def drawn(work):
    while unit := work.next():
        yield unit


def test_units_of_a_cluster_make_the_files_of_one_process(scene, tmp_path):
    alone = tmp_path / "alone"
    predict(*scene, alone, save_probabilities=True, save_spread=True)
    run, tasks = set_up(scene, tmp_path / "shared")
    work, units = WorkQueue(run, tasks, lambda: 3), []
    for unit in drawn(work):
        units.append(unit)
        outcome = run.perform(unit)
        assert not outcome.failures
        work.done(outcome)
    assert len(units) > 3
    assert [unit.stitch for unit in units] == [False] * (len(units) - 1) + [True]
    assert rasters(tmp_path / "shared") == rasters(alone)
    assert not list((tmp_path / "shared").glob(".*"))


def test_finished_sections_are_kept_and_gone_on_with_by_one_process(scene, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "stopped"
    predict(*scene, alone, save_probabilities=True, save_spread=True)
    run, tasks = set_up(scene, out)
    work = WorkQueue(run, tasks, lambda: 3)
    first = run.perform(work.next())
    assert first.counts.predicted
    assert sections_folder(out / "L_kelp.tif").is_dir()
    result = predict(*scene, out, save_probabilities=True, save_spread=True)
    assert result.counts.resumed == first.counts.tiles
    assert result.counts.tiles == 476
    assert rasters(out) == rasters(alone)
    assert not list(out.glob(".*"))


def test_sections_of_other_settings_are_not_used(scene, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "other"
    predict(*scene, alone, blend="mean")
    run, tasks = set_up(scene, out, blend="hann")
    run.perform(WorkQueue(run, tasks, lambda: 3).next())
    assert predict(*scene, out, blend="mean").counts.resumed == 0
    assert rasters(out) == rasters(alone)
    assert not list(out.glob(".*"))


def test_a_scene_begun_in_one_go_is_finished_in_sections(scene, tmp_path, monkeypatch):
    alone, out = tmp_path / "alone", tmp_path / "begun"
    predict(*scene, alone, save_probabilities=True, save_spread=True)
    calls, call = [], Predictor.__call__

    def stopped(self, raw):
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return call(self, raw)

    monkeypatch.setattr(Predictor, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(*scene, out, save_probabilities=True, save_spread=True)
    monkeypatch.setattr(Predictor, "__call__", call)
    run, tasks = set_up(scene, out)
    work = WorkQueue(run, tasks, lambda: 3)
    unit = work.next()
    assert unit.sections[0].first > 0  # what was done in one go is not done again
    outcome = run.perform(unit)
    work.done(outcome)
    for unit in drawn(work):
        outcome = run.perform(unit)
        assert not outcome.failures
        work.done(outcome)
    assert rasters(out) == rasters(alone)
    assert not list(out.glob(".*"))


def test_a_damaged_section_is_named_and_made_again(scene, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "damaged"
    predict(*scene, alone, save_probabilities=True, save_spread=True)
    run, tasks = set_up(scene, out)
    work = WorkQueue(run, tasks, lambda: 3)
    while not (unit := work.next()).stitch:
        work.done(run.perform(unit))
    rows = sorted(sections_folder(out / "L_kelp.tif").glob("*.rows"))[1]
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    outcome = run.perform(unit)
    (failure,) = outcome.failures.values()
    assert "damaged; run the same command again" in failure.message
    predict(*scene, out, save_probabilities=True, save_spread=True)
    assert rasters(out) == rasters(alone)


def test_a_unit_that_is_done_twice_is_harmless(scene, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "twice"
    predict(*scene, alone, save_probabilities=True, save_spread=True)
    run, tasks = set_up(scene, out)
    work = WorkQueue(run, tasks, lambda: 3)
    for unit in drawn(work):
        outcome = run.perform(unit)
        again = run.perform(unit)
        assert not again.failures
        assert again.counts.predicted == 0
        work.done(outcome)
    assert rasters(out) == rasters(alone)


def test_units_shrink_as_less_is_left(tmp_path, monkeypatch):
    use_pixel_network(monkeypatch)
    folder = tmp_path / "scenes"
    folder.mkdir()
    for i in range(60):
        write_tif(folder / f"S{i:02d}_satellite.tif", coast((40, 40), np.random.default_rng(i))[0])
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "out"
    out.mkdir()
    config = PredictConfig(
        data_dir=folder,
        run_dir=bundle,
        output_dir=out,
        device="cpu",
        precision="32-true",
        batch_size=4,
    )
    bundles = load_bundles(config.run_dir)
    scenes = {path: out / path.name for path in sorted(folder.glob("*.tif"))}
    tasks, _ = survey(scenes, (), [one.spec for one in bundles])
    run = Runner(config, Predictor.of(config, bundles))
    sizes = []
    work = WorkQueue(run, tasks, lambda: 2)
    for unit in drawn(work):
        sizes.append(len(unit.tasks))
        work.done(run.perform(unit))
    assert sum(sizes) == 60
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]
    # Also before the first is done: what is handed out is not left.
    again = [len(unit.tasks) for unit in drawn(WorkQueue(run, tasks, lambda: 2))]
    assert again == sizes


def test_the_driver_of_a_cluster_opens_no_scene_to_hand_it_out(scene, tmp_path, monkeypatch):
    """Else all workers wait for one process to have opened everything."""
    run, tasks = set_up(scene, tmp_path / "out")

    def opened(*_):
        raise AssertionError("opened")

    monkeypatch.setattr("kelp.inference.work.open_scene", opened)
    monkeypatch.setattr(Runner, "outputs", opened)
    assert WorkQueue(run, tasks, lambda: 3).next().sections


def test_a_failing_scene_drops_its_other_sections(scene, tmp_path):
    run, tasks = set_up(scene, tmp_path / "out")
    work = WorkQueue(run, tasks, lambda: 3)
    unit = work.next()
    tasks[0].path.write_bytes(tasks[0].path.read_bytes()[:2000])
    outcome = run.perform(unit)
    assert list(outcome.failures) == [tasks[0].path]
    work.done(outcome)
    assert work.next() is None
    assert "L_satellite.tif" in outcome.failures[tasks[0].path].message
    assert WorkItem((tasks[0],)).sections == ()
