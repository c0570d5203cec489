"""Where files lie: a local path, or the URL of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from kelp.errors import InputError


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
        raise InputError(f"{place}: a local path is wanted here; only kelp predict takes URLs")
    return place


Location = Annotated[
    Path | Url, PlainValidator(locate), PlainSerializer(str, return_type=str, when_used="json")
]
"""Type of an option that takes both."""
