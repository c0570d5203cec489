"""`kelp tune`: threshold and temperature of a network, fitted on scenes it was not trained on.

The network is applied as `kelp predict` does it, so that what is fitted holds for its maps. First
the temperature (Guo et al. 2017, On Calibration of Modern Neural Networks): one number that logits
are divided by, so that of the pixels with p = 0.7 about 70 % are kelp. Then, on maps made with it,
the threshold at which pooled Dice is highest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kelp.config import TuneConfig
from kelp.errors import ConfigError, InputError
from kelp.evaluation.thresholds import parts_of
from kelp.inference.backends.onnx import OnnxNet
from kelp.inference.bundle import Bundle, load_bundle
from kelp.inference.foldruns import runs_of
from kelp.inference.predictor import predict_array
from kelp.io.files import output_folder, write_json
from kelp.nn.bundle import describe_bundle
from kelp.nn.comparison.counted import (
    COOLEST,
    EDGES,
    HOTTEST,
    Counted,
    Tuned,
    as_threshold,
    best_temperature,
    count,
    dice,
)
from kelp.nn.comparison.scenes import Labelled, Scenes, labelled_scenes
from kelp.nn.comparison.sums import Draws
from kelp.nn.comparison.tune_page import write_page
from kelp.nn.device import resolve_device, resolve_precision
from kelp.progress import Progress, silent
from kelp.raster.masks import read_mask
from kelp.raster.scene import read_scene

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class TuneResult:
    """What `tune` fitted, and the files it wrote."""

    tuned: tuple[Tuned, ...]
    stored: bool
    files: tuple[Path, ...]

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for one in self.tuned:
            scores = one.scores()
            gain, bounds = scores["difference"]
            between = f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else ""
            lines.append(
                f"{one.bundle}: kelp from {one.threshold[1]:g} on gains {gain:+.3f} pooled Dice"
                f"{between} over {one.threshold[0]:g}, on {one.places} places; threshold "
                f"{one.kept:g}, temperature {one.temperature[1]:g} "
                f"{'stored' if self.stored else 'not stored'}"
            )
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def tune(config: TuneConfig, progress: Progress = silent) -> TuneResult:
    """Fit threshold and temperature of each network and keep them in its bundle.

    Writes `tuning.json` and `report.html`.

    Raises:
        InputError: a truth is missing or of another size, a scene cannot be read, or none of them
            shows kelp.
        ConfigError: no bundle, or an ONNX file.
    """
    if not config.run_dir:
        raise ConfigError("--run_dir is missing; name at least one run or bundle")
    runs = runs_of(config.run_dir)
    bundles = [load_bundle(path, config.use_checkpoint) for path in runs]
    for bundle in bundles:
        if isinstance(bundle.net, OnnxNet):
            raise ConfigError(
                f"{bundle.path}: an ONNX file stays as it is; tune the run and export it again"
            )
    scenes = [labelled_scenes(config, [bundle]) for bundle in bundles]  # all, before hours of one
    folder = output_folder(config.output_dir)
    tuned = [
        _tune(path.name, bundle, where, config, progress)
        for path, bundle, where in zip(runs, bundles, scenes, strict=True)
    ]
    write_json(folder / "tuning.json", {"networks": [one.to_json() for one in tuned]})
    page = write_page(folder / "report.html", config, tuned)
    config.record(folder)
    for one, bundle in zip(tuned, bundles, strict=True):
        if config.store:
            facts = {k: value for k, value in one.to_json().items() if k not in ("run", "bundle")}
            changed = {"temperature": one.temperature[1], "threshold": one.kept, "tuning": facts}
            describe_bundle(bundle.path, bundle.spec.model_copy(update=changed))
    return TuneResult(tuple(tuned), config.store, (page, folder / "tuning.json"))


def _tune(
    name: str, bundle: Bundle, scenes: Scenes, config: TuneConfig, progress: Progress
) -> Tuned:
    places = np.unique([image.place for image in scenes.images])
    counted = partial(_count_scenes, images=scenes.images, config=config, progress=progress)
    before = after = counted(bundle)
    if not before.pixels[1].any():
        raise InputError(f"{scenes.words}: no kelp to be seen in any scene; nothing can be fitted")
    if len(places) == 1:
        log.info("one place only: whether a threshold gains elsewhere cannot be told; it stays")
    was = bundle.spec.temperature
    temperature = was
    if config.temperature:
        wish = np.clip(was * best_temperature(before.pixels), COOLEST, HOTTEST)
        temperature = float(f"{wish:.3g}")
        spec = bundle.spec.model_copy(update={"temperature": temperature})
        after = counted(bundle.described(spec))
        errors = before.calibration_error(), after.calibration_error()
        if errors[1] >= errors[0]:
            # Cross-entropy has fallen, but one number cannot mend confident false alarms.
            log.info(
                "temperature %g would calibrate no better (error %.2g, now %.2g): it stays %g",
                temperature,
                errors[1],
                errors[0],
                was,
            )
            temperature, after = was, before
    best = int(dice(after.outcomes().sum(axis=0)).argmax())
    return Tuned(
        name,
        bundle.path,
        scenes.words,
        before,
        after,
        (was, temperature),
        (bundle.spec.threshold, as_threshold(best)),
        parts_of(len(places), config.seed),
        Draws(len(places), config.draws, config.seed),
        len(scenes.images),
    )


def _count_scenes(
    bundle: Bundle, images: Sequence[Labelled], config: TuneConfig, progress: Progress
) -> Counted:
    """Pixels of all scenes by logit, predicted as `kelp predict` does."""
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    places = max(image.place for image in images) + 1
    by_place = np.zeros((places, 2, len(EDGES)), dtype=np.int64)
    missed = np.zeros(places, dtype=np.int64)
    for done, image in enumerate(images, 1):
        p = predict_array(
            bundle,
            read_scene(image.scene, config.band_order),
            batch_size=config.batch_size,
            precision=precision,
            device=config.device,
            qa_as_nodata=config.qa_as_nodata,
        )
        pixels, unseen = count(p, read_mask(image.truth))
        by_place[image.place] += pixels
        missed[image.place] += unseen
        progress("tuning", done, len(images))
    return Counted(by_place, missed)
