"""Whatever ends a run, the next start makes it what an undisturbed run is, bit for bit.

In `make test` each fault once, drawn by FAULT_SEED; in `make test-faults` (marker faults) with more
draws, and a kill at every failpoint. Corrupt checkpoints are in test_checkpoint.py, losses that are
not finite in test_ranks.py and test_steps.py, other engines in test_zero.py.
"""

import errno
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faults import (
    SAVE,
    STEPS,
    TOTAL,
    Job,
    assert_samples_as_planned,
    consumption,
    debris,
    deepspeed,
    state,
)

from pipeline.training.checkpoint import Checkpoints

SEED = int(os.environ.get("FAULT_SEED", "0"))
DRAWS = [0, *[pytest.param(draw, marks=pytest.mark.faults) for draw in range(1, 6)]]


def draw(row: str, number: int) -> random.Random:
    return random.Random(f"{SEED} {row} {number}")


@pytest.fixture(scope="module")
def undisturbed(face_shards, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Job(face_shards, out).wait(120) == [0, 0]
    assert_samples_as_planned(out)
    return state(out)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


def ends_as_undisturbed(shards: Path, out: Path, undisturbed: dict, lines: bool = True) -> None:
    """Another start of the same command. `lines`: metrics too, which a run that was asked to stop
    has one more of."""
    job = Job(shards, out)
    assert job.wait() == [0, 0], job.log()
    found = state(out)
    assert found["files"] == undisturbed["files"]
    assert not lines or found["lines"] == undisturbed["lines"]
    assert_samples_as_planned(out)
    assert not debris(out)
    assert job.status() == {"state": "done", "exit_code": 0, "reason": "", "images_seen": TOTAL}


# death at any step.


@pytest.mark.parametrize("number", DRAWS)
def test_a_killed_rank_ends_the_job_by_name_and_nothing_is_lost(
    face_shards, out, undisturbed, number
):
    chance = draw("K1", number)
    rank, step = chance.randrange(2), chance.randrange(1, STEPS)
    job = Job(face_shards, out, f"kill:{rank}:{step}")
    codes = job.wait()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert job.status()["exit_code"] == 1
    assert f"rank {rank}" in job.status()["reason"], job.status()
    ends_as_undisturbed(face_shards, out, undisturbed)


@pytest.mark.parametrize("number", DRAWS)
def test_nothing_is_lost_where_all_ranks_are_killed_at_any_moment(
    face_shards, out, undisturbed, number
):
    chance = draw("K1 all", number)
    job = Job(face_shards, out)
    job.wait_for_step(chance.randrange(STEPS))
    time.sleep(chance.random() * 0.2)
    job.signal(signal.SIGKILL)
    job.wait()
    ends_as_undisturbed(face_shards, out, undisturbed)


@pytest.mark.parametrize("number", DRAWS)
def test_ranks_whose_launcher_was_killed_save_and_end(face_shards, out, undisturbed, number):
    chance = draw("K1 launcher", number)
    job = Job(face_shards, out, "", launcher=True)
    job.wait_for_step(chance.randrange(1, STEPS // 2))
    job.signal(signal.SIGKILL)
    pids = [int(pid) for pid in out.with_suffix(".pids").read_text().split()]
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    assert job.status()["exit_code"] == 85 and "SIGTERM" in job.status()["reason"]
    ends_as_undisturbed(face_shards, out, undisturbed, lines=False)


# death at any place of writing and pruning a checkpoint. Each place alone: test_checkpoint.py.

# a run writes checkpoint after checkpoint, of 4 files each, and prunes from the fourth on
FAILPOINTS = [
    f"{name}@{count}"
    for name, counts in {
        "before-directory": (2,), "after-file": (5, 6, 7, 8), "after-sync": (2,),
        "after-manifest": (2, 9), "before-rename": (4,), "after-rename": (1, 3, 9),
        "before-prune": (1, 2), "after-trash": (1, 6),
    }.items()
    for count in counts
]  # fmt: skip
CHOSEN = random.Random(f"{SEED} K2").choice(FAILPOINTS)


@pytest.mark.parametrize(
    "place",
    [CHOSEN, *[pytest.param(p, marks=pytest.mark.faults) for p in FAILPOINTS if p != CHOSEN]],
)
def test_nothing_is_lost_where_the_writer_is_killed(face_shards, out, undisturbed, place):
    job = Job(face_shards, out, FAILPOINT=f"{place}:kill")
    assert job.wait()[0] == -signal.SIGKILL, job.log()
    read = max((seen for seen, _ in consumption(out, 0)), default=0)
    newest = Checkpoints(out).newest()
    if newest is None:
        assert place == "before-directory@1"
    else:  # the one that was written, or the one before
        assert newest.images_seen >= read - 2 * SAVE
    ends_as_undisturbed(face_shards, out, undisturbed)


# being asked to stop.


def asked(chance: random.Random) -> str:
    """A fault that asks for a stop in one of the ways, and not in the last step."""
    step = chance.randrange(1, STEPS - 1)
    ways = [f"term:{chance.randrange(2)}:{step}", f"usr1:{chance.randrange(2)}:{step}",
            f"usr1:0:{step},usr1:1:{step}", f"term:0:{step},term:1:{step + 1}"]  # fmt: skip
    return chance.choice(ways)


@pytest.mark.parametrize("number", DRAWS)
def test_a_signal_to_any_rank_has_all_of_them_save_one_step_and_ask_to_be_requeued(
    face_shards, out, undisturbed, number
):
    fault = asked(draw("K3", number))
    job = Job(face_shards, out, fault)
    assert job.wait() == [85, 85], job.log()
    status, step = job.status(), int(fault.split(":")[2].split(",")[0])
    assert (status["state"], status["exit_code"]) == ("requeue", 85)
    newest = Checkpoints(out).newest()
    assert newest.images_seen == status["images_seen"] == (step + 1) * TOTAL // STEPS
    ends_as_undisturbed(face_shards, out, undisturbed, lines=False)


@pytest.mark.faults
def test_under_zero_2_a_signal_to_one_rank_does_the_same(face_shards, tmp_path, undisturbed):
    pytest.importorskip("deepspeed")
    zero = deepspeed("zero2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    job = Job(face_shards, whole, **zero)
    assert job.wait(180) == [0, 0], job.log()
    assert state(whole)["files"] != undisturbed["files"]  # it adds up otherwise than DDP
    job = Job(face_shards, out, "term:1:5", **zero)
    assert job.wait(180) == [85, 85], job.log()
    status = job.status()
    assert (status["state"], status["exit_code"], status["images_seen"]) == ("requeue", 85, 96)
    assert Checkpoints(out).newest().images_seen == 96
    job = Job(face_shards, out, **zero)
    assert job.wait(180) == [0, 0], job.log()
    assert state(out)["files"] == state(whole)["files"]
    assert_samples_as_planned(out)


def test_signals_to_everybody_while_the_last_checkpoint_is_written_do_no_harm(
    face_shards, out, undisturbed
):
    """To the loader's workers too. After step 5 the run's fourth checkpoint takes its time."""
    job = Job(face_shards, out, "usr1:0:4", "--workers=1", FAILPOINT="after-file@14:2")
    job.wait_for_step(5)
    for _ in range(4):
        for rank in job.processes:
            workers = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
            assert workers
            for pid in [rank.pid, *map(int, workers)]:
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    with suppress(ProcessLookupError):  # a git that ran for a moment
                        os.kill(pid, number)
        time.sleep(0.2)
    assert job.wait() == [85, 85], job.log()
    assert job.status()["images_seen"] == 80
    ends_as_undisturbed(face_shards, out, undisturbed, lines=False)


# no room.


@pytest.mark.parametrize("number", DRAWS)
def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_with_the_one_before_whole(
    face_shards, out, undisturbed, number
):
    chance = draw("C2", number)
    name, file = chance.choice(["ENOSPC", "EIO", "EDQUOT"]), chance.randrange(5, 4 * 8)
    job = Job(face_shards, out, FAILPOINT=f"after-file@{file}:{name}")
    assert job.wait() == [2, 2], job.log()
    reason = job.status()["reason"]
    assert "could not be written" in reason and os.strerror(getattr(errno, name)) in reason
    assert job.log().count("error: ") == 1
    assert Checkpoints(out).newest() is not None and not debris(out)
    ends_as_undisturbed(face_shards, out, undisturbed)


# a rank that does not come, or cannot go on.


def test_a_slow_rank_is_named_and_waited_for(face_shards, out, undisturbed):
    job = Job(face_shards, out, "sleep9:1:5", RANK_TIMEOUT_SEC="30")
    assert job.wait() == [0, 0], job.log()
    assert "warning: the others wait: rank 1 (" in job.log()
    assert "is behind" in job.log()
    assert state(out) == undisturbed


def test_a_rank_that_pauses_goes_on(face_shards, out, undisturbed):
    job = Job(face_shards, out, "stop:1:5", RANK_TIMEOUT_SEC="60")
    job.wait_for_step(5)
    time.sleep(3)
    job.signal(signal.SIGCONT, 1)
    assert job.wait() == [0, 0], job.log()
    assert state(out) == undisturbed


@pytest.mark.parametrize("number", DRAWS)
def test_a_rank_that_is_stopped_for_ever_ends_the_job_by_name(
    face_shards, out, undisturbed, number
):
    chance = draw("R1", number)
    rank, step = chance.randrange(2), chance.randrange(1, STEPS)
    job = Job(face_shards, out, f"stop:{rank}:{step}", RANK_TIMEOUT_SEC="5")
    job.wait_for_step(step)
    began = time.monotonic()
    job.processes[1 - rank].join(40)
    assert job.processes[1 - rank].exitcode == 1, job.log()
    assert time.monotonic() - began < 5 + 10 + 10
    job.signal(signal.SIGKILL, rank)
    assert f"rank {rank}" in job.status()["reason"], job.status()
    assert "died or is stopped" in job.status()["reason"]
    ends_as_undisturbed(face_shards, out, undisturbed)


def test_a_rank_that_never_comes_ends_the_others(face_shards, out):
    job = Job(face_shards, out, "exit:1:0", RANK_TIMEOUT_SEC="1")
    assert job.wait(60) == [1, 1]
    assert "not all processes came within 11 s" in job.status()["reason"]


@pytest.mark.parametrize("number", DRAWS)
def test_a_rank_that_fails_has_the_reason(face_shards, out, undisturbed, number):
    chance = draw("R2", number)
    rank, step = chance.randrange(2), chance.randrange(1, STEPS)
    action = chance.choice(["error", "memory", "limit"])
    job = Job(face_shards, out, f"{action}:{rank}:{step}")
    codes = job.wait()
    assert 0 not in codes and 85 not in codes, job.log()
    reason = job.status()["reason"]
    if action != "limit":  # without any memory it may not be able to say anything
        assert {"error": "ValueError", "memory": "MemoryError"}[action] in reason
    assert rank == 0 or "rank 1" in reason
    ends_as_undisturbed(face_shards, out, undisturbed)


# other numbers of ranks and workers.


def test_the_samples_are_the_same_for_any_number_of_ranks_and_workers(face_shards, out):
    for world, step, workers in ((1, 3, 0), (2, 8, 0), (1, 12, 0), (2, 99, 1)):
        job = Job(face_shards, out, f"usr1:0:{step}", f"--workers={workers}", world=world)
        assert job.wait() == [85 if step < STEPS else 0] * world, job.log()
    assert_samples_as_planned(out)
