"""Training under faults, drawn one after the other; ends equal to an undisturbed run, or fails.

    python benchmarks/soak.py --json docs/benchmarks/soak.json
    python benchmarks/soak.py --draws 1000 --minutes 60 --seed 3 --json PATH

The VQ-VAE of configs/debug trains on two ranks for 64 steps, of which one has a loss that is not
finite on one rank. Each start of it is ended by a fault at a random step, or at a random place of
writing a checkpoint, until it comes to its end; then the next run begins. A run that has ended must
have weights, codebooks, average and moments of a run that was never disturbed, bit for bit, and
every sample of its stream exactly once, in its order. Otherwise its directory is kept and named.

A row for each kind of fault: `draws`, the exit codes of the ranks, and the median seconds of a
start. The last row is of all: `starts`, `images` of the runs, `images_read` with those that were
trained on again, `lost` and `repeated` samples, `equal` runs of all `runs`.
"""

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "tests")]

from faults import BATCH, Job, consumption, debris, make_shards, misused_samples, state  # pyright: ignore[reportMissingImports]
from measure import print_table, write_json

from pipeline.training.checkpoint import fault_of

STEPS, SAVE_STEPS, AHEAD = 64, 4, 10  # a fault comes at most so many steps after the resume
TOTAL = STEPS * BATCH
FLAGS = (f"--total_images={TOTAL}", f"--save_every={SAVE_STEPS * BATCH}", "--validate_every=256")
NOT_FINITE = "nan:1:21"  # in every run, also in the undisturbed one


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        fault: as `faults.Job` takes it; rank, step and later (step + 2) are filled in.
        codes: exit codes a rank may have then.
        damage: what is done to the newest checkpoint afterwards.
        sure: false where the run may come to its end before.
    """

    fault: str
    codes: set[int]
    environment: dict[str, str] = field(default_factory=dict)
    damage: str = ""
    sure: bool = True


KILL, BOTH = {-signal.SIGKILL, 1}, "kill:0:{step},kill:1:{step}"
KINDS = {
    "kill -9 of a rank": Kind("kill:{rank}:{step}", KILL),
    "kill -9 of both ranks": Kind(BOTH, KILL),
    "kill -9 in writing a checkpoint": Kind("", KILL, {"FAILPOINT": "{place}:kill"}, sure=False),
    "SIGTERM to a rank": Kind("term:{rank}:{step}", {85}),
    "SIGUSR1 to both, then SIGTERM": Kind("usr1:0:{step},usr1:1:{step},term:{rank}:{later}", {85}),
    "the file STOP": Kind("file:{rank}:{step}", {85}, sure=False),
    "no room for a checkpoint": Kind("", {2}, {"FAILPOINT": "{place}:{error}"}, sure=False),
    "an exception on a rank": Kind("error:{rank}:{step}", {1}),
    "no memory on a rank": Kind("memory:{rank}:{step}", {1}),
    "a slow rank, then SIGTERM": Kind("sleep1:{rank}:{step},term:0:{later}", {85}),
    "a rank stopped for a second, then SIGTERM": Kind("stop:{rank}:{step},term:0:{later}", {85}),
    "a rank stopped for ever": Kind("stop:{rank}:{step}", KILL, {"RANK_TIMEOUT_SEC": "3"}),
    "kill -9, newest checkpoint truncated": Kind(BOTH, KILL, damage="truncate"),
    "kill -9, a bit of the newest flipped": Kind(BOTH, KILL, damage="flip"),
    "kill -9, a file of the newest deleted": Kind(BOTH, KILL, damage="delete"),
}
PLACES = {  # how often a save passes there
    "before-directory": 1, "after-file": 4, "after-sync": 1, "after-manifest": 1,
    "before-rename": 1, "after-rename": 1, "before-prune": 0.5, "after-trash": 0.5,
}  # fmt: skip
WRITING = ("before-directory", "after-file", "after-sync", "after-manifest")  # may find no room


def checkpoints(out: Path) -> list[int]:
    """Steps of those that verify, in order."""
    paths = sorted((out / "checkpoints").glob("images-*"))
    return [int(path.name[7:]) // BATCH for path in paths if fault_of(path) is None]


def damage_newest(out: Path, how: str, chance: random.Random) -> None:
    newest = max(path for path in (out / "checkpoints").glob("images-*") if fault_of(path) is None)
    file = chance.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[: chance.randrange(len(data))])
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)


class Soak:
    """Runs one after the other, and what came of them."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed = work, seed
        self.shards = make_shards(work)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.codes: dict[str, set[int]] = defaultdict(set)
        self.starts = self.runs = self.images_read = 0
        self.draws = 0
        out = work / "undisturbed"
        self.refuse_unless(self.start(out).wait(200) == [0, 0], out, "did not end")
        self.undisturbed = state(out)["files"]

    def start(self, out: Path, fault: str = "", **environment: str) -> Job:
        faults = ",".join(filter(None, (NOT_FINITE, fault)))
        return Job(self.shards, out, faults, *FLAGS, **environment)

    def refuse_unless(self, right: bool, out: Path, what: str) -> None:
        if not right:
            log = out.with_suffix(".log").read_text()
            sys.exit(f"{log[-3000:]}\n{out} {what} (seed {self.seed}, {self.draws} draws)")

    def disturb(self, out: Path) -> None:
        """One start that ends by a fault."""
        chance = random.Random(f"{self.seed} {self.draws}")
        sound = checkpoints(out)
        at = max(sound, default=0)
        names = [name for name, kind in KINDS.items() if len(sound) > 1 or not kind.damage]
        name = chance.choice(names)
        kind, rank = KINDS[name], chance.randrange(2)
        step = chance.randrange(at + 1, min(at + AHEAD, STEPS - 3))
        place = chance.choice(list(PLACES) if -signal.SIGKILL in kind.codes else WRITING)
        count = 1 + chance.randrange(max(1, round(2 * PLACES[place])))
        words = {"rank": rank, "step": step, "later": step + 2, "place": f"{place}@{count}",
                 "error": chance.choice(["ENOSPC", "EIO", "EDQUOT"])}  # fmt: skip
        environment = {key: text.format(**words) for key, text in kind.environment.items()}
        job = self.start(out, kind.fault.format(**words), **environment)
        if kind.fault.startswith("stop"):
            job.wait_until_stopped(rank)
            if kind.codes == KILL:
                job.processes[1 - rank].join(60)
                job.signal(signal.SIGKILL, rank)
            else:
                time.sleep(1)
                job.signal(signal.SIGCONT, rank)
        codes = job.wait()
        self.starts += 1
        self.draws += 1
        self.seconds[name].append(time.monotonic() - job.began)
        self.codes[name] |= set(codes)
        right = set(codes) <= kind.codes or (codes == [0, 0] and not kind.sure)
        self.refuse_unless(right, out, f"ended with {codes} by {name}")
        if kind.damage and len(checkpoints(out)) > 1:
            damage_newest(out, kind.damage, chance)

    def run(self, draws: int, end: float) -> None:
        """One run from its start to its end; no more faults after `draws`, or past `end`."""
        out = self.work / f"run-{self.runs}"
        while self.draws < draws and time.monotonic() < end:
            if max(checkpoints(out), default=0) + 4 >= STEPS:
                break
            self.disturb(out)
        job = self.start(out)
        self.refuse_unless(job.wait(200) == [0, 0], out, "did not end")
        self.starts += 1
        self.runs += 1
        self.images_read += BATCH * sum(1 for _ in consumption(out, 0))
        self.refuse_unless(misused_samples(out, TOTAL) == (0, 0), out, "misused samples")
        self.refuse_unless(state(out)["files"] == self.undisturbed, out, "ended otherwise")
        self.refuse_unless(not debris(out), out, "has leftovers")
        shutil.rmtree(out)

    def rows(self) -> list[dict[str, Any]]:
        own = {"contender": "ours", "case": "2 ranks", "device": "cpu", "extrapolated": False}
        rows = [
            {**own, "fault": name, "draws": len(times), "exit_codes": sorted(self.codes[name]),
             "median_s": statistics.median(times), "max_s": max(times)}
            for name, times in sorted(self.seconds.items())
        ]  # fmt: skip
        # runs that are not equal, or misuse samples, have ended the script
        total = {"fault": "all", "draws": self.draws, "starts": self.starts, "runs": self.runs,
                 "equal": self.runs, "images": self.runs * TOTAL, "images_read": self.images_read,
                 "lost": 0, "repeated": 0}  # fmt: skip
        return [*rows, own | total]


def soak(work: Path, draws: int, minutes: float, seed: int) -> list[dict[str, Any]]:
    """The rows of so many draws, or of those that so many minutes leave time for."""
    began = time.monotonic()
    found = Soak(work, seed)
    while found.draws < draws and time.monotonic() < began + 60 * minutes:
        found.run(draws, began + 60 * minutes)
        print(f"{found.draws} of {draws} faults, {found.runs} runs as undisturbed", flush=True)
    rows = found.rows()
    rows[-1]["minutes"] = (time.monotonic() - began) / 60
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--draws", type=int, default=200, help="faults")
    parser.add_argument("--minutes", type=float, default=60, help="no more faults after so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))  # kept where a run does not end as it should
    rows = soak(work, arguments.draws, arguments.minutes, arguments.seed)
    shutil.rmtree(work)
    print_table("faults", rows)
    write_json(arguments.json, rows, "cpu")


if __name__ == "__main__":
    main()
