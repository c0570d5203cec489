"""`kelp report`: masks and their truth in, one page out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kelp.config import EvaluateConfig, ReportConfig
from kelp.evaluation.bootstrap import SiteBootstrap, site_numbers
from kelp.evaluation.intervals import read_description
from kelp.evaluation.metrics import SiteTotals
from kelp.evaluation.pairs import Pair, find_pairs, sites_of
from kelp.evaluation.scoring import PairOptions, Scores, score_folder, score_pairs
from kelp.io.failures import raise_failures
from kelp.io.files import output_folder, write_json
from kelp.io.location import packaged
from kelp.products.reports.page import Evaluated, figures_json, history_of, write_page
from kelp.progress import Progress, silent


@dataclass(frozen=True)
class ReportResult:
    """What was evaluated, and the files written."""

    evaluated: Evaluated
    page: Path
    figures: Path

    def summary(self) -> str:
        """One line for the terminal."""
        estimate = self.evaluated.totals.figure("pooled_dice")
        dice = "no kelp" if estimate.value is None else f"pooled Dice {estimate.number()}"
        bounds = "" if estimate.low is None else f" ({estimate.bounds()})"
        return f"{dice}{bounds} of {len(self.evaluated.pairs)} scenes; open {self.page}"


def make_report(config: ReportConfig, progress: Progress = silent) -> ReportResult:
    """Evaluate the masks of a folder against those of another and write a page about it.

    Scenes that fail are left out, and named when the page is written.

    Raises:
        InputError: a prediction is missing (named), files are unreadable, or grids differ.
        BundleError: `run_dir` holds no bundle.
        BugError: a bug ended some scenes; the page is of the others.
        TableError: the metadata table has no row for a scene.
    """
    bundle = read_description(packaged(config.run_dir))[1] if config.run_dir else None
    pairs = find_pairs(config.gt_dir, config.preds_dir, config, config.data_dir)
    options = PairOptions.of(config, config.band_order)
    scores = score_pairs(pairs, options, progress=progress)
    result = _write(config, pairs, scores, bundle, progress)
    raise_failures(scores.failures, len(pairs), "scenes", config.output_dir, result)
    return result


def _write(
    config: ReportConfig,
    pairs: list[Pair],
    scores: Scores,
    bundle: dict[str, Any] | None,
    progress: Progress = silent,
) -> ReportResult:
    pairs = [pair for pair in pairs if pair.tile_id not in scores.failures]
    names = [pair.tile_id for pair in pairs]
    sites = site_numbers(list(sites_of(config.metadata_fp, names).values()))
    bootstrap = SiteBootstrap(max(sites) + 1, config.draws, config.seed)
    evaluated = Evaluated(pairs, SiteTotals(scores.by_image, sites, bootstrap), bootstrap, scores)
    folder = output_folder(config.output_dir)
    history = history_of(config.run_dir) if config.run_dir else {}
    page = write_page(folder / "report.html", config, evaluated, history, bundle, progress)
    figures = folder / "report.json"
    write_json(figures, figures_json(evaluated))
    config.record(folder)
    return ReportResult(evaluated, page, figures)


def evaluate_and_report(config: EvaluateConfig, progress: Progress = silent) -> Scores:
    """`kelp evaluate`: the scores, and where they are written a page about them beside."""
    scores = score_folder(config, progress)
    if config.output_dir is None:
        scores.require_all(None)
        return scores
    report = ReportConfig(
        gt_dir=config.gt_dir,
        preds_dir=config.preds_dir,
        output_dir=config.output_dir,
        metadata_fp=config.metadata_fp,
        pixel_size=config.pixel_size,
        kelp_value=config.kelp_value,
        ignore_georeference=config.ignore_georeference,
        map_scenes=0,
    )
    pairs = find_pairs(config.gt_dir, config.preds_dir, config)
    page = _write(report, pairs, scores, None).page
    scores = replace(scores, files=(*scores.files, page))
    scores.require_all(config.output_dir)
    return scores
