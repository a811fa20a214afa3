"""Optimizer steps that all ranks take, or all ranks skip."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.stage import UserError
from pipeline.training import zero
from pipeline.training.control import Control


class Steps:
    """Takes optimizer steps over one or several micro-batches.

    Where the loss of any rank, or the gradient, is not finite, every rank skips the step: weights,
    moments and schedule stay as they are. `skipped` counts such steps since the start of the run,
    and after too many in a row `diverged` is true. `control` agrees on that, and on what else the
    ranks decide in each step.

    Args:
        model: as `accelerator.prepare` returned it; `optimizer` likewise.
        gradient_clip: largest global norm of the gradient.
        patience: so many skipped steps in a row are too many.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        gradient_clip: float,
        patience: int = 10,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.gradient_clip, self.patience = gradient_clip, patience
        self.skipped = self.in_a_row = 0
        self.control = Control(accelerator.device)

    def take(
        self, losses: Iterable[torch.Tensor], before_backward: Callable[[], None] | None = None
    ) -> torch.Tensor | None:
        """One step; returns the gradient's norm before clipping, or None for a skipped step.

        Args:
            losses: the loss of each micro-batch, computed when it is asked for.
            before_backward: called before the last backward pass, when all ranks know that all
                losses are finite.
        """
        with self.control.step():
            return self._take(iter(losses), before_backward)

    def _take(
        self, losses: Iterator[torch.Tensor], before_backward: Callable[[], None] | None
    ) -> torch.Tensor | None:
        device = self.accelerator.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        for _ in range(self.accelerator.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                loss = next(losses)
                finite = finite & loss.detach().isfinite()
                if self.accelerator.sync_gradients:
                    # before this backward: it reduces gradients over the ranks, and DeepSpeed's
                    # even takes the step
                    if not self.control.agree(finite):
                        return self._skip()
                    if before_backward is not None:
                        before_backward()
                self.accelerator.backward(loss)
        # the norm of gradients that are the same on all ranks, so all decide alike
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        if norm is not None and not math.isfinite(float(norm)):
            return self._skip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.in_a_row = 0
        return torch.as_tensor(norm, device=device)  # DeepSpeed gives a number

    def _skip(self) -> None:
        if zero.is_partitioned(self.optimizer):
            zero.discard_gradients(self.optimizer)
        self.optimizer.zero_grad()
        self.skipped += 1
        self.in_a_row += 1

    @property
    def diverged(self) -> bool:
        """True, on all ranks alike, where the run shall save its state and end."""
        return self.in_a_row >= self.patience

    def error(self) -> UserError:
        """What to tell then."""
        return UserError(
            f"training diverged: the loss or its gradient was not finite in {self.in_a_row} steps "
            "in a row; the newest checkpoint has the state before them, start again with a lower "
            "--learning_rate"
        )

    def state(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self.in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; a run that ended because it diverged gets its patience back."""
        self.skipped = state.get("skipped_steps", 0)
        self.in_a_row = state.get("skipped_in_a_row", 0)
        if self.diverged:
            self.in_a_row = 0
