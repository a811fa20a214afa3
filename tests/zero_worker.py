"""One rank of tests/test_zero.py: trains a tiny VQ-VAE under DDP, ZeRO-1 and ZeRO-2 in turn, from
the same seeds and batches, and rank 0 saves what each came to.

    torchrun --nproc_per_node 2 tests/zero_worker.py engines OUT OWN_DEEPSPEED_CONFIG
    accelerate launch --config_file configs/accelerate/zero2.yaml tests/zero_worker.py launch OUT
"""

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import nn

from pipeline.training import checkpoint, zero

ACCUMULATION, BATCH, CLIP = 2, 4, 0.02  # the gradients' norm is larger: it is clipped


class Output(NamedTuple):
    reconstructions: torch.Tensor
    commitment: torch.Tensor


class TinyVQVAE(nn.Module):
    """The smallest model with all that matters here: convolutions, an fp32 island with a codebook
    in buffers that forward never changes, and outputs in a tuple."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 7, 3, stride=2, padding=1)
        self.to_latents = nn.Conv2d(7, 5, 1)
        self.decoder = nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1)
        self.register_buffer("codebook", torch.randn(11, 5))
        self.register_buffer("counts", torch.ones(11))
        self.statistics = torch.zeros(11, 6)

    def forward(self, images):
        hidden = self.encoder(images).relu()
        with torch.autocast(hidden.device.type, enabled=False):
            latents = self.to_latents(hidden.float())
        vectors = latents.detach().movedim(1, -1).flatten(0, 2)
        codes = torch.cdist(vectors, self.codebook).argmin(1)
        ones = torch.ones(len(vectors), 1)
        self.statistics.index_add_(0, codes, torch.cat([vectors, ones], 1))
        quantized = self.codebook[codes].view_as(latents.movedim(1, -1)).movedim(-1, 1)
        commitment = (latents - quantized).square().mean()
        return Output(self.decoder(latents + (quantized - latents).detach()), commitment)

    def commit(self):
        dist.all_reduce(self.statistics)
        sums, counts = self.statistics.split([5, 1], 1)
        self.counts.lerp_(counts[:, 0], 0.1)
        used = counts[:, 0] > 0
        self.codebook[used] += 0.1 * (sums / counts - self.codebook)[used]
        self.statistics.zero_()


class Run:
    """A model, its optimizer and accelerator under one engine: ddp, zero1, zero2 or a file."""

    def __init__(self, engine: str, seed: int, precision: str = "no"):
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false" if engine == "ddp" else "true"
        file = engine if engine.endswith(".json") else f"configs/deepspeed/{engine}.json"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = file
        AcceleratorState._reset_state(True)
        gloo = InitProcessGroupKwargs(backend="gloo")
        if engine == "ddp":
            handlers = [gloo, DistributedDataParallelKwargs(broadcast_buffers=False)]
            self.accelerator = Accelerator(
                cpu=True, kwargs_handlers=handlers, gradient_accumulation_steps=ACCUMULATION
            )
        else:
            self.accelerator = Accelerator(
                kwargs_handlers=[gloo], gradient_accumulation_steps=ACCUMULATION,
                deepspeed_plugin=zero.make_plugin(),
            )  # fmt: skip
        torch.manual_seed(seed)
        self.model = TinyVQVAE().to(memory_format=torch.channels_last)
        adam = torch.optim.Adam(self.model.parameters(), lr=1.0, fused=True)
        if zero.is_zero(self.accelerator):
            zero.configure(self.accelerator, self.model, BATCH, CLIP)
        self.trained, self.optimizer = self.accelerator.prepare(self.model, adam)
        assert zero.is_partitioned(self.optimizer) == (engine != "ddp")

    def loss(self, step: int, micro: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
        images = torch.rand(BATCH, 3, 8, 8, generator=generator)
        images = images.contiguous(memory_format=torch.channels_last)
        output = self.trained(images)
        assert output.reconstructions.dtype == torch.float32
        return (output.reconstructions - images).square().mean() + output.commitment

    def step(self, step: int, scale: float = 1.0) -> tuple[float, float]:
        """One optimizer step and codebook commit; the mean loss on this rank, and the norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        total = 0.0
        for micro in range(ACCUMULATION):
            with self.accelerator.accumulate(self.trained):
                loss = self.loss(step, micro) * scale
                self.accelerator.backward(loss)
            total += loss.item() / ACCUMULATION
        norm = float(self.accelerator.clip_grad_norm_(self.trained.parameters(), CLIP))
        if not math.isfinite(norm):
            self.discard()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.commit()
        return total, norm

    def discard(self) -> None:
        if zero.is_partitioned(self.optimizer):
            zero.discard_gradients(self.optimizer)
        else:
            self.optimizer.zero_grad()
        self.model.statistics.zero_()

    def skipped_step(self) -> None:
        """The first micro-batch is accumulated, with the second all ranks see that a loss of one
        was not finite."""
        with self.accelerator.accumulate(self.trained):
            loss = self.loss(50, 0) * (float("nan") if dist.get_rank() else 1000)
            self.accelerator.backward(loss)
        with self.accelerator.accumulate(self.trained):
            self.loss(50, 1)
            self.discard()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds of this run."""
        if zero.is_partitioned(self.optimizer):
            moments = zero.optimizer_tensors(self.optimizer, self.model)
        else:
            moments = checkpoint.optimizer_tensors(self.optimizer, self.model)
        state = {"model": self.model.state_dict(), "optimizer": moments}
        return {file: {k: t.detach().clone() for k, t in x.items()} for file, x in state.items()}

    def load(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        # Adam would go on counting in the given tensors
        tensors = {file: {k: t.clone() for k, t in x.items()} for file, x in tensors.items()}
        self.model.load_state_dict(tensors["model"])
        if zero.is_partitioned(self.optimizer):
            zero.load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        else:
            checkpoint.load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])


def engines(own_config: str) -> tuple[dict, dict]:
    """Everything that test_zero.py compares: snapshots of tensors, and plain values."""
    tensors: dict = {}
    values: dict = {}
    for engine in ("ddp", "zero1", "zero2"):
        run, curve = Run(engine, seed=0), []
        tensors[f"{engine} untrained"] = run.tensors()
        for step in range(4):
            if step == 2:
                run.skipped_step()
            curve.append(run.step(step))
        tensors[f"{engine} trained"] = run.tensors()
        overflow = run.step(4, scale=float("inf"))
        tensors[f"{engine} after an overflow"] = run.tensors()
        curve.append(run.step(5))
        numel = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
        values[engine] = {"curve": curve, "overflow": str(overflow[1]), "stepped here": numel}

    # from hand to hand, each time into a fresh run with other weights
    passed = copy.deepcopy(tensors["ddp trained"])
    passed["optimizer"]["encoder.weight.exp_avg"][0] = -0.0  # bit for bit: the sign as well
    for name in ("ddp", "zero1", own_config, "zero2", "ddp again"):
        run = Run(name.removesuffix(" again"), seed=1)
        run.load(passed)
        name = "own" if name == own_config else name
        tensors[f"{name} loaded"] = passed = run.tensors()
        curve = [run.step(step) for step in (4, 5)]
        values[f"{name} resumed"] = {"curve": curve}
        tensors[f"{name} resumed"] = run.tensors()

    # a run that has stepped before takes a checkpoint too, and an untrained one
    run = Run("zero2", seed=1)
    run.step(9)
    run.load(passed)
    values["zero2 reset resumed"] = {"curve": [run.step(step) for step in (4, 5)]}
    run.load(tensors["ddp untrained"])
    tensors["zero2 reset untrained"] = run.tensors()

    for engine in ("ddp", "zero1", "zero2", own_config):
        run, seen = Run(engine, seed=0, precision="bf16"), []
        run.model.decoder.register_forward_hook(lambda m, i, o, s=seen: s.append(str(o.dtype)))
        curve = [run.step(step) for step in range(3)]
        name = "own" if engine == own_config else engine
        values[f"{name} bf16"] = {"curve": curve, "compute": sorted(set(seen))}
        tensors[f"{name} bf16"] = run.tensors()
    return tensors, values


def launch() -> tuple[dict, dict]:
    """One step under what the launcher chose."""
    gloo = InitProcessGroupKwargs(backend="gloo")
    accelerator = Accelerator(kwargs_handlers=[gloo], deepspeed_plugin=zero.make_plugin())
    model, seen = TinyVQVAE(), []
    zero.configure(accelerator, model, BATCH, CLIP)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    trained, optimizer = accelerator.prepare(model, adam)
    model.decoder.register_forward_hook(lambda module, i, o: seen.append(str(o.dtype)))
    output = trained(torch.rand(BATCH, 3, 8, 8))
    accelerator.backward(output.reconstructions.square().mean() + output.commitment)
    moments = zero.optimizer_tensors(optimizer, model)
    return {"launch": {"model": model.state_dict(), "optimizer": moments}}, {
        "stage": trained.zero_optimization_stage(),
        "processes": accelerator.num_processes,
        "compute": seen,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, out, *arguments = sys.argv[1:]
    tensors, values = {"engines": engines, "launch": launch}[mode](*arguments)
    if dist.get_rank() == 0:
        flat = {
            f"{snapshot}/{file}/{name}": tensor.contiguous()
            for snapshot, files in tensors.items()
            for file, group in files.items()
            for name, tensor in group.items()
        }
        save_file(flat, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps(values))
    dist.barrier()
    dist.destroy_process_group()
