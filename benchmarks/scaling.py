"""What a training step moves and keeps on 8 to 1,024 GPUs: worked out from the configs, not run.

    python benchmarks/scaling.py --json docs/benchmarks/scaling.json

Parameters, buffers and floating-point operations are counted on the networks of configs/celeba256.
The rest are the formulas below, with the ASSUMPTIONS.
docs/scaling.md is written from the figures (benchmarks/results.py).
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import ROOT, print_table, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

try:
    from pipeline import stage
    from pipeline.models.priors import make_prior
    from pipeline.models.vqvae import VQVAE
    from pipeline.train_prior import TrainPrior
    from pipeline.train_vqvae import TrainVQVAE
except ModuleNotFoundError as error:  # a bare interpreter has what kernels and models need
    print(f"scaling is left out: it needs {error.name}")
    sys.exit(0)

GPUS = (8, 64, 256, 1024)
FLOAT = 4  # bytes: weights, gradients, moments and codebooks are fp32
ASSUMPTIONS = {
    "gpus_per_node": 8,
    "nvlink_gb_per_sec": 450,  # H100 SXM, one direction of 900: its data sheet
    "network_gb_per_sec": 50,  # one 400 Gb/s port per GPU: ConnectX-7's data sheet
    "hop_microseconds": 5,  # of a collective; our guess
    "peak_tflops": 989,  # H100 SXM, dense bf16: its data sheet
    "utilisation": 0.3,  # share of the peak that training reaches; our guess
    "disk_gb_per_sec": 1,  # one writer on a shared file system; our guess
}
BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # DistributedDataParallel's defaults
CONTROL_BYTES = 3 * 4  # pipeline/training/control.py: int32 non-finite, stop, faulty rank


class Network(NamedTuple):
    """What the formulas need of a model and its config."""

    name: str
    parameters: int
    buffers: int  # codebooks with their counts and sums
    statistics: int  # floats that are summed over the ranks in every step
    training_flop: float  # per image
    batch_size: int


def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce, or in a reduce-scatter and an all-gather:
    2 (n - 1) / n of the buffer (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def kept_bytes(parameters: int, ranks: int, engine: str) -> float:
    """Bytes a rank keeps between steps: weights, their average, gradient, Adam's two moments, and
    under ZeRO the copy of the part it steps (Rajbhandari et al. 2020, section 5)."""
    whole = {"ddp": 5, "zero1": 3, "zero2": 2}[engine]  # tensors as large as the weights
    in_parts = {"ddp": 0, "zero1": 3, "zero2": 4}[engine]
    return FLOAT * parameters * (whole + in_parts / ranks)


def checkpoint_bytes(network: Network) -> int:
    """Model and average with their buffers, and two moments."""
    return FLOAT * (4 * network.parameters + 2 * network.buffers)


def num_messages(network: Network) -> int:
    """Collectives of a step under DDP: buckets of gradients, control word, codebooks."""
    rest = FLOAT * network.parameters - FIRST_BUCKET_BYTES
    return 1 + math.ceil(max(0, rest) / BUCKET_BYTES) + 1 + (network.statistics > 0)


def step_row(network: Network, ranks: int) -> dict[str, Any]:
    """Bytes, memory and estimated milliseconds of one step on one of `ranks` GPUs."""
    a = ASSUMPTIONS
    gradients = ring_bytes(FLOAT * network.parameters, ranks)
    statistics = ring_bytes(FLOAT * network.statistics, ranks)
    link = a["nvlink_gb_per_sec"] if ranks <= a["gpus_per_node"] else a["network_gb_per_sec"]
    sent = gradients + statistics + ring_bytes(CONTROL_BYTES, ranks)
    hops = num_messages(network) * a["hop_microseconds"] * 1e-3
    images = network.batch_size / ranks
    milliseconds = {
        "compute": 1e3 * images * network.training_flop / seconds_flop(),
        "bandwidth": 1e3 * sent / (link * 1e9),
        "latency": 2 * math.ceil(math.log2(ranks)) * hops,  # of trees, as NCCL's for small buffers
    }
    slowest = max(milliseconds, key=lambda name: milliseconds[name])
    return {
        "topic": "step", "model": network.name, "gpus": ranks, "images_per_gpu": images,
        "gradient_mb": gradients / 1e6, "codebook_kb": statistics / 1e3,
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        "ring_latency_ms": 2 * (ranks - 1) * hops,
        **{
            f"{engine}_gb": kept_bytes(network.parameters, ranks, engine) / 1e9
            for engine in ("ddp", "zero1", "zero2")
        },
        "limit": slowest if images >= 1 else "batch size",
    }  # fmt: skip


def seconds_flop() -> float:
    """Floating-point operations that a GPU does in a second."""
    return ASSUMPTIONS["peak_tflops"] * 1e12 * ASSUMPTIONS["utilisation"]


def model_row(network: Network) -> dict[str, Any]:
    size = checkpoint_bytes(network)
    return {
        "topic": "model", "model": network.name, "parameters": network.parameters,
        "batch_size": network.batch_size, "training_gflop": network.training_flop / 1e9,
        "messages": num_messages(network), "checkpoint_gb": size / 1e9,
        "checkpoint_sec": size / 1e9 / ASSUMPTIONS["disk_gb_per_sec"],
        "images_per_sec_per_gpu": seconds_flop() / network.training_flop,
    }  # fmt: skip


def data_row(size: int) -> dict[str, Any]:
    """The uint8 cache of a million images."""
    return {"topic": "cache", "size": size, "cache_gb": 1e6 * size * size * 3 / 1e9}


# Counting.


def forward_flop(module: nn.Module, **inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()


def parse(stage_config: type, name: str) -> Any:
    file = ROOT / "configs/celeba256" / f"{name}.yaml"
    paths = ("data", "out") if stage_config is TrainVQVAE else ("codes", "out")
    return stage.parse(stage_config, [f"--config={file}", *(f"--{path}=-" for path in paths)])


def count(module: nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "buffers": sum(b.numel() for b in module.buffers()),
    }


def networks() -> list[Network]:
    """The models of configs/celeba256; a backward pass costs twice the forward pass."""
    config = parse(TrainVQVAE, "train_vqvae")
    size, sizes, dim = config.image_size, config.model.codebook_sizes, config.model.code_dim
    grids = config.model.grids(size, size)
    vqvae = VQVAE(config.model)  # with memory, because its look-up has no form without
    found = [
        Network(
            name="VQ-VAE", **count(vqvae), batch_size=config.batch_size,
            # counts (K,), sums (K, D) and candidates (K, D) of every level
            statistics=sum(codes * (1 + 2 * dim) for codes in sizes),
            training_flop=3 * forward_flop(vqvae, images=torch.rand(1, 3, size, size)),
        )
    ]  # fmt: skip
    for level, grid in enumerate(grids):
        config = parse(TrainPrior, f"train_prior_level{level}")
        model_config = dataclasses.replace(
            config.model, grid=grid, codebook_size=sizes[level],
            coarser_codebook_sizes=sizes[:level], num_attributes=40,
        )  # fmt: skip
        with torch.device("meta"):
            prior = make_prior(model_config)
            codes = [torch.zeros(1, *g, dtype=torch.int64) for g in grids]
            flop = forward_flop(
                prior, codes=codes[level], coarser=codes[:level],
                attributes=torch.zeros(1, 40),
            )  # fmt: skip
        passes = 4 if config.checkpoint_activations else 3
        found.append(
            Network(
                name=f"prior, level {level}", **count(prior), batch_size=config.batch_size,
                statistics=0, training_flop=passes * flop,
            )
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    path = parser.parse_args().json
    found = networks()
    models = [model_row(network) for network in found]
    steps = [step_row(network, ranks) for network in found for ranks in GPUS]
    caches = [data_row(size) for size in (64, 128, 256)]
    for rows in (models, steps, caches):
        print_table(rows[0]["topic"], rows)
    write_json(path, [*models, *steps, *caches], "cpu", assumptions=ASSUMPTIONS)


if __name__ == "__main__":
    main()
