"""Several predictions of the same scenes, merged into one by their weighted mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kelp.config.predict import EnsembleConfig
from kelp.errors import InputError
from kelp.evaluation.pairs import find_truths, sites_of, some, strips
from kelp.evaluation.weighting import Fitted, Weighting
from kelp.io.files import output_folder, write_json
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.georeference import Grid, grid_of, require_same_grid
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.window import Tile
from kelp.raster.writer import RasterWriter
from kelp.tables import MASK_SUFFIX, PROBABILITY_SUFFIX, products_in
from kelp.tiling.merge import to_mask

log = logging.getLogger("kelp")


@dataclass(frozen=True)
class EnsembleResult:
    """Merged predictions.

    Attributes:
        masks: the masks written.
        probabilities: the probabilities written; empty where masks were merged.
        folders: how many folders voted.
        fitted: weights and threshold, where they were fitted.
    """

    masks: tuple[Path, ...]
    probabilities: tuple[Path, ...]
    folders: int
    fitted: Fitted | None = None

    def summary(self) -> str:
        """One line for the terminal, and two more where weights were fitted."""
        merged = "probabilities" if self.probabilities else "masks"
        fitted = f"{self.fitted.summary()}\n" if self.fitted else ""
        return fitted + (
            f"merged the {merged} of {self.folders} folders into {len(self.masks)} masks "
            f"in {self.masks[0].parent}"
        )


def weighted_mean(
    votes: Iterable[NDArray[np.floating]], weights: Iterable[float]
) -> NDArray[np.float32]:
    """The mean of arrays of one shape; NaN in one of them leaves its vote out at that pixel.

    Where every vote of weight above 0 is NaN, the mean is NaN. Summed in float64: any number of
    equal votes gives that vote, to the last bit of float32.
    """
    total: NDArray[np.float64] | None = None
    for vote, weight in zip(votes, weights, strict=True):
        if total is None:
            total, cast = np.zeros(vote.shape), np.zeros(vote.shape)
        seen = np.isfinite(vote)
        total[seen] += weight * vote[seen].astype(np.float64)
        cast[seen] += weight
    if total is None:
        raise ValueError("a mean needs at least one vote")
    return np.divide(total, cast, out=np.full_like(total, np.nan), where=cast > 0).astype(
        np.float32
    )


def ensemble(config: EnsembleConfig, progress: Progress = silent) -> EnsembleResult:
    """Merge prediction folders that hold the same scenes.

    Probabilities are averaged where all folders have them for all scenes, else masks, as votes
    of 0 and 1; the threshold is applied once, to the mean. A pixel that a folder did not observe
    has no vote of that folder; one that none observed stays 255.

    With `gt_dir` weights and threshold are fitted first. `kelp-ensemble.yaml` in the output folder
    holds them, for `--config` with other folders of the same networks; `fitted.json` tells more.

    Raises:
        InputError: a folder lacks a scene of another, grids differ, a file cannot be
            read, or the output folder is one of the inputs.
    """
    folders = config.predictions_dirs
    if config.output_dir.resolve() in [folder.resolve() for folder in folders]:
        raise InputError(
            f"{config.output_dir}: the output folder is one of the inputs; choose another one"
        )
    sources, suffix = _sources(folders)
    output = output_folder(config.output_dir)
    fitted = None
    if config.gt_dir:
        fitted = _fit(config, sources, suffix, progress)
        config = config.model_copy(
            update={
                "weights": fitted.weights,
                "decision_threshold": fitted.threshold,
                "gt_dir": None,
                "metadata_fp": None,
            }
        )
        write_json(output / "fitted.json", fitted.to_json())
    weights = np.array(config.weights or [1.0] * len(folders))
    weights = weights / weights.sum()
    threshold = 0.5 if config.decision_threshold is None else config.decision_threshold
    masks, probabilities = [], []
    for done, (tile_id, files) in enumerate(sources.items(), 1):
        mask = output / f"{tile_id}{MASK_SUFFIX}"
        probability = output / f"{tile_id}{PROBABILITY_SUFFIX}"
        soft = suffix == PROBABILITY_SUFFIX
        grid = _common_grid(files, config.ignore_georeference)
        _merge(files, grid, weights.tolist(), threshold, mask, probability, soft)
        masks.append(mask)
        if soft:
            probabilities.append(probability)
        progress("merging", done, len(sources))
    config.record(output)
    return EnsembleResult(tuple(masks), tuple(probabilities), len(folders), fitted)


def _fit(
    config: EnsembleConfig, sources: Mapping[str, Sequence[Path]], suffix: str, progress: Progress
) -> Fitted:
    """Weights and threshold for the scenes of which there is truth."""
    assert config.gt_dir is not None
    truths = find_truths(config.gt_dir, sources, config)
    sites = sites_of(config.metadata_fp, list(truths))
    count = len(next(iter(sources.values())))
    weighting = Weighting([sites[tile_id] for tile_id in truths], count)
    for number, (tile_id, truth) in enumerate(truths.items()):
        files = sources[tile_id]
        grid = _common_grid([*files, truth], config.ignore_georeference)
        for strip, _ in strips(grid.shape):
            votes = (_vote(path, strip, suffix == PROBABILITY_SUFFIX) for path in files)
            weighting.add(number, votes, read_mask(truth, strip, config.kelp_value))
        progress("fitting", number + 1, len(truths))
    return weighting.fit()


def _merge(
    files: Sequence[Path],
    grid: Grid,
    weights: Sequence[float],
    threshold: float,
    mask: Path,
    probability: Path,
    soft: bool,
) -> None:
    """Merge one scene's predictions (`soft`: probabilities), strip by strip."""
    shape, georeference = grid.shape, grid.georeference
    with ExitStack() as stack:
        mask_out = stack.enter_context(
            RasterWriter(mask, shape, "uint8", georeference, MASK_NODATA, {})
        )
        soft_out = (
            stack.enter_context(
                RasterWriter(probability, shape, "float32", georeference, np.nan, {})
            )
            if soft
            else None
        )
        for strip, _ in strips(shape):
            mean = weighted_mean((_vote(path, strip, soft) for path in files), weights)
            mask_out.write(strip.y, to_mask(mean, threshold))
            if soft_out is not None:
                soft_out.write(strip.y, mean)


def _vote(path: Path, strip: Tile, soft: bool) -> NDArray[np.float32]:
    if soft:
        return read_probability(path, strip)
    mask = read_mask(path, strip)
    return np.where(mask == MASK_NODATA, np.nan, mask).astype(np.float32)


def _sources(folders: Sequence[Path]) -> tuple[dict[str, list[Path]], str]:
    """Each scene's files, one a folder, and whether they are masks or probabilities."""
    found: dict[str, list[dict[str, Path]]] = {MASK_SUFFIX: [], PROBABILITY_SUFFIX: []}
    for folder in folders:
        for suffix, kind in found.items():
            kind.append(products_in(folder, suffix))
    tile_ids = {tile_id for kind in found.values() for files in kind for tile_id in files}
    if not tile_ids:
        raise InputError(f"{folders[0]}: the folder holds no *{MASK_SUFFIX} file")
    probabilities = found[PROBABILITY_SUFFIX]
    if all(files.keys() == tile_ids for files in probabilities):
        suffix = PROBABILITY_SUFFIX
    else:
        suffix = MASK_SUFFIX
        _require_all(folders, found[MASK_SUFFIX], tile_ids)
        if any(probabilities):
            log.info("masks are merged: not all folders hold probabilities of all scenes")
    return {
        tile_id: [files[tile_id] for files in found[suffix]] for tile_id in sorted(tile_ids)
    }, suffix


def _require_all(
    folders: Sequence[Path], masks: Sequence[Mapping[str, Path]], tile_ids: set[str]
) -> None:
    for folder, files in zip(folders, masks, strict=True):
        if absent := sorted(tile_ids - files.keys()):
            raise InputError(
                f"{folder}: lacks {some(absent)}, which another folder holds; "
                "predict the same scenes for every folder"
            )


def _common_grid(files: Sequence[Path], ignore_georeference: bool) -> Grid:
    """The grid that all files share; those without georeference take that of the others."""
    located = next((path for path in files if grid_of(path).located), files[0])
    for path in files:
        require_same_grid(located, path, ignore_georeference)
    return grid_of(located)
