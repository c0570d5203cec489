"""Scenes of a store: fetched before they are predicted, their maps put into the store after.

The engine knows local files only. What is under way lies in a scratch folder of this process,
two scenes and the maps of a few at most, which is gone when the work ends, however it ends.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from kelp.errors import InputError, KelpError
from kelp.inference.inputs import Task
from kelp.inference.outputs import products
from kelp.inference.plan import check_space, output_bytes
from kelp.io import remote
from kelp.io.location import Url


class Staging:
    """Takes scenes and maps of a store through a scratch folder; a context manager.

    Args:
        pixel_bytes: of the maps, for each pixel.
    """

    def __init__(self, pixel_bytes: int) -> None:
        self._pixel_bytes = pixel_bytes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def ahead(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Callable[[], Task]]]:
        """Each task, and what gives it with local files; meanwhile the next scene is fetched.

        That raises `InputError` where a scene cannot be fetched, or has changed.
        """
        waiting: deque[tuple[Task, Callable[[], Task]]] = deque()
        for task in tasks:
            waiting.append((task, self._begin(task)))
            allowed = 1 if task.staged else 0
            while len(waiting) > allowed:
                yield waiting.popleft()
        yield from waiting

    def drop(self, task: Task) -> None:
        """The scene has been read, or was given up."""
        if task.fetched:
            self._scene(task.path).unlink(missing_ok=True)

    def delivery(self, task: Task) -> Callable[[Sequence[Path]], None] | None:
        """What puts a scene's finished maps into the store; None = they are at their place."""
        target = task.output
        if not isinstance(target, Url):
            return None

        def deliver(written: Sequence[Path]) -> None:
            try:
                for path in reversed(written):  # the mask last: it vouches for the others
                    remote.put(path, target.with_name(path.name))
                for path in products(self._map(target)):
                    if path not in written:  # of an earlier run, it would not belong to the mask
                        remote.remove(target.with_name(path.name))
            finally:
                for path in written:
                    path.unlink(missing_ok=True)

        return deliver

    def named(self, task: Task, error: Exception) -> Exception:
        """An error by the names that the user knows."""
        if not task.staged or not isinstance(error, KelpError):
            return error
        text = error.message
        if task.fetched:
            text = text.replace(str(self._scene(task.path)), str(task.path))
        known = any(str(place) in text for place in (task.path, task.output.parent))
        return type(error)(text if known else f"{task.path}: {text}")

    def _begin(self, task: Task) -> Callable[[], Task]:
        return self._fetching.submit(self._fetch, task).result if task.staged else lambda: task

    def _fetch(self, task: Task) -> Task:
        path, output, need = task.path, task.output, 0
        if isinstance(output, Url):
            output = self._map(output)
            need += output_bytes([task.size], self._pixel_bytes)
        if not task.fetched or isinstance(path, Path):
            check_space(self._scratch, need, _WAY_OUT)
            return replace(task, output=output)
        found = remote.look(path)
        if found.identity != task.record.scene.sources[0].etag:
            raise InputError(f"{path}: changed since the run began; run the same command again")
        check_space(self._scratch, need + found.size, _WAY_OUT)
        remote.fetch(path, self._scene(path), found)
        return replace(task, path=self._scene(path), output=output)

    def _scene(self, url: Path | Url) -> Path:
        return self._scratch / "scenes" / url.name

    def _map(self, url: Url) -> Path:
        return self._scratch / "maps" / url.name

    @cached_property
    def _scratch(self) -> Path:
        made = tempfile.TemporaryDirectory(prefix="kelp-", ignore_cleanup_errors=True)
        folder = Path(self._stack.enter_context(made))
        for name in ("scenes", "maps"):
            (folder / name).mkdir()
        return folder

    @cached_property
    def _fetching(self) -> ThreadPoolExecutor:
        folder = self._scratch  # made first, it is removed last
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"kelp-fetch-{folder.name}")
        self._stack.callback(pool.shutdown, cancel_futures=True)
        return pool


_WAY_OUT = "point TMPDIR to a larger disk"
