"""`kelp compare`: labelled scenes and networks in; figures with intervals and one advice out."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kelp.config import CompareConfig
from kelp.errors import ConfigError
from kelp.evaluation.scoring import pixel_area_m2
from kelp.evaluation.thresholds import best_threshold, parts_of, pixels_by_code, precision_by_code
from kelp.inference.bundle import Bundle, load_bundle
from kelp.io.files import discard_partials, output_folder, scratch_folder, write_json, write_text
from kelp.nn.comparison.advice import Advice, advise
from kelp.nn.comparison.fields import FIELDS
from kelp.nn.comparison.page import to_text, write_report
from kelp.nn.comparison.result import Comparison, Judged
from kelp.nn.comparison.scenes import Labelled, labelled_scenes
from kelp.nn.comparison.sums import FIGURES, Draws, Sums, sums_of
from kelp.nn.comparison.ways import Runtime, Way, ways_of
from kelp.nn.device import resolve_device, resolve_precision
from kelp.plotting.preview import picture_of
from kelp.progress import Progress, silent
from kelp.raster.bands import DEM, MASK_NODATA
from kelp.raster.masks import read_mask
from kelp.raster.probability import CODES, code_of, quantise
from kelp.raster.scene import read_scene
from kelp.raster.writer import write_mask
from kelp.tables import output_name
from kelp.tiling.seams import Steps, steps

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class CompareResult:
    """What `compare` found, and the files it wrote."""

    comparison: Comparison
    advice: Advice
    text: str
    files: tuple[Path, ...]

    def summary(self) -> str:
        """The table and the advice."""
        return "\n".join([self.text, *(f"wrote {path}" for path in self.files)])


def compare(config: CompareConfig, progress: Progress = silent) -> CompareResult:
    """Apply networks to labelled scenes in several ways and judge each; see `CompareConfig`.

    Writes `comparison.json`, `comparison.txt` and `report.html`.

    Raises:
        InputError: a truth is missing or of another size, or a scene cannot be read.
        ConfigError: no bundle or an ONNX file, an overlap that is none, or nothing left to run;
            without folders, runs that were not trained on one fold.
    """
    bundles = [load_bundle(path, config.use_checkpoint) for path in config.run_dir]
    if not bundles:
        raise ConfigError("--run_dir is missing; name at least one run or bundle")
    scenes = labelled_scenes(config, bundles, config.labels_dir)
    images = scenes.images
    ways: list[Way] = []
    left_out: list[Way] = []
    for way in _ways(config, bundles):
        fits = max(way.side(image.shape) for image in images) <= config.largest_pass
        (ways if fits else left_out).append(way)
    for way in left_out:
        log.info("%s: left out, larger than --largest_pass %d", way.name, config.largest_pass)
    if not ways:
        raise ConfigError(
            f"--largest_pass {config.largest_pass}: no way shows a network so little at once; "
            "give a larger number, or a smaller --sahi_tile_size"
        )
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    runtime = Runtime(device, precision, config.batch_size)
    folder = output_folder(config.output_dir)
    discard_partials(folder)
    with scratch_folder(folder) as scratch:
        judge = _Judge(config, images, ways, runtime, scratch)
        judge.predict(progress)
        judged = tuple(judge.judge(way, judge.thresholds(way)) for way in ways)
        places = [image.place for image in images]
        draws = Draws(max(places) + 1, config.draws, config.seed)
        comparison = Comparison(judged, places, draws)
        advice = advise(comparison)
        if advice.whole and (precise := judge.as_precise_as(advice.whole)):
            comparison = replace(comparison, equal=Comparison(precise, places, draws))
        text = to_text(comparison, advice)
        report = write_report(
            folder / "report.html",
            comparison,
            advice,
            config,
            scenes.words,
            judge.pictures(advice),
            [way.name for way in left_out],
        )
    figures: dict[str, Any] = {
        "advice": advice.to_json(),
        "scenes": scenes.words,
        "images": len(images),
        "places": max(places) + 1,
        "draws": config.draws,
        "precision": precision,
        "left_out": [way.name for way in left_out],
        "ways": comparison.to_json(advice.whole),
        "fields": FIELDS,
    }
    write_json(folder / "comparison.json", figures)
    write_text(folder / "comparison.txt", text + "\n")
    config.record(folder)
    files = (report, folder / "comparison.json", folder / "comparison.txt")
    return CompareResult(comparison, advice, text, files)


def _ways(config: CompareConfig, bundles: Sequence[Bundle]) -> list[Way]:
    ways: list[Way] = []
    for bundle, path in zip(bundles, config.run_dir, strict=True):
        name = path.name if len(bundles) > 1 else ""
        ways += ways_of(
            bundle,
            name,
            config.sahi_tile_size,
            config.overlaps,
            config.tile_sizes,
            config.interpolations,
            config.tta,
        )
    names = [way.name for way in ways]
    if len(set(names)) < len(names):
        raise ConfigError("--run_dir: two of these folders have one name; rename one")
    return ways


class _Judge:
    """Predictions of all ways, and what they are worth."""

    def __init__(
        self,
        config: CompareConfig,
        images: Sequence[Labelled],
        ways: Sequence[Way],
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self._config = config
        self._images = images
        self._ways = ways
        self._runtime = runtime
        self._folder = folder
        self._steps: dict[str, list[Steps]] = {way.name: [] for way in ways}
        self._seconds: dict[str, list[float]] = {way.name: [] for way in ways}
        self._network_pixels: dict[str, int] = dict.fromkeys(self._steps, 0)
        self._number = {way.name: k for k, way in enumerate(ways)}
        self._counted: dict[str, NDArray[np.int64]] = {}
        self._land: list[NDArray[np.bool_]] = []
        self._part = parts_of(max(image.place for image in images) + 1, config.seed)
        self._parts = int(self._part.max()) + 1

    def predict(self, progress: Progress) -> None:
        """Run every way on every scene; each scene is read once."""
        config, done = self._config, 0
        tiles = [way.tile for way in self._ways if way.tile]
        for number, image in enumerate(self._images):
            scene = read_scene(image.scene, config.band_order)
            self._land.append(scene[DEM] > 0)
            for way in self._ways:
                outcome = way.run(scene, self._runtime, config.qa_as_nodata)
                p = outcome.probabilities
                self._seconds[way.name].append(outcome.seconds)
                self._network_pixels[way.name] += outcome.network_pixels
                self._steps[way.name].append(steps(p, way.grid(image.shape, tiles[0])))
                np.save(self._file(way, number), quantise(p))
                done += 1
                progress("comparing", done, len(self._images) * len(self._ways))

    def _codes(self, way: Way, number: int) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] = np.load(self._file(way, number))
        return codes

    def _file(self, way: Way, number: int) -> Path:
        return self._folder / f"{self._number[way.name]}-{number}.npy"

    def judge(self, way: Way, thresholds: Sequence[int]) -> Judged:
        """Figures of one way at these thresholds, in codes, one for each part of the places."""
        by_image: list[Sums] = []
        for number, image in enumerate(self._images):
            area = pixel_area_m2(image.truth) or pixel_area_m2(image.scene)
            km2 = (area or self._config.pixel_size**2) / 1e6
            by_image.append(
                sums_of(
                    read_mask(image.truth),
                    self._codes(way, number),
                    thresholds[self._part[image.place]],
                    self._land[number],
                    self._steps[way.name][number],
                    km2,
                    read_mask(image.labels) if image.labels else None,
                )
            )
        pixels = sum(image.shape[0] * image.shape[1] for image in self._images)
        network_pixels = self._network_pixels[way.name]
        return Judged(
            way,
            tuple(threshold / CODES for threshold in thresholds),
            tuple(by_image),
            statistics.median(self._seconds[way.name]),
            network_pixels / len(self._images),
            network_pixels / pixels,
        )

    def thresholds(self, way: Way) -> list[int]:
        """Of each part of the places, in codes; fitted on the others unless one is given."""
        wish = self._config.decision_threshold
        if wish is None and self._parts == 1:
            wish = way.bundle.spec.threshold
            log.info("one place only: no threshold can be fitted, the bundle's is used")
        if wish is not None:
            return [code_of(wish)] * self._parts
        return [best_threshold(others) for others in self._others(way)]

    def as_precise_as(self, reference: Judged) -> tuple[Judged, ...]:
        """The ways at the thresholds at which they are as precise as `reference`.

        For each part of the places: its precision on the other ones is what every way's lowest
        threshold is sought for, there. Ways that do not reach it are left out, with one place all.
        """
        if self._parts == 1:
            return ()
        fitted = [round(threshold * CODES) for threshold in reference.thresholds]
        wanted = [
            precision_by_code(others)[threshold]
            for others, threshold in zip(self._others(reference.way), fitted, strict=True)
        ]
        judged = []
        for way in self._ways:
            reached = [
                np.flatnonzero(precision_by_code(others)[1:] >= precision)
                for others, precision in zip(self._others(way), wanted, strict=True)
            ]
            if all(map(len, reached)):
                judged.append(self.judge(way, [1 + int(codes[0]) for codes in reached]))
        return tuple(judged)

    def _others(self, way: Way) -> NDArray[np.int64]:
        """Pixels by code of the places outside each part, `(parts, 2, CODES + 1)`."""
        if way.name not in self._counted:
            by_part = np.zeros((self._parts, 2, CODES + 1), dtype=np.int64)
            for number, image in enumerate(self._images):
                counted = pixels_by_code(read_mask(image.truth), self._codes(way, number))
                by_part[self._part[image.place]] += counted
            self._counted[way.name] = by_part.sum(axis=0) - by_part
        return self._counted[way.name]

    def pictures(self, advice: Advice) -> list[tuple[str, bytes]]:
        """The scenes that gain and lose most by slicing, with what either way made of them."""
        if advice.sliced is None or advice.whole is None:
            return []
        pair = (advice.whole, advice.sliced)
        dice = [
            [FIGURES["pooled_dice"](sums) for sums in judged.by_image] for judged in pair
        ]  # NaN without kelp in either
        gains = np.nan_to_num(np.subtract(dice[1], dice[0]))
        shown = []
        for number, words in ((int(gains.argmax()), "gains"), (int(gains.argmin()), "loses")):
            if (gains[number] > 0) != (words == "gains") or gains[number] == 0:
                continue
            image = self._images[number]
            for judged, scores in zip(pair, dice, strict=True):
                threshold = round(judged.thresholds[self._part[image.place]] * CODES)
                codes = self._codes(judged.way, number)
                mask = np.where(codes == MASK_NODATA, MASK_NODATA, codes >= threshold)
                path = self._folder / output_name(image.scene)
                write_mask(path, mask.astype(np.uint8))
                caption = (
                    f"`{image.scene.name}`, which {words} most by slicing: {judged.way.name}, "
                    f"Dice {float(scores[number]):.3f}"
                )
                picture = picture_of(image.scene, path, image.truth, self._config.band_order)
                shown.append((caption, picture))
        return shown
