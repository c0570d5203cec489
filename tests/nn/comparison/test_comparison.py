"""`kelp compare`: figures by hand, honest thresholds, and advice that may be "do not slice"."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from affine import Affine
from bundles import PixelBody, tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Memory
from torch.nn import functional
from world import make_world, read_tif, write_tif

import kelp
from kelp.cli import main
from kelp.config import CompareConfig, ExportConfig
from kelp.errors import BugError, BundleError, ConfigError, InputError, TableError
from kelp.evaluation.confusion import Figures
from kelp.evaluation.metrics import FIGURES
from kelp.evaluation.thresholds import Histogram
from kelp.inference.bundle import load_bundle
from kelp.nn.comparison.result import FIELDS
from kelp.nn.comparison.scenes import labelled_scenes
from kelp.nn.comparison.variants import Runtime, Variant, majority, variants_of
from kelp.nn.model import ARCHITECTURES
from kelp.raster.bands import BANDS
from kelp.raster.masks import read_mask
from kelp.raster.probability import CODES, quantise
from kelp.raster.scene import Scene
from kelp.raster.writer import write_mask
from kelp.tiling.grid import TileGrid


class Shy(PixelBody):
    """Sees kelp only in pictures of at most 64 px: a network for which slicing pays."""

    def forward(self, x):
        return super().forward(x) - 100 * (max(x.shape[-2:]) > 64)


class Edgy(PixelBody):
    """Sees less at the edge of what it is shown."""

    def forward(self, x):
        return functional.avg_pool2d(super().forward(x) + 9, 9, 1, 4) - 9


class Wide(PixelBody):
    """Sees kelp only in pictures of more than 64 px: slicing ruins it."""

    def forward(self, x):
        return super().forward(x) - 100 * (max(x.shape[-2:]) <= 64)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_the_seeds_map_is_the_majority_of_hard_votes_at_any_threshold(seed, threshold):
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, 20, (4, 6, 7)).astype(np.float32) / 20  # with ties
    layers[:, :3][rng.random((4, 3, 7)) < 0.5] = np.nan  # some pixels have fewer tiles
    votes, tiles = (layers >= threshold).sum(axis=0), np.isfinite(layers).sum(axis=0)
    np.testing.assert_array_equal(majority(layers) >= threshold, 2 * votes > tiles)
    np.testing.assert_array_equal(np.isnan(majority(layers)), tiles == 0)


# The command


def compare(folder, monkeypatch, body, bundle=None, **options):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: body(spec.channels))
    values = {
        "data_dir": folder / "images",
        "gt_dir": folder / "masks",
        "metadata_fp": folder / "places.parquet",
        "run_dir": (tiny_bundle(folder / "bundle", **(bundle or {})),),
        "output_dir": folder / "out",
        "precision": "32-true",
        "device": "cpu",
        "draws": 300,
    }
    return kelp.compare(CompareConfig(**(values | options)))


def test_where_slicing_cannot_help_the_command_says_not_to(labelled, monkeypatch, capsys):
    """A network that decides pixel by pixel, at the scale of the scene."""
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: PixelBody(spec.channels))
    bundle = tiny_bundle(labelled / "bundle", resize_strategy="pad", image_size=32)
    code = main(
        [
            "compare",
            f"--run_dir={bundle}",
            f"--data_dir={labelled / 'images'}",
            f"--gt_dir={labelled / 'masks'}",
            f"--metadata_fp={labelled / 'places.parquet'}",
            f"--output_dir={labelled / 'out'}",
            "--precision=32-true",
            "--device=cpu",
            "--draws=300",
        ]
    )
    assert code == 0
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["advice"]["slice"] is False
    assert "Do not slice, no gain can be shown: +0.000 Dice" in capsys.readouterr().out
    whole, *others = [way for way in told["ways"] if way["kind"] != "seed"]
    assert len(others) >= 3
    assert whole["figures"]["pooled_dice"]["value"] > 0.2
    own = {"seam_score", "pooled_dice_of_labels"}  # of the tiles of a way; of no labels here
    for way in others:
        for name in set(FIGURES) - own:
            assert way["figures"][name]["value"] == whole["figures"][name]["value"]
            difference = way["figures"][name]["difference"]
            assert difference["value"] in (0, None)
            assert difference["low"] == difference["high"] == difference["value"]
    assert told["advice"]["difference"] == {"value": 0, "low": 0, "high": 0}


def test_where_slicing_helps_it_says_so(labelled, monkeypatch):
    result = compare(labelled, monkeypatch, Shy)
    assert result.advice.slice
    assert re.match(r"Slice: \+0\.\d+ Dice, 95 % interval \+0", result.advice.text)
    assert "6 sites only" in result.advice.text


def test_where_slicing_harms_it_says_so(labelled, monkeypatch):
    result = compare(labelled, monkeypatch, Wide, {"resize_strategy": "pad", "image_size": 32})
    assert not result.advice.slice
    assert result.advice.text.startswith("Do not slice, it harms: -")


def fields_of(value, path=""):
    """The fields of JSON as `FIELDS` spells them."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from fields_of(part, path + "[]")
        return
    if path and not path.endswith((".figures", ".*")):
        yield path
    if isinstance(value, dict) and path != "fields" and not path.endswith("*.difference"):
        for name, part in value.items():
            if path.endswith(".figures"):
                yield f"{path}.{name}"
            below = "*" if path.endswith(".figures") else name
            yield from fields_of(part, f"{path}.{below}".strip("."))


def test_the_files_tell_all(labelled, monkeypatch):
    result = compare(
        labelled, monkeypatch, Shy, tta=True, tile_sizes=(24,), interpolations=("bilinear",)
    )
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["advice"]["text"] == result.advice.text
    assert (told["images"], told["places"], told["left_out"]) == (12, 6, [])
    names = [way["name"] for way in told["ways"]]
    assert names == [
        "whole image",
        "whole image, enlarged 2 times",
        "sliced 32 px, overlap 16 px, hann",
        "sliced 32 px, overlap 16 px, mean",
        "sliced 32 px, overlap 0 px, hann",
        "sliced 24 px, overlap 12 px, hann",
        "sliced 32 px, overlap 16 px, hann, bilinear",
        "sliced 32 px, overlap 16 px, hann, 8 symmetries",
        "the seed's merge",
    ]
    ways = dict(zip(names, told["ways"], strict=True))
    for way in told["ways"]:
        assert way["seconds_per_image"] > 0
        assert len(way["reliability"]) == 10
    # 100 x 90 px: tiles of 32 with overlap 16 begin at 6 rows and 5 columns; 36 + 6 padded ones.
    crops = {name: way["network_pixels_per_image"] / 64**2 for name, way in ways.items()}
    assert crops["sliced 32 px, overlap 16 px, hann"] == 6 * 5
    assert crops["sliced 32 px, overlap 16 px, hann, 8 symmetries"] == 8 * 30
    assert ways["whole image"]["network_pixels_per_image"] == 128 * 128
    assert ways["whole image, enlarged 2 times"]["network_pixels_per_image"] == 224 * 224
    page = (labelled / "out" / "report.html").read_text()
    assert result.advice.text.split(":")[0] in page
    assert page.count("<img") >= 3
    assert (labelled / "out" / "comparison.txt").read_text().rstrip() == result.text
    assert sorted(p.name for p in (labelled / "out").iterdir()) == [
        "comparison.json",
        "comparison.txt",
        "kelp-compare.yaml",
        "report.html",
    ]


def test_a_variant_is_what_prediction_does(labelled, monkeypatch):
    """The sliced variant, at the bundle's threshold, scores as its masks do."""
    result = compare(labelled, monkeypatch, Shy, decision_threshold=0.4)
    bundle = load_bundle(labelled / "bundle")
    scores = Figures()
    for path in sorted((labelled / "images").glob("*.tif")):
        out = labelled / "mask.tif"
        kelp.predict(bundle, path, out, tile=32, overlap=16, blend="hann", precision="32-true")
        truth = read_mask(labelled / "masks" / path.name.replace("satellite", "kelp"))
        scores = scores.plus(Figures.of(truth, read_mask(out)))
    (one,) = [
        one
        for one in result.comparison.evaluations
        if one.name == "sliced 32 px, overlap 16 px, hann"
    ]
    value = one.figure("pooled_dice").value
    assert value == pytest.approx(scores.pooled_dice, abs=2e-3)  # probabilities in steps of 0.004


def test_the_seeds_merge_is_a_majority_of_hard_votes(labelled, monkeypatch):
    """Pixel by pixel all tiles vote alike, so the majority is the tiles' own decision."""
    settings = {"resize_strategy": "pad", "image_size": 32, "threshold": 0.48}
    result = compare(labelled, monkeypatch, PixelBody, settings, decision_threshold=0.48)
    by_kind = {one.variant.kind: one for one in result.comparison.evaluations}
    seeds, whole = by_kind["seed"].totals.total, by_kind["whole"].totals.total
    # 255 in neither: the seed knew no "not observed", so it may find kelp under clouds only.
    assert float(seeds["tp"]) >= float(whole["tp"]) > 0
    assert float(seeds["fn"]) <= float(whole["fn"])


def test_the_seeds_merge_row_by_row_is_that_of_whole_layers(labelled, monkeypatch):
    """A network that pads with 0 and looks around: tiles differ, so their order would show."""
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: Edgy(spec.channels))
    bundle = load_bundle(tiny_bundle(labelled / "b", resize_strategy="pad", image_size=32))
    variant = variants_of(bundle, "", 32, (), (), (), tta=False)[-1]
    path = labelled / "images" / "K00_satellite.tif"
    runtime = Runtime(torch.device("cpu"), "32-true")
    with Scene(path) as scene:
        sink = Memory(np.empty((1, *scene.shape)))
        variant.run(scene, sink, runtime, qa_as_nodata=True)
        grid = TileGrid(scene.shape, 32, 16, edge="pad")
        votes = np.full((len(grid), 112, 96), np.nan, np.float32)
        for k, tile in enumerate(grid):
            inside = tile.clipped(scene.shape)
            raw = torch.from_numpy(scene.read(inside))[None]
            with torch.inference_mode():
                net = bundle.net.module
                x = net.preprocess(raw)
                x = functional.pad(x, (0, 32 - inside.width, 0, 32 - inside.height))
                p = torch.sigmoid(net.body(x))[0, 0].numpy()
            votes[k][inside.slices] = p[: inside.height, : inside.width]
    wanted = majority(votes)[:100, :90]
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(sink.result, wanted, atol=1e-6)


def test_a_threshold_never_saw_the_sites_it_is_used_on(labelled, monkeypatch):
    first = compare(labelled, monkeypatch, PixelBody)
    part = {}
    order = np.random.default_rng(0).permutation(6)
    for k, place in enumerate(order):
        part[place] = k
    for k in range(12):  # ruin the labels of one part
        if part[k // 2] == 0:
            path = labelled / "masks" / f"K{k:02d}_kelp.tif"
            write_mask(path, (read_mask(path) == 0).astype(np.uint8))
    second = compare(labelled, monkeypatch, PixelBody)
    for before, after in zip(
        first.comparison.evaluations, second.comparison.evaluations, strict=True
    ):
        assert before.thresholds[0] == after.thresholds[0]
    changed = [
        before.thresholds[1:] != after.thresholds[1:]
        for before, after in zip(
            first.comparison.evaluations, second.comparison.evaluations, strict=True
        )
    ]
    assert any(changed)


class Blurred(PixelBody):
    """Loses small patches in pictures of more than 64 px."""

    def forward(self, x):
        p = super().forward(x)
        if max(x.shape[-2:]) <= 64:
            return p
        return functional.avg_pool2d(p, 5, 1, 2)


def test_recall_at_the_precision_of_the_whole_image_and_every_field_is_told(labelled, monkeypatch):
    comparison = compare(labelled, monkeypatch, Blurred).comparison
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["fields"] == FIELDS
    assert set(fields_of(told)) == set(FIELDS)
    ways = {way["name"]: way["at_equal_precision"] for way in told["ways"]}
    name = told["advice"]["whole"]
    whole = next(one for one in comparison.evaluations if one.name == name)
    main = next(one for one in comparison.equal if one.variant.kind == "sliced")
    part = dict(zip(np.random.default_rng(0).permutation(6), range(6), strict=True))

    sites = [k // 2 for k in range(12)]

    def precisions(variant, k):
        """At every threshold, on the sites outside part `k`."""
        counted = Histogram.empty(())
        for number, site in enumerate(sites):
            if part[site] != k:
                with Scene(labelled / "images" / f"K{number:02d}_satellite.tif") as scene:
                    sink = Memory(np.empty((1, *scene.shape)))
                    variant.run(scene, sink, Runtime(torch.device("cpu"), "32-true"), True)
                truth = read_mask(labelled / "masks" / f"K{number:02d}_kelp.tif")
                counted.add((), truth, quantise(sink.result))
        return counted.precision()

    for k in (0, 3):
        wanted = precisions(whole.variant, k)[round(whole.thresholds[k] * CODES)]
        reached = precisions(main.variant, k)
        threshold = round(main.thresholds[k] * CODES)
        assert reached[threshold] >= wanted
        assert not (reached[1:threshold] >= wanted).any()  # it is the lowest
    assert ways[name]["figures"]["recall"]["difference"]["value"] is None
    gain = ways[main.name]["figures"]["recall"]["difference"]
    assert gain["value"] > 0
    text = (labelled / "out" / "comparison.txt").read_text()
    assert f"At the precision of: {name}" in text
    assert "At the precision of" in (labelled / "out" / "report.html").read_text()


def test_two_bundles_and_scenes_too_large_for_one_pass(labelled, monkeypatch, caplog):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: Shy(spec.channels))
    pair = (
        tiny_bundle(labelled / "other", resize_strategy="pad", image_size=32),
        tiny_bundle(labelled / "bundle2"),
    )
    with caplog.at_level("INFO", "kelp"):
        compare(labelled, monkeypatch, Shy, run_dir=pair, largest_pass=200)
    told = json.loads((labelled / "out" / "comparison.json").read_text())
    assert told["left_out"] == ["bundle2: whole image, enlarged 2 times"]
    assert "left out, larger than --largest_pass 200" in caplog.text
    assert {way["name"].partition(":")[0] for way in told["ways"]} == {"other", "bundle2"}
    nothing = compare(labelled, monkeypatch, Shy, largest_pass=64)
    assert nothing.advice.slice
    assert "too large to be shown to a network at once" in nothing.advice.text


def test_with_both_kinds_of_networks_it_tells_what_to_train_on(labelled, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: Shy(spec.channels))
    whole = tiny_bundle(labelled / "whole", sahi=False, resize_strategy="pad", image_size=128)
    pair = (whole, tiny_bundle(labelled / "tiles"))
    advice = compare(labelled, monkeypatch, Shy, run_dir=pair).advice
    told = json.loads((labelled / "out" / "comparison.json").read_text())["advice"]
    assert told["training"]["low"] > 0
    start = "In training: slice, +0."
    assert advice.text.startswith(start)
    assert "hann against whole: whole image). At prediction: Slice: +0." in advice.text
    blind = compare(labelled, monkeypatch, Wide, run_dir=pair).advice
    assert blind.text.startswith("In training: do not slice, -0.")
    # Of one kind only, nothing is said about training.
    assert compare(labelled, monkeypatch, Shy).advice.training is None


def test_wrong_input_is_one_line(labelled, monkeypatch, capfd):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: PixelBody(spec.channels))
    bundle = tiny_bundle(labelled / "bundle")
    config = {"data_dir": labelled / "images", "gt_dir": labelled / "masks", "run_dir": (bundle,)}
    config |= {"output_dir": labelled / "out"}
    with pytest.raises(ConfigError, match=r"overlaps=32: must lie between 0 and 31 px"):
        kelp.compare(CompareConfig(**config, overlaps=(32,)))
    model_file = labelled / "model.onnx"
    kelp.export(ExportConfig(run_dir=bundle, output_path=model_file))
    with pytest.raises(ConfigError, match="name the run it was exported from"):
        kelp.compare(CompareConfig(**{**config, "run_dir": (model_file,)}))
    with pytest.raises(ConfigError, match="run_dir is missing"):
        kelp.compare(CompareConfig(**{**config, "run_dir": ()}))
    with pytest.raises(ConfigError, match="largest_pass=32: no variant shows"):
        kelp.compare(CompareConfig(**config, largest_pass=32))
    truth = labelled / "masks" / "K03_kelp.tif"
    write_mask(truth, np.zeros((90, 100), np.uint8))
    folders = (config["data_dir"], config["gt_dir"])
    with pytest.raises(InputError, match=r"K03_kelp\.tif does .* 90 x 100 pixels against 100"):
        labelled_scenes(CompareConfig(**config), [load_bundle(bundle)], *folders)
    truth.unlink()
    arguments = [f"--{name}={value}" for name, value in config.items() if name != "run_dir"]
    assert main(["compare", *arguments, f"--run_dir={bundle}", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "K03_kelp.tif: no such truth, 1 of 12 scenes have none" in line
    (labelled / "images" / "K03_satellite.tif").write_bytes(b"no tif")
    write_mask(labelled / "masks" / "K03_kelp.tif", np.zeros((100, 90), np.uint8))
    with pytest.raises(InputError, match=r"1 of 12 scenes failed, .*K03_satellite\.tif"):
        labelled_scenes(CompareConfig(**config), [load_bundle(bundle)], *folders)


def test_scenes_that_fail_are_left_out_and_named(labelled, monkeypatch, caplog):
    """One cannot be read, one meets a bug after a variant has seen it."""
    (labelled / "images" / "K03_satellite.tif").write_bytes(b"no tif")
    run, seen = Variant.run, []

    def broken(variant, scene, *others):
        seen.append(scene.path.name)
        if seen[-1] == "K05_satellite.tif" and seen.count(seen[-1]) == 2:
            return 1 / 0
        return run(variant, scene, *others)

    monkeypatch.setattr(Variant, "run", broken)
    with pytest.raises(BugError, match=r"2 of 12 scenes failed, the rest is done: .*K03_.*K05_"):
        compare(labelled, monkeypatch, PixelBody)
    assert "1 of 12 scenes are left out: " in caplog.text
    (log,) = labelled.rglob("kelp-errors.log")
    assert "ZeroDivisionError" in log.read_text()
    monkeypatch.setattr(Variant, "run", run)
    figures = json.loads((log.parent / "comparison.json").read_text())
    for name in ("K03", "K05"):
        (labelled / "images" / f"{name}_satellite.tif").unlink()
    compare(labelled, monkeypatch, PixelBody)
    again = json.loads((log.parent / "comparison.json").read_text())
    assert figures["images"] == again["images"] == 10
    for one, other in zip(figures["ways"], again["ways"], strict=True):
        assert one["figures"]["pooled_dice"] == other["figures"]["pooled_dice"]


# Without folders: the fold that the runs share


@pytest.fixture
def fold(tmp_path, monkeypatch):
    """Six images in two folds, their table of tiles, and what makes a bundle of a run on either."""
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: PixelBody(spec.channels))
    world = make_world(tmp_path, n_train=6, n_test=1)
    rows = pd.read_parquet(world.table)
    rows = rows[rows["original_split"] == "train"]
    tiles = rows.loc[rows.index.repeat(2)].assign(
        x=[0, 32] * 6,
        y=0,
        tile_height=32,
        tile_width=32,
        image_path=None,
        mask_path=None,
        source_image_path="../raw/" + rows["image_path"].repeat(2),
        source_mask_path="../raw/" + rows["mask_path"].repeat(2),
    )
    (tmp_path / "sahi").mkdir()
    tiles.to_parquet(tmp_path / "sahi" / "tiles.parquet")

    def run(name, cv_split=0, table=None, sahi=False):
        data_dir = tmp_path / "sahi" if sahi else world.data_dir
        table = table or (tmp_path / "sahi" / "tiles.parquet" if sahi else world.table)
        training = {"data_dir": str(data_dir), "metadata_fp": str(table), "cv_split": cv_split}
        return tiny_bundle(tmp_path / name, training=training | {"sahi": sahi})

    return SimpleNamespace(root=tmp_path, world=world, run=run)


def scenes_of(*runs, **options):
    config = CompareConfig(run_dir=runs, output_dir="out", **options)
    bundles = [load_bundle(run) for run in runs]
    return labelled_scenes(config, bundles, config.data_dir, config.gt_dir, config.labels_dir)


def test_the_scenes_are_those_of_the_runs_fold(fold, caplog):
    with caplog.at_level("INFO", "kelp"):
        scenes = scenes_of(fold.run("whole"), fold.run("tiles", sahi=True))
    ids = ("TR000000", "TR000002", "TR000004")
    folder = fold.world.train_dir.resolve()
    assert [image.scene for image in scenes.images] == [
        folder / "images" / f"{name}_satellite.tif" for name in ids
    ]
    assert [image.truth for image in scenes.images] == [
        folder / "masks" / f"{name}_kelp.tif" for name in ids
    ]
    assert [image.site for image in scenes.images] == [0, 1, 2]
    (line,) = caplog.messages
    assert line.startswith("scenes: 3 images that fold 0 of")
    assert "picked its best epoch on them" in line
    alone = scenes_of(fold.run("more", cv_split=1, sahi=True))
    assert [image.scene.name[:8] for image in alone.images] == ["TR000001", "TR000003", "TR000005"]


def test_sites_of_the_fold_come_from_its_table(fold):
    rows = pd.read_parquet(fold.world.table)
    rows.assign(aoi_id=7).to_parquet(fold.world.table)
    assert [image.site for image in scenes_of(fold.run("whole")).images] == [0, 0, 0]
    own = fold.root / "own.parquet"
    rows.assign(aoi_id=rows["tile_id"]).to_parquet(own)
    scenes = scenes_of(fold.run("whole"), metadata_fp=own)
    assert [image.site for image in scenes.images] == [0, 1, 2]
    rows.drop(columns="aoi_id").to_parquet(fold.world.table)
    assert [image.site for image in scenes_of(fold.run("whole")).images] == [0, 1, 2]


def test_an_image_without_tiles_is_left_out_of_the_fold(fold):
    table = fold.root / "sahi" / "tiles.parquet"
    tiles = pd.read_parquet(table)
    tiles[tiles["tile_id"] != "TR000002"].to_parquet(table)
    for runs in ((False, True), (True, False)):
        scenes = scenes_of(*(fold.run(f"run{sahi}", sahi=sahi) for sahi in runs))
        assert [image.scene.name[:8] for image in scenes.images] == ["TR000000", "TR000004"]


def test_runs_that_share_no_fold_are_refused(fold, tmp_path_factory):
    first = fold.run("whole")
    with pytest.raises(ConfigError, match=r"other .*fold 1 of .* holds out other images than .*"):
        scenes_of(first, fold.run("other ", cv_split=1))
    rows = pd.read_parquet(fold.world.table)
    rows.loc[rows["tile_id"] == "TR000002", "split_0"] = "train"  # held out by one of them only
    rows.to_parquet(fold.root / "processed" / "dealt.parquet")
    dealt = fold.run("dealt", table=fold.root / "processed" / "dealt.parquet")
    with pytest.raises(ConfigError, match="data_dir and gt_dir, of images that no run was"):
        scenes_of(first, dealt)
    elsewhere = make_world(tmp_path_factory.mktemp("elsewhere"), n_train=2)
    training = {"data_dir": str(elsewhere.data_dir), "metadata_fp": str(elsewhere.table)}
    stranger = tiny_bundle(fold.root / "s", training=training | {"cv_split": 0, "sahi": False})
    with pytest.raises(ConfigError, match="holds out other images than"):
        scenes_of(first, stranger)


def test_a_fold_that_moved_is_one_line(fold, capfd):
    out = f"--output_dir={fold.root / 'out'}"
    run = fold.run("whole")
    (fold.world.train_dir / "masks" / "TR000004_kelp.tif").unlink()
    assert main(["compare", f"--run_dir={run}", out, "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "TR000004_kelp.tif: no such file" in line
    assert str(fold.world.table) in line
    assert line.endswith("give labelled scenes as --data_dir and --gt_dir")
    fold.world.table.unlink()
    with pytest.raises(TableError, match=r"no such table; .*or give labelled scenes as data_dir"):
        scenes_of(run)
    with pytest.raises(BundleError, match="does not tell what it was trained on; give labelled"):
        scenes_of(tiny_bundle(fold.root / "unknown"))
    assert main(["compare", f"--run_dir={run}", out, "--data_dir=x", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--data_dir and --gt_dir belong together" in line


def test_the_command_needs_no_folders_and_scores_other_labels_beside(fold):
    labels = fold.root / "labels"
    labels.mkdir()
    for number in (0, 2, 4):
        name = f"TR{number:06d}_kelp.tif"
        truth = read_mask(fold.world.train_dir / "masks" / name)
        write_mask(labels / name, np.roll(truth, 3, axis=1))
    run, out = fold.run("whole", sahi=True), fold.root / "out"
    arguments = [f"--run_dir={run}", f"--output_dir={out}", f"--labels_dir={labels}"]
    arguments += ["--precision=32-true", "--device=cpu", "--draws=100", "--quiet"]
    assert main(["compare", *arguments]) == 0
    told = json.loads((out / "comparison.json").read_text())
    assert (told["images"], told["places"]) == (3, 3)
    assert "fold 0 of" in told["scenes"]
    figures = told["ways"][0]["figures"]
    assert 0 < figures["pooled_dice_of_labels"]["value"] < figures["pooled_dice"]["value"]
    assert "fold 0 of" in (out / "report.html").read_text()
    (labels / "TR000002_kelp.tif").unlink()
    with pytest.raises(InputError, match="masks as labels_dir"):
        scenes_of(run, labels_dir=labels)


def test_scenes_are_found_from_any_folder_where_relative_paths_were_recorded(fold, monkeypatch):
    """As `kelp train --data_dir raw --output_dir runs` records them in the folder of the world."""
    table = fold.world.table.relative_to(fold.root)
    training = {"data_dir": str(fold.world.data_dir.relative_to(fold.root)), "cv_split": 0}
    training |= {"metadata_fp": str(table), "output_dir": "runs", "sahi": False}
    run = tiny_bundle(fold.root / "runs" / "kelp" / "1" / "bundle", training=training)
    monkeypatch.chdir(fold.root)
    here = scenes_of(run).images
    assert len(here) == 3
    (fold.root / "elsewhere").mkdir()
    monkeypatch.chdir(fold.root / "elsewhere")
    assert [image.scene for image in scenes_of(run).images] == [image.scene for image in here]
    run.parent.parent.parent.rename(fold.root / "moved")
    with pytest.raises(TableError, match=r"no such table; .*or give labelled scenes as"):
        scenes_of(fold.root / "moved" / "kelp" / "1" / "bundle")


def test_a_truth_that_lies_elsewhere_or_says_255_is_refused(fold):
    run = fold.run("whole")
    mask = fold.world.train_dir / "masks" / "TR000002_kelp.tif"
    image = fold.world.train_dir / "images" / "TR000002_satellite.tif"
    for path, x in ((mask, 15), (image, 0)):
        where = {"crs": "EPSG:32621", "transform": Affine(30, 0, 500_000 + x, 0, -30, 0)}
        write_tif(path, read_tif(path), **where)
    options = {"band_order": BANDS}
    with pytest.raises(InputError, match=r"TR000002_kelp\.tif does not .* \+0\.5 columns"):
        scenes_of(run, **options)
    options["ignore_georeference"] = True
    assert len(scenes_of(run, **options).images) == 3
    for path in (fold.world.train_dir / "masks").iterdir():
        write_tif(path, np.where(read_tif(path) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(InputError, match=r"holds 0 and 255 only .*kelp_value=255"):
        scenes_of(run, **options)
    assert len(scenes_of(run, kelp_value=255, **options).images) == 3


def test_with_no_sliced_variant_there_is_nothing_to_compare(labelled, monkeypatch):
    """Tiles of 128 px are shown as 256 px; the scenes, 100 x 90 px, fit into 128."""
    settings = {"tile_size": (128, 128), "image_size": 256, "resize_strategy": "resize"}
    result = compare(labelled, monkeypatch, PixelBody, settings, largest_pass=128)
    assert [one.name for one in result.comparison.evaluations] == ["whole image"]
    assert result.advice.text.startswith("No answer: no sliced variant is small enough to be run")
    assert not result.advice.slice


def test_no_kelp_at_all_has_no_answer(labelled, monkeypatch):
    for path in (labelled / "masks").glob("*.tif"):
        write_mask(path, np.zeros((100, 90), np.uint8))

    class Blind(PixelBody):
        def forward(self, x):
            return super().forward(x) * 0 - 9

    result = compare(labelled, monkeypatch, Blind, decision_threshold=0.5)
    assert result.advice.text.startswith("No answer")
    assert not result.advice.slice
