"""The studies of benchmarks/vae_studies.py on made-up reports: what is paired with what."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import vae_studies
from vae_studies import REFERENCE, STUDIES

SHIFTS = {"gaussian, variational": -30, "categorical": -5000, "logistic mixture": -4900}  # nats
KINDS = {
    "gaussian, none": "density",
    "gaussian, uniform": "dequantized",
    "gaussian, variational": "dequantized",
    "categorical": "8bit",
    "logistic mixture": "8bit",
}
COUNT, SEEDS, SIZE = 6, 3, 4  # images, seeds, pixels a side
DIMS = 3 * SIZE**2


def nats_of(row: str, bound: str) -> np.ndarray:
    """Made-up values (SEEDS, COUNT): images differ more than rows do."""
    rng = np.random.default_rng(len(row) + len(bound))
    images = np.linspace(-900, 900, COUNT)
    return SHIFTS.get(row, 0) + images + rng.normal(0, 20, (SEEDS, COUNT)).round(3)


def write_report(run: Path, row: str, seed: int, **protocol) -> None:
    """A run as train_vae.py and report_vae.py leave it, as far as the study reads it."""
    per_image = {
        bound: nats_of(row, bound)[seed].tolist() for bound in ("negative_elbo", "nll_importance")
    }
    report = {
        "protocol": {
            "data_index_sha256": "abc",
            "likelihood": {"num_samples": 5000, "num_images": COUNT},
            "likelihood_of": KINDS[row],
            "checkpoint": {
                "path": str(run),
                "images_seen": 100,
                "model": {"in_channels": 3, "image_size": SIZE},
            },
            **protocol,
        },
        "figures": {"mse": {"value": 0.5 + seed, "standard_error": 0.1, "count": COUNT}},
        "per_image": per_image,
    }
    for name, content in (("final/config.json", {}), ("report/report.json", report)):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Makes all reports of the study of dequantization; a call is the script, its rows by name."""
    for row in STUDIES["dequantization"][1]:
        for seed in range(SEEDS):
            write_report(run_of(tmp_path, row, seed), row, seed)
    flags = ["--study=dequantization", "--data=shards", f"--out={tmp_path}", f"--seeds={SEEDS}"]
    monkeypatch.setattr(sys, "argv", ["vae_studies.py", *flags, f"--json={tmp_path}/out.json"])

    def call() -> dict[str, dict]:
        vae_studies.main()
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        return {row["contender"]: row for row in rows}

    return call


def run_of(out: Path, row: str, seed: int) -> Path:
    return out / f"{row.replace(',', '-').replace(' ', '-')}-seed{seed}"


def test_differences_are_paired_by_image_after_the_mean_over_seeds(study):
    rows = study()
    for row in ("gaussian, variational", "categorical", "logistic mixture"):
        for prefix, bound in (("elbo_", "negative_elbo"), ("", "nll_importance")):
            nats = nats_of(row, bound).mean(0) - nats_of(REFERENCE, bound).mean(0)
            bits = nats / (DIMS * math.log(2))
            if KINDS[row] == "8bit":  # the density of (x + u) / 256 is 256^DIMS times the mass
                bits -= 8
            assert rows[row][f"{prefix}difference"] == pytest.approx(bits.mean(), rel=1e-9)
            error = scipy.stats.sem(bits)
            assert rows[row][f"{prefix}difference_se"] == pytest.approx(error, rel=1e-9)
            apart = nats_of(row, bound).mean(0).std(ddof=1) / COUNT**0.5 / (DIMS * math.log(2))
            assert error < 0.1 * apart  # which pairing is for


def test_the_reference_and_densities_have_no_difference(study):
    rows = study()
    for row in (REFERENCE, "gaussian, none"):
        assert not any("difference" in column for column in rows[row])


def test_a_figure_is_the_mean_and_deviation_over_seeds(study):
    row = study()[REFERENCE]
    assert (row["seeds"], row["images_seen"]) == (SEEDS, 100)
    assert row["mse"] == pytest.approx(1.5) and row["mse_sd"] == pytest.approx(1)
    assert "kl" not in row  # no report has it


@pytest.mark.parametrize(
    "changes",
    [
        {"data_index_sha256": "other"},
        {"likelihood": {"num_samples": 20, "num_images": COUNT}},
    ],
)
@pytest.mark.parametrize("row", [REFERENCE, "categorical"])
def test_reports_of_other_images_or_samples_are_not_paired(changes, row, study, tmp_path, capsys):
    write_report(run_of(tmp_path, row, 1), row, 1, **changes)
    with pytest.raises(SystemExit):
        study()
    assert f"{run_of(tmp_path, row, 1)} cannot be paired" in capsys.readouterr().err


def test_a_report_without_values_per_image_is_not_paired(study, tmp_path, capsys):
    path = run_of(tmp_path, "categorical", 2) / "report/report.json"
    report = json.loads(path.read_text())
    del report["per_image"]
    path.write_text(json.dumps(report))
    with pytest.raises(SystemExit):
        study()
    assert "categorical-seed2 cannot be paired" in capsys.readouterr().err
