"""What is still to be predicted, handed out in items, and a process that works on them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import rasterio

import kelp
from kelp.config import PredictConfig
from kelp.errors import BusyError, InputError, KelpError
from kelp.inference import memory
from kelp.inference.inputs import Task
from kelp.inference.outputs import (
    JournalFile,
    Outputs,
    clean_up,
    probability_path,
    sections_folder,
    spread_path,
)
from kelp.inference.predictor import Predictor
from kelp.inference.records import rules_of, water_of
from kelp.inference.sections import SectionFile, SectionSink, Stitching, sections_of
from kelp.inference.staging import Staging
from kelp.io import remote
from kelp.io.failures import Failure
from kelp.io.location import Url, local
from kelp.raster.masks import decoding, read_tags
from kelp.raster.water import Anchored, WaterReference
from kelp.raster.window import RasterSource
from kelp.sensors import SensorScene, open_scene
from kelp.sensors.record import MapRecord, NetworkFacts, Source, record_path
from kelp.tiling.engine import Counts, Engine, Job, Section
from kelp.tiling.grid import TileGrid

FINGERPRINT: Final = "KELP_FINGERPRINT"

_FULL_BATCHES: Final = 4
"""In an item of sections at least: the last batch of an item is filled up with nothing."""
_MOST_BATCHES: Final = 16
"""In an item of scenes at most: progress is reported when an item is done."""


@dataclass(frozen=True)
class WorkItem:
    """What one process does in one go; small, as it travels to workers.

    Whole scenes; or sections of one scene; or all sections of one, to be stitched.
    """

    tasks: tuple[Task, ...]
    sections: tuple[Section, ...] = ()
    stitch: bool = False
    """The sections are finished: make the scene's outputs of them."""


@dataclass
class WorkResult:
    """What a process made of an item."""

    item: WorkItem
    counts: Counts = field(default_factory=Counts)
    failures: dict[Path | Url, Failure] = field(default_factory=dict)
    """Of the scenes that failed."""
    busy: tuple[Task, ...] = ()
    """Scenes, among those that failed, that another process is writing."""
    distrusted: dict[Path | Url, str] = field(default_factory=dict)
    """Why a map is not to be trusted, by its file."""
    peak_memory: int = 0

    def closed(self, task: Task, record: MapRecord | None) -> None:
        """A scene has its map."""
        if record and record.guard and not record.guard.ok:
            self.distrusted[task.output] = "; ".join(record.guard.reasons)

    def note(self, task: Task, error: Exception) -> None:
        """A scene failed: by its user's mistake, or by a bug."""
        self.failures[task.path] = Failure.of(task.path, error)
        if isinstance(error, BusyError):
            self.busy += (task,)


class Runner:
    """Scenes to files with one predictor, the same bytes in every process.

    Args:
        config: the options.
        predictor: the networks.
    """

    def __init__(self, config: PredictConfig, predictor: Predictor) -> None:
        self.config = config
        self.predictor = predictor
        self._reference: tuple[str, WaterReference] | None = None

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all outputs, for each pixel, before they are compressed."""
        stored = 1 + 4 * self.config.save_spread
        if self.config.save_probabilities:
            stored += np.dtype(self.config.probability_dtype).itemsize
        return stored

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """Of all settings, by pixels and to the last bit."""
        products = {
            "threshold": self.predictor.threshold,
            "probabilities": self.config.save_probabilities and self.config.probability_dtype,
            "spread": self.config.save_spread,
            "rules": [self.config.land == "zero", self._excluded],
        }
        pixels = json.dumps(self.predictor.settings() | products, sort_keys=True)
        bits = json.dumps(self.predictor.exact_settings() | products, sort_keys=True)
        return _digest(pixels), _digest(bits)

    @cached_property
    def _excluded(self) -> str | None:
        """Of the file of polygons without kelp."""
        path = self.config.exclude
        return Source.of_file("polygons", path).sha256 if path else None

    def fingerprint(self, task: Task, exact: bool = False) -> str:
        """Stands for everything that changes a pixel of a scene's outputs.

        Args:
            task: the scene.
            exact: for what changes a bit of a probability.
        """
        return _digest(self._digests[exact], json.dumps(task.reading, sort_keys=True), task.digest)

    def grid(self, task: Task) -> TileGrid:
        """The tiles of a scene."""
        return self.predictor.slicing.grid(task.size.shape)

    def finished(self, task: Task) -> bool | None:
        """Whether its outputs are there as they would be made; None = made otherwise."""
        wanted = [task.output]
        if self.config.save_probabilities:
            wanted.append(probability_path(task.output))
        if self.config.save_spread:
            wanted.append(spread_path(task.output))
        if not remote.exists(task.output):
            return False
        if not remote.exists(record_path(task.output)):
            return None
        fingerprint = self.fingerprint(task)
        return all(read_tags(file).get(FINGERPRINT) == fingerprint for file in wanted) or None

    def record(self, task: Task, scene: SensorScene, source: RasterSource) -> MapRecord:
        """What is known of a map before its first pixel. Reads the quality layers once.

        Args:
            task: the scene.
            scene: the same, opened.
            source: the same, as the networks see it.
        """
        predictor = self.predictor
        settings = {k: v for k, v in predictor.settings().items() if k != "networks"}
        runtimes = sorted({bundle.net.runtime for bundle in predictor.bundles})
        shares = predictor.weights or (1.0,) * len(predictor.bundles)
        return task.record.model_copy(
            update={
                "quality": scene.quality,
                "water": water_of(source.reference) if isinstance(source, Anchored) else None,
                "network": tuple(
                    NetworkFacts(
                        name=bundle.path.name, sha256=bundle.spec.weights_sha256, weight=share
                    )
                    for bundle, share in zip(predictor.bundles, shares, strict=True)
                ),
                "backend": "+".join(runtimes),
                "settings": {
                    **json.loads(json.dumps(settings)),
                    "land_rule": self.config.land,
                    "fingerprint": self.fingerprint(task),
                },
                "versions": {"kelp": kelp.__version__, "gdal": rasterio.__gdal_version__},
            }
        )

    def outputs(
        self,
        task: Task,
        scene: SensorScene | None = None,
        source: RasterSource | None = None,
        deliver: Callable[[Sequence[Path]], None] | None = None,
    ) -> Outputs:
        """Where a scene's probabilities go.

        Args:
            task: the scene.
            scene: the same, opened; None: only to see what was begun.
            source: the same, as the networks see it.
            deliver: takes the files to where they belong.
        """
        return Outputs(
            task.size.shape,
            task.georeference,
            local(task.output),
            self.predictor.threshold,
            {FINGERPRINT: self.fingerprint(task), "KELP_VERSION": kelp.__version__},
            self.config.probability_dtype if self.config.save_probabilities else None,
            # No other process could resume a scratch file.
            None if deliver else self.fingerprint(task, exact=True),
            resume=not self.config.overwrite,
            spread=self.config.save_spread,
            deliver=deliver,
            record=self.record(task, scene, source or scene) if scene else None,
            rules=rules_of(self.config, scene, self.predictor.threshold) if scene else None,
            calibrated=all(bundle.spec.tuning for bundle in self.predictor.bundles),
            limits=self.predictor.limits,
        )

    def section_file(self, task: Task, section: Section) -> SectionFile:
        """Where a section of a scene is kept."""
        return SectionFile(local(task.output), section, self.fingerprint(task, exact=True))

    def perform(
        self, item: WorkItem, tiles_done: Callable[[int], None] | None = None
    ) -> WorkResult:
        """Work on an item. What is finished already is left as it is."""
        result = WorkResult(item)
        with decoding(self.predictor.cache):
            if item.stitch:
                self._stitch(item, result)
            elif item.sections:
                self._sections(item, result)
            else:
                self._scenes(item, result, tiles_done)
        result.peak_memory = memory.peak()
        return result

    def _scenes(
        self, item: WorkItem, result: WorkResult, tiles_done: Callable[[int], None] | None
    ) -> None:
        engine = self.predictor.engine(tiles_done)
        sinks: dict[int, tuple[Outputs, Task]] = {}

        def jobs() -> Iterator[Job]:
            for task, staged in staging.ahead(self._unfinished(item, result, engine)):
                try:
                    here = staged()
                    with self._opened(here) as scene:
                        if isinstance(task.path, Url):  # so far only its header was seen
                            self.predictor.check_scale(scene, str(scene.path))
                        source = self.predictor.anchored(scene, str(task.path))
                        sink = self.outputs(here, scene, source, staging.delivery(task)).open()
                        sinks[id(sink)] = sink, task
                        yield Job(source, sink, sink, sink.write_spread)
                except Exception as error:  # noqa: BLE001  # also a bug ends its scene only
                    result.note(task, staging.named(task, error))
                finally:
                    staging.drop(task)

        with Staging(self.pixel_bytes) as staging:
            try:
                engine.run(jobs())
            finally:
                # Whatever ended this: a failed scene, Ctrl-C, a bug. Closed outputs stay.
                for sink, task in sinks.values():
                    result.closed(task, sink.finished)
                    sink.abandon()
            for failed, error in engine.failures:
                task = sinks[id(failed)][1]
                result.note(task, staging.named(task, error))
        result.counts = engine.counts

    @contextmanager
    def _opened(self, task: Task) -> Iterator[SensorScene]:
        with open_scene(task.path, self.config) as scene:
            if scene.shape != task.size.shape:
                raise InputError(f"{task.path}: changed since the run began; run it again")
            yield scene

    def _unfinished(self, item: WorkItem, result: WorkResult, engine: Engine) -> Iterator[Task]:
        for task in item.tasks:
            try:
                if self.config.overwrite or not self.finished(task):
                    yield task
                    continue
            except KelpError as error:  # the store does not answer
                result.note(task, error)
                continue
            engine.skip(len(self.grid(task)))  # done by a worker that was presumed dead

    def _sections(self, item: WorkItem, result: WorkResult) -> None:
        (task,) = item.tasks
        engine = self.predictor.engine()
        sinks: list[SectionSink] = []

        def jobs() -> Iterator[Job]:
            try:
                with self._opened(task) as scene:
                    source = self._anchored(scene, task)
                    for section in item.sections:
                        file = self.section_file(task, section)
                        if file.exists:
                            rows = section.end - section.first
                            engine.skip(rows * len(self.grid(task).columns))
                            continue
                        sink = file.sink(self.config.save_spread)
                        sinks.append(sink)
                        yield Job(source, sink, None, sink.write_spread, section, sink.edge)
            except Exception as error:  # noqa: BLE001
                result.note(task, error)

        try:
            engine.run(jobs())
        finally:
            for sink in sinks:
                sink.abandon()
        for _, error in engine.failures:
            result.note(task, error)
        result.counts = engine.counts

    def _anchored(self, scene: SensorScene, task: Task) -> RasterSource:
        """A scene in sections as the networks know it; read as a whole for its first ones only."""
        kept = self._reference
        if kept and kept[0] == task.digest:
            return Anchored(scene, kept[1])
        source = self.predictor.anchored(scene, str(task.path))
        if isinstance(source, Anchored):
            self._reference = task.digest, source.reference
        return source

    def _stitch(self, item: WorkItem, result: WorkResult) -> None:
        (task,) = item.tasks
        files = [self.section_file(task, section) for section in item.sections]
        stitching = Stitching(task.size.shape, self.config.blend, self.config.save_spread)
        sink = None
        try:
            if not all(file.exists for file in files) and self.finished(task):
                return  # by a worker that was presumed dead
            with self._opened(task) as scene:
                sink = self.outputs(task, scene, self._anchored(scene, task)).open()
            begun = self.grid(task).rows.index(sink.start.top) if sink.start else 0
            if item.sections[0].first != begun:
                raise InputError(f"{task.output}: another process worked on it; run again")
            stitching.stitch(files, sink.start, sink, sink.write_spread)
            result.closed(task, sink.finished)
            clean_up(local(task.output))
        except OSError as error:
            words = f"{task.path}: a section of it cannot be read ({error}); run again"
            result.note(task, InputError(words))
        except Exception as error:  # noqa: BLE001
            result.note(task, error)
        finally:
            if sink:
                sink.abandon()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass
class _Split:
    """A scene in sections."""

    task: Task
    sections: tuple[Section, ...]
    waiting: deque[Section]
    left: set[int]
    """First rows of the sections that are not finished."""
    failed: bool = False


class WorkQueue:
    """Items of what is to be predicted, in the order of scenes.

    One process takes whole scenes all at once, and in sections only what another run has left in
    sections. For a cluster scenes are grouped and large ones split, but for those from or for a
    store: sections need a disk that all workers share. Items shrink as less is left, so that
    workers end together (guided self-scheduling, Polychronopoulos & Kuck 1987, IEEE
    Transactions on Computers C-36(12)).

    Args:
        runner: as the scenes will be predicted.
        tasks: the scenes.
        workers: how many processes share the work now; None = this one does it all.
    """

    def __init__(
        self, runner: Runner, tasks: Sequence[Task], workers: Callable[[], int] | None = None
    ) -> None:
        self._runner = runner
        self._workers = workers
        self._whole: deque[Task] = deque()
        self._split: dict[Path | Url, _Split] = {}
        self._ready: deque[WorkItem] = deque()
        """Scenes whose sections are all finished."""
        self._batch = runner.predictor.slicing.batch_size
        for task in tasks:
            if split := self._in_sections(task):
                self._split[task.path] = split
            else:
                self._whole.append(task)
        self._tiles = sum(len(runner.grid(task)) for task in tasks)
        """Not handed out yet."""

    def next(self) -> WorkItem | None:
        """The next item; None = none now."""
        if self._ready:
            return self._ready.popleft()
        for split in self._split.values():
            if split.waiting:
                return self._of_sections(split)
        return self._of_scenes() if self._whole else None

    def done(self, result: WorkResult) -> None:
        """Note what became of an item."""
        item = result.item
        split = self._split.get(item.tasks[0].path)
        if split is None or item.stitch:
            return
        split.left -= {section.first for section in item.sections}
        if split.task.path in result.failures:
            split.failed = True
            split.waiting.clear()
        elif not (split.left or split.failed):
            self._ready.append(WorkItem((split.task,), split.sections, stitch=True))

    def _in_sections(self, task: Task) -> _Split | None:
        runner = self._runner
        if task.staged:
            return None
        grid, mask = runner.grid(task), local(task.output)
        folder = sections_folder(mask)
        if runner.config.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        if len(grid.rows) == 1 or (self._workers is None and not folder.is_dir()):
            return None
        begun = 0
        if JournalFile(mask, "").exists:  # it was begun in one go
            outputs = runner.outputs(task, None).open()
            begun = grid.rows.index(outputs.start.top) if outputs.start else 0
            outputs.abandon()
        found = tuple(sections_of(grid, self._batch, begun))
        finished = any(runner.section_file(task, section).exists for section in found)
        if not finished:
            shutil.rmtree(folder, ignore_errors=True)  # of other inputs or settings
        if len(found) == 1 or (self._workers is None and not finished):
            return None
        return _Split(task, found, deque(found), {section.first for section in found})

    def _share(self) -> int:
        """Tiles that a worker should get of what is left; one process takes all."""
        return self._tiles // (2 * max(1, self._workers())) if self._workers else self._tiles

    def _of_sections(self, split: _Split) -> WorkItem:
        columns = len(self._runner.grid(split.task).columns)
        most = max(self._share(), _FULL_BATCHES * self._batch)
        taken = [split.waiting.popleft()]
        while split.waiting and (split.waiting[0].end - taken[0].first) * columns <= most:
            taken.append(split.waiting.popleft())
        self._tiles -= (taken[-1].end - taken[0].first) * columns
        return WorkItem((split.task,), tuple(taken))

    def _of_scenes(self) -> WorkItem:
        most = self._tiles
        if self._workers:
            # Whole batches: the last of an item is filled up with nothing.
            most = min(max(self._share() // self._batch, 1), _MOST_BATCHES) * self._batch
        taken: list[Task] = []
        tiles = 0
        while self._whole and (not taken or tiles < most):
            taken.append(self._whole.popleft())
            tiles += len(self._runner.grid(taken[-1]))
        self._tiles -= tiles
        return WorkItem(tuple(taken))
