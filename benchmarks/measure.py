"""What the benchmarks share: checks first, interleaved timing, the table, the JSON file.

A contender is a function of the inputs that returns the call to be timed; what it does before that
(casting, building an index) is not timed. Where it cannot run it raises `Absent` with the reason.

All contenders of a case take turns in one process, so that a slow spell of the machine meets all
of them; `ratio` is the median over the turns of a contender's time divided by that of `ours`.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

Call = Callable[[], Any]
Contender = Callable[..., Call]

ROOT = Path(__file__).resolve().parents[1]
PEERS = {  # module: distribution
    "faiss": "faiss-cpu",
    "flash_kmeans": "flash-kmeans",
    "vector_quantize_pytorch": "vector-quantize-pytorch",
}
CASES = {  # N, D, K of the look-up and of the sums
    "cpu": [(4096, 64, 512), (32768, 64, 512), (16384, 256, 2048)],
    "cuda": [
        (524288, 64, 512),
        (131072, 64, 512),
        (65536, 256, 8192),
        (131072, 32, 65536),
        (1048576, 64, 1024),
    ],
}
LONG_MS = 10.0  # a call as long as this one does not feel its launches
GRAPH_MS = 20.0  # calls in a CUDA graph, so that the launch of the graph is not felt either
GRAPH_CALLS = 256


class Absent(Exception):
    """Why a contender does not take part."""


def peer(name: str) -> Any:
    """The module of another project, which nothing but a benchmark needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise Absent("not installed" if name.startswith(missing) else f"needs {missing}") from None


def refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


class Bench:
    """The command line of a benchmark, its rows and its file.

    bench = Bench(__doc__)
    bench.compare("(4096, 64, 512)", {"ours": ..., "peer": ...}, inputs, check)
    bench.write()
    """

    def __init__(self, description: str | None, rounds: int = 15):
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--json", type=Path, required=True, help="where the figures go")
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
        arguments = parser.parse_args()
        self.json, self.device, self.rounds = arguments.json, arguments.device, arguments.rounds
        if self.device == "cuda" and not torch.cuda.is_available():
            refuse("--device cuda: no CUDA device here")
        self.rows: list[dict] = []
        self.skipped: list[str] = []

    def compare(
        self,
        case: str,
        contenders: dict[str, Contender],
        inputs: Callable[[int], tuple],
        check: Callable[[str, Call], dict],
        flop: float | None = None,
        graphs: bool = True,
    ) -> None:
        """Checks all contenders, times them in turns, prints their table.

        Args:
            inputs: seed -> the tensors that a contender is given, fresh random numbers.
            check: (name, call on the inputs of seed 0) -> what the row shall say besides times;
                makes the first call, and ends the script where `ours` is wrong.
            flop: floating-point operations of a call, for a column in TFLOP/s.
            graphs: whether short calls on a GPU are timed inside a CUDA graph.
        """
        sets = [inputs(seed) for seed in range(number_of_sets(inputs(0), self.device))]
        pool = torch.cuda.graph_pool_handle() if graphs and self.device == "cuda" else None
        rows, timers, skipped = [], {}, []
        for name, contender in contenders.items():
            try:
                calls = [contender(*tensors) for tensors in sets]
                columns = check(name, calls[0])
                columns["peak_mib"] = peak_mib(calls[0], self.device)
                timer = CudaTimer(calls, pool) if self.device == "cuda" else CpuTimer(calls[0])
            except (Absent, torch.OutOfMemoryError) as error:
                reason = str(error) if isinstance(error, Absent) else "not enough memory"
                skipped.append(f"{name}: {reason}")
                continue
            row = {"contender": name, "case": case, "device": self.device, "extrapolated": False}
            rows.append(row | columns | timer.columns)
            timers[name] = timer

        times = take_turns(timers, self.rounds)
        for row in rows:
            own, ours = times[row["contender"]], times["ours"]
            row["median_ms"], row["min_ms"] = statistics.median(own), min(own)
            row["ratio"] = statistics.median(a / b for a, b in zip(own, ours, strict=True))
            if flop is not None:
                row["tflops"] = flop / row["median_ms"] * 1e-9
        print_table(case, rows, skipped)
        self.rows += rows
        self.skipped += [f"{case} {line}" for line in skipped]

    def write(self) -> None:
        write_json(self.json, self.rows, self.device, skipped=self.skipped)


class CpuTimer:
    """Milliseconds of a call on a CPU."""

    def __init__(self, call: Call):
        self.call, self.columns = call, {}

    def __call__(self) -> float:
        self.call()  # its own data into the caches, the threads of the one before to sleep
        start = time.perf_counter()
        self.call()
        return 1e3 * (time.perf_counter() - start)


class CudaTimer:
    """Milliseconds of a call on a GPU, by events.

    Short calls are captured into a CUDA graph, one after the other over all input sets: Python
    would need longer for the launches than the GPU for the work. A call that makes the host wait
    cannot be captured; that and a long one are timed as they are (`graph` is None), as all are
    without a `pool`. The graphs share its memory: they are replayed in turn, and nobody reads what
    they leave.
    """

    def __init__(self, calls: list[Call], pool: Any):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = itertools.cycle(calls)  # kept as long as the graph, which reads their inputs
        milliseconds = min(self() for _ in range(3))
        if pool is not None and milliseconds < LONG_MS and not makes_host_wait(calls[0]):
            self.count = min(math.ceil(GRAPH_MS / milliseconds), GRAPH_CALLS)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                for _ in range(self.count):
                    next(self.calls)()
            self.graph = graph
        self.columns = {"graph": self.graph is not None}

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self.graph is None:
            next(self.calls)()
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (1 if self.graph is None else self.count)


def take_turns(timers: dict[str, CpuTimer | CudaTimer], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each turn, after one that does not count."""
    times = [{name: timer() for name, timer in timers.items()} for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in times[1:]] for name in timers}


def makes_host_wait(call: Call) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def number_of_sets(tensors: tuple[torch.Tensor, ...], device: str) -> int:
    """Input sets to rotate among on a GPU: four times its L2 cache, half that in 16 bits."""
    if device != "cuda":
        return 1
    size = sum(tensor.nbytes for tensor in tensors)
    return math.ceil(4 * torch.cuda.get_device_properties().L2_cache_size / size)


def peak_mib(call: Call, device: str) -> float | None:
    """Memory that a call takes beyond its inputs, its result included."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def print_table(case: str, rows: list[dict], remarks: Iterable[str] = ()) -> None:
    hidden = ("case", "device", "extrapolated")
    shown = [key for row in rows for key in row if key not in hidden and row[key] is not None]
    names = list(dict.fromkeys(shown))
    cells = [names, *([text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(case)
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for remark in remarks:
        print(f"  {remark}")
    print(flush=True)


def text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, rows: list[dict], device: str, **more: Any) -> None:
    document = {"environment": environment(device) | more, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def environment(device: str) -> dict:
    """Everything that a figure has to come with."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "dirty": bool(output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "peers": {module: version(name, module) for module, name in PEERS.items()},
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": cpu_model(),
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return facts


def version(distribution: str, module: str = "") -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(module), "__version__", None)


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def output_of(*command: str) -> str | None:
    """What a command prints; None where it fails or is missing."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
