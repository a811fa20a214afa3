"""ZeRO-1 and ZeRO-2 train as DDP does, and read and write the same checkpoints."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from pipeline.stage import UserError
from pipeline.training import zero

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytest.importorskip("transformers", reason="accelerate needs transformers for DeepSpeed")

WORKER = ROOT / "tests" / "zero_worker.py"
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# the smallest file that a user may write; small buckets and another order than the parameters'
OWN = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2, "round_robin_gradients": True,
        "reduce_bucket_size": 100, "allgather_bucket_size": 100,
    },
}  # fmt: skip


class Results:
    """What rank 0 of a worker saved."""

    def __init__(self, path):
        self.values = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))

    def snapshot(self, name: str) -> dict[str, torch.Tensor]:
        prefix = name + "/"
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}


def start(launcher, *arguments, cwd, out) -> Results:
    command = [sys.executable, *launcher, str(WORKER), arguments[0], str(out), *arguments[1:]]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return Results(out)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """All engines in one launch of two ranks."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "own.json").write_text(json.dumps(OWN))
    return start(TWO_RANKS, "engines", str(folder / "own.json"), cwd=folder, out=folder / "results")


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=f"{name} differs"
        )


def curve_of(results, run, part=slice(None)):
    return [pytest.approx(pair, rel=1e-5) for pair in results.values[run]["curve"][part]]


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero_trains_as_ddp_does(engine, results):
    """Losses, norms before clipping, then weights, codebook, moments and step counts, with
    accumulation, clipping and another learning rate in each step."""
    assert_close(results.snapshot(f"{engine} untrained"), results.snapshot("ddp untrained"), 0)
    start = slice(2)
    assert curve_of(results, engine, start) == results.values["ddp"]["curve"][start]
    trained, expected = results.snapshot(f"{engine} trained"), results.snapshot("ddp trained")
    assert {"model/codebook", "optimizer/decoder.weight.exp_avg_sq"} < expected.keys()
    assert not torch.equal(
        expected["model/codebook"], results.tensors["ddp untrained/model/codebook"]
    )
    assert_close(trained, expected)
    # each of the two ranks steps half of the parameters
    half = sum(t.numel() for name, t in trained.items() if name.endswith("exp_avg")) / 2
    assert results.values[engine]["stepped here"] == pytest.approx(half, abs=2)


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_discarded_micro_batches_leave_no_trace(engine, results):
    """Before the third step a micro-batch with NaN on one rank is accumulated and discarded."""
    after = slice(2, 4)
    assert curve_of(results, engine, after) == results.values["ddp"]["curve"][after]


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_a_gradient_that_is_not_finite_changes_nothing(engine, results):
    assert not math.isfinite(float(results.values[engine]["overflow"]))
    before = results.snapshot(f"{engine} trained")
    assert_close(results.snapshot(f"{engine} after an overflow"), before, 0)
    after = slice(4, 5)
    assert curve_of(results, engine, after) == results.values["ddp"]["curve"][after]


def test_checkpoints_pass_from_engine_to_engine_bit_for_bit(results):
    """DDP -> ZeRO-1 -> a user's ZeRO-2 -> ZeRO-2 -> DDP, each into a fresh run that never stepped;
    then each goes on as DDP does."""
    expected = results.snapshot("ddp loaded")
    assert expected["optimizer/encoder.weight.exp_avg"][0].signbit().all()
    for engine in ("zero1", "own", "zero2", "ddp again"):
        loaded = results.snapshot(f"{engine} loaded")
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            other = loaded[name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert other.numpy().tobytes() == tensor.numpy().tobytes(), f"{engine}: {name}"
        assert curve_of(results, f"{engine} resumed") == results.values["ddp resumed"]["curve"]
        assert_close(results.snapshot(f"{engine} resumed"), results.snapshot("ddp resumed"))


def test_a_run_that_stepped_before_takes_a_checkpoint(results):
    assert curve_of(results, "zero2 reset resumed") == results.values["ddp resumed"]["curve"]
    untrained = results.snapshot("zero2 reset untrained")
    assert_close(untrained, results.snapshot("ddp untrained"), 0)  # so no moments either


@pytest.mark.parametrize("engine", ["zero1", "zero2", "own"])
def test_bf16_is_autocast_as_under_ddp(engine, results):
    """The convolutions compute in bf16; weights, moments and codebook are fp32, and what comes
    out is what DDP makes of it, to far less than a rounding in bf16."""
    ours, ddp = results.values[f"{engine} bf16"], results.values["ddp bf16"]
    assert ours["compute"] == ddp["compute"] == ["torch.bfloat16"]
    assert curve_of(results, f"{engine} bf16") == ddp["curve"]
    trained = results.snapshot(f"{engine} bf16")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert_close(trained, results.snapshot("ddp bf16"))


def test_accelerate_launch_from_another_directory(tmp_path):
    config = ROOT / "configs" / "accelerate" / "zero2.yaml"
    launcher = ("-m", "accelerate.commands.launch", f"--config_file={config}",
                "--mixed_precision=bf16")  # fmt: skip
    results = start(launcher, "launch", cwd=tmp_path, out=tmp_path / "results")
    assert results.values == {"stage": 2, "processes": 2, "compute": ["torch.bfloat16"]}
    assert {tensor.dtype for tensor in results.snapshot("launch").values()} == {torch.float32}


@pytest.mark.parametrize("stage", [1, 2])
def test_launcher_configs_name_their_stage(stage):
    """Starting one more launch for ZeRO-1 would cost seconds."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/zero{stage}.yaml").read_text())
    file = ROOT / config["deepspeed_config"]["deepspeed_config_file"]
    assert config["distributed_type"] == "DEEPSPEED"
    assert json.loads(file.read_text())["zero_optimization"]["stage"] == stage


def plugin(monkeypatch, tmp_path, config, precision="no"):
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "config.json"))
    return zero.make_plugin()


REFUSED = {
    "stage 3": ({"zero_optimization": {"stage": 3}}, "stage 3 partitions the weights"),
    "no stage": ({"zero_optimization": {}}, "use 1 or 2"),
    "no ZeRO": ({}, "specify the ZeRO optimization config"),
    "bf16": ({"bf16": {"enabled": True}}, "--mixed_precision bf16"),
    "fp16": ({"fp16": {"enabled": True}}, "--mixed_precision bf16"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "--mixed_precision bf16"),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "optimizer, which the stage sets"),
    "offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer; remove it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_train_as_ddp_is_refused(case, monkeypatch, tmp_path):
    config, reason = REFUSED[case]
    if case not in ("stage 3", "no stage", "no ZeRO", "offload"):
        config = {"zero_optimization": {"stage": 2}, **config}
    with pytest.raises(UserError, match=reason) as error:
        plugin(monkeypatch, tmp_path, config)
    assert "\n" not in str(error.value)


def test_fp16_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="fp16 is not supported with DeepSpeed, use bf16"):
        plugin(monkeypatch, tmp_path, OWN, precision="fp16")


def test_a_missing_file_and_a_missing_launcher_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        zero.make_plugin()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="accelerate launch or torchrun"):
        zero.make_plugin()


def test_precision_in_an_accelerate_config_is_explained(monkeypatch, tmp_path):
    """accelerate does not allow both; its own message has many lines."""
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,mixed_precision")
    with pytest.raises(UserError, match="--mixed_precision bf16") as error:
        plugin(monkeypatch, tmp_path, OWN)
    assert "\n" not in str(error.value)
