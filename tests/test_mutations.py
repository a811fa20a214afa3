"""Each safeguard of distributed training is missed by a test when it is taken away."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from mutations import MUTATIONS

# the quickest test that notices; all of them pass without a mutation, in this same suite
NOTICED_BY = {
    "all-reduce": "test_ranks.py::test_in_float64_the_result_is_the_same[2 ranks]",
    "finite check": "test_steps.py::test_a_loss_that_is_not_finite_leaves_everything_as_it_is",
    "EMA reset on revival": "test_quantizers.py::test_a_dead_code_starts_anew_at_its_candidate",
    "fp32 island": "test_quantizers.py::test_at_least_fp32_under_bf16_autocast",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_safeguard_taken_away_is_noticed(mutation):
    command = [sys.executable, "-m", "pytest", "-p", "mutations", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"tests/{NOTICED_BY[mutation]}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "MUTATION": mutation, "PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    assert result.returncode == 1, result.stdout  # 1: tests ran and failed
    assert "failed" in result.stdout and "error" not in result.stdout.splitlines()[-1]
