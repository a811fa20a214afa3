"""Per-code counts and sums of latents: this repository's against atomics and one-hot matrices.

    python benchmarks/codebook_sums.py --json runs/bench/codebook_sums-cpu.json
    python benchmarks/codebook_sums.py --device cuda --json runs/bench/codebook_sums-cuda.json

`error` is the largest error of a sum, against float64, relative to the sum of the magnitudes;
`repeatable` says whether two calls gave the same bits. Shapes: N rows, D dimensions, K codes.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import CASES, Bench, Call
from torch.nn import functional as F

from kernels import codebook_sums

COLLAPSED = {"cpu": [(32768, 64, 512)], "cuda": [(32768, 64, 512), (524288, 64, 512)]}
TOLERANCE = 1e-5


def ours(latents, codes, size: int) -> Call:
    return lambda: codebook_sums(latents, codes, size)


def index_add(latents, codes, size: int) -> Call:
    ones = torch.ones_like(codes)

    def call():
        counts = codes.new_zeros(size).index_add_(0, codes, ones)
        return counts, latents.new_zeros(size, latents.shape[1]).index_add_(0, codes, latents)

    return call


def index_add_deterministic(latents, codes, size: int) -> Call:
    add = index_add(latents, codes, size)

    def call():
        torch.use_deterministic_algorithms(True)
        try:
            return add()
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def one_hot(latents, codes, size: int) -> Call:
    def call():
        chosen = F.one_hot(codes, size).type(latents.dtype)
        return chosen.sum(0), chosen.T @ latents

    return call


def contenders(size: int, device: str) -> dict:
    functions = {"ours": ours, "index_add": index_add, "one-hot": one_hot}
    if device == "cuda":
        functions["index_add-deterministic"] = index_add_deterministic
    return {
        name: lambda latents, codes, f=function: f(latents, codes, size)
        for name, function in functions.items()
    }


def random_inputs(count: int, dim: int, used: int, device: str, seed: int):
    """Latents, and codes that are uniform among the first `used`."""
    generator = torch.Generator(device).manual_seed(seed)
    latents = torch.randn(count, dim, device=device, generator=generator)
    return latents, torch.randint(used, (count,), device=device, generator=generator)


def checker(latents, codes, size: int):
    """(name, call) -> the columns that are not times."""
    zeros = torch.zeros(size, latents.shape[1], dtype=torch.float64, device=latents.device)
    sums = zeros.index_add(0, codes, latents.double())
    magnitudes = zeros.index_add(0, codes, latents.double().abs()).clamp(min=1e-30)
    counts = torch.bincount(codes, minlength=size)

    def check(name: str, call: Call) -> dict:
        found_counts, found_sums = call()
        error = float(((found_sums.double() - sums).abs() / magnitudes).max())
        if error > TOLERANCE or not torch.equal(found_counts.long(), counts):
            raise SystemExit(f"{name} is wrong, error {error:.1e}: {tuple(latents.shape)}")
        again = call()
        same = torch.equal(again[0], found_counts) and torch.equal(again[1], found_sums)
        return {"error": error, "repeatable": same}

    return check


def main() -> None:
    bench = Bench(__doc__)
    cases = [(shape, shape[2], "") for shape in CASES[bench.device]]
    cases += [(shape, 1, " one code") for shape in COLLAPSED[bench.device]]
    for (count, dim, size), used, remark in cases:
        inputs = functools.partial(random_inputs, count, dim, used, bench.device)
        bench.compare(
            f"{(count, dim, size)}{remark}", contenders(size, bench.device), inputs,
            checker(*inputs(0), size),
        )  # fmt: skip
    bench.write()


if __name__ == "__main__":
    main()
