"""Batches in the stream's order: same samples for any number of ranks and workers.

The loader's whole state is one integer, the samples consumed so far (see pipeline.data.order).
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline import stage
from pipeline.data.order import batches
from pipeline.stage import UserError

Fetch = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class _Fetched(Dataset):
    """Hands a whole batch of indices to `fetch` at once."""

    def __init__(self, fetch: Fetch, count: int):
        self.fetch, self.count = fetch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("batches are fetched whole")

    def __getitems__(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | UserError:
        try:
            return self.fetch(np.asarray(indices))
        except UserError as error:
            return error  # raised in the worker it would come with a traceback in its text


def _to_tensors(batch: Any) -> dict[str, torch.Tensor] | UserError:
    if isinstance(batch, UserError):
        return batch
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def training_batches(
    fetch: Fetch,
    count: int,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of this rank, from the global batch that begins at stream position `start`.

    Args:
        fetch: indices (b,) int64 -> named arrays of length b; picklable if workers > 0.
        count: samples in an epoch.
        batch_size: the global batch; this rank gets batch_size / world_size of it.
        start: samples consumed so far, a multiple of batch_size.

    Raises UserError at the batch whose `fetch` raised it, with any number of workers.
    """
    loader = DataLoader(
        _Fetched(fetch, count),
        batch_sampler=_Endless(count, batch_size, rank, world_size, start, seed),
        collate_fn=_to_tensors,
        num_workers=workers,
        worker_init_fn=stage.ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )
    before = multiprocessing.active_children()
    iterator = iter(loader)
    started = [child for child in multiprocessing.active_children() if child not in before]
    if started:
        Finalize(None, _kill, [started], exitpriority=1)
    return _checked(iterator)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """At the exit of a process that left its workers behind: they ignore the SIGTERM by which
    Python ends them then, before it waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch has something to say about it
    for worker in workers:
        worker.kill()


def _checked(iterator: Iterator[Any]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        batch = next(iterator)
        if isinstance(batch, UserError):
            del iterator  # ends the workers; the error's traceback would keep it
            raise batch
        yield batch


class _Endless:
    """The batch sampler: this rank's index arrays, for ever."""

    def __init__(self, *order: int):
        self.order = order

    def __iter__(self) -> Iterator[Any]:
        return batches(*self.order)
