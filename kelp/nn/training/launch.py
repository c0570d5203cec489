"""`--devices N`: the processes of a run on this machine, started by `torch.multiprocessing`.

The caller's process trains nothing; it shows the progress and messages of the first one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import QueueHandler
from typing import Any, Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessException, start_processes

from kelp.config import TrainConfig
from kelp.errors import KelpError, ProcessError
from kelp.io.executors import worker_count
from kelp.nn.training.processes import interrupt_once
from kelp.nn.training.result import TrainResult
from kelp.nn.training.tracking import Part, Pruned, reopen_run
from kelp.progress import Progress, silent

log = logging.getLogger("kelp")

_HOST: Final = "127.0.0.1"
_GRACE: Final = 10.0  # seconds that processes have to end by themselves, then after SIGTERM
_LOOK: Final = 0.1  # seconds between looks at the processes

# Reports of the first process: the name of what is called here, and its arguments.
Report = tuple[str, tuple[Any, ...]]


Train = Callable[[TrainConfig, Progress, Part | None], TrainResult]


def launch(
    train: Train, config: TrainConfig, count: int, progress: Progress, part: Part | None
) -> TrainResult:
    """Call `train`, a function of a module, in `count` processes of this machine.

    A script that calls this needs `if __name__ == "__main__":`, as with all of multiprocessing.

    Raises:
        KelpError: one of them failed; the cause is its own, or `ProcessError`.
    """
    # Bound here, so that no other program can take the port before they meet.
    store = TCPStore(_HOST, 0, count, is_master=True, wait_for_workers=False)
    reports = multiprocessing.get_context("spawn").Queue()
    outcome = _Outcome(config, progress, part)
    names = (part.parent, part.name) if part else (None, None)
    arguments = (train, config, count, store.port, names, log.getEffectiveLevel(), reports)
    with _interruptible():
        workers = start_processes(_worker, arguments, count, join=False)  # type: ignore[no-untyped-call]
        try:
            while not workers.join(_LOOK, _GRACE):
                outcome.read(reports)
        except ProcessException as lost:
            outcome.read(reports, _LOOK)
            codes = [process.exitcode or 0 for process in workers.processes]
            raise outcome.cause(codes, lost) from None
        except Pruned as reason:
            reopen_run(outcome.run_dir, config).prune(str(reason))
            raise
        except KeyboardInterrupt:
            log.info("stopped; resume with --resume_from %s", outcome.run_dir)
            raise
        finally:
            for process in workers.processes:
                process.terminate()
            for process in workers.processes:
                process.join(_GRACE)
                process.kill()
    outcome.read(reports, _LOOK)
    assert outcome.result is not None
    return outcome.result


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is as Ctrl-C while it lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Outcome:
    """What the processes report."""

    def __init__(self, config: TrainConfig, progress: Progress, part: Part | None) -> None:
        self.folder = config.output_dir / config.experiment
        self.run_dir = self.folder
        self.part = part
        self.result: TrainResult | None = None
        self.errors: list[KelpError] = []
        self.calls: dict[str, Callable[..., object]] = {
            "progress": progress,
            "log": log.handle,
            "begin": self._begin,
            "end_epoch": part.end_epoch if part else lambda epoch, metrics: None,
            "error": self.errors.append,
            "result": self._finish,
        }

    def read(self, reports: Any, patience: float = 0.0) -> None:
        """Do what was reported so far."""
        while True:
            try:
                name, values = reports.get(timeout=patience)
            except queue.Empty:
                return
            self.calls[name](*values)

    def cause(self, codes: list[int], lost: Exception) -> Exception:
        """Why a run ended: the error of one process, rather than what others made of its end."""
        errors = sorted(self.errors, key=lambda error: isinstance(error, ProcessError))
        if errors and not isinstance(errors[0], ProcessError):
            return errors[0]
        for rank, code in enumerate(codes):
            if code < 0 and -code != signal.SIGTERM:
                return ProcessError(
                    f"process {rank + 1} of {len(codes)} was killed (signal {-code}), as happens "
                    f"where memory runs out; resume with --resume_from {self.run_dir}"
                )
        return errors[0] if errors else RuntimeError(str(lost))

    def _begin(self, run_id: str) -> None:
        self.run_dir = self.folder / run_id
        if self.part:
            self.part.begin(run_id)

    def _finish(self, result: TrainResult) -> None:
        self.result = result


def _worker(
    rank: int,
    train: Train,
    config: TrainConfig,
    count: int,
    port: int,
    names: tuple[str | None, str | None],
    level: int,
    reports: Any,
) -> None:
    """One process of a run; Lightning and torch see the environment that torchrun makes."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "kelp",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt_once)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, worker_count(0, torch.get_num_threads()) // count))

    def report(name: str, *values: Any) -> None:
        reports.put((name, values))

    def progress(stage: str, done: int, total: int) -> None:
        report("progress", stage, done, total)

    def begin(run_id: str) -> None:
        report("begin", run_id)

    def end_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        report("end_epoch", epoch, dict(metrics))

    try:
        if rank:
            train(config, silent, None)
            return
        log.addHandler(_Forward(reports))
        log.setLevel(level)
        log.propagate = False
        report("result", train(config, progress, Part(*names, begin, end_epoch)))
    except KelpError as error:
        report("error", type(error)(error.message))  # without its causes, which may not be pickled
        sys.exit(2)


class _Forward(QueueHandler):
    """Sends records to the parent's logger."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a record, as any report."""
        self.queue.put_nowait(("log", (record,)))
