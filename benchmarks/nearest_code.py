"""Nearest-code look-up: this repository's against the ways that others write it.

    python benchmarks/nearest_code.py --json runs/bench/nearest_code-cpu.json
    python benchmarks/nearest_code.py --device cuda --json runs/bench/nearest_code-cuda.json

`mismatch` is the share of rows whose code differs from the float64 truth, on a sample; `ours` has
none, or the script ends. The contenders with 16-bit latents are measured against the truth of these
latents. Shapes: N rows, D dimensions, K codes.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import CASES, Absent, Bench, Call, peer
from torch.nn import functional as F

from kernels import nearest_code, reference

SAMPLE = {"cpu": 1024, "cuda": 4096}  # rows that are compared with the truth


def ours(latents, codebook) -> Call:
    return lambda: nearest_code(latents, codebook)


def ours_fast(latents, codebook) -> Call:
    return lambda: nearest_code(latents, codebook, precision="fast")


def cdist(latents, codebook) -> Call:
    return lambda: torch.cdist(latents, codebook).argmin(1)


def highest_score(latents, codebook):
    """x·c - |c|²/2 is highest where |x - c|² is least."""
    return torch.addmm(codebook.square().sum(1) / -2, latents, codebook.T).argmax(1)


def addmm(latents, codebook) -> Call:
    return lambda: highest_score(latents, codebook)


def chunked(latents, codebook) -> Call:
    return lambda: torch.cat([highest_score(rows, codebook) for rows in latents.split(65536)])


def compiled(latents, codebook) -> Call:
    function = torch.compile(highest_score, dynamic=False)
    try:
        function(latents, codebook)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no C++ compiler, most of all
        raise Absent(str(error).partition("\n")[0]) from None
    return lambda: function(latents, codebook)


def one_hot(latents, codebook) -> Call:
    """As the ports of VQ-VAE-2 write it, whose next line makes the one-hot matrix."""
    embed = codebook.T

    def call():
        product = 2 * latents @ embed
        distances = latents.pow(2).sum(1, keepdim=True) - product + embed.pow(2).sum(0)
        del product
        _, codes = (-distances).max(1)
        F.one_hot(codes, len(codebook)).type(latents.dtype)
        return codes

    return call


def vector_quantize_pytorch(latents, codebook) -> Call:
    """The lines of its Codebook.forward that lead to the codes, without the gather after them."""
    module = peer("vector_quantize_pytorch.vector_quantize_pytorch")

    def call():
        distances = -module.cdist(latents[None], codebook[None])
        return module.gumbel_sample(distances, dim=-1, training=False)[0][0]

    return call


def faiss_flat(latents, codebook) -> Call:
    faiss = peer("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda: torch.from_numpy(index.search(latents.numpy(), 1)[1][:, 0])


def flash_kmeans(latents, codebook) -> Call:
    """Takes both in 16 bits, and the squared lengths of the latents ready-made."""
    module = peer("flash_kmeans.assign_euclid_triton")
    rows, centroids = latents[None], codebook.to(latents.dtype)[None]
    squares = rows.float().square().sum(-1)
    return lambda: module.euclid_assign_triton(rows, centroids, squares)[0]


BOTH = {
    "ours": ours,
    "ours-fast": ours_fast,
    "cdist": cdist,
    "addmm": addmm,
    "compile": compiled,
    "vector-quantize-pytorch": vector_quantize_pytorch,
    "one-hot": one_hot,
}
HALF = {"ours-fp16": ours, "ours-fast-fp16": ours_fast, "flash-kmeans": flash_kmeans}
EXACT = ("ours", "ours-fp16")


def contenders(device: str) -> dict:
    if device == "cpu":
        return BOTH | {"faiss": faiss_flat}
    half = {name: on_half(contender) for name, contender in HALF.items()}
    return BOTH | {"chunked": chunked} | half


def on_half(contender):
    return lambda latents, codebook: contender(latents.half(), codebook)


def random_inputs(count: int, dim: int, size: int, device: str, seed: int):
    generator = torch.Generator(device).manual_seed(seed)
    latents = torch.randn(count, dim, device=device, generator=generator)
    return latents, torch.randn(size, dim, device=device, generator=generator)


def checker(latents, codebook):
    """(name, call) -> the columns that are not times."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(latents), generator=generator)
    sample = sample[: SAMPLE[latents.device.type]].to(latents.device)

    @functools.cache
    def truth(dtype):
        return reference.nearest_code(latents[sample].to(dtype), codebook)

    def check(name: str, call: Call) -> dict:
        dtype = torch.float16 if name in HALF else torch.float32
        mismatch = float((call()[sample] != truth(dtype)).double().mean())
        if name in EXACT and mismatch > 0:
            raise SystemExit(f"{name} is wrong in {mismatch:.2%} of the rows: {latents.shape}")
        columns = {"mismatch": mismatch}
        if name in EXACT and latents.is_cuda:
            columns |= shares_of_passes(latents.to(dtype), codebook)
        return columns

    return check


def shares_of_passes(latents, codebook) -> dict:
    """Which part of the rows the first pass, and the second, could not decide."""
    from kernels.nearest_code_triton import open_rows

    second, score64 = open_rows(latents, codebook)
    return {
        "second_pass_share": second / len(latents),
        "score64_share": score64 / len(latents),
    }


def main() -> None:
    bench = Bench(__doc__)
    for count, dim, size in CASES[bench.device]:
        inputs = functools.partial(random_inputs, count, dim, size, bench.device)
        bench.compare(
            str((count, dim, size)), contenders(bench.device), inputs, checker(*inputs(0)),
            flop=2 * count * dim * size,
        )  # fmt: skip
    bench.write()


if __name__ == "__main__":
    main()
