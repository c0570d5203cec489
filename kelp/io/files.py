"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from kelp.errors import InputError


@contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the final name only when the block succeeds.

    The temporary keeps the suffix (drivers look at it) and starts with a dot, so that no
    folder scan picks it up. A failure or Ctrl-C removes it; after `kill -9` it stays behind
    under its own name until `discard_partials`.
    Without `sync` a power cut may leave the file empty: for writers of thousands of files, who
    flush them all at once before they write what makes the files count.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if sync:
            with partial.open("rb+") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "check the folder's permissions and the free space"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder` that is gone when the block ends, however it does.

    After `kill -9` it stays behind until `discard_partials`.
    """
    scratch = folder / f".scratch.{os.getpid()}.partial"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def discard_partials(folder: Path) -> None:
    """Remove what killed processes left of `atomic` and `scratch_folder` in a folder."""
    for path in folder.glob(".*.partial*"):
        writer = re.search(r"\.(\d+)\.partial", path.name)
        if writer and _is_another(int(writer[1])):
            continue
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_another(process: int) -> bool:
    """Whether this is the number of another process of this machine that lives."""
    if process == os.getpid() or sys.platform == "win32":  # there signal 0 would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`atomic` for a folder: a new, empty one that becomes `path` when the block succeeds.

    A folder cannot be replaced in one step: for an instant there is none under the name, never
    an incomplete one. What stops there leaves the older one to `recover_folder`.
    """
    partial, old = path.with_name(f".{path.name}.partial"), _older(path)
    recover_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    output_folder(partial)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        _replace_folder(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "check the folder's permissions and the free space"
        ) from error
    finally:
        recover_folder(path)
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(path: Path, holding: str = "") -> None:
    """Give the older folder its name back, if `atomic_folder` was stopped while it replaced it.

    For readers too: a killed process leaves no folder under the name until somebody does this.
    They say what file it must be `holding`, so that nobody else's hidden folder is renamed.
    """
    with suppress(OSError):
        if not path.exists() and (_older(path) / holding).exists():
            _older(path).rename(path)


def _older(path: Path) -> Path:
    """Where the folder `path` waits while another takes its place."""
    return path.with_name(f".{path.name}.old")


def _replace_folder(new: Path, path: Path) -> None:
    while True:
        if path.exists():
            path.rename(_older(path))
        try:
            new.rename(path)
        except OSError as error:
            # Unless a reader came in between and recovered the older one: then once more.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` as indented JSON. NaN and Infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and Infinity are refused."""
    write_text(path, json_text(value))


def open_locked(path: Path, wait: bool = False) -> IO[bytes]:
    """Open a file for this process alone. A killed process holds no lock.

    While another process holds it: wait until it is free, or raise `BlockingIOError`.
    """
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a+b"))
            if sys.platform != "win32":  # no advisory locks of this kind there
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # else another process removed it just now
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    stack.pop_all()
                    return file


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file that is there only for that, see `open_locked`."""
    file = open_locked(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def output_folder(path: Path) -> Path:
    """Create `path` if needed and make sure that files can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: the output folder cannot be created ({error.strerror}); choose another one"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the output folder is not writable; choose another one")
    return path


def input_folder(path: Path, pattern: str = "*") -> list[Path]:
    """Files of a folder that match `pattern`, sorted by name; hidden files are left out.

    Raises `InputError` when the folder is missing or holds no such file.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; check the path")
    found = sorted(p for p in path.glob(pattern) if p.is_file() and not p.name.startswith("."))
    if not found:
        raise InputError(f"{path}: the folder holds no {pattern} file")
    return found


def amount(size: int) -> str:
    """A number of bytes to read, rounded up: 1.54 GB."""
    for unit, parts, name in ((10**9, 100, "GB"), (10**6, 10, "MB")):
        if size >= unit:
            return f"{-(-size * parts // unit) / parts:g} {name}"
    return f"{-(-size // 1000)} kB"
