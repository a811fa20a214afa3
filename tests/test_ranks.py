"""The same global batches give the same model: 1, 2 and 4 ranks, micro-batches, compile, ZeRO.

    PYTHONPATH=. python tests/test_ranks.py --data SHARDS --json docs/benchmarks/equality.json

writes how large the differences are, for docs/results.md.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics
from faults import run_ranks
from safetensors.torch import load_file

from pipeline.data.images import open_images
from pipeline.evaluation.pictures import to_unit
from pipeline.training.checkpoint import load_model

STEPS, BATCH = 50, 8
FLAGS = (
    f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--batch_size={BATCH}", "--log_every=8",
    f"--total_images={STEPS * BATCH}", "--validate_every=200", "--save_every=0",
    # codes die within the run and start anew
    "--model.decay=0.5", "--model.revival=0.5", "--compare_every=80",
)  # fmt: skip
LOSSES = ("loss/total", "loss/reconstruction", "loss/commitment", "gradient/norm")
VARIANTS = {
    "2 ranks": (2, ()),
    "4 ranks": (4, ()),
    "4 micro-batches": (1, ("--accumulation=4",)),
    "2 ranks, 2 micro-batches": (2, ("--accumulation=2",)),
    "compiled": (1, ("--compile",)),
}


def train(shards, out, world_size=1, *flags, dtype="float32", precision="no", **options):
    run_ranks(
        "train_vqvae", (*FLAGS, f"--data={shards}", *flags), out, world_size,
        DTYPE=dtype, ACCELERATE_MIXED_PRECISION=precision, **options,
    )  # fmt: skip
    return out


def lines(out):
    return [line for line in metrics(out) if "loss/total" in line]


def tensors(out) -> dict[str, torch.Tensor]:
    newest = max((out / "checkpoints").glob("images-*"))
    return {
        f"{file.stem}/{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def codes(out, shards) -> list[torch.Tensor]:
    """Codes of the training images."""
    torch.set_default_dtype(torch.float64)
    try:
        model = load_model(out)
        images = to_unit(open_images(shards, "train", 32)[slice(0, 64)])
        with torch.no_grad():
            return model.encode_codes(images)
    finally:
        torch.set_default_dtype(torch.float32)


def differences(one, other) -> dict[str, float]:
    """The largest ones between two runs: of losses, relative, in the first step and in all; of
    weights, codebooks and moments at the end."""
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    of_steps = [
        max(abs(b[tag] - a[tag]) / abs(a[tag]) for tag in LOSSES)
        for a, b in zip(lines(one), lines(other), strict=True)
    ]
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    return {
        "losses of the first step": of_steps[0],
        "losses": max(of_steps),
        "tensors": max(float((a - b).abs().max()) for a, b in pairs),
    }


@pytest.fixture(scope="module")
def one(face_shards, tmp_path_factory):
    """The run of one rank that the others are compared with."""
    return train(face_shards, tmp_path_factory.mktemp("one"), dtype="float64")


def test_other_quantizers_are_the_same_on_two_ranks(face_shards, tmp_path):
    flags = ("--model.quantizer=[learned,cosine]", "--model.gradient=rotation")
    flags += ("--level_dropout=0.3", "--total_images=160", "--accumulation=2")
    runs = [train(face_shards, tmp_path / str(n), n, *flags, dtype="float64") for n in (1, 2)]
    assert sum(line["codebook/level1/revived"] for line in lines(runs[0])) > 0
    assert all(value < 1e-9 for value in differences(*runs).values())


@pytest.fixture(scope="module")
def ddp(face_shards, tmp_path_factory):
    """The fp32 run of two DDP ranks that the engines and precisions are compared with."""
    return train(face_shards, tmp_path_factory.mktemp("ddp"), 2)


def test_the_compared_run_has_everything_in_it(one):
    """Else the comparisons would show nothing: k-means, revivals, codes that move."""
    revived = [
        sum(line[f"codebook/level{level}/revived"] for line in lines(one)) for level in (0, 1)
    ]
    assert all(count > 5 for count in revived), revived
    start = load_file(one / "checkpoints/images-000000000/model.safetensors")
    end = {name: tensor for name, tensor in tensors(one).items() if name.startswith("model/")}
    for level in (0, 1):
        name = f"quantizers.{level}.codebook"
        assert start[name].dtype == torch.float64
        assert (end[f"model/{name}"] - start[name]).abs().median() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float64_the_result_is_the_same(one, face_shards, tmp_path, variant):
    world_size, flags = VARIANTS[variant]
    other = train(face_shards, tmp_path, world_size, *flags, dtype="float64")
    assert len(lines(one)) == STEPS
    assert all(value < 1e-9 for value in differences(one, other).values())
    for expected, found in zip(lines(one), lines(other), strict=True):
        for tag in expected:
            if tag.startswith("codebook/"):  # perplexities, unused and revived codes
                assert found[tag] == pytest.approx(expected[tag], rel=1e-9, abs=1e-9)
    for level, level_codes in enumerate(codes(other, face_shards)):
        assert torch.equal(level_codes, codes(one, face_shards)[level])


def test_in_fp32_the_first_step_is_the_same(ddp, face_shards, tmp_path):
    """The drift afterwards is measured, not asserted: a rounding flips a code, and training
    amplifies it."""
    run = train(face_shards, tmp_path)
    assert differences(run, ddp)["losses of the first step"] < 1e-5


def test_a_step_whose_loss_is_not_finite_on_one_rank_is_skipped_by_all(face_shards, tmp_path):
    """Skipping the last step leaves what the run that ended before it has."""
    flags = ("--schedule=constant", "--warmup_images=0", "--save_every=8", "--revival_rest=0")
    whole = train(face_shards, tmp_path / "whole", 2, *flags, "--total_images=40")
    skipped = train(
        face_shards, tmp_path / "skipped", 2, *flags, "--total_images=48", fault="nan:1:5"
    )
    expected, found = tensors(whole), tensors(skipped)
    assert expected.keys() == found.keys()
    for name in expected:  # weights, codebooks, moments
        assert torch.equal(found[name], expected[name]), name
    state = json.loads((skipped / "checkpoints/images-000000048/state.json").read_text())
    assert state["skipped_steps"] == 1 and state["images_seen"] == 48
    assert len(lines(skipped)) == 5  # nothing to report of the sixth step


def test_after_a_skipped_step_training_goes_on_and_the_schedule_stood_still(face_shards, tmp_path):
    run = train(face_shards, tmp_path, 2, "--total_images=80", "--log_every=16", fault="nan:0:4")
    found = lines(run)
    assert [line["loss/skipped_steps"] for line in found] == [0, 0, 1, 1, 1]
    assert all(math.isfinite(line["loss/total"]) for line in found)
    # the debug config warms up over 128 images; the last step began at 72 - 8 trained images
    rate = 3e-4 * 65 / 128 * 0.5 * (1 + math.cos(math.pi * 64 / 80))
    assert found[-1]["schedule/learning_rate"] == pytest.approx(rate)


def test_too_many_skipped_steps_in_a_row_end_the_run(face_shards, tmp_path):
    train(
        face_shards, tmp_path, 2, "--save_every=8", "--max_skipped_steps=3",
        fault=",".join(f"nan:1:{step}" for step in range(4, 40)), expected=2,
    )  # fmt: skip
    status = json.loads((tmp_path / "status.json").read_text())
    assert "not finite in 3 steps in a row" in status["reason"]
    for tensor in tensors(tmp_path).values():
        assert tensor.isfinite().all()
    newest = max((tmp_path / "checkpoints").glob("images-*"))
    assert newest.name == "images-000000056"  # saved before it ended
    # the way out that the error names: on from there, at a lower rate
    run = train(face_shards, tmp_path, 2, "--learning_rate=1e-4", "--save_every=8")
    assert lines(run)[-1]["loss/skipped_steps"] == 3


def test_codebooks_that_differ_stop_the_run(face_shards, tmp_path):
    train(face_shards, tmp_path, 2, "--compare_every=16", fault="codebook:1:2", expected=1)
    reason = json.loads((tmp_path / "status.json").read_text())["reason"]
    assert "the codebook of level 1 on rank 0 or 1 differs" in reason


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_the_first_steps_under_zero_are_those_of_ddp(ddp, face_shards, tmp_path, engine):
    pytest.importorskip("deepspeed")
    run = train(face_shards, tmp_path, 2, engine=engine)
    assert len(lines(run)) == STEPS
    for expected, found in zip(lines(ddp)[:5], lines(run)[:5], strict=True):
        for tag in LOSSES:
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5)
    # the same checkpoint files, whole tensors and dtypes
    expected, found = tensors(ddp), tensors(run)
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {
        n: (t.shape, t.dtype) for n, t in found.items()
    }


def test_zero_skips_and_resumes_as_ddp_does(face_shards, tmp_path):
    """Micro-batches, a loss that is not finite on one rank in the first of them, then the same run
    resumed by the other engine."""
    pytest.importorskip("deepspeed")
    flags = ("--accumulation=2", "--save_every=40", "--total_images=80", "--schedule=constant")
    runs = {}
    for engines in (("", ""), ("zero1", "zero2"), ("zero2", "")):
        out = tmp_path / "-".join(engines)
        train(face_shards, out, 2, *flags, "--total_images=40", engine=engines[0], fault="nan:1:2")
        train(face_shards, out, 2, *flags, engine=engines[1])
        runs[engines] = lines(out)
        state = json.loads((out / "checkpoints/images-000000080/state.json").read_text())
        assert state["skipped_steps"] == 1
    for engines, found in runs.items():
        assert len(found) == len(runs[("", "")]) == 9  # one of ten steps was skipped
        for a, b in zip(runs[("", "")], found, strict=True):
            for tag in LOSSES:
                assert b[tag] == pytest.approx(a[tag], rel=1e-4), (engines, a["images_seen"])


@pytest.mark.parametrize("engine", ["", "zero2"])
def test_in_bf16_the_codebook_stays_fp32_and_the_losses_near_those_of_fp32(
    ddp, face_shards, tmp_path, engine
):
    """Within 2 % over the first 20 steps and 10 % to the end: a rounding flips codes."""
    if engine:
        pytest.importorskip("deepspeed")
    run = train(face_shards, tmp_path, 2, engine=engine, precision="bf16")
    assert all(t.dtype != torch.bfloat16 for t in tensors(run).values())
    for step, (expected, found) in enumerate(zip(lines(ddp), lines(run), strict=True)):
        tolerance = 0.02 if step < 20 else 0.1
        tag = "loss/reconstruction"
        assert found[tag] == pytest.approx(expected[tag], rel=tolerance), step
    # not the fp32 run under another name
    assert lines(run)[0]["gradient/norm"] != lines(ddp)[0]["gradient/norm"]


def measure(shards: Path, folder: Path) -> list[dict]:
    """The differences of all pairs."""
    rows = []

    def add(pair, one, other, **more):
        rows.append({"pair": pair, **more, **differences(one, other)})

    base = train(shards, folder / "float64", dtype="float64")
    for variant, (world_size, flags) in VARIANTS.items():
        other = train(shards, folder / variant, world_size, *flags, dtype="float64")
        add(f"1 rank, {variant}", base, other, dtype="float64")
    alone, ddp = train(shards, folder / "fp32"), train(shards, folder / "ddp", 2)
    add("1 rank, 2 ranks", alone, ddp, dtype="float32")
    for engine in ("zero1", "zero2"):
        other = train(shards, folder / engine, 2, engine=engine)
        add(f"DDP, {engine}", ddp, other, dtype="float32")
    for engine in ("", "zero2"):
        other = train(shards, folder / f"bf16{engine}", 2, engine=engine, precision="bf16")
        add(f"DDP, {engine or 'DDP'} in bf16", ddp, other, dtype="float32")
    return rows


if __name__ == "__main__":
    from pipeline import stage

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="shards of 32 px images")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(arguments.data, Path(directory))
    environment = {"steps": STEPS, "batch_size": BATCH, **stage.provenance()}
    stage.write_json(arguments.json, {"environment": environment, "rows": found})
    for row in found:
        print(row)
