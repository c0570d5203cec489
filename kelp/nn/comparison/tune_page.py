"""The page of `kelp tune`."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import special

import kelp
from kelp.config import TuneConfig
from kelp.evaluation.calibration import EDGES, THRESHOLDS, reliability
from kelp.nn.comparison.calibrate import Fitted
from kelp.plotting.charts import lines
from kelp.plotting.html import Report


def write_page(path: Path, config: TuneConfig, tuned: Mapping[str, Fitted]) -> Path:
    """Write the page: what was fitted, what it gains, curves and reliability."""
    report = Report("Threshold and calibration")
    for name, one in tuned.items():
        _network(report, name, one)
    record = config.output_dir / config.record_name
    report.text(
        f"## Again\n\n```\nkelp tune --config {shlex.quote(str(record))}\n```\n\n"
        f"kelp {kelp.__version__}, Python {platform.python_version()}, numpy {np.__version__}."
    )
    return report.write(path)


def _network(report: Report, name: str, one: Fitted) -> None:
    found = one.calibration
    scores, low_high = found.scores, found.threshold_interval
    gain = scores["difference"]
    between = f" (95 % interval {gain.bounds('+.3f')})" if gain.low is not None else ""
    stays = "" if found.gains else ", as before"
    if found.carried != found.threshold[0] and not found.gains:
        stays = f", as before: at the new temperature that is what {found.threshold[0]:g} was"
    flat = (
        f" With other sites it might as well have become {low_high[0]:g} to {low_high[1]:g}."
        if low_high
        else ""
    )
    evaluated = (
        "for each site the threshold was fitted on others."
        if found.sites > 1
        else "with one site nobody can tell what a threshold is worth elsewhere."
    )
    report.text(
        f"## {name}\n\n"
        f"Where should kelp begin? **At a probability of {found.kept:g}{stays}**. Fitted, it "
        f"is {found.threshold[1]:g}: pooled Dice {scores['fitted'].number()}, at "
        f"{found.threshold[0]:g} {scores['before'].number()}, {gain.number('+.3f')}{between}. "
        f"Evaluated on {one.images:,} scenes of {found.sites:,} sites; {evaluated}{flat}"
    )
    rows: list[Sequence[object]] = [
        ("", "before", "after"),
        ("threshold", found.threshold[0], found.kept),
        ("temperature", *found.temperature),
        ("calibration error (ECE)", *found.errors),
    ]
    report.table(rows, f"Fitted to {one.words}")
    at = special.expit(EDGES[THRESHOLDS])
    total = found.after.total()
    swept = {"Dice": total.dice(), "precision": total.precision(), "recall": total.recall()}
    report.figure(
        lines(
            {
                name: list(zip(map(float, at), map(float, values[THRESHOLDS]), strict=True))
                for name, values in swept.items()
            },
            "threshold",
            "share",
        ),
        "Dice, precision and recall at every threshold, over all scenes.",
    )
    shown = {
        name: reliability(counted).points()
        for name, counted in (("before", found.before), ("after", found.after))
    }
    report.figure(
        lines(
            {**shown, "calibrated": [(0.0, 0.0), (1.0, 1.0)]}, "mean probability", "share of kelp"
        ),
        "Reliability in tenths of probability: calibrated maps lie on the diagonal.",
    )
