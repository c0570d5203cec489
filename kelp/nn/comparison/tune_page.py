"""The page of `kelp tune`."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import special

import kelp
from kelp.config import TuneConfig
from kelp.nn.comparison.counted import EDGES, THRESHOLDS, Tuned, dice
from kelp.plotting.charts import lines
from kelp.plotting.html import Report


def write_page(path: Path, config: TuneConfig, tuned: Sequence[Tuned]) -> Path:
    """Write the page: what was fitted, what it gains, curves and reliability."""
    report = Report("Threshold and calibration")
    for one in tuned:
        _network(report, one)
    record = config.output_dir / config.record_name
    report.text(
        f"## Again\n\n```\nkelp tune --config {shlex.quote(str(record))}\n```\n\n"
        f"kelp {kelp.__version__}, Python {platform.python_version()}, numpy {np.__version__}."
    )
    return report.write(path)


def _network(report: Report, one: Tuned) -> None:
    scores, low_high = one.scores(), one.threshold_interval()
    gain, bounds = scores["difference"]
    between = f" (95 % interval {bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else ""
    stays = "" if one.gains else ", as before"
    if one.carried != one.threshold[0] and not one.gains:
        stays = f", as before: at the new temperature that is what {one.threshold[0]:g} was"
    flat = (
        f" Had other places been at hand, it might as well have become {low_high[0]:g} to "
        f"{low_high[1]:g}."
        if low_high
        else ""
    )
    judged = (
        "for each place the threshold was fitted on others."
        if one.places > 1
        else "with one place nobody can tell what a threshold is worth elsewhere."
    )
    report.text(
        f"## {one.name}\n\n"
        f"Where should kelp begin? **At a probability of {one.kept:g}{stays}**. Fitted, it "
        f"is {one.threshold[1]:g}: pooled Dice {scores['fitted'][0]:.3f}, at "
        f"{one.threshold[0]:g} {scores['before'][0]:.3f}, {gain:+.3f}{between}. Judged on "
        f"{one.images:,} scenes of {one.places:,} places; {judged}{flat}"
    )
    errors = one.before.calibration_error(), one.after.calibration_error()
    rows: list[Sequence[object]] = [
        ("", "before", "after"),
        ("threshold", one.threshold[0], one.kept),
    ]
    rows += [
        ("temperature", *one.temperature),
        ("calibration error (ECE)", *errors),
    ]
    report.table(rows, f"Fitted to {one.scenes}")
    at = special.expit(EDGES[THRESHOLDS])
    totals = one.after.outcomes().sum(axis=0).astype(float)
    tp, fp, fn = totals
    with np.errstate(invalid="ignore"):
        swept = {
            "Dice": dice(totals),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
        }
    report.figure(
        lines(
            {k: list(zip(map(float, at), map(float, v), strict=True)) for k, v in swept.items()},
            "threshold",
            "share",
        ),
        "Dice, precision and recall at every threshold, over all scenes.",
    )
    shown = {}
    for name, counted in (("before", one.before), ("after", one.after)):
        _, p, share = counted.reliability()
        shown[name] = [(float(a), float(b)) for a, b in zip(p, share, strict=True) if a == a]
    report.figure(
        lines(
            {**shown, "calibrated": [(0.0, 0.0), (1.0, 1.0)]}, "mean probability", "share of kelp"
        ),
        "Reliability in tenths of probability: calibrated maps lie on the diagonal.",
    )
