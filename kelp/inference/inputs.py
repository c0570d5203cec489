"""Which scenes are to be predicted, and whether they can be."""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from kelp import tables
from kelp.errors import InputError, KelpError
from kelp.inference.checks import check_scale, needed_bands
from kelp.inference.plan import SMALLEST_CACHE
from kelp.inference.spec import BundleSpec
from kelp.io import remote
from kelp.io.files import RASTERS, check_name, input_folder, report_unused
from kelp.io.location import Url, locate
from kelp.raster.masks import Georeference, decoding
from kelp.raster.scene import Scene, SceneSize


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
    """SHA-256 of the file, or of what a store knows its content by."""

    @property
    def staged(self) -> bool:
        """Whether it is of a store, or for one."""
        return isinstance(self.path, Url) or isinstance(self.output, Url)


@dataclass(frozen=True)
class Failure:
    """Why a scene has no map."""

    message: str
    """One line that names it."""
    traceback: str = ""
    """Of a bug; empty where the user can mend it."""

    @classmethod
    def of(cls, path: Path | Url, error: Exception) -> Self:
        """What an error says of a scene."""
        if isinstance(error, KelpError):
            return cls(error.message)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls(f"{path}: a bug ({text})", "".join(traceback.format_exception(error)))


_SIDECARS: Final = (".aux.xml", ".msk", ".ovr")
"""Ends of names of files that GDAL reads beside rasters."""


def find_scenes(data: Path | Url) -> list[Path | Url]:
    """The scenes of a folder, of a list, or the one that is named."""
    found = remote.objects_at(data) if isinstance(data, Url) else _files_at(data)
    if found == [data] and data.suffix.lower() != ".txt":
        return [data]
    scenes: list[Path | Url]
    if found == [data]:
        lines = [line.strip() for line in remote.read_text(data).splitlines()]
        scenes = [locate(line) for line in lines if line]
    else:
        products = (tables.MASK_SUFFIX, tables.PROBABILITY_SUFFIX, tables.SPREAD_SUFFIX)
        others = [p.name for p in found if not p.name.lower().endswith((*RASTERS, *_SIDECARS))]
        report_unused(data, others)
        found = [p for p in found if p.suffix.lower() in RASTERS]
        scenes = [p for p in found if not p.name.endswith(products)]
    if not scenes:
        raise InputError(f"{data}: holds no scene ({', '.join(RASTERS)})")
    names = [tables.output_name(path) for path in scenes]
    times = Counter(names)
    for path, name in zip(scenes, names, strict=True):
        if times[name] > 1:
            raise InputError(f"{path}: another of these scenes would also become {name}")
    return scenes


def _files_at(data: Path) -> list[Path | Url]:
    return [data] if data.is_file() else list(input_folder(data))


def digest_of(place: Path | remote.Found) -> str:
    """Stands for the content of a file, or of an object as it was found.

    What a store knows an object by is told without fetching it, but is not the content's SHA-256:
    maps of a store's scene differ from those of the same local file in the tag made of this.
    """
    if isinstance(place, remote.Found):
        return hashlib.sha256(place.identity.encode()).hexdigest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def survey(
    outputs: Mapping[Path | Url, Path | Url], band_order: Sequence[str], specs: Sequence[BundleSpec]
) -> tuple[list[Task], dict[Path | Url, Failure]]:
    """Open and check scenes before the first is predicted.

    Args:
        outputs: the mask of each scene.
        band_order: names of the files' bands, where they do not tell.
        specs: the bundles that will see them.

    Returns:
        The good ones, and what is wrong with each bad one.
    """
    return sorted_out(outputs, (survey_one(band_order, specs, pair) for pair in outputs.items()))


def survey_one(
    band_order: Sequence[str], specs: Sequence[BundleSpec], pair: tuple[Path | Url, Path | Url]
) -> Task | Failure:
    """Open and check one scene, given with its mask; what is wrong with it, where it is bad.

    Of a scene of a store only the header is seen; its values are checked when it is fetched.
    """
    path, output = pair
    try:
        if isinstance(output, Path):
            check_name(output)
        with decoding(SMALLEST_CACHE), Scene(path, band_order) as scene:
            for spec in specs:
                scene.require(needed_bands(spec))
            if isinstance(path, Path):
                check_scale(scene, specs, str(path))
            size, place, reading = scene.size, scene.georeference, scene.reading
        digest = digest_of(remote.look(path) if isinstance(path, Url) else path)
    except Exception as error:  # noqa: BLE001  # also a bug ends its scene only
        return Failure.of(path, error)
    return Task(path, output, size, place, reading, digest)


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
