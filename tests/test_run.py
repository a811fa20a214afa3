"""The plumbing of a training loop: what is due when, the clock in skipped steps, what is kept."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import metrics
from torch import nn

from pipeline.stage import Requeue, UserError
from pipeline.training.distributed import make_accelerator
from pipeline.training.run import Run
from pipeline.training.steps import Steps
from pipeline.training.weight_average import WeightAverage

NAN = float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    total_images: int = 96
    batch_size: int = 8
    learning_rate: float = 0.5
    schedule: str = "constant"
    warmup_images: int = 64
    log_every: int = 20
    validate_every: int = 24
    save_every: int = 40


def make(out, patience=10, changes=None, **options) -> Run:
    model = nn.Linear(3, 2)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    average = WeightAverage(model, 100)
    accelerator = make_accelerator()
    trained, optimizer = accelerator.prepare(model, adam)
    steps = Steps(accelerator, trained, optimizer, 1e9, patience)
    return Run(Config(out=out, **(changes or {})), model, average, steps, "data", **options)


def step(run: Run, factor: float = 1.0):
    run.start_step()
    loss = run.steps.model(torch.ones(4, 3)).square().mean() * factor
    norm = run.steps.take([loss])
    return run.end_step(None if norm is None else {"loss/total": loss})


@pytest.mark.parametrize("changes", [{}, {"batch_size": 7}, {"save_every": 0, "log_every": 3}])
def test_what_is_due_is_a_multiple_within_the_step_and_all_of_it_at_the_end(tmp_path, changes):
    run = make(tmp_path, changes=changes)
    run.start("x", "")
    config, before, ends = run.config, 0, False
    while run.images_seen < config.total_images:
        due = step(run)
        ends = run.images_seen >= config.total_images
        reached = range(before + 1, run.images_seen + 1)

        def within(every, reached=reached):
            return every > 0 and any(seen % every == 0 for seen in reached)

        assert due.ends == ends
        assert due.saves == (ends or within(config.save_every))
        assert due.validates == (ends or within(config.validate_every))
        assert due.logs == (due.saves or within(config.log_every))
        assert run.is_due(16) == within(16)
        before = run.images_seen
    assert ends and before == -(-config.total_images // config.batch_size) * config.batch_size


def test_schedule_and_average_stand_still_in_a_skipped_step(tmp_path):
    run = make(tmp_path)
    run.start("x", "")
    rates, averages = [], []
    for factor in (1.0, NAN, 1.0, 1.0):
        step(run, factor)
        rates.append(run.optimizer.param_groups[0]["lr"])
        averages.append(run.average.model.weight.clone())
    # a warm-up over 64 images to 0.5: the third step is the second one that is taken
    assert rates == pytest.approx([0.5 / 64 * (seen + 1) for seen in (0, 8, 8, 16)])
    assert torch.equal(averages[0], averages[1]) and not torch.equal(averages[1], averages[2])
    assert (run.images_seen, run.trained_images) == (32, 24)


def test_no_line_is_due_where_all_steps_were_skipped(tmp_path):
    run = make(tmp_path, changes={"log_every": 8})
    run.start("x", "")
    assert [step(run, factor).logs for factor in (NAN, NAN, 1.0)] == [False, False, True]


def test_a_line_holds_the_means_and_what_every_run_reports(tmp_path):
    run = make(tmp_path)
    run.start("x", "")
    for factor in (1.0, NAN, 1.0):
        step(run, factor)
    run.log({"loss/total": 0.25})
    (line,) = metrics(tmp_path)
    assert line["images_seen"] == 24 and line["loss/total"] == 0.25
    assert line["loss/skipped_steps"] == 1 and line["schedule/learning_rate"] == run.rate
    assert line["throughput/images_per_sec"] > 0


def test_time_spent_on_reports_is_not_part_of_the_throughput(tmp_path):
    run = make(tmp_path)
    run.start("x", "")
    restarts = []
    run.tracker.restart_clock = restarts.append
    for _ in range(8):
        step(run)
    # lines after 24 and 40, validations after 24 and 48: each before the step that follows
    assert restarts == [24, 40, 48]


def test_a_diverged_run_saves_and_ends(tmp_path):
    run = make(tmp_path, patience=2)
    run.start("x", "")
    step(run)
    step(run, NAN)
    with pytest.raises(UserError, match="2 steps in a row"):
        step(run, NAN)
    state = run.checkpoints.newest()
    assert state is not None and state.images_seen == 24
    assert state.state["skipped_steps"] == 2


def test_a_resumed_run_has_its_clock_its_weights_and_what_the_stage_kept(tmp_path):
    run = make(tmp_path, extra={"best": None})
    assert not run.resume()
    run.start("x", "")
    step(run)
    step(run, NAN)
    run.extra["best"] = 1.5
    run.save()
    run.finish_saving()
    again = make(tmp_path, extra={"best": None})
    assert again.resume()
    assert again.extra == {"best": 1.5}
    assert (again.images_seen, again.trained_images) == (16, 8)
    again.start("x", "")
    step(run), step(again)  # needs Adam's moments as well
    for one, other in ((run.model, again.model), (run.average.model, again.average.model)):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_the_untrained_state_is_saved_once_and_told(tmp_path, capsys):
    make(tmp_path).start("x", "5 images")
    assert capsys.readouterr().out == f"{tmp_path}: starting anew; 5 images\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["images-000000000"]
    run = make(tmp_path)
    run.resume()
    run.images_seen = 1600
    run.start("x", "5 images")
    assert capsys.readouterr().out == f"{tmp_path}: resuming at 1,600 images; 5 images\n"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_nothing_is_saved_where_the_check_before_it_fails(tmp_path):
    def check():
        raise RuntimeError("the ranks differ")

    with pytest.raises(RuntimeError, match="the ranks differ"):
        make(tmp_path, before_save=check).start("x", "")
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_is_asked_to_stop_saves_after_the_step_and_begins_no_other(tmp_path):
    run = make(tmp_path)
    run.resume()
    run.start("x", "")
    assert not step(run).saves
    run.control.asked = "SIGUSR1"
    due = step(run)
    assert (due.saves, due.logs, due.ends) == (True, True, False)
    run.save()
    with pytest.raises(Requeue, match="stopped by SIGUSR1 at 16 images") as stopped:
        step(run)
    assert stopped.value.images_seen == 16
    assert run.checkpoints.newest().images_seen == 16


def test_a_run_that_is_asked_to_stop_in_its_last_step_is_done(tmp_path):
    run = make(tmp_path, changes={"total_images": 16})
    run.start("x", "")
    step(run)
    run.control.asked = "SIGTERM"
    due = step(run)
    assert due.ends and due.saves
    run.save()
    assert run.end() == 16


@pytest.mark.parametrize(("name", "stops"), [("STOP", True), ("STOP.7", True), ("STOP.8", False)])
def test_a_stop_file_is_of_this_job_or_of_any_and_is_used_up(tmp_path, monkeypatch, name, stops):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = make(tmp_path)
    run.start("x", "")
    (tmp_path / name).touch()
    run.control._looked = 0.0  # it looks once in a second
    assert step(run).saves == stops
    if stops:
        run.save()
        with pytest.raises(Requeue, match=f"the file {name} at 8 images"):
            step(run)
    assert (tmp_path / name).exists() != stops


def test_a_checkpoint_that_cannot_be_written_ends_the_run_after_the_next_step(
    tmp_path, monkeypatch
):
    run = make(tmp_path)
    run.start("x", "")
    step(run)
    monkeypatch.setenv("FAILPOINT", "after-sync:EIO")
    run.save()
    run.checkpoints.wait()
    with pytest.raises(UserError, match=r"at 8 images could not be written: .*Input/output"):
        step(run)
    assert run.checkpoints.newest().images_seen == 0


def test_the_last_checkpoint_is_waited_for_and_its_failure_is_one_of_the_run(tmp_path, monkeypatch):
    run = make(tmp_path, changes={"total_images": 8})
    run.start("x", "")
    step(run)
    monkeypatch.setenv("FAILPOINT", "after-manifest:ENOSPC")
    run.save()
    with pytest.raises(UserError, match="No space left on device"):
        run.end()
