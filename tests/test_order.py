"""The order of samples: bijections, streams across epochs, ranks, and values that must not move."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import BATCHES_AHEAD, batches, permute, rank_part, stream
from pipeline.stage import UserError

GOLDEN_10 = [7, 8, 2, 6, 9, 3, 0, 4, 5, 1]
GOLDEN_CELEBA = [104361, 96985, 96897, 32545, 38316]
GOLDEN_MAX = [222367140855, 19051826147]


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 11])
def test_every_small_epoch_is_a_bijection(seed: int) -> None:
    for n in range(1, 201):
        assert sorted(permute(np.arange(n), n, seed, epoch=n % 7).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 2**31 + 12_345, 2**40 - 1, 2**40])
def test_big_epochs_have_no_collisions_and_stay_in_range(n: int) -> None:
    positions = np.unique(np.random.default_rng(0).integers(0, n, 100_000))
    indices = permute(positions, n, seed=1, epoch=2)
    assert indices.min() >= 0 and indices.max() < n
    assert len(np.unique(indices)) == len(positions)


def test_golden_values() -> None:
    """A change of these reorders every resumed run."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == GOLDEN_10
    assert permute(np.arange(5), 202_599, seed=42, epoch=3).tolist() == GOLDEN_CELEBA
    assert permute(np.array([0, 2**40 - 1]), 2**40, seed=-7, epoch=1).tolist() == GOLDEN_MAX


def splitmix64_in_python(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def permute_in_python(position: int, n: int, seed: int, epoch: int) -> int:
    """The definition again, one value at a time with Python's own integers."""
    key = splitmix64_in_python(splitmix64_in_python(seed % 2**64) ^ epoch)
    bits = max(2, (n - 1).bit_length())
    while True:
        a, b = bits // 2, bits - bits // 2
        left, right = divmod(position, 2**b)
        for number in range(8):
            mixed = splitmix64_in_python(right ^ splitmix64_in_python((key + number) % 2**64))
            left, right, a, b = right, left ^ (mixed % 2**a), b, a
        position = left * 2**b + right
        if position < n:
            return position


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 2**40), st.integers(-(2**63), 2**63), st.integers(0, 2**40))
def test_agrees_with_scalar_definition(data: st.DataObject, n: int, seed: int, epoch: int) -> None:
    position = data.draw(st.integers(0, n - 1))
    assert permute(position, n, seed, epoch).item() == permute_in_python(position, n, seed, epoch)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_positions_land_everywhere_alike(n: int) -> None:
    """Chi-square over many epochs: where the first position lands, and which pair it makes."""
    drawn = np.array([permute([0, n // 2], n, seed=5, epoch=epoch) for epoch in range(2000)])
    distance = (drawn[:, 1] - drawn[:, 0]) % n - 1  # 0 .. n - 2
    for values, size in ((drawn[:, 0], n), (distance, n - 1)):
        counts = np.bincount(values * 9 // size, minlength=9)
        sizes = np.bincount(np.arange(size) * 9 // size)
        expected = 2000 * sizes / size
        assert ((counts - expected) ** 2 / expected).sum() < 37  # 8 degrees: p = 1e-5


def test_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(permute(np.arange(50), 50, seed, epoch))
        for seed, epoch in itertools.product(range(10), range(10))
    }
    assert len(orders) == 100


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_stream_is_the_concatenation_of_epochs(n: int, start: int, one: int, two: int) -> None:
    whole = stream(3, n, start, one + two)
    parts = [stream(3, n, start, one), stream(3, n, start + one, two)]
    assert whole.tolist() == np.concatenate(parts).tolist()
    epochs = np.concatenate([permute(np.arange(n), n, 3, e) for e in range(1 + 180 // n)])
    assert whole.tolist() == epochs[start : start + one + two].tolist()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_world_size_changes_no_batch(world: int) -> None:
    ranks = [batches(21, 8, rank, world, start=16, seed=9) for rank in range(world)]
    for t in range(2, 3 * BATCHES_AHEAD):
        batch = np.concatenate([next(rank) for rank in ranks])
        assert batch.tolist() == stream(9, 21, 8 * t, 8).tolist()


def test_user_errors() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        batches(10, 8, 0, 3, 0, 0)  # at once, not at the first batch
    with pytest.raises(UserError, match="at most 1,099,511,627,776"):
        batches(2**40 + 1, 8, 0, 1, 0, 0)
    with pytest.raises(UserError, match="empty"):
        batches(0, 8, 0, 1, 0, 0)
    with pytest.raises(ValueError):
        permute([3], 3, 0, 0)
    with pytest.raises(ValueError):
        permute([0], 2**40 + 1, 0, 0)
    assert rank_part(np.arange(6), 1, 3).tolist() == [2, 3]
