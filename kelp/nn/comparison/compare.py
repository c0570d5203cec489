"""`kelp compare`: labelled scenes and networks in; figures with intervals and one advice out."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kelp.config import CompareConfig
from kelp.errors import ConfigError
from kelp.evaluation.bootstrap import SiteBootstrap, site_numbers
from kelp.evaluation.confusion import Mask
from kelp.evaluation.metrics import FIGURES, SHORE, ImageTotals, SiteTotals, Totals
from kelp.evaluation.pairs import strips
from kelp.evaluation.scoring import source_words
from kelp.evaluation.thresholds import Histogram, best_threshold, parts_of
from kelp.inference.bundle import Bundle, load_bundle
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.files import discard_partials, output_folder, scratch_folder, write_json, write_text
from kelp.nn.comparison.advice import Advice, advise
from kelp.nn.comparison.page import to_text, write_report
from kelp.nn.comparison.result import FIELDS, Comparison, Evaluation
from kelp.nn.comparison.scenes import Labelled, Scenes, labelled_scenes
from kelp.nn.comparison.variants import (
    WHOLE_IMAGE_TILE,
    Cost,
    Runtime,
    Variant,
    variants_of,
)
from kelp.plotting.preview import picture_of
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import Georeference, read_mask
from kelp.raster.probability import CODES, code_of, quantise
from kelp.raster.scene import Scene
from kelp.raster.window import Shape
from kelp.raster.writer import RasterWriter
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
    """Apply networks to labelled scenes in several variants and evaluate each.

    Writes `comparison.json`, `comparison.txt` and `report.html`. Scenes are read by windows: only
    a variant that shows the network a whole scene holds one in memory. Scenes that fail are left
    out, and named when the others are compared.

    Raises:
        InputError: a truth is missing, scenes or truths cannot be read, or they do not lie on one
            grid. The error's `result` is of the others.
        BugError: a bug ended some scenes; the others are compared.
        ConfigError: no bundle or an ONNX file, an overlap that is none, or nothing left to run;
            without folders, runs that were not trained on one fold.
    """
    bundles = [load_bundle(path, config.use_checkpoint) for path in config.run_dir]
    if not bundles:
        raise ConfigError("--run_dir is missing; name at least one run or bundle")
    failures: dict[Path, Failure] = {}
    scenes = labelled_scenes(
        config, bundles, config.data_dir, config.gt_dir, config.labels_dir, failures
    )
    total = len(scenes.images) + len(failures)
    variants, left_out = _variants(config, bundles, scenes)
    runtime = Runtime.of(config)
    folder = output_folder(config.output_dir)
    discard_partials(folder)
    with scratch_folder(folder) as scratch:
        run = _Run(config, scenes, variants, runtime, scratch)
        failures |= run.predict(progress)
        if not run.scenes.images:
            raise_failures(failures, total, "scenes", folder)
        comparison, advice = run.compare()
        text = to_text(comparison, advice)
        report = write_report(
            folder / "report.html",
            comparison,
            advice,
            config,
            scenes.words,
            run.pictures(advice),
            left_out,
        )
    figures: dict[str, Any] = {
        "advice": advice.to_json(),
        "scenes": scenes.words,
        "images": comparison.images,
        "places": comparison.sites,
        "draws": config.draws,
        "precision": runtime.precision,
        "pixel_size": comparison.area,
        "left_out": left_out,
        "ways": comparison.to_json(advice.whole),
        "fields": FIELDS,
    }
    write_json(folder / "comparison.json", figures)
    write_text(folder / "comparison.txt", text + "\n")
    config.record(folder)
    files = (report, folder / "comparison.json", folder / "comparison.txt")
    result = CompareResult(comparison, advice, text, files)
    raise_failures(failures, total, "scenes", folder, result)
    return result


def _variants(
    config: CompareConfig, bundles: Sequence[Bundle], scenes: Scenes
) -> tuple[list[Variant], list[str]]:
    """Variants to compare, and the names of those that would show a network too much at once."""
    every: list[Variant] = []
    for bundle, path in zip(bundles, config.run_dir, strict=True):
        name = path.name if len(bundles) > 1 else ""
        every += variants_of(
            bundle,
            name,
            config.sahi_tile_size,
            config.overlaps,
            config.tile_sizes,
            config.interpolations,
            config.tta,
        )
    names = [variant.name for variant in every]
    if len(set(names)) < len(names):
        raise ConfigError("--run_dir: two of these folders have one name; rename one")
    variants: list[Variant] = []
    left_out: list[str] = []
    for variant in every:
        if max(variant.side(image.shape) for image in scenes.images) <= config.largest_pass:
            variants.append(variant)
        else:
            left_out.append(variant.name)
            log.info(
                "%s: left out, larger than --largest_pass %d", variant.name, config.largest_pass
            )
    if not variants:
        raise ConfigError(
            f"--largest_pass {config.largest_pass}: no variant shows a network so little at once; "
            "give a larger number, or a smaller --sahi_tile_size"
        )
    return variants, left_out


class _Codes:
    """Keeps the probabilities of a scene in a file, quantised, and the steps between pixels."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self._shape = path, shape
        self._exact = path.with_suffix(".exact.npy")
        self._rows = np.lib.format.open_memmap(self._exact, "w+", np.float32, shape)

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        self._rows[y : y + len(rows)] = rows

    def close(self) -> None:
        """The last row is there."""

    def finish(self, variant: Variant, like: int) -> Steps:
        """Keep the codes only; steps are those across the tiles of the variant."""
        found = steps(self._rows, variant.grid(self._shape, like))
        codes = np.lib.format.open_memmap(self._path, "w+", np.uint8, self._shape)
        for strip, _ in strips(self._shape):
            codes[strip.slices] = quantise(self._rows[strip.slices])
        codes.flush()
        del self._rows
        self._exact.unlink()
        return found


class _Run:
    """Predictions of all variants, kept as files of codes, and what they are worth."""

    def __init__(
        self,
        config: CompareConfig,
        scenes: Scenes,
        variants: Sequence[Variant],
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self._config = config
        self.scenes = scenes
        self._variants = variants
        self._runtime = runtime
        self._folder = folder
        self._steps: dict[str, list[Steps]] = {variant.name: [] for variant in variants}
        self._costs: dict[str, list[Cost]] = {variant.name: [] for variant in variants}
        self._number = {variant.name: k for k, variant in enumerate(variants)}
        self._counted: dict[str, Histogram] = {}

    def predict(self, progress: Progress) -> dict[Path, Failure]:
        """Run every variant on every scene; scenes that fail are left out, and why."""
        failures: dict[Path, Failure] = {}
        good: list[Labelled] = []
        count, every = len(self._variants), len(self._images)
        for done, image in enumerate(self._images):

            def advance(variants: int, before: int = done * count) -> None:
                progress("comparing", before + variants, every * count)

            failed = attempt(partial(self._predict, len(good), advance), image)
            if failed is None:
                good.append(image)
                continue
            failures[image.scene] = failed
            for name in self._costs:
                del self._costs[name][len(good) :], self._steps[name][len(good) :]
        numbers = site_numbers([image.site_name for image in good])
        good = [replace(image, site=site) for image, site in zip(good, numbers, strict=True)]
        self.scenes = replace(self.scenes, images=good)
        return failures

    def _predict(self, number: int, advance: Callable[[int], None], image: Labelled) -> None:
        config = self._config
        # Borders that a variant without tiles is looked at, for comparison.
        like = next((one.tile for one in self._variants if one.tile), None) or WHOLE_IMAGE_TILE
        with Scene(image.scene, config.band_order) as scene:
            for done, variant in enumerate(self._variants, 1):
                codes = _Codes(self._file(variant, number), image.shape)
                cost = variant.run(scene, codes, self._runtime, config.qa_as_nodata)
                self._costs[variant.name].append(cost)
                self._steps[variant.name].append(codes.finish(variant, like))
                advance(done)

    @property
    def _images(self) -> list[Labelled]:
        return self.scenes.images

    @cached_property
    def _part(self) -> NDArray[np.intp]:
        """The part of each site."""
        return parts_of(self.scenes.sites, self._config.seed)

    @cached_property
    def _parts(self) -> int:
        return int(self._part.max()) + 1

    @cached_property
    def _bootstrap(self) -> SiteBootstrap:
        return SiteBootstrap(self.scenes.sites, self._config.draws, self._config.seed)

    def _codes(self, variant: Variant, number: int) -> Mask:
        """Mapped into memory: read where it is looked at."""
        codes: Mask = np.load(self._file(variant, number), mmap_mode="r")
        return codes

    def _file(self, variant: Variant, number: int) -> Path:
        return self._folder / f"{self._number[variant.name]}-{number}.npy"

    def compare(self) -> tuple[Comparison, Advice]:
        """Every variant at its own thresholds, and at equal precision, and what follows."""
        images = self._images
        comparison = Comparison(
            tuple(self.evaluate(one, self.thresholds(one)) for one in self._variants),
            len(images),
            self.scenes.sites,
            source_words([image.area(self._config.pixel_size).words for image in images]),
        )
        advice = advise(comparison)
        if advice.whole:
            comparison = replace(comparison, equal=self.as_precise_as(advice.whole))
        return comparison, advice

    def evaluate(self, variant: Variant, thresholds: Sequence[int]) -> Evaluation:
        """Figures of one variant at these thresholds, in codes, one for each part of the sites."""
        by_image = [
            self._totals(variant, number, thresholds[self._part[image.site]])
            for number, image in enumerate(self._images)
        ]
        costs = self._costs[variant.name]
        pixels = sum(image.shape.height * image.shape.width for image in self._images)
        network_pixels = sum(cost.network_pixels for cost in costs)
        return Evaluation(
            variant,
            tuple(threshold / CODES for threshold in thresholds),
            SiteTotals(by_image, [image.site for image in self._images], self._bootstrap),
            statistics.median(cost.seconds for cost in costs),
            network_pixels / len(self._images),
            network_pixels / pixels,
        )

    def _totals(self, variant: Variant, number: int, threshold: int) -> Totals:
        image, all_codes = self._images[number], self._codes(variant, number)
        totals = ImageTotals(image.area(self._config.pixel_size))
        with Scene(image.scene, self._config.band_order, quiet=True) as scene:
            for strip in strips(image.shape, SHORE):
                codes = all_codes[strip.read.slices]
                totals.add(
                    strip.own,
                    read_mask(image.truth, strip.read, self._config.kelp_value),
                    _mask(codes, threshold),
                    codes,
                    scene.read_elevation(strip.read) > 0,
                    read_mask(image.labels, strip.read) if image.labels else None,
                    strip.above,
                )
        return totals.finish(self._steps[variant.name][number])[0]

    def thresholds(self, variant: Variant) -> list[int]:
        """Of each part of the sites, in codes; fitted on the others unless one is given."""
        threshold = self._config.decision_threshold
        if threshold is None and self._parts == 1:
            threshold = variant.bundle.spec.threshold
            log.info("one site only: no threshold can be fitted, the bundle's is used")
        if threshold is not None:
            return [code_of(threshold)] * self._parts
        fitted: list[int] = best_threshold(self._others(variant).dice()).tolist()
        return fitted

    def as_precise_as(self, reference: Evaluation) -> tuple[Evaluation, ...]:
        """The variants at the thresholds at which they are as precise as `reference`.

        For each part of the sites: its precision on the other ones is what every variant's lowest
        threshold is sought for, there. Variants that do not reach it are left out, with one site
        all.
        """
        if self._parts == 1:
            return ()
        fitted = [round(threshold * CODES) for threshold in reference.thresholds]
        wanted = self._others(reference.variant).precision()[np.arange(self._parts), fitted]
        found = []
        for variant in self._variants:
            reached = self._others(variant).precision()[:, 1:] >= wanted[:, np.newaxis]
            if reached.any(axis=1).all():
                found.append(self.evaluate(variant, (1 + reached.argmax(axis=1)).tolist()))
        return tuple(found)

    def _others(self, variant: Variant) -> Histogram:
        """Pixels by code of the sites outside each part."""
        if variant.name not in self._counted:
            by_part = Histogram.empty((self._parts,))
            for number, image in enumerate(self._images):
                codes = self._codes(variant, number)
                for strip, _ in strips(image.shape):
                    truth = read_mask(image.truth, strip, self._config.kelp_value)
                    by_part.add(int(self._part[image.site]), truth, codes[strip.slices])
            self._counted[variant.name] = by_part.others()
        return self._counted[variant.name]

    def pictures(self, advice: Advice) -> list[tuple[str, bytes]]:
        """The scenes that gain and lose most by slicing, with what either variant made of them."""
        if advice.sliced is None or advice.whole is None:
            return []
        pair = (advice.whole, advice.sliced)
        dice = [
            [FIGURES["pooled_dice"](totals) for totals in one.totals.by_image] for one in pair
        ]  # NaN without kelp in either
        gains = np.nan_to_num(np.subtract(dice[1], dice[0]))
        shown = []
        for number, words in ((int(gains.argmax()), "gains"), (int(gains.argmin()), "loses")):
            if (gains[number] > 0) != (words == "gains") or gains[number] == 0:
                continue
            image = self._images[number]
            for one, scores in zip(pair, dice, strict=True):
                threshold = round(one.thresholds[self._part[image.site]] * CODES)
                path = self._folder / output_name(image.scene)
                self._write_mask(path, self._codes(one.variant, number), threshold)
                caption = (
                    f"`{image.scene.name}`, which {words} most by slicing: {one.name}, "
                    f"Dice {float(scores[number]):.3f}"
                )
                picture = picture_of(
                    image.scene,
                    path,
                    image.truth,
                    self._config.band_order,
                    self._config.kelp_value,
                    self._config.ignore_georeference,
                )
                shown.append((caption, picture))
        return shown

    def _write_mask(self, path: Path, codes: Mask, threshold: int) -> None:
        shape = Shape.of(codes)
        with RasterWriter(path, shape, "uint8", Georeference(), MASK_NODATA, {}) as out:
            for strip, _ in strips(shape):
                out.write(strip.y, _mask(codes[strip.slices], threshold))


def _mask(codes: Mask, threshold: int) -> Mask:
    """Kelp where a code is at least this."""
    return np.where(codes == MASK_NODATA, MASK_NODATA, codes >= threshold).astype(np.uint8)
