"""What a comparison found: figures of every variant with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kelp.evaluation.bootstrap import Estimate
from kelp.evaluation.confusion import PATCH_SIZES
from kelp.evaluation.metrics import FIGURES, OPEN_WATER, SiteTotals
from kelp.nn.comparison.variants import Variant

AT_EQUAL_PRECISION: Final = (
    "precision",
    "recall",
    *(f"recall_{size}_px" for size in PATCH_SIZES),
    OPEN_WATER,
)
"""The figures of a variant at thresholds of equal precision."""


@dataclass(frozen=True)
class Evaluation:
    """A variant and how it does on the scenes."""

    variant: Variant
    thresholds: tuple[float, ...]
    """Kelp where p is at least this: one for each part of the sites."""
    totals: SiteTotals
    seconds: float
    """Of an image, the median."""
    network_pixels: float
    """Of an image, the mean."""
    multiplier: float
    """Network pixels for each scene pixel."""

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.variant.name

    def figure(self, name: str) -> Estimate:
        """A figure with its interval."""
        return self.totals.figure(name)

    def difference(self, other: Evaluation | None, name: str = "pooled_dice") -> Estimate:
        """A figure less that of another variant, on the same draws; undefined to itself."""
        if other is None or self is other:
            return Estimate()
        return self.totals.difference(other.totals, name)


@dataclass(frozen=True)
class Comparison:
    """All variants on the same scenes. The draws of sites are the same for each: paired.

    Attributes:
        evaluations: of the variants, in the order they were run.
        images: number of scenes.
        sites: number of sites.
        area: where the areas come from, in words.
        equal: those that reach the reference's precision, at thresholds where they do.
    """

    evaluations: tuple[Evaluation, ...]
    images: int
    sites: int
    area: str
    equal: tuple[Evaluation, ...] = ()

    def of_kinds(self, kinds: Sequence[str], sahi: bool | None = None) -> list[Evaluation]:
        """The first variant of each of these kinds of each network.

        Of a network's sliced variants only the first counts: the best of many would owe some of
        its lead to chance. With `sahi` only networks count that were trained on tiles (True) or
        on whole images (False); a pixel-wise model is neither.
        """
        first: dict[object, Evaluation] = {}
        for one in self.evaluations:
            spec = one.variant.bundle.spec
            trained = None if spec.is_pixelwise else spec.sahi
            if one.variant.kind in kinds and sahi in (None, trained):
                first.setdefault((one.variant.bundle.path, one.variant.kind), one)
        return list(first.values())

    def best(self, kinds: Sequence[str], sahi: bool | None = None) -> Evaluation | None:
        """The variant of these kinds with the highest pooled Dice; see `of_kinds`."""

        def score(one: Evaluation) -> float:
            return one.figure("pooled_dice").value or 0

        known = self.of_kinds(kinds, sahi)
        known = [one for one in known if one.figure("pooled_dice").value is not None]
        return max(known, key=score, default=None)

    def equal_to(self, one: Evaluation) -> Evaluation | None:
        """The same variant at equal precision; `None` where it never is as precise."""
        return next((other for other in self.equal if other.name == one.name), None)

    def to_json(self, baseline: Evaluation | None) -> list[dict[str, Any]]:
        """Every variant with its figures; differences are to `baseline`."""
        rows = []
        for one in self.evaluations:
            variant = one.variant
            rows.append(
                {
                    "name": variant.name,
                    "kind": variant.kind,
                    "bundle": str(variant.bundle.path),
                    "tile": variant.tile,
                    "overlap": variant.overlap if variant.tile else None,
                    "blend": variant.blend if variant.kind == "sliced" else None,
                    "tta": variant.tta,
                    "interpolation": variant.bundle.spec.interpolation,
                    "scale": variant.scale,
                    "thresholds": list(one.thresholds),
                    "seconds_per_image": one.seconds,
                    "network_pixels_per_image": one.network_pixels,
                    "network_pixels_per_scene_pixel": one.multiplier,
                    "figures": _figures(one, tuple(FIGURES), baseline),
                    "at_equal_precision": self._equal_json(one, baseline),
                    "reliability": one.totals.total.reliability.rows(),
                }
            )
        return rows

    def _equal_json(self, one: Evaluation, baseline: Evaluation | None) -> dict[str, Any] | None:
        equal = self.equal_to(one)
        if equal is None or baseline is None:
            return None
        figures = _figures(equal, AT_EQUAL_PRECISION, self.equal_to(baseline))
        return {"thresholds": list(equal.thresholds), "figures": figures}


def _figures(
    one: Evaluation, names: Sequence[str], baseline: Evaluation | None
) -> dict[str, dict[str, Any]]:
    figures = {}
    for name in names:
        figures[name] = dict[str, Any](one.figure(name).to_json())
        if baseline:
            figures[name]["difference"] = one.difference(baseline, name).to_json()
    return figures
