"""Nearest-code look-up: this repository's against the ways that peers write it.

    python benchmarks/nearest_code.py --json runs/bench/nearest_code.json
    python benchmarks/nearest_code.py --device cuda --json runs/bench/nearest_code-cuda.json

All contenders run in one process, interleaved, after their results were checked: a contender whose
codes are not nearest (up to fp32 rounding of the distances) gets no time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from kernels import nearest_code

CASES = [(4096, 64, 512), (32768, 64, 512), (16384, 256, 2048)]  # N, D, K


def cdist_argmin(latents, codebook):
    return torch.cdist(latents, codebook).argmin(1)


def expanded(latents, codebook):
    """The expression of the best-known VQ-VAE-2 port."""
    distances = latents.pow(2).sum(1, keepdim=True) - 2 * latents @ codebook.T
    return (-(distances + codebook.pow(2).sum(1))).max(1)[1]


CONTENDERS = {"ours": nearest_code, "cdist + argmin": cdist_argmin, "expanded": expanded}


def timed(function, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def is_nearest(codes, latents, codebook) -> bool:
    distances = torch.cdist(latents[:2048].double(), codebook.double())
    chosen = distances.gather(1, codes[:2048, None])[:, 0]
    return bool((chosen - distances.min(1).values).max() < 1e-4)


def measure(case, device: str, rounds: int) -> list[dict]:
    count, dim, size = case
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(count, dim, device=device, generator=generator)
    codebook = torch.randn(size, dim, device=device, generator=generator)
    right = {n: is_nearest(f(latents, codebook), latents, codebook) for n, f in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, function in CONTENDERS.items():
            times[name].append(timed(lambda f=function: f(latents, codebook), device))
    rows = []
    for name, found in times.items():
        row = {"contender": name, "case": str(case), "device": device, "extrapolated": False}
        if right[name]:
            row |= {"median_ms": statistics.median(found), "min_ms": min(found)}
        rows.append(row)
    return rows


def environment() -> dict:
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "command": " ".join(sys.argv), "commit": commit, "torch": torch.__version__,
        "device": device, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=20, help="interleaved repeats")
    arguments = parser.parse_args()
    rows = [row for case in CASES for row in measure(case, arguments.device, arguments.rounds)]
    for row in rows:
        ours = next(r for r in rows if r["case"] == row["case"] and r["contender"] == "ours")
        if "median_ms" in row:
            ratio = row["median_ms"] / ours["median_ms"]
            print(
                f"{row['case']:>20} {row['contender']:>16} {row['median_ms']:9.2f} ms {ratio:6.2f}x"
            )
        else:
            print(f"{row['case']:>20} {row['contender']:>16}  wrong codes, not timed")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "rows": rows}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
