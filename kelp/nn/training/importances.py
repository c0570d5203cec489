"""What each channel is worth to boosted trees: a file of numbers and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kelp.io.files import atomic, write_json
from kelp.plotting.charts import bars

IMPORTANCES: Final = "feature_importances"


def draw_importances(folder: Path, gains: Mapping[str, float]) -> dict[str, float]:
    """Write `feature_importances.json` and `.png`; give the shares, the largest first.

    Args:
        folder: where to.
        gains: of each channel: by how much its splits lowered the training loss.
    """
    total = sum(gains.values()) or 1.0
    ordered = dict(sorted(gains.items(), key=lambda item: -item[1]))
    rows = {name: {"gain": gain, "share": gain / total} for name, gain in ordered.items()}
    write_json(folder / f"{IMPORTANCES}.json", rows)
    shares = {name: row["share"] for name, row in rows.items()}
    png = bars(shares, "Importance of the channels", "share of the gain of all splits")
    with atomic(folder / f"{IMPORTANCES}.png") as partial:
        partial.write_bytes(png)
    return shares
