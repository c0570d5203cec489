"""`kelp predict`: bundles and a folder of scenes in, masks and probabilities out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kelp import tables
from kelp.config import PredictConfig
from kelp.errors import ConfigError, InputError, KelpError
from kelp.inference import memory
from kelp.inference.backends import onnx_is_faster
from kelp.inference.bundle import DEFAULT_NETWORK, Bundle, load_bundles
from kelp.inference.checks import check_statistics
from kelp.inference.cluster import Executor, Share, open_executor
from kelp.inference.inputs import Task
from kelp.inference.outputs import clean_up, probability_path, spread_path
from kelp.inference.plan import NetworkMemory, check_disk, fit_memory, make_plan
from kelp.inference.work import Runner
from kelp.io import remote
from kelp.io.failures import Failure, raise_failures
from kelp.io.files import amount, discard_partials, json_text, output_folder
from kelp.io.location import Url, local, packaged
from kelp.products.submission import ARCHIVE, write_submission
from kelp.progress import Progress, silent
from kelp.raster.scene import SceneSize
from kelp.sensors import find_scenes
from kelp.tiling.engine import Counts

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class PredictResult:
    """What a prediction wrote and what it cost."""

    masks: tuple[Path | Url, ...]
    probabilities: tuple[Path | Url, ...]
    spreads: tuple[Path | Url, ...]
    submission: Path | None
    previews: tuple[Path, ...]
    made: int
    """Scenes predicted now."""
    skipped: int
    """Scenes that were already finished."""
    counts: Counts
    """Tiles that were run, left out, or done by an earlier process."""
    peak_memory: int
    """The most bytes that this process held; of a cluster, any of its workers."""
    workers: dict[str, Share]
    """What each worker of a cluster did, by its address; empty without one."""

    def summary(self) -> str:
        """One line for the terminal, and one for each worker of a cluster."""
        counts = self.counts
        run = [f"{counts.predicted:,} tiles"]
        for number, what in (
            (counts.unobserved, "without an observed pixel left out"),
            (counts.land, "all land left out (0 in the maps)"),
            (counts.resumed, "done earlier"),
        ):
            if number:
                run.append(f"{number:,} {what}")
        extra = f"; submission in {self.submission}" if self.submission else ""
        first = (
            f"{self.made} scenes predicted ({', '.join(run)}), {self.skipped} already finished; "
            f"masks in {self.masks[0].parent}; peak memory {amount(self.peak_memory)}{extra}"
        )
        workers = [f"  {name}: {share}" for name, share in sorted(self.workers.items())]
        return "\n".join([first, *workers])


def predict_scenes(
    config: PredictConfig, progress: Progress = silent, client: Client | None = None
) -> PredictResult:
    """Predict every scene of a folder (or one file, or a list); see `PredictConfig`.

    Args:
        config: the options.
        progress: gets the number of tiles.
        client: of a Dask cluster that is to do the work; without it `config.scheduler` counts.

    Raises:
        KelpError: bad input. Of several scenes the good ones are done before bad ones are named.
        BugError: a bug of kelp ended some scenes, whose tracebacks are in `kelp-errors.log` beside
            the maps; the others are done.
    """
    config = _with_networks(config)
    shared = client is not None or config.scheduler is not None
    config = config.absolute() if shared else config
    scenes = find_scenes(config.data_dir)
    _refuse_extras(config, scenes)
    bundles = _load(config, shared)
    if config.dataset_stats_dir:
        for bundle in bundles:
            check_statistics(bundle.spec, config.dataset_stats_dir)
    masks = {path: config.output_dir / tables.output_name(path) for path in scenes}
    with open_executor(config, bundles, client) as executor:
        if isinstance(config.output_dir, Path):
            discard_partials(output_folder(config.output_dir))
            executor.require_shared(config.output_dir)
        tasks, failures = executor.survey(masks)
        runner = Runner(config, executor.predictor)
        _plan(runner, [task.size for task in tasks], shared)
        todo = _unfinished(runner, tasks)
        if todo and isinstance(config.output_dir, Url):
            _record(runner, {})  # a store that takes nothing is found out before hours of work
        counts, wrong, distrusted = _predict(executor, runner, todo, progress)
    failures |= wrong
    for path, reasons in distrusted.items():
        log.warning("%s: may be wrong: %s; areas leave it out", path, reasons)
    _record(runner, executor.shares if shared else {})
    raise_failures(failures, len(scenes), "scenes", config.output_dir)
    made = tuple(masks.values())
    submission, previews = _submit(config, scenes, made, progress)
    peaks = [share.peak_memory for share in executor.shares.values()]
    return PredictResult(
        masks=made,
        probabilities=tuple(map(probability_path, made)) if config.save_probabilities else (),
        spreads=tuple(map(spread_path, made)) if config.save_spread else (),
        submission=submission,
        previews=tuple(previews),
        made=len(todo),
        skipped=len(scenes) - len(todo),
        counts=counts,
        peak_memory=max(peaks, default=memory.peak()),
        workers=executor.shares if shared else {},
    )


def _plan(runner: Runner, sizes: Sequence[SceneSize], shared: bool) -> None:
    """Say in one line what the prediction takes, and fit it to the memory that is allowed."""
    config, predictor = runner.config, runner.predictor
    pixel_bytes = runner.pixel_bytes
    if shared:  # sections of large scenes wait in files
        pixel_bytes += 4 + 4 * config.save_spread
    slicing = predictor.slicing
    plan = make_plan(sizes, slicing, predictor.network_pixels, pixel_bytes)
    if config.max_memory is not None and sizes:
        memory.give_back()
        measured = _measured(runner, config.max_memory)
        plan = fit_memory(plan, config.max_memory, sizes, slicing, measured, config.save_spread)
    if isinstance(config.output_dir, Path):
        check_disk(plan, config.output_dir)
    if sizes:
        log.info("%s", plan)
    predictor.plan(plan.batch_size, plan.cache)


def _measured(runner: Runner, budget: int) -> NetworkMemory:
    """The network's memory, measured once for an output folder.

    It varies a little from run to run: measured again, a killed run might be resumed with
    another batch size, and so with other last bits.
    """
    path = runner.config.output_dir / "kelp-memory.json"
    settings = json.dumps([runner.predictor.exact_settings(), budget], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()
    with suppress(InputError, OSError, ValueError, TypeError, KeyError, AttributeError):
        known = json.loads(remote.read_text(path))
        if known.pop("settings") == key:
            return NetworkMemory(**known)
    measured = NetworkMemory.measure(runner.predictor, runner.predictor.slicing.tile, budget)
    remote.write_text(path, json_text({"settings": key, **asdict(measured)}))
    return measured


def _with_networks(config: PredictConfig) -> PredictConfig:
    """The configuration with the bundles of packaged networks in place of their names."""
    if not config.run_dir:
        log.info("network: %s, which comes with kelp; --run_dir names another", DEFAULT_NETWORK)
    networks = config.run_dir or (Path(DEFAULT_NETWORK),)
    return config.model_copy(update={"run_dir": tuple(map(packaged, networks))})


def _load(config: PredictConfig, shared: bool) -> list[Bundle]:
    """The networks; `--backend auto` takes the faster runtime that has all of them.

    Workers of a cluster may have other processors, and those of one map must agree.
    """
    load = partial(load_bundles, config.run_dir, config.use_checkpoint)
    if config.backend == "auto" and not shared and onnx_is_faster(config.device, config.precision):
        with suppress(KelpError):  # no ONNX file, or one of another state
            bundles = load("onnx")
            tiles = {bundle.spec.tile_size for bundle in bundles if not bundle.spec.is_pixelwise}
            if config.sahi_tile_size is None or tiles <= {(config.sahi_tile_size,) * 2}:
                return bundles
    return load(config.backend)


def _refuse_extras(config: PredictConfig, scenes: Sequence[Path | Url]) -> None:
    """Raise `ConfigError` where archive or pictures are to be made of what is not here."""
    if (config.submission or config.preview_submission) and isinstance(config.output_dir, Url):
        raise ConfigError(
            "--submission, --preview_submission: need a local --output_dir; or fetch the masks "
            "and run kelp submit"
        )
    if config.preview_submission and any(isinstance(scene, Url) for scene in scenes):
        raise ConfigError(
            "--preview_submission: needs local scenes; leave it out, or fetch some scenes and run "
            "kelp preview"
        )


def _unfinished(runner: Runner, tasks: Sequence[Task]) -> list[Task]:
    """The scenes that need work."""
    if runner.config.overwrite:
        return list(tasks)
    if isinstance(runner.config.output_dir, Url):  # one question in place of thousands
        there = remote.names_in(runner.config.output_dir)
    else:
        there = {task.output.name for task in tasks}
    return [task for task in tasks if task.output.name not in there or not _finished(runner, task)]


def _finished(runner: Runner, task: Task) -> bool:
    """Whether a scene needs no work; what lies there of other inputs is reported."""
    finished = runner.finished(task)
    if finished and isinstance(task.output, Path):
        clean_up(task.output)
    if finished is None:
        log.info("%s: made with other inputs or settings; making it again", task.output)
    return bool(finished)


def _predict(
    executor: Executor, runner: Runner, todo: Sequence[Task], progress: Progress
) -> tuple[Counts, dict[Path | Url, Failure], dict[Path | Url, str]]:
    """Predict scenes; what was done, why others failed, and why maps are not to be trusted."""
    counts, failures = Counts(), dict[Path | Url, Failure]()
    distrusted: dict[Path | Url, str] = {}
    total, done = sum(len(runner.grid(task)) for task in todo), 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress("predicting", done, total)

    if todo:
        for result in executor.run(runner, todo, advance):
            counts += result.counts
            failures |= result.failures
            distrusted |= result.distrusted
    return counts, failures, distrusted


def _record(runner: Runner, workers: Mapping[str, Share]) -> None:
    """Write down the settings of the run, what was left to kelp resolved, and who did what."""
    processor = runner.predictor.processor
    resolved: dict[str, Any] = {
        "decision_threshold": runner.predictor.threshold,
        "precision": processor.precision,
        "device": processor.device,
        "threads": processor.threads,
    }
    tile, overlap = runner.predictor.slicing.tile, runner.predictor.slicing.overlap
    recipe = any(bundle.spec.prediction_tile for bundle in runner.predictor.bundles)
    # Not a recipe's tile: given as an option it would be shown at another scale.
    if tile[0] == tile[1] and (runner.config.sahi_tile_size is not None or not recipe):
        resolved |= {"sahi_tile_size": tile[0], "sahi_overlap": overlap[0]}
    record, folder = runner.config.model_copy(update=resolved), runner.config.output_dir
    remote.write_text(folder / record.record_name, record.to_record())
    if workers:
        shares = {name: asdict(share) for name, share in sorted(workers.items())}
        remote.write_text(folder / tables.WORKERS_FILE, json_text(shares))


def _submit(
    config: PredictConfig,
    scenes: Sequence[Path | Url],
    masks: Sequence[Path | Url],
    progress: Progress,
) -> tuple[Path | None, Sequence[Path]]:
    """The archive and the pictures that were asked for."""
    if not (config.submission or config.preview_submission):
        return None, ()
    output_dir = local(config.output_dir)
    archive = output_dir / ARCHIVE
    submission = write_submission([local(mask) for mask in masks], archive, progress).path
    if not config.preview_submission:
        return submission, ()
    from kelp.plotting.preview import write_previews

    folder = output_folder(output_dir / "previews")
    return submission, write_previews(
        [local(scene) for scene in scenes],
        output_dir,
        folder,
        config.preview_first_n,
        config.band_order,
        progress,
    )
