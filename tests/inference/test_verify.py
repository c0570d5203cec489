"""`kelp verify`: maps against their records, and against tiles predicted again."""

import json
import shutil

import numpy as np
import pytest
import rasterio
from affine import Affine
from bundles import tiny_bundle, use_pixel_network
from laws import predict_command
from rasterio.crs import CRS
from satellites import PRODUCTS, copy_real, make_landsat
from world import coast, write_tif

import kelp
from kelp.cli import main
from kelp.config import VerifyConfig
from kelp.errors import InputError
from kelp.inference.predictor import Predictor
from kelp.inference.verify import BOUND
from kelp.raster.bands import BANDS
from kelp.tiling.engine import Engine

PLACE = {"crs": CRS.from_epsg(32719), "transform": Affine(30, 0, 400000, 0, -30, -5700000)}
SHAPE = (150, 130)


@pytest.fixture(autouse=True)
def _pixel_network(monkeypatch):
    use_pixel_network(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    rng = np.random.default_rng(5)
    for name in "AB":
        image, _ = coast(SHAPE, rng)
        write_tif(folder / f"{name}_satellite.tif", image, **PLACE)
    return folder


def predict(scenes, bundle, out, *more):
    order = ["--band_order", ",".join(BANDS)] if scenes.name == "scenes" else []
    assert main(predict_command(scenes, bundle, out, "--quiet", *order, *more)) == 0
    return out


@pytest.fixture
def maps(scenes, bundle, tmp_path):
    return predict(scenes, bundle, tmp_path / "maps", "--save_probabilities")


def verify(scenes, maps, **options):
    return kelp.verify(VerifyConfig(data_dir=scenes, predictions_dir=maps, device="cpu", **options))


def refusal(scenes, maps, **options):
    """What is said of maps that differ."""
    with pytest.raises(InputError) as raised:
        verify(scenes, maps, **options)
    return raised.value.message


def edit_record(maps, name, **changes):
    path = maps / f"{name}_kelp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(path, y, x, value):
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as out:
        pixels = out.read(1)
        assert pixels[y, x] != value
        pixels[y, x] = value
        out.write(pixels, 1)


def test_good_maps_pass_and_not_a_pixel_differs(scenes, maps):
    found = verify(scenes, maps)
    assert [one.mask.name for one in found.maps] == ["A_kelp.tif", "B_kelp.tif"]
    for one in found.maps:
        assert one.differences == ()
        assert (one.agreement.tiles, one.agreement.pixels) == (10, 10 * 32 * 32)
        assert (one.agreement.near, one.agreement.largest) == (0, 0)
    assert found.summary().count("as its record says (10 tiles, 10,240 pixels)") == 2


def test_only_the_tiles_that_touch_the_drawn_ones_are_run(scenes, maps, monkeypatch):
    counts = []
    run = Engine.run

    def counted(self, jobs):
        run(self, jobs)
        counts.append(self.counts)

    monkeypatch.setattr(Engine, "run", counted)
    assert (
        verify(scenes / "A_satellite.tif", maps / "A_kelp.tif", tiles=1).maps[0].agreement.tiles
        == 1
    )
    assert 4 <= counts[0].predicted <= 9  # itself and its neighbours


@pytest.mark.parametrize(
    "options",
    [
        ("--probability_dtype", "uint8", "--save_probabilities"),
        ("--sahi_tile_size", 48, "--sahi_overlap", 12, "--blend", "mean"),
        ("--land", "zero", "--land_tolerance", 1, "--save_spread"),
        ("--land", "skip"),
        ("--tta", "--tta_merge_mode", "gmean", "--no-qa_as_nodata"),
        ("--decision_threshold", 0.7, "--batch_size", 3),
    ],
)
def test_the_options_of_the_prediction_need_not_be_repeated(scenes, bundle, tmp_path, options):
    maps = predict(scenes, bundle, tmp_path / "other", *options)
    for one in verify(scenes, maps, tiles=100).maps:
        assert one.differences == ()
        assert one.agreement.near == 0


def test_an_ensemble_is_verified_as_one(scenes, bundle, tmp_path):
    other = tiny_bundle(tmp_path / "second", threshold=0.6)
    maps = predict(scenes, f"{bundle},{other}", tmp_path / "both", "--weights", "1,3")
    verify(scenes, maps)
    assert "made by 2 networks, not by these 1" in refusal(scenes, maps, run_dir=bundle)


def test_real_products_pass_with_the_bits_of_their_sensor(tmp_path):
    bundle = tiny_bundle(tmp_path / "five", bands=("SWIR", "NIR", "R", "G", "B"))
    folder = copy_real(tmp_path)
    maps = predict(folder, bundle, tmp_path / "maps")
    verify(folder, maps)
    (maps / "kelp-predict.yaml").unlink()
    verify(folder, maps, run_dir=bundle)


def test_another_cloud_mask_is_named(scenes, bundle, tmp_path):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:20] = 1
    path = write_tif(tmp_path / "cloud.tif", mask[None], **PLACE)
    maps = predict(scenes, bundle, tmp_path / "clouded", "--cloud_mask", path)
    verify(scenes, maps)
    mask[20:40] = 1
    write_tif(path, mask[None], **PLACE)
    words = refusal(scenes, maps, tiles=100)
    assert "--cloud_mask: cloud.tif: changed since the map was made" in words
    assert "mask: " in words


def test_polygons_and_quality_bits_come_from_the_run(bundle, tmp_path):
    bundle = tiny_bundle(tmp_path / "five", bands=("SWIR", "NIR", "R", "G", "B"))
    folder = make_landsat(tmp_path, 8, (100, 90))
    with rasterio.open(next(folder.glob("*B5.TIF"))) as source:
        left, bottom, right, top = source.bounds
        crs = source.crs.to_string()
    middle = (left + right) / 2
    for name, low, high in (("aoi", left, middle + 300), ("out", middle, right)):
        ring = [[low, bottom], [high, bottom], [high, top], [low, top], [low, bottom]]
        text = {
            "type": "Polygon",
            "coordinates": [ring],
            "crs": {"properties": {"name": crs}},
        }
        (tmp_path / f"{name}.geojson").write_text(json.dumps(text))
    aoi, out = tmp_path / "aoi.geojson", tmp_path / "out.geojson"
    options = ("--quality", "fill,cloud", "--aoi", aoi, "--exclude", out)
    maps = predict(folder, bundle, tmp_path / "maps", *options)
    verify(folder, maps, tiles=50)
    (maps / "kelp-predict.yaml").unlink()
    words = refusal(folder, maps, run_dir=bundle)
    assert "--aoi: aoi.geojson: in the record, but not given" in words
    assert "--exclude: out.geojson: in the record, but not given" in words
    assert "quality bits" not in words  # the record knows them
    verify(folder, maps, run_dir=bundle, aoi=aoi, exclude=out)
    text = aoi.read_text()
    aoi.write_text(text + "\n")
    assert "aoi.geojson: changed since the map was made (another size)" in refusal(
        folder, maps, run_dir=bundle, aoi=aoi, exclude=out
    )
    aoi.write_text(text)
    words = refusal(folder, maps, run_dir=bundle, aoi=aoi, exclude=out, quality="fill")
    assert "quality bits: fill, the record says cloud,fill; give --quality" in words
    assert (tmp_path / "maps" / f"{PRODUCTS[8]}_kelp.tif").is_file()


def test_a_changed_pixel_of_a_mask_is_named_and_the_rest_is_verified(scenes, maps, caplog):
    with rasterio.open(maps / "B_kelp.tif") as source:
        value = 1 - source.read(1)[70, 65]
    change(maps / "B_kelp.tif", 70, 65, value)
    caplog.set_level("INFO", "kelp")
    words = refusal(scenes, maps, tiles=100)
    assert words.startswith("1 of 2 maps are not what their records say: ")
    assert "B_kelp.tif: " in words
    assert "A_kelp.tif" not in words
    assert "pixels are kelp, the record says" in words
    assert "the presence area is" in words
    assert "mask: 4 pixels differ in 4 of 72 tiles predicted again" in words  # it lies in four
    assert "first in that at row 48, column 48" in words
    assert any("A_kelp.tif: as its record says" in line for line in caplog.messages)


def test_a_pixel_that_was_hidden_is_found_by_the_count_alone(scenes, maps):
    change(maps / "A_kelp.tif", 149, 129, 255)
    assert "pixels are observed, the record says" in refusal(scenes, maps, tiles=1)


def test_a_changed_probability_is_named(scenes, maps):
    with rasterio.open(maps / "A_kelp_prob.tif") as source:
        p = source.read(1)[10, 10]
    change(maps / "A_kelp_prob.tif", 10, 10, p + 3 * BOUND if p < 0.9 else p - 3 * BOUND)
    words = refusal(scenes, maps, tiles=100)
    assert "probabilities: 1 pixels differ in 1 of 72 tiles predicted again" in words
    assert "mask:" not in words


@pytest.mark.parametrize(("shift", "good"), [(0.5, True), (3, False)])
def test_last_bits_may_differ_up_to_the_bound(scenes, maps, monkeypatch, shift, good):
    whole = Predictor.__call__
    monkeypatch.setattr(
        Predictor, "__call__", lambda self, raw: whole(self, raw) + np.float32(shift * BOUND)
    )
    if good:
        for one in verify(scenes, maps).maps:
            assert one.agreement.largest == pytest.approx(shift * BOUND, rel=1e-3)
    else:
        words = refusal(scenes, maps)
        assert "probabilities: " in words
        assert "pixels differ in 10 of 10 tiles predicted again" in words


def test_a_mask_may_differ_where_a_probability_lies_at_the_threshold(scenes, bundle, tmp_path):
    maps = predict(scenes, bundle, tmp_path / "maps", "--save_probabilities")
    with rasterio.open(maps / "A_kelp_prob.tif") as source:
        p = source.read(1)
    y, x = np.unravel_index(np.nanargmin(np.abs(p - 0.5)), p.shape)
    threshold = float(p[y, x]) - BOUND / 2
    maps = predict(scenes, bundle, tmp_path / "at", "--decision_threshold", threshold)
    change(maps / "A_kelp.tif", y, x, 0)
    words = refusal(scenes, maps, tiles=100)
    assert "pixels are kelp, the record says" in words
    assert "mask:" not in words  # the count is what tells


def test_a_record_of_another_threshold_is_named(scenes, maps):
    edit_record(maps, "A", threshold=0.400001)  # no pixel lies between
    words = refusal(scenes, maps)
    assert words.endswith(
        "A_kelp.tif: its record's threshold or settings are not those it was made with "
        "(fingerprint)"
    )


def test_a_mask_of_another_prediction_is_named(scenes, bundle, maps, tmp_path):
    other = predict(scenes, bundle, tmp_path / "other", "--decision_threshold", 0.7)
    shutil.copy(other / "A_kelp.json", maps)
    words = refusal(scenes, maps)
    assert "A_kelp.tif is of another prediction than the record (fingerprint)" in words
    assert "mask: " in words


def test_other_figures_in_the_record_are_named(scenes, maps):
    edit_record(maps, "A", kelp_pixels=3, presence_area_m2=2700.0, observed_share=0.25)
    words = refusal(scenes, maps)
    assert "pixels are kelp, the record says 3" in words
    assert "m2, the record says 2700" in words
    assert "pixels are observed, the record says 4,875" in words


def test_another_network_is_named_and_its_tiles_are_not_compared(scenes, maps, tmp_path):
    import torch
    from bundles import tiny_spec

    from kelp.nn.bundle import save_bundle
    from kelp.nn.model import KelpNet

    net = KelpNet(tiny_spec())
    with torch.no_grad():
        next(p for p in net.parameters() if p.ndim == 4).add_(1)
    other = save_bundle(tmp_path / "another", net, tiny_spec())
    words = refusal(scenes, maps, run_dir=other)
    assert "2 of 2 maps" in words
    assert f"network: {other} has weights of SHA-256 " in words
    assert "mask:" not in words


def test_a_network_that_is_nowhere_is_asked_for(scenes, maps):
    (maps / "kelp-predict.yaml").unlink()
    assert "made by the network bundle; name it with --run_dir" in refusal(scenes, maps)


def test_a_changed_source_is_named(scenes, maps):
    content = bytearray((scenes / "A_satellite.tif").read_bytes())
    content[-1] ^= 1
    (scenes / "A_satellite.tif").write_bytes(content)
    with (scenes / "B_satellite.tif").open("ab") as out:
        out.write(b"more")
    words = refusal(scenes, maps)
    assert "A_satellite.tif: changed since the map was made (other content)" in words
    assert "B_satellite.tif: changed since the map was made (another size)" in words
    assert "mask: " not in words  # and yet the pixels are the same


def test_the_folder_of_maps_alone_tells_where_the_scenes_are(scenes, maps, capsys):
    given = ["verify", "--device", "cpu", "--quiet"]
    assert main([*given, "--predictions_dir", str(maps)]) == 0
    assert capsys.readouterr().out.count("as its record says (10 tiles, ") == 2
    assert main([*given, "--maps_dir", str(maps), "--tiles", "1"]) == 0  # its older name
    (maps / "kelp-predict.yaml").unlink()
    capsys.readouterr()
    assert main([*given, "--predictions_dir", str(maps)]) == 2
    assert "does not say where the scenes are; name them with --data_dir" in capsys.readouterr().err


def test_what_cannot_be_verified_is_named_in_one_line(scenes, maps, capsys):
    (maps / "A_kelp.json").unlink()
    (scenes / "B_satellite.tif").unlink()
    given = ["--data_dir", str(scenes), "--predictions_dir", str(maps)]
    status = main(["verify", *given, "--device", "cpu", "--quiet"])
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("kelp: error: 2 of 2 maps are not what their records say: ")
    assert "A_kelp.tif: has no record, so nothing can be verified" in line
    assert f"B_kelp.tif: no scene of it in {scenes}" in line


def test_settings_that_make_no_sense_are_named(scenes, maps):
    record = json.loads((maps / "A_kelp.json").read_text())
    edit_record(maps, "A", settings=record["settings"] | {"tile": None})
    edit_record(maps, "B", settings={})
    words = refusal(scenes, maps)
    assert "A_kelp.tif: its record's settings cannot be understood" in words
    assert "B_kelp.tif: its record lacks threshold or settings" in words


def test_a_folder_without_maps_is_refused(scenes, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="the folder holds no"):
        verify(scenes, tmp_path / "none")
