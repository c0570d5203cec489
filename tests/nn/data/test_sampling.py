"""Shares of several processes: together exactly what one process would draw and validate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kelp.errors import ConfigError
from kelp.nn.data.sampling import DealtBatches, EpochSampler, EvenBatches, Share
from kelp.nn.training.task import _seed

counts = st.integers(1, 7)


@given(rows=st.integers(1, 60), count=counts, weighted=st.booleans(), move=st.booleans())
def test_shares_of_an_epoch_are_the_epoch(rows, count, weighted, move):
    weights = np.linspace(0.1, 1, rows) if weighted else None
    settings = {"weights": weights, "count": 2 * rows + 1, "first_epoch": 3, "move": move}
    alone = list(EpochSampler(rows, 5, **settings))
    shares = [EpochSampler(rows, 5, share=Share(r, count), **settings) for r in range(count)]
    dealt = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(draws) for draws in dealt]
    for position, draw in enumerate(alone):
        assert dealt[position % count][position // count] == draw
    assert sum(map(len, dealt)) == len(alone)


@given(draws=st.integers(1, 200), count=counts, size=st.integers(1, 16))
def test_batches_are_as_many_for_each_process(draws, count, size):
    samplers = [EpochSampler(draws, 0, share=Share(r, count)) for r in range(count)]
    try:
        batches = [list(EvenBatches(sampler, size)) for sampler in samplers]
    except ConfigError:
        assert draws < count or (size == 1 and draws % count)
        return
    assert len({len(own) for own in batches}) == 1
    assert len(EvenBatches(samplers[0], size)) == len(batches[0])
    sizes = [len(batch) for own in batches for batch in own]
    assert min(sizes) == EvenBatches(samplers[0], size).smallest >= 1
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1 + (draws % count > 0)
    for sampler, own in zip(samplers, batches, strict=True):
        assert [draw for batch in own for draw in batch] == list(sampler)


@given(
    rows=st.integers(1, 100),
    count=counts,
    size=st.integers(1, 16),
    limit=st.none() | st.integers(1, 9),
)
def test_validation_batches_are_those_of_one_process(rows, count, size, limit):
    alone = [list(range(i, min(i + size, rows))) for i in range(0, rows, size)][:limit]
    dealt = [DealtBatches(rows, size, Share(r, count), limit) for r in range(count)]
    lists = [list(batches) for batches in dealt]
    assert {len(batches) for batches in (*dealt, *lists)} == {-(-len(alone) // count)}
    for position, batch in enumerate(alone):
        assert lists[position % count][position // count] == batch
    assert sorted(filter(None, (b for own in lists for b in own))) == alone


@pytest.mark.parametrize(
    ("draws", "size", "cause"),
    [
        (3, 8, "fewer than the 4 processes; give fewer devices"),
        (5, 1, "do not divide evenly among 4 processes; give batch_size=2"),
    ],
)
def test_too_few_samples_are_refused(draws, size, cause):
    with pytest.raises(ConfigError, match=cause):
        EvenBatches(EpochSampler(draws, 0, share=Share(0, 4)), size)


def test_the_epoch_of_batches_is_set_through_their_sampler():
    batches = EvenBatches(EpochSampler(20, 0, share=Share(1, 2)), 4)
    first = list(batches)
    batches.sampler.set_epoch(1)  # as Lightning does
    assert list(batches) != first
    loader = torch.utils.data.DataLoader(range(20), batch_sampler=batches)
    assert loader.batch_sampler.sampler is batches.sampler


def test_processes_make_random_draws_of_their_own():
    seeds = {
        _seed(42, epoch, batch, rank=(rank,) if rank else ())
        for epoch in range(4)
        for batch in range(8)
        for rank in range(8)
    }
    assert len(seeds) == 4 * 8 * 8
