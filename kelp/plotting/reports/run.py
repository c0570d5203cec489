"""`kelp report`: masks and their truth in, one page out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kelp.config import EvaluateConfig, ReportConfig
from kelp.errors import InputError
from kelp.evaluation.scoring import Scores, evaluate
from kelp.io.files import output_folder, write_json
from kelp.plotting.reports.judged import Judged, judge, scenes_of
from kelp.plotting.reports.page import figures_json, history_of, write_page
from kelp.progress import Progress, silent

_SPEC = "bundle.json"


@dataclass(frozen=True)
class ReportResult:
    """What was judged, and the files written."""

    judged: Judged
    page: Path
    figures: Path

    def summary(self) -> str:
        """One line for the terminal."""
        value, low, high = self.judged.figure("pooled_dice")
        dice = "no kelp" if value is None else f"pooled Dice {value:.3f}"
        bounds = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
        return f"{dice}{bounds} of {len(self.judged.names)} scenes; open {self.page}"


def make_report(config: ReportConfig, progress: Progress = silent) -> ReportResult:
    """Judge the masks of a folder against those of another and write a page about it.

    Raises:
        InputError: a prediction is missing (named), a file is unreadable, sizes differ, or the
            run has no bundle.
        TableError: the metadata table has no row for a scene.
    """
    bundle = _bundle(config.run_dir)
    judged = judge(config, progress)
    folder = output_folder(config.output_dir)
    scenes = scenes_of(config, dict.fromkeys(judged.names, folder))
    history = history_of(config.run_dir) if config.run_dir else {}
    page = write_page(folder / "report.html", config, judged, scenes, history, bundle)
    figures = folder / "report.json"
    write_json(figures, figures_json(judged))
    config.record(folder)
    return ReportResult(judged, page, figures)


def evaluate_and_report(config: EvaluateConfig, progress: Progress = silent) -> Scores:
    """`kelp evaluate`: the scores, and where they are written a page about them beside."""
    scores = evaluate(config, progress)
    if config.output_dir is None:
        return scores
    page = make_report(
        ReportConfig(
            gt_dir=config.gt_dir,
            preds_dir=config.preds_dir,
            output_dir=config.output_dir,
            metadata_fp=config.metadata_fp,
            pixel_size=config.pixel_size,
        ),
        progress,
    ).page
    return replace(scores, files=(*scores.files, page))


def _bundle(run_dir: Path | None) -> dict[str, Any] | None:
    """What the bundle of a run says of itself; the weights are not needed here."""
    if run_dir is None:
        return None
    for folder in (run_dir, run_dir / "bundle", run_dir / "artifacts" / "bundle"):
        if (folder / _SPEC).is_file():
            try:
                found: dict[str, Any] = json.loads((folder / _SPEC).read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{folder / _SPEC}: not readable as JSON; copy it again"
                ) from error
            return found
    raise InputError(f"--run_dir {run_dir}: holds no bundle; name a run folder or a bundle")
