"""A Dask scheduler and its workers as processes of this machine."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def process(*arguments, env=QUIET):
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *map(str, arguments)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class Dask:
    """A scheduler and its workers, as a user starts them by hand."""

    def __init__(self, folder, workers=2):
        self.file = folder / "scheduler.json"
        self.scheduler = process(
            "scheduler", "--port", 0, "--no-dashboard", "--scheduler-file", self.file
        )
        deadline = time.monotonic() + 300
        while not self.is_written:  # a worker that reads half of the file gives up
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.1)
        self.workers = []
        for _ in range(workers):
            self.add_worker()

    @property
    def is_written(self):
        with suppress(OSError, ValueError):
            return bool(json.loads(self.file.read_text()))
        return False

    @property
    def address(self):
        return json.loads(self.file.read_text())["address"]

    def add_worker(self, **variables):
        # Their working directory is another one than the test's: paths must not depend on it.
        self.workers.append(
            process(
                "worker",
                "--scheduler-file",
                self.file,
                "--nthreads",
                1,
                "--no-nanny",
                "--no-dashboard",
                "--death-timeout",
                300,
                "--local-directory",
                self.file.parent,
                env={**QUIET, **variables},
            )
        )
        return self.workers[-1]

    def close(self):
        for one in (*self.workers, self.scheduler):
            one.kill()
        for one in (*self.workers, self.scheduler):
            one.wait(30)


@contextmanager
def dask(folder, workers=2):
    cluster = Dask(folder, workers)
    try:
        yield cluster
    finally:
        cluster.close()
