"""Checkpoint directories: whole or not there, verified, and the same for any launch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import (
    Checkpoints,
    fault_of,
    load_model,
    load_optimizer_tensors,
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


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, damage, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(100, tensors(1), {})
    path = checkpoints.save(200, tensors(2), {})
    file = path / "model.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
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
