"""Small documents and facts over http(s), with a limit on time and size; files are GDAL's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from kelp.errors import InputError
from kelp.io.location import Url

if TYPE_CHECKING:
    from http.client import HTTPMessage

TIMEOUT: Final = 30.0
"""Seconds that a server may take for an answer."""
LARGEST: Final = 64 << 20
"""Bytes of a document, at most; what comes after is not read."""


def is_http(url: Url) -> bool:
    """Whether a URL is of the web, not of an object store."""
    return str(url).lower().startswith(("http://", "https://"))


def fetch_text(url: Url, timeout: float) -> str:
    """A document (UTF-8). Raises `InputError` where it does not come whole."""
    content, _ = _request(url, {}, timeout)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{_shown(url)}: not text ({error.reason})") from error


def identity_of(url: Url) -> tuple[str, int | None]:
    """What changes when a file's content does, and its size in bytes.

    It asks for one byte: addresses that are signed for reading refuse other questions.
    """
    _, headers = _request(url, {"Range": "bytes=0-0"}, TIMEOUT, most=1)
    total = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    size = int(total[1]) if total else None
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    return f"{tag} {size}".strip(), size


def _request(
    url: Url, headers: Mapping[str, str], timeout: float, most: int = LARGEST
) -> tuple[bytes, HTTPMessage]:
    # Scenes on this machine start without the web.
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        request = Request(str(url), headers={"User-Agent": "kelp-slicer", **headers})
        with urlopen(request, timeout=timeout) as answer:
            return answer.read(most), answer.headers
    except HTTPError as error:
        reason = "no such file; check the URL" if error.code == 404 else f"{error.reason}"
        raise InputError(f"{_shown(url)}: HTTP {error.code}, {reason}") from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise InputError(
            f"{_shown(url)}: the server does not answer ({reason}); check the URL and the network"
        ) from error


def _shown(url: Url) -> str:
    """The address without its query, where signatures stand."""
    return str(url).partition("?")[0]
