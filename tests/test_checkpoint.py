"""Checkpoint directories: whole or not there, verified, and the same for any launch."""

import collections
import json
import os
import resource
import shutil
import signal

import faults
import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.stage import InUse, UserError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import (
    KEEP,
    Checkpoints,
    fault_of,
    load_model,
    load_optimizer_tensors,
    lock,
    model_sha256,
    optimizer_tensors,
    refuse_changed_config,
    save_model,
    write_directory,
)

CONFIG = VQVAEConfig(channels=8, residual_channels=4, codebook_size=(8, 16), code_dim=4)


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"model": {"a": torch.randn(3, 2), "b": torch.arange(4)}}


def test_round_trip_bit_for_bit(tmp_path):
    path = Checkpoints(tmp_path).save(128, tensors(), {"config": {"x": 1}})
    assert path.name == "images-000000128"
    newest = Checkpoints(tmp_path).newest()
    assert newest.images_seen == 128 and newest.state["config"] == {"x": 1}
    for name, tensor in newest.tensors("model").items():
        assert torch.equal(tensor, tensors()["model"][name])
        assert tensor.dtype == tensors()["model"][name].dtype
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob(".tmp*"))


def test_nothing_committed_is_none(tmp_path):
    assert Checkpoints(tmp_path).newest() is None


DAMAGES = ("truncate", "to one byte", "to half", "empty", "flip", "delete", "of another step",
           "no manifest", "bad manifest")  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, damage, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(100, tensors(1), {})
    path = checkpoints.save(200, tensors(2), {})
    file = path / "model.safetensors"
    lengths = {"truncate": -1, "to one byte": 1, "to half": file.stat().st_size // 2, "empty": 0}
    if damage in lengths:
        file.write_bytes(file.read_bytes()[: lengths[damage]])
    elif damage == "of another step":
        shutil.copy(tmp_path / "checkpoints" / "images-000000100" / file.name, file)
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "delete":
        file.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{")
    assert fault_of(path) is not None
    assert checkpoints.newest().images_seen == 100
    assert "images-000000200" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "images-000000100" / "state.json").unlink()
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoints.newest()


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path):
    target = tmp_path / "final"
    write_directory(target, tensors(1), {"config": {"n": 1}})
    with pytest.raises(TypeError):
        write_directory(target, tensors(2), {"config": {"n": object()}})
    assert json.loads((target / "config.json").read_text()) == {"n": 1}
    assert fault_of(target) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order of the calls; a power cut cannot be had here."""
    events = faults.watch_disk(monkeypatch)
    write_directory(tmp_path / "final", tensors(), {"config": {}})
    (named,) = [n for n, event in enumerate(events) if event[0] == "named"]
    (temporary,) = {path.parent for _, path in events[:named] if path.suffix}
    files = {"model.safetensors", "config.json", "manifest.json"}
    assert {path for _, path in events[:named]} == {temporary, *(temporary / f for f in files)}
    assert events[named:] == [("named", tmp_path / "final"), ("synced", tmp_path)]


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    """The tensors change while the thread writes, as training goes on."""
    monkeypatch.setenv("FAILPOINT", "before-directory:0.2")
    values = tensors()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.start_save(100, values, {})
    for tensor in values["model"].values():
        tensor.add_(1)
    assert checkpoints.newest() is None
    checkpoints.wait()
    saved = checkpoints.newest().tensors("model")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors()["model"].items())


def names(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name[7:]) for path in checkpoints.root.iterdir())


def test_the_newest_sound_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for seen in range(100, 600, 100):
        checkpoints.start_save(seen, tensors(), {})
    checkpoints.wait()
    assert KEEP >= 2 and names(checkpoints) == [600 - 100 * n for n in range(KEEP, 0, -1)]

    # another process: what was damaged in between is no reserve
    (checkpoints.root / "images-000000500" / "model.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.start_save(600, tensors(), {})
    checkpoints.wait()
    assert names(checkpoints) == [300, 400, 500, 600]


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(100, tensors(), {})
    for name in (
        ".tmp-final-1",
        "checkpoints/.tmp-images-2",
        "checkpoints/.trash-images-000000050-3",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert names(checkpoints) == [100] and checkpoints.newest() is not None


PLACES = (
    "before-directory", "after-file", "after-file@2", "after-sync", "after-manifest",
    "before-rename", "between-renames", "after-rename", "before-prune", "after-trash",
)  # fmt: skip


def save_over_a_damaged_one(out, place):
    """The fifth checkpoint, whose directory is there already, damaged."""
    torch.set_num_threads(1)
    os.environ["FAILPOINT"] = f"{place}:kill"
    Checkpoints(out).start_save(500, tensors(5), {})


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_in_saving_and_pruning_the_newest_is_whole(tmp_path, place):
    checkpoints = Checkpoints(tmp_path)
    for seen in range(100, 600, 100):
        checkpoints.save(seen, tensors(seen // 100), {})
    (checkpoints.root / "images-000000500" / "manifest.json").unlink()
    process = faults.start(save_over_a_damaged_one, tmp_path, place)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = Checkpoints(tmp_path)
    again.clean()
    newest = again.newest()
    committed = place in ("after-rename", "before-prune", "after-trash")
    assert newest.images_seen == (500 if committed else 400)
    expected = tensors(newest.images_seen // 100)["model"]
    assert all(torch.equal(newest.tensors("model")[name], expected[name]) for name in expected)
    # and the next one goes on as if nothing had been
    again.start_save(500, tensors(5), {})
    again.wait()
    assert names(again) == [300, 400, 500]
    assert not faults.debris(tmp_path)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("place", ["before-directory", "after-file@2", "after-manifest"])
def test_a_write_that_fails_is_reported_and_leaves_the_one_before(
    tmp_path, monkeypatch, place, error
):
    faulty = []
    checkpoints = Checkpoints(tmp_path, faulty.append)
    checkpoints.save(100, tensors(), {})
    monkeypatch.setattr("pipeline.failpoint._passes", collections.Counter())
    monkeypatch.setenv("FAILPOINT", f"{place}:{error}")
    checkpoints.start_save(200, tensors(), {})
    checkpoints.wait()
    assert len(faulty) == 1 and "at 200 images could not be written" in faulty[0]
    assert names(checkpoints) == [100]


def save_under_a_limit(out):
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with open(out / "told", "w") as told:
        checkpoints = Checkpoints(out, told.write)
        checkpoints.start_save(200, {"model": {"a": torch.zeros(1000)}}, {})
        checkpoints.wait()


def test_a_file_that_may_not_grow_is_a_failed_write_too(tmp_path):
    process = faults.start(save_under_a_limit, tmp_path)
    process.join(60)
    assert process.exitcode == 0 and "File too large" in (tmp_path / "told").read_text()
    assert not list((tmp_path / "checkpoints").iterdir())


def hold(out):
    kept = lock(out)
    (out / "held").touch()
    signal.pause()
    kept.close()


def test_one_job_at_a_time_has_a_run_directory_and_a_killed_one_has_it_no_more(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "LOCK_SEC", 0.3)
    (tmp_path / "link").symlink_to(tmp_path)
    process = faults.start(hold, tmp_path)
    try:
        while not (tmp_path / "held").exists():
            assert process.is_alive()
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(InUse, match=f"in use by process {process.pid} on "):
                lock(path)
    finally:
        process.kill()
    lock(tmp_path).close()
    process.join()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        lock(tmp_path / "file" / "run")


def test_changed_configs_are_refused_by_name(tmp_path):
    old = {"seed": 0, "log_every": 5, "model": {"channels": 8}}
    refuse_changed_config(old, {**old, "log_every": 7}, tmp_path)
    with pytest.raises(UserError, match=r"model.channels \(was 8, now 16\)"):
        refuse_changed_config(old, {**old, "model": {"channels": 16}}, tmp_path)


def test_optimizer_state_round_trip():
    def trained(seed):
        torch.manual_seed(seed)
        model = VQVAE(CONFIG)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        model(torch.rand(2, 3, 32, 32)).reconstructions.square().sum().backward()
        optimizer.step()
        return model, optimizer

    (model, adam), (other, other_adam) = trained(0), trained(1)
    saved = optimizer_tensors(adam, model)
    assert "decoder.0.weight.exp_avg" in saved and "decoder.0.weight.step" in saved
    load_optimizer_tensors(other_adam, other, saved)
    again = optimizer_tensors(other_adam, other)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_a_model_is_rebuilt_from_its_directory_alone(tmp_path):
    model = VQVAE(CONFIG).eval()
    sha256 = save_model(tmp_path, "vqvae", model, {"note": "x"})
    assert len(sha256) == 64 and sha256 == model_sha256(tmp_path / "final")
    loaded = load_model(tmp_path, "vqvae")
    assert loaded.config == CONFIG and not loaded.training
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images).reconstructions, model(images).reconstructions)
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert not any(name.startswith("module.") for name in stored)
    assert {"codebook", "counts", "sums"} <= {n.split(".")[-1] for n in stored if "quantizers" in n}
    with pytest.raises(UserError, match="holds a vqvae, expected a prior"):
        load_model(tmp_path, "prior")
    (tmp_path / "final" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no trained model"):
        load_model(tmp_path / "absent")
