"""Optimizer steps that are taken or skipped as a whole."""

import pytest
import torch
from torch import nn

from pipeline.training.distributed import make_accelerator
from pipeline.training.steps import Steps


def make(accumulation=1, **options):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    accelerator = make_accelerator(accumulation)
    trained, prepared = accelerator.prepare(model, optimizer)
    return model, optimizer, Steps(accelerator, trained, prepared, 1e9, **options)


def losses(model, inputs, *factors):
    for factor, part in zip(factors, inputs.chunk(len(factors)), strict=True):
        yield model(part).square().mean() + 0 * factor  # a NaN that the gradient does not show


def snapshot(model, optimizer):
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    return [p.detach().clone() for p in model.parameters()] + moments


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_is(accumulation, bad):
    model, optimizer, steps = make(accumulation)
    inputs = torch.randn(6, 3)
    steps.take(losses(model, inputs, *[1.0] * accumulation))
    before = snapshot(model, optimizer)
    for place in range(accumulation):
        factors = [bad if i == place else 1.0 for i in range(accumulation)]
        assert steps.take(losses(model, inputs, *factors), lambda: pytest.fail("went on")) is None
        assert all(p.grad is None for p in model.parameters())
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert steps.skipped == accumulation


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_is():
    model, optimizer, steps = make()
    inputs = torch.randn(6, 3)
    steps.take(losses(model, inputs, 1.0))
    before = snapshot(model, optimizer)
    # the square root has a finite value and an infinite slope at 0
    assert steps.take([(model(inputs).sum() * 0).abs().sqrt()]) is None
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_micro_batches_take_the_step_of_the_whole_batch():
    inputs, found = torch.randn(6, 3), []
    for accumulation in (1, 3):
        torch.manual_seed(1)
        model, _, steps = make(accumulation)
        norm = steps.take(losses(model, inputs, *[1.0] * accumulation))
        found.append((float(norm), list(model.parameters())))
    (norm, whole), (micro_norm, parts) = found
    assert norm == pytest.approx(micro_norm, rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_only_steps_in_a_row_end_the_run():
    model, _, steps = make(patience=2)
    inputs, nan = torch.randn(6, 3), float("nan")
    for factor in (nan, 1.0, nan, 1.0):
        steps.take(losses(model, inputs, factor))
    assert steps.skipped == 2
    steps.take(losses(model, inputs, nan))
    assert not steps.diverged
    steps.take(losses(model, inputs, nan))
    assert steps.diverged
    assert "in 2 steps in a row" in str(steps.error())


def test_a_streak_goes_on_after_a_resume_but_a_run_that_ended_has_its_patience_back():
    _, _, steps = make(patience=3)
    for in_a_row, expected in ((2, 2), (3, 0)):
        steps.restore({"skipped_steps": 7, "skipped_in_a_row": in_a_row})
        assert (steps.skipped, steps.in_a_row) == (7, expected)
    assert steps.state() == {"skipped_steps": 7, "skipped_in_a_row": 0}
    steps.restore({})  # a checkpoint of before steps could be skipped
    assert steps.skipped == 0
