"""Pixels of many images in little memory: a few drawn from each, with what they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kelp.config import BaselineConfig
from kelp.errors import KelpError
from kelp.inference.backends.trees import features
from kelp.nn.data.dataset import Sample, Source, TileDataset, as_raised
from kelp.nn.preprocess import Preprocess
from kelp.progress import Progress


@dataclass(frozen=True)
class PixelSample:
    """Drawn pixels of images, in their order."""

    features: list[NDArray[np.float32]]
    """Of each image, `(pixels, channels)`."""
    kelp: NDArray[np.bool_]
    """`(all pixels,)`."""
    weights: NDArray[np.float64]
    """`(all pixels,)`: how many pixels of its image each stands for."""

    def __len__(self) -> int:
        return len(self.kelp)


def draw(
    kelp: NDArray[np.bool_], observed: NDArray[np.bool_], count: int, random: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Draw pixels of an image: all of its kelp, or as much as fits beside as much of the rest.

    Args:
        kelp: `(h, w)`.
        observed: `(h, w)`; others are not drawn.
        count: pixels at most.
        random: where chance comes from.

    Returns:
        Flat places of the pixels, ascending, and how many pixels of their class each stands for:
        these weights add up to the number of observed pixels of either class.
    """
    classes = [np.flatnonzero(observed & (kelp == wanted)) for wanted in (True, False)]
    rest = min(len(classes[1]), count - min(len(classes[0]), count // 2))
    places: list[NDArray[np.intp]] = []
    weights: list[NDArray[np.float64]] = []
    for found, most in zip(classes, (count - rest, rest), strict=True):
        drawn = random.choice(found, min(len(found), most), replace=False)
        places.append(drawn)
        weights.append(np.full(len(drawn), len(found) / max(len(drawn), 1)))
    order = np.argsort(np.concatenate(places))
    return np.concatenate(places)[order], np.concatenate(weights)[order]


def samples_of(sources: Sequence[Source], config: BaselineConfig) -> Iterator[Sample]:
    """The images or tiles one after the other, read ahead by the worker processes."""
    loader = DataLoader(
        TileDataset(sources, config.band_order),
        batch_size=None,
        num_workers=min(config.num_workers, len(sources)),
        # Without one of its own a loader would draw from the caller's random numbers.
        generator=torch.Generator().manual_seed(config.seed),
    )
    try:
        yield from loader
    except KelpError as error:
        raise as_raised(error) from error


def sample_pixels(
    sources: Sequence[Source],
    preprocess: Preprocess,
    config: BaselineConfig,
    stream: int,
    progress: Progress,
) -> PixelSample:
    """Draw `--pixels_per_image` observed pixels of each image; only these are kept.

    Args:
        sources: the images or tiles.
        preprocess: makes the features, as in prediction.
        config: the options.
        stream: of random numbers; images drawn from twice need two.
        progress: called with the images done.
    """
    found: list[NDArray[np.float32]] = []
    kelp: list[NDArray[np.bool_]] = []
    weights: list[NDArray[np.float64]] = []
    for number, sample in enumerate(samples_of(sources, config)):
        truth = sample.target.numpy() == 1
        random = np.random.default_rng((config.seed, stream, number))
        places, stands_for = draw(truth, sample.observed.numpy(), config.pixels_per_image, random)
        chosen = sample.raw.flatten(1)[:, torch.from_numpy(places)]
        found.append(features(preprocess.spec, chosen[:, None].numpy()))
        kelp.append(truth.ravel()[places])
        weights.append(stands_for)
        progress("drawing pixels", number + 1, len(sources))
    return PixelSample(found, np.concatenate(kelp), np.concatenate(weights))
