"""What several processes do together; with one process there is nothing to do."""

import json
from typing import Any

import torch
import torch.distributed as dist


def alone() -> bool:
    """True with one process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Sums a tensor over all processes in place; nothing to do with one process."""
    if not alone():
        dist.all_reduce(tensor)


def all_reduce_max(tensor: torch.Tensor) -> None:
    """The largest of each element over all processes, in place."""
    if not alone():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def share(value: Any, source: int, device: torch.device) -> Any:
    """A JSON value of the rank `source`, on all ranks."""
    if alone():
        return value
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, source)
    if dist.get_rank() != source:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, source)
    return json.loads(bytes(data.tolist()))


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of `count` items; the parts differ by at most one item."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
