"""What training loops share around their steps: resume, clock, cadences, checkpoints, metrics.

The loop itself is written out in its stage:

    run = Run(config, model, average, steps, data_sha256)
    if not run.resume():
        ...                              what only a fresh start needs
    run.start("vqvae", "20,000 training images")
    while run.images_seen < config.total_images:
        run.start_step()
        ...                              a batch, forward, steps.take
        due = run.end_step(metrics)      None for a skipped step
        if due.logs: ...                 run.log(run.means.values(world))
        if due.validates: ...            run.tracker.log(run.images_seen, figures)
        if due.saves: run.save()
    run.tracker.close()
    ...                                  final/
    return run.end()

Where the run is asked to stop, the step in progress is the last: it saves, and `start_step` raises
Requeue instead of beginning another.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy as np
import torch
from torch import nn

from pipeline import stage
from pipeline.training.checkpoint import Checkpoints, lock, restore_training, training_tensors
from pipeline.training.control import on_rank_zero
from pipeline.training.schedule import is_due, learning_rate
from pipeline.training.steps import Steps
from pipeline.training.tracking import MeanMetrics, Tracker
from pipeline.training.weight_average import WeightAverage


def step_seed(seed: int, images_seen: int, rank: int) -> int:
    """The seed of one step's noise or dropout on one rank, in [0, 2^63)."""
    words = np.random.SeedSequence([seed, images_seen, rank]).generate_state(1, np.uint64)
    return int(words[0]) // 2


class Due(NamedTuple):
    """What follows a step."""

    logs: bool  # a line of means; false if all steps since the last line were skipped
    validates: bool
    saves: bool
    ends: bool


class Run:
    """One training run, alike on all ranks. Its clock is `images_seen`.

    Args:
        config: of the stage, with out, total_images, batch_size, learning_rate, schedule,
            warmup_images, log_every, validate_every and save_every.
        model: the module inside the one that `steps` trains; `average` is its average.
        data_sha256: of the data's index; the run resumes on no other data.
        extra: JSON values that each checkpoint keeps besides, and `resume` brings back; the stage
            renews them in `run.extra`.
        before_save: called on all ranks before a checkpoint is written.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        average: WeightAverage,
        steps: Steps,
        data_sha256: str,
        extra: Mapping[str, Any] | None = None,
        before_save: Callable[[], None] | None = None,
    ):
        self.config, self.model, self.average, self.steps = config, model, average, steps
        self.accelerator, self.optimizer = steps.accelerator, steps.optimizer
        self.data_sha256, self.before_save = data_sha256, before_save
        self.extra = dict(extra or {})
        self.control, self.means = steps.control, MeanMetrics()
        self.checkpoints = Checkpoints(config.out, self._report)
        self.lock: TextIO | None = None
        self.images_seen, self.resumed, self.paused = 0, False, False

    def _report(self, fault: str) -> None:
        self.control.fault = fault

    def _claim(self) -> int | None:
        """Takes the run directory for this job; images seen at its newest checkpoint, if any."""
        self.lock = lock(self.config.out)
        self.checkpoints.clean()
        newest = self.checkpoints.newest()
        return None if newest is None else newest.images_seen

    def resume(self) -> bool:
        """Takes the run directory, and goes back to the newest checkpoint that verifies; False
        where nothing was committed. Raises UserError where another job has the directory."""
        newest = on_rank_zero(self._claim, self.accelerator.device)
        if newest is not None:
            checkpoint = self.checkpoints.at(newest)
            self.images_seen = restore_training(
                checkpoint, stage.to_dict(self.config), self.data_sha256,
                self.model, self.average.model, self.optimizer,
            )  # fmt: skip
            self.steps.restore(checkpoint.state)
            self.extra = {name: checkpoint.state[name] for name in self.extra}
            self.resumed = True
        return self.resumed

    def start(self, name: str, data: str) -> None:
        """Tells where the run begins: `name` stands before the progress bar, `data` says on what
        it trains."""
        self.control.listen(self.config.out)
        self.accelerator.wait_for_everyone()
        if not self.resumed:
            self.save()  # the untrained state, so that an early death loses nothing
            self.finish_saving()
        out, seen, is_main = self.config.out, self.images_seen, self.accelerator.is_main_process
        if is_main:
            where = f"resuming at {seen:,} images" if seen else "starting anew"
            print(f"{out}: {where}; {data}")
        self.tracker = Tracker(out, name, self.config.total_images, seen, is_main)
        self.steps.model.train()

    @property
    def trained_images(self) -> int:
        """The clock of schedule and average: unlike that of the data, it stands still in skipped
        steps."""
        return self.images_seen - self.steps.skipped * self.config.batch_size

    def is_due(self, every: int) -> bool:
        """True if a multiple of `every` images was reached in the step that just ended."""
        return is_due(every, self.images_seen - self.config.batch_size, self.images_seen)

    def start_step(self) -> None:
        """Sets the learning rate. Raises Requeue if the step before was agreed to be the last."""
        if self.control.stops:
            self._stop()
        if self.paused:  # what was done since the last step does not count as throughput
            self.tracker.restart_clock(self.images_seen)
        self.rate = learning_rate(
            self.trained_images, self.config.learning_rate, self.config.schedule,
            self.config.warmup_images, self.config.total_images,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def end_step(self, metrics: Mapping[str, torch.Tensor] | None) -> Due:
        """Moves the clock and the weight average on; returns what is due.

        Args:
            metrics: scalars of this rank's part of the batch; None where the step was skipped.

        Raises UserError where a checkpoint could not be written, and, after saving, where the run
        has diverged.
        """
        self.images_seen += self.config.batch_size
        self.control.raise_fault()
        if self.steps.diverged:
            self.save()
            self.finish_saving()
            raise self.steps.error()
        if metrics is not None:
            self.average.update(self.model, self.config.batch_size, self.trained_images)
            self.means.add(metrics)
        self.tracker.advance(self.config.batch_size)

        ends = self.images_seen >= self.config.total_images
        saves = ends or self.control.stops or self.is_due(self.config.save_every)
        logs = saves or self.is_due(self.config.log_every)
        validates = ends or self.is_due(self.config.validate_every)
        self.paused = logs or validates
        return Due(logs and self.means.steps > 0, validates, saves, ends)

    def log(self, values: Mapping[str, float]) -> None:
        """Writes a line of metrics: `values` and what every run reports."""
        shared = {
            "loss/skipped_steps": self.steps.skipped,
            "schedule/learning_rate": self.rate,
            "throughput/images_per_sec": self.tracker.images_per_sec(self.images_seen),
        }
        self.tracker.log(self.images_seen, {**values, **shared})

    def save(self) -> None:
        """Begins to write a checkpoint of this moment; collective. A failure ends the run with the
        next step, or in `finish_saving`."""
        if self.before_save is not None:
            self.before_save()
        tensors = training_tensors(self.model, self.average.model, self.optimizer)
        if self.accelerator.is_main_process:
            state = {
                "config": stage.to_dict(self.config),
                "data_sha256": self.data_sha256,
                **self.extra,
                **self.steps.state(),
                **stage.provenance(),
            }
            self.checkpoints.start_save(self.images_seen, tensors, state)

    def finish_saving(self) -> None:
        """Returns when the checkpoint is committed; collective. Raises UserError if it is not."""
        self.checkpoints.wait()
        with self.control.step():
            self.control.agree(torch.ones((), dtype=torch.bool, device=self.accelerator.device))
        self.control.raise_fault()

    def _stop(self) -> NoReturn:
        reason, seen = self.control.asked or "another rank", self.images_seen
        self.tracker.close()
        self.finish_saving()
        self.control.forget_files()
        self._part()
        raise stage.Requeue(f"stopped by {reason} at {seen:,} images; start again to go on", seen)

    def end(self) -> int:
        """Waits for the last checkpoint and for all ranks, and parts from them; returns the images
        seen."""
        self.finish_saving()
        self.control.forget_files()
        self._part()
        return self.images_seen

    def _part(self) -> None:
        self.control.close()
        if self.lock is not None:
            self.lock.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
