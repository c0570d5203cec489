"""The other processes of a run on this machine: started, watched, and gone when it ends.

Each is `python -m kelp.nn.training.helper`, so that neither the caller's program nor a notebook is
run again. A line of JSON on its standard input tells it what to do; the end of that input, also
by the death of this process, tells it to go. It answers with lines of JSON: that it is ready, or
what went wrong.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, Self

import torch

import kelp
from kelp import errors
from kelp.config import TrainConfig
from kelp.errors import KelpError, ProcessError
from kelp.io.executors import worker_count
from kelp.nn.training.team import Team, open_store

log = logging.getLogger("kelp")

_MODULE: Final = "kelp.nn.training.helper"
_PATIENCE: Final = 5.0  # seconds until what ends by itself has ended
_GRACE: Final = 20.0  # seconds until this process is ended, where it hangs in a GPU's library


class Helper:
    """One of the other processes."""

    def __init__(self, rank: int, environment: dict[str, str]) -> None:
        self.rank = rank
        self.said: dict[str, Any] = {}
        """The last line that it said, if it has said one."""
        # A file, as nobody reads a pipe while networks train.
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def tell(self, order: dict[str, Any]) -> None:
        """What it is to do."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone, which is noticed elsewhere
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said = json.loads(line)

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self.process.poll()

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join(_PATIENCE)
        self.errors.close()


class Helpers:
    """The processes 1, 2, … of a run, of which this one is number 0.

    Args:
        config: of the run.
        count: processes, with this one.
        port: where they meet.
        threads: of each of them.
        run_dir: folder of the run, for messages.
    """

    def __init__(
        self, config: TrainConfig, count: int, port: int, threads: int, run_dir: Path
    ) -> None:
        self.count = count
        self.run_dir = run_dir
        self._ended = threading.Event()
        self._on_main_thread = threading.current_thread() is threading.main_thread()
        root = str(Path(kelp.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self.helpers = [Helper(rank, environment) for rank in range(1, count)]
        for helper in self.helpers:
            helper.tell(
                {
                    "rank": helper.rank,
                    "count": count,
                    "port": port,
                    "config": config.model_dump(mode="json"),
                }
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for helper in self.helpers:
            helper.end()

    def wait(self) -> None:
        """Until all are ready to train.

        Raises:
            KelpError: one has ended; the cause is its own, or `ProcessError`.
        """
        while not all(helper.said.get("ready") for helper in self.helpers):
            self.check()
            time.sleep(0.05)
        threading.Thread(target=self._watch, daemon=True).start()

    def check(self, patience: float = 0.0) -> None:
        """Whether one has ended before its time, within some seconds.

        Raises:
            KelpError: so it is; the cause is its own, or `ProcessError`.
        """
        deadline = time.monotonic() + patience
        while not (lost := [h for h in self.helpers if h.status]):
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)
        for helper in lost:
            helper.listener.join(1)  # its last words may be on their way
        # The cause is with the one that had something to say; others were only cut off.
        first = max(lost, key=lambda h: ("error" in h.said, (h.status or 0) < 0))
        raise self._cause(first)

    def _cause(self, helper: Helper) -> Exception:
        said, status = helper.said, helper.status or 0
        place = f"process {helper.rank + 1} of {self.count}"
        if "error" in said:
            kind = getattr(errors, said["error"], None)
            if isinstance(kind, type) and issubclass(kind, KelpError):
                return kind(said["message"])
        if status < 0:
            return ProcessError(
                f"{place} was killed (signal {-status}), as happens where memory runs out; "
                f"go on with --resume_from {self.run_dir}"
            )
        helper.errors.seek(0)
        text = helper.errors.read().decode(errors="replace")
        return RuntimeError(f"{place} ended with status {status}:\n{text[-4000:]}")

    def _watch(self) -> None:
        """End this process, too, where it does not notice by itself that another one is gone."""
        while not any(helper.status for helper in self.helpers):
            if self._ended.wait(0.2):
                return
        if self._ended.wait(_PATIENCE):
            return
        if self._on_main_thread:  # as Ctrl-C would, for example while it reads
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._ended.wait(_GRACE):
            log.error("a process was lost; go on with --resume_from %s", self.run_dir)
            os._exit(2)


@contextmanager
def together(
    config: TrainConfig, team: Team, device: torch.device, run_dir: Path | None = None
) -> Iterator[None]:
    """With the other processes of a run, which are started where this one is to do so.

    Args:
        config: of the run.
        team: its processes.
        device: where this one computes.
        run_dir: folder of the run, where this one leads.

    Raises:
        KelpError: one of them was lost; the cause is its own, or `ProcessError`.
    """
    try:
        if team.starts:
            assert run_dir is not None
            with _started(config, team, device, run_dir):
                yield
        else:
            team.meet(device)
            yield
    except RuntimeError as error:
        if team.count == 1 or not _is_broken_connection(error):
            raise
        raise ProcessError(
            f"process {team.rank + 1} of {team.count} lost the others; see what they say, then "
            f"go on with --resume_from {run_dir or 'the run folder'}"
        ) from error
    finally:
        team.part()


@contextmanager
def _started(
    config: TrainConfig, team: Team, device: torch.device, run_dir: Path
) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, worker_count(0, threads) // team.count))
    team.store = open_store(team.count)
    port, share = team.store.port, torch.get_num_threads()
    try:
        with Helpers(config, team.count, port, share, run_dir) as helpers:
            helpers.wait()
            team.meet(device)
            try:
                yield
            except (RuntimeError, KeyboardInterrupt) as error:
                # Cut off from one that is gone, or told by its watch that one is.
                helpers.check(_PATIENCE if isinstance(error, RuntimeError) else 0)
                raise
    finally:
        team.store = None
        torch.set_num_threads(threads)


def _is_broken_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset")
    )
