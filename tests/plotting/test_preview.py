"""Pictures: the right band in the right colour, one kelp colour, nothing unseen shown as seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from world import rgb_of

from kelp.config import PreviewConfig
from kelp.errors import InputError
from kelp.plotting import preview, rendering, style
from kelp.plotting.preview import panels, picture_of, write_previews
from kelp.raster import bands
from kelp.raster.bands import BANDS
from kelp.raster.scene import Scene, read_scene
from kelp.raster.writer import MASK_COLORS, write_mask

KELP, NO_KELP = MASK_COLORS[1][:3], MASK_COLORS[0][:3]
HATCH = {style.HATCH_LIGHT, style.HATCH_DARK}


def scene(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Dark water on the left, bright land on the right; a canonical array."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(7600, 60, (7, height, width)).astype(np.float32)
    pixels[:5, :, width // 2 :] += np.float32([6000, 8000, 2000, 1800, 900])[:, None, None]
    pixels[bands.QA] = 0
    pixels[bands.DEM] = 0
    return pixels


def write_scene(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.where(np.isfinite(pixels), pixels, bands.NODATA).astype(np.int32)
    transform = rasterio.Affine(30, 0, 500_000, 0, -30, -5_700_000)
    profile = {"driver": "GTiff", "dtype": "int32", "crs": "EPSG:32621", "transform": transform}
    _, height, width = raw.shape
    with rasterio.open(path, "w", count=7, height=height, width=width, **profile) as out:
        out.write(raw)
        out.descriptions = BANDS


def area(png: bytes, color: tuple[int, int, int]) -> int:
    """Pixels of exactly one colour, without the patch of it in the legend."""
    pixels = rgb_of(png)
    return int((pixels[: int(0.9 * len(pixels))] == color).all(axis=-1).sum())


planes = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.one_of(st.just(np.float32("nan")), st.floats(-0.25, 1.5, width=32)),
)


@given(planes, st.data())
def test_the_stretch_stays_in_range_keeps_order_and_missing(plane, data):
    seen = data.draw(hnp.arrays(bool, plane.shape))
    out = rendering.stretch(plane, seen)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(plane))
    known = np.isfinite(plane)
    assert ((out[known] >= 0) & (out[known] <= 1)).all()
    assert (np.diff(out[known][np.argsort(plane[known], kind="stable")]) >= 0).all()


def test_clouds_do_not_darken_the_rest():
    plane = np.linspace(0, 0.2, 200, dtype=np.float32).reshape(10, 20)
    seen = np.ones(plane.shape, bool)
    clear = rendering.stretch(plane, seen)
    plane[:5, :5] = 1.1
    seen[:5, :5] = False
    assert np.abs(rendering.stretch(plane, seen) - clear)[seen].max() < 0.1
    # Planted fault: with the cloud counted, the rest does get darker.
    assert np.abs(rendering.stretch(plane, ~seen | seen) - clear)[seen].max() > 0.2


def test_calm_water_does_not_become_noise():
    water = np.random.default_rng(0).normal(0.01, 0.001, (30, 20)).astype(np.float32)
    seen = np.ones(water.shape, bool)
    assert rendering.stretch(water, seen).std() < 0.03
    # The same pattern at ten times the contrast is no noise, and fills the range.
    assert rendering.stretch(10 * water, seen).std() > 0.15


@pytest.mark.parametrize("names", [("R", "G", "B"), ("SWIR", "NIR", "R")])
def test_bands_reach_their_own_colour(names):
    for k, name in enumerate(names):
        pixels = scene()
        pixels[:5] = 8000
        pixels[bands.position(name), :, 30:] = 12_000
        colors = rendering.composite(pixels, names)
        step = colors[:, 40].astype(int) - colors[:, 10]
        assert (step[:, k] > 200).all()
        assert (np.delete(step, k, axis=1) == 0).all()


def test_missing_pixels_are_hatched_and_clouds_shown():
    pixels = scene()
    pixels[bands.position("G"), :5] = np.nan
    pixels[bands.QA, 10:20] = 1
    colors = rendering.composite(pixels, ("R", "G", "B"))
    assert {tuple(c) for c in colors[:5].reshape(-1, 3).tolist()} == HATCH
    assert HATCH.isdisjoint(tuple(c) for c in colors[5:].reshape(-1, 3).tolist())
    # NDVI does without green, but a cloud has none.
    ndvi = rendering.ndvi_picture(pixels)
    assert HATCH.isdisjoint(tuple(c) for c in ndvi[:10].reshape(-1, 3).tolist())
    assert {tuple(c) for c in ndvi[10:20].reshape(-1, 3).tolist()} == HATCH


def test_ndvi_is_of_reflectance():
    pixels = scene()
    pixels[bands.position("NIR")] = 17_000  # reflectance 0.2675
    pixels[bands.position("R")] = 10_000  # reflectance 0.075
    np.testing.assert_allclose(rendering.ndvi(pixels), (0.2675 - 0.075) / 0.3425, rtol=1e-4)
    dark = scene()
    dark[:5] = 7000  # below 0: clipped, not a ratio of noise
    np.testing.assert_array_equal(rendering.ndvi(dark), 0)


def test_masks_have_the_colours_of_the_rasters():
    mask = np.zeros((6, 30), np.uint8)
    mask[2, 3], mask[4:, 9:] = 1, 255
    colors = rendering.mask_picture(mask)
    assert tuple(colors[2, 3]) == KELP
    assert tuple(colors[0, 0]) == NO_KELP
    assert {tuple(c) for c in colors[4:, 9:].reshape(-1, 3).tolist()} == HATCH
    assert tuple(rendering.overlay_picture(scene(6, 30), mask)[2, 3]) == KELP


def test_hits_misses_and_false_alarms_differ():
    truth = np.uint8([[1, 1, 0, 0, 1, 255]])
    prediction = np.uint8([[1, 0, 1, 0, 255, 1]])
    colors = rendering.agreement_picture(scene(1, 6), truth, prediction)[0]
    assert [tuple(c) for c in colors[:3]] == [KELP, style.MISSED, style.FALSE]
    assert tuple(colors[3]) not in {KELP, style.MISSED, style.FALSE, *HATCH}
    assert {tuple(c) for c in colors[4:].tolist()} <= HATCH


@given(st.integers(1, 17), st.integers(1, 13), st.integers(1, 5), st.randoms())
def test_shrinking_loses_no_kelp_and_invents_none(height, width, step, random):
    rng = np.random.default_rng(random.randrange(2**32))
    mask = rng.choice(np.uint8([0, 1, 255]), (height, width), p=[0.7, 0.1, 0.2])
    pixels = rng.normal(9000, 500, (7, height, width)).astype(np.float32)
    pixels[:, rng.random((height, width)) < 0.3] = np.nan
    pixels[bands.QA] = rng.integers(0, 2, (height, width))
    small, shrunk = rendering.shrink_mask(mask, step), rendering.shrink_pixels(pixels, step)
    assert small.shape == shrunk.shape[1:] == (-(-height // step), -(-width // step))
    for y, x in np.ndindex(*small.shape):
        rows, columns = slice(y * step, (y + 1) * step), slice(x * step, (x + 1) * step)
        block, values = mask[rows, columns], pixels[:, rows, columns]
        wanted = 1 if (block == 1).any() else 255 if (block == 255).mean() > 0.5 else 0
        assert small[y, x] == wanted
        assert shrunk[bands.QA, y, x] == (values[bands.QA].mean() >= 0.5)
        for band in (0, bands.DEM):
            known = values[band][np.isfinite(values[band])]
            naive = known.mean(dtype=float) if known.size else np.nan
            np.testing.assert_allclose(shrunk[band, y, x], naive, rtol=1e-5)


def test_every_panel_count_makes_a_picture_in_the_same_colours():
    pixels = scene()
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 5:25] = 1
    nothing, one = panels(pixels), panels(pixels, prediction=mask, title="AB123456")
    assert area(nothing, KELP) == 0
    assert area(one, KELP) > 1000
    both = panels(pixels, mask, np.zeros_like(mask))
    assert area(both, style.MISSED) > 1000
    assert area(both, style.FALSE) == 0
    # The same arrays give the same bytes; another title another picture.
    assert one == panels(pixels, prediction=mask, title="AB123456")
    assert one != panels(pixels, prediction=mask, title="AB123457")
    void = panels(np.full_like(pixels, np.nan), None, np.full((40, 60), 255, np.uint8))
    assert area(void, NO_KELP) == 0


def test_one_kelp_pixel_of_a_large_scene_is_seen(monkeypatch):
    monkeypatch.setattr(preview, "LARGEST_SIDE", 200)
    mask = np.zeros((230, 610), np.uint8)
    mask[101, 407] = 1
    picture = panels(scene(230, 610), mask)
    assert area(picture, KELP) >= 2  # in the mask and in the overlay


def test_no_kelp_pixel_falls_between_those_of_the_screen():
    mask = np.zeros((360, 900), np.uint8)
    mask[100, 3::6] = 1
    picture = rgb_of(panels(scene(360, 900), mask))
    _, blobs = ndimage.label((picture == KELP).all(axis=-1))
    assert blobs == 2 * 150 + 1  # in the mask, in the overlay, in the legend


def test_a_file_read_in_strips_is_the_array_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "LARGEST_SIDE", 120)
    pixels = np.round(scene(300, 170))
    mask = np.zeros((300, 170), np.uint8)
    mask[257, 11], mask[0, 0], mask[280:, :] = 1, 1, 255
    write_scene(tmp_path / "AB_satellite.tif", pixels)
    write_mask(tmp_path / "AB_kelp.tif", mask)
    strips, read = [], Scene.read
    monkeypatch.setattr(
        Scene, "read", lambda scene, *tile: strips.extend(tile) or read(scene, *tile)
    )
    monkeypatch.setattr(preview, "STRIP_ROWS", 16)
    file = picture_of(tmp_path / "AB_satellite.tif", tmp_path / "AB_kelp.tif")
    assert [(strip.y, strip.height) for strip in strips] == [
        *((48 * k, 48) for k in range(6)),
        (288, 12),
    ]
    array = read_scene(tmp_path / "AB_satellite.tif")
    assert file == panels(array, prediction=mask, title="AB")


def make_folder(tmp_path: Path, names: list[str]) -> None:
    for k, name in enumerate(names):
        write_scene(tmp_path / "scenes" / f"{name}_satellite.tif", scene(seed=k))
        write_mask(tmp_path / "masks" / f"{name}_kelp.tif", np.zeros((40, 60), np.uint8))


def config(tmp_path: Path, **more) -> PreviewConfig:
    return PreviewConfig(
        data_dir=tmp_path / "scenes",
        predictions_dir=tmp_path / "masks",
        output_dir=tmp_path / "out",
        **more,
    )


def test_the_first_scenes_with_a_mask_are_pictured(tmp_path):
    make_folder(tmp_path, ["CC", "AA", "BB", "DD"])
    (tmp_path / "masks" / "AA_kelp.tif").unlink()
    calls: list = []
    result = preview.preview(config(tmp_path, first_n=2), lambda *a: calls.append(a))
    assert [path.name for path in result.pictures] == ["BB.png", "CC.png"]
    assert calls == [("previews", 1, 2), ("previews", 2, 2)]
    assert result.summary() == f"wrote 2 pictures into {tmp_path / 'out'}"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["BB.png", "CC.png", "kelp-preview.yaml"]
    assert rgb_of(result.pictures[0].read_bytes()).shape[1] > 1000


def test_mistakes_are_named(tmp_path):
    make_folder(tmp_path, ["AA"])
    write_mask(tmp_path / "masks" / "AA_kelp.tif", np.zeros((60, 40), np.uint8))
    with pytest.raises(InputError, match=r"AA_kelp\.tif does .*AA_satellite\.tif: 60 x 40 "):
        preview.preview(config(tmp_path))
    (tmp_path / "masks" / "AA_kelp.tif").unlink()
    with pytest.raises(InputError, match=r"masks: holds no mask of the scenes \(such as AA_kelp"):
        preview.preview(config(tmp_path))
    with pytest.raises(InputError, match="no mask of the scenes"):
        write_previews([], tmp_path / "masks", tmp_path / "out", 3)
    assert not list((tmp_path / "out").glob("*"))


def test_importing_waits_for_no_matplotlib():
    code = (
        "import sys, kelp.plotting.preview, kelp.plotting.html;"
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
