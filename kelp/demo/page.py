"""The report of the demo: what was done, how well, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kelp import tables
from kelp.config import DemoConfig
from kelp.demo.coast import Coast, draw_quarters
from kelp.evaluation.scoring import Scores
from kelp.io.location import local
from kelp.plotting import style
from kelp.plotting.charts import curves
from kelp.plotting.html import Report
from kelp.plotting.preview import picture_of
from kelp.products.reports.page import history_of
from kelp.sensors.record import read_record, record_path

if TYPE_CHECKING:
    from kelp.inference.predict import PredictResult
    from kelp.nn.comparison.compare import CompareResult
    from kelp.nn.training.result import TrainResult

REAL_SCENE: Final = "OL000001_satellite_georef.tif"
_PICTURES: Final = 2


@dataclass(frozen=True)
class Outcome:
    """Everything that the report shows."""

    config: DemoConfig
    training: TrainResult
    scores: Scores
    packaged: Scores
    """Of the network that comes with kelp, on the same images."""
    comparison: CompareResult
    real: PredictResult
    coast: Coast | None
    seconds: dict[str, float]
    """Of each step, in order."""


def real_scene() -> resources.abc.Traversable:
    """The packaged Landsat scene."""
    return resources.files("kelp.demo").joinpath("data", REAL_SCENE)


def write_report(path: Path, outcome: Outcome, raw: Path, predictions: Path) -> Path:
    """Write the page to `path`; `raw` and `predictions` hold the images and masks it shows."""
    scores, training = outcome.scores, outcome.training
    figures = scores.all_pixels
    packaged = outcome.packaged.all_pixels
    seconds = sum(s for step, s in outcome.seconds.items() if step.startswith("train on"))
    report = Report("kelp demo").text(
        f"**The network that comes with kelp finds kelp at {packaged.images} simulated places that "
        f"it has never seen with a Dice of {_number(packaged.pooled_dice)}; the small one that was "
        f"trained here on slices, for {seconds:.0f} seconds, with "
        f"{_number(figures.pooled_dice)}.** Truth is the simulation's own, not the noisy labels "
        "that they learn from. Scores on simulated data say that the tool works, not how well "
        "kelp is found in real images."
    )
    report.cards(
        {
            "pooled Dice, network of kelp": _number(packaged.pooled_dice),
            "pooled Dice, network of this demo": _number(figures.pooled_dice),
            "first map after": f"{next(iter(outcome.seconds.values())):.1f} s",
            "seconds in all": f"{sum(outcome.seconds.values()):.0f}",
        }
    )
    _real_section(report, outcome.real)
    report.text("## Scores on the test images").text(f"```\n{scores.to_text()}\n```")
    report.text("## Training").figure(
        curves(history_of(training.run_dir)), "Loss and validation scores by epoch."
    )
    report.text(
        "## Predictions of unseen places\n\nBy the network of this demo: the scenes with the most "
        "kelp, and the one with the most false kelp."
    )
    for scene, words in _shown(raw, scores).items():
        name = tables.output_name(scene)
        picture = picture_of(scene, predictions / "test" / name, raw / "test_truth" / name)
        report.figure(picture, f"`{scene.name}`, {words}: simulated scene, truth and prediction.")
    _comparison_section(report, outcome.comparison)
    if outcome.coast:
        _coast_section(report, outcome.coast, path.parent)
    report.text("## Where the time went").table(
        [("step", "seconds"), *((k, round(v, 1)) for k, v in outcome.seconds.items())]
    )
    report.text(
        "## Next\n\n"
        f"- Look at the run: `mlflow ui --backend-store-uri sqlite:///{path.parent}/mlruns/"
        "mlflow.db`\n"
        "- Map your own scenes: `kelp predict --data_dir scenes --output_dir maps`; with the "
        f"network of this demo: `--run_dir {training.run_dir}`"
    )
    return report.write(path)


def _shown(raw: Path, scores: Scores) -> dict[Path, str]:
    """Test scenes to look at: those with the most kelp, and the worst, with a word on each."""
    scenes = {path.name: path for path in sorted((raw / "test" / "images").glob("*.tif"))}
    counts = {
        scenes[f"{tile_id}{tables.IMAGE_SUFFIX}"]: totals
        for tile_id, totals in zip(scores.tile_ids, scores.by_image, strict=True)
    }
    most = sorted(counts, key=lambda scene: -(counts[scene]["tp"] + counts[scene]["fn"]))
    worst = max(counts, key=lambda scene: counts[scene]["fp"])
    shown = {scene: "much kelp" for scene in most[:_PICTURES] if scene != worst}
    return shown | {worst: f"the worst, {int(counts[worst]['fp']):,} false pixels"}


def _comparison_section(report: Report, found: CompareResult) -> None:
    from kelp.nn.comparison.page import dice_table

    report.text(
        f"## Should I slice?\n\n**{found.advice.text}** Two networks, of one kind and trained "
        "alike until each had seen about the same number of network pixels: one was shown slices "
        "(the recipe of `kelp train --sahi True`), the other whole images. Thresholds are fitted, "
        "each on other places; more is in [the whole comparison](comparison/report.html)."
    )
    report.table(
        dice_table(found.comparison, found.advice.whole), "Intervals: 95 %, over the test places"
    )


def _real_section(report: Report, real: PredictResult) -> None:
    (mask,) = map(local, real.masks)
    record = read_record(record_path(mask))
    doubt = ""
    if record.guard and not record.guard.ok:
        reasons = "; ".join(record.guard.reasons)
        doubt = f" The guard says so: *{reasons}*. Such a map is kept, and left out of areas."
    report.text(
        "## The first map: a real Landsat scene\n\n"
        "Olinda, Brazil (Landsat 7), mapped by the network that comes with kelp, without any "
        f"training. No canopy kelp grows there: the {record.kelp_pixels:,} pixels that it marks "
        f"are false alarms of a network that has seen simulated coasts only.{doubt}"
    )
    with resources.as_file(real_scene()) as scene:
        report.figure(picture_of(scene, mask), f"`{REAL_SCENE}` and its map.")


def _coast_section(report: Report, coast: Coast, root: Path) -> None:
    where = coast.folder.relative_to(root).as_posix()
    report.text(
        "## A coast over three years\n\n"
        "One simulated place at 14 dates; no scene in the second quarter of 2022. Threshold, "
        "calibration and intervals come from the test images above, which no training saw. "
        f"[The maps, date by date]({where}/map.html) with beds and areas; also "
        f"`{where}/beds.gpkg`, `{where}/areas.csv` and `{where}/series/`."
    )
    figure = style.figure(8.4, 3.6)
    draw_quarters(figure.add_subplot(), coast)
    is_expected = coast.quarters["area_is"].iloc[0] == "expected"
    report.figure(
        style.png(figure),
        f"{'Expected' if is_expected else 'Presence'} area by quarter and the truth. A cross is a "
        "quarter that nobody saw: null in every file, never 0.",
    )


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
