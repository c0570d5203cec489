"""`kelp tune`: threshold and temperature of networks, kept in their bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import special

from kelp.config import TuneConfig
from kelp.errors import ConfigError
from kelp.evaluation.calibration import EDGES, THRESHOLDS, reliability
from kelp.inference.bundle import load_bundle
from kelp.inference.foldruns import runs_of
from kelp.io.files import output_folder, write_json
from kelp.nn.comparison.calibrate import (
    CalibrationOptions,
    Fitted,
    fit_calibration,
    require_own_format,
)
from kelp.nn.comparison.scenes import labelled_scenes
from kelp.plotting.charts import lines
from kelp.plotting.html import Report
from kelp.progress import Progress, silent


@dataclass(frozen=True)
class TuneResult:
    """What `tune` fitted, and the files it wrote."""

    tuned: tuple[Fitted, ...]
    stored: bool
    files: tuple[Path, ...]

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for one in self.tuned:
            found = one.calibration
            gain = found.scores["difference"]
            between = f" ({gain.bounds('+.3f')})" if gain.low is not None else ""
            lines.append(
                f"{one.bundle.path}: kelp from {found.threshold[1]:g} on gains "
                f"{gain.number('+.3f')} pooled Dice{between} over {found.threshold[0]:g}, on "
                f"{found.sites} sites; threshold {found.kept:g}, temperature "
                f"{found.temperature[1]:g} {'stored' if self.stored else 'not stored'}"
            )
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def tune(config: TuneConfig, progress: Progress = silent) -> TuneResult:
    """Fit threshold and temperature of each network and keep them in its bundle.

    Writes `tuning.json` and `report.html`.

    Raises:
        InputError: a truth is missing or does not lie on its scene's grid, a scene cannot be
            read, or none of them shows kelp.
        ConfigError: no bundle, or an ONNX file.
    """
    if not config.run_dir:
        raise ConfigError("--run_dir is missing; name at least one run or bundle")
    runs = runs_of(config.run_dir)
    bundles = [load_bundle(path, config.use_checkpoint) for path in runs]
    for bundle in bundles:
        require_own_format(bundle)
    scenes = [  # all, before hours of one
        labelled_scenes(config, [bundle], config.data_dir, config.gt_dir) for bundle in bundles
    ]
    folder = output_folder(config.output_dir)
    options = CalibrationOptions.of(config)
    tuned = tuple(
        fit_calibration(bundle, where, options, progress)
        for bundle, where in zip(bundles, scenes, strict=True)
    )
    names = [path.name for path in runs]
    networks = [
        {"run": name, "bundle": str(one.bundle.path), **one.to_json()}
        for name, one in zip(names, tuned, strict=True)
    ]
    write_json(folder / "tuning.json", {"networks": networks})
    page = write_page(folder / "report.html", config, dict(zip(names, tuned, strict=True)))
    config.record(folder)
    if config.store:
        for one in tuned:
            one.store()
    return TuneResult(tuned, config.store, (page, folder / "tuning.json"))


def write_page(path: Path, config: TuneConfig, tuned: Mapping[str, Fitted]) -> Path:
    """Write the page: what was fitted, what it gains, curves and reliability."""
    report = Report("Threshold and calibration")
    for name, one in tuned.items():
        _network(report, name, one)
    return report.again("tune", config.output_dir / config.record_name).write(path)


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
        else "one site alone does not show what a threshold is worth elsewhere."
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
