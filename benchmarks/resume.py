"""What going on after a break costs: the first batch of a huge data set, and the checkpoints.

    python benchmarks/resume.py --json runs/bench/resume-cpu.json
    python benchmarks/resume.py --samples 1000000 --json PATH           a smaller data set

First batch: from `open_images(..., cache=False)` to the first batch of 64 at a random place of the
stream, in a fresh process after its imports; `cpu_ms` is the same in CPU time, which other work on
the machine disturbs less; `peak_mib` is what it takes beyond the imported process; `failed` where
there is none within a minute. The data set is simulated: shards of 10,000 small images that are all
links to one, so its index and tables are true, but their bytes are in the page cache. What a disk
adds is not measured.

Checkpoint: training steps (of 4 images) of the prior of configs/celeba64/train_prior_level1.yaml
without one, and with one that is written at once (`ours-synchronous`) or beside the training
(`ours`), in turns. `stall_ms` is how much longer the same steps take, the median over the turns;
`cpu_ms` the same in CPU time of all threads, which other work on the machine disturbs less;
`blocked_ms` how long the loop waits before it goes on. `stall_percent` is `stall_ms` of a minute.
The files go where temporary files go, so that disk decides too.
"""

import argparse
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from measure import ROOT, print_table, refuse, write_json
from PIL import Image

try:
    from pipeline import stage
    from pipeline.data.images import open_images
    from pipeline.data.index import Index, write_index
    from pipeline.data.loader import training_batches
    from pipeline.data.shards import table_path, write_shard
    from pipeline.models.priors import make_prior
    from pipeline.train_prior import TrainPrior
    from pipeline.training.checkpoint import Checkpoints, training_tensors
    from pipeline.training.weight_average import WeightAverage
except ModuleNotFoundError as error:  # a bare interpreter has what kernels and models need
    print(f"resume is left out: it needs {error.name}")
    sys.exit(0)

BATCH, SIZE = 64, 64
SHARD_SIZE = 10_000
TIMEOUT_SEC = 60.0
CHECKPOINT_BATCH = 4  # short steps, or the differences drown
TARGET_MS, TARGET_MIB, TARGET_PERCENT = 1000.0, 200.0, 2.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--samples", type=int, default=100_000_000, help="of the simulated data")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each way to save; 0: none")
    parser.add_argument("--steps", type=int, default=16, help="training steps in a turn")
    parser.add_argument("--first_batch", nargs=2, metavar=("DATA", "START"), help="one start")
    arguments = parser.parse_args()
    if (arguments.json is None) == (arguments.first_batch is None):
        refuse("give --json PATH")
    if arguments.samples < SHARD_SIZE or arguments.samples % SHARD_SIZE:
        refuse(f"--samples must be a multiple of {SHARD_SIZE:,}")
    return arguments


# The first batch.


def simulate_shards(root: Path, num_samples: int, shard_size: int = SHARD_SIZE) -> Path:
    """An index of `num_samples`, all of whose shards are links to one with 64 different images."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(64):
        noise = generator.integers(0, 256, (8, 8, 3), np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noise).resize((SIZE, SIZE)).save(encoded, "JPEG")
        images.append(encoded.getvalue())
    first = root / "train-00000.tar"
    info = write_shard(
        first,
        ((f"{n:09d}", {"jpg": images[n % 64], "json": b"{}"}) for n in range(shard_size)),
    )
    names = [f"train-{number:05d}.tar" for number in range(num_samples // shard_size)]
    for name in names[1:]:
        os.link(first, root / name)
        os.link(table_path(first), table_path(root / name))
    shards = tuple(dataclasses.replace(info, name=name) for name in names)
    write_index(root, Index(source="faces", splits={"train": shards}))
    return root


def first_batch(root: Path, start: int) -> dict[str, float]:
    """Milliseconds, on the clock and of the CPU, until the batch at stream position `start` is
    there, and MiB beyond this process."""
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    begin, cpu = time.perf_counter(), time.process_time()
    images = open_images(root, "train", SIZE, cache=False)
    batches = training_batches(images.fetch, len(images), batch_size=BATCH, seed=0, start=start)
    batch = next(batches)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    assert batch["images"].shape == (BATCH, SIZE, SIZE, 3)
    return {"ms": 1e3 * seconds, "cpu_ms": 1e3 * cpu, "mib": memory_mib("VmHWM") - before}


def memory_mib(name: str) -> float:
    """A line of /proc/self/status: VmRSS is the memory now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:"))


def measure_starts(num_samples: int, starts: int) -> dict[str, Any]:
    row = {
        "contender": "ours", "case": f"first batch of {num_samples:,} samples", "device": "cpu",
        "extrapolated": False,
    }  # fmt: skip
    generator, found = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as work:
        root = simulate_shards(Path(work), num_samples)
        for _ in range(starts):
            start = BATCH * int(generator.integers(5 * num_samples // BATCH))  # in any of 5 epochs
            command = [sys.executable, __file__, "--first_batch", str(root), str(start)]
            try:
                output = subprocess.check_output(command, text=True, timeout=TIMEOUT_SEC)
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
                return row | {"median_ms": None, "failed": f"{type(error).__name__} at {start}"}
            found.append(json.loads(output.splitlines()[-1]))
    times = [one["ms"] for one in found]
    return row | {
        "median_ms": statistics.median(times), "min_ms": min(times),
        "max_ms": max(times), "target_ms": TARGET_MS,
        "cpu_ms": statistics.median(one["cpu_ms"] for one in found),
        "peak_mib": max(one["mib"] for one in found), "target_mib": TARGET_MIB,
    }  # fmt: skip


# The checkpoints.


def prior_step() -> tuple[Callable[[], None], Callable[[], dict]]:
    """A training step of the prior, and the tensors of its run."""
    file = ROOT / "configs/celeba64/train_prior_level1.yaml"
    config = stage.parse(TrainPrior, [f"--config={file}", "--codes=-", "--out=-"])
    torch.manual_seed(0)
    model_config = dataclasses.replace(
        config.model, grid=(16, 16), codebook_size=512, coarser_codebook_sizes=(512,),
        num_attributes=40,
    )  # fmt: skip
    model = make_prior(model_config)
    average = WeightAverage(model, config.average_halflife)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    batch = CHECKPOINT_BATCH
    inputs = {
        "codes": torch.randint(512, (batch, 16, 16)),
        "coarser": [torch.randint(512, (batch, 8, 8))],
        "labels": torch.full((batch,), -1),
        "attributes": torch.randint(-1, 2, (batch, 40)).float(),
    }
    seen = 0

    def step() -> None:
        nonlocal seen
        seen += batch
        adam.zero_grad()
        model(**inputs).backward()
        adam.step()
        average.update(model, batch, seen)

    return step, lambda: training_tensors(model, average.model, adam)


def measure_checkpoints(rounds: int, num_steps: int) -> list[dict[str, Any]]:
    step, tensors = prior_step()
    step()
    size = sum(t.nbytes for group in tensors().values() for t in group.values()) / 2**20
    ways = ("no checkpoint", "ours-synchronous", "ours")
    turns: list[dict[str, np.ndarray]] = []
    with tempfile.TemporaryDirectory() as work:
        checkpoints = Checkpoints(Path(work))
        for turn in range(rounds + 1):
            turns.append({})
            for place, way in enumerate(ways):
                begin, cpu = time.perf_counter(), time.process_time()
                number = turn * len(ways) + place
                if way == "ours-synchronous":
                    checkpoints.save(number, tensors(), {})
                    checkpoints.prune()
                if way == "ours":
                    checkpoints.start_save(number, tensors(), {})
                saved = time.perf_counter()
                for _ in range(num_steps):
                    step()
                checkpoints.wait()
                end = time.perf_counter()
                turns[-1][way] = 1e3 * np.array([end - begin, time.process_time() - cpu,
                                                 saved - begin])  # fmt: skip
    rows = []
    for way in ways:
        own = np.stack([turn[way] for turn in turns[1:]])  # the first does not count
        plain = np.stack([turn["no checkpoint"] for turn in turns[1:]])
        row = {
            "contender": way, "case": f"checkpoint of {size:.1f} MiB, {num_steps} steps",
            "device": "cpu", "extrapolated": False,
            "median_ms": float(np.median(own[:, 0])), "min_ms": float(own[:, 0].min()),
        }  # fmt: skip
        if way != "no checkpoint":
            stall, cpu, _ = np.median(own - plain, axis=0).tolist()
            row |= {
                "blocked_ms": float(np.median(own[:, 2])), "stall_ms": stall, "cpu_ms": cpu,
                "stall_percent": 100 * stall / 60_000, "target_percent": TARGET_PERCENT,
            }  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    arguments = parse_arguments()
    if arguments.first_batch is not None:
        root, start = arguments.first_batch
        print(json.dumps(first_batch(Path(root), int(start))))
        return
    start = measure_starts(arguments.samples, arguments.starts)
    print_table(start["case"], [start])
    rows = [start]
    if arguments.rounds:
        checkpoints = measure_checkpoints(arguments.rounds, arguments.steps)
        print_table(checkpoints[0]["case"], checkpoints)
        rows += checkpoints
    write_json(arguments.json, rows, "cpu")


if __name__ == "__main__":
    main()
