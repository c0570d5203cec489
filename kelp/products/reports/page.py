"""The page: the answer first, then tables, curves, pictures, and what made the maps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kelp.config import ReportConfig
from kelp.config.products import ViewConfig
from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.evaluation.bootstrap import FEW_SITES, Estimate, SiteBootstrap
from kelp.evaluation.calibration import BINS, Reliability
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.evaluation.metrics import FIGURES, SiteTotals, Totals
from kelp.evaluation.pairs import Pair
from kelp.evaluation.scoring import Scores
from kelp.evaluation.thresholds import best_threshold
from kelp.plotting.charts import by_class, curves, lines
from kelp.plotting.html import Report
from kelp.plotting.preview import picture_of
from kelp.products.maps import open_map
from kelp.products.view import Beside, map_section
from kelp.progress import Progress, silent
from kelp.raster.probability import CODES
from kelp.tables import WORKERS_FILE

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
_MAP_SIDE: Final = 700
"""Pixels of a picture of the map; of larger scenes blocks are shown."""
_SHARES: Final = (
    ("tiles", 1),
    ("reading", 1),
    ("network", 1),
    ("writing", 1),
    ("peak_memory", 1e6),
)


@dataclass(frozen=True)
class Evaluated:
    """Masks of scenes and what they are worth."""

    pairs: Sequence[Pair]
    totals: SiteTotals
    bootstrap: SiteBootstrap
    scores: Scores

    def dice(self) -> list[float]:
        """Pooled Dice of each scene; NaN without kelp, true or predicted."""
        return [float(FIGURES["pooled_dice"](one)) for one in self.totals.by_image]

    @property
    def has_probabilities(self) -> bool:
        """Whether there are some beside every mask."""
        return self.scores.histogram is not None

    @property
    def reliability(self) -> Reliability:
        """Of all scenes together."""
        return self.totals.total.reliability


def write_page(
    path: Path,
    config: ReportConfig,
    evaluated: Evaluated,
    history: Mapping[str, Sequence[tuple[float, float]]],
    bundle: Mapping[str, Any] | None,
    progress: Progress = silent,
) -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        config: the options.
        evaluated: what the masks are worth.
        history: training curves by name; may be empty.
        bundle: what `bundle.json` holds, if a run was named.
        progress: progress callback.
    """
    report = Report(config.title)
    _answer(report, evaluated)
    _gallery(report, config, evaluated)
    _map(report, config, evaluated, progress)
    report.text("## Scores")
    report.table(_scores_table(evaluated), "Intervals: 95 %, bootstrap over sites")
    _patches(report, evaluated)
    _curves(report, evaluated, bundle)
    _training(report, history, bundle)
    _data(report, config, evaluated)
    _workers(report, config.preds_dir / WORKERS_FILE)
    return report.again("report", config.output_dir / config.record_name).write(path)


def _answer(report: Report, evaluated: Evaluated) -> None:
    """What a reader wants to know: is the area right, what is missed, what is false, and where."""
    dice = evaluated.totals.figure("pooled_dice")
    sites = evaluated.bootstrap.sites
    about = f"{len(evaluated.pairs):,} scenes of {sites:,} sites"
    if dice.value is None:
        sentence = f"**There is no kelp to evaluate on**, true or mapped, in {about}."
    else:
        bounds = f" (95 % interval {dice.bounds()})" if dice.low is not None else ""
        sentence = f"**Pooled Dice of kelp is {dice.number()}**{bounds}, over {about}."
    if sites < FEW_SITES:
        sentence += f" With {sites} sites only, take intervals as too narrow."
    report.text(f"How well do these maps agree with the truth? {sentence}")
    areas = evaluated.scores.areas
    confusion = evaluated.scores.all_pixels.confusion
    report.cards(
        {
            "pooled Dice": _number(dice.value),
            "precision": _number(confusion.precision),
            "recall": _number(confusion.recall),
            "true kelp, km²": f"{areas.truth_km2:.2f}",
            "mapped kelp, km²": f"{areas.predicted_km2:.2f}",
        }
    )
    if found := _in_words(evaluated):
        report.text("\n".join(f"- {line}" for line in found))


def _in_words(evaluated: Evaluated) -> list[str]:
    """Area, misses, false alarms, and the worst scene, each in a sentence."""
    areas, total = evaluated.scores.areas, evaluated.totals.total
    confusion = evaluated.scores.all_pixels.confusion
    lines = []
    if areas.truth_km2:
        share = areas.predicted_km2 / areas.truth_km2
        lines.append(f"Mapped area is {share:.2f} times the true area ({areas.source}).")
    if confusion.recall is not None:
        small = total[f"found_{PATCH_SIZES[0]}"], total[f"patches_{PATCH_SIZES[0]}"]
        patches = (
            f"; of {int(small[1]):,} patches of {PATCH_SIZES[0]} pixels {int(small[0]):,} are found"
            if small[1]
            else ""
        )
        lines.append(f"{1 - confusion.recall:.0%} of the kelp is missed{patches}.")
    if confusion.precision is not None:
        lines.append(f"{1 - confusion.precision:.0%} of what is mapped as kelp is none.")
    if areas.scored_km2:
        unseen = 1 - areas.observed_km2 / areas.scored_km2
        if unseen > 0:
            lines.append(f"{unseen:.1%} of the labelled area was not observed.")
    if ranked := _ranked(evaluated):
        (value, worst), number = ranked[0], len(ranked)
        if number > 1:
            middle = statistics.median(value for value, _ in ranked)
            lines.append(
                f"The worst of {number:,} scenes with kelp is `{worst}`, Dice {value:.3f}; "
                f"half of them reach {middle:.3f}."
            )
    most = _most_false(evaluated)
    if most is not None:
        name, km2 = most
        lines.append(f"Most false kelp is in `{name}`: {km2:.3f} km².")
    return lines


def _ranked(evaluated: Evaluated) -> list[tuple[float, str]]:
    """Dice and name of the scenes with kelp, true or mapped, the worst first."""
    named = zip(evaluated.dice(), (pair.tile_id for pair in evaluated.pairs), strict=True)
    return sorted((value, name) for value, name in named if math.isfinite(value))


def _most_false(evaluated: Evaluated) -> tuple[str, float] | None:
    """The scene with the largest area of false kelp; `None` without any."""

    def false_km2(totals: Totals) -> float:
        marked = float(totals["tp"] + totals["fp"])
        return float(totals["mask_km2"] * totals["fp"]) / marked if marked else 0.0

    areas = [false_km2(totals) for totals in evaluated.totals.by_image]
    worst = max(range(len(areas)), key=areas.__getitem__)
    return (evaluated.pairs[worst].tile_id, areas[worst]) if areas[worst] else None


def _scores_table(evaluated: Evaluated) -> list[Sequence[object]]:
    names = [*_SCORES, *(_FROM_PROBABILITIES if evaluated.has_probabilities else ())]
    rows: list[Sequence[object]] = [("figure", "value", "95 %")]
    for name, words in names:
        unit = 1e6 if "m²/km²" in words else 1
        value, bounds = _cells(evaluated.totals.figure(name), unit)
        rows.append((words, value, bounds))
    return rows


def _cells(estimate: Estimate, unit: float = 1) -> tuple[str, str]:
    """A figure and its interval in words."""
    form, estimate = (".0f" if unit > 1 else ".3f"), estimate.times(unit)
    return estimate.number(form), estimate.bounds(form)


def _patches(report: Report, evaluated: Evaluated) -> None:
    figures = [evaluated.totals.figure(f"recall_{size}_px") for size in PATCH_SIZES]
    rows: list[Sequence[object]] = [("size, px", "patches", "found", "share", "95 %")]
    for size, figure in zip(PATCH_SIZES, figures, strict=True):
        counts = (int(evaluated.totals.total[f"{part}_{size}"]) for part in ("patches", "found"))
        rows.append((size, *counts, *_cells(figure)))
    report.text("## Small patches")
    report.table(rows, "True patches of which at least half of the pixels are mapped")
    report.figure(
        by_class({"found": [figure.value for figure in figures]}, list(PATCH_SIZES), "share found"),
        "Share of true kelp patches found, by their size in pixels.",
    )


def _curves(report: Report, evaluated: Evaluated, bundle: Mapping[str, Any] | None) -> None:
    histogram = evaluated.scores.histogram
    if histogram is None:
        report.text(
            "## Curves\n\nNo probabilities lie beside the masks: predict with "
            "`--save_probabilities` for curves and calibration."
        )
        return
    dice, precision, recall = (
        values[1:] for values in (histogram.dice(), histogram.precision(), histogram.recall())
    )
    best = int(best_threshold(histogram.dice()))
    used = f" The bundle decides at {bundle['threshold']:g}." if bundle else ""
    report.text(
        f"## Curves\n\nPooled Dice is highest, {np.nan_to_num(dice)[best - 1]:.3f}, at a threshold "
        f"of {best / CODES:.2f} on these scenes.{used} A threshold chosen here is optimistic."
    )
    at = [k / CODES for k in range(1, CODES + 1)]
    swept = {
        name: list(zip(at, map(float, values), strict=True))
        for name, values in (
            ("Dice", dice),
            ("precision", precision),
            ("recall", recall),
        )
    }
    report.figure(
        lines(swept, "threshold", "share"), "Dice, precision and recall at every threshold."
    )
    pairs = list(zip(map(float, recall), map(float, precision), strict=True))
    report.figure(
        lines({"precision": pairs}, "recall", "precision"),
        "Precision against recall, over all thresholds.",
    )
    known = evaluated.reliability.points()
    ideal = [(0.0, 0.0), (1.0, 1.0)]
    report.figure(
        lines({"these maps": known, "calibrated": ideal}, "mean probability", "share of kelp"),
        f"Reliability in {BINS} classes of probability: calibrated maps lie on the diagonal.",
    )


def _gallery(report: Report, config: ReportConfig, evaluated: Evaluated) -> None:
    ranked = _ranked(evaluated)
    by_name = {pair.tile_id: pair for pair in evaluated.pairs}
    totals = dict(zip(by_name, evaluated.totals.by_image, strict=True))
    shown = [*ranked[: config.pictures]]
    shown += [pair for pair in reversed(ranked[-config.pictures :]) if pair not in shown]
    if not config.pictures or not shown:
        return
    report.text("## The worst scenes, and the best")
    rows: list[Sequence[object]] = [("scene", "Dice", "true kelp, km²", "mapped, km²")]
    for value, name in shown:
        areas = (float(totals[name][column]) for column in ("truth_km2", "mask_km2"))
        rows.append((name, round(value, 3), *areas))
    source = evaluated.scores.areas.source
    report.table(rows, f"The worst scenes, then the best, by their own Dice. Areas: {source}")
    if config.data_dir is None:
        report.text("Give `--data_dir`, the folder of the scenes, to see them here.")
        return
    for k, (value, name) in enumerate(shown):
        words = "one of the worst" if k < len(shown) / 2 else "one of the best"
        pair = by_name[name]
        assert pair.scene is not None
        report.figure(
            picture_of(
                pair.scene,
                pair.prediction,
                pair.truth,
                config.band_order,
                config.kelp_value,
                config.ignore_georeference,
            ),
            f"`{name}`, {words}: Dice {value:.3f}. The last panel shows hits, misses and false "
            "alarms.",
        )


def _map(report: Report, config: ReportConfig, evaluated: Evaluated, progress: Progress) -> None:
    """The map of `kelp view`, of the scenes with the lowest Dice, by date."""
    pairs = {pair.tile_id: pair for pair in evaluated.pairs}
    ranked = [name for _, name in _ranked(evaluated)]
    worst = [*ranked, *(name for name in pairs if name not in ranked)][: config.map_scenes]
    opened = [(open_map(pairs[n].prediction, config.pixel_size), pairs[n]) for n in worst]
    opened = [pair for pair in opened if not pair[0].is_turned]
    if not opened:
        return
    opened.sort(key=lambda pair: (pair[0].acquired_text or "9", pair[0].scene_id))
    options = SceneOptions(band_order=config.band_order)
    beside = {
        entry.mask.name: Beside(pair.scene, pair.truth, config.kelp_value, options)
        for entry, pair in opened
    }
    shown = "" if len(opened) == len(pairs) else f"The {len(opened)} of them with the lowest Dice. "
    report.text(
        f"## The map\n\n{shown}Choose a scene below the map, a picture above it, a bed on it; a "
        "click into the map lets the wheel zoom."
    )
    view = ViewConfig(
        predictions_dir=config.preds_dir,
        output=config.output_dir / "map.html",
        run_dir=config.run_dir,
        side=_MAP_SIDE,
    )
    report.insert(map_section([entry for entry, _ in opened], beside, view, progress))


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


def _data(report: Report, config: ReportConfig, evaluated: Evaluated) -> None:
    total = evaluated.totals.total
    rows: list[Sequence[object]] = [
        ("", ""),
        ("truth", str(config.gt_dir)),
        ("maps", str(config.preds_dir)),
        ("scenes", len(evaluated.pairs)),
        ("sites", evaluated.bootstrap.sites),
        ("scenes with kelp", sum(float(one["truth_km2"]) > 0 for one in evaluated.totals.by_image)),
        ("patches of kelp", sum(int(total[f"patches_{size}"]) for size in PATCH_SIZES)),
        ("true kelp, km²", float(total["truth_km2"])),
        ("area of a pixel", evaluated.scores.areas.source),
        ("probabilities", "yes" if evaluated.has_probabilities else "no"),
    ]
    report.text("## The data").table(rows, "What was evaluated")
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


def figures_json(evaluated: Evaluated) -> dict[str, Any]:
    """The figures of the page by name, each with value, low and high."""
    names = [name for name, _ in (*_SCORES, *_FROM_PROBABILITIES)]
    names += [f"recall_{size}_px" for size in PATCH_SIZES]
    known = evaluated.has_probabilities
    reliability = [
        [row["mean_probability"], row["kelp_share"]] for row in evaluated.reliability.rows()
    ]
    tile_ids = [pair.tile_id for pair in evaluated.pairs]
    return {
        "scenes": len(tile_ids),
        "places": evaluated.bootstrap.sites,
        "pixel_size": evaluated.scores.areas.source,
        "figures": {
            name: evaluated.totals.figure(name).to_json()
            for name in names
            if known or name not in dict(_FROM_PROBABILITIES)
        },
        "dice_by_scene": {
            name: value if math.isfinite(value) else None
            for name, value in zip(tile_ids, evaluated.dice(), strict=True)
        },
        "reliability": reliability if known else None,
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
