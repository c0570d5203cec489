"""Which scenes are to be predicted, and whether they can be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kelp.config import PredictConfig
from kelp.config.scenes import SceneOptions
from kelp.inference.checks import check_scale, needed_bands
from kelp.inference.plan import SMALLEST_CACHE
from kelp.inference.records import check_elevation
from kelp.inference.spec import BundleSpec
from kelp.io.failures import Failure
from kelp.io.files import check_name
from kelp.io.location import Url
from kelp.raster.masks import Georeference, decoding
from kelp.raster.scene import SceneSize
from kelp.sensors import is_item, open_scene
from kelp.sensors.record import MapRecord

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class Task:
    """A scene that can be predicted."""

    path: Path | Url
    output: Path | Url
    """Its mask."""
    size: SceneSize
    georeference: Georeference
    reading: dict[str, object]
    """How its stored values are understood."""
    digest: str
    """SHA-256 of the files, or of what a store knows their content by."""
    record: MapRecord
    """What is known of its map before it is made."""

    @property
    def fetched(self) -> bool:
        """Whether it is copied from a store before it is read; items are read where they lie."""
        return isinstance(self.path, Url) and not is_item(self.path)

    @property
    def staged(self) -> bool:
        """Whether it is copied from a store, or its maps are put into one."""
        return self.fetched or isinstance(self.output, Url)


def survey(
    outputs: Mapping[Path | Url, Path | Url], options: SceneOptions, specs: Sequence[BundleSpec]
) -> tuple[list[Task], dict[Path | Url, Failure]]:
    """Open and check scenes before the first is predicted.

    Args:
        outputs: the mask of each scene.
        options: how they are read.
        specs: the bundles that will see them.

    Returns:
        The good ones, and what is wrong with each bad one.
    """
    return sorted_out(outputs, (survey_one(options, specs, pair) for pair in outputs.items()))


def survey_one(
    options: SceneOptions, specs: Sequence[BundleSpec], pair: tuple[Path | Url, Path | Url]
) -> Task | Failure:
    """Open and check one scene, given with its mask; what is wrong with it, where it is bad.

    Of a scene of a store only the header is seen; its values are checked when it is fetched.
    """
    path, output = pair
    try:
        if isinstance(output, Path):
            check_name(output)
        with decoding(SMALLEST_CACHE), open_scene(path, options) as scene:
            if isinstance(options, PredictConfig) and options.land == "zero":
                check_elevation(scene)
            for spec in specs:
                scene.require(needed_bands(spec))
            if isinstance(path, Path):
                check_scale(scene, specs, str(path))
            if not scene.known.network_validated:
                words = "%s: no network of kelp was validated on %s; the record says so"
                log.warning(words, path, scene.known.sensor)
            record = MapRecord(
                scene=scene.facts, grid=scene.grid, dem=scene.elevation, aoi=scene.area_facts
            )
            return Task(
                path, output, scene.size, scene.georeference, scene.reading, scene.digest, record
            )
    except Exception as error:  # noqa: BLE001  # also a bug ends its scene only
        return Failure.of(path, error)


def sorted_out(
    outputs: Iterable[Path | Url], surveyed: Iterable[Task | Failure]
) -> tuple[list[Task], dict[Path | Url, Failure]]:
    """The good scenes, and what is wrong with each bad one."""
    tasks: list[Task] = []
    failures: dict[Path | Url, Failure] = {}
    for path, found in zip(outputs, surveyed, strict=True):
        if isinstance(found, Task):
            tasks.append(found)
        else:
            failures[path] = found
    return tasks, failures
