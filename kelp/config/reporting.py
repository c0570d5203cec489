"""Options of `kelp report`."""

from __future__ import annotations

from pathlib import Path

from kelp.config.base import option
from kelp.config.shared import BandOrderOptions, BootstrapOptions, PixelSizeOptions, TruthOptions


class ReportConfig(BootstrapOptions, BandOrderOptions, PixelSizeOptions, TruthOptions):
    """One self-contained page about masks and their truth: scores, curves, pictures, settings."""

    gt_dir: Path = option(help="Folder of true <tile_id>_kelp.tif masks")
    preds_dir: Path = option(
        help="Folder of predicted <tile_id>_kelp.tif masks; with <tile_id>_kelp_prob.tif beside "
        "them also curves and calibration"
    )
    output_dir: Path = option(help="Folder for report.html and report.json")
    data_dir: Path | None = option(None, help="Folder of the scenes, for pictures and land")
    run_dir: Path | None = option(
        None, help="Run or bundle that made them: model card, settings, training curves"
    )
    title: str = option("Kelp maps against truth", help="Title of the page")
    pictures: int = option(
        2, help="Pictures of the worst and of the best scenes", unit="each", ge=0
    )
    map_scenes: int = option(
        12,
        help="Scenes on the map of the page, the worst first: masks, errors, probabilities and "
        "beds to move about in. 0: no map, and a page without scripts",
        unit="scenes",
        ge=0,
    )
