"""Scenes through networks in one process, the same bytes in every process with the same setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import kelp
from kelp.config import PredictConfig
from kelp.errors import ConfigError, InputError, KelpError
from kelp.inference import memory
from kelp.inference.arrays import cut, fitting_batch, joint_threshold
from kelp.inference.checks import check_scale
from kelp.inference.foldruns import runs_of
from kelp.inference.inputs import Task
from kelp.inference.network import Network, passes
from kelp.inference.outputs import Outputs, forget, probability_path, spread_path
from kelp.inference.processor import Processor
from kelp.inference.sections import Seam, SectionFile, SectionSink
from kelp.inference.staging import Staging
from kelp.inference.units import Outcome, Unit
from kelp.io import remote
from kelp.io.location import Url, local
from kelp.nn.bundle import Bundle, Which, load_bundle
from kelp.raster.masks import decoding, read_tags
from kelp.raster.scene import Scene
from kelp.tiling.engine import Engine
from kelp.tiling.grid import TileGrid
from kelp.tiling.jobs import Counts, Job, Section
from kelp.tiling.strip import Slicing

FINGERPRINT: Final = "KELP_FINGERPRINT"


class Run:
    """Networks, set up for one configuration and applied to scenes.

    Args:
        config: the options.
        bundles: their networks.
        processor: where they run.
        batch_size: crops in a batch, by the plan.
        cache: bytes for decoded blocks, by the plan.
    """

    def __init__(
        self,
        config: PredictConfig,
        bundles: Sequence[Bundle],
        processor: Processor,
        batch_size: int | None = None,
        cache: int = 0,
    ) -> None:
        self.config = config
        self.processor = processor
        self.weights = config.weights
        if self.weights and len(self.weights) != len(bundles):
            raise ConfigError(f"--weights: {len(self.weights)} weights for {len(bundles)} networks")
        self.bundles, tile, overlap = cut(bundles, config.sahi_tile_size, config.sahi_overlap)
        self.threshold = joint_threshold(bundles, config.decision_threshold, self.weights)
        self.slicing = Slicing(
            tile,
            overlap,
            config.blend,
            batch_size or config.batch_size or fitting_batch(self.bundles, tile, processor.device),
            config.qa_as_nodata,
            config.land == "skip",
            config.land_tolerance,
        )
        self.cache = cache

    @cached_property
    def network(self) -> Network:
        """All networks as one; built when the first tile needs it."""
        tta = self.config.tta_merge_mode if self.config.tta else None
        device = torch.device(self.processor.device)
        return Network(self.bundles, device, self.processor.precision, tta, self.weights)

    @property
    def passes(self) -> int:
        """How often a tile is run through each network."""
        return passes(self.slicing.tile) if self.config.tta else 1

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all outputs, for each pixel, before they are compressed."""
        stored = 1 + 4 * self.config.save_spread
        if self.config.save_probabilities:
            stored += np.dtype(self.config.probability_dtype).itemsize
        return stored

    def planned(self, batch_size: int, cache: int) -> None:
        """Take over what the plan decided."""
        self.slicing = replace(self.slicing, batch_size=batch_size)
        self.cache = cache

    def settings(self) -> dict[str, Any]:
        """Everything that the output of a scene depends on, but the scene."""
        processor = asdict(self.processor)
        return {
            **processor,
            "bundles": [
                bundle.spec.model_dump(mode="json", exclude={"tuning"}) for bundle in self.bundles
            ],
            "weights": self.weights,
            "slicing": asdict(self.slicing),
            "threshold": self.threshold,
            "tta": self.config.tta_merge_mode if self.config.tta else None,
            "probabilities": self.config.save_probabilities and self.config.probability_dtype,
            "spread": self.config.save_spread,
        }

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def fingerprint(self, task: Task) -> str:
        """Stands for everything that the output of a scene depends on."""
        parts = [self._digest, json.dumps(task.reading, sort_keys=True), task.digest]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def grid(self, task: Task) -> TileGrid:
        """The tiles of a scene."""
        return TileGrid(task.size.shape, self.slicing.tile, self.slicing.overlap)

    def perform(self, unit: Unit, tiles_done: Callable[[int], None] | None = None) -> Outcome:
        """Do a unit's work. What is finished already is left as it is."""
        with self.processor.in_use(), decoding(self.cache):
            if unit.together:
                outcome = self._assembly(unit.tasks[0], unit.sections)
            elif unit.sections:
                outcome = self._sections(unit.tasks[0], unit.sections)
            else:
                outcome = self._scenes(unit.tasks, tiles_done)
        outcome.peak_memory, outcome.unit = memory.peak(), unit
        return outcome

    def finished(self, task: Task) -> bool | None:
        """Whether its outputs are there as they would be made; None = made otherwise."""
        wanted = [task.output]
        if self.config.save_probabilities:
            wanted.append(probability_path(task.output))
        if self.config.save_spread:
            wanted.append(spread_path(task.output))
        if not remote.exists(task.output):
            return False
        fingerprint = self.fingerprint(task)
        return all(read_tags(file).get(FINGERPRINT) == fingerprint for file in wanted) or None

    def outputs(
        self,
        task: Task,
        scene: Scene,
        resume: bool = True,
        deliver: Callable[[Sequence[Path]], None] | None = None,
    ) -> Outputs:
        """Where a scene's probabilities go; `deliver` takes the files to where they belong."""
        fingerprint = self.fingerprint(task)
        return Outputs(
            scene.shape,
            scene.georeference,
            local(task.output),
            self.threshold,
            {FINGERPRINT: fingerprint, "KELP_VERSION": kelp.__version__},
            self.config.probability_dtype if self.config.save_probabilities else None,
            None if deliver else fingerprint,  # no other process could go on with a scratch file
            resume=resume,
            spread=self.config.save_spread,
            deliver=deliver,
        )

    def section_file(self, task: Task, section: Section) -> SectionFile:
        """Where a section of a scene is kept."""
        return SectionFile(local(task.output), section, self.fingerprint(task))

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.network, self.slicing, allocate=self.network.allocate)

    def _fresh_engine(self, tiles_done: Callable[[int], None] | None) -> Engine:
        """The engine, which has done nothing yet; its buffers are kept from unit to unit."""
        self._engine.reset(tiles_done)
        return self._engine

    def _scenes(self, tasks: Sequence[Task], tiles_done: Callable[[int], None] | None) -> Outcome:
        outcome, engine = Outcome(Counts()), self._fresh_engine(tiles_done)
        sinks: dict[int, tuple[Outputs, Task]] = {}

        def jobs() -> Iterator[Job]:
            for task, staged in staging.ahead(self._unfinished(tasks, outcome, engine)):
                try:
                    here = staged()
                    with Scene(here.path, self.config.band_order) as scene:
                        if isinstance(task.path, Url):  # so far only its header was seen
                            for bundle in self.bundles:
                                check_scale(scene, bundle.spec)
                        resume, deliver = not self.config.overwrite, staging.delivery(task)
                        sink = self.outputs(here, scene, resume, deliver)
                        sinks[id(sink)] = sink, task
                        yield Job(scene, sink, sink, sink.write_spread)
                except KelpError as error:  # it was readable when the run was planned
                    outcome.note(task, staging.named(task, error))
                finally:
                    staging.drop(task)

        with Staging(self.pixel_bytes) as staging:
            try:
                engine.run(jobs())
            finally:
                # Whatever ended this: a failed scene, Ctrl-C, a bug. Closed outputs stay.
                for sink, _ in sinks.values():
                    sink.abandon()
            for failed, error in engine.failures:
                task = sinks[id(failed)][1]
                outcome.note(task, staging.named(task, error))
        outcome.counts = engine.counts
        return outcome

    def _unfinished(
        self, tasks: Sequence[Task], outcome: Outcome, engine: Engine
    ) -> Iterator[Task]:
        for task in tasks:
            try:
                if self.config.overwrite or not self.finished(task):
                    yield task
                    continue
            except KelpError as error:  # the store does not answer
                outcome.note(task, error)
                continue
            tiles = len(self.grid(task))  # done by a worker that was taken for lost
            engine.counts.add(Counts(tiles=tiles, resumed=tiles))

    def _sections(self, task: Task, sections: Sequence[Section]) -> Outcome:
        outcome = Outcome(Counts())
        sinks: list[SectionSink] = []

        def jobs() -> Iterator[Job]:
            try:
                with Scene(task.path, self.config.band_order) as scene:
                    for section in sections:
                        file = self.section_file(task, section)
                        if file.exists:
                            tiles = (section.end - section.first) * len(self.grid(task).columns)
                            engine.counts.add(Counts(tiles=tiles, resumed=tiles))
                            continue
                        sink = file.sink(self.config.save_spread)
                        sinks.append(sink)
                        yield Job(scene, sink, None, sink.write_spread, section, sink.edge)
            except KelpError as error:  # it was readable when the run was planned
                outcome.note(task, error)

        engine = self._fresh_engine(None)
        try:
            engine.run(jobs())
        finally:
            for sink in sinks:
                sink.abandon()
        for _, error in engine.failures:
            outcome.note(task, error)
        outcome.counts = engine.counts
        return outcome

    def _assembly(self, task: Task, sections: Sequence[Section]) -> Outcome:
        outcome, sink = Outcome(Counts()), None
        files = [self.section_file(task, section) for section in sections]
        seam = Seam(task.size.shape, self.config.blend, self.config.save_spread)
        try:
            if not all(file.exists for file in files) and self.finished(task):
                return outcome  # by a worker that was taken for lost
            with Scene(task.path, self.config.band_order) as scene:
                sink = self.outputs(task, scene)
            begun = self.grid(task).rows.index(sink.start.top) if sink.start else 0
            if sections[0].first != begun:
                raise InputError(f"{task.output}: another process worked on it; run again")
            seam.assemble(files, sink.start, sink, sink.write_spread)
            forget(local(task.output))
        except OSError as error:
            words = f"{task.path}: a section of it cannot be read ({error}); run again"
            outcome.note(task, InputError(words))
        except KelpError as error:
            outcome.note(task, error)
        finally:
            if sink:
                sink.abandon()
        return outcome


def loaded(run_dir: Sequence[Path], which: Which) -> list[Bundle]:
    """The bundles of runs."""
    return [load_bundle(path, which) for path in runs_of(run_dir)]
