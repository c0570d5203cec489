"""What is still to be predicted, handed out in units: to this process, or to those of a cluster."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kelp.inference.inputs import Task
from kelp.inference.outputs import sections_folder
from kelp.inference.run import Run
from kelp.inference.sections import sections_of
from kelp.inference.units import Outcome, Unit
from kelp.io.location import Url, local
from kelp.raster.scene import Scene
from kelp.tiling.jobs import Section

_FULL_BATCHES: Final = 4
"""In a unit of sections at least: the last batch of a unit is filled up with nothing."""
_MOST_BATCHES: Final = 16
"""In a unit of scenes at most: what is told of a unit is told when it is done."""


@dataclass
class _Cut:
    """A scene in sections."""

    task: Task
    all: tuple[Section, ...]
    waiting: deque[Section]
    left: set[int] = field(default_factory=set)
    """First rows of the sections that are not finished."""


class Work:
    """Units of what is to be predicted, in the order of scenes.

    One process takes whole scenes all at once, and in sections only what another run has left in
    sections. For a cluster scenes are grouped and large ones cut, but for those from or for a
    store: sections need a disk that all workers share. Units shrink as less is left, so that
    workers end together (guided self-scheduling, Polychronopoulos & Kuck 1987, IEEE
    Transactions on Computers C-36(12)).

    Args:
        run: as the scenes will be predicted.
        tasks: the scenes.
        workers: how many processes share the work now; None = this one does it all.
    """

    def __init__(
        self, run: Run, tasks: Sequence[Task], workers: Callable[[], int] | None = None
    ) -> None:
        self.failures: dict[Path | Url, str] = {}
        self._run = run
        self._workers = workers
        self._whole: deque[Task] = deque()
        self._cut: dict[Path | Url, _Cut] = {}
        self._ready: deque[Unit] = deque()
        """Scenes whose sections are all finished."""
        for task in tasks:
            cut = self._cut_up(task)
            if cut:
                self._cut[task.path] = cut
            else:
                self._whole.append(task)
        self._tiles = sum(len(run.grid(task)) for task in tasks)
        """Not handed out yet."""

    def draw(self) -> Unit | None:
        """The next unit; None = none now."""
        if self._ready:
            return self._ready.popleft()
        for cut in self._cut.values():
            if cut.waiting:
                return self._of_sections(cut)
        return self._of_scenes() if self._whole else None

    def took(self, outcome: Outcome) -> None:
        """Note what became of a unit."""
        unit = outcome.unit
        self.failures |= outcome.failures
        cut = self._cut.get(unit.tasks[0].path)
        if cut is None or unit.together:
            return
        cut.left -= {section.first for section in unit.sections}
        if cut.task.path in self.failures:
            cut.waiting.clear()
        elif not cut.left:
            self._ready.append(Unit((cut.task,), cut.all, together=True))

    def _cut_up(self, task: Task) -> _Cut | None:
        if task.staged:
            return None
        grid = self._run.grid(task)
        folder = sections_folder(local(task.output))
        if self._run.config.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        if len(grid.rows) == 1 or (self._workers is None and not folder.is_dir()):
            return None
        with Scene(task.path, self._run.config.band_order) as scene:
            outputs = self._run.outputs(task, scene, resume=not self._run.config.overwrite)
            outputs.abandon()  # only to see what was begun in one go
        begun = grid.rows.index(outputs.start.top) if outputs.start else 0
        found = tuple(sections_of(grid, self._run.slicing.batch_size, begun))
        finished = any(self._run.section_file(task, section).exists for section in found)
        if not finished:
            shutil.rmtree(folder, ignore_errors=True)  # of other inputs or settings
        if len(found) == 1 or (self._workers is None and not finished):
            return None
        return _Cut(task, found, deque(found), {section.first for section in found})

    def _share(self) -> int:
        """Tiles that a worker should get of what is left; one process takes all."""
        return self._tiles // (2 * max(1, self._workers())) if self._workers else self._tiles

    def _of_sections(self, cut: _Cut) -> Unit:
        columns = len(self._run.grid(cut.task).columns)
        wish = max(self._share(), _FULL_BATCHES * self._run.slicing.batch_size)
        taken = [cut.waiting.popleft()]
        while cut.waiting and (cut.waiting[0].end - taken[0].first) * columns <= wish:
            taken.append(cut.waiting.popleft())
        self._tiles -= (taken[-1].end - taken[0].first) * columns
        return Unit((cut.task,), tuple(taken))

    def _of_scenes(self) -> Unit:
        batch = self._run.slicing.batch_size
        wish = self._tiles
        if self._workers:
            # Whole batches: the last of a unit is filled up with nothing.
            wish = min(max(self._share() // batch, 1), _MOST_BATCHES) * batch
        taken: list[Task] = []
        tiles = 0
        while self._whole and (not taken or tiles < wish):
            taken.append(self._whole.popleft())
            tiles += len(self._run.grid(taken[-1]))
        self._tiles -= tiles
        return Unit(tuple(taken))
