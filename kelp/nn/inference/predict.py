"""`kelp predict`: bundles and a folder of scenes in, masks and probabilities out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import kelp
from kelp import manifest
from kelp.config import PredictConfig
from kelp.errors import InputError, KelpError
from kelp.files import discard_partials, output_folder, write_json
from kelp.grid import Shape, TileGrid
from kelp.nn.bundle import Bundle, load_bundle
from kelp.nn.device import resolve_device, resolve_precision
from kelp.nn.foldruns import runs_of
from kelp.nn.inference import memory
from kelp.nn.inference.arrays import cut, joint_threshold
from kelp.nn.inference.checks import check_statistics
from kelp.nn.inference.engine import Counts, Engine, Job
from kelp.nn.inference.inputs import Task, find_scenes, survey
from kelp.nn.inference.network import Network
from kelp.nn.inference.outputs import Outputs, forget, probability_path, spread_path
from kelp.nn.inference.plan import (
    NetworkMemory,
    Plan,
    amount,
    check_disk,
    fit_memory,
    make_plan,
)
from kelp.nn.inference.strip import Slicing
from kelp.preview import write_previews
from kelp.progress import Progress, silent
from kelp.raster import decoding, read_tags
from kelp.scene import Scene
from kelp.submission import ARCHIVE, write_submission

log = logging.getLogger("kelp")

_FINGERPRINT: Final = "KELP_FINGERPRINT"


@dataclass(frozen=True)
class PredictResult:
    """What a prediction wrote and what it cost."""

    masks: tuple[Path, ...]
    probabilities: tuple[Path, ...]
    spreads: tuple[Path, ...]
    submission: Path | None
    previews: tuple[Path, ...]
    made: int
    """Scenes predicted now."""
    skipped: int
    """Scenes that were already finished."""
    counts: Counts
    """Tiles that were run, left out, or done by an earlier process."""
    peak_memory: int
    """The most bytes that the process held."""

    def summary(self) -> str:
        """One line for the terminal."""
        counts = self.counts
        run = [f"{counts.predicted:,} tiles"]
        for number, what in (
            (counts.unobserved, "without an observed pixel left out"),
            (counts.land, "all land left out (0 in the maps)"),
            (counts.resumed, "done earlier"),
        ):
            if number:
                run.append(f"{number:,} {what}")
        extra = f"; submission in {self.submission}" if self.submission else ""
        return (
            f"{self.made} scenes predicted ({', '.join(run)}), {self.skipped} already finished; "
            f"masks in {self.masks[0].parent}; peak memory {amount(self.peak_memory)}{extra}"
        )


def predict_scenes(config: PredictConfig, progress: Progress = silent) -> PredictResult:
    """Predict every scene of a folder (or one file, or a list); see `PredictConfig`.

    Raises:
        KelpError: bad input. Of several scenes the good ones are done before bad ones are named.
    """
    scenes = find_scenes(config.data_dir)
    bundles = [load_bundle(path, config.use_checkpoint) for path in runs_of(config.run_dir)]
    if config.dataset_stats_dir:
        for bundle in bundles:
            check_statistics(bundle.spec, config.dataset_stats_dir)
    discard_partials(output_folder(config.output_dir))
    outputs = {path: config.output_dir / manifest.output_name(path) for path in scenes}
    tasks, failures = survey(outputs, config.band_order, [bundle.spec for bundle in bundles])
    run = _Run(config, bundles, tasks)
    failures |= run.predict(progress)
    run.record()
    if failures:
        named = "; ".join(failures.values())
        rest = ", the rest is done" if len(failures) < len(scenes) else ""
        raise InputError(f"{len(failures)} of {len(scenes)} scenes failed{rest}: {named}")
    masks = tuple(outputs.values())
    submission = None
    previews: list[Path] = []
    if config.submission or config.preview_submission:
        archive = config.output_dir / ARCHIVE
        submission = write_submission(masks, archive, progress).path
    if config.preview_submission:
        previews = write_previews(
            scenes,
            config.output_dir,
            output_folder(config.output_dir / "previews"),
            config.preview_first_n,
            config.band_order,
            progress,
        )
    return PredictResult(
        masks=masks,
        probabilities=tuple(map(probability_path, masks)) if config.save_probabilities else (),
        spreads=tuple(map(spread_path, masks)) if config.save_spread else (),
        submission=submission,
        previews=tuple(previews),
        made=len(run.todo),
        skipped=len(scenes) - len(run.todo),
        counts=run.counts,
        peak_memory=memory.peak(),
    )


class _Run:
    """The engine, set up for one configuration and applied to scenes."""

    def __init__(
        self, config: PredictConfig, bundles: Sequence[Bundle], tasks: Sequence[Task]
    ) -> None:
        self.config = config
        self.bundles, tile, overlap = cut(bundles, config.sahi_tile_size, config.sahi_overlap)
        self.threshold = joint_threshold(bundles, config.decision_threshold)
        self.slicing = _slicing(tile, overlap, config)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        tta = config.tta_merge_mode if config.tta else None
        self.network = Network(self.bundles, self.device, self.precision, tta)
        self.counts = Counts()
        self.todo: list[Task] = []
        self._found = tasks

    def predict(self, progress: Progress) -> dict[Path, str]:
        """Predict what is not finished yet; returns the error of each scene that failed."""
        plan = self._plan()
        self.slicing = replace(self.slicing, batch_size=plan.batch_size)
        prints = {task.path: self._fingerprint(task) for task in self._found}
        self.todo = [task for task in self._found if not self._finished(task, prints[task.path])]
        if not self.todo:
            return {}
        total, done = sum(self._tiles(task) for task in self.todo), 0

        def advance(tiles: int) -> None:
            nonlocal done
            done += tiles
            progress("predicting", done, total)

        failures: dict[Path, str] = {}
        sinks: list[tuple[Outputs, Path]] = []

        def jobs() -> Iterator[Job]:
            for task in self.todo:
                try:
                    with Scene(task.path, self.config.band_order) as scene:
                        sink = self._sink(scene, task, prints[task.path])
                        sinks.append((sink, task.path))
                        yield Job(scene, sink, sink, sink.write_spread)
                except KelpError as error:  # it was readable when the run was planned
                    failures[task.path] = str(error)

        engine = Engine(self.network, self.slicing, advance, self.network.allocate)
        self.counts = engine.counts
        try:
            with decoding(plan.cache):
                engine.run(jobs())
        finally:
            # Whatever ended this: a failed scene, Ctrl-C, a bug. Closed outputs stay.
            for sink, _ in sinks:
                sink.abandon()
        wrong = {id(sink): str(error) for sink, error in engine.failures}
        return failures | {path: wrong[id(sink)] for sink, path in sinks if id(sink) in wrong}

    def _plan(self) -> Plan:
        """What the prediction takes, said in one line."""
        sizes = [task.size for task in self._found]
        config, tile = self.config, self.slicing.tile
        pixel_bytes = 1
        if config.save_probabilities:
            pixel_bytes += np.dtype(config.probability_dtype).itemsize
        if config.save_spread:
            pixel_bytes += 4
        shapes = [bundle.spec.network_shape(tile) for bundle in self.bundles]
        pixels = self.network.passes(tile) * sum(height * width for height, width in shapes)
        plan = make_plan(sizes, self.slicing, pixels, pixel_bytes)
        if config.max_memory is not None and sizes:
            memory.give_back()
            measured = self._measured(config.max_memory)
            plan = fit_memory(
                plan, config.max_memory, sizes, self.slicing, measured, config.save_spread
            )
        check_disk(plan, config.output_dir)
        if sizes:
            log.info("%s", plan)
        return plan

    def _measured(self, budget: int) -> NetworkMemory:
        """The network's memory, measured once for an output folder.

        It varies a little from run to run: measured again, a killed run might go on with
        another batch size, and so with other last bits.
        """
        path = self.config.output_dir / "kelp-memory.json"
        settings = json.dumps([self._settings(), budget], sort_keys=True)
        key = hashlib.sha256(settings.encode()).hexdigest()
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.pop("settings") == key:
                return NetworkMemory(**known)
        measured = NetworkMemory.measure(self.network, self.slicing.tile, budget)
        write_json(path, {"settings": key, **asdict(measured)})
        return measured

    def record(self) -> None:
        """Write down the settings of the run, what was left to kelp resolved."""
        resolved: dict[str, Any] = {
            "decision_threshold": self.threshold,
            "precision": self.precision,
            "device": self.device.type,
        }
        tile, overlap = self.slicing.tile, self.slicing.overlap
        recipe = any(bundle.spec.prediction_tile for bundle in self.bundles)
        # Not a recipe's tile: given as a wish it would be shown at another scale.
        if tile[0] == tile[1] and (self.config.sahi_tile_size is not None or not recipe):
            resolved |= {"sahi_tile_size": tile[0], "sahi_overlap": overlap[0]}
        self.config.model_copy(update=resolved).record(self.config.output_dir)

    def _settings(self) -> dict[str, Any]:
        """Everything that the output of a scene depends on, but the scene."""
        return {
            "versions": [kelp.__version__, torch.__version__],
            "threads": torch.get_num_threads(),
            "bundles": [
                bundle.spec.model_dump(mode="json", exclude={"tuning"}) for bundle in self.bundles
            ],
            "slicing": asdict(self.slicing),
            "threshold": self.threshold,
            "precision": self.precision,
            "device": self.device.type,
            "tta": self.config.tta_merge_mode if self.config.tta else None,
            "probabilities": self.config.save_probabilities and self.config.probability_dtype,
            "spread": self.config.save_spread,
        }

    def _fingerprint(self, task: Task) -> str:
        """SHA-256 of everything that the output of a scene depends on."""
        settings = {**self._settings(), "reading": task.reading}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        with task.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _finished(self, task: Task, fingerprint: str) -> bool:
        wanted = [task.output]
        if self.config.save_probabilities:
            wanted.append(probability_path(task.output))
        if self.config.save_spread:
            wanted.append(spread_path(task.output))
        if self.config.overwrite or not task.output.is_file():
            return False
        if all(read_tags(file).get(_FINGERPRINT) == fingerprint for file in wanted):
            forget(task.output)
            return True
        log.info("%s: made with other inputs or settings; making it anew", task.output)
        return False

    def _sink(self, scene: Scene, task: Task, fingerprint: str) -> Outputs:
        return Outputs(
            scene.shape,
            scene.georeference,
            task.output,
            self.threshold,
            {_FINGERPRINT: fingerprint, "KELP_VERSION": kelp.__version__},
            self.config.probability_dtype if self.config.save_probabilities else None,
            fingerprint,
            resume=not self.config.overwrite,
            spread=self.config.save_spread,
        )

    def _tiles(self, task: Task) -> int:
        return len(TileGrid(task.size.shape, self.slicing.tile, self.slicing.overlap))


def _slicing(tile: Shape, overlap: Shape, config: PredictConfig) -> Slicing:
    return Slicing(
        tile,
        overlap,
        config.blend,
        config.batch_size,
        config.qa_as_nodata,
        config.land == "skip",
        config.land_tolerance,
    )
