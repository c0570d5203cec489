"""What a comparison found: figures of every way, with intervals, and differences between ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from kelp.evaluation.confusion import PATCH_SIZES
from kelp.nn.comparison.sums import BINS, FIGURES, OPEN_WATER, Array, Draws, Sums, interval
from kelp.nn.comparison.ways import Way


@dataclass(frozen=True)
class Estimate:
    """A figure and the middle 95 % of its bootstrap draws; `None` where undefined."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: Array, draws: Array) -> Estimate:
        """From the figure itself and its draws."""
        known = bool(np.isfinite(value))
        bounds = interval(draws) if known else None
        return cls(float(value) if known else None, *(bounds or (None, None)))

    def times(self, unit: float) -> Estimate:
        """In another unit."""
        parts = (self.value, self.low, self.high)
        return Estimate(*(None if part is None else part * unit for part in parts))

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, float | None]:
        """By name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Judged:
    """A way and what it made of the scenes."""

    way: Way
    thresholds: tuple[float, ...]
    """Kelp where p is at least this: one for each part of the places."""
    by_image: tuple[Sums, ...]
    seconds: float
    """Of an image, the median."""
    network_pixels: float
    """Of an image, the mean."""
    multiplier: float
    """Network pixels for each scene pixel."""

    @cached_property
    def total(self) -> Sums:
        """Of all images."""
        return Sums(np.sum([sums.values for sums in self.by_image], axis=0))

    def reliability(self) -> list[dict[str, float | None]]:
        """Of each tenth of the probabilities: pixels, their mean probability, share of kelp."""
        rows = []
        for k in range(BINS):
            pixels, p, kelp = (float(self.total[f"bin_{n}_{k}"]) for n in ("pixels", "p", "kelp"))
            rows.append(
                {
                    "pixels": pixels,
                    "mean_probability": p / pixels if pixels else None,
                    "kelp_share": kelp / pixels if pixels else None,
                }
            )
        return rows


AT_EQUAL_PRECISION: Final = (
    "precision",
    "recall",
    *(f"recall_{size}_px" for size in PATCH_SIZES),
    OPEN_WATER,
)
"""The figures that tell of a way at thresholds of equal precision."""

_NOTHING: Final = Estimate(None, None, None)


@dataclass(frozen=True)
class Comparison:
    """All ways on the same scenes. The draws of places are the same for each: paired.

    Attributes:
        judged: the ways, in the order they were run.
        places: the place of each image, numbered from 0.
        draws: bootstrap draws of the places.
        equal: the ways that reach the reference's precision, at thresholds where they do.
    """

    judged: tuple[Judged, ...]
    places: Sequence[int]
    draws: Draws
    equal: Comparison | None = None

    @cached_property
    def _drawn(self) -> dict[str, Sums]:
        count = max(self.places) + 1
        drawn = {}
        for one in self.judged:
            by_place = np.zeros((count, len(one.total.values)))
            np.add.at(by_place, list(self.places), [sums.values for sums in one.by_image])
            drawn[one.way.name] = self.draws.of(Sums(by_place))
        return drawn

    def figure(self, one: Judged, name: str) -> Estimate:
        """A figure of a way."""
        function = FIGURES[name]
        return Estimate.of(function(one.total), function(self._drawn[one.way.name]))

    def difference(self, one: Judged, other: Judged, name: str = "pooled_dice") -> Estimate:
        """A figure of a way less that of another, on the same draws."""
        if one is other:
            return _NOTHING
        function = FIGURES[name]
        drawn = [function(self._drawn[way.way.name]) for way in (one, other)]
        return Estimate.of(function(one.total) - function(other.total), drawn[0] - drawn[1])

    def best(self, kinds: Sequence[str], sahi: bool | None = None) -> Judged | None:
        """The way of these kinds with the highest pooled Dice.

        Of a bundle's sliced ways only the first counts: the best of many would owe some of its
        lead to chance. With `sahi` only networks count that were trained on tiles (True) or on
        whole images (False); a pixel-wise model is neither.
        """
        first: dict[object, Judged] = {}
        for one in self.judged:
            spec = one.way.bundle.spec
            trained = None if spec.is_pixelwise else spec.sahi
            if one.way.kind in kinds and sahi in (None, trained):
                first.setdefault((one.way.bundle.path, one.way.kind), one)
        known = [one for one in first.values() if self.figure(one, "pooled_dice").value is not None]
        return max(known, key=lambda one: self.figure(one, "pooled_dice").value or 0, default=None)

    def named(self, way: Way) -> Judged | None:
        """What it made of the scenes; `None` where it is not among these."""
        return next((one for one in self.judged if one.way.name == way.name), None)

    def to_json(self, baseline: Judged | None) -> list[dict[str, Any]]:
        """Every way with its figures; differences are to `baseline`."""
        rows = []
        for one in self.judged:
            way = one.way
            rows.append(
                {
                    "name": way.name,
                    "kind": way.kind,
                    "bundle": str(way.bundle.path),
                    "tile": way.tile,
                    "overlap": way.overlap if way.tile else None,
                    "blend": way.blend if way.kind == "sliced" else None,
                    "tta": way.tta,
                    "interpolation": way.bundle.spec.interpolation,
                    "scale": way.scale,
                    "thresholds": list(one.thresholds),
                    "seconds_per_image": one.seconds,
                    "network_pixels_per_image": one.network_pixels,
                    "network_pixels_per_scene_pixel": one.multiplier,
                    "figures": self._figures(one, tuple(FIGURES), baseline),
                    "at_equal_precision": self.equal and self.equal._row(way, baseline),
                    "reliability": one.reliability(),
                }
            )
        return rows

    def _row(self, way: Way, baseline: Judged | None) -> dict[str, Any] | None:
        one = self.named(way)
        if one is None or baseline is None:
            return None
        figures = self._figures(one, AT_EQUAL_PRECISION, self.named(baseline.way))
        return {"thresholds": list(one.thresholds), "figures": figures}

    def _figures(
        self, one: Judged, names: Sequence[str], baseline: Judged | None
    ) -> dict[str, dict[str, Any]]:
        figures = {}
        for name in names:
            figures[name] = dict[str, Any](self.figure(one, name).to_json())
            if baseline:
                figures[name]["difference"] = self.difference(one, baseline, name).to_json()
        return figures
