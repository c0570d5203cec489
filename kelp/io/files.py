"""Files that appear complete or not at all, and locks.

Temporaries bear the name of their writer, `.kelp-<host>-<process>-<token>.partial`: what a killed
process of this host left can be told from what another one, here or elsewhere, is writing.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Final
from zipfile import BadZipFile

from kelp.errors import InputError

log = logging.getLogger("kelp")

RASTERS: Final = (".tif", ".tiff", ".vrt")
"""Ends of the names of files that are taken for rasters, in any case of letters."""

LONGEST_NAME: Final = 255
"""Bytes of a file's name that all usual file systems take."""

_in_use: Final[set[str]] = set()
"""Temporaries of this process: others with its number are of one before it, as in containers."""

_ABANDONED: Final = 24 * 3600.0
"""Seconds after which nobody on another host still writes a file that has not changed since."""

DAMAGED_ARRAYS: Final = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    BadZipFile,
    TokenError,
    zlib.error,
)
"""What `numpy.load` raises for damaged `.npz` files; it reads headers with Python's tokenizer."""

# What file systems without locks of this kind answer: Lustre without -o flock, some NFS and FUSE.
_NO_LOCKS: Final = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


def host() -> str:
    """This host as it stands in names of temporaries; containers that share a name differ."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"
    with suppress(OSError):  # Linux: processes of one space can see each other
        return f"{name}_{Path('/proc/self/ns/pid').stat().st_ino:x}"
    return name


def hidden(path: Path, suffix: str) -> Path:
    """A hidden file or folder beside `path` that belongs to it, the same one every time."""
    name = f".{path.name}{suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{suffix}"
    return path.with_name(name)


def check_name(path: Path) -> None:
    """Raise `InputError` where no file of this name can be made."""
    size = len(os.fsencode(path.name))
    if size > LONGEST_NAME:
        raise InputError(
            f"{path}: the name has {size} bytes and file systems take {LONGEST_NAME}; "
            "rename the scene it is made of"
        )


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else takes, with its suffix: drivers look at it."""
    token = secrets.token_hex(4)
    partial = path.with_name(f".kelp-{host()}-{os.getpid()}-{token}.partial{path.suffix}")
    _in_use.add(partial.name)
    try:
        yield partial
    finally:
        _in_use.discard(partial.name)


@contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the final name only when the block succeeds.

    The temporary keeps the suffix (drivers look at it) and starts with a dot, so that no
    folder scan picks it up. A failure or Ctrl-C removes it; after `kill -9` it stays behind
    under its own name until `discard_partials`.
    Without `sync` a power cut may leave the file empty: for writers of thousands of files, who
    flush them all at once before they write what makes the files count.
    """
    with _temporary(path) as partial:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if sync:
                with partial.open("rb+") as written:
                    os.fsync(written.fileno())
            partial.replace(path)
            if sync:
                _sync_folder(path.parent)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{path}: cannot be written ({reason}); use a shorter name")
    return InputError(
        f"{path}: cannot be written ({reason}); check the folder's permissions and the free space"
    )


def _sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder outlive a power cut, where the system can."""
    with suppress(OSError):  # Windows opens no folder; some file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder` that is gone when the block ends, however it does.

    After `kill -9` it stays behind until `discard_partials`.
    """
    with _temporary(folder / "scratch") as scratch:
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def discard_partials(folder: Path) -> None:
    """Remove what killed processes left of temporaries in a folder.

    What another living process of this host writes stays; so does what other hosts have written
    to within a day, as nobody here can tell whether its writer lives.
    """
    for path in folder.glob(".*.partial*"):
        writer = re.match(r"\.kelp-(\w+)-(\d+)-[0-9a-f]+\.partial", path.name)
        with suppress(OSError):
            if writer and writer[1] == host():
                if path.name in _in_use or _is_another(int(writer[2])):
                    continue
            elif time.time() - path.stat().st_mtime < _ABANDONED:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_another(process: int) -> bool:
    """Whether this is the number of another process of this machine that lives."""
    import psutil  # only where something was left behind

    return process != os.getpid() and psutil.pid_exists(process)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`atomic` for a folder: a new, empty one that becomes `path` when the block succeeds.

    A folder cannot be replaced in one step: for an instant there is none under the name, never
    an incomplete one. What stops there leaves the older one to `recover_folder`.
    """
    recover_folder(path)
    with _temporary(path.with_name("folder")) as partial:
        output_folder(partial)
        discard_partials(path.parent)
        try:
            yield partial
            _sync_tree(partial)
            with locked(hidden(path, ".lock"), wait=True):
                shutil.rmtree(_older(path), ignore_errors=True)
                _replace_folder(partial, path)
                _sync_folder(path.parent)
                shutil.rmtree(_older(path), ignore_errors=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            recover_folder(path)
            shutil.rmtree(partial, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Make sure that the content of a folder outlives a power cut."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
            continue
        with path.open("rb+") as written:
            os.fsync(written.fileno())
    _sync_folder(folder)


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
    return hidden(path, ".old")


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


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file atomically; `sync`: see `atomic`."""
    with atomic(path, sync) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises `ValueError` where it is none, also for absurd nesting."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_text(value: Any) -> str:
    """`value` as indented JSON. NaN and Infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and Infinity are refused."""
    write_text(path, json_text(value))


def open_locked(path: Path, wait: bool = False) -> IO[bytes]:
    """Open a file for this process alone, until it is closed. A killed process holds no lock.

    While another process holds it: wait until it is free, or raise `BlockingIOError`. The lock is
    on the file itself (`flock`): whoever has the rows has the lock, and nothing is left behind.
    Windows, and file systems without such locks, get a lock file beside it
    (`filelock.SoftFileLock`), which a killed process of this host no longer holds, but one of
    another host does.
    """
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a+b"))
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ModuleNotFoundError:  # Windows
                return _open_beside_lock(path, wait)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return _open_beside_lock(path, wait)
            with suppress(FileNotFoundError):  # else another process removed it just now
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    stack.pop_all()
                    return file


class _Beside(io.BufferedRandom):
    """A file whose lock is another file, released when this one is closed."""

    lock: Any = None

    def close(self) -> None:
        super().close()
        if self.lock is not None:
            self.lock.release()


def _open_beside_lock(path: Path, wait: bool) -> IO[bytes]:
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(hidden(path, ".lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BlockingIOError(errno.EWOULDBLOCK, f"{lock.lock_file} is held") from None
    file = _Beside(io.FileIO(path, "a+"))
    file.lock = lock
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
    """Create `path` if needed and make sure that files can be written into it.

    What killed processes left there of temporaries goes (`discard_partials`).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: the output folder cannot be created ({error.strerror}); choose another one"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the output folder is not writable; choose another one")
    discard_partials(path)
    return path


def is_file(path: Path) -> bool:
    """Whether there is a file; no, where no file can have that name: it may come from a table."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def input_folder(path: Path, pattern: str = "*", rasters: bool = False) -> list[Path]:
    """Files of a folder that match `pattern`, sorted by name; hidden files are left out.

    What looks like one of them and is not used is named in one line of notice: broken links,
    folders and pipes under such names, and, where all `rasters` should match, those that do not.

    Raises `InputError` when the folder is missing or holds no such file.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; check the path")
    found: list[Path] = []
    unused: list[str] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        is_raster = entry.name.lower().endswith(RASTERS)
        matches = fnmatch(entry.name, pattern)
        if matches and entry.is_file():
            found.append(entry)
        elif matches and (is_raster or pattern != "*"):
            unused.append(f"{entry.name} ({kind_of(entry)})")
        elif rasters and is_raster:
            unused.append(entry.name)
    report_unused(path, unused)
    if not found:
        raise InputError(f"{path}: the folder holds no {pattern} file")
    return found


def report_unused(folder: object, names: Sequence[str]) -> None:
    """One line of notice that names what lies in a folder and is not used, the first three."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning("%s: not used: %s%s", folder, ", ".join(names[:3]), more)


def kind_of(entry: Path) -> str:
    """What an entry is that is no file."""
    if entry.is_dir():
        return "a folder"
    return "a broken link" if entry.is_symlink() else "no regular file"


def amount(size: int) -> str:
    """A number of bytes to read, rounded up: 1.54 GB."""
    for unit, parts, name in ((10**9, 100, "GB"), (10**6, 10, "MB")):
        if size >= unit:
            return f"{-(-size * parts // unit) / parts:g} {name}"
    return f"{-(-size // 1000)} kB"
