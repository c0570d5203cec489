"""Options of `kelp report`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kelp.config.base import Config, Names, option


class ReportConfig(Config):
    """One self-contained page about masks and their truth: scores, curves, pictures, settings."""

    command: ClassVar[str] = "report"

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
    metadata_fp: Path | None = option(
        None, help="Table of kelp metadata: which scenes show one place; default: each its own"
    )
    title: str = option("Kelp maps against truth", help="Title of the page")
    pictures: int = option(
        2, help="Pictures of the worst and of the best scenes", unit="each", ge=0
    )
    draws: int = option(2000, help="Bootstrap draws of places", unit="draws", ge=100)
    seed: int = option(0, help="Seed of the draws", unit="integer", ge=0)
    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )
    pixel_size: float = option(
        30.0, help="Side of a pixel where a mask has no CRS, for areas", unit="m", gt=0
    )
