"""How fast a run goes: samples a second, and how long its steps wait for data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

SPEED: Final = "train/samples_per_second"
WAITING: Final = "train/waiting_for_data"


class Pace:
    """A stopwatch that is told where the steps of an epoch begin and end.

    It reads the clock and nothing else, so training is the same with and without it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start anew; the first batch is waited for from now on."""
        self.began = self.ended = self.paused = self.clock()
        self.waited = 0.0
        self.samples = 0

    def begin_step(self) -> None:
        """A batch has come."""
        self.waited += self.clock() - self.ended

    def end_step(self, samples: int) -> None:
        """A step with so many samples is done; from now on the next batch is waited for."""
        self.ended = self.clock()
        self.samples += samples

    def pause(self) -> None:
        """A validation begins, which is no training."""
        self.paused = self.clock()

    def go_on(self) -> None:
        """It is over."""
        lost = self.clock() - self.paused
        self.began += lost
        self.ended += lost

    def metrics(self, processes: int) -> dict[str, float]:
        """Samples a second of so many processes like this one, and the share of time waited, 0-1.

        Nothing before the first step is done.
        """
        spent = self.ended - self.began
        if spent <= 0:
            return {}
        return {SPEED: processes * self.samples / spent, WAITING: self.waited / spent}
