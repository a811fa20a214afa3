"""What all ranks decide together in each step, and who is missing when one of them does not come.

Nothing is done in a signal handler, and no rank acts on what only it knows: a signal, the STOP file
or a failure raises a flag on its rank, one small all-reduce per step makes it everybody's, and
after that step all ranks save, or fail, alike.

A rank that died, hangs or is stopped is told apart by its heartbeat. It goes through the store in
which the ranks found each other, from a thread, with the number of steps the rank has begun.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline import stage
from pipeline.training.collectives import all_reduce_max, alone, share

LOOK_SEC = 1.0  # between looks for the STOP file
BEAT_SEC = 0.5  # between heartbeats
SILENT_SEC = 4.0  # without a heartbeat for so long, a rank is dead or stopped
MARGIN_SEC = 10.0  # by which the process group waits longer than Heartbeats


def rank_timeout_sec() -> float:
    """How long ranks wait for one of them: RANK_TIMEOUT_SEC of the environment, or 600."""
    text = os.environ.get("RANK_TIMEOUT_SEC", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise stage.UserError(f"RANK_TIMEOUT_SEC must be a positive number, not {text!r}")
    return seconds


def on_rank_zero(function: Callable[[], Any], device: torch.device) -> Any:
    """What `function` returns on rank 0, a JSON value, on all ranks. A UserError is raised on all
    of them too."""
    value, error = None, None
    if alone() or dist.get_rank() == 0:
        try:
            value = function()
        except stage.UserError as raised:
            error = [isinstance(raised, stage.InUse), str(raised)]
    value, error = share([value, error], 0, device)
    if error:
        raise (stage.InUse if error[0] else stage.UserError)(error[1])
    return value


class Control:
    """Flags that ranks raise, and what was agreed of them.

    Attributes:
        asked: what asked this rank to stop, if something did.
        fault: what this rank failed in, to be told by all; whoever finds out sets it.
        stops: agreed: all ranks save after this step, and end.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.asked: str | None = None
        self.fault: str | None = None
        self.stops = False
        self._faulty = 0
        self._stop_files: list[Path] = []
        self._looked = 0.0
        self._heartbeats: Heartbeats | None = None

    def listen(self, out: Path) -> None:
        """From here to `close`, signals and a file in `out` ask for a stop, and ranks watch each
        other. Collective."""
        if alone() or dist.get_rank() == 0:
            job = os.environ.get("SLURM_JOB_ID")
            self._stop_files = [out / "STOP", *([out / f"STOP.{job}"] if job else [])]
        for number in stage.STOP_SIGNALS:
            if signal.getsignal(number) is stage.end_at_once:  # else this is not a command
                signal.signal(number, self._ask)
        if not alone():
            self._heartbeats = Heartbeats(out)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number).name

    def _look_for_files(self) -> None:
        now = time.monotonic()
        if now - self._looked > LOOK_SEC:
            self._looked = now
            for path in self._stop_files:
                if path.exists():
                    self.asked = f"the file {path.name}"

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: where a collective in it fails, or lasts too long, the missing rank is
        named."""
        if self._heartbeats is None:
            yield
        else:
            with self._heartbeats.step():
                yield

    def agree(self, finite: torch.Tensor) -> bool:
        """Whether a boolean scalar is true on all ranks. What each knows besides becomes
        everybody's.

        The one exchange of a step besides gradients and codebooks.
        """
        self._look_for_files()
        if self._heartbeats is not None:
            self._heartbeats.arrive()
        rank = 0 if alone() else dist.get_rank()
        own = [self.asked is not None, rank + 1 if self.fault else 0]
        word = torch.cat([(~finite).int().view(1), torch.tensor(own, device=self.device).int()])
        all_reduce_max(word)
        not_finite, stops, self._faulty = word.tolist()
        self.stops = bool(stops)
        return not not_finite

    def raise_fault(self) -> None:
        """Raises UserError on all ranks if `agree` found a failure of one."""
        if self._faulty:
            source = self._faulty - 1
            reason = share(self.fault, source, self.device)
            raise stage.UserError(reason if source == 0 else f"rank {source}: {reason}")

    def forget_files(self) -> None:
        """Removes the STOP files, or the next start would stop too."""
        for path in self._stop_files:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """The ranks no longer watch each other; signals still do no harm."""
        if self._heartbeats is not None:
            self._heartbeats.close()
            self._heartbeats = None


class Beat(NamedTuple):
    """A rank's last heartbeat."""

    number: int
    steps: int  # begun
    name: str  # rank, host and process

    @staticmethod
    def parse(value: bytes) -> "Beat":
        number, steps, name = value.decode().split(" ", 2)
        return Beat(int(number), int(steps), name)


class Missing(NamedTuple):
    """Ranks that the others wait for, and what to say of them; may be none."""

    ranks: set[int]
    text: str


class Heartbeats:
    """Tells the other ranks that this one lives, and finds out which of them does not.

    One thread talks to the store, by a connection of its own; it may hang for ever when the store's
    process is stopped. The other one watches and never waits for it.
    """

    def __init__(self, out: Path):
        self.out, self.rank, self.world = out, dist.get_rank(), dist.get_world_size()
        self.timeout = rank_timeout_sec()
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=SILENT_SEC), wait_for_workers=False,
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.keys = [f"heartbeat/{attempt}/{rank}" for rank in range(self.world)]
        self.name = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"
        self.number = self.steps = 0
        self.since: float | None = None  # when this rank came to where all are needed
        self.asks = False
        self.heard: list[list[Beat]] = []
        self.closed = threading.Event()
        self._beat()
        for loop in (self._talk, self._watch):
            threading.Thread(target=loop, daemon=True).start()

    def arrive(self) -> None:
        """The step has come to where all ranks are needed."""
        self.steps += 1
        self.since = time.monotonic()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, from before `arrive`."""
        try:
            yield
        except RuntimeError as error:  # of a collective, or any other
            self.since = None
            if text := self.missing().text:
                raise RuntimeError(text) from error
            raise
        finally:
            self.since = None

    def _beat(self) -> None:
        self.number += 1
        beat = Beat(self.number, self.steps, self.name)
        self.store.set(self.keys[self.rank], " ".join(map(str, beat)))

    def _talk(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and `missing` knows what to say
            while not self.closed.wait(BEAT_SEC):
                self._beat()
                if self.asks:
                    self.heard.append([Beat.parse(v) for v in self.store.multi_get(self.keys)])

    def _watch(self) -> None:
        warned = False
        while not self.closed.wait(BEAT_SEC):
            since = self.since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited > self.timeout:
                self._end()
            elif waited > self.timeout / 10 and not warned:
                missing = self.missing()
                if missing.ranks and self.since == since:
                    self._tell("warning: the others wait", missing)
                warned = True
            elif since is None:
                warned = False

    def _end(self) -> None:
        """The main thread hangs in a collective, so nothing less than the process can be ended."""
        missing = self.missing()
        what = f"a step took more than {self.timeout:g} s (RANK_TIMEOUT_SEC)"
        text = missing.text or "no rank is missing, look at the network"
        stage.write_status(self.out, "failed", stage.EXIT_FAILED, f"{what}: {text}")
        self._tell(f"error: {what}", missing._replace(text=text))
        os._exit(stage.EXIT_FAILED)

    def _tell(self, what: str, missing: Missing) -> None:
        if self.rank == min(set(range(self.world)) - missing.ranks, default=0):
            print(f"{what}: {missing.text}", file=sys.stderr, flush=True)

    def missing(self) -> Missing:
        """The other ranks that are silent, else those that are behind; takes SILENT_SEC."""
        self.heard, self.asks = [], True
        time.sleep(SILENT_SEC)
        self.asks, heard = False, self.heard
        if len(heard) < 2:
            store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return Missing({0}, f"rank 0, or the launcher, at {store} died or is stopped")
        before, now = heard[0], heard[-1]
        others = set(range(self.world)) - {self.rank}
        silent = {rank for rank in others if before[rank].number == now[rank].number}
        ranks = silent or {rank for rank in others if now[rank].steps < self.steps}
        names = ", ".join(now[rank].name for rank in sorted(ranks))
        if silent:
            return Missing(ranks, f"{names} died or is stopped")
        return Missing(ranks, f"{names} is behind" if ranks else "")

    def close(self) -> None:
        """Ends the threads, soon."""
        self.closed.set()
