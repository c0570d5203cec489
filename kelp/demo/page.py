"""The report of the demo: what was done, how well, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kelp import tables
from kelp.config import DemoConfig
from kelp.demo.coast import Coast, draw_quarters
from kelp.evaluation.scoring import Scores
from kelp.io.location import local
from kelp.plotting.charts import curves
from kelp.plotting.html import Report
from kelp.plotting.preview import picture_of
from kelp.raster.masks import read_mask

if TYPE_CHECKING:
    from kelp.inference.predict import PredictResult
    from kelp.nn.comparison.compare import CompareResult
    from kelp.nn.training.result import TrainResult

REAL_SCENE: Final = "OL000001_satellite_georef.tif"
_PICTURES: Final = 3


@dataclass(frozen=True)
class Outcome:
    """Everything that the report shows."""

    config: DemoConfig
    training: TrainResult
    scores: Scores
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
    report = Report("kelp demo").text(
        "The pipeline from scenes to a map: simulated coasts were sliced, a small network was "
        "trained on the slices for some minutes, and unseen places were predicted in overlapping "
        "slices whose probabilities are averaged.\n\n"
        "**Simulated data.** Scores here say that the tool works, not how well kelp is found "
        "in real images. Truth is the simulation's own, not the noisy labels trained on."
    )
    report.cards(
        {
            "pooled kelp Dice, unseen places": _number(figures.pooled_dice),
            "mean Dice of an image": _number(figures.mean_image_dice),
            f"best {training.metric}, epoch {training.epoch}": _number(training.score),
            "seconds in all": f"{sum(outcome.seconds.values()):.0f}",
        }
    )
    report.text("## Scores on the test images").text(f"```\n{scores.to_text()}\n```")
    report.text("## Training").figure(
        curves(_history(training.run_dir)), "Loss and validation scores by epoch."
    )
    report.text("## Predictions of unseen places")
    for scene in _most_kelp(raw)[:_PICTURES]:
        name = tables.output_name(scene)
        picture = picture_of(scene, predictions / "test" / name, raw / "test_truth" / name)
        report.figure(picture, f"`{scene.name}`: simulated scene, truth and prediction.")
    _comparison_section(report, outcome.comparison)
    _real_section(report, outcome.real)
    if outcome.coast:
        _coast_section(report, outcome.coast, path.parent)
    report.text("## Where the time went").table(
        [("step", "seconds"), *((k, round(v, 1)) for k, v in outcome.seconds.items())]
    )
    report.text(
        "## Next\n\n"
        f"- Look at the run: `mlflow ui --backend-store-uri sqlite:///{path.parent}/mlruns/"
        "mlflow.db`\n"
        f"- Predict your own scenes: `kelp predict --data_dir scenes --output_dir maps --run_dir "
        f"{training.run_dir}`"
    )
    return report.write(path)


def _most_kelp(raw: Path) -> list[Path]:
    """The test scenes, those with the most kelp first: they have something to show."""
    scenes = sorted((raw / "test" / "images").glob("*.tif"))
    truths = [raw / "test_truth" / tables.output_name(scene) for scene in scenes]
    kelp_pixels = {s: int((read_mask(t) == 1).sum()) for s, t in zip(scenes, truths, strict=True)}
    return sorted(scenes, key=lambda scene: -kelp_pixels[scene])


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
    report.text(
        "## A real Landsat scene\n\n"
        "Olinda, Brazil (Landsat 7). No canopy kelp grows there and no survey stands behind it: "
        "whatever the network marks is a false alarm of a network that has seen simulated coasts "
        "only. The map keeps the scene's CRS."
    )
    with resources.as_file(real_scene()) as scene:
        report.figure(picture_of(scene, local(real.masks[0])), f"`{REAL_SCENE}` and its map.")


def _coast_section(report: Report, coast: Coast, root: Path) -> None:
    import io

    from matplotlib.figure import Figure

    where = coast.folder.relative_to(root).as_posix()
    report.text(
        "## A coast over three years\n\n"
        "One simulated place at 14 dates; no scene in the second quarter of 2022. Threshold, "
        "calibration and intervals come from the test images above, which no training saw. "
        f"[The maps, date by date]({where}/map.html) with beds and areas; also "
        f"`{where}/beds.gpkg`, `{where}/areas.csv` and `{where}/series/`."
    )
    figure = Figure(figsize=(8.4, 3.6), dpi=120, layout="constrained")
    draw_quarters(figure.add_subplot(), coast)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    is_expected = coast.quarters["area_is"].iloc[0] == "expected"
    report.figure(
        png.getvalue(),
        f"{'Expected' if is_expected else 'Presence'} area by quarter and the truth. A cross is a "
        "quarter that nobody saw: null in every file, never 0.",
    )


def _history(run_dir: Path) -> Mapping[str, list[tuple[float, float]]]:
    """Metrics by epoch, as `curves` draws them."""
    epochs = json.loads((run_dir / "artifacts" / "history.json").read_text(encoding="utf-8"))
    names = {name for epoch in epochs for name in epoch}
    return {
        name: [(i, e[name]) for i, e in enumerate(epochs, 1) if e.get(name) is not None]
        for name in sorted(names)
        if name.startswith(("train/", "val/"))
    }


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
