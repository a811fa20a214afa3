"""What several processes do together; with one process there is nothing to do."""

import torch
import torch.distributed as dist


def alone() -> bool:
    """True with one process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Sums a tensor over all processes in place; nothing to do with one process."""
    if not alone():
        dist.all_reduce(tensor)


def all_true(flag: torch.Tensor) -> bool:
    """Whether a boolean scalar is true on every process; the answer is the same on all of them."""
    false = (~flag).float()
    all_reduce_sum(false)
    return not float(false)


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of `count` items; the parts differ by at most one item."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
