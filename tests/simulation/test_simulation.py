"""Simulated scenes: their layout, that the seed decides every byte, and what they look like."""

import csv
import hashlib
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kelp.config import SimulateConfig
from kelp.errors import ConfigError, InputError
from kelp.raster.bands import BANDS, NODATA
from kelp.raster.masks import read_mask
from kelp.raster.scene import read_scene
from kelp.simulation import layout, nuisance, scene
from kelp.simulation.beds import density, grow, kelp_budget
from kelp.simulation.layout import simulate, tile_name
from kelp.simulation.scene import draw_labels, make_place, simulate_scene, take_picture
from kelp.simulation.sensor import missing, record
from kelp.simulation.terrain import Terrain, fractal, make_terrain
from kelp.simulation.world import WORLDS

SIZE = 64


def config(folder, **options):
    options = {"places": 3, "dates": 2, "test": 2, "size": SIZE, "workers": 1, **options}
    return SimulateConfig(output_dir=folder, **options)


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def table(folder):
    with (folder / "places.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    return simulate(config(folder))


@pytest.fixture(scope="module")
def scenes():
    """60 scenes of 128 x 160 px, every one of a place of its own."""
    seeds = np.random.SeedSequence(7).spawn(60)
    return [simulate_scene(np.random.default_rng(seed), 128, 160) for seed in seeds]


# ----------------------------------------------------------------------------------- layout


def test_layout_is_the_competitions(made):
    out, rows = made.folder, table(made.folder)
    train = {row["tile_id"] for row in rows if row["split"] == "train"}
    test = {row["tile_id"] for row in rows if row["split"] == "test"}
    assert (len(train), len(test)) == (made.train, made.test) == (6, 2)
    assert made.places == len({row["place"] for row in rows}) == 5
    assert all(re.fullmatch("[A-Z]{2}[0-9]{6}", tile_id) for tile_id in train | test)
    for folder, ids, suffix in (
        ("train/images", train, "_satellite.tif"),
        ("train/masks", train, "_kelp.tif"),
        ("train_truth", train, "_kelp.tif"),
        ("test/images", test, "_satellite.tif"),
        ("test_truth", test, "_kelp.tif"),
    ):
        assert {path.name for path in (out / folder).iterdir()} == {i + suffix for i in ids}
    assert not (out / "test/masks").exists()
    note = (out / "SIMULATED.md").read_text()
    assert "SIMULATED" in note
    assert "Nothing\nhere was seen by a satellite" in note
    assert (out / "kelp-simulate.yaml").exists()
    assert "6 training and 2 test images (SIMULATED)" in made.summary()


def test_no_unfinished_file_is_left(made):
    assert not list(made.folder.rglob(".*"))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_files_have_the_competitions_format(made):
    for path in made.folder.rglob("*.tif"):
        image = path.name.endswith("_satellite.tif")
        with rasterio.open(path) as dataset:
            assert dataset.shape == (SIZE, SIZE)
            assert dataset.count == (7 if image else 1)
            assert set(dataset.dtypes) == {"int32" if image else "int8"}
            assert dataset.compression.name == "lzw"
            assert dataset.crs is None
            assert dataset.nodata is None
            assert not dataset.profile["tiled"]
            if image:
                assert dataset.interleaving.name == "pixel"
            pixels = dataset.read()
        if not image:
            assert set(np.unique(pixels)) <= {0, 1}
            continue
        optical = pixels[:5][pixels[:5] != -32768]
        assert optical.min() >= 1
        assert optical.max() <= 65_535
        assert set(np.unique(pixels[5])) <= {0, 1}
        assert pixels[6][pixels[6] != -32768].min() >= 0


def test_an_empty_mask_has_the_bytes_of_the_competitions():
    content = layout._encode(np.zeros((1, 350, 350), dtype=np.int8))
    assert len(content) == 2545
    assert hashlib.md5(content).hexdigest() == "72bad993b1a6fede6acfea561da9ff22"


def test_kelp_itself_reads_what_it_simulates(made):
    tile_id = table(made.folder)[0]["tile_id"]
    pixels = read_scene(made.folder / f"train/images/{tile_id}_satellite.tif")
    assert pixels.shape == (7, SIZE, SIZE)
    assert pixels.dtype == np.float32
    assert read_mask(made.folder / f"train/masks/{tile_id}_kelp.tif").shape == (SIZE, SIZE)


def test_progress_counts_images(tmp_path):
    seen = []
    simulate(config(tmp_path, size=16), lambda *step: seen.append(step))
    assert seen[-1] == ("simulating", 8, 8)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_other_data_is_not_mixed_with_simulated(made, tmp_path):
    simulate(config(tmp_path, size=16))
    with pytest.raises(ConfigError, match="holds other data"):
        simulate(config(tmp_path, size=16, places=2))
    with pytest.raises(ConfigError, match="holds other data"):
        simulate(config(tmp_path, size=16, seed=1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        simulate(config(tmp_path / "file", size=16))


def test_a_run_that_ends_early_vouches_for_nothing(tmp_path, monkeypatch):
    def fail(stage, done, total):
        if done >= 4:
            raise KeyboardInterrupt

    simulate(config(tmp_path, size=16))
    with pytest.raises(KeyboardInterrupt):
        simulate(config(tmp_path, size=16), fail)
    assert not (tmp_path / "SIMULATED.md").exists()
    assert not (tmp_path / "places.csv").exists()
    assert not list(tmp_path.rglob(".*"))


# ------------------------------------------------------------------------------ determinism


def test_bytes_do_not_depend_on_workers(made, tmp_path):
    simulate(config(tmp_path, workers=2))
    assert digests(tmp_path) == digests(made.folder)


def test_another_seed_is_another_data_set(made, tmp_path):
    simulate(config(tmp_path, seed=1))
    assert not set(digests(tmp_path).values()) & {
        digest for name, digest in digests(made.folder).items() if name.endswith("_satellite.tif")
    }


def test_more_places_leave_the_first_ones_as_they_are(made, tmp_path):
    simulate(config(tmp_path, places=4, test=3))
    more = digests(tmp_path)
    for name, digest in digests(made.folder).items():
        if name.endswith(".tif"):
            assert more[name] == digest


def test_names_are_unique():
    assert len({tile_name(number, 0) for number in range(20_000)}) == 20_000


def test_a_seed_and_its_generator_give_the_same_scene():
    one, other = simulate_scene(3, 40, 50), simulate_scene(np.random.default_rng(3), 40, 50)
    for name in ("pixels", "truth", "label"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


# ----------------------------------------------------------------------------------- places


def test_images_of_a_place_show_the_same_terrain_at_their_offsets(tmp_path):
    out = simulate(config(tmp_path, places=8, test=0)).folder
    images: dict[str, list[tuple[int, int, str]]] = {}
    for row in table(out):
        images.setdefault(row["place"], []).append((int(row["dy"]), int(row["dx"]), row["tile_id"]))
    heights = 0
    for (y0, x0, first), (y1, x1, second) in images.values():
        dems = []
        for y, x, tile_id in ((y1 - y0, x1 - x0, first), (y0 - y1, x0 - x1, second)):
            dem = read_scene(out / f"train/images/{tile_id}_satellite.tif")[6]
            dems.append(dem[max(0, y) : SIZE + min(0, y), max(0, x) : SIZE + min(0, x)])
        assert np.array_equal(*dems, equal_nan=True)
        heights += np.unique(dems[0]).size
    assert heights > 40  # there was terrain to compare
    assert len({(y, x) for place in images.values() for y, x, _ in place}) == 16


def test_dates_differ_in_everything_but_terrain():
    place = make_place(np.random.default_rng(1), (96, 96))
    first, second = (
        take_picture(np.random.default_rng(seed), place, (0, 0), (96, 96)) for seed in (1, 2)
    )
    assert np.array_equal(first.pixels[6], second.pixels[6])
    assert (first.pixels[:5] == second.pixels[:5]).mean() < 0.2


def test_a_picture_is_cut_at_its_offset():
    place = make_place(np.random.default_rng(5), (60, 70))
    picture = take_picture(np.random.default_rng(0), place, (9, 4), (50, 60))
    y, x = 9 + scene.MARGIN, 4 + scene.MARGIN
    assert np.unique(picture.pixels[6]).size > 5
    assert np.array_equal(picture.pixels[6], place.terrain.dem[y : y + 50, x : x + 60])


def test_beds_of_a_place_come_back_where_they_were():
    """Two dates of a place, at two offsets, share a good part of their kelp."""
    shared = grown = 0
    for seed in range(40):
        place = make_place(np.random.default_rng(seed), (152, 144))
        sites = replace(place.sites, abundance=0.0)  # kelp at most dates
        beds = np.zeros((2, *place.terrain.shape), dtype=bool)
        for date, (y, x) in enumerate([(0, 0), (24, 16)]):
            rng = np.random.default_rng((seed, date))
            part = np.s_[y : y + 128, x : x + 128]
            seen = Terrain(*(getattr(place.terrain, f.name)[part] for f in fields(Terrain)))
            beds[date][part] = grow(rng, seen, sites, (y, x)) > 0
        both = beds[:, 24:128, 16:128]
        shared += both.all(axis=0).sum()
        grown += both.any(axis=0).sum()
    assert 0.1 < shared / grown < 0.8  # 0.05 if every date chose its beds again


# ------------------------------------------------------------------------------ appearance


def test_scenes_of_any_shape():
    for height, width in ((16, 16), (1, 40), (75, 33), (410, 640)):
        made = simulate_scene(0, height, width)
        assert made.pixels.shape == (7, height, width)
        assert made.pixels.dtype == np.int32
        assert made.truth.shape == made.label.shape == (height, width)
        assert made.truth.dtype == made.label.dtype == np.uint8


def test_share_of_kelp(scenes):
    """Published: 62.6 % of images and 0.68 % of pixels; binomial and heavy-tailed errors."""
    with_kelp = np.mean([made.truth.any() for made in scenes])
    assert 0.45 < with_kelp < 0.8
    assert 0.002 < np.mean([made.truth.mean() for made in scenes]) < 0.02


def test_kelp_is_brighter_in_the_infrared_by_about_a_thousand(scenes):
    """Published: mean 1028, sd 763 of labels above the water's median; NDVI 0.052.

    Every scene counts once, and only its truth: few scenes hold most of the kelp px, and a
    label that is far off would decide the result of all.
    """
    offsets, ndvi = [], []
    for made in scenes:
        nir, red = (made.pixels[band].astype(float) for band in (1, 2))
        seen = (nir > 0) & (red > 0)
        kelp, water = (made.truth > 0) & seen, (made.pixels[6] == 0) & (made.truth == 0) & seen
        if kelp.any() and water.any():
            offsets.append(np.mean(nir[kelp]) - np.median(nir[water]))
            ndvi.append(np.mean(((nir - red) / (nir + red))[kelp]))
    assert len(offsets) > 20
    assert 600 < np.median(offsets) < 1400
    assert 0.03 < np.median(ndvi) < 0.08


def test_land_water_and_clouds_have_their_numbers(scenes):
    """Published medians: water NIR 7719, SWIR 7484; land NIR 16362, SWIR 14805."""
    water, land = [], []
    for made in scenes:
        clear = (made.pixels[5] == 0) & (made.pixels[:5] > 0).all(axis=0) & (made.truth == 0)
        dem = made.pixels[6]
        inland = ndimage.binary_erosion(dem > 0, iterations=3) & clear
        water.append(made.pixels[:2, (dem == 0) & clear])
        land.append(made.pixels[:2, inland])
    water, land = np.concatenate(water, axis=1), np.concatenate(land, axis=1)
    assert np.abs(np.median(water, axis=1) - (7484, 7719)).max() < 150
    assert np.abs(np.median(land, axis=1) - (14_805, 16_362)).max() < 700
    cloudy = np.concatenate([made.pixels[1][made.pixels[5] == 1] for made in scenes])
    assert np.quantile(cloudy, 0.95) > 18_000


def test_bad_pixels_are_flagged_as_often_as_published(scenes):
    """Published: QA mean 0.070, sd 0.138; some bands missing in 15-24 % of images."""
    assert 0.02 < np.mean([made.pixels[5].mean() for made in scenes]) < 0.16
    lacking = np.mean([(made.pixels[:5] == -32768).any() for made in scenes])
    assert 0.1 < lacking < 0.5


def test_labels_resemble_the_truth_and_do_not_equal_it(scenes):
    drawn, both, true = (
        sum(np.sum(value(made)) for made in scenes)
        for value in (lambda m: m.label, lambda m: m.label & m.truth, lambda m: m.truth)
    )
    assert 0.55 < 2 * both / (drawn + true) < 0.95


def test_one_threshold_does_not_find_the_kelp(scenes):
    """Published: the best threshold of NIR reaches a Dice of 0.117, of ODVI 0.252."""
    feature, label = [], []
    for made in scenes:
        nir, red = (made.pixels[band].astype(float) for band in (1, 2))
        water = (made.pixels[6] < 1) & (nir > 0) & (red > 0)
        if water.any():
            odvi = nir - red
            feature.append((odvi - np.median(odvi[water]))[water])
            label.append(made.label[water])
    feature, label = np.concatenate(feature), np.concatenate(label).astype(bool)
    best = max(
        2 * (label & (feature > level)).sum() / (label.sum() + (feature > level).sum())
        for level in np.arange(100, 2000, 100)
    )
    assert 0.08 < best < 0.5


def test_kelp_stands_in_water(scenes):
    for made in scenes:
        inland = ndimage.binary_erosion(made.pixels[6] > 0, iterations=4)
        assert not made.truth[inland].any()
        assert not made.label[inland].any()


# ------------------------------------------------------------------------------------ parts


def test_fractal_fields_have_their_spectrum():
    rng = np.random.default_rng(0)
    field = fractal(rng, (300, 420), 2.0, 100)
    assert field.dtype == np.float32
    assert field.shape == (300, 420)
    many = np.stack([fractal(rng, (100, 130), 1.5, 20) for _ in range(20)])
    assert abs(many.std() - 1) < 0.1
    assert abs(many.mean()) < 0.1
    rough, smooth = (
        np.diff(fractal(np.random.default_rng(1), (200, 200), slope, 50), axis=0).std()
        for slope in (1.25, 2.5)
    )
    assert smooth < rough / 3


def test_kelp_budget_has_the_published_quantiles():
    """Published, of labels: q50 112, q75 880, 62.6 % with kelp; more grows than is labelled."""
    rng = np.random.default_rng(0)
    draws = np.array([kelp_budget(rng, rng.standard_normal(), 1.0)[0] for _ in range(4000)])
    assert 0.6 < (draws > 0).mean() < 0.7
    assert 70 < np.median(draws) < 220
    assert 700 < np.quantile(draws, 0.75) < 1500


def test_worlds_differ_as_they_say():
    """Over the same terrain and sites: more patches, stronger contrast, more clouds and errors."""
    counts, kelp_nir, cloudy, wrong = {}, {}, {}, {}
    for name, world in WORLDS.items():
        counts[name], kelp_nir[name], cloudy[name], wrong[name] = 0, [], [], []
        for seed in range(24):
            rng = np.random.default_rng(seed)
            made = take_picture(rng, make_place(rng, (200, 200), world), (0, 0), (200, 200))
            truth, nir = made.truth > 0, made.pixels[1]
            clear = (made.pixels[5] == 0) & (nir > 0)
            water = clear & ~truth & (made.pixels[6] <= 0)
            counts[name] += ndimage.label(truth, np.ones((3, 3)))[1]
            cloudy[name].append(made.pixels[5].mean())
            if (truth & clear).sum() > 20:
                kelp_nir[name].append(np.median(nir[truth & clear]) - np.median(nir[water]))
                wrong[name].append((truth != (made.label > 0)).sum() / truth.sum())
    assert counts["specks"] > 1.8 * counts["calibrated"]
    assert np.median(kelp_nir["specks"]) > 1.2 * np.median(kelp_nir["calibrated"])
    assert np.mean(cloudy["murky"]) > 1.2 * np.mean(cloudy["calibrated"])
    assert np.mean(wrong["murky"]) > 1.1 * np.mean(wrong["calibrated"])


def test_terrain_is_a_coast():
    terrains = [make_terrain(np.random.default_rng(seed), (120, 90)) for seed in range(30)]
    shares = [terrain.land.mean() for terrain in terrains]
    assert min(shares) < 0.1
    assert max(shares) > 0.5
    for terrain in terrains:
        assert (terrain.offshore[terrain.land] == 0).all() or not terrain.land.any()
        known = terrain.dem != -32768
        assert (terrain.dem[terrain.land & known] >= 1).all()


def test_labels_avoid_land_and_move_little():
    patches = np.zeros((80, 100), dtype=np.int32)
    patches[30:45, 40:60] = 1
    land = np.zeros(patches.shape, dtype=bool)
    land[:35] = True
    far = []
    for seed in range(80):
        label = draw_labels(np.random.default_rng(seed), patches, land & False, land)
        assert not label[land].any()
        if label.any():
            _, x = ndimage.center_of_mass(label)
            far.append(abs(x - 49.5))
    assert 0.65 < np.mean(np.array(far) <= 1.5) < 0.95
    assert max(far) > 3


def test_missing_pixels_and_their_flag():
    optical = np.random.default_rng(0).normal(8000, 100, (5, 150, 200)).astype(np.float32)
    striped = told_share = 0
    for seed in range(200):
        masks, told = missing(np.random.default_rng(seed), optical)
        if all(mask.any() for mask in masks):
            striped += 1
            told_share += told.any()
    assert 15 <= striped <= 48  # 15 % of 200
    assert striped * 0.7 < told_share <= striped


def test_an_eight_bit_sensor_combs_the_values():
    optical = np.random.default_rng(0).normal(8000, 500, (5, 60, 70)).astype(np.float32)
    levels = [
        len(np.unique(record(np.random.default_rng(seed), optical.copy(), optical[0] * 0)[1]))
        for seed in range(40)
    ]
    combed = np.mean(np.array(levels) < 60)
    assert 0.4 < combed < 0.8


def test_truth_is_what_can_be_seen(monkeypatch):
    """Kelp under opaque clouds and in gaps is in no mask."""

    def overcast(rng, optical, world):
        shape = optical.shape[1:]
        return np.ones(shape, dtype=bool), np.ones(shape, dtype=np.float32)

    monkeypatch.setattr(scene.sensor, "add_clouds", overcast)
    for seed in range(5):
        assert not simulate_scene(seed, 60, 80).truth.any()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 40), width=st.integers(1, 40))
def test_scenes_of_any_size(seed, height, width):
    made = simulate_scene(seed, height, width)
    assert made.pixels.shape == (len(BANDS), height, width)
    assert made.truth.shape == made.label.shape == (height, width)
    assert made.pixels.min() >= NODATA
    assert np.array_equal(made.pixels, simulate_scene(seed, height, width).pixels)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 12), width=st.integers(1, 12))
def test_labels_of_small_scenes(seed, height, width):
    patches = np.ones((height, width), dtype=np.int32)
    none = np.zeros((height, width), dtype=bool)
    assert draw_labels(np.random.default_rng(seed), patches, none, none).shape == (height, width)


def test_land_brightens_the_water_beside_it():
    world = replace(WORLDS["varied"], adjacency=0.5)
    rng = np.random.default_rng(0)
    seen = make_place(rng, (350, 350), world).terrain
    surface = np.where(seen.land, np.float32(16_000), np.float32(7700))
    surface = np.repeat(surface[np.newaxis], 5, axis=0)
    before = surface.copy()
    nuisance.scatter(np.random.default_rng(1), surface, seen, world)
    water = (seen.offshore > 0) & ~seen.land
    near, far = water & (seen.offshore < 4), water & (seen.offshore > 80)
    assert (surface - before)[1, near].mean() > 100
    assert np.abs(surface - before)[1, far].mean() < 20
    np.testing.assert_array_equal(surface[:, seen.land], before[:, seen.land])


def test_beds_are_no_fainter_than_the_world_has_them():
    patches = np.ones((60, 60), dtype=np.int32)
    faint = replace(WORLDS["varied"], cover=0.03, cover_spread=0.0, faintest=0.1)
    covers = [density(np.random.default_rng(k), patches, faint).mean() for k in range(20)]
    assert min(covers) > 0.05
    assert 0.08 < np.mean(covers) < 0.12
