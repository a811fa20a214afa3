"""Stages on several ranks, which a test may kill, stop, starve or ask to end.

    run_ranks("train_vqvae", flags, out, world=2)           to their end
    job = Job(shards, out, "kill:1:5")      rank 1 of a training kills itself in beginning step 5
    assert job.wait()[1] == -9
    start = Start("extract_codes", flags, out, FAILPOINT="commit@3:kill")       any stage
    assert start.wait() == [-9]

The ranks are forked from one process that has imported everything, because imports take seconds.
What they print goes to <out>.log, which samples they read to <out>.samples<rank>.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL, BATCH, SAVE, COUNT = 256, 16, 32, 128  # images; the last is of the training split
STEPS = TOTAL // BATCH
# codes die and start anew; the metrics have lines between the checkpoints
FLAGS = (
    f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--batch_size={BATCH}",
    f"--total_images={TOTAL}", f"--save_every={SAVE}", "--validate_every=128", "--log_every=16",
    "--model.decay=0.5", "--model.revival=0.5", "--compare_every=64",
)  # fmt: skip

_server = multiprocessing.get_context("forkserver")
STAGES = (
    "shard_data", "train_vqvae", "train_vae", "train_classifier", "extract_codes", "train_prior",
    "sample_prior", "evaluate",
)  # fmt: skip
_server.set_forkserver_preload([f"pipeline.{name}" for name in STAGES])


def make_shards(root: Path) -> Path:
    """Shards of 160 drawn faces at 32 px, in three splits."""
    from pipeline.data.faces import write_faces
    from pipeline.shard_data import ShardData, main

    write_faces(root / "faces", num_faces=160, size=32, seed=0, workers=1)
    main(
        ShardData(source="faces", root=root / "faces", out=root / "shards", num_faces=160,
                  face_size=32, shard_size=50, workers=1)
    )  # fmt: skip
    return root / "shards"


class Start:
    """A start of a stage; its ranks are processes.

    Args:
        stage: name of its script.
        flags: its command line, with --out.
        fault: `ACTION:RANK:STEP`, see `inject`; several are separated by commas.
        environment: of all ranks, such as FAILPOINT; DTYPE is torch's default one.
        launcher: one more process between this one and the ranks, as torchrun is.
    """

    def __init__(
        self, stage: str, flags: Sequence[str], out: Path, fault: str = "", world: int = 1,
        launcher: bool = False, **environment: str,
    ):  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"RANK_TIMEOUT_SEC": "60", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(world), **environment}  # fmt: skip
        self.out, self.began = out, time.monotonic()
        starts = [(rank, stage, (*flags,), environment, fault, out) for rank in range(world)]
        if launcher:
            self.processes = [_server.Process(target=_launch, args=(starts,))]
        else:
            self.processes = [_server.Process(target=_run_rank, args=start) for start in starts]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes by rank; AssertionError where a rank is still there after so many seconds,
        SIGSTOP included."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} hang\n{self.log()}"
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def wait_until_stopped(self, rank: int) -> None:
        """Until a rank has stopped itself (SIGSTOP), or ended."""
        stat, end = Path(f"/proc/{self.processes[rank].pid}/stat"), time.monotonic() + 60
        while self.processes[rank].is_alive() and stat.read_text().rpartition(") ")[2][0] != "T":
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        path = self.out.with_suffix(".log")
        return path.read_text() if path.is_file() else ""

    def status(self) -> dict:
        return json.loads((self.out / "status.json").read_text())


def deepspeed(engine: str) -> dict[str, str]:
    """The environment in which a start uses `zero1` or `zero2`."""
    config = f"{ROOT}/configs/deepspeed/{engine}.json"
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}


def run_ranks(
    stage: str, flags: Sequence[Any], out: Path, world: int = 1, fault: str = "", engine: str = "",
    expected: int = 0, **environment: str,
) -> str:  # fmt: skip
    """Runs a stage on all ranks to their end, which has to be the expected exit code; returns what
    they printed. The engine is `zero1` or `zero2`, else DDP."""
    environment |= deepspeed(engine) if engine else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = [*map(str, flags), f"--out={out}"]
    job = Start(stage, flags, out, fault, world, RANK_TIMEOUT_SEC="300", **environment)
    assert job.wait(300) == [expected] * world, job.log()
    return job.log()


class Job(Start):
    """A start of the training, with FLAGS; `flags` besides."""

    def __init__(self, shards: Path, out: Path, fault: str = "", *flags: str, world: int = 2,
                 launcher: bool = False, **environment: str):  # fmt: skip
        flags = (*FLAGS, f"--data={shards}", f"--out={out}", *flags)
        super().__init__("train_vqvae", flags, out, fault, world, launcher, **environment)

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are done."""
        end = time.monotonic() + 60
        path = self.out / "metrics.jsonl"
        while step and (not path.is_file() or path.read_text().count("loss/total") < step):
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)


def _launch(starts: list) -> None:
    """A launcher that only waits, as those of accelerate and torch do."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_run_rank, args=start) for start in starts]
    for rank in ranks:
        rank.start()
    pids = " ".join(str(rank.pid) for rank in ranks)
    starts[0][-1].with_suffix(".pids").write_text(pids)
    for rank in ranks:
        rank.join()


def _run_rank(rank: int, name: str, flags: tuple, environment: dict, fault: str, out: Path) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(out.with_suffix(".log"), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a command
    import mutations  # noqa: F401  takes a safeguard away where MUTATION says so
    import torch

    from pipeline import failpoint, stage

    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float32")))
    for one in filter(None, fault.split(",")):
        action, who, step = one.split(":")
        if int(who) == rank:
            inject(action, int(step), out)
    if name == "train_vqvae":
        _log_samples(out.with_suffix(f".samples{rank}"))
    sys.argv = [f"{name}.py", *flags]
    module = importlib.import_module(f"pipeline.{name}")
    words = {"vqvae": "VQVAE", "vae": "VAE"}
    config_type = getattr(module, "".join(words.get(w, w.title()) for w in name.split("_")))
    try:
        stage.run(config_type, module.main)
    finally:
        out.with_suffix(f".passes{rank}").write_text(json.dumps(failpoint._passes))


def start(function: Callable, *arguments: Any) -> Any:
    """A process that calls a function of a test's module."""
    process = _server.Process(target=function, args=arguments)
    process.start()
    return process


def run_tests(mutation: str, which: str, output: Path) -> None:
    """Runs tests without a safeguard, see `mutations`, in a process that is to end with them."""
    import pytest

    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.update(MUTATION=mutation, PYTHONPATH=str(ROOT / "tests"))
    sys.exit(pytest.main(["-p", "mutations", "-q", "-p", "no:cacheprovider", f"tests/{which}"]))


def on_ranks(function: Callable[[int], Any], world: int = 2) -> list:
    """What a function of the rank returns on each, in processes that make up a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = _server.SimpleQueue()
    ranks = [start(_run_function, function, n, world, port, results) for n in range(world)]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return [found for _, found in sorted(results.get() for _ in ranks)]


def _run_function(function: Callable, rank: int, world: int, port: int, results: Any) -> None:
    import mutations  # noqa: F401  as in _run_rank
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results.put((rank, function(rank)))
    dist.barrier()
    dist.destroy_process_group()


def inject(action: str, step: int, out: Path) -> None:
    """Has this rank do something when it begins a step, counted from the start of the run.

    Actions: `kill`, `stop` (SIGSTOP), `sleep4` (seconds), `term` and `usr1` (signals to itself),
    `file` (makes STOP), `error` and `memory` (exceptions), `limit` (no more memory is given),
    `nan` (the loss of this step, of its first micro-batch), `codebook` (shifts one after this
    step), `exit` (before the ranks have met; the step is ignored).
    """
    from pipeline.training.run import Run

    start_step = Run.start_step
    if action == "exit":
        os._exit(1)

    def disturbed(run: Run) -> None:
        if run.images_seen == step * run.config.batch_size:
            if action in ("kill", "stop", "term", "usr1"):
                os.kill(os.getpid(), getattr(signal, f"SIG{action.upper()}"))
            elif action.startswith("sleep"):
                time.sleep(float(action.removeprefix("sleep")))
            elif action == "file":
                (out / "STOP").touch()
            elif action == "limit":
                resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
            elif action == "nan":
                _spoil_next_loss()
            elif action == "codebook":
                _shift_next_codebook()
            else:
                raise MemoryError if action == "memory" else ValueError("on purpose")
        start_step(run)

    Run.start_step = disturbed


def _spoil_next_loss() -> None:
    """The next loss of this rank is not a number, though its gradient is finite."""
    from pipeline import train_vqvae

    original = train_vqvae.loss

    def loss(*arguments):
        train_vqvae.loss = original
        total, *rest = original(*arguments)
        return total + float("nan"), *rest

    train_vqvae.loss = loss


def _shift_next_codebook() -> None:
    """A codebook of this rank is another one after the next step."""
    from pipeline.training.codebooks import Codebooks

    original = Codebooks.commit

    def commit(self, *arguments):
        Codebooks.commit = original
        revived = original(self, *arguments)
        self.levels[-1][1].sums[0, 0] += 1e-3  # a codebook that is shifted alone would heal
        return revived

    Codebooks.commit = commit


def _log_samples(path: Path) -> None:
    """Has this rank write down which samples it reads, and where in the stream it starts."""
    from pipeline import train_vqvae

    original = train_vqvae.training_batches

    def training_batches(fetch, count, *, start, **rest):
        log = open(path, "a", buffering=1)  # noqa: SIM115
        places = itertools.count(start, rest["batch_size"])

        def logged(indices):
            log.write(json.dumps([next(places), indices.tolist()]) + "\n")
            return fetch(indices)

        return original(logged, count, start=start, **rest)

    train_vqvae.training_batches = training_batches


def consumption(out: Path, rank: int) -> Iterator[tuple[int, list[int]]]:
    """(images seen before, samples) of each batch that a rank has read, over all starts."""
    path = out.with_suffix(f".samples{rank}")
    for line in path.read_text().splitlines() if path.is_file() else []:
        yield tuple(json.loads(line))


def misused_samples(out: Path, total: int = TOTAL, world: int = 2) -> tuple[int, int]:
    """How many samples of an undisturbed run's batches were lost, and how many are there besides.

    Of what was read again after a resume only the last time counts: then every global batch is
    there once, in its order. Loader workers may read on.
    """
    from pipeline.data.order import stream

    read = [dict(consumption(out, rank)) for rank in range(world)]
    lost = repeated = 0
    for seen in range(0, total, BATCH):
        samples = [sample for part in read for sample in part.get(seen, [])]
        planned = stream(0, COUNT, seen, BATCH).tolist()
        if samples != planned:
            lost += (Counter(planned) - Counter(samples)).total()
            repeated += (Counter(samples) - Counter(planned)).total()
            assert lost or repeated, f"the batch at {seen} is in another order"
    return lost, repeated


def assert_samples_as_planned(out: Path, world: int = 2) -> None:
    """Every sample of every batch was used exactly once, and in its place."""
    assert misused_samples(out, world=world) == (0, 0)


def state(out: Path) -> dict:
    """All that training has come to: hashes of weights, codebooks, average and moments, and the
    lines of metrics."""
    newest = max((out / "checkpoints").glob("images-*"))
    files = {}
    for directory in (newest, out / "final"):
        manifest = json.loads((directory / "manifest.json").read_text())["files"]
        files |= {
            f"{directory.name}/{name}": entry["sha256"]
            for name, entry in manifest.items() if name.endswith(".safetensors")
        }  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    drop = ("time", "throughput/", "memory/")
    return {
        "files": files,
        "lines": [{k: line[k] for k in line if not k.startswith(drop)} for line in lines],
        "state": json.loads((newest / "state.json").read_text())["images_seen"],
    }


def watch_disk(monkeypatch: Any) -> list[tuple[str, Path]]:
    """("synced", path) and ("named", path) of fsync and renames of this process, as they come."""
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(file: int) -> None:
        fsync(file)
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{file}"))))

    def watched_rename(source: Path, target: Path, **rest: Any) -> None:
        rename(source, target, **rest)
        events.append(("named", Path(target)))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "replace", watched_rename)
    return events


def debris(out: Path) -> list[Path]:
    """What a killed process leaves behind and the next start removes."""
    return [path for path in out.rglob(".*") if path.name.startswith((".tmp-", ".trash-"))]
