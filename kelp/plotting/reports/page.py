"""The page: the answer first, then tables, curves, pictures, and what made the maps."""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

import kelp
from kelp.config import ReportConfig
from kelp.errors import InputError
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.nn.comparison.sums import BINS
from kelp.plotting.charts import by_class, curves, lines
from kelp.plotting.html import Report
from kelp.plotting.preview import picture_of
from kelp.plotting.reports.judged import Judged, Sweep
from kelp.raster.probability import CODES
from kelp.tables import MASK_SUFFIX, WORKERS_FILE

_SCORES: Final = (
    ("pooled_dice", "Dice, pooled over pixels"),
    ("mean_image_dice", "Dice, mean of scenes"),
    ("iou", "IoU"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("boundary_dice", "Dice of the outermost pixels"),
    ("false_kelp_share_of_open_water", "kelp marked in kelp-free water, m²/km²"),
    ("area_by_threshold", "mapped area / true area"),
)
_FROM_PROBABILITIES: Final = (
    ("area_by_probability", "sum of probabilities / true area"),
    ("calibration_error", "calibration error (ECE)"),
)
_FEW_PLACES: Final = 8
_SHARES: Final = (
    ("tiles", 1),
    ("reading", 1),
    ("network", 1),
    ("writing", 1),
    ("peak_memory", 1e6),
)


def write_page(
    path: Path,
    config: ReportConfig,
    judged: Judged,
    scenes: Mapping[str, Path],
    history: Mapping[str, Sequence[tuple[float, float]]],
    bundle: Mapping[str, Any] | None,
) -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        config: the options.
        judged: what the masks are worth.
        scenes: by tile id, for pictures; may be empty.
        history: training curves by name; may be empty.
        bundle: what `bundle.json` holds, if a run was named.
    """
    report = Report(config.title)
    _answer(report, judged)
    report.text("## Scores")
    report.table(_scores_table(judged), "Intervals: 95 %, bootstrap over places")
    _patches(report, judged)
    _curves(report, judged, bundle)
    _gallery(report, config, judged, scenes)
    _training(report, history, bundle)
    _data(report, config, judged)
    _workers(report, config.preds_dir / WORKERS_FILE)
    _again(report, config)
    return report.write(path)


def _answer(report: Report, judged: Judged) -> None:
    value, low, high = judged.figure("pooled_dice")
    places = max(judged.places) + 1
    about = f"{len(judged.names):,} scenes of {places:,} places"
    if value is None:
        sentence = f"**There is no kelp to judge by**, true or mapped, in {about}."
    else:
        bounds = f" (95 % interval {low:.3f} to {high:.3f})" if low is not None else ""
        sentence = f"**Pooled Dice of kelp is {value:.3f}**{bounds}, over {about}."
    if places < _FEW_PLACES:
        sentence += f" With {places} places only, take intervals as too narrow."
    report.text(f"How well do these maps agree with the truth? {sentence}")
    total = judged.total
    report.cards(
        {
            "pooled Dice": _number(value),
            "precision": _number(judged.figure("precision")[0]),
            "recall": _number(judged.figure("recall")[0]),
            "true kelp, km²": f"{float(total['truth_km2']):.2f}",
            "mapped kelp, km²": f"{float(total['mask_km2']):.2f}",
        }
    )


def _scores_table(judged: Judged) -> list[Sequence[object]]:
    names = [*_SCORES, *(_FROM_PROBABILITIES if judged.by_code is not None else ())]
    rows: list[Sequence[object]] = [("figure", "value", "95 %")]
    for name, words in names:
        unit = 1e6 if "m²/km²" in words else 1
        value, bounds = _told(judged.figure(name), unit)
        rows.append((words, value, bounds))
    return rows


def _told(
    figure: tuple[float | None, float | None, float | None], unit: float = 1
) -> tuple[str, str]:
    """A figure and its interval in words."""
    value, low, high = (None if part is None else part * unit for part in figure)
    form = ".0f" if unit > 1 else ".3f"
    known = low is not None and high is not None
    return (
        "–" if value is None else f"{value:{form}}",
        f"{low:{form}} to {high:{form}}" if known else "–",
    )


def _patches(report: Report, judged: Judged) -> None:
    figures = [judged.figure(f"recall_{size}_px") for size in PATCH_SIZES]
    rows: list[Sequence[object]] = [("size, px", "patches", "found", "share", "95 %")]
    for size, figure in zip(PATCH_SIZES, figures, strict=True):
        counts = (int(judged.total[f"{part}_{size}"]) for part in ("patches", "found"))
        rows.append((size, *counts, *_told(figure)))
    report.text("## Small patches")
    report.table(rows, "True patches of which at least half of the pixels are mapped")
    report.figure(
        by_class({"found": [figure[0] for figure in figures]}, list(PATCH_SIZES), "share found"),
        "Share of true kelp patches found, by their size in pixels.",
    )


def _curves(report: Report, judged: Judged, bundle: Mapping[str, Any] | None) -> None:
    if judged.by_code is None:
        report.text(
            "## Curves\n\nNo probabilities lie beside the masks: predict with "
            "`--save_probabilities` for curves and calibration."
        )
        return
    sweep = Sweep.of(judged.by_code)
    best = int(np.nanargmax(np.nan_to_num(sweep.dice)))
    used = f" The bundle decides at {bundle['threshold']:g}." if bundle else ""
    report.text(
        f"## Curves\n\nPooled Dice is highest, {sweep.dice[best]:.3f}, at a threshold of "
        f"{sweep.thresholds[best]:.2f} on these scenes.{used} A threshold chosen here flatters."
    )
    at = list(map(float, sweep.thresholds))
    swept = {
        name: list(zip(at, map(float, values), strict=True))
        for name, values in (
            ("Dice", sweep.dice),
            ("precision", sweep.precision),
            ("recall", sweep.recall),
        )
    }
    report.figure(
        lines(swept, "threshold", "share"), "Dice, precision and recall at every threshold."
    )
    pairs = list(zip(map(float, sweep.recall), map(float, sweep.precision), strict=True))
    report.figure(
        lines({"precision": pairs}, "recall", "precision"),
        "Precision against recall, over all thresholds.",
    )
    known = [(p, share) for p, share in judged.reliability() if p is not None and share is not None]
    ideal = [(0.0, 0.0), (1.0, 1.0)]
    report.figure(
        lines({"these maps": known, "calibrated": ideal}, "mean probability", "share of kelp"),
        f"Reliability in {BINS} classes of probability: calibrated maps lie on the diagonal.",
    )


def _gallery(
    report: Report, config: ReportConfig, judged: Judged, scenes: Mapping[str, Path]
) -> None:
    report.text("## Scenes")
    dice = judged.dice()
    named = zip(dice, judged.names, strict=True)
    ranked = sorted((value, name) for value, name in named if math.isfinite(value))
    rows: list[Sequence[object]] = [("scene", "Dice", "true kelp, km²", "mapped, km²")]
    sums = dict(zip(judged.names, judged.by_image, strict=True))
    shown = [*ranked[: config.pictures]]
    shown += [pair for pair in reversed(ranked[-config.pictures :]) if pair not in shown]
    shown = shown if config.pictures else []
    for value, name in shown:
        areas = (float(sums[name][part]) for part in ("truth_km2", "mask_km2"))
        rows.append((name, round(value, 3), *areas))
    if len(rows) > 1:
        report.table(rows, "The worst scenes, then the best, by their own Dice")
    if not scenes:
        report.text("Give `--data_dir`, the folder of the scenes, to see them here.")
        return
    for k, (value, name) in enumerate(shown):
        words = "one of the worst" if k < len(shown) / 2 else "one of the best"
        mask, truth = (
            config.preds_dir / f"{name}{MASK_SUFFIX}",
            config.gt_dir / f"{name}{MASK_SUFFIX}",
        )
        report.figure(
            picture_of(scenes[name], mask, truth, config.band_order),
            f"`{name}`, {words}: Dice {value:.3f}. The last panel shows hits, misses and false "
            "alarms.",
        )


def _training(
    report: Report,
    history: Mapping[str, Sequence[tuple[float, float]]],
    bundle: Mapping[str, Any] | None,
) -> None:
    if bundle is None:
        return
    report.text("## The network")
    tile = bundle["tile_size"]
    shown = (
        ("architecture", f"{bundle['architecture']}, encoder {bundle['encoder']}"),
        ("channels", ", ".join((*bundle["bands"], *bundle["spectral_indices"]))),
        (
            "trained on",
            f"{'tiles' if bundle['sahi'] else 'images'} of {tile[0]} x {tile[1]} px, "
            f"{bundle['resize_strategy']} to {bundle['image_size']} px",
        ),
        ("epoch", bundle["epoch"]),
        ("threshold", bundle["threshold"]),
        *((f"validation: {name}", value) for name, value in sorted(bundle["scores"].items())),
    )
    report.table([("", ""), *shown], "The model card")
    if history:
        report.figure(curves(history), "Loss and validation scores by epoch.")
    settings = "\n".join(f"{name}: {value}" for name, value in bundle["training"].items())
    report.details("Settings of the training", f"```\n{settings}\n```")


def _data(report: Report, config: ReportConfig, judged: Judged) -> None:
    total = judged.total
    patches = sum(int(total[f"patches_{size}"]) for size in PATCH_SIZES)
    with_kelp = sum(float(sums["truth_km2"]) > 0 for sums in judged.by_image)
    rows: list[Sequence[object]] = [
        ("", ""),
        ("truth", str(config.gt_dir)),
        ("maps", str(config.preds_dir)),
        ("scenes", len(judged.names)),
        ("places", max(judged.places) + 1),
        ("scenes with kelp", with_kelp),
        ("patches of kelp", patches),
        ("true kelp, km²", float(total["truth_km2"])),
        ("probabilities", "yes" if judged.by_code is not None else "no"),
    ]
    report.text("## The data").table(rows, "What was judged")
    report.text(
        "Not observed (255) in a map counts as no kelp, in the truth it is left out. Patches are "
        "8-connected. A pixel of kelp counts whole, however sparse the canopy. Probabilities are "
        f"counted in steps of {1 / CODES:g}. Labels drawn by people are themselves uncertain: "
        "scores say how well maps agree with them."
    )


def _workers(report: Report, path: Path) -> None:
    """What each worker did, where a cluster made the maps."""
    if not path.is_file():
        return
    try:
        shares = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Sequence[object]] = [
            ("worker", "tiles", "reading, s", "network, s", "writing, s", "memory, MB"),
            *(
                (name, *(round(float(share[part]) / unit, 1) for part, unit in _SHARES))
                for name, share in shares.items()
            ),
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged; remove it, it tells of a prediction only") from error
    report.text("## The workers")
    report.table(rows, "Of the last prediction that had work; seconds run beside one another")


def _again(report: Report, config: ReportConfig) -> None:
    record = config.output_dir / config.record_name
    report.text(
        f"## Again\n\n```\nkelp report --config {shlex.quote(str(record))}\n```\n\n"
        f"kelp {kelp.__version__}, Python {platform.python_version()}, numpy {np.__version__}."
    )


def figures_json(judged: Judged) -> dict[str, Any]:
    """The figures of the page by name, each with value, low and high."""
    names = [name for name, _ in (*_SCORES, *_FROM_PROBABILITIES)]
    names += [f"recall_{size}_px" for size in PATCH_SIZES]
    known = judged.by_code is not None
    return {
        "scenes": len(judged.names),
        "places": max(judged.places) + 1,
        "figures": {
            name: dict(zip(("value", "low", "high"), judged.figure(name), strict=True))
            for name in names
            if known or name not in dict(_FROM_PROBABILITIES)
        },
        "dice_by_scene": {
            name: value if math.isfinite(value) else None
            for name, value in zip(judged.names, judged.dice(), strict=True)
        },
        "reliability": [list(pair) for pair in judged.reliability()] if known else None,
    }


def history_of(run_dir: Path) -> dict[str, list[tuple[float, float]]]:
    """Metrics of a run by epoch, for `kelp.plotting.charts.curves`; empty where it kept none."""
    path = run_dir / "artifacts" / "history.json"
    if not path.is_file():
        return {}
    epochs = json.loads(path.read_text(encoding="utf-8"))
    names = {name for epoch in epochs for name in epoch}
    return {
        name: [(i, e[name]) for i, e in enumerate(epochs, 1) if e.get(name) is not None]
        for name in sorted(names)
        if name.startswith(("train/", "val/"))
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
