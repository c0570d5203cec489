"""`kelp predict`: bundles and a folder of scenes in, masks and probabilities out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kelp import tables
from kelp.config import PredictConfig
from kelp.errors import ConfigError, InputError
from kelp.inference import memory
from kelp.inference.checks import check_statistics
from kelp.inference.crew import Crew, Share, gather_crew
from kelp.inference.inputs import Task, find_scenes
from kelp.inference.outputs import forget, probability_path, spread_path
from kelp.inference.plan import (
    NetworkMemory,
    check_disk,
    fit_memory,
    make_plan,
)
from kelp.inference.run import Run, loaded
from kelp.io import remote
from kelp.io.files import amount, discard_partials, json_text, output_folder
from kelp.io.location import Url, local
from kelp.plotting.preview import write_previews
from kelp.products.submission import ARCHIVE, write_submission
from kelp.progress import Progress, silent
from kelp.raster.scene import SceneSize
from kelp.tiling.jobs import Counts

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
        progress: told of tiles.
        client: of a Dask cluster that is to do the work; without it `config.scheduler` counts.

    Raises:
        KelpError: bad input. Of several scenes the good ones are done before bad ones are named.
    """
    shared = client is not None or config.scheduler is not None
    config = config.absolute() if shared else config
    scenes = find_scenes(config.data_dir)
    _refuse_extras(config, scenes)
    bundles = loaded(config.run_dir, config.use_checkpoint)
    if config.dataset_stats_dir:
        for bundle in bundles:
            check_statistics(bundle.spec, config.dataset_stats_dir)
    outputs = {path: config.output_dir / tables.output_name(path) for path in scenes}
    with gather_crew(config, bundles, client) as crew:
        if isinstance(config.output_dir, Path):
            discard_partials(output_folder(config.output_dir))
            crew.require_shared(config.output_dir)
        tasks, failures = crew.survey(outputs)
        run = Run(config, bundles, crew.processor)
        _plan(run, [task.size for task in tasks], shared)
        todo = _unfinished(run, tasks)
        if todo and isinstance(config.output_dir, Url):
            _record(run, {})  # a store that takes nothing is found out before hours of work
        counts, wrong = _predict(crew, run, todo, progress)
    failures |= wrong
    _record(run, crew.shares if shared else {})
    if failures:
        named = "; ".join(failures.values())
        rest = ", the rest is done" if len(failures) < len(scenes) else ""
        raise InputError(f"{len(failures)} of {len(scenes)} scenes failed{rest}: {named}")
    masks = tuple(outputs.values())
    submission, previews = _submit(config, scenes, masks, progress)
    peaks = [share.peak_memory for share in crew.shares.values()]
    return PredictResult(
        masks=masks,
        probabilities=tuple(map(probability_path, masks)) if config.save_probabilities else (),
        spreads=tuple(map(spread_path, masks)) if config.save_spread else (),
        submission=submission,
        previews=tuple(previews),
        made=len(todo),
        skipped=len(scenes) - len(todo),
        counts=counts,
        peak_memory=max(peaks, default=memory.peak()),
        workers=crew.shares if shared else {},
    )


def _plan(run: Run, sizes: Sequence[SceneSize], shared: bool) -> None:
    """Say in one line what the prediction takes, and fit it to the memory that is allowed."""
    config, tile = run.config, run.slicing.tile
    pixel_bytes = run.pixel_bytes
    if shared:  # sections of large scenes wait in files
        pixel_bytes += 4 + 4 * config.save_spread
    shapes = [bundle.spec.network_shape(tile) for bundle in run.bundles]
    pixels = run.passes * sum(height * width for height, width in shapes)
    plan = make_plan(sizes, run.slicing, pixels, pixel_bytes)
    if config.max_memory is not None and sizes:
        memory.give_back()
        measured = _measured(run, config.max_memory)
        plan = fit_memory(plan, config.max_memory, sizes, run.slicing, measured, config.save_spread)
    if isinstance(config.output_dir, Path):
        check_disk(plan, config.output_dir)
    if sizes:
        log.info("%s", plan)
    run.planned(plan.batch_size, plan.cache)


def _measured(run: Run, budget: int) -> NetworkMemory:
    """The network's memory, measured once for an output folder.

    It varies a little from run to run: measured again, a killed run might go on with
    another batch size, and so with other last bits.
    """
    path = run.config.output_dir / "kelp-memory.json"
    settings = json.dumps([run.settings(), budget], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()
    with suppress(InputError, OSError, ValueError, TypeError, KeyError, AttributeError):
        known = json.loads(remote.read_text(path))
        if known.pop("settings") == key:
            return NetworkMemory(**known)
    with run.processor.in_use():
        measured = NetworkMemory.measure(run.network, run.slicing.tile, budget)
    remote.write_text(path, json_text({"settings": key, **asdict(measured)}))
    return measured


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


def _unfinished(run: Run, tasks: Sequence[Task]) -> list[Task]:
    """The scenes that need work."""
    if run.config.overwrite:
        return list(tasks)
    if isinstance(run.config.output_dir, Url):  # one question in place of thousands
        there = remote.names_in(run.config.output_dir)
        return [task for task in tasks if task.output.name not in there or not _finished(run, task)]
    return [task for task in tasks if not _finished(run, task)]


def _finished(run: Run, task: Task) -> bool:
    """Whether a scene needs no work; what lies there of other inputs is spoken of."""
    finished = run.finished(task)
    if finished and isinstance(task.output, Path):
        forget(task.output)
    if finished is None:
        log.info("%s: made with other inputs or settings; making it anew", task.output)
    return bool(finished)


def _predict(
    crew: Crew, run: Run, todo: Sequence[Task], progress: Progress
) -> tuple[Counts, dict[Path | Url, str]]:
    """Predict scenes; what was done, and the error of each scene that failed."""
    counts, failures = Counts(), dict[Path | Url, str]()
    total, done = sum(len(run.grid(task)) for task in todo), 0

    def advance(tiles: int) -> None:
        nonlocal done
        done += tiles
        progress("predicting", done, total)

    if todo:
        for outcome in crew.perform(run, todo, advance):
            counts.add(outcome.counts)
            failures |= outcome.failures
    return counts, failures


def _record(run: Run, workers: Mapping[str, Share]) -> None:
    """Write down the settings of the run, what was left to kelp resolved, and who did what."""
    resolved: dict[str, Any] = {
        "decision_threshold": run.threshold,
        "precision": run.processor.precision,
        "device": run.processor.device,
        "threads": run.processor.threads,
    }
    tile, overlap = run.slicing.tile, run.slicing.overlap
    recipe = any(bundle.spec.prediction_tile for bundle in run.bundles)
    # Not a recipe's tile: given as a wish it would be shown at another scale.
    if tile[0] == tile[1] and (run.config.sahi_tile_size is not None or not recipe):
        resolved |= {"sahi_tile_size": tile[0], "sahi_overlap": overlap[0]}
    record, folder = run.config.model_copy(update=resolved), run.config.output_dir
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
    folder = output_folder(output_dir / "previews")
    return submission, write_previews(
        [local(scene) for scene in scenes],
        output_dir,
        folder,
        config.preview_first_n,
        config.band_order,
        progress,
    )
