"""Pieces of a prediction that one process does in one go, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kelp.errors import BusyError, KelpError
from kelp.inference.inputs import Task
from kelp.io.location import Url
from kelp.tiling.jobs import Counts, Section


@dataclass(frozen=True)
class Unit:
    """What one process does in one go; small, as it travels to workers.

    Whole scenes; or sections of one scene; or all sections of one, put together.
    """

    tasks: tuple[Task, ...]
    sections: tuple[Section, ...] = ()
    together: bool = False
    """The sections are finished: make the scene's outputs of them."""


@dataclass
class Outcome:
    """What a process made of a unit."""

    counts: Counts
    failures: dict[Path | Url, str] = field(default_factory=dict)
    """The error of each scene that failed."""
    unit: Unit = Unit(())
    busy: tuple[Task, ...] = ()
    """Scenes, among those that failed, that another process is writing."""

    def note(self, task: Task, error: KelpError) -> None:
        """A scene failed."""
        self.failures[task.path] = error.message
        if isinstance(error, BusyError):
            self.busy += (task,)

    peak_memory: int = 0
