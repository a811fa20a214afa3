"""Processes, devices and precision of a launch."""

import pytest
import torch

from pipeline.stage import UserError
from pipeline.training.distributed import make_accelerator, warn_of_emulated_bf16


@pytest.mark.parametrize(
    ("precision", "instructions", "rank", "said"),
    [
        ("bf16", "AVX2", "0", True),
        ("bf16", "AVX2", "1", False),  # once per launch
        ("bf16", "AVX512", "0", False),
        ("no", "AVX2", "0", False),
    ],
)
def test_bf16_that_a_cpu_can_only_emulate_is_warned_of(
    precision, instructions, rank, said, monkeypatch, capsys
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("RANK", rank)
    warn_of_emulated_bf16()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "warning: bf16 is emulated on this CPU"
    ] * said


def test_fp16_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 is not supported, use bf16"):
        make_accelerator()
