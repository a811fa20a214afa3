"""The job files: their bookkeeping, and (marker slurm) whole jobs on a real two-node SLURM."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT
from slurm_cluster import Cluster

JOB_FILES = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


def attempt(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "slurm" / "attempt.py", *map(str, words)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing():
    found = subprocess.run(
        ["shellcheck", "--external-sources", *JOB_FILES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_starts_without_progress_are_bounded_and_progress_counts_anew(tmp_path):
    def start(number: int) -> int:
        return attempt("begin", tmp_path, SLURM_RESTART_COUNT=str(number)).returncode

    assert [start(number) for number in range(4)] == [0, 0, 0, 1]
    (tmp_path / "checkpoints" / "images-000000512").mkdir(parents=True)
    assert [start(number) for number in range(4, 8)] == [0, 0, 0, 1]
    assert start(0) == 0  # submitted by somebody who knows


def test_logs_are_no_progress_but_images_are(tmp_path):
    def idle() -> int:
        attempt("begin", tmp_path, SLURM_RESTART_COUNT="1")
        return json.loads((tmp_path / "attempts.json").read_text())["idle"]

    assert idle() == 0
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("")
    assert idle() == 1
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_text("")
    assert idle() == 0


@pytest.mark.parametrize(("status", "launcher", "code"), [(85, 1, 85), (2, 1, 2), (0, 0, 0)])
def test_the_exit_code_is_the_stages_not_the_launchers(tmp_path, status, launcher, code):
    (tmp_path / "status.json").write_text(json.dumps({"exit_code": status}))
    assert attempt("end", tmp_path, launcher).stdout.strip() == str(code)


@pytest.mark.parametrize("launcher", [0, 1, 137])
def test_a_stage_that_left_no_status_has_failed(tmp_path, launcher):
    assert attempt("end", tmp_path, launcher).stdout.strip() != "0"


def test_the_plan_names_every_stage_after_those_it_waits_for(tmp_path):
    command = [sys.executable, "pipeline/run_all.py", "--dry_run", "true"]
    command += ["--configs", "configs/debug", "--out", str(tmp_path / "run")]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before: set[str] = set()
    for line in text.splitlines():
        name, waits, processes, script, *flags = line.split("\t")
        assert waits == "-" or set(waits.split(",")) <= before
        assert processes in ("one", "many") and (ROOT / script).is_file() and "--out" in flags
        before.add(name)
    assert {"shards", "vqvae", "codes", "prior-level1", "samples", "evaluation"} <= before
    assert not (tmp_path / "run").exists()


# On a real SLURM.

TRAIN = [
    "pipeline/train_vqvae.py", "--config", "configs/debug/train_vqvae.yaml",
    "--total_images", "6144", "--save_every", "1024", "--log_every", "128",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with Cluster() as cluster:
        cluster.environment |= {
            "PYTHON": sys.executable,
            "LAUNCH_CONFIG": "configs/accelerate/cpu2.yaml",
            "PROCESSES_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "MANY": "--nodes=2",
            "ONE": "--nodes=1",
        }
        yield cluster


def train(cluster: Cluster, shards: Path, out: Path) -> str:
    """Submits a training on two nodes; returns the job's number."""
    flags = ["--data", str(shards), "--out", str(out)]
    return cluster.submit("--nodes=2", f"--output={out}.log", "slurm/run.sbatch", *TRAIN, *flags)


def weights(out: Path) -> dict[str, str]:
    """Hashes of all tensors of the end: the model's, and those of the last checkpoint."""
    last = sorted((out / "checkpoints").glob("images-*"))[-1]
    files = {}
    for directory in (out / "final", last):
        manifest = json.loads((directory / "manifest.json").read_text())["files"]
        files |= {
            f"{directory.name}/{name}": entry["sha256"]
            for name, entry in manifest.items() if name.endswith(".safetensors")
        }  # fmt: skip
    return files


@pytest.fixture(scope="module")
def undisturbed(cluster, face_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "vqvae"
    job = train(cluster, face_shards, out)
    cluster.wait(job, "COMPLETED")
    assert cluster.field(job, "Restarts") == "0"
    return weights(out)


def wait_for_images(out: Path, count: int) -> None:
    """Until the run has trained on so many."""
    end = time.monotonic() + 180
    while True:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and json.loads(lines[-1])["images_seen"] >= count:
            return
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.2)


def user_signal(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "--signal=USR1", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.call("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str) -> None:
    urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2")
    cluster.wait(urgent, "COMPLETED")


def node_dies(cluster: Cluster, job: str) -> None:
    cluster.kill_node("n2")
    cluster.wait(job, "PENDING")
    cluster.start_node("n2")


@pytest.mark.slurm
@pytest.mark.parametrize("disturb", [user_signal, requeue, preempt, node_dies])
def test_a_disturbed_job_comes_back_and_ends_like_an_undisturbed_one(
    cluster, undisturbed, face_shards, tmp_path, disturb
):
    out = tmp_path / "vqvae"
    job = train(cluster, face_shards, out)
    wait_for_images(out, 1500)
    disturb(cluster, job)
    cluster.wait(job, "COMPLETED")
    restarts = int(cluster.field(job, "Restarts"))
    # to a node that was gone SLURM repeats its request to end the job, which may reach the next
    # start of it there: one more interruption that the job has to survive
    assert restarts >= 1 if disturb is node_dies else restarts == 1
    assert weights(out) == undisturbed
    assert "resuming at" in (tmp_path / "vqvae.log").read_text()


@pytest.mark.slurm
def test_a_cancelled_job_saves_and_stays_away(cluster, face_shards, tmp_path):
    out = tmp_path / "vqvae"
    job = train(cluster, face_shards, out)
    wait_for_images(out, 1500)
    cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED")
    assert sorted((out / "checkpoints").glob("images-*"))[-1].name > "images-000001024"


@pytest.mark.slurm
def test_a_users_error_fails_the_job_at_once_with_its_code(cluster, tmp_path):
    out = tmp_path / "vqvae"
    job = train(cluster, tmp_path / "nowhere", out)
    cluster.wait(job, "FAILED")
    assert cluster.field(job, "ExitCode") == "2:0"


@pytest.mark.slurm
def test_the_whole_pipeline_runs_by_one_command(cluster, tmp_path):
    configs, out = tmp_path / "configs", tmp_path / "run"
    shutil.copytree(ROOT / "configs" / "debug", configs)
    for name in ("a", "b"):
        shutil.copy(configs / "train_vae.yaml", configs / f"train_vae_{name}.yaml")
    submitted = subprocess.run(
        ["slurm/submit_all.sh", configs, out, "--source", "faces"],
        cwd=ROOT, env={**cluster.environment, "BASELINES": "a b"}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    last = submitted.split()[-1]
    cluster.wait(last, "COMPLETED", seconds=600)
    assert (out / "evaluation" / "report.json").is_file()
    assert (out / "comparison" / "comparison.json").is_file()
    assert (out / "a" / "final").is_dir() and (out / "b" / "report" / "report.json").is_file()
