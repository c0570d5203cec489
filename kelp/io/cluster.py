"""A Dask cluster as the place where work is done. The only room that knows `distributed`.

Tasks carry paths and numbers, never pixels; results are small. A worker process does one task at
a time, and few more are under way than there are workers: a million tiles do not become a million
futures. What a lost worker had begun is done again by another, which is Dask's own work.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final, Generic, TypeVar

from distributed import Client, Future, KilledWorker, LocalCluster, Worker, WorkerPlugin, get_worker
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError, parse_address, parse_host_port
from distributed.comm.registry import get_backend
from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Scheduler
from distributed.security import Security

from kelp import __version__
from kelp.errors import ConfigError, KelpError, fit_to_travel

log = logging.getLogger("kelp")

T = TypeVar("T")
R = TypeVar("R")

_SLOT: Final = "kelp"
"""Dask's resource that each worker has one of."""
_QUEUED: Final = 2
"""Tasks under way for each worker: one at work, one waiting."""
_STALLED: Final = 5.0  # seconds without a result
_CONNECTING: Final = 10.0  # seconds
_SLOW: Final = 30.0  # seconds until we say that workers do not answer
_WAITING: Final = 60.0
"""Seconds to wait for a worker, where none is there."""


@dataclass(frozen=True)
class Done(Generic[R]):
    """What a worker did."""

    result: R
    worker: str
    """Its address."""
    seconds: float
    notices: tuple[tuple[int, str], ...] = ()
    """What was logged there: level and message."""


class Cluster:
    """Workers of a Dask scheduler.

    Args:
        client: connected to it; it stays the caller's.

    Raises:
        KelpError: there is no worker, or one that runs another kelp.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._seen = 0.0
        self._threads: dict[str, int] = {}
        _wait_for_workers(client)
        self._check_versions()
        client.register_plugin(_OneAtATime(), name=_SLOT)

    @property
    def threads(self) -> dict[str, int]:
        """Threads that each worker process may use, by its address; a few seconds old at most."""
        if time.monotonic() - self._seen > 2:
            self._threads = dict(self.client.nthreads())
            self._seen = time.monotonic()
        return self._threads

    def ask(self, function: Callable[..., R], *arguments: object) -> dict[str, R]:
        """The answer of each worker. Raises `KelpError` naming one that cannot."""
        with _patience(f"{_address(self.client)}: not all workers answer yet; does one hang?"):
            answers: dict[str, Any] = self.client.run(function, *arguments, on_error="return")
        # One that is lost meanwhile is not asked again: Dask gives it no work.
        answers = {w: a for w, a in answers.items() if not isinstance(a, CommClosedError)}
        if not answers:
            raise KelpError(f"the cluster at {_address(self.client)} has lost all its workers")
        for worker, answer in answers.items():
            if isinstance(answer, KelpError | OSError):
                raise KelpError(f"worker {worker}: {answer}")
            if isinstance(answer, ImportError):
                raise KelpError(
                    f"worker {worker}: has no kelp that works ({answer}); install "
                    f'"kelp-slicer[dask]=={__version__}" there'
                )
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def require_shared(self, folder: Path) -> None:
        """Raise `KelpError` naming a worker that does not see what is written to this folder."""
        marker = folder / f".shared.{os.getpid()}.partial"
        try:
            marker.touch()
            for worker, seen in self.ask(_sees, marker).items():
                if not seen:
                    raise KelpError(
                        f"worker {worker}: does not see {folder} as this machine does; write to a "
                        "folder that all workers share, or to an object store"
                    )
        finally:
            marker.unlink(missing_ok=True)

    def run(
        self, function: Callable[[T], R], draw: Callable[[], T | None]
    ) -> Generator[Done[R], None, None]:
        """Results of `function` on all that `draw` gives, as they come.

        Args:
            function: a module-level function, or a partial of one. It may be run twice for a
                job, even at one time, when a worker seems to be lost.
            draw: the next job; None = none now, perhaps one when another result has come.

        Raises:
            KelpError: the scheduler is lost, or workers die of a job. Errors of `function`.
        """
        finished: Queue[Future] = Queue()
        running: set[Future] = set()
        try:
            while True:
                most = max(1, len(self.threads)) * _QUEUED
                while len(running) < most and (job := draw()) is not None:
                    future = self.client.submit(
                        _call, __version__, dumps((function, job)), pure=False, resources={_SLOT: 1}
                    )
                    running.add(future)
                    future.add_done_callback(finished.put)
                if not running:
                    return
                future = self._next(finished)
                running.remove(future)
                done = _result(future)
                for level, message in done.notices:
                    log.log(level, "%s", message)
                yield done
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(running))

    def map(self, function: Callable[[T], R], jobs: Sequence[T]) -> Generator[R, None, None]:
        """`map(function, jobs)`, in the order of `jobs`."""
        chunk = max(1, min(8, len(jobs) // (8 * max(1, len(self.threads)))))
        starts = iter(range(0, len(jobs), chunk))
        ready: dict[int, list[R]] = {}
        turn = 0

        def draw() -> _Chunk[T, R] | None:
            # One slow task must not let the results behind it pile up.
            if len(ready) > 16 * max(1, len(self.threads)):
                return None
            start = next(starts, None)
            return None if start is None else _Chunk(function, start, jobs[start : start + chunk])

        for done in self.run(_call_all, draw):
            start, results = done.result
            ready[start] = results
            while turn in ready:
                results = ready.pop(turn)
                turn += chunk
                yield from results

    def _next(self, finished: Queue[Future]) -> Future:
        lonely = looked = time.monotonic()
        while True:
            with suppress(Empty):
                return finished.get(timeout=1.0)
            if self.client.status != "running":
                raise _lost()
            if time.monotonic() - looked > _STALLED:
                with suppress(OSError):  # the scheduler may be gone; that is seen above
                    self.client.run_on_scheduler(_look_again)
                looked = time.monotonic()
            with suppress(OSError):
                if self.threads:
                    lonely = time.monotonic()
            if time.monotonic() - lonely > _WAITING:
                raise KelpError(
                    f"the cluster has had no worker for {_WAITING:.0f} s; start one with "
                    f"`dask worker {_address(self.client)}` and run the same command again; where "
                    "they died at work, most likely of memory, with a lower --batch_size"
                )

    def _check_versions(self) -> None:
        try:
            self.client.run_on_scheduler(_version)  # it reads what it sends on to workers
        except ImportError as error:
            raise KelpError(
                f"the scheduler at {_address(self.client)} has no kelp that works ({error}); "
                f'install "kelp-slicer[dask]=={__version__}" there, too'
            ) from error
        for worker, version in self.ask(_version).items():
            if version != __version__:
                raise KelpError(_other_version(worker, version, __version__))


@contextmanager
def connect(scheduler: str) -> Iterator[Cluster]:
    """The cluster that `--scheduler` means; one of this machine ends with the block.

    Args:
        scheduler: `local` (a worker for each core), `local:N`, the address of a scheduler
            (`tcp://host:8786`), or its scheduler file.

    Raises:
        ConfigError: it means none of these, or no scheduler answers there.
        KelpError: there is no worker, or one that runs another kelp.
    """
    with ExitStack() as stack:
        for name in ("distributed", "distributed.client"):  # the second has a level of its own
            quiet = logging.getLogger(name)
            stack.callback(quiet.setLevel, quiet.level)
            quiet.setLevel(logging.CRITICAL)  # what goes wrong is told by us, in one line
        kind, colon, number = scheduler.partition(":")
        if kind == "local":
            client = _local(stack, scheduler, number if colon else None)
        elif "://" in scheduler:
            client = _client(stack, scheduler, scheduler)
        elif Path(scheduler).is_file():
            client = _client(stack, scheduler, _address_in(scheduler))
        else:
            raise ConfigError(
                f"--scheduler {scheduler}: neither local, local:N, an address such as "
                "tcp://host:8786, nor a scheduler file"
            )
        cluster = Cluster(client)
        count = len(cluster.threads)
        named = "1 worker" if count == 1 else f"{count} workers"
        log.info("cluster: %s at %s%s", named, _address(client), _watch(client))
        yield cluster


def _local(stack: ExitStack, scheduler: str, number: str | None) -> Client:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if number is not None and not (number.isdecimal() and int(number)):
        raise ConfigError(f"--scheduler {scheduler}: local:N needs a number of workers, 1 or more")
    count = int(number or cores or 1)
    made = LocalCluster(
        n_workers=count,
        threads_per_worker=max(1, (cores or 1) // count),
        processes=True,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
    )
    stack.enter_context(made)
    return stack.enter_context(Client(made, set_as_default=False))


def _address_in(scheduler: str) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
    raise ConfigError(
        f"--scheduler {scheduler}: not a scheduler file; "
        "`dask scheduler --scheduler-file` makes one"
    )


def _client(stack: ExitStack, scheduler: str, address: str) -> Client:
    try:
        # First by itself: a client that fails half-made waits 20 s, and complains, when it goes.
        scheme, place = parse_address(address, strict=True)
        get_backend(scheme)
        if scheme in ("tcp", "tls"):
            parse_host_port(place)
        if scheme == "tls" and not Security().get_connection_args("client").get("ssl_context"):
            raise ConfigError(
                f"--scheduler {scheduler}: needs certificates; name them in Dask's configuration, "
                "under distributed.comm.tls"
            )
        return stack.enter_context(Client(address, timeout=_CONNECTING, set_as_default=False))
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--scheduler {scheduler}: no scheduler answers there; start one with "
            "`dask scheduler`, and check the address"
        ) from error


def _wait_for_workers(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=_WAITING)
    except TimeoutError:
        address = _address(client)
        raise KelpError(
            f"the scheduler at {address} has no worker; start one with `dask worker {address}`"
        ) from None


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler else "its address"


def _watch(client: Client) -> str:
    runs = "dashboard" in client.scheduler_info().get("services", {})  # the link names it anyway
    return f", dashboard {client.dashboard_link}" if runs else ""


@contextmanager
def _patience(words: str) -> Iterator[None]:
    """Warns when the block takes long."""
    timer = threading.Timer(_SLOW, log.warning, (words,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _OneAtATime(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Lets a worker process do one task of kelp at a time: the network has all its threads."""

    async def setup(self, worker: Worker) -> None:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, if torch comes later
        await worker.set_resources(**{_SLOT: 1})


@dataclass(frozen=True)
class _Chunk(Generic[T, R]):
    function: Callable[[T], R]
    start: int
    jobs: Sequence[T]


def _call_all(chunk: _Chunk[T, R]) -> tuple[int, list[R]]:
    return chunk.start, [chunk.function(job) for job in chunk.jobs]


def _call(version: str, packed: bytes) -> Done[Any]:
    """Runs on a worker. Packed, as the scheduler would unpickle a function, and import torch."""
    worker = str(get_worker().address)
    if version != __version__:  # one that came later than the check of all
        raise KelpError(_other_version(worker, __version__, version))
    function, job = loads(packed)
    began = time.perf_counter()
    with _listening() as heard, fit_to_travel():
        try:
            result = function(job)
        except OSError as error:  # bare, it would look as if the scheduler were lost
            raise KelpError(f"worker {worker}: {error}") from error
    return Done(result, worker, time.perf_counter() - began, tuple(heard))


@contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    """What is logged meanwhile, for the user to see."""
    heard: list[tuple[int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.levelno, record.getMessage()))

    listener, level = Listener(), log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


def _sees(marker: Path) -> bool:
    deadline = time.monotonic() + 5  # network file systems may be late
    while not marker.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _version() -> str:
    return __version__


def _other_version(worker: str, theirs: str, ours: str) -> str:
    return f"worker {worker}: runs kelp {theirs}, this is {ours}; install the same version on both"


def _look_again(dask_scheduler: Scheduler) -> None:
    """Runs on the scheduler: tasks that had no worker with a slot go to one that has one now.

    A worker gets its slot when it is registered already, and Dask does not look then for tasks
    that wait for one: those whose workers died, when no other was left.
    """
    for worker in dask_scheduler.running:
        dask_scheduler.transitions(
            dask_scheduler.bulk_schedule_unrunnable_after_adding_worker(worker), "kelp"
        )


def _result(future: Future) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        worker = error.last_worker.address
        raise KelpError(
            f"{worker} and the workers before it died of one task; most likely memory: lower "
            "--batch_size, or start workers with more (dask worker --memory-limit)"
        ) from error
    except (FutureCancelledError, TimeoutError, OSError) as error:
        raise _lost() from error


def _lost() -> KelpError:
    return KelpError(
        "the scheduler of the cluster is lost; what is finished is kept: run the same command again"
    )
