"""`kelp verify`: whether maps are what their records say, by predicting some tiles again.

The tiles that are drawn are an area of interest: the engine runs those that touch it, so that their
merged values are those of the whole scene.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

import kelp
from kelp.config import PredictConfig, VerifyConfig
from kelp.config.base import read_yaml
from kelp.config.scenes import SceneOptions
from kelp.errors import InputError, KelpError
from kelp.inference.bundle import Bundle, load_bundles
from kelp.inference.inputs import Task, survey_one
from kelp.inference.plan import make_plan
from kelp.inference.predictor import Predictor
from kelp.inference.records import rules_of
from kelp.inference.staging import Staging
from kelp.inference.work import FINGERPRINT, Runner
from kelp.io.failures import Failure
from kelp.io.files import input_folder
from kelp.io.location import Url, locate, packaged, packaged_names
from kelp.products.areas import measure_whole
from kelp.products.maps import Map, open_map
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.masks import decoding, open_dataset, read_tags
from kelp.raster.probability import CODES
from kelp.raster.window import RasterSource, Shape, Tile
from kelp.sensors import find_scenes, open_scene
from kelp.sensors.record import MapRecord, NetworkFacts, Source
from kelp.sensors.rules import Rules
from kelp.tables import MASK_SUFFIX, output_name
from kelp.tiling.engine import Job
from kelp.tiling.merge import to_mask
from kelp.tiling.strip import Area

log = logging.getLogger("kelp")

BOUND: Final = 1e-3
"""By which probabilities may differ: another batch, device or backend gives other last bits."""
BOUND_16_BIT: Final = 0.3
"""The same where the map was made in 16 bits (bf16-mixed, 16-mixed), or is predicted again so: a
few pixels in a million then lie 0.2 off."""
_AREA: Final = 1e-6
"""Relative: areas are sums, and the record rounds them."""


@dataclass
class Agreement:
    """How the pixels of a map's tiles compare with those predicted again."""

    tiles: int = 0
    pixels: int = 0
    """Each counted once for every tile it lies in."""
    near: int = 0
    """Mask pixels that differ, with a probability within the bound of the threshold."""
    largest: float = 0.0
    """Largest difference of the saved probabilities."""


@dataclass(frozen=True)
class Verified:
    """What is known of one map.

    Attributes:
        mask: its file.
        differences: what is not as its record says, in words; empty: nothing.
        agreement: of the tiles that were predicted again.
    """

    mask: Path
    differences: tuple[str, ...]
    agreement: Agreement

    def __str__(self) -> str:
        if self.differences:
            return f"{self.mask}: {'; '.join(self.differences)}"
        found = self.agreement
        near = f", {found.near:,} of them differ, at the threshold" if found.near else ""
        return (
            f"{self.mask}: as its record says ({found.tiles} tiles, {found.pixels:,} pixels{near})"
        )


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found of each map."""

    maps: tuple[Verified, ...]

    def summary(self) -> str:
        """A line for each map."""
        return "\n".join(map(str, self.maps))


def verify(config: VerifyConfig, progress: Progress = silent) -> VerifyResult:
    """Compare maps with their records and with tiles predicted again; see `VerifyConfig`.

    Raises:
        InputError: maps differ, or cannot be verified; each is named with what differs. The others
            have been reported to the logger by then.
    """
    folder = config.predictions_dir
    masks = [folder] if folder.is_file() else input_folder(folder, f"*{MASK_SUFFIX}")
    verifier = _Verifier(config)
    scenes = {output_name(path): path for path in find_scenes(verifier.data_dir)}
    found = []
    for done, mask in enumerate(masks, start=1):
        found.append(verifier.verify(mask, scenes.get(mask.name)))
        progress("verifying", done, len(masks))
    bad = [one for one in found if one.differences]
    if bad:
        for one in found:
            if not one.differences:
                log.info("%s", one)
        raise InputError(
            f"{len(bad)} of {len(masks)} maps are not what their records say: "
            f"{'; '.join(map(str, bad))}"
        )
    return VerifyResult(tuple(found))


class _Verifier:
    """Maps of one folder; networks are kept from map to map."""

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config
        folder = config.predictions_dir
        path = (folder.parent if folder.is_file() else folder) / "kelp-predict.yaml"
        # Of the folder's last run: paths, which records do not hold.
        self._run = read_yaml(path) if path.is_file() else {}
        given = config.data_dir or self._run.get("data_dir")
        if not given:
            raise InputError(
                f"{path}: does not say where the scenes are; name them with --data_dir"
            )
        self.data_dir = locate(given) if isinstance(given, str) else given
        self._bundles: dict[tuple[Path | str, ...], list[Bundle]] = {}
        self._predictors: dict[str, Predictor] = {}

    def verify(self, mask: Path, scene: Path | Url | None) -> Verified:
        agreement = Agreement()
        found: list[str] = []
        try:
            for words in self._differences(open_map(mask), scene, agreement):
                found.append(words)  # what was found before an error counts, too
        except KelpError as error:
            found.append(error.message.removeprefix(f"{mask}: "))
        return Verified(mask, tuple(found), agreement)

    def _differences(
        self, entry: Map, scene: Path | Url | None, agreement: Agreement
    ) -> Iterator[str]:
        record = entry.record
        if record is None:
            yield "has no record, so nothing can be verified; make it again with kelp predict"
            return
        if scene is None:
            yield f"no scene of it in {self.data_dir}"
            return
        yield from _figures(entry, record)
        if record.threshold is None or not record.settings:
            yield "its record lacks threshold or settings; make it again with kelp predict"
            return
        config = self._config_of(entry, record)
        bundles = self._load(config)
        if wrong := list(_networks(record.network, bundles)):
            yield from wrong
            return  # their tiles would say nothing of the map
        config, predictor = self._predictor(config, bundles, Shape(*record.settings["tile"]))
        config = self._with_quality(config, record, scene)
        task = survey_one(config, [b.spec for b in predictor.bundles], (scene, entry.mask))
        if isinstance(task, Failure):
            yield task.message
            return
        with Staging(0) as staging:
            ((_, staged),) = staging.ahead([task])
            task = staged()
            was, now = _recorded(record), _given(config, task)
            yield from _inputs(was, now)
            if record.grid != task.record.grid:
                yield "the scene's grid is not that of the record"
            # Of files that are known by another name, or by what a store says of them, it differs.
            if was == now:
                yield from _settings(entry, record, Runner(config, predictor), task)
            yield from self._tiles(entry, record, config, predictor, task, agreement)

    def _config_of(self, entry: Map, record: MapRecord) -> PredictConfig:
        """The prediction as the record tells of it."""
        given = self._config
        known = {name: self._run[name] for name in _KEPT if name in self._run}
        known |= {name: getattr(given, name) for name in given.model_fields_set & _KEPT}
        known |= {"data_dir": self.data_dir, "output_dir": entry.mask.parent}
        known |= {name: getattr(given, name) for name in ("device", "backend", "use_checkpoint")}
        if given.backend == "auto" and record.backend == "onnx":
            known["backend"] = record.backend
        try:
            settings = record.settings
            (tile, _), (overlap, _) = settings["tile"], settings["overlap"]
            if known.get("sahi_tile_size") != tile:  # of another run into the folder
                known.pop("sahi_tile_size", None)
            land, tta = settings["land"], settings["tta"]
            return PredictConfig.model_validate(
                known
                | {
                    "run_dir": self._run_dir(record),
                    "weights": settings["weights"],
                    "decision_threshold": record.threshold,
                    "precision": settings["precision"],
                    "blend": settings["blend"],
                    "qa_as_nodata": settings["qa_as_nodata"],
                    "land": settings["land_rule"],
                    "tta": tta is not None,
                    "sahi_overlap": overlap,
                }
                | ({} if land is False else {"land_tolerance": land})
                | ({} if tta is None else {"tta_merge_mode": tta})
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"its record's settings cannot be understood ({error})") from error

    def _with_quality(
        self, config: PredictConfig, record: MapRecord, location: Path | Url
    ) -> PredictConfig:
        """With the record's quality bits, where nobody says which."""
        wanted = record.quality.policy
        if "quality" in self._config.model_fields_set or not wanted or wanted == ("QA",):
            return config
        with open_scene(location, config) as scene:
            if set(scene.policy) == set(wanted):  # their order counts in the fingerprint
                return config
        return config.model_copy(update={"quality": wanted})

    def _run_dir(self, record: MapRecord) -> Any:
        if self._config.run_dir:
            return self._config.run_dir
        names = [network.name for network in record.network]
        if set(names) <= set(packaged_names()):
            return [Path(name) for name in names]
        if self._run.get("run_dir"):
            return self._run["run_dir"]
        raise InputError(f"made by the network {'+'.join(names)}; name it with --run_dir")

    def _load(self, config: PredictConfig) -> list[Bundle]:
        paths = tuple(map(packaged, config.run_dir))
        key = (*paths, config.backend)
        if key not in self._bundles:
            self._bundles[key] = load_bundles(paths, config.use_checkpoint, config.backend)
        return self._bundles[key]

    def _predictor(
        self, config: PredictConfig, bundles: Sequence[Bundle], tile: Shape
    ) -> tuple[PredictConfig, Predictor]:
        """The predictor of these tiles: the networks' own, or brought to their size."""
        predictor = self._of(config, bundles)
        if predictor.slicing.tile != tile:
            config = config.model_copy(update={"sahi_tile_size": tile.height})
            predictor = self._of(config, bundles)
        return config, predictor

    def _of(self, config: PredictConfig, bundles: Sequence[Bundle]) -> Predictor:
        key = config.to_yaml()
        if key not in self._predictors:
            self._predictors[key] = Predictor.of(config, bundles)
        return self._predictors[key]

    def _tiles(
        self,
        entry: Map,
        record: MapRecord,
        config: PredictConfig,
        predictor: Predictor,
        task: Task,
        agreement: Agreement,
    ) -> Iterator[str]:
        """Predict some tiles again; what differs in them."""
        if task.size.shape != entry.shape:
            height, width = task.size.shape
            yield f"the scene has {height} x {width} pixels, the map not"
            return
        tiles = _drawn(entry, predictor, self._config.tiles, self._config.seed)
        agreement.tiles = len(tiles)
        plan = make_plan([task.size], predictor.slicing, predictor.network_pixels, 0)
        with decoding(plan.cache), open_scene(task.path, config) as scene:
            rules = rules_of(config, scene, predictor.threshold)
            bound = _bound(record, predictor)
            sink = _Comparison(entry, tiles, predictor.threshold, bound, rules, agreement)
            source = predictor.anchored(_Part(scene, tiles), str(task.path))
            engine = predictor.engine()
            try:
                engine.run([Job(source, sink)])
            finally:
                if rules:
                    rules.close()
        for _, error in engine.failures:
            raise error
        yield from sink.differences()


_KEPT: Final = {*SceneOptions.model_fields, "exclude", "sahi_tile_size", "batch_size"}
"""Options of a run that its maps' records do not hold."""


def _drawn(entry: Map, predictor: Predictor, count: int, seed: int) -> list[Tile]:
    """Tiles of a map in which something was observed; the same for a seed."""
    grid = predictor.slicing.grid(entry.shape)
    found: list[Tile] = []
    for index in np.random.default_rng(seed).permutation(len(grid)).tolist():
        tile = grid[index].clipped(entry.shape)
        if (entry.read(tile) != MASK_NODATA).any():
            found.append(tile)
        if len(found) == count:
            break
    return sorted(found, key=lambda tile: (tile.y, tile.x))


class _Windows:
    """Windows as an `Area`: the engine runs the tiles that touch it, and no others."""

    def __init__(self, windows: Sequence[Tile], area: Area | None) -> None:
        self._windows = windows
        self._area = area

    def mask(self, tile: Tile) -> NDArray[np.bool_]:
        inside = np.zeros((tile.height, tile.width), dtype=np.bool_)
        for one in self._windows:
            if part := one.intersection(tile):
                inside[part.slices_in(tile)] = True
        if self._area and inside.any():
            inside &= self._area.mask(tile)
        return inside


class _Part:
    """Windows of a scene, of which nothing else is wanted."""

    def __init__(self, source: RasterSource, windows: Sequence[Tile]) -> None:
        self.shape: Shape = source.shape
        self.read = source.read
        self.area = _Windows(windows, getattr(source, "area", None))


class _Comparison:
    """A sink that compares a scene's probabilities with a map, in some tiles."""

    def __init__(
        self,
        entry: Map,
        tiles: Sequence[Tile],
        threshold: float,
        bound: float,
        rules: Rules | None,
        agreement: Agreement,
    ) -> None:
        self._entry, self._tiles = entry, tiles
        self._threshold, self._bound, self._rules = threshold, bound, rules
        self._agreement = agreement
        self._step = 0.0
        if entry.probability:
            with open_dataset(entry.probability) as dataset:
                self._step = 0.5 / CODES if dataset.dtypes[0] == "uint8" else 0.0
        self._wrong = dict.fromkeys(tiles, 0)
        self._far = dict.fromkeys(tiles, 0)

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        """Compare rows `(n, width)` of probabilities, from row `y` on."""
        strip = Tile(y, 0, *rows.shape)
        near = [(tile, part) for tile in self._tiles if (part := tile.intersection(strip))]
        if near and self._rules:
            rows = self._rules.apply(y, rows)
        for tile, part in near:
            self._compare(tile, part, rows[part.slices_in(strip)])

    def _compare(self, tile: Tile, part: Tile, p: NDArray[np.float32]) -> None:
        mask = self._entry.read(part)
        differs = mask != to_mask(p, self._threshold)
        near = differs & (np.abs(p - np.float32(self._threshold)) <= self._bound)
        near &= mask != MASK_NODATA  # what was observed must be the same
        self._wrong[tile] += int(np.count_nonzero(differs & ~near))
        self._agreement.near += int(np.count_nonzero(near))
        self._agreement.pixels += p.size
        saved = self._entry.read_probability(part)
        if saved is not None:
            far = np.isnan(saved) != np.isnan(p)
            apart = np.nan_to_num(np.abs(saved - p))
            far |= apart > self._bound + self._step
            self._far[tile] += int(np.count_nonzero(far))
            self._agreement.largest = max(self._agreement.largest, float(apart.max()))

    def close(self) -> None:
        """Nothing to do."""

    def differences(self) -> Iterator[str]:
        """What differs, by tiles."""
        for counts, what in ((self._wrong, "mask"), (self._far, "probabilities")):
            bad = {tile: count for tile, count in counts.items() if count}
            if bad:
                first = next(iter(bad))
                yield (
                    f"{what}: {sum(bad.values()):,} pixels differ in {len(bad)} of "
                    f"{len(self._tiles)} tiles predicted again, first in that at row {first.y}, "
                    f"column {first.x}"
                )


def _bound(record: MapRecord, predictor: Predictor) -> float:
    precisions = {record.settings["precision"], predictor.processor.precision}
    return BOUND if precisions == {"32-true"} else BOUND_16_BIT


def _figures(entry: Map, record: MapRecord) -> Iterator[str]:
    """What a record says of the mask's pixels, and a count of them."""
    found = measure_whole(entry)
    observed = record.observed_share
    if observed is None or round(observed * found.pixels) != found.observed:
        words = "none" if observed is None else f"{observed * found.pixels:,.0f}"
        yield f"{found.observed:,} pixels are observed, the record says {words}"
    if record.kelp_pixels != found.kelp:
        yield f"{found.kelp:,} pixels are kelp, the record says {record.kelp_pixels}"
    areas = [("presence", record.presence_area_m2, found.presence_m2, 0.0)]
    if record.expected_area_m2 is not None and found.expected_m2 is not None:
        stored_in_steps = 0.5 / CODES * found.observed_m2
        areas.append(("expected", record.expected_area_m2, found.expected_m2, stored_in_steps))
    for name, stated, area, slack in areas:
        if stated is None or not math.isclose(stated, area, rel_tol=_AREA, abs_tol=slack + 1e-3):
            yield f"the {name} area is {area:,.1f} m2, the record says {stated}"


def _networks(recorded: Sequence[NetworkFacts], bundles: Sequence[Bundle]) -> Iterator[str]:
    """Other networks than those of the record."""
    if len(recorded) != len(bundles):
        yield f"made by {len(recorded)} networks, not by these {len(bundles)}"
        return
    for was, bundle in zip(recorded, bundles, strict=True):
        if was.sha256 != bundle.spec.weights_sha256:
            yield (
                f"network: {bundle.path} has weights of SHA-256 "
                f"{bundle.spec.weights_sha256[:12]}…, the record says {(was.sha256 or '')[:12]}… "
                f"({was.name}); name another with --run_dir"
            )


@dataclass(frozen=True)
class _Inputs:
    """What a map was made of."""

    scene: tuple[Source, ...]
    policy: frozenset[str]
    others: dict[str, tuple[Source, ...]]
    """By the option that names them."""

    @classmethod
    def of(
        cls,
        record: MapRecord,
        policy: Iterable[str],
        excluded: Source | None,
        cloud_mask: Source | None,
    ) -> Self:
        """Scene, elevation and area of interest are the record's."""
        single = {
            "--aoi": record.aoi.source if record.aoi else None,
            "--exclude": excluded,
            "--cloud_mask": cloud_mask,
        }
        return cls(
            record.scene.sources,
            frozenset(policy),
            {
                "--dem": record.dem.sources if record.dem else (),
                **{option: (source,) if source else () for option, source in single.items()},
            },
        )


def _recorded(record: MapRecord) -> _Inputs:
    quality, removed = record.quality, record.excluded
    return _Inputs.of(
        record, quality.policy, removed.source if removed else None, quality.cloud_mask
    )


def _given(config: PredictConfig, task: Task) -> _Inputs:
    """The same of what is here now."""
    excluded = Source.of_file("polygons", config.exclude) if config.exclude else None
    with open_scene(task.path, config) as scene:
        return _Inputs.of(task.record, scene.policy, excluded, scene.cloud_mask)


def _inputs(was: _Inputs, now: _Inputs) -> Iterator[str]:
    """Other files than those of the record, or read otherwise."""
    yield from _sources(was.scene, now.scene)
    if was.policy != now.policy:
        yield (
            f"quality bits: {','.join(sorted(now.policy)) or 'none'}, the record says "
            f"{','.join(sorted(was.policy)) or 'none'}; give --quality"
        )
    for option, recorded in was.others.items():
        for words in _sources(recorded, now.others[option]):
            yield f"{option}: {words}"


def _sources(recorded: Sequence[Source], found: Sequence[Source]) -> Iterator[str]:
    """What differs in two lists of files."""
    was, now = _by_name(recorded), _by_name(found)
    for key in sorted(was.keys() | now.keys()):
        name = key[1]
        if key not in now:
            yield f"{name}: in the record, but not given"
        elif key not in was:
            yield f"{name}: not in the record"
        elif what := _changed(was[key], now[key]):
            yield f"{name}: changed since the map was made ({what})"


def _by_name(sources: Sequence[Source]) -> dict[tuple[str, str], Source]:
    """By role and name: the folder may be another now."""
    return {(one.role, PurePosixPath(one.href).name): one for one in sources}


def _changed(was: Source, now: Source) -> str:
    pairs = ((was.size, now.size), (was.sha256, now.sha256), (was.etag, now.etag))
    for (one, other), what in zip(pairs, ("another size", *["other content"] * 2), strict=True):
        if one is not None and other is not None and one != other:
            return what
    return ""


def _settings(entry: Map, record: MapRecord, runner: Runner, task: Task) -> Iterator[str]:
    """Whether the record's settings are those whose fingerprint the map bears."""
    claimed = record.settings.get("fingerprint")
    files = filter(None, (entry.mask, entry.probability, entry.spread))
    for file in files:
        if read_tags(file).get(FINGERPRINT) != claimed:
            yield f"{file.name} is of another prediction than the record (fingerprint)"
    predictor = runner.predictor
    runtimes = "+".join(sorted({bundle.net.runtime for bundle in predictor.bundles}))
    same = {"precision": predictor.processor.precision, "version": kelp.__version__}
    if runtimes != record.backend or any(record.settings.get(k) != v for k, v in same.items()):
        return  # of another kelp, runtime or precision the fingerprint is another
    # Which files were written beside the mask counts, too, and they may be gone.
    kinds = itertools.product((None, "float32", "uint8"), (False, True))
    for kind, spread in kinds:
        products = {
            "save_probabilities": kind is not None,
            "probability_dtype": kind or "float32",
            "save_spread": spread,
        }
        config = runner.config.model_copy(update=products)
        if Runner(config, predictor).fingerprint(task) == claimed:
            return
    yield "its record's threshold or settings are not those it was made with (fingerprint)"
