from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from kelp.errors import InputError, KelpError
from kelp.io.executors import spread, worker_count


def double(number):
    time.sleep(0.01 * (number % 3))
    return 2 * number, os.getpid()


def fail_at_five(number):
    if number == 5:
        raise InputError("five")
    return number


def die_at_five(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_long(number):
    if number:
        time.sleep(60)
    return number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_jobs(workers):
    results = list(spread(double, range(20), workers))
    assert [value for value, _ in results] == list(range(0, 40, 2))
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


def test_no_jobs_no_results():
    assert list(spread(double, [], 4)) == []


def test_there_are_not_more_workers_than_jobs_or_than_asked_for():
    assert worker_count(8, 3) == 3
    assert worker_count(2, 30) == 2
    assert worker_count(0, 10**6) >= 1
    assert worker_count(5, 0) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through_as_it_is(workers):
    with pytest.raises(InputError, match="five"):
        list(spread(fail_at_five, range(100), workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_gdal_comes_through_beside_dask(workers, tmp_path):
    """Dask makes pickle take along what caused an error, which GDAL's own cannot."""
    pytest.importorskip("distributed")
    (tmp_path / "no.tif").write_bytes(b"II*\0 no tiff")
    program = f"""
from pathlib import Path
from kelp.raster.masks import open_dataset
from kelp.io.executors import spread
import distributed  # after them: it is their errors that it changes
list(spread(open_dataset, [Path("no.tif")] * 2, {workers}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "InputError: no.tif: not a readable raster" in done.stderr.splitlines()[-1]


def test_a_killed_worker_is_one_line_not_a_hang():
    with pytest.raises(KelpError, match=r"a worker process was killed.*workers=1"):
        list(spread(die_at_five, range(100), 2))


def test_a_caller_who_stops_does_not_wait_for_the_work():
    start = time.monotonic()
    with closing(spread(sleep_long, range(4), 2)) as results:
        assert next(results) == 0
    assert time.monotonic() - start < 20
