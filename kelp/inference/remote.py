"""What workers of a cluster do for a prediction. Tasks carry a setting and paths, not networks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from kelp.config import PredictConfig
from kelp.errors import BundleError, KelpError, fit_to_travel
from kelp.inference.inputs import Task, survey_one
from kelp.inference.processor import Processor
from kelp.inference.run import Run, loaded
from kelp.inference.units import Outcome, Unit
from kelp.io.location import Url
from kelp.io.remote import check_reach
from kelp.nn.bundle import Bundle, Which

_PATIENCE: Final = 600.0
"""Seconds to wait for a scene that another process is writing."""


@dataclass(frozen=True)
class Setting:
    """What makes the runs of all workers alike."""

    config: str
    """A `PredictConfig` as JSON, its paths absolute."""
    bundles: str
    """Digest of the bundles that the planning process loaded."""
    processor: Processor | None = None
    batch_size: int = 1
    cache: int = 0


def digest_of(bundles: Sequence[Bundle]) -> str:
    """Stands for what bundles are, weights included."""
    specs = [bundle.spec.model_dump(mode="json") for bundle in bundles]
    return hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest()


def processor_of(setting: Setting, threads: int) -> Processor:
    """What a worker's network would run on; it loads the bundles, once.

    Raises `KelpError` where it cannot, or cannot speak with the stores of scenes and maps.
    """
    config = _config(setting.config)
    with fit_to_travel():
        for place in (config.data_dir, config.output_dir):
            if isinstance(place, Url):
                check_reach(place)
        _bundles(config.run_dir, config.use_checkpoint, setting.bundles)
    return Processor.here(config, threads)


def survey_there(setting: Setting, pair: tuple[Path | Url, Path | Url]) -> Task | str:
    """`survey_one` on a worker."""
    config = _config(setting.config)
    bundles = _bundles(config.run_dir, config.use_checkpoint, setting.bundles)
    return survey_one(config.band_order, [bundle.spec for bundle in bundles], pair)


def perform_there(setting: Setting, unit: Unit) -> Outcome:
    """Do a unit's work on a worker.

    A scene that another process is writing is waited for: a worker that was taken for lost may
    still be at it, and do it well.
    """
    run = _run(setting)
    outcome = run.perform(unit)
    deadline = time.monotonic() + _PATIENCE
    while outcome.busy and time.monotonic() < deadline:
        time.sleep(1)
        again = run.perform(replace(unit, tasks=outcome.busy))
        for task in outcome.busy:
            del outcome.failures[task.path]
        outcome.counts.add(again.counts)
        outcome.failures |= again.failures
        outcome.busy = again.busy
    return replace(outcome, unit=unit)


@lru_cache(maxsize=1)
def _config(text: str) -> PredictConfig:
    return PredictConfig(**json.loads(text))


@lru_cache(maxsize=1)
def _bundles(run_dir: tuple[Path, ...], which: Which, digest: str) -> list[Bundle]:
    bundles = loaded(run_dir, which)
    if digest_of(bundles) != digest:
        names = ", ".join(str(bundle.path) for bundle in bundles)
        raise BundleError(f"{names}: another bundle than the planning process has there")
    return bundles


@lru_cache(maxsize=1)
def _run(setting: Setting) -> Run:
    config = _config(setting.config)
    if setting.processor is None:
        raise ValueError("a run needs a processor")
    found = Processor.here(config, setting.processor.threads)
    if found != setting.processor:  # a worker that came later than the check of all
        raise KelpError(f"a worker computes with {found}, the others with {setting.processor}")
    if isinstance(config.output_dir, Path) and not config.output_dir.is_dir():  # late, too
        raise KelpError(f"{config.output_dir}: a worker that came later does not see it")
    bundles = _bundles(config.run_dir, config.use_checkpoint, setting.bundles)
    return Run(config, bundles, setting.processor, setting.batch_size, setting.cache)
