"""What the documentation says of refusals is what kelp says."""

from pathlib import Path

import pytest
from refusals import REFUSALS, message

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "refusals.md").read_text("utf-8")


@pytest.mark.parametrize(
    "refusal", [r for some in REFUSALS.values() for r in some], ids=lambda r: r.what
)
def test_the_page_of_refusals_is_true(refusal, tmp_path):
    said = message(refusal, tmp_path)
    assert "\n" not in said
    assert f"**{refusal.what}.** {refusal.why}\n\n```text\n{said}\n```" in PAGE
