"""`kelp predict`: bundles and a folder of scenes in, masks and probabilities out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import kelp
from kelp import manifest
from kelp.config import PredictConfig
from kelp.errors import InputError, KelpError
from kelp.files import discard_partials, input_folder, output_folder
from kelp.grid import TileGrid
from kelp.nn.bundle import Bundle, load_bundle
from kelp.nn.device import resolve_device, resolve_precision
from kelp.nn.inference.arrays import joint_threshold, tile_shape
from kelp.nn.inference.checks import check_scale, check_statistics, needed_bands
from kelp.nn.inference.engine import Engine, Slicing
from kelp.nn.inference.network import Network
from kelp.nn.inference.outputs import Outputs, probability_path
from kelp.preview import write_previews
from kelp.progress import Progress, silent
from kelp.raster import read_tags
from kelp.scene import Scene
from kelp.submission import ARCHIVE, write_submission

log = logging.getLogger("kelp")

_FINGERPRINT: Final = "KELP_FINGERPRINT"


@dataclass(frozen=True)
class PredictResult:
    """What a prediction wrote and what it cost."""

    masks: tuple[Path, ...]
    probabilities: tuple[Path, ...]
    submission: Path | None
    previews: tuple[Path, ...]
    made: int
    """Scenes predicted now."""
    skipped: int
    """Scenes that were already finished."""
    tiles: int
    """Tiles that the network saw."""

    def summary(self) -> str:
        """One line for the terminal."""
        extra = f"; submission in {self.submission}" if self.submission else ""
        return (
            f"{self.made} scenes predicted ({self.tiles} tiles), {self.skipped} already finished; "
            f"masks in {self.masks[0].parent}{extra}"
        )


def predict_scenes(config: PredictConfig, progress: Progress = silent) -> PredictResult:
    """Predict every scene of a folder (or one file); see `PredictConfig`.

    Raises:
        KelpError: bad input. Of several scenes the good ones are done before bad ones are named.
    """
    scenes = _find_scenes(config.data_dir)
    bundles = [load_bundle(path, config.use_checkpoint) for path in config.run_dir]
    if config.dataset_stats_dir:
        for bundle in bundles:
            check_statistics(bundle.spec, config.dataset_stats_dir)
    discard_partials(output_folder(config.output_dir))
    run = _Run(config, bundles)
    outputs = {path: config.output_dir / manifest.output_name(path) for path in scenes}
    failures, todo = run.plan(outputs)
    failures |= run.predict(todo, progress)
    run.record(config.output_dir)
    if failures:
        named = "; ".join(failures.values())
        raise InputError(
            f"{len(failures)} of {len(scenes)} scenes failed, the rest is done: {named}"
        )
    masks = tuple(outputs.values())
    submission = None
    previews: list[Path] = []
    if config.submission or config.preview_submission:
        archive = config.output_dir / ARCHIVE
        submission = write_submission(masks, archive, progress).path
    if config.preview_submission:
        previews = write_previews(
            scenes,
            config.output_dir,
            output_folder(config.output_dir / "previews"),
            config.preview_first_n,
            config.band_order,
            progress,
        )
    return PredictResult(
        masks=masks,
        probabilities=tuple(map(probability_path, masks)) if config.save_probabilities else (),
        submission=submission,
        previews=tuple(previews),
        made=len(todo),
        skipped=len(scenes) - len(todo),
        tiles=run.engine.counts.predicted,
    )


class _Run:
    """The engine, set up for one configuration and applied to scenes."""

    def __init__(self, config: PredictConfig, bundles: Sequence[Bundle]) -> None:
        self.config = config
        self.bundles = bundles
        self.threshold = joint_threshold(bundles, config.decision_threshold)
        self.slicing = _slicing(bundles, config)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        tta = config.tta_merge_mode if config.tta else None
        network = Network(bundles, self.device, self.precision, tta)
        self._total = self._done = 0
        self._progress: Progress = silent
        self.engine = Engine(network, self.slicing, self._advance)

    def record(self, output_dir: Path) -> None:
        """Write down the settings of the run, what was left to kelp resolved."""
        resolved: dict[str, Any] = {
            "decision_threshold": self.threshold,
            "precision": self.precision,
            "device": self.device.type,
        }
        tile, overlap = self.slicing.tile, self.slicing.overlap
        if tile[0] == tile[1]:  # what one number can say
            resolved |= {"sahi_tile_size": tile[0], "sahi_overlap": overlap[0]}
        self.config.model_copy(update=resolved).record(output_dir)

    def plan(self, outputs: dict[Path, Path]) -> tuple[dict[Path, str], dict[Path, Path]]:
        """Check the scenes and leave out the finished ones: (failures, scenes to predict)."""
        failures: dict[Path, str] = {}
        todo: dict[Path, Path] = {}
        for path, output in outputs.items():
            try:
                with Scene(path, self.config.band_order) as scene:
                    for bundle in self.bundles:
                        scene.require(needed_bands(bundle.spec))
                        check_scale(scene, bundle.spec)
                    tiles = len(TileGrid(scene.shape, self.slicing.tile, self.slicing.overlap))
            except KelpError as error:
                failures[path] = str(error)
                continue
            if not self._finished(path, output):
                todo[path] = output
                self._total += tiles
        return failures, todo

    def predict(self, todo: dict[Path, Path], progress: Progress) -> dict[Path, str]:
        """Predict scenes; returns the error of each that failed."""
        self._progress = progress
        failures: dict[Path, str] = {}
        sinks: dict[int, tuple[Path, Outputs]] = {}
        try:
            for path, output in todo.items():
                try:
                    with Scene(path, self.config.band_order) as scene:
                        sink = self._sink(scene, output)
                        sinks[id(sink)] = path, sink
                        self.engine.run(scene, sink)
                except KelpError as error:  # it was readable when the run was planned
                    failures[path] = str(error)
            self.engine.finish()
        finally:
            # Whatever ended this: a failed scene, Ctrl-C, a bug. Closed outputs stay.
            for _, sink in sinks.values():
                sink.abandon()
        return failures | {sinks[id(s)][0]: str(error) for s, error in self.engine.failures}

    def fingerprint(self, path: Path) -> str:
        """SHA-256 of everything that the output of a scene depends on."""
        settings: dict[str, Any] = {
            "versions": [kelp.__version__, torch.__version__],
            "threads": torch.get_num_threads(),
            "bundles": [bundle.spec.model_dump(mode="json") for bundle in self.bundles],
            "slicing": [*self.slicing.tile, *self.slicing.overlap, self.slicing.blend],
            "batch_size": self.slicing.batch_size,
            "qa_as_nodata": self.slicing.qa_as_nodata,
            "skip_land": self.slicing.skip_land,
            "threshold": self.threshold,
            "precision": self.precision,
            "device": self.device.type,
            "tta": self.config.tta_merge_mode if self.config.tta else None,
            "band_order": self.config.band_order,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _finished(self, path: Path, output: Path) -> bool:
        wanted = [output]
        if self.config.save_probabilities:
            wanted.append(probability_path(output))
        if self.config.overwrite or not output.is_file():
            return False
        expected = self.fingerprint(path)
        if all(read_tags(file).get(_FINGERPRINT) == expected for file in wanted):
            return True
        log.info("%s: made with other inputs or settings; making it anew", output)
        return False

    def _sink(self, scene: Scene, output: Path) -> Outputs:
        tags = {_FINGERPRINT: self.fingerprint(scene.path), "KELP_VERSION": kelp.__version__}
        return Outputs.of(
            scene.shape,
            scene.georeference,
            output,
            self.threshold,
            tags,
            self.config.save_probabilities,
        )

    def _advance(self, tiles: int) -> None:
        self._done += tiles
        self._progress("predicting", self._done, self._total)


def _find_scenes(data_dir: Path) -> list[Path]:
    if data_dir.is_file():
        return [data_dir]
    products = (manifest.MASK_SUFFIX, manifest.PROBABILITY_SUFFIX)
    found = [p for p in input_folder(data_dir) if p.suffix.lower() in (".tif", ".tiff")]
    scenes = [p for p in found if not p.name.endswith(products)]
    if not scenes:
        raise InputError(f"{data_dir}: the folder holds no .tif scene")
    names = [manifest.output_name(path) for path in scenes]
    for path, name in zip(scenes, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: another scene of the folder would also become {name}")
    return scenes


def _slicing(bundles: Sequence[Bundle], config: PredictConfig) -> Slicing:
    tile, overlap = tile_shape(bundles, config.sahi_tile_size, config.sahi_overlap)
    return Slicing(
        tile,
        overlap,
        config.blend,
        config.batch_size,
        config.qa_as_nodata,
        config.land == "skip",
    )
