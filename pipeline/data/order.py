"""The order of training samples: a keyed bijection per epoch, computed per position.

Nothing is stored and nothing is shuffled in memory: sample number p of the epoch is
`permute(p, n, seed, epoch)`. The stream is the concatenation of the epochs; global batch t is
positions [tB, (t + 1)B) of it, and every rank takes its contiguous part. So the world size and the
number of workers change nothing about which samples form a batch, a batch may cross an epoch's
end, and the whole state of a loader is one integer: samples consumed.

The arithmetic below is part of the format: a change reorders every resumed run.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.stage import UserError

MAX_SAMPLES = 2**40
BATCHES_AHEAD = 16
NUM_ROUNDS = 8  # even, so that the two halves end with the widths they began with

_MASK64 = 2**64 - 1


def splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood's splitmix64 step of uint64 values, arithmetic modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """(NUM_ROUNDS,) uint64: key k is mix(mix(mix(seed) ^ epoch) + k)."""
    # arrays of one element, because numpy warns of overflow in scalars only
    key = splitmix64(np.array([seed & _MASK64], np.uint64))
    key = splitmix64(key ^ np.array([epoch & _MASK64], np.uint64))
    return splitmix64(key + np.arange(NUM_ROUNDS, dtype=np.uint64))


def _feistel(
    x: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """A bijection of [0, 2^bits): an unbalanced Feistel network, bits >= 2."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64(2**right_bits - 1)
    for key in keys:
        mixed = splitmix64(right ^ key) & np.uint64(2**left_bits - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def permute(positions: npt.ArrayLike, n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Sample indices at `positions` of an epoch: a bijection of [0, n) keyed by (seed, epoch).

    positions: any shape, integers in [0, n); 1 <= n <= 2^40. Cycle walking: the network permutes
    the next power of two (below 2n), and values that fall outside [0, n) go through it again.
    """
    if not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"n must be in 1..2^40, not {n}")
    positions = np.asarray(positions, np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < n:
        raise ValueError(f"positions must be in [0, {n})")
    bits, keys = max(2, (n - 1).bit_length()), round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64).ravel(), bits, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64).reshape(positions.shape)


def _feistel_inverse(
    x: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64(2**right_bits - 1)
    for key in keys[::-1]:
        left_bits, right_bits = right_bits, left_bits
        mixed = splitmix64(left ^ key) & np.uint64(2**left_bits - 1)
        left, right = right ^ mixed, left
    return (left << np.uint64(right_bits)) | right


def positions_of(indices: npt.ArrayLike, n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The positions in an epoch at which samples (m,) come: the inverse of `permute`."""
    bits, keys = max(2, (n - 1).bit_length()), round_keys(seed, epoch)
    values = _feistel_inverse(np.asarray(indices, np.int64).astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel_inverse(values[outside], bits, keys)
    return values.astype(np.int64)


def uses(indices: npt.ArrayLike, n: int, seed: int, seen: int) -> int:
    """How often samples (m,), of n in an epoch, are among the first `seen` of the stream."""
    epochs, part = divmod(seen, n)
    in_part = positions_of(indices, n, seed, epochs) < part
    return epochs * np.size(indices) + int(in_part.sum())


def stream(seed: int, n: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """(count,) sample indices at positions [start, start + count) of the concatenated epochs."""
    parts, end = [np.empty(0, np.int64)], start + count
    while start < end:
        epoch, first = divmod(start, n)
        last = min(n, first + end - start)
        parts.append(permute(np.arange(first, last), n, seed, epoch))
        start += last - first
    return np.concatenate(parts)


def rank_part(batch_indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """This rank's contiguous part of a global batch; the parts concatenate to the batch."""
    size = len(batch_indices)
    if size % world:
        raise UserError(
            f"a batch of {size} images does not divide into {world} processes: "
            f"choose a batch size that is a multiple of {world}"
        )
    return batch_indices[rank * size // world : (rank + 1) * size // world]


def batches(
    n: int, batch_size: int, rank: int, world: int, start: int, seed: int
) -> Iterator[npt.NDArray[np.int64]]:
    """This rank's (batch_size / world,) indices of each global batch, without end.

    start: samples consumed so far by all ranks together. Raises UserError at once (not at the
    first batch) where batch_size is not a multiple of world or there are no samples.
    """
    if n < 1:
        raise UserError("there are no images to train on: the split is empty")
    if n > MAX_SAMPLES:
        raise UserError(f"{n:,} images: an order is for at most {MAX_SAMPLES:,}")
    rank_part(np.empty(batch_size), rank, world)

    def generate() -> Iterator[npt.NDArray[np.int64]]:
        position = start
        while True:
            # several at once: for few indices numpy's calls take longer than its arithmetic
            ahead = stream(seed, n, position, BATCHES_AHEAD * batch_size)
            for batch in ahead.reshape(BATCHES_AHEAD, batch_size):
                yield rank_part(batch, rank, world)
            position += len(ahead)

    return generate()
