"""How sure is an area: intervals from the errors that a network made at sites it never saw.

Conformal prediction over whole sites (Lee, Barber and Willett, "Distribution-free inference with
hierarchical data", 2023): scenes of one site are no independent witnesses, so each site has one
vote, shared by its scenes, and a site that was not seen may be worse than all. An interval of 90 %
then holds the truth for at least 90 % of new sites of the same kind, whatever the errors' shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kelp.errors import BundleError
from kelp.io.files import parse_json

OFFSET_M2: Final = 9000.0
"""Errors are compared as log(area + this): large areas by ratio, small ones by difference.

Ten Landsat pixels: of less, a few pixels more or fewer are noise.
"""

FIELD: Final = "held_out_sites"
"""Where `bundle.json` keeps the pairs."""

_PLACES: Final = ("", "artifacts/bundle", "bundle")


class HeldOutSite(BaseModel):
    """Areas of one scene of a site that no fitting saw, over its observed pixels."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    site: str
    scene: str
    truth_m2: float = Field(ge=0)
    presence_m2: float = Field(ge=0)
    expected_m2: float | None = Field(None, ge=0)
    observed_share: float | None = Field(None, ge=0, le=1)
    """Of the labelled pixels."""


@dataclass(frozen=True)
class AreaErrors:
    """Lowest and highest error, on the scale of log(area + 9,000 m2), that an interval allows.

    Attributes:
        low: added to the estimate's logarithm for the lower end.
        high: likewise for the upper end.
        sites: how many sites they come from.
        coverage: share of new sites whose truth the interval holds.
        expected: whether the estimate is the expected area, not the presence area.
    """

    low: float
    high: float
    sites: int
    coverage: float
    expected: bool

    def interval(self, estimate_m2: float) -> tuple[float, float]:
        """Lower and upper end of the area, in square metres, never below 0."""
        middle = float(np.log(estimate_m2 + OFFSET_M2))
        ends = np.exp([middle + self.low, middle + self.high]) - OFFSET_M2
        return max(0.0, float(ends[0])), max(0.0, float(ends[1]))


def sites_needed(coverage: float = 0.9) -> int:
    """The fewest sites that say anything about an interval of this coverage."""
    return int(np.ceil(1 / (1 - coverage) - 1 - 1e-9))


def area_errors(
    pairs: Sequence[HeldOutSite], coverage: float = 0.9, expected: bool = True
) -> AreaErrors | None:
    """What the errors at held-out sites say about areas elsewhere.

    Both ends have errors of their own from 19 sites on (at 90 %); from 9 sites on the largest
    error either way stands for both.

    Args:
        pairs: areas of scenes, true and mapped.
        coverage: share of new sites whose truth the interval is to hold.
        expected: compare expected areas; False: presence areas.

    Returns:
        None where there are fewer than `sites_needed` sites.
    """
    if expected:
        pairs = [pair for pair in pairs if pair.expected_m2 is not None]
    scenes = Counter(pair.site for pair in pairs)
    if len(scenes) < sites_needed(coverage):
        return None
    estimate = [pair.expected_m2 if expected else pair.presence_m2 for pair in pairs]
    truth = np.array([pair.truth_m2 for pair in pairs])
    errors = np.log(truth + OFFSET_M2) - np.log(np.array(estimate, np.float64) + OFFSET_M2)
    # One vote for each site, and one for the site that was not seen.
    votes = np.array([1 / scenes[pair.site] for pair in pairs]) / (len(scenes) + 1)
    miss = 1 - coverage
    high, low = (_reach(sign * errors, votes, 1 - miss / 2) for sign in (1, -1))
    if high is None or low is None:
        both = _reach(np.abs(errors), votes, coverage)
        if both is None:
            return None
        high = low = both
    return AreaErrors(-low, high, len(scenes), coverage, expected)


def _reach(errors: NDArray[np.float64], votes: NDArray[np.float64], share: float) -> float | None:
    """The smallest error that at least `share` of the votes do not exceed; None: infinite."""
    order = np.argsort(errors)
    reached = np.cumsum(votes[order]) >= share - 1e-9
    return float(errors[order][np.argmax(reached)]) if reached.any() else None


@dataclass(frozen=True)
class HeldOut:
    """What a bundle says of its errors: the SHA-256 of its weights, and the pairs."""

    sha256: str | None
    pairs: tuple[HeldOutSite, ...]


def read_description(path: Path) -> tuple[Path, dict[str, Any]]:
    """Find and read `bundle.json`.

    Args:
        path: a bundle, a run folder or its `artifacts/`.

    Raises:
        BundleError: there is no `bundle.json`, or it is damaged.
    """
    for place in _PLACES:
        file = path / place / "bundle.json"
        if not file.is_file():
            continue
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise BundleError(f"{file}: not a readable bundle ({error}); fetch it again") from error
        return file, found
    raise BundleError(f"{path}: holds no bundle.json; name a run folder or a bundle")


def read_held_out(path: Path) -> HeldOut:
    """The pairs of a bundle; none where nothing was fitted.

    Args:
        path: a bundle, a run folder or its `artifacts/`.

    Raises:
        BundleError: there is no `bundle.json`, or it is damaged.
    """
    file, spec = read_description(path)
    try:
        pairs = TypeAdapter(tuple[HeldOutSite, ...]).validate_python(spec.get(FIELD) or ())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise BundleError(f"{file}: not a readable bundle ({reason}); fetch it again") from error
    return HeldOut(spec.get("weights_sha256"), pairs)
