"""Where files lie: a local path, the URL of an object store, a network that comes with kelp."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import PlainSerializer, PlainValidator

from kelp.errors import BundleError, InputError

PACKAGED: Final = Path(__file__).parents[1] / "inference" / "networks"
"""Holds a bundle for each network that comes with kelp, under its name."""


@dataclass(frozen=True)
class Url:
    """An object of a store, or a folder of them: `s3://bucket/scenes/X.tif`."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return PurePosixPath(self.text).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.text).stem

    @property
    def suffix(self) -> str:
        """The name's suffix, with its dot."""
        return PurePosixPath(self.text).suffix

    @property
    def parent(self) -> Url:
        """The folder."""
        return Url(self.text.rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        """Another object of the same folder."""
        return self.parent / name


def is_url(value: object) -> bool:
    """Whether this means a store; also a URL that `pathlib.Path` has taken a slash from."""
    # Two letters at least: C:/ is a disk of Windows.
    return isinstance(value, str | Path) and bool(re.match(r"[A-Za-z][\w+.-]+:/", str(value)))


def locate(value: Any) -> Path | Url:
    """A local path, or a URL. Raises `ValueError` for what is neither."""
    if isinstance(value, Url):
        return value
    if not isinstance(value, str | Path):
        raise ValueError("a path or a URL is wanted")
    if not is_url(value):
        return Path(value)
    if "://" not in str(value):
        raise ValueError("a URL has two slashes, as in s3://bucket/folder, and is text, no Path")
    return Url(str(value).rstrip("/"))


def local(place: Path | Url) -> Path:
    """The path of a local file or folder. Raises `InputError` for one of a store."""
    if isinstance(place, Url):
        raise InputError(f"{place}: a local path is wanted here; fetch it first")
    return place


Location = Annotated[
    Path | Url, PlainValidator(locate), PlainSerializer(str, return_type=str, when_used="json")
]
"""Type of an option that takes both."""


def packaged_names() -> list[str]:
    """Names of the networks that come with kelp."""
    if not PACKAGED.is_dir():
        return []
    return sorted(path.name for path in PACKAGED.iterdir() if (path / "bundle.json").is_file())


def packaged(path: Path) -> Path:
    """The bundle of a packaged network, where a path is its name and no file; else the path.

    Raises:
        BundleError: a bare name that is neither a file nor a packaged network.
    """
    if path.exists() or len(path.parts) != 1 or path.suffix:
        return path
    known = packaged_names()
    if path.name in known:
        return PACKAGED / path.name
    raise BundleError(
        f"{path}: no such folder, and no packaged network; name a run folder, a bundle or one of: "
        f"{', '.join(known) or 'none in this installation'} (kelp models)"
    )
