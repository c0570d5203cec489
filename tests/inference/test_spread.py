"""`kelp predict --save_spread`: how much overlapping tiles disagree, pixel by pixel."""

import numpy as np
import pytest
from affine import Affine
from bundles import use_pixel_network
from laws import (
    biased_bundle,
    predict,
    predict_command,
    rasters,
    use_ramp_network,
    write_scenes,
)
from rasterio.crs import CRS
from sliced import ArrayScene
from world import coast, opened, read_tif, write_tif

import kelp
from kelp.cli import main
from kelp.inference import predict as module
from kelp.inference.plan import NetworkMemory, fit_memory, make_plan
from kelp.inference.predictor import Predictor
from kelp.raster.bands import BANDS, reflected
from kelp.raster.masks import Georeference, georeference_of
from kelp.raster.scene import SceneSize, read_scene
from kelp.raster.validity import observed
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import window
from kelp.tiling.strip import Slicing

SHAPES = [(70, 50), (90, 35), (20, 90)]


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes", SHAPES)


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A network whose answer depends on the place in the tile: tiles of 32 px disagree."""
    use_ramp_network(monkeypatch)
    return biased_bundle(tmp_path / "bundle", 0.25)


def spread_of(out, scene):
    return read_tif(out / scene.name.replace("_satellite", "_kelp_spread"))[0]


def by_definition(bundle, path, side=32, overlap=16):
    """Weighted standard deviation of the votes, each in a layer of its own, by numpy."""
    pixels = reflected(read_scene(path), side, side)
    network = Predictor(kelp.load_bundle(bundle), device="cpu", precision="32-true")
    shape = read_scene(path).shape[1:]
    grid = TileGrid(shape, side, overlap)
    votes, weights = np.zeros((2, len(grid), *pixels.shape[1:]))
    for layer, tile in enumerate(grid):
        if share := observed(pixels[:, *tile.slices]).mean():
            votes[layer, *tile.slices] = network(pixels[None, :, *tile.slices])[0]
            weight = window("hann", side, side) * share
            weights[layer, *tile.slices] = np.maximum(np.rint(weight * 4096), 1)  # as documented
    with np.errstate(invalid="ignore"):  # pixels of unobserved tiles only
        mean = (votes * weights).sum(axis=0) / weights.sum(axis=0)
        variance = ((votes - mean) ** 2 * weights).sum(axis=0) / weights.sum(axis=0)
    variance[~observed(pixels)] = np.nan
    return np.sqrt(variance[: shape[0], : shape[1]])


def test_it_is_the_weighted_standard_deviation_of_the_tiles(scenes, bundle, tmp_path):
    out = tmp_path / "out"
    arguments = predict_command(scenes[0].parent, bundle, out, "--quiet", "--save_spread", "True")
    assert main(arguments) == 0
    for scene in scenes:
        spread = spread_of(out, scene)
        assert spread.dtype == np.float32
        np.testing.assert_allclose(spread, by_definition(bundle, scene), rtol=0, atol=4e-5)
        assert np.nanmax(spread) > 0.1
    # The masks are those of a run without it, whose folder has no such file.
    predict(scenes[0].parent, [bundle], tmp_path / "plain")
    assert len(rasters(out)) == 2 * len(rasters(tmp_path / "plain")) == 6
    for path in (tmp_path / "plain").glob("*.tif"):
        np.testing.assert_array_equal(read_tif(path), read_tif(out / path.name))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_other_scenes_change_no_bit(scenes, bundle, tmp_path, batch_size):
    predict(scenes[0].parent, [bundle], tmp_path / "together", save_spread=True)
    options = {"save_spread": True, "batch_size": batch_size}
    predict(scenes[1], [bundle], tmp_path / "alone", **options)
    alone, together = (spread_of(tmp_path / name, scenes[1]) for name in ("alone", "together"))
    np.testing.assert_array_equal(alone, together)


def test_it_is_0_where_one_tile_voted(bundle, tmp_path):
    """In 70 x 48 px without overlap only the last row of tiles is moved back, onto the others."""
    (scene,) = write_scenes(tmp_path / "scenes", [(70, 48)])
    options = {"sahi_overlap": 0, "sahi_tile_size": 24, "save_spread": True}
    predict(scene, [bundle], tmp_path / "out", **options)
    spread = spread_of(tmp_path / "out", scene)
    seen, twice = ~np.isnan(spread), np.zeros(spread.shape, bool)
    twice[70 - 24 : 48] = True
    np.testing.assert_array_equal(seen, observed(read_scene(scene)))
    assert (spread[seen & ~twice] == 0).all()
    assert (spread[seen & twice] > 0).mean() > 0.5  # some are sure in both


@pytest.mark.parametrize("tta", [False, True])
def test_networks_and_symmetries_are_averaged_before_a_tile_votes(tmp_path, monkeypatch, tta):
    """Two networks that disagree, but each says the same of a pixel whatever the tile."""
    use_pixel_network(monkeypatch)
    scenes = write_scenes(tmp_path / "scenes", SHAPES[:1])
    bundles = [biased_bundle(tmp_path / f"{bias}", bias) for bias in (-1.0, 1.0)]
    maps = []
    for number, bundle in enumerate(bundles):
        predict(scenes[0], [bundle], tmp_path / f"out{number}", save_probabilities=True)
        maps.append(read_tif(tmp_path / f"out{number}" / "AA000000_kelp_prob.tif")[0])
    assert np.nanmean(np.abs(maps[0] - maps[1])) > 0.05
    predict(scenes[0], bundles, tmp_path / "both", save_spread=True, tta=tta)
    spread = spread_of(tmp_path / "both", scenes[0])
    assert (spread[~np.isnan(spread)] == 0).all()


def test_it_has_the_place_and_the_form_of_the_probabilities(bundle, tmp_path):
    image, _ = coast((1030, 40), np.random.default_rng(1))
    place = {"crs": CRS.from_epsg(32719), "transform": Affine(30, 0, 4e5, 0, -30, -5.7e6)}
    scene = write_tif(tmp_path / "X_satellite.tif", image, **place)
    options = {"save_spread": True, "save_probabilities": True, "band_order": BANDS}
    result = predict(scene, [bundle], tmp_path / "out", **options)
    (path,), (soft_path,) = result.spreads, result.probabilities
    assert path == tmp_path / "out" / "X_kelp_spread.tif"
    assert georeference_of(path) == Georeference(**place)
    with opened(path) as spread, opened(soft_path) as soft:
        assert spread.profile.items() == {**soft.profile, "nodata": spread.nodata}.items()
        assert np.isnan(spread.nodata)
        assert spread.tags(ns="IMAGE_STRUCTURE") == soft.tags(ns="IMAGE_STRUCTURE")  # a COG
        assert spread.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert spread.overviews(1) == soft.overviews(1) != []
        assert spread.tags()["KELP_FINGERPRINT"] == soft.tags()["KELP_FINGERPRINT"]
        np.testing.assert_array_equal(np.isnan(spread.read(1)), np.isnan(soft.read(1)))


def test_it_is_made_when_wanted_and_does_not_outlive_its_run(scenes, bundle, tmp_path):
    out = tmp_path / "out"

    def run(**options):
        return predict(scenes[0].parent, [bundle], out, **options)

    assert run().spreads == ()
    assert run(save_spread=True).made == 3
    files = rasters(out)
    assert run(save_spread=True).made == 0
    (out / "AA000001_kelp_spread.tif").unlink()
    assert run(save_spread=True).made == 1
    assert rasters(out) == files
    assert run().made == 3
    assert not list(out.glob("*_kelp_spread.tif"))


def test_it_is_not_taken_for_a_scene(scenes, bundle):
    folder = scenes[0].parent
    assert predict(folder, [bundle], folder, save_spread=True).made == 3
    assert predict(folder, [bundle], folder, save_spread=True).skipped == 3


def test_the_disk_is_planned(scenes, bundle, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(module, "check_disk", lambda plan, folder: plans.append(plan))
    for spread in (False, True):
        predict(scenes[0], [bundle], tmp_path / str(spread), save_spread=spread)
    without, both = plans
    assert both.disk == pytest.approx(5 * without.disk, rel=0.001)  # a byte a pixel, and four


def test_memory_is_planned_for_the_sums_of_squares():
    """8 bytes for each pixel that waits, also in a journal, and those of rows being written."""
    scene, slicing = SceneSize((9000, 5000), (1, 5000), 14), Slicing((64, 64), (32, 32))
    plan = make_plan([scene], slicing, 1, 1)
    nothing = NetworkMemory(0, 0, 0)
    off, on = (
        fit_memory(plan, 10**12, [scene], slicing, nothing, spread).memory
        for spread in (False, True)
    )
    rows = 64 + 32  # a tile, and the overlap that a journal copies
    assert on - off == pytest.approx(1.1 * 5000 * (rows * 8 + 32 * (24 + 4)), rel=0.001)


def test_in_python(scenes, bundle, tmp_path):
    array = ArrayScene(read_scene(scenes[0]))
    kelp.predict(
        kelp.load_bundle(bundle),
        array,
        array,
        spread=array.write_spread,
        precision="32-true",
        device="cpu",
    )
    predict(scenes[0], [bundle], tmp_path, save_spread=True)
    np.testing.assert_array_equal(array.spread, spread_of(tmp_path, scenes[0]))
