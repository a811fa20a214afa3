"""Tiles of the nearest-code kernels: renews kernels/nearest_code_blocks.json on the GPU at hand.

    python benchmarks/tune_nearest_code.py
    python benchmarks/tune_nearest_code.py --dims 64 256
    python benchmarks/tune_nearest_code.py --check --json runs/bench/nearest_code-kernels.json

For each padded dimension it times a short list of tiles for the first and for the second pass, and
keeps the fastest whose kernels fit. --check says whether those of the table do, and needs no GPU:
compiled for sm_80 and sm_90, none may spill registers to the stack, or take more shared memory than
a program has on the smaller GPUs of these generations (sm_86, sm_89).
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from measure import CudaTimer, print_table, refuse, take_turns, write_json
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from kernels import codebook_sums_triton, nearest_code_triton, reference

TABLE = Path(nearest_code_triton.__file__).with_name("nearest_code_blocks.json")
CAPABILITIES = (80, 90)
MAX_SHARED = 99 * 1024
SHAPES = {  # D_PAD: N, K
    16: (262144, 1024),
    32: (131072, 8192),
    64: (524288, 512),
    128: (131072, 1024),
    256: (65536, 8192),
    512: (32768, 4096),
}
CANDIDATES = {  # rows, codes, warps, stages
    "first": [
        (16, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 3), (32, 64, 4, 2), (32, 64, 8, 2),
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3),
        (64, 128, 8, 2), (64, 128, 8, 3), (128, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2),
        (128, 64, 8, 3),
    ],
    "second": [
        (16, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 8, 1), (32, 64, 8, 2),
        (32, 128, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3),
    ],
}  # fmt: skip
SAMPLE = 4096  # rows that are compared with the truth


class OfflineDriver:
    """Triton's view of a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what Triton has compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[dict]:
    """Launches compile for such a GPU and run nothing: gives {kernel's name: compiled kernel}."""
    compiled, launch = {}, JITFunction.run

    def run(self, *arguments, grid, warmup, **options):
        if "PTX" in options:
            options["PTX"] = True  # it is off for latents on a CPU
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled[self.__name__] = kernel

    triton.runtime.driver.set_active(OfflineDriver(capability))  # pyright: ignore
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield compiled
    finally:
        if torch.cuda.is_available():
            triton.runtime.driver.reset_active()


def kernels_of(dim: int) -> Iterator[dict]:
    """What every kernel takes for latents of dimension `dim`, in the layouts of training."""
    codebook = torch.randn(512, dim)
    grids = torch.randn(4, dim, 32, 32).movedim(1, -1)
    rows = grids.contiguous()
    layouts = {"fp32 NCHW": grids, "fp32": rows, "fp16": rows.half(), "one row": rows[0, 0, :1]}
    variants = itertools.product(CAPABILITIES, layouts.items(), (True, False))
    seen = set()
    for capability, (layout, latents), exact in variants:
        with compile_only(capability) as compiled:
            nearest_code_triton.nearest_code(latents, codebook, exact)
            codes = torch.zeros(latents.shape[:-1], dtype=torch.int64)
            codebook_sums_triton.codebook_sums(latents, codes, len(codebook))
        for name, kernel in compiled.items():
            if kernel.hash not in seen:  # those that only see the codebook are always the same
                seen.add(kernel.hash)
                row = {"case": f"D={dim}", "target": f"sm_{capability}", "kernel": name.strip("_")}
                row |= {"latents": layout, "precision": "exact" if exact else "fast"}
                yield row | resources(kernel)


def resources(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "shared_bytes": kernel.metadata.shared,
    }


def fits(row: dict) -> bool:
    return row["stack_bytes"] == 0 and row["shared_bytes"] <= MAX_SHARED


def check(dims: list[int]) -> tuple[list[dict], list[str]]:
    """All kernels of the table, and a line for each that does not fit."""
    rows, errors = [], []
    for dim in dims:
        found = list(kernels_of(dim))
        print_table(f"D={dim}, the most of any layout", most_of_any_layout(found))
        rows += found
        errors += [f"does not fit: {row}" for row in found if not fits(row)]
    return rows, errors


def most_of_any_layout(rows: list[dict]) -> list[dict]:
    most: dict[tuple, dict] = {}
    for row in rows:
        key = {name: row[name] for name in ("target", "kernel")}
        before = most.setdefault(tuple(key.values()), key)
        for name in ("registers", "stack_bytes", "shared_bytes"):
            before[name] = max(row[name], before.get(name, 0))
    return list(most.values())


def tune(dims: list[int], rounds: int) -> list[dict]:
    rows = []
    for dim in dims:
        count, size = SHAPES[dim]
        latents = torch.randn(count, dim, device="cuda")
        codebook = torch.randn(size, dim, device="cuda")
        rows += tune_pass("first", latents, codebook, rounds)
        # With every code twice no row is decided by the first pass; the second, before which
        # repeats are dropped, decides nearly all.
        rows += tune_pass("second", latents[: count // 4], codebook.repeat(2, 1), rounds)
        write_table()
    return rows


def tune_pass(name: str, latents, codebook, rounds: int) -> list[dict]:
    """Puts the fastest tiles that fit into the table; the time is that of the whole look-up."""
    dim = latents.shape[1]
    entry = nearest_code_triton._BLOCKS[str(dim)]
    sample = torch.randperm(len(latents), device="cuda")[:SAMPLE]
    truth = reference.nearest_code(latents[sample], codebook)
    pool = torch.cuda.graph_pool_handle()
    choices, timers, rows = {}, {}, []
    for candidate in CANDIDATES[name]:
        blocks = dict(zip(("rows", "codes", "warps", "stages"), candidate, strict=True))
        held = blocks["rows"] + (blocks["stages"] - 1) * blocks["codes"]  # at least, in 16 bits
        if name == "first" and 2 * dim * held > MAX_SHARED:
            continue

        def call(blocks=blocks):
            entry[name] = blocks
            return nearest_code_triton.nearest_code(latents, codebook, exact=True)

        with contextlib.suppress(OutOfResources):
            if not torch.equal(call()[sample], truth):
                raise SystemExit(f"wrong codes with {name} {blocks}, D={dim}")
            choices[str(candidate)] = blocks
            timers[str(candidate)] = CudaTimer([call], pool)
    for choice, times in take_turns(timers, rounds).items():
        row = {"contender": choice, "case": f"D={dim} {name} pass", "device": "cuda"}
        rows.append(row | {"median_ms": statistics.median(times), "min_ms": min(times)})
    rows.sort(key=lambda row: row["median_ms"])
    for row in rows:
        entry[name] = choices[row["contender"]]
        kernels = (kernel for kernel in kernels_of(dim) if kernel["kernel"] == f"{name}_pass")
        row["fits"] = all(map(fits, kernels))
        if row["fits"]:
            break
    else:
        raise SystemExit(f"no tiles fit for the {name} pass, D={dim}")
    print_table(rows[0]["case"], rows)
    return rows


def write_table() -> None:
    entries = nearest_code_triton._BLOCKS.items()
    lines = [f' "{dim}": {json.dumps(entry)}' for dim, entry in entries]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--check", action="store_true", help="compile the table, without a GPU")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each candidate")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        refuse("TRITON_INTERPRET is set: the kernels have to be compiled")
    if not arguments.check and not torch.cuda.is_available():
        refuse("no CUDA device here (--check needs none)")

    errors: list[str] = []
    if arguments.check:
        rows, errors = check(arguments.dims)
    else:
        rows = tune(arguments.dims, arguments.rounds)
    if arguments.json:
        write_json(arguments.json, rows, "cpu" if arguments.check else "cuda")
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
