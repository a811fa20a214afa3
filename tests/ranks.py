"""Starts train_vqvae.py on several gloo ranks for tests, in float64 and with faults.

    run_training(4, "--data", shards, "--out", out, dtype="float64", fault="nan:1:3")

As a script it is one rank; the processes find each other through the variables of torchrun.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_training(
    world_size: int,
    *flags,
    dtype: str = "float32",
    fault: str = "",
    engine: str = "",
    precision: str = "no",
    check: bool = True,
) -> list[subprocess.CompletedProcess]:
    """Runs all ranks to their end; returns their results by rank.

    Args:
        fault: `nan:RANK:STEP[:STEP...]` makes the loss of that rank's steps NaN; `codebook:RANK`
            shifts a codebook of that rank after the third step.
        engine: `zero1` or `zero2`, else DDP.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FAULT": fault, "DTYPE": dtype,
            "ACCELERATE_MIXED_PRECISION": precision,
        }  # fmt: skip
        if engine:
            env["ACCELERATE_USE_DEEPSPEED"] = "true"
            env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"configs/deepspeed/{engine}.json"
        command = [sys.executable, __file__, *map(str, flags)]
        processes.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    results = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    if check and any(result.returncode for result in results):
        raise AssertionError("\n".join(result.stderr[-3000:] for result in results))
    return results


def inject(fault: str) -> None:
    """Puts a fault into this rank."""
    kind, rank, *steps = fault.split(":")
    if rank != os.environ["RANK"]:
        return
    from pipeline import train_vqvae
    from pipeline.training.codebooks import Codebooks

    if kind == "nan":
        original, calls = train_vqvae.loss, iter(range(10**9))

        def loss(*arguments):
            total, mse = original(*arguments)
            # added, so that the gradient is finite and only the loss tells
            return (total + float("nan") if str(next(calls)) in steps else total), mse

        train_vqvae.loss = loss
    elif kind == "codebook":
        original_commit, commits = Codebooks.commit, iter(range(10**9))

        def commit(self, *arguments):
            revived = original_commit(self, *arguments)
            if next(commits) == 2:
                self.levels[-1][1].sums[0, 0] += 1e-3  # the codebook would heal
            return revived

        Codebooks.commit = commit
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import torch

    from pipeline import stage, train_vqvae

    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, os.environ["DTYPE"]))
    import mutations  # noqa: F401  takes a safeguard away where MUTATION says so

    if os.environ["FAULT"]:
        inject(os.environ["FAULT"])
    stage.run(train_vqvae.TrainVQVAE, train_vqvae.main)
