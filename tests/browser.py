"""Chromium, for tests that look at pages as a reader does."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "chromium")
# Where changes are accepted (see .ci/run) a missing browser is a failure, not a skip.
needs_browser = pytest.mark.skipif(
    shutil.which(BROWSER) is None and "CI" not in os.environ,
    reason="needs Chromium",
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


def look(page, *flags):
    """What a page's probe found (`data-found` of its root), and what the browser said meanwhile."""
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={page.parent / 'profile'}",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(match[1])), console


def look_on_phone(page):
    """The same in a frame of 360 px: headless windows are at least 500 px wide."""
    frame = page.with_name("phone.html")
    frame.write_text(
        f'<iframe id="f" width="360" height="800" src="{page.name}"></iframe><script>'
        'addEventListener("load", () => setTimeout(() => {'
        "const inner = document.getElementById('f').contentDocument.documentElement;"
        'document.documentElement.setAttribute("data-found", inner.dataset.found); }, 0));</script>'
    )
    return look(frame, "--window-size=800,900", "--allow-file-access-from-files")[0]
