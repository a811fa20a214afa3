"""What ranks decide together, how they name the one that is missing, and how a stage ends."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import faults
import pytest
import torch

from pipeline import stage
from pipeline.training import collectives, control
from pipeline.training.control import Control, Heartbeats, rank_timeout_sec

CPU = torch.device("cpu")
TRUE = torch.ones((), dtype=torch.bool)


def decide(rank: int) -> list:
    """One rank at a time knows something."""
    found = []
    for knows in (0, 1, 2):
        mine = Control(CPU)
        finite = ~TRUE if rank == knows else TRUE
        found.append(mine.agree(finite))
        if rank == knows:
            mine.asked, mine.fault = "SIGTERM", f"no room on {rank}"
        found += [mine.agree(TRUE), mine.stops]
        try:
            mine.raise_fault()
        except stage.UserError as error:
            found.append(str(error))
        found.append(Control(CPU).agree(TRUE) and not Control(CPU).stops)
    return found


def test_what_one_rank_knows_is_known_to_all_and_told_alike():
    found = faults.on_ranks(decide, 3)
    assert found[0] == found[1] == found[2]
    told = ["no room on 0", "rank 1: no room on 1", "rank 2: no room on 2"]
    assert found[0] == [item for text in told for item in (False, True, True, text, True)]


def share(rank: int) -> list:
    def fails():
        raise stage.InUse("über: it is taken")

    found = [collectives.share([rank, "é"], 1, CPU), control.on_rank_zero(lambda: rank, CPU)]
    try:
        control.on_rank_zero(fails, CPU)
    except stage.UserError as error:
        found += [type(error).__name__, str(error)]
    return found


def test_values_and_errors_of_one_rank_are_those_of_all():
    assert faults.on_ranks(share) == [[[1, "é"], 0, "InUse", "über: it is taken"]] * 2


def watch(rank: int) -> list[str]:
    """Three ranks: all there; rank 2 a step behind; rank 1 silent."""
    found, beats = [], Heartbeats(Path("unused"))
    torch.distributed.barrier()
    found.append(beats.missing().text)
    if rank != 2:
        beats.arrive()
    torch.distributed.barrier()
    time.sleep(2 * control.BEAT_SEC)
    found.append(beats.missing().text)
    torch.distributed.barrier()
    if rank == 1:
        beats.close()
        time.sleep(control.SILENT_SEC + 2 * control.BEAT_SEC)
    else:
        time.sleep(2 * control.BEAT_SEC)
        found.append(beats.missing().text)
    torch.distributed.barrier()
    return [text.partition(" (")[0] + text.partition(")")[2] for text in found]


def test_the_rank_that_is_behind_or_silent_is_named():
    found = faults.on_ranks(watch, 3)
    assert found[0] == ["", "rank 2 is behind", "rank 1 died or is stopped"]
    assert found[2] == ["", "", "rank 1 died or is stopped"]  # it says nothing of itself


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_timeout_is_a_number_above_zero(monkeypatch, text):
    assert rank_timeout_sec() == 600
    monkeypatch.setenv("RANK_TIMEOUT_SEC", text)
    with pytest.raises(stage.UserError, match="RANK_TIMEOUT_SEC must be a positive number"):
        rank_timeout_sec()


# The end of a stage.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    out: Path


def end_of(main, out, monkeypatch) -> tuple[int, dict | None]:
    monkeypatch.setattr("sys.argv", ["stage.py", f"--out={out}"])
    before = [signal.getsignal(number) for number in stage.STOP_SIGNALS]
    with pytest.raises(SystemExit) as end:
        stage.run(Config, main)
    assert before == [signal.getsignal(number) for number in stage.STOP_SIGNALS]
    status = out / "status.json"
    return end.value.code, json.loads(status.read_text()) if status.is_file() else None


@pytest.mark.parametrize("number", stage.STOP_SIGNALS)
def test_a_stage_that_is_asked_to_stop_asks_to_be_started_again(number, tmp_path, monkeypatch):
    def main(config):
        os.kill(os.getpid(), number)
        time.sleep(5)

    code, status = end_of(main, tmp_path, monkeypatch)
    assert code == status["exit_code"] == 85 and status["state"] == "requeue"
    assert number.name in status["reason"]


def test_a_refused_second_job_leaves_the_status_to_the_first(tmp_path, monkeypatch, capsys):
    def main(config):
        raise stage.InUse("taken")

    assert end_of(main, tmp_path, monkeypatch) == (2, None)
    assert capsys.readouterr().err == "error: taken\n"


def test_the_first_rank_to_fail_has_the_reason_and_done_is_done(tmp_path):
    stage.write_status(tmp_path, "failed", 1, "first")
    stage.write_status(tmp_path, "failed", 1, "of the first one's end")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "first"
    stage.write_status(tmp_path, "done", 0, "", 5)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
