"""A comparison to read: the table for the terminal, and the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kelp.config import CompareConfig
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.evaluation.metrics import OPEN_WATER
from kelp.nn.comparison.advice import Advice
from kelp.nn.comparison.result import Comparison, Evaluation
from kelp.plotting.charts import by_class, intervals
from kelp.plotting.html import Report

_SCORES: Final = (
    ("iou", "IoU"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("boundary_dice", "boundary Dice"),
    ("seam_score", "seam"),
)
_BESIDE: Final = ("mean_image_dice", "seam_score")
_FOUND: Final = tuple((f"recall_{size}_px", f"{size} px") for size in PATCH_SIZES)

_WIDTH: Final = 100
"""Of the words below a plain-text table."""
_EQUAL: Final = (
    "Thresholds at which every variant is as precise as that one, fitted on other sites. "
    "Precision: as reached where it was not fitted; px: share of the patches of that size found; "
    "false: kelp marked in water farther than 3 px from true kelp. No figures: never as precise."
)


def to_text(comparison: Comparison, advice: Advice) -> str:
    """Aligned plain-text tables, and the advice."""
    head = ["variant", "Dice", "95 %", "less whole", "95 %", "mean Dice", "seam", "cost", "s"]
    rows = [head]
    for one in comparison.evaluations:
        dice = one.figure("pooled_dice")
        gain = one.difference(advice.whole)
        mean, seam = (one.figure(name).number() for name in _BESIDE)
        rows.append(
            [
                one.name,
                dice.number(),
                dice.bounds(),
                gain.number("+.3f"),
                gain.bounds("+.3f"),
                mean,
                seam,
                f"{one.multiplier:.1f}",
                f"{one.seconds:.2f}",
            ]
        )
    legend = (
        "mean Dice: of the images; cost: network pixels for each scene pixel; s: seconds an image; "
        "seam: 1 = none shows"
    )
    lines = [*_aligned(rows), *textwrap.wrap(legend, _WIDTH)]
    if advice.whole and comparison.equal:
        rows = [[_cell(cell) for cell in row] for row in _equal_table(comparison, advice.whole)]
        words = f"At the precision of: {advice.whole.name}"
        lines += ["", words, *_aligned(rows), *textwrap.wrap(_EQUAL, _WIDTH)]
    return "\n".join([*lines, "", advice.text])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_report(
    path: Path,
    comparison: Comparison,
    advice: Advice,
    config: CompareConfig,
    scenes: str,
    pictures: Sequence[tuple[str, bytes]],
    left_out: Sequence[str],
) -> Path:
    """One self-contained HTML file: question and answer first."""
    report = Report("Should I slice?").text(f"**{advice.text}**")
    report.text(_set_up(comparison, config, scenes))
    _dice_section(report, comparison, advice)
    _patches_section(report, comparison, advice)
    _area_section(report, comparison, advice)
    if pictures:
        report.text("## Where it matters most")
    for caption, png in pictures:
        report.figure(png, caption)
    if left_out:
        report.text(
            "## Left out\n\nShown more than `--largest_pass` "
            f"{config.largest_pass} pixels at once: {', '.join(left_out)}."
        )
    runs = ",".join(map(str, config.run_dir))
    report.text(
        "## Again\n\n```\nkelp compare --config "
        f"{config.output_dir / 'kelp-compare.yaml'}\n```\n\nNetworks: `{runs}`."
    )
    return report.write(path)


def _set_up(comparison: Comparison, config: CompareConfig, scenes: str) -> str:
    """What was compared, and how."""
    threshold = (
        "Each part of the sites is evaluated at the threshold that is best on the others; the "
        "tiles of the seed's merge vote at it."
        if config.decision_threshold is None
        else f"Kelp is where the probability is at least {config.decision_threshold:g}."
    )
    return (
        f"{comparison.images} labelled scenes of {comparison.sites} sites, "
        f"{len(comparison.evaluations)} variants of applying the same networks. Intervals "
        f"hold the middle 95 % of {config.draws:,} bootstrap draws of sites, the same draws for "
        f"every variant. Scenes: {scenes}. {threshold}"
    )


def _dice_section(report: Report, comparison: Comparison, advice: Advice) -> None:
    dice = {one.name: one.figure("pooled_dice") for one in comparison.evaluations}
    report.figure(
        intervals({name: (e.value, e.low, e.high) for name, e in dice.items()}, "pooled Dice"),
        "Pooled Dice of every variant, with its 95 % interval. Overlapping intervals say little: "
        "the variants saw the same sites, so look at the differences below.",
    )
    report.table(dice_table(comparison, advice.whole), "Dice and cost; differences are paired")


def _patches_section(report: Report, comparison: Comparison, advice: Advice) -> None:
    report.text("## What is found, and what is not there")
    report.table(
        _figures_table(comparison, _SCORES, ("false kelp, m² per km²", OPEN_WATER)),
        "Scores of pixels. False kelp: marked, of the water farther than 3 px from true kelp. "
        "Seam: 1 = borders of tiles do not show",
    )
    report.table(_figures_table(comparison, _FOUND), "Share of the true patches found, by size")
    report.figure(
        by_class(
            {
                one.name: [one.figure(f"recall_{size}_px").value for size in PATCH_SIZES]
                for one in _leaders(comparison, advice)
            },
            [f"{size} px" for size in PATCH_SIZES],
            "share of patches found",
        ),
        "Kelp patches found, by their size: at least half of a patch's pixels must be marked.",
    )
    if advice.whole and comparison.equal:
        report.table(
            _equal_table(comparison, advice.whole),
            f"At the precision of: {advice.whole.name}. {_EQUAL}",
        )


def _area_section(report: Report, comparison: Comparison, advice: Advice) -> None:
    report.text("## Probabilities and area")
    report.table(
        _area_table(comparison),
        f"Calibration error, and kelp area by either reckoning as a share of the true one. Areas: "
        f"{comparison.area}",
    )
    report.figure(
        by_class(
            {
                one.name: [row["kelp_share"] for row in one.totals.total.reliability.rows()]
                for one in _leaders(comparison, advice)
            },
            [f"{k / 10:.1f}-{(k + 1) / 10:.1f}" for k in range(10)],
            "share of kelp",
        ),
        "Reliability: of the pixels with such a probability, the share that is kelp.",
    )


def _leaders(comparison: Comparison, advice: Advice) -> list[Evaluation]:
    """The variants to draw: the two that the advice is about, and the seed's merge."""
    seeds = [one for one in comparison.evaluations if one.variant.kind == "seed"]
    wanted = [advice.whole, advice.sliced, *seeds[:1]]
    return [one for one in wanted if one is not None]


def dice_table(comparison: Comparison, whole: Evaluation | None) -> list[Sequence[object]]:
    """Dice and cost of every variant, for a report; differences are to `whole`."""
    head = (
        "variant",
        "pooled Dice",
        "95 %",
        "less whole",
        "95 %",
        "mean Dice",
        "cost",
        "s an image",
    )
    rows: list[Sequence[object]] = [head]
    for one in comparison.evaluations:
        dice = one.figure("pooled_dice")
        gain = one.difference(whole)
        mean = one.figure("mean_image_dice").value
        row = (one.name, dice.value, dice.bounds(), gain.value, gain.bounds("+.3f"))
        rows.append((*row, mean, one.multiplier, one.seconds))
    return rows


def _equal_table(comparison: Comparison, whole: Evaluation) -> list[Sequence[object]]:
    """What each variant finds at equal precision, and what it marks in kelp-free water."""
    units = [(*column, 1.0, ".3f") for column in _FOUND[:2]]
    units.append((OPEN_WATER, "false m²/km²", 1e6, ".0f"))
    head = ["variant", "precision"]
    for _, words, _, _ in units:
        head += [words, "less whole", "95 %"]
    rows: list[Sequence[object]] = [head]
    other = comparison.equal_to(whole)
    for variant in comparison.evaluations:
        one = comparison.equal_to(variant)
        row: list[object] = [variant.name]
        if one is None or other is None:
            rows.append([*row, *[None] * (len(head) - 1)])
            continue
        row.append(one.figure("precision").value)
        for name, _, unit, form in units:
            figure = one.figure(name).times(unit)
            gain, signed = one.difference(other, name).times(unit), f"+{form}"
            row += [figure.number(form), gain.number(signed), gain.bounds(signed)]
        rows.append(row)
    return rows


def _figures_table(
    comparison: Comparison,
    columns: Sequence[tuple[str, str]],
    millionths: tuple[str, str] | None = None,
) -> list[Sequence[object]]:
    """Figures without intervals; the last column in millionths, where there is one."""
    head = ["variant", *(words for _, words in columns)]
    rows: list[Sequence[object]] = [head]
    for one in comparison.evaluations:
        row: list[object] = [one.name]
        row += [one.figure(name).value for name, _ in columns]
        if millionths:
            share = one.figure(millionths[1]).value
            row.append(None if share is None else share * 1e6)
        rows.append(row)
    if millionths:
        head.append(millionths[0])
    return rows


def _area_table(comparison: Comparison) -> list[Sequence[object]]:
    names = ("calibration_error", "area_by_threshold", "area_by_probability")
    head = ("variant", "calibration error", "thresholded area", "95 %", "sum of p", "95 %")
    rows: list[Sequence[object]] = [head]
    for one in comparison.evaluations:
        error, mask, expected = (one.figure(name) for name in names)
        row = (one.name, error.value, mask.value, mask.bounds())
        rows.append((*row, expected.value, expected.bounds()))
    return rows


def _cell(value: object) -> str:
    """A number to three places; words as they are."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3f}"
