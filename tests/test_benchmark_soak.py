"""The soak test: faults are drawn by the seed, and what a run comes to is counted."""

import sys
import time

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import soak


@pytest.mark.faults
def test_a_run_under_faults_ends_as_undisturbed_and_another_end_is_refused(tmp_path, monkeypatch):
    for name, value in {"STEPS": 16, "TOTAL": 256, "NOT_FINITE": "nan:1:5"}.items():
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setattr(soak, "FLAGS", ("--total_images=256", "--save_every=64"))
    found = soak.Soak(tmp_path, seed=1)
    found.run(2, time.monotonic() + 120)
    *kinds, total = found.rows()
    assert sum(row["draws"] for row in kinds) == total["draws"] == 2
    assert {row["fault"] for row in kinds} <= soak.KINDS.keys()
    assert (total["starts"], total["runs"], total["images"]) == (3, 1, soak.TOTAL)
    assert total["images_read"] >= soak.TOTAL
    found.undisturbed = {}
    with pytest.raises(SystemExit, match=r"run-1 ended otherwise \(seed 1, 2 draws\)"):
        found.run(2, 0)
    assert (tmp_path / "run-1").is_dir()
