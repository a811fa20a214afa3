"""What a training run will cost, from ten real steps, before anyone waits for it."""

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.training.checkpoint import KEEP


def peak_memory_gib() -> float:
    """The most memory that tensors on the GPU, or without one the process, have taken so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def report_dry_run(
    step: Callable[[], object],
    model: nn.Module,
    batch_size: int,
    total_images: int,
    save_every: int,
    accelerator,
) -> None:
    """Runs ten steps and prints parameters, peak memory, disk for checkpoints, images/s, time.

    Args:
        step: one training step on this rank's part of a batch.
        batch_size: images of a global batch.
    """
    step()  # the first step also allocates and tunes
    start = time.perf_counter()
    for _ in range(10):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 10
    rate = batch_size / seconds
    # a checkpoint holds the weights, their average and Adam's two moments
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    parameters = sum(p.numel() for p in model.parameters())
    saves = min(KEEP + 1, 2 + (total_images // save_every if save_every else 0))
    if accelerator.is_main_process:
        print(f"parameters      {parameters:,}")
        print(f"memory          {peak_memory_gib():.2f} GiB at the peak of one process")
        print(f"disk            {saves * 4 * state / 2**30:.2f} GiB in {saves} checkpoints")
        print(f"speed           {rate:.1f} images/s on {accelerator.num_processes} process(es)")
        print(f"time to the end {total_images / rate / 3600:.2f} h for {total_images:,} images")
