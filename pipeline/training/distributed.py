"""Processes and devices: one Accelerator, made in one place, and a few collective helpers."""

import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipeline.stage import UserError


def make_accelerator(timeout_sec: int = 600) -> Accelerator:
    """The Accelerator for this launch: CUDA with NCCL where there is a GPU, else CPU with gloo.

    Buffers are not broadcast: codebooks are kept identical by their own all-reduced statistics,
    and a broadcast inside forward would hide a fault in them.
    """
    cpu = not torch.cuda.is_available()
    handlers: list[Any] = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend, timeout = "gloo" if cpu else "nccl", timedelta(seconds=timeout_sec)
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    return Accelerator(cpu=cpu, kwargs_handlers=handlers)


def check_global_batch(batch_size: int, world_size: int) -> None:
    """Raises UserError unless every process gets the same share of a global batch."""
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} is the global batch and must be divisible by the "
            f"{world_size} processes"
        )


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Sums a tensor over all processes in place; nothing to do with one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)


def check_finite(gradient_norm: torch.Tensor | float | None) -> None:
    """Raises UserError on every rank, before anything is updated, if a gradient is not finite.

    The norm is that of the averaged gradients, so all ranks see the same one.
    """
    if gradient_norm is not None and not math.isfinite(float(gradient_norm)):
        raise UserError(
            "training diverged: the gradient is not finite; lower --learning_rate and start again, "
            "the newest checkpoint has the last good state"
        )


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of `count` items; the parts differ by at most one item."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def unwrap(accelerator: Accelerator, model: Any) -> Any:
    """The module inside DDP and compile wrappers, so that no key ever starts with `module.`."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)
