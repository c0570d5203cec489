"""Progress of long work: one callback, and the silent one."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by long work, from one thread: `progress("slicing", done, total)`."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are finished; equal numbers end the stage."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing. The default wherever a `Progress` is taken."""
