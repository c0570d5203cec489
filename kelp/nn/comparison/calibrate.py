"""Threshold, temperature and guard of a network, fitted on sites it was not trained on.

The network is applied as `kelp predict` does it, so that what is fitted holds for its maps. First
the temperature (Guo et al. 2017, On Calibration of Modern Neural Networks): one number that logits
are divided by, so that of the pixels with p = 0.7 about 70 % are kelp. Then, on maps made with it,
the threshold at which pooled Dice is highest. Each is kept only where it gains on other sites than
it was fitted to, the threshold only where an interval over sites shows it. What right maps of these
sites look like becomes the guard of later ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kelp.config.choices import Device, Precision
from kelp.errors import ConfigError, InputError
from kelp.evaluation.bootstrap import SiteBootstrap
from kelp.evaluation.calibration import (
    EDGES,
    THRESHOLDS,
    Calibration,
    add_logits,
    as_threshold,
    best_temperature,
    combined_temperature,
    expected_area,
    logit_classes,
    logit_histogram,
    nearest_class,
    probabilities,
    reliability,
)
from kelp.evaluation.confusion import ratio
from kelp.evaluation.intervals import HeldOutSite
from kelp.evaluation.thresholds import Histogram, best_threshold, parts_of
from kelp.inference.backends.onnx import OnnxNet
from kelp.inference.bundle import NETWORK_FILE, Bundle
from kelp.inference.guard import FEW_PIXELS, GuardLimits
from kelp.inference.predictor import predict
from kelp.nn.bundle import describe_bundle
from kelp.nn.comparison.scenes import Labelled, Scenes, labelled_scenes
from kelp.nn.device import resolve_device, resolve_precision
from kelp.nn.export import add_network_file
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import read_mask
from kelp.raster.scene import Scene
from kelp.raster.window import Tile
from kelp.tables import tile_id_of

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class CalibrationOptions:
    """How labelled scenes are read and predicted, and what is fitted; see `TuneConfig`."""

    metadata_fp: Path | None = None
    band_order: tuple[str, ...] = ()
    kelp_value: int = 1
    ignore_georeference: bool = False
    qa_as_nodata: bool = True
    device: Device = "auto"
    precision: Precision | None = None
    batch_size: int | None = None
    temperature: bool = True
    pixel_size: float = 30.0
    draws: int = 2000
    seed: int = 0

    @classmethod
    def of(cls, config: object, **changes: Any) -> Self:
        """Those options that a configuration has; `changes` win."""
        names = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names} | changes)


@dataclass(frozen=True)
class Fitted:
    """What was fitted for a network.

    Attributes:
        bundle: as it was.
        calibration: threshold, temperature, and what they gain.
        held_out: areas of every scene, with a threshold that was fitted on other sites.
        guard: what right maps of the scenes look like; None where they are too few to tell.
        words: where the scenes are from.
        images: number of scenes.
    """

    bundle: Bundle
    calibration: Calibration
    held_out: tuple[HeldOutSite, ...]
    guard: GuardLimits | None
    words: str
    images: int

    def to_json(self) -> dict[str, Any]:
        """All figures by name, as a bundle keeps them."""
        return {
            "scenes": self.words,
            "images": self.images,
            "places": self.calibration.sites,
            **self.calibration.to_json(),
        }

    def store(self) -> None:
        """Write threshold, temperature, reliability, areas and guard into the bundle."""
        calibration = self.calibration
        changed = {
            "temperature": calibration.temperature[1],
            "threshold": calibration.kept,
            "tuning": self.to_json(),
            "held_out_sites": self.held_out,
            "guard": self.guard,
        }
        describe_bundle(self.bundle.path, self.bundle.spec.model_copy(update=changed))
        if (self.bundle.path / NETWORK_FILE).is_file():  # it holds threshold and temperature
            add_network_file(self.bundle.path)


def calibrate_run(
    bundle: Bundle, options: CalibrationOptions, progress: Progress = silent
) -> Fitted:
    """Fit on the sites that the run of a bundle held out, and store it in the bundle.

    Raises:
        KelpError: see `fit_calibration` and `labelled_scenes`; the bundle is as it was.
    """
    fitted = fit_calibration(bundle, labelled_scenes(options, [bundle]), options, progress)
    fitted.store()
    return fitted


def require_own_format(bundle: Bundle) -> None:
    """Raise `ConfigError` for a file that nothing can be stored in."""
    if isinstance(bundle.net, OnnxNet):
        raise ConfigError(
            f"{bundle.path}: an ONNX file cannot be tuned; tune the run and export it again"
        )


def fit_calibration(
    bundle: Bundle, scenes: Scenes, options: CalibrationOptions, progress: Progress = silent
) -> Fitted:
    """Fit temperature and threshold to labelled scenes.

    Args:
        bundle: the network.
        scenes: of sites that it was not trained on.
        options: how they are predicted.
        progress: gets the number of scenes.

    Raises:
        InputError: none of the scenes shows kelp, or one cannot be read.
        ConfigError: the bundle is an ONNX file.
    """
    require_own_format(bundle)
    before = after = _count(bundle, scenes, options, progress)
    if not before.histogram.pixels[:, 1].any():
        raise InputError(f"{scenes.words}: no scene shows kelp, so nothing can be fitted")
    if scenes.sites == 1:
        log.info("one site only does not show whether a threshold gains elsewhere; it is kept")
    was = bundle.spec.temperature
    temperature = was
    if options.temperature:
        temperature = combined_temperature(was, best_temperature(before.histogram))
        spec = bundle.spec.model_copy(update={"temperature": temperature})
        after = _count(bundle.described(spec), scenes, options, progress)
        errors = [reliability(counted.histogram).error or 0.0 for counted in (before, after)]
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
    best = best_threshold(after.histogram.total().dice(), THRESHOLDS)
    calibration = Calibration(
        before.histogram,
        after.histogram,
        (was, temperature),
        (bundle.spec.threshold, as_threshold(int(best))),
        parts_of(scenes.sites, options.seed),
        SiteBootstrap(scenes.sites, options.draws, options.seed),
    )
    held_out = _held_out_areas(scenes.images, after, calibration)
    guard = _guard(after, nearest_class(calibration.kept), bundle.spec.guard)
    return Fitted(bundle, calibration, held_out, guard, scenes.words, len(scenes.images))


class _Counted(NamedTuple):
    """Labelled scenes as a network sees them."""

    histogram: Histogram
    """By logit and site."""
    areas: NDArray[np.float64]
    """Square metres by truth and class of logits, `(images, 2, classes)`, of pixels that are
    labelled and observed."""
    observed: NDArray[np.float64]
    """How many these are, `(images,)`."""
    labelled: NDArray[np.float64]
    """How many are labelled, `(images,)`."""


def _count(
    bundle: Bundle, scenes: Scenes, options: CalibrationOptions, progress: Progress
) -> _Counted:
    """Pixels and areas of all scenes by logit, predicted as `kelp predict` does."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    histogram = logit_histogram(scenes.sites)
    sinks = []
    for done, image in enumerate(scenes.images, 1):
        sink = _Sink(image, histogram, options)
        with Scene(image.scene, options.band_order) as scene:
            predict(
                bundle,
                scene,
                sink,
                batch_size=options.batch_size,
                precision=precision,
                device=options.device,
                qa_as_nodata=options.qa_as_nodata,
            )
        sinks.append(sink)
        progress("calibrating", done, len(scenes.images))
    labelled = np.array([sink.labelled for sink in sinks], dtype=np.float64)
    observed = np.array([sink.observed for sink in sinks], dtype=np.float64)
    return _Counted(histogram, np.stack([sink.areas for sink in sinks]), observed, labelled)


class _Sink:
    """Counts the probabilities of a scene against its truth, row by row."""

    def __init__(self, image: Labelled, histogram: Histogram, options: CalibrationOptions) -> None:
        self._image = image
        self._histogram = histogram
        self._kelp_value = options.kelp_value
        self._area = image.area(options.pixel_size)
        self.areas = np.zeros((2, len(EDGES)))
        self.labelled = self.observed = 0

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        tile = Tile(y, 0, *rows.shape)
        truth = read_mask(self._image.truth, tile, self._kelp_value)
        add_logits(self._histogram, self._image.site, rows, truth)
        labelled = truth != MASK_NODATA
        known = labelled & np.isfinite(rows)
        self.labelled += int(np.count_nonzero(labelled))
        self.observed += int(np.count_nonzero(known))
        area = np.broadcast_to(self._area.pixels(tile), rows.shape)
        for k in (0, 1):
            those = known & (truth == k)
            classes = logit_classes(rows[those])
            self.areas[k] += np.bincount(classes, area[those], minlength=len(EDGES))

    def close(self) -> None:
        """Nothing is kept open."""


def _held_out_areas(
    images: Sequence[Labelled], counted: _Counted, calibration: Calibration
) -> tuple[HeldOutSite, ...]:
    """Areas of every scene, kelp beginning where other sites say, or where it stays."""
    kept = nearest_class(calibration.kept)
    held_out = []
    share = np.nan_to_num(ratio(counted.observed, counted.labelled))
    for k, image in enumerate(images):
        first = calibration.held_out_classes[image.site] if calibration.gains else kept
        areas = counted.areas[k].sum(axis=0)
        held_out.append(
            HeldOutSite(
                site=image.site_name,
                scene=tile_id_of(image.scene),
                truth_m2=round(float(counted.areas[k, 1].sum()), 1),
                presence_m2=round(float(areas[first:].sum()), 1),
                expected_m2=round(expected_area(areas), 1),
                observed_share=round(float(share[k]), 4),
            )
        )
    return tuple(held_out)


def _guard(counted: _Counted, first: int, was: GuardLimits | None) -> GuardLimits | None:
    """Limits of the maps that are right: one that is painted over must not excuse the next."""
    kelp = counted.areas[..., first:]
    marked = kelp.sum(axis=(1, 2))
    total = counted.areas.sum(axis=(1, 2))
    pixels = marked * ratio(counted.observed, total)
    right = (pixels >= FEW_PIXELS) & (kelp[:, 1].sum(axis=-1) >= 0.5 * marked)
    certainty = ratio((kelp.sum(axis=1) * probabilities()[first:]).sum(axis=-1), marked)
    limits = was or GuardLimits()
    found = limits.with_maps(ratio(marked, total)[right], certainty[right])
    return None if found == GuardLimits() else found
