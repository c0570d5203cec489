"""Scores of a folder of masks against truth: `kelp evaluate`, and what `kelp report` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kelp.config.predict import EvaluateConfig
from kelp.config.shared import PixelSizeOptions, TruthOptions
from kelp.evaluation.confusion import PATCH_SIZES, Figures, mean_dice
from kelp.evaluation.metrics import SHORE, ImageTotals, Totals
from kelp.evaluation.pairs import Pair, find_pairs, require_pair, sites_of, strips
from kelp.evaluation.thresholds import Histogram
from kelp.io.executors import gather, spread
from kelp.io.failures import Failure, attempt, raise_failures
from kelp.io.files import output_folder, write_json, write_text
from kelp.progress import Progress, silent
from kelp.raster.area import GroundArea
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.probability import quantise
from kelp.raster.scene import Scene
from kelp.tables import PROBABILITY_SUFFIX


@dataclass(frozen=True)
class PairOptions:
    """How pairs are read; see `kelp.config.shared`."""

    kelp_value: int = 1
    ignore_georeference: bool = False
    pixel_size: float = 30.0
    band_order: Sequence[str] = ()

    @classmethod
    def of(cls, config: TruthOptions, band_order: Sequence[str] = ()) -> PairOptions:
        """Those of a command."""
        pixel_size = config.pixel_size if isinstance(config, PixelSizeOptions) else 30.0
        return cls(config.kelp_value, config.ignore_georeference, pixel_size, tuple(band_order))


class PairScore(NamedTuple):
    """What one image is worth."""

    figures: Figures
    """Of all labelled pixels; a prediction of 255 counts as no kelp."""
    observed: Figures
    """Of the pixels that the prediction observed."""
    totals: Totals
    histogram: Histogram | None
    """By code of probability; `None` without probabilities beside the mask."""
    area: str
    """Where the area of a pixel comes from, in words."""


def score_pair(options: PairOptions, pair: Pair) -> PairScore:
    """Score a mask, and the probabilities that lie beside it, against its truth, in strips.

    Raises:
        InputError: a file cannot be read, or the two do not lie on one grid.
    """
    grid = require_pair(pair, options.ignore_georeference)
    area = GroundArea.of_file(pair.prediction, grid.georeference, grid.shape, options.pixel_size)
    probabilities = pair.prediction.with_name(pair.tile_id + PROBABILITY_SUFFIX)
    soft = probabilities.is_file()
    if soft:
        require_pair(replace(pair, prediction=probabilities), options.ignore_georeference)
    histogram = Histogram.empty(())
    image = ImageTotals(area)
    for strip in strips(grid.shape, SHORE):
        truth = read_mask(pair.truth, strip.read, options.kelp_value)
        codes = quantise(read_probability(probabilities, strip.read)) if soft else None
        land = None
        if pair.scene:
            with Scene(pair.scene, options.band_order, quiet=True) as scene:
                land = scene.read_elevation(strip.read) > 0
        mask = read_mask(pair.prediction, strip.read)
        image.add(strip.own, truth, mask, codes, land, above=strip.above)
        if codes is not None:
            own = slice(strip.above, strip.above + strip.own.height)
            histogram.add((), truth[own], codes[own])
    totals, (figures, observed) = image.finish()
    return PairScore(figures, observed, totals, histogram if soft else None, area.words)


@dataclass(frozen=True)
class Areas:
    """Areas in km2 of the labelled pixels, and where the area of a pixel comes from.

    A kelp pixel counts whole, however sparse the canopy: presence area, an upper bound.
    """

    truth_km2: float
    predicted_km2: float
    scored_km2: float
    observed_km2: float
    source: str

    @classmethod
    def of(cls, total: Totals, sources: Sequence[str]) -> Areas:
        """From sums over images, and the source of each image's areas."""
        return cls(
            float(total["truth_km2"]),
            float(total["mask_km2"]),
            float(total["labelled_km2"]),
            float(total["observed_km2"]),
            source_words(sources),
        )

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {
            "truth_kelp_km2": self.truth_km2,
            "predicted_kelp_km2": self.predicted_km2,
            "scored_km2": self.scored_km2,
            "observed_km2": self.observed_km2,
            "pixel_size": self.source,
        }


def source_words(sources: Sequence[str]) -> str:
    """Where areas of images come from: one source, or each with the number of its images."""
    counts = Counter(sources)
    if len(counts) == 1:
        return sources[0]
    parts = (f"{words} for {n} of {len(sources)} images" for words, n in counts.most_common())
    return ", ".join(parts)


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found.

    Attributes:
        all_pixels: figures where a prediction of 255 counts as no kelp.
        observed_pixels: figures of the pixels that the prediction observed.
        areas: areas in km2.
        by_site: figures of each site's images, by `aoi_id`; empty without a metadata table.
        tile_ids: the images.
        by_image: sums of each of them.
        histogram: by code of probability; `None` where an image has no probabilities.
        files: the files written.
        failures: why images could not be scored, by tile id; nothing counts them.
    """

    all_pixels: Figures
    observed_pixels: Figures
    areas: Areas
    by_site: Mapping[str, Figures] = field(default_factory=dict)
    tile_ids: tuple[str, ...] = ()
    by_image: tuple[Totals, ...] = ()
    histogram: Histogram | None = None
    files: tuple[Path, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)

    def require_all(self, folder: Path | None) -> None:
        """Raise an error that names the images that could not be scored, if there are any.

        Args:
            folder: of the outputs, where tracebacks of bugs go.

        Raises:
            InputError: unreadable files, or such that do not lie on one grid.
            BugError: images that met a bug.
        """
        total = len(self.tile_ids) + len(self.failures)
        raise_failures(self.failures, total, "images", folder, self)

    @property
    def mean_site_dice(self) -> float | None:
        """Mean over sites of the Dice pooled within each; a site without any kelp scores 1."""
        return mean_dice([figures.pooled_dice for figures in self.by_site.values()])

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file: finite numbers, `None` where undefined."""
        sites: dict[str, Any] = {
            "mean_place_dice": self.mean_site_dice,
            "by_place": {
                site: {
                    "images": figures.images,
                    "pooled_dice": figures.pooled_dice,
                    "mean_image_dice": figures.mean_image_dice,
                }
                for site, figures in self.by_site.items()
            },
        }
        return {
            "images": self.all_pixels.images,
            "all_pixels": self.all_pixels.to_json(),
            "observed_pixels": self.observed_pixels.to_json(),
            "areas": self.areas.to_json(),
            **(sites if self.by_site else {}),
        }

    def to_text(self) -> str:
        """An aligned plain-text table."""
        return _table(self)

    def summary(self) -> str:
        """The table, and where it was written."""
        return "\n".join([self.to_text(), *(f"wrote {path}" for path in self.files)])


def _table(scores: Scores) -> str:
    both = (scores.all_pixels, scores.observed_pixels)

    def row(name: str, values: Sequence[float | None]) -> str:
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        return f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells)

    def patch_row(k: int) -> str:
        cells = [f"{f.patches[k].found} of {f.patches[k].patches}" for f in both]
        return f"{f'  {PATCH_SIZES[k]} px':<26}" + "".join(f"{cell:>16}" for cell in cells)

    images = f"{both[0].images} image{'' if both[0].images == 1 else 's'}"
    lines = [
        f"{images:<26}{'all pixels':>16}{'observed only':>16}",
        row("Dice, pooled", [f.pooled_dice for f in both]),
        row("Dice, mean of images", [f.mean_image_dice for f in both]),
        *(row(name, [f.confusion.scores()[key] for f in both]) for name, key in _RATIOS),
        "patches found, by size",
        *(patch_row(k) for k in range(len(PATCH_SIZES))),
    ]
    if scores.by_site:
        lines.append(row(f"Dice, mean of {len(scores.by_site)} sites", [scores.mean_site_dice]))
    areas = scores.areas
    return "\n".join(
        [
            *lines,
            f"{'kelp area, truth':<26}{areas.truth_km2:>12.3f} km2 ({areas.source})",
            f"{'kelp area, predicted':<26}{areas.predicted_km2:>12.3f} km2 ({areas.source})",
            f"{'area observed':<26}{areas.observed_km2:>12.3f} km2 of {areas.scored_km2:.3f} km2"
            f" ({areas.source})",
        ]
    )


_RATIOS = (("IoU", "iou"), ("precision", "precision"), ("recall", "recall"))


def score_pairs(
    pairs: Sequence[Pair],
    options: PairOptions,
    workers: int = 1,
    scheduler: str | None = None,
    sites: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score all pairs; see `score_pair`. Those that fail are left out and noted in the scores.

    Args:
        pairs: the files.
        options: how they are read.
        workers: processes.
        scheduler: of a cluster.
        sites: by tile id, for scores by site.
        progress: gets the number of images.

    Raises:
        InputError: no pair at all can be scored.
    """
    failures: dict[str, Failure] = {}
    everything, observed = Figures(), Figures()
    by_site: dict[str, Figures] = {}
    by_image: list[Totals] = []
    sources: list[str] = []
    histogram: Histogram | None = Histogram.empty(())
    with (
        gather(workers, scheduler) as executor,
        closing(spread(partial(attempt, partial(score_pair, options)), pairs, executor)) as scored,
    ):
        for done, (pair, score) in enumerate(zip(pairs, scored, strict=True), 1):
            progress("scoring", done, len(pairs))
            if isinstance(score, Failure):
                failures[pair.tile_id] = score
                continue
            everything = everything.plus(score.figures)
            observed = observed.plus(score.observed)
            by_image.append(score.totals)
            sources.append(score.area)
            histogram = histogram and score.histogram and histogram.plus(score.histogram)
            if sites:
                site = sites[pair.tile_id]
                by_site[site] = by_site.get(site, Figures()).plus(score.figures)
    if len(failures) == len(pairs):
        raise_failures(failures, len(pairs), "images", None)
    return Scores(
        everything,
        observed,
        Areas.of(Totals.of(by_image), sources),
        dict(sorted(by_site.items())),
        tuple(pair.tile_id for pair in pairs if pair.tile_id not in failures),
        tuple(by_image),
        histogram,
        failures=failures,
    )


def evaluate(config: EvaluateConfig, progress: Progress = silent) -> Scores:
    """Score the masks of a folder against those of another, paired by tile id.

    Predictions without truth are not looked at. With `metadata_fp` also by site (`aoi_id`).
    Images that fail are left out, and named when the others are scored.

    Raises:
        InputError: a prediction is missing (named), masks are unreadable, or pairs do not lie on
            one grid. The error's `result` has the scores of the others.
        BugError: a bug ended some images; the others are scored.
        TableError: the metadata table has no row for an image.
    """
    scores = score_folder(config, progress)
    scores.require_all(config.output_dir)
    return scores


def score_folder(config: EvaluateConfig, progress: Progress = silent) -> Scores:
    """`evaluate`, with images that fail noted in the scores."""
    config = config.absolute() if config.scheduler else config
    pairs = find_pairs(config.gt_dir, config.preds_dir, config)
    table = config.metadata_fp
    sites = sites_of(table, [pair.tile_id for pair in pairs]) if table else None
    options = PairOptions.of(config)
    scores = score_pairs(pairs, options, config.workers, config.scheduler, sites, progress)
    if config.output_dir is None:
        return scores
    folder = output_folder(config.output_dir)
    files = (folder / "scores.json", folder / "scores.txt")
    write_json(files[0], scores.to_json())
    write_text(files[1], scores.to_text() + "\n")
    config.record(folder)
    return replace(scores, files=files)
