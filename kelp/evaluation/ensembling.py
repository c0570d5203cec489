"""Several predictions of the same scenes, merged into one by their weighted mean.

Weights and threshold may be fitted to scenes that the networks never learned from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kelp.config.predict import EnsembleConfig
from kelp.errors import InputError
from kelp.evaluation.bootstrap import site_numbers
from kelp.evaluation.confusion import dice
from kelp.evaluation.pairs import find_truths, sites_of, some, strips
from kelp.evaluation.thresholds import Histogram, best_threshold, parts_of
from kelp.io.files import output_folder, write_json
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.georeference import Grid, grid_of, require_same_grid
from kelp.raster.masks import read_mask, read_probability
from kelp.raster.probability import CODES, quantise
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


_MOST_MIXTURES: Final = 300
_FINEST: Final = 20  # weights in steps of 0.05
_LEAST: Final = 5  # the lowest threshold, as a code: nearly all of the sea lies below it
_ALLOWED: Final = np.arange(_LEAST, CODES + 1)


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and the pooled Dice of the labelled scenes with it.

    Attributes:
        weights: of the networks; sum 1.
        threshold: kelp where the weighted mean is at least this.
        dice: with these.
        dice_equal: with equal weights, at the threshold that suits them best.
        dice_alone: of each network alone, at the threshold that suits it best.
        held_out: Dice of parts of the sites with weights and threshold of the other parts.
        held_out_equal: the same with equal weights. Not below `held_out`: equal ones are kept.
        scenes: labelled scenes.
        sites: their sites.
    """

    weights: tuple[float, ...]
    threshold: float
    dice: float
    dice_equal: float
    dice_alone: tuple[float, ...]
    held_out: float
    held_out_equal: float
    scenes: int
    sites: int

    def to_json(self) -> dict[str, Any]:
        """All figures, by name."""
        values = asdict(self)
        values["places"] = values.pop("sites")  # the file's name for it
        return values

    def summary(self) -> str:
        """Two lines for the terminal."""
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        alone = ", ".join(f"{dice:.4f}" for dice in self.dice_alone)
        kept = "" if self.held_out > self.held_out_equal else "; equal weights are kept"
        return (
            f"weights {weights}, threshold {self.threshold:g}: pooled Dice {self.dice:.4f} "
            f"(equal weights {self.dice_equal:.4f}, alone {alone})\n"
            f"fitted weights on other sites than they were fitted to: {self.held_out:.4f}, "
            f"equal ones {self.held_out_equal:.4f}{kept}"
        )


def mixtures(count: int) -> NDArray[np.float64]:
    """Weights to choose from, `(mixtures, count)`: the equal ones first, then by nearness to them.

    All that are whole n-ths with sum 1, n as large as leaves at most 300 of them (20 at most).
    """
    parts = next(n for n in range(_FINEST, 0, -1) if n == 1 or _few(n, count))
    found = np.array(list(_shares(parts, count)), dtype=np.float64) / parts
    equal = np.full((1, count), 1 / count)
    found = found[np.abs(found - equal).max(axis=1) > 1e-9]
    order = np.argsort(((found - equal) ** 2).sum(axis=1), kind="stable")
    return np.concatenate([equal, found[order]])


def _few(parts: int, count: int) -> bool:
    """Whether `parts` can be shared among `count` in few enough combinations."""
    return comb(parts + count - 1, parts) <= _MOST_MIXTURES


def _shares(parts: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (parts,)
        return
    for first in range(parts + 1):
        for others in _shares(parts - first, count - 1):
            yield first, *others


class Weighting:
    """Counts what every mixture makes of labelled pixels, and chooses one.

    Args:
        sites: the site of each scene that will come, in their order.
        count: networks.
        seed: of sharing sites out into parts.
    """

    def __init__(self, sites: Sequence[str], count: int, seed: int = 0) -> None:
        self._number = site_numbers(sites)
        self._sites = len(set(sites))
        self._part = parts_of(self._sites, seed)
        self._mixtures = mixtures(count)
        self._counted = Histogram.empty((int(self._part.max()) + 1, len(self._mixtures)))

    def add(
        self, scene: int, votes: Iterable[NDArray[np.float32]], truth: NDArray[np.uint8]
    ) -> None:
        """Count pixels of a scene.

        Args:
            scene: its number.
            votes: probabilities of each network, `(height, width)`; NaN = not observed.
            truth: 0, 1, 255 = not labelled, of the same shape.
        """
        labelled = truth != 255
        p = np.stack([vote[labelled] for vote in votes])
        truth = truth[labelled]
        part = int(self._part[self._number[scene]])
        seen = np.isfinite(p)
        p = np.where(seen, p, 0).astype(np.float64)
        # No mixture lifts these above the lowest threshold.
        low = seen.all(axis=0) & (p.max(axis=0) < (_LEAST - 0.5) / CODES)
        for k in (0, 1):
            self._counted.pixels[part, :, k, 0] += np.count_nonzero(low & (truth == k))
        p, seen, truth = p[:, ~low], seen[:, ~low], truth[~low]
        for mixture, weights in enumerate(self._mixtures):
            cast = weights @ seen
            mean = np.divide(weights @ p, cast, out=np.full_like(cast, np.nan), where=cast > 0)
            self._counted.add((part, mixture), truth, quantise(mean))

    def fit(self) -> Fitted:
        """Choose weights and threshold.

        Raises:
            InputError: no labelled pixel is kelp, or all scenes are of one site.
        """
        if self._sites < 2:
            raise InputError(
                "--gt_dir: all labelled scenes are of one site; weights are evaluated on sites "
                "they were not fitted to, give scenes of several"
            )
        everywhere = self._everywhere()
        dices = everywhere.dice()
        if np.isnan(everywhere.recall()).all():
            raise InputError("--gt_dir: no labelled pixel is kelp; nothing can be fitted")
        codes = best_threshold(dices, _ALLOWED)
        best = np.take_along_axis(dices, codes[:, np.newaxis], axis=1)[:, 0]
        held_out, held_out_equal = self._held_out(len(self._mixtures)), self._held_out(1)
        chosen = int(best.argmax()) if held_out > held_out_equal else 0
        alone = [int(np.argmax(self._mixtures[:, k])) for k in range(self._mixtures.shape[1])]
        return Fitted(
            weights=tuple(float(weight) for weight in self._mixtures[chosen]),
            threshold=float(codes[chosen] / CODES),
            dice=float(best[chosen]),
            dice_equal=float(best[0]),
            dice_alone=tuple(float(best[k]) for k in alone),
            held_out=held_out,
            held_out_equal=held_out_equal,
            scenes=len(self._number),
            sites=self._sites,
        )

    def _everywhere(self) -> Histogram:
        return Histogram(
            self._counted.pixels.sum(axis=0), self._counted.unobserved_kelp.sum(axis=0)
        )

    def _held_out(self, mixtures: int) -> float:
        """Dice of every part with what suits the others best, of the first so many mixtures."""
        counts = self._counted.counts()
        total = np.zeros(3, dtype=np.int64)
        for part, others in enumerate(self._counted.others().dice()):
            codes = best_threshold(others[:mixtures], _ALLOWED)
            reached = others[np.arange(mixtures), codes]
            chosen = int(np.nan_to_num(reached).argmax())
            total += counts[part, chosen, :, codes[chosen]]
        return float(np.nan_to_num(dice(*total)))
