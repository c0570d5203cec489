"""A STAC service and a file server on loopback, as a process of its own.

`python stacserver.py FOLDER` prints its port. Paths: `/files/…` the folder's files, with ranges;
`/signed/…` the same with `?sig=good` only; `/html/…` a web page always; `/api` a STAC API
over the items `FOLDER/items/*.json`, two a page; `/slow` never answers; `/empty` an API without
items.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/ogcapi-features",
    "https://api.stacspec.org/v1.0.0/item-search#query",
]
PAGE = 2


def add_signature(href: str) -> str:
    """What `/signed/` wants."""
    return f"{href}?sig=good&token=secret"


class Handler(BaseHTTPRequestHandler):
    folder = Path()
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        with (self.folder / "requests.log").open("a") as file:
            file.write(f"{self.command} {self.path}\n")

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length))
        (self.folder / "posted.json").write_text(json.dumps(body))
        self.search(body)

    def answer(self) -> None:
        url = urlsplit(self.path)
        root, _, rest = unquote(url.path).lstrip("/").partition("/")
        if root == "slow":
            time.sleep(60)
        elif root == "html":
            self.send(200, b"<html><body>Please log in</body></html>", "text/html")
        elif root in ("api", "empty"):
            if rest.startswith("items/"):
                self.file(self.folder / "items" / f"{rest[6:]}.json")
            elif rest == "search":
                self.search({key: values[0] for key, values in parse_qs(url.query).items()})
            else:
                self.landing(root)
        elif root == "signed" and parse_qs(url.query).get("sig") != ["good"]:
            self.send(403, b"no signature", "text/plain")
        elif root in ("files", "signed"):
            self.file(self.folder / rest)
        else:
            self.send(404, b"not found", "text/plain")

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def landing(self, root: str) -> None:
        here = f"{self.base}/{root}"
        links = [
            {"rel": "self", "href": here, "type": "application/json"},
            {"rel": "root", "href": here, "type": "application/json"},
            {
                "rel": "search",
                "href": f"{here}/search",
                "type": "application/geo+json",
                "method": "POST",
            },
        ]
        self.json(
            {
                "type": "Catalog",
                "id": root,
                "description": "x",
                "stac_version": "1.0.0",
                "conformsTo": CONFORMS,
                "links": links,
            }
        )

    def search(self, body: dict) -> None:
        found = [] if self.path.startswith("/empty") else sorted(self.folder.glob("items/*.json"))
        start = int(body.get("token", 0))
        items = []
        for path in found[start : start + PAGE]:
            item = json.loads(path.read_text())
            href = f"{self.base}/api/items/{path.stem}"
            item["links"] = [{"rel": "self", "href": href, "type": "application/geo+json"}]
            items.append(item)
        links = []
        if start + PAGE < len(found):
            again = {**body, "token": start + PAGE}
            links = [
                {
                    "rel": "next",
                    "href": f"{self.base}/api/search",
                    "method": "POST",
                    "body": again,
                    "type": "application/geo+json",
                }
            ]
        self.json({"type": "FeatureCollection", "features": items, "links": links})

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), "application/json")

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.send(404, b"not found", "text/plain")
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            last = min(last, len(content) - 1)
            self.send(
                206,
                content[first : last + 1],
                "application/octet-stream",
                {"Content-Range": f"bytes {first}-{last}/{len(content)}"},
                path,
            )
        else:
            self.send(200, content, "application/octet-stream", {}, path)

    def send(
        self,
        status: int,
        content: bytes,
        kind: str,
        headers: dict[str, str] | None = None,
        path: Path | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if path:
            self.send_header("ETag", f'"{path.stat().st_size}-{path.stat().st_mtime_ns}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder; gives the address of the server."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    with subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
