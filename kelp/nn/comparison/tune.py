"""`kelp tune`: threshold and temperature of networks, kept in their bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kelp.config import TuneConfig
from kelp.errors import ConfigError
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
from kelp.nn.comparison.tune_page import write_page
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
