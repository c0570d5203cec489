"""Which rows an epoch draws, in which order, and how several processes share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from kelp.errors import ConfigError
from kelp.nn.data.dataset import Draw


@dataclass(frozen=True)
class Share:
    """The part of one process: of `count` things dealt out in turn, those of number `rank`."""

    rank: int = 0
    count: int = 1


ALL: Final = Share()
"""The part of a process that is alone."""


class EpochSampler(Sampler[Draw]):
    """Rows of an epoch. Which ones, and their order, follow from the seed and the epoch alone.

    With weights, `count` rows are drawn with replacement; without, each comes once, shuffled.
    With `move`, each window is drawn anywhere up to half a tile from its place.
    Several processes make the same draws, and each keeps those of its `share`.
    Lightning calls `set_epoch`, but only after the workers of a resumed run have begun to
    read: hence `first_epoch`.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        weights: NDArray[np.float64] | None = None,
        count: int | None = None,
        first_epoch: int = 0,
        move: bool = False,
        share: Share = ALL,
    ) -> None:
        self.rows = rows
        self.move = move
        self.seed = seed
        self.count = rows if weights is None or count is None else count
        """Draws of all processes."""
        self.chances = None if weights is None else weights / weights.sum()
        self.epoch = first_epoch
        self.share = share

    def __len__(self) -> int:
        return len(range(self.share.rank, self.count, self.share.count))

    def __iter__(self) -> Iterator[Draw]:
        random = np.random.default_rng((self.seed, self.epoch))
        if self.chances is None:
            drawn = random.permutation(self.rows)
        else:
            drawn = random.choice(self.rows, size=self.count, p=self.chances)
        moves = random.uniform(-1, 1, (len(drawn), 2)) if self.move else np.zeros((len(drawn), 2))
        own = slice(self.share.rank, None, self.share.count)
        return (
            Draw(row, down, right)
            for row, (down, right) in zip(drawn[own].tolist(), moves[own].tolist(), strict=True)
        )

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`."""
        self.epoch = epoch


class EvenBatches(Sampler[list[Draw]]):
    """The draws of one process in as many batches as every other process has.

    Processes step together, so one batch too few would leave the others waiting. Sizes differ by
    one at most, and none is above `size`.

    Raises:
        ConfigError: a process would have a batch without a draw.
    """

    def __init__(self, sampler: EpochSampler, size: int) -> None:
        self.sampler = sampler  # Lightning looks for it under this name, to set the epoch
        most = -(-sampler.count // sampler.share.count)
        self.batches = -(-most // size)
        self.smallest = sampler.count // sampler.share.count // self.batches
        """Draws in the smallest batch of any process."""
        if sampler.count < sampler.share.count:
            raise ConfigError(
                f"--devices: an epoch has {sampler.count} samples, fewer than the "
                f"{sampler.share.count} processes; give fewer --devices"
            )
        if not self.smallest:
            raise ConfigError(
                f"--batch_size {size}: the {sampler.count} samples of an epoch do not "
                f"divide evenly among {sampler.share.count} processes; give --batch_size 2"
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        ends = [len(draws) * k // self.batches for k in range(self.batches + 1)]
        return (draws[start:end] for start, end in pairwise(ends))


class DealtBatches(Sampler[list[int]]):
    """Rows in order, in the batches of a process that is alone, dealt out in turn.

    Every row comes once among all processes. Their batches are as many for each: where they do
    not go round, the last of a process is empty.

    Args:
        rows: how many there are.
        size: of a batch.
        share: of this process.
        limit: batches at most, of all processes together.
    """

    def __init__(self, rows: int, size: int, share: Share, limit: int | None = None) -> None:
        self.size = size
        self.share = share
        starts = range(0, rows, size)
        self.starts = starts if limit is None else starts[:limit]
        self.rows = rows

    def __len__(self) -> int:
        return -(-len(self.starts) // self.share.count)

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(len(self)):
            start = self.size * (k * self.share.count + self.share.rank)
            dealt = start in self.starts
            yield list(range(start, min(start + self.size, self.rows))) if dealt else []
