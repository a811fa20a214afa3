"""Processes and devices: one Accelerator, made in one place."""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipeline.stage import UserError, is_rank_zero
from pipeline.training import zero
from pipeline.training.control import MARGIN_SEC, rank_timeout_sec


def make_accelerator(accumulation: int = 1, timeout_sec: float | None = None) -> Accelerator:
    """The Accelerator for this launch: CUDA with NCCL where there is a GPU, else CPU with gloo.

    A step is made of `accumulation` micro-batches. Buffers are not broadcast: codebooks are kept
    identical by their own all-reduced statistics, and a broadcast would hide a fault in them.

    Args:
        timeout_sec: the longest that a process waits for the others; RANK_TIMEOUT_SEC by default.
    """
    cpu = not torch.cuda.is_available()
    handlers: list[Any] = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ]
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("mixed precision fp16 is not supported, use bf16: --mixed_precision bf16")
    if cpu:
        warn_of_emulated_bf16()
    zero_plugin = zero.make_plugin() if zero.is_requested() else None
    seconds = timeout_sec or rank_timeout_sec() + MARGIN_SEC
    if zero_plugin or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend, timeout = "gloo" if cpu else "nccl", timedelta(seconds=seconds)
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    try:
        return Accelerator(
            cpu=cpu and not zero_plugin,  # with cpu=True accelerate ignores DeepSpeed
            kwargs_handlers=handlers,
            gradient_accumulation_steps=accumulation,
            deepspeed_plugin=zero_plugin,
        )
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"not all processes came within {seconds:g} s (see RANK_TIMEOUT_SEC): {error}"
        ) from error


def warn_of_emulated_bf16() -> None:
    """A line from the first process if bf16 is asked of an x86 CPU without AVX-512: convolutions
    take some 15 times as long there as in fp32 (docs/experiments.md)."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    instructions = torch.backends.cpu.get_cpu_capability()
    if asked and instructions in ("NO AVX", "AVX2") and is_rank_zero():
        print(
            f"warning: bf16 is emulated on this CPU ({instructions}) and many times slower than "
            "fp32: --mixed_precision no, or unset ACCELERATE_MIXED_PRECISION",
            file=sys.stderr,
        )


def check_global_batch(batch_size: int, world_size: int, accumulation: int = 1) -> None:
    """Raises UserError unless every process gets the same share of a global batch, in equal
    micro-batches."""
    if batch_size % (world_size * accumulation):
        parts = f"{world_size} processes" + (f" x {accumulation} micro-batches") * (
            accumulation > 1
        )
        raise UserError(
            f"batch_size {batch_size} is the global batch and must be divisible by the {parts}"
        )


def unwrap(accelerator: Accelerator, model: Any) -> Any:
    """The module inside DDP and compile wrappers, so that no key ever starts with `module.`."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)
