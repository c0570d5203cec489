"""What the record of a map says of its pixels, counted as they are written."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kelp.config import PredictConfig
from kelp.errors import InputError
from kelp.inference.guard import GuardLimits, check
from kelp.raster.area import GroundArea
from kelp.raster.bands import OPTICAL
from kelp.raster.masks import Georeference
from kelp.raster.water import WaterReference
from kelp.raster.window import Shape, Tile
from kelp.sensors import SensorScene, open_scene
from kelp.sensors.aoi import Polygons
from kelp.sensors.record import MapRecord, WaterFacts
from kelp.sensors.rules import Rules

_COLUMNS: Final = ("observed", "kelp", "presence", "expected", "certainty")
_AT_ONCE: Final = 500_000
"""Pixels counted at a time: they take eight times the memory of a float32."""


class Figures:
    """Counts and areas of each row of a map; rows may come in any portions, to the same end.

    Args:
        path: of the map, which errors name.
        shape: of the scene.
        georeference: where it lies, for areas.
        threshold: kelp where p is at least this.
    """

    def __init__(
        self, path: Path, shape: Shape, georeference: Georeference, threshold: float
    ) -> None:
        self.threshold = threshold
        self.rows = np.zeros((shape[0], len(_COLUMNS)))
        """Observed pixels, kelp pixels, their area, the sum of p x area (m2), p of kelp pixels."""
        self._shape = shape
        self._area = GroundArea.of_file(path, georeference, shape)

    def add(self, y: int, p: NDArray[np.float32]) -> None:
        """Count rows `(n, width)` of probabilities, NaN = not observed, from row `y` on."""
        step = max(1, _AT_ONCE // self._shape[1])
        for first in range(0, len(p), step):
            self._add(y + first, p[first : first + step])

    def _add(self, y: int, p: NDArray[np.float32]) -> None:
        seen = np.isfinite(p)
        if not seen.any():  # most of a scene, where an area of interest is small
            return
        kelp = p >= self.threshold
        areas = self._area.pixels(Tile(y, 0, len(p), self._shape[1]))
        known = np.where(seen, p, 0).astype(np.float64)
        rows = self.rows[y : y + len(p)]
        rows[:, 0], rows[:, 1] = seen.sum(axis=1), kelp.sum(axis=1)
        rows[:, 2], rows[:, 3] = (kelp * areas).sum(axis=1), (known * areas).sum(axis=1)
        rows[:, 4] = (known * kelp).sum(axis=1)

    def complete(
        self,
        record: MapRecord,
        rules: Rules | None,
        calibrated: bool,
        limits: GuardLimits | None = None,
    ) -> MapRecord:
        """The record with its figures.

        Args:
            record: what was known before.
            rules: what they took away.
            calibrated: whether probabilities are calibrated; else there is no expected area.
            limits: what the network's maps look like elsewhere.
        """
        observed, kelp, presence, expected, certainty = (math.fsum(c) for c in self.rows.T)
        return record.model_copy(
            update={
                "threshold": self.threshold,
                "observed_share": observed / (self._shape[0] * self._shape[1]),
                "kelp_pixels": int(kelp),
                # Millimetres: the last bits of a sum say nothing.
                "presence_area_m2": round(presence, 6),
                "expected_area_m2": round(expected, 6) if calibrated else None,
                "excluded": rules.removed("excluded") if rules else None,
                "land": rules.removed("land") if rules else None,
                "guard": check(
                    int(observed), int(kelp), certainty / max(kelp, 1), record.water, limits
                ),
            }
        )


def water_of(reference: WaterReference) -> WaterFacts:
    """What a record says of a scene's clear water."""
    levels = zip(OPTICAL, *reference.extremes(), strict=False)
    return WaterFacts(
        read_share=reference.read_share,
        levels={band: (round(low, 1), round(high, 1)) for band, low, high in levels},
        clear_pixels=int(reference.clear.sum()),
        fallback=reference.fallback,
    )


def rules_of(config: PredictConfig, scene: SensorScene, threshold: float) -> Rules | None:
    """What is no kelp by rule in a scene; None = nothing.

    Args:
        config: the options.
        scene: the scene, for its grid.
        threshold: kelp where p is at least this.

    Raises:
        InputError: `--land zero` without elevation, or polygons that cannot be read.
    """
    place, stack = scene.georeference, ExitStack()
    excluded = elevation = None
    if config.exclude:
        excluded = Polygons(
            config.exclude, scene.shape, place.crs, place.transform, "--exclude", False
        )
    if config.land == "zero":
        check_elevation(scene)
        if (warped := scene.share_elevation()) is not None:
            stack.callback(warped.close)
            elevation = warped.read
        else:  # opened once more: rules work in another thread than the one that reads the scene
            elevation = stack.enter_context(open_scene(scene.path, config)).read_elevation
    if excluded is None and elevation is None:
        return None
    return Rules(scene.shape, threshold, excluded, elevation, config.land_tolerance, stack.close)


def check_elevation(scene: SensorScene) -> None:
    """Raise `InputError` where a scene has no elevation, which `--land zero` goes by."""
    if "DEM" not in scene.present:
        raise InputError(f"{scene.path}: has no elevation for --land zero; give --dem")
