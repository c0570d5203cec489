"""Object stores (s3, gs, az, ...): the only room that knows `fsspec`.

Nothing is remembered between two calls: what another machine has put into the store is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import rasterio

from kelp.errors import InputError, KelpError
from kelp.io import files
from kelp.io.location import Url

_HEADER: Final = 1 << 16
"""Bytes that are read at a time of a raster whose pixels nobody wants."""


@dataclass(frozen=True)
class Found:
    """An object as it is now."""

    size: int
    """Bytes."""
    identity: str
    """Another one after each change of the content."""


def look(url: Url) -> Found:
    """An object as it is now. Raises `InputError` where there is none, or none to be seen."""
    system, path = _system(url)
    with _speaking(url):
        info = system.info(path)
    # S3 and Azure promise another ETag for other content; elsewhere size and times must do.
    tag = info.get("ETag") or info.get("etag") or sorted((k, str(v)) for k, v in info.items())
    return Found(info["size"], f"{tag} {info['size']}")


def exists(place: Path | Url) -> bool:
    """Whether there is such a file or object. Raises `InputError` where the store cannot tell."""
    if isinstance(place, Path):
        return place.is_file()
    system, path = _system(place)
    with _speaking(place):
        return _is_there(system, path)


def _is_there(system: Any, path: str) -> bool:
    # `exists` of many stores answers no to every error, also where they are out of reach.
    try:
        system.info(path)
    except FileNotFoundError:
        return False
    return True


def objects_at(url: Url) -> list[Url]:
    """The object itself, or those of a folder, sorted by name; hidden ones are left out."""
    system, path = _system(url)
    with _speaking(url):
        if system.info(path)["type"] == "file":
            return [url]
        found = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
    # Some tools mark a folder by an empty object with its name.
    names = sorted(name.rpartition("/")[2] for name in found)
    return [url / name for name in names if name and not name.startswith(".")]


def names_in(url: Url) -> set[str]:
    """Names of the objects of a folder; none where nothing is in it yet."""
    system, path = _system(url)
    with _speaking(url), suppress(FileNotFoundError):
        return {name.rpartition("/")[2] for name in system.ls(path, detail=False)}
    return set()


def open_raster(url: Url) -> Any:
    """Open a raster with rasterio to see its header; what is not looked at is not fetched."""
    system, path = _system(url)

    def opened() -> Any:
        return system.open(path, "rb", block_size=_HEADER)

    with _speaking(url):  # rasterio would not tell why it cannot be opened
        ready = [opened()]

    def serve(asked: str, mode: str = "rb") -> Any:
        if PurePosixPath(asked).name != url.name:  # rasterio's trial; files beside it
            raise FileNotFoundError(asked)
        return ready.pop() if ready else opened()

    return rasterio.open(url.name, opener=serve)


def fetch(url: Url, path: Path, found: Found) -> None:
    """Copy an object into a file. Raises `InputError` unless it came as it was `found`."""
    system, source = _system(url)
    with _speaking(url):
        system.get_file(source, str(path))
    if look(url) != found:
        raise InputError(f"{url}: changed while it was fetched; run the same command again")
    if path.stat().st_size != found.size:
        raise InputError(
            f"{url}: {path.stat().st_size:,} of its {found.size:,} bytes came; the connection "
            "may be bad, run the same command again"
        )


def put(path: Path, url: Url) -> None:
    """Copy a file into the store, where it appears complete or not at all."""
    system, target = _system(url)
    with _speaking(url):
        system.put_file(str(path), target)


def remove(url: Url) -> None:
    """Remove an object, if there is one."""
    system, path = _system(url)
    with _speaking(url):
        if _is_there(system, path):
            system.rm_file(path)


def read_text(place: Path | Url) -> str:
    """The text (UTF-8) of a file or an object."""
    if isinstance(place, Path):
        content = place.read_bytes()
    else:
        system, path = _system(place)
        with _speaking(place):
            content = system.cat_file(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not a text in UTF-8; save it as one") from error


def write_text(place: Path | Url, text: str) -> None:
    """Write `text` (UTF-8) into a file or an object."""
    if isinstance(place, Path):
        files.write_text(place, text)
        return
    system, path = _system(place)
    with _speaking(place):
        system.pipe_file(path, text.encode())


def check_reach(url: Url) -> None:
    """Raise `InputError` where this process cannot speak with a store; nothing need be there."""
    system, path = _system(url)
    with _speaking(url):
        _is_there(system, path)


def _system(url: Url) -> tuple[Any, str]:
    """The file system of a store, and the path in it."""
    with _speaking(url):
        import fsspec

        system, path = fsspec.url_to_fs(str(url), use_listings_cache=False)
    return system, path


@contextmanager
def _speaking(url: Url) -> Iterator[None]:
    """What goes wrong in a store becomes one line. Every store has its own library and errors."""
    try:
        yield
    except (KelpError, TypeError, AttributeError, NameError):  # the latter are bugs
        raise
    except Exception as error:
        raise InputError(f"{url}: {_reason(url, error)}") from error


def _reason(url: Url, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    kind = type(error).__name__
    if isinstance(error, ImportError):
        way = 'pip install "kelp-slicer[cloud]"' if str(url).startswith("s3") else "install it"
        return f"the package for such URLs is missing ({text}); {way}"
    if isinstance(error, FileNotFoundError):
        return "no such object, folder or bucket; check the URL"
    if isinstance(error, PermissionError):
        return f"access denied ({text}); check the credentials and what they allow"
    if "Credentials" in kind:
        return (
            f"no credentials ({text}); give them as the store's own programs want them, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind:
        return f"the store does not answer ({text}); check the network and AWS_ENDPOINT_URL"
    return text
