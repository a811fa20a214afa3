"""Batches: complete, in order, and the same for any number of ranks and loader workers."""

import numpy as np
import pytest

from pipeline.data.loader import training_batches


class Identity:
    """Fetches the indices themselves."""

    def __call__(self, indices):
        return {"index": np.asarray(indices)}


def take(steps, **options):
    """The first `steps` batches of each rank, (steps, world, b)."""
    world = options.pop("world_size", 1)
    ranks = [
        training_batches(
            Identity(), 37, batch_size=12, seed=5, rank=rank, world_size=world, **options
        )
        for rank in range(world)
    ]
    return np.array([[next(rank)["index"].numpy() for rank in ranks] for _ in range(steps)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_change_nothing(world_size, workers):
    expected = take(8).reshape(8, 12)
    got = take(8, world_size=world_size, workers=workers)
    assert np.array_equal(got.reshape(8, 12), expected)


def test_every_sample_once_per_epoch_over_several_epochs():
    order = take(37).reshape(-1)  # 12 epochs of 37 in 37 batches of 12
    for epoch in order.reshape(12, 37):
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in order.reshape(12, 37)}) == 12


def test_the_position_is_one_integer():
    whole = take(10)
    assert np.array_equal(
        take(4, start=6 * 12, world_size=2).reshape(4, 12), whole[6:].reshape(4, 12)
    )
