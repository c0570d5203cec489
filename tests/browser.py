"""Chromium, for tests that look at pages as a reader does."""

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "chromium")
# Where changes are accepted (see .ci/run) a missing browser is a failure, not a skip.
needs_browser = pytest.mark.skipif(
    shutil.which(BROWSER) is None and "CI" not in os.environ,
    reason="needs Chromium",
)
