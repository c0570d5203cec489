"""`python -m kelp.nn.training.helper`: one of the processes that `helpers` starts."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from kelp.config import TrainConfig
from kelp.errors import KelpError


def main() -> NoReturn:
    """Take part in a run, as the first process says on standard input."""
    # Whoever starts and stops a run deals with the first process, which deals with this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("kelp").disabled = True
    say = _voice()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        _follow(order, lambda: say({"ready": True}))
    except KelpError as error:
        say({"error": type(error).__name__, "message": error.message})
        _end(2)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        _end(1)
    _end(0)


def _follow(order: dict[str, Any], ready: Callable[[], None]) -> None:
    from kelp.nn.training.fit import follow

    config = TrainConfig(**order["config"])
    follow(config, order["rank"], order["count"], order["port"], ready)


def _voice() -> Callable[[dict[str, Any]], None]:
    """Standard output, for this purpose alone: what libraries print goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    return say


def _end_with_the_first() -> None:
    """Its end, however it came, is the end of this process's standard input."""
    # Not by `sys.stdin`: processes forked from this one, to load data, would inherit its lock.
    while os.read(0, 1):
        pass
    _end(1)


def _end(status: int) -> NoReturn:
    """At once: whatever this process still waits for will not come."""
    for loader in multiprocessing.active_children():
        loader.terminate()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
