"""The sliced engine with networks that are one line of numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced import NIR, ArrayScene, exact, noisy_scene

from kelp.errors import InputError
from kelp.raster.bands import DEM, QA
from kelp.raster.validity import observed
from kelp.tiling.engine import Engine, Job
from kelp.tiling.grid import TileGrid
from kelp.tiling.strip import Slicing


def run(scenes, predict=exact, tile=(16, 16), overlap=(8, 8), **options):
    jobs = [ArrayScene(pixels) for pixels in scenes]
    engine = Engine(predict, Slicing(tile, overlap, **options))
    engine.run(Job(job, job) for job in jobs)
    assert all(job.closed == 1 for job in jobs)
    return [job.result for job in jobs], engine, jobs


@st.composite
def settings_of_a_run(draw):
    tile = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    overlap = (draw(st.integers(0, tile[0] - 1)), draw(st.integers(0, tile[1] - 1)))
    shape = (draw(st.integers(1, 45)), draw(st.integers(1, 45)))
    return shape, {
        "tile": tile,
        "overlap": overlap,
        "batch_size": draw(st.integers(1, 7)),
        "blend": draw(st.sampled_from(["mean", "hann"])),
        "qa_as_nodata": draw(st.booleans()),
    }


@settings(max_examples=60)
@given(case=settings_of_a_run(), holes=st.sampled_from([0.0, 0.2, 0.9, 1.0]))
def test_an_exact_network_gives_its_map_at_any_size(case, holes):
    shape, options = case
    pixels = noisy_scene(shape, holes=holes)
    (result,), _, _ = run([pixels], **options)
    seen = observed(pixels, options["qa_as_nodata"])
    expected = np.where(seen, exact(pixels[None])[0], np.nan)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@settings(max_examples=30)
@given(case=settings_of_a_run(), order=st.permutations(range(4)), batch=st.integers(1, 9))
def test_order_of_scenes_and_batch_size_change_no_bit(case, order, batch):
    shape, options = case
    scenes = [noisy_scene((shape[0] + i, shape[1]), seed=i) for i in range(4)]
    alone = [run([pixels], **options)[0][0] for pixels in scenes]
    together, _, _ = run([scenes[i] for i in order], **{**options, "batch_size": batch})
    for i, result in zip(order, together, strict=True):
        assert result.tobytes() == alone[i].tobytes()


def test_batches_have_one_shape_and_run_across_scenes():
    shapes = []

    def predict(batch):
        shapes.append(batch.shape)
        return exact(batch)

    _, engine, _ = run([noisy_scene((20, 20), i, 0.0) for i in range(5)], predict, batch_size=8)
    assert set(shapes) == {(8, 7, 16, 16)}
    assert engine.counts.predicted == 20
    assert len(shapes) == 3


def test_each_row_is_read_once():
    pixels = noisy_scene((100, 30))
    _, _, (job,) = run([pixels], tile=(32, 16), overlap=(24, 8))
    assert sum(tile.height for tile in job.windows) == 100


def test_tiles_without_an_observed_pixel_are_not_run():
    pixels = noisy_scene((64, 64), holes=0.0)
    pixels[NIR, :32] = np.nan
    (result,), engine, _ = run([pixels], overlap=(0, 0))
    assert engine.counts.unobserved == 8
    assert engine.counts.predicted == 8
    assert np.isnan(result[:32]).all()


def test_a_scene_without_data_is_not_observed_everywhere():
    (result,), engine, _ = run([np.full((7, 33, 40), np.nan, dtype=np.float32)])
    assert np.isnan(result).all()
    assert engine.counts.batches == 0


def test_all_land_tiles_are_zero_on_request_and_nothing_else_changes():
    pixels = noisy_scene((48, 64), holes=0.0)
    pixels[QA] = 0
    pixels[DEM] = 0
    pixels[DEM, :, 32:] = 5
    (kept,), _, _ = run([pixels], overlap=(0, 0))
    # A DEM may lie 3 pixels off: the tiles beside the water are run.
    for tolerance, left in ((0, 32), (3, 48), (16, 48), (17, 64)):
        (skipped,), engine, _ = run(
            [pixels], overlap=(0, 0), skip_land=True, land_tolerance=tolerance
        )
        assert engine.counts.land == (64 - left) // 16 * 3
        assert (skipped[:, left:] == 0).all()
        assert skipped[:, :left].tobytes() == kept[:, :left].tobytes()
    pixels[DEM, :, 32:] = np.nan  # unknown is not land
    assert run([pixels], overlap=(0, 0), skip_land=True)[1].counts.land == 0


def test_the_answer_of_a_tile_lies_where_the_network_put_it():
    """A network that moves its answer by a column: so does the map of tiles side by side."""
    pixels = noisy_scene((32, 48), holes=0.0)
    pixels[QA] = 0
    (result,), _, _ = run(
        [pixels], lambda batch: np.roll(exact(batch), 1, axis=2), overlap=(0, 0), blend="mean"
    )
    tiles = exact(pixels[None])[0].reshape(32, 3, 16)
    np.testing.assert_allclose(result, np.roll(tiles, 1, axis=2).reshape(32, 48), atol=1e-6)


def test_probabilities_are_averaged_not_votes():
    """Tiles that disagree (0.9, 0.2) leave their mean, whatever a threshold would say."""
    answers = iter([0.9, 0.2, 0.9, 0.2])

    def predict(batch):
        return np.stack([np.full(batch.shape[2:], next(answers), np.float32) for _ in batch])

    pixels = noisy_scene((16, 24), holes=0.0)
    pixels[QA] = 0
    (result,), _, _ = run([pixels], predict, batch_size=1)
    np.testing.assert_allclose(result[:, 8:16], 0.55, atol=1e-6)


@pytest.mark.parametrize("verb", ["read", "write", "close"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_failed_scene_is_named_and_the_others_are_done(monkeypatch, verb, batch_size):
    """Also where it fails while another scene is being read, or at the very end."""
    jobs = [ArrayScene(noisy_scene((40, 40), i, holes=0.1)) for i in range(4)]
    bad, done = jobs[1], getattr(jobs[1], verb)

    def broken(*arguments):
        if verb == "close" or getattr(arguments[0], "y", arguments[0]) > 0:
            raise InputError("disk full")
        return done(*arguments)

    monkeypatch.setattr(bad, verb, broken)
    engine = Engine(exact, Slicing((16, 16), (8, 8), batch_size=batch_size))
    engine.run(Job(job, job) for job in jobs)
    assert [(sink, str(error)) for sink, error in engine.failures] == [(bad, "disk full")]
    for job in (jobs[0], jobs[2], jobs[3]):
        (alone,), _, _ = run([job.pixels])
        assert job.closed == 1
        assert job.result.tobytes() == alone.tobytes()


def test_progress_counts_every_tile():
    done = []
    pixels = noisy_scene((50, 70))
    pixels[NIR, :20] = np.nan
    engine = Engine(exact, Slicing((16, 16), (8, 8)), done.append)
    job = ArrayScene(pixels)
    engine.run([Job(job, job)])
    assert sum(done) == len(TileGrid((50, 70), 16, 8)) == engine.counts.tiles


@pytest.mark.parametrize("block", [(1, 3000), (64, 64), (512, 512)])
def test_a_wide_scene_is_read_in_pieces(monkeypatch, block):
    """In columns of whole blocks, or in rows: each pixel once."""
    monkeypatch.setattr("kelp.tiling.strip.PIECE", 20_000)
    pixels, windows = noisy_scene((200, 3000), holes=0), []

    class Source(ArrayScene):
        def read(self, tile):
            windows.append(tile)
            return super().read(tile)

    source = Source(pixels)
    source.block = block
    Engine(exact, Slicing((64, 64), (32, 32), qa_as_nodata=False)).run([Job(source, source)])
    np.testing.assert_allclose(source.result, exact(pixels[None])[0], atol=1e-6)
    seen = np.zeros(source.shape, dtype=int)
    for tile in windows:
        seen[tile.slices] += 1
        assert tile.height * tile.width <= max(20_000, 64 * block[1])
        assert tile.x % block[1] == 0
    assert (seen == 1).all()
    assert len(windows) > 200 // 32 + 1
