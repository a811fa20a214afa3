"""Each safeguard is missed by a test when it is taken away."""

import pytest
from faults import run_tests, start
from mutations import MUTATIONS

# the quickest test that notices; all of them pass without a mutation, in this same suite
NOTICED_BY = {
    "all-reduce": "test_ranks.py::test_in_float64_the_result_is_the_same[2 ranks]",
    "finite check": "test_steps.py::test_a_loss_that_is_not_finite_leaves_everything_as_it_is",
    "EMA reset on revival": "test_quantizers.py::test_a_dead_code_starts_anew_at_its_candidate",
    "fp32 island": "test_quantizers.py::test_at_least_fp32_under_bf16_autocast",
    "fsync": "test_checkpoint.py::test_a_checkpoint_is_on_the_disk_before_it_has_its_name",
    "fsync of shards": "test_shards.py::test_a_shard_is_on_the_disk_before_it_has_its_name",
    "rename": "test_checkpoint.py::test_a_failed_write_leaves_nothing_and_keeps_the_old",
    "manifest check": "test_checkpoint.py::test_a_damaged_checkpoint_is_skipped_by_name[flip]",
    "agreed stop": "test_control.py::test_what_one_rank_knows_is_known_to_all_and_told_alike",
    "one-job lock": "test_checkpoint.py::test_one_job_at_a_time_has_a_run_directory_and_a_killed_"
    "one_has_it_no_more",
    "heartbeat": "test_control.py::test_the_rank_that_is_behind_or_silent_is_named",
    "parent-death check": "test_faults.py::test_ranks_whose_launcher_was_killed_save_and_end[0]",
    "CRC check": "test_shards.py::test_damage_is_named",
}


SLOW = {"agreed stop", "heartbeat", "parent-death check"}  # several ranks that wait


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(name, marks=pytest.mark.faults) if name in SLOW else name for name in MUTATIONS],
)
def test_a_safeguard_taken_away_is_noticed(mutation, tmp_path):
    process = start(run_tests, mutation, NOTICED_BY[mutation], tmp_path / "output")
    process.join(120)
    process.kill()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 1, output  # 1: tests ran and failed
    assert "failed" in output and "error" not in output.splitlines()[-1]
