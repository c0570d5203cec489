"""Which scenes are to be predicted, and whether they can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kelp import manifest
from kelp.errors import InputError, KelpError
from kelp.files import input_folder
from kelp.nn.inference.checks import check_scale, needed_bands
from kelp.nn.inference.plan import SMALLEST_CACHE
from kelp.nn.spec import BundleSpec
from kelp.raster import decoding
from kelp.scene import Scene, SceneSize


@dataclass(frozen=True)
class Task:
    """A scene that can be predicted."""

    path: Path
    output: Path
    """Its mask."""
    size: SceneSize
    reading: dict[str, object]
    """How its stored values are understood."""


def find_scenes(data: Path) -> list[Path]:
    """The scenes of a folder, of a list, or the one that is named."""
    if data.is_file() and data.suffix.lower() != ".txt":
        return [data]
    if data.is_file():
        lines = data.read_text(encoding="utf-8").splitlines()
        scenes = [Path(line.strip()) for line in lines if line.strip()]
    else:
        products = (manifest.MASK_SUFFIX, manifest.PROBABILITY_SUFFIX, manifest.SPREAD_SUFFIX)
        found = [p for p in input_folder(data) if p.suffix.lower() in (".tif", ".tiff")]
        scenes = [p for p in found if not p.name.endswith(products)]
    if not scenes:
        raise InputError(f"{data}: holds no .tif scene")
    names = [manifest.output_name(path) for path in scenes]
    for path, name in zip(scenes, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: another of these scenes would also become {name}")
    return scenes


def survey(
    outputs: Mapping[Path, Path], band_order: Sequence[str], specs: Sequence[BundleSpec]
) -> tuple[list[Task], dict[Path, str]]:
    """Open and check scenes before the first is predicted.

    Args:
        outputs: the mask of each scene.
        band_order: names of the files' bands, where they do not tell.
        specs: the bundles that will see them.

    Returns:
        The good ones, and what is wrong with each bad one.
    """
    tasks: list[Task] = []
    failures: dict[Path, str] = {}
    for path, output in outputs.items():
        try:
            with decoding(SMALLEST_CACHE), Scene(path, band_order) as scene:
                for spec in specs:
                    scene.require(needed_bands(spec))
                    check_scale(scene, spec)
                tasks.append(Task(path, output, scene.size, scene.reading))
        except KelpError as error:
            failures[path] = str(error)
    return tasks, failures
