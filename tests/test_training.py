"""Training runs of the real stages: resume, two ranks, golden figures, launch forms."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics, run_stage
from faults import run_ranks
from safetensors.torch import load_file

from pipeline import stage
from pipeline.train_vqvae import TrainVQVAE
from pipeline.train_vqvae import main as train_vqvae
from pipeline.training.checkpoint import write_directory

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TINY = ["--total_images=256", "--validate_every=64", "--save_every=64", "--log_every=16"]


def debug_config(shards, out, **changes) -> TrainVQVAE:
    path = ROOT / "configs/debug/train_vqvae.yaml"
    arguments = [f"--config={path}", f"--data={shards}", f"--out={out}", *TINY]
    return dataclasses.replace(stage.parse(TrainVQVAE, arguments), **changes)


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_tensors(one, other):
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def test_a_resumed_run_equals_an_uninterrupted_one(face_shards, tmp_path):
    train_vqvae(debug_config(face_shards, tmp_path / "whole"))
    part = debug_config(face_shards, tmp_path / "part")
    # interrupted after 128 images: the schedule is that of the whole run, so only drop what
    # came after the checkpoint
    train_vqvae(part)
    for name in ("images-000000192", "images-000000256"):
        for file in (tmp_path / "part" / "checkpoints" / name).iterdir():
            file.unlink()
    assert train_vqvae(part) == 256
    for name in ("final", "checkpoints/images-000000256"):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "part" / name)
    drop = {"time", "throughput/images_per_sec"}
    lines = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / run)]
        for run in ("whole", "part")
    ]
    assert lines[0] == lines[1]


def test_a_resumed_run_refuses_another_config(face_shards, tmp_path):
    config = debug_config(face_shards, tmp_path / "run", total_images=64)
    train_vqvae(config)
    with pytest.raises(stage.UserError, match=r"beta \(was 0.25, now 0.5\)"):
        train_vqvae(dataclasses.replace(config, beta=0.5))


def test_two_ranks_equal_one(face_shards, tmp_path):
    """Same global batches, so the same first steps up to the order of fp32 sums."""
    flags = [
        f"--config={ROOT}/configs/debug/train_vqvae.yaml", "--data", face_shards,
        *TINY[1:], "--total_images=64",
    ]  # fmt: skip
    run_stage("train_vqvae.py", *flags, "--out", tmp_path / "one")
    run_stage("train_vqvae.py", *flags, "--out", tmp_path / "two", launcher=TWO_RANKS)
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["images_seen"] for line in first] == [line["images_seen"] for line in second]
    for tag in ("loss/total", "loss/reconstruction", "loss/commitment", "gradient/norm"):
        assert first[0][tag] == pytest.approx(second[0][tag], rel=1e-5)
        # after one update of weights and codebook: wrong without either of the all-reduces
        assert first[1][tag] == pytest.approx(second[1][tag], rel=1e-3)
    start, other = (
        tensors_of(tmp_path / n / "checkpoints/images-000000000") for n in ("one", "two")
    )
    assert start.keys() == other.keys()
    for name in start:  # the weights, bit for bit; k-means adds up in another order
        tolerance = 1e-5 if "quantizers" in name else 0
        torch.testing.assert_close(start[name], other[name], rtol=0, atol=tolerance, msg=name)
    names = tensors_of(tmp_path / "two" / "final")
    assert not any("module." in name for name in names)
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status == {"state": "done", "exit_code": 0, "reason": "", "images_seen": 64}


def test_two_ranks_resume_as_if_uninterrupted(face_shards, tmp_path):
    flags = [
        f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={face_shards}",
        "--total_images=64", "--save_every=32", "--log_every=32",
    ]  # fmt: skip
    for run in ("whole", "part"):
        run_ranks("train_vqvae", flags, tmp_path / run, world=2)
    for file in (tmp_path / "part" / "checkpoints" / "images-000000064").iterdir():
        file.unlink()
    run_ranks("train_vqvae", flags, tmp_path / "part", world=2)
    assert_same_tensors(tmp_path / "whole" / "final", tmp_path / "part" / "final")


def test_other_data_is_refused_on_resume(face_shards, tmp_path):
    config = debug_config(face_shards, tmp_path / "run", total_images=32)
    train_vqvae(config)
    state = tmp_path / "run" / "checkpoints" / "images-000000032"
    other = {**json.loads((state / "state.json").read_text()), "data_sha256": "0"}
    write_directory(state, {p.stem: load_file(p) for p in state.glob("*.safetensors")},
                    {"state": other})  # fmt: skip
    with pytest.raises(stage.UserError, match="other data"):
        train_vqvae(config)


def test_a_gradient_that_is_not_finite_changes_nothing(face_shards, tmp_path):
    config = debug_config(face_shards, tmp_path / "run", learning_rate=1e30, schedule="constant")
    with pytest.raises(stage.UserError, match="lower --learning_rate"):
        train_vqvae(config)
    for tensor in tensors_of(tmp_path / "run" / "checkpoints" / "images-000000000").values():
        assert tensor.isfinite().all()


def test_a_batch_that_does_not_divide_is_an_error_of_one_line(face_shards, tmp_path):
    failed = run_stage(
        "train_vqvae.py", f"--config={ROOT}/configs/debug/train_vqvae.yaml", "--data", face_shards,
        "--out", tmp_path, "--batch_size=15", launcher=TWO_RANKS, check=False,
    )  # fmt: skip
    assert failed.returncode != 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["exit_code"] == 2 and "divisible by the 2 processes" in status["reason"]
    assert failed.stderr.count("error: batch_size 15") == 1


LAUNCHES = {
    "python": (),
    "python -m": None,  # started by run_stage_as_module
    "accelerate, one process": (
        "-m", "accelerate.commands.launch", f"--config_file={ROOT}/configs/accelerate/cpu1.yaml"),
    "accelerate, two processes": (
        "-m", "accelerate.commands.launch", f"--config_file={ROOT}/configs/accelerate/cpu2.yaml"),
    "accelerate, ZeRO-2": (
        "-m", "accelerate.commands.launch", f"--config_file={ROOT}/configs/accelerate/zero2.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("form", LAUNCHES)
def test_every_launch_form_from_another_directory(form, face_shards, tmp_path):
    """torchrun with two ranks is in the tests above."""
    flags = [f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={face_shards}",
             f"--out={tmp_path}/out", "--total_images=32"]  # fmt: skip
    if "ZeRO" in form:
        pytest.importorskip("deepspeed")
    if form == "python -m":
        result = run_stage_as_module(flags, tmp_path)
    else:
        result = run_stage("train_vqvae.py", *flags, launcher=LAUNCHES[form], cwd=tmp_path)
    assert "validation MSE" in result.stdout
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def run_stage_as_module(flags, cwd):
    command = [sys.executable, "-m", "pipeline.train_vqvae", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=True
    )


def test_dry_run_prints_costs_and_writes_nothing(face_shards, tmp_path):
    flags = [f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={face_shards}"]
    printed = run_ranks("train_vqvae", [*flags, "--dry-run"], tmp_path / "out")
    for word in ("parameters", "memory", "disk", "images/s", "time to the end"):
        assert word in printed
    assert not (tmp_path / "out").exists()


def test_streaming_and_cache_train_alike(face_shards, tmp_path):
    for cache in (True, False):
        train_vqvae(debug_config(face_shards, tmp_path / str(cache), total_images=48, cache=cache))
    assert_same_tensors(tmp_path / "True" / "final", tmp_path / "False" / "final")


def test_loader_workers_train_alike(face_shards, tmp_path):
    for workers in (0, 2):
        train_vqvae(
            debug_config(
                face_shards, tmp_path / str(workers), total_images=48, workers=workers, cache=False
            )
        )
    assert_same_tensors(tmp_path / "0" / "final", tmp_path / "2" / "final")
