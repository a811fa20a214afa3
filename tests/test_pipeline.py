"""The whole debug pipeline, from drawn faces to a report, as a user runs it; and its links."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, metrics, run_stage
from faults import run_ranks
from PIL import Image

from pipeline import run_all, stage
from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.data.index import read_index
from pipeline.evaluation.pictures import to_unit
from pipeline.sample_prior import SamplePrior
from pipeline.sample_prior import main as sample_prior
from pipeline.train_prior import TrainPrior
from pipeline.train_prior import main as train_prior
from pipeline.training.checkpoint import load_model, model_sha256, read_about


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of configs/debug."""
    out = tmp_path_factory.mktemp("run") / "debug"
    result = run_stage("run_all.py", f"--config={ROOT}/configs/debug/run_all.yaml", f"--out={out}")
    assert "TensorBoard" in result.stdout
    return out


def test_the_run_leaves_what_it_promises(run):
    for name in ("samples.png", "reconstructions.png", "report.md", "tensorboard"):
        assert (run / name).exists(), name
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert "frechet/judge" in json.dumps(report) and "fid/inception" not in json.dumps(report)
    # every picture of the report at the top exists
    for target in re.findall(r"\]\(([^)]+)\)", (run / "report.md").read_text()):
        assert (run / target).exists(), target
    for stage_dir in ("vqvae", "prior-level0", "prior-level1", "classifier-judge"):
        assert (run / "tensorboard" / stage_dir).resolve().is_dir()
        assert json.loads((run / stage_dir / "status.json").read_text())["state"] == "done"
        assert (run / stage_dir / "checkpoints" / "images-000000000").is_dir()


def test_unchanged_stages_are_skipped(run):
    flags = (f"--config={ROOT}/configs/debug/run_all.yaml", f"--out={run}")
    again = run_stage("run_all.py", *flags).stdout
    assert again.count("unchanged, skipped") == 7  # the shards are verified each time
    changed = json.loads((run / "done.json").read_text())
    changed["samples"] = "of another config"
    (run / "done.json").write_text(json.dumps(changed))
    again = run_stage("run_all.py", *flags).stdout
    assert again.count("unchanged, skipped") == 6 and "sample_prior.py" in again


def test_codes_are_those_of_the_model_for_both_views(run):
    model = load_model(run / "vqvae", "vqvae")
    codes = open_codes(run / "codes", "train")
    images = open_images(run / "shards", "train", 32)
    assert len(codes) == 2 * len(images)
    index, image_index = read_index(run / "codes"), read_index(run / "shards")
    assert index.num_samples("valid") == image_index.num_samples("valid")
    assert index.codes["checkpoint_sha256"] == model_sha256(run / "vqvae")
    first = image_index.shards("train")[0].num_samples
    batch = to_unit(images[slice(0, 4)])
    with torch.no_grad():
        straight, mirrored = model.encode_codes(batch), model.encode_codes(batch.flip(3))
    for level in range(2):
        assert codes.levels[level].dtype == np.uint16
        assert np.array_equal(codes.levels[level][:4], straight[level].numpy())
        assert np.array_equal(codes.levels[level][first : first + 4], mirrored[level].numpy())
    assert np.array_equal(codes.attributes[:first], images.attributes[:first])


def test_two_ranks_extract_the_same_bytes_and_restart(run, tmp_path):
    flags = [f"--data={run / 'shards'}", f"--checkpoint={run / 'vqvae'}", "--flip=true"]
    out = tmp_path / "codes"
    run_ranks("extract_codes", flags, out, world=2)
    index = (run / "codes" / "index.json").read_bytes()
    assert (out / "index.json").read_bytes() == index
    shard = next(out.glob("train-*.tar"))
    (out / "index.json").unlink()
    shard.write_bytes(b"torn")
    run_ranks("extract_codes", flags, out)
    assert (out / "index.json").read_bytes() == index
    assert shard.read_bytes() == (run / "codes" / shard.name).read_bytes()


def config(run, out, **changes) -> SamplePrior:
    return SamplePrior(checkpoint=run / "vqvae", out=out, num_images=6, columns=3, **changes)


def pixels(directory) -> np.ndarray:
    return np.stack([np.array(Image.open(p)) for p in sorted((directory / "images").iterdir())])


def test_samples_do_not_depend_on_the_batch_or_the_ranks(run, tmp_path):
    for size in (6, 4):
        sample_prior(config(run, tmp_path / str(size), batch_size=size))
    assert np.array_equal(pixels(tmp_path / "6"), pixels(tmp_path / "4"))
    flags = [f"--checkpoint={run / 'vqvae'}", "--num_images=6", "--columns=3"]
    run_ranks("sample_prior", flags, tmp_path / "ranks", world=2)
    assert np.array_equal(pixels(tmp_path / "6"), pixels(tmp_path / "ranks"))
    sample_prior(config(run, tmp_path / "other", seed=1))
    assert not np.array_equal(pixels(tmp_path / "6"), pixels(tmp_path / "other"))
    assert pixels(tmp_path / "6").shape == (6, 32, 32, 3)


def test_conditions_by_name(run, tmp_path):
    sample_prior(config(run, tmp_path / "a", attributes="Smiling=1,Eyeglasses=0", format="tar"))
    assert (tmp_path / "a" / "shards" / "index.json").is_file()
    assert not (tmp_path / "a" / "images").exists()
    with pytest.raises(stage.UserError, match=r"unknown attribute Smilin; known: .*Smiling"):
        sample_prior(config(run, tmp_path / "b", attributes="Smilin=1"))
    with pytest.raises(stage.UserError, match="not trained with label"):
        sample_prior(config(run, tmp_path / "c", label="3"))
    with pytest.raises(ValueError, match="Smiling=1,Eyeglasses=0"):
        config(run, tmp_path / "d", attributes="Smiling=yes")
    with pytest.raises(stage.UserError, match="made otherwise"):
        sample_prior(config(run, tmp_path / "a", seed=3))


def test_a_prior_of_other_codes_is_refused(run, tmp_path):
    final = tmp_path / "prior-level0" / "final"
    final.mkdir(parents=True)
    for file in (run / "prior-level0" / "final").iterdir():
        (final / file.name).write_bytes(file.read_bytes())
    about = read_about(final)
    about["codes"]["checkpoint_sha256"] = "0" * 64
    text = json.dumps(about).encode()
    (final / "config.json").write_bytes(text)
    import hashlib

    manifest = json.loads((final / "manifest.json").read_text())
    manifest["files"]["config.json"] = {
        "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}  # fmt: skip
    (final / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(stage.UserError, match="codes of another checkpoint"):
        sample_prior(config(run, tmp_path / "s", priors=[final, run / "prior-level1"]))
    with pytest.raises(stage.UserError, match="prior of level 1, needed 0"):
        sample_prior(
            config(run, tmp_path / "s", priors=[run / "prior-level1", run / "prior-level0"])
        )


def test_a_resumed_prior_equals_an_uninterrupted_one(run, tmp_path):
    """With dropout and hidden conditions: their randomness is keyed by position."""

    def prior(out) -> TrainPrior:
        arguments = [f"--config={ROOT}/configs/debug/train_prior_level1.yaml", "--level=bottom"]
        parsed = stage.parse(TrainPrior, [*arguments, f"--codes={run}/codes", f"--out={out}"])
        return dataclasses.replace(
            parsed, total_images=128, save_every=64, validate_every=64, log_every=64
        )

    train_prior(prior(tmp_path / "whole"))
    train_prior(prior(tmp_path / "part"))
    for file in (tmp_path / "part" / "checkpoints" / "images-000000128").iterdir():
        file.unlink()
    train_prior(prior(tmp_path / "part"))
    for name in ("final", "checkpoints/images-000000128"):
        for file in (tmp_path / "whole" / name).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "part" / name / file.name).read_bytes(), file


def test_two_ranks_train_a_prior_on_the_same_batches(run, tmp_path):
    flags = [f"--config={ROOT}/configs/debug/train_prior_level0.yaml", f"--codes={run}/codes",
             "--total_images=32", "--log_every=16", "--model.dropout=0"]  # fmt: skip
    for name, world in (("one", 1), ("two", 2)):
        run_ranks("train_prior", flags, tmp_path / name, world)
    one, two = ([line for line in metrics(tmp_path / name) if "gradient/norm" in line]
                for name in ("one", "two"))  # fmt: skip
    for tag in ("prior/train_nats_per_code", "gradient/norm"):
        assert one[0][tag] == pytest.approx(two[0][tag], rel=1e-5)
        assert one[1][tag] == pytest.approx(two[1][tag], rel=1e-3)


def test_samples_are_finished_on_a_restart(run, tmp_path):
    wanted = config(run, tmp_path)
    sample_prior(wanted)
    before = pixels(tmp_path)
    (tmp_path / "samples.png").unlink()
    (tmp_path / "images" / "000002.png").unlink()
    sample_prior(wanted)
    assert (tmp_path / "samples.png").is_file() and np.array_equal(pixels(tmp_path), before)
    with pytest.raises(stage.UserError, match="made otherwise"):
        sample_prior(dataclasses.replace(wanted, num_images=4))


def test_nats_of_the_prior_are_below_the_uniform_code(run):
    for level in range(2):
        about = read_about(run / f"prior-level{level}")
        assert about["validation_nats_per_code"] < np.log(32)


@pytest.mark.parametrize(
    ("prior", "samples", "expected"),
    [
        ("condition: attributes", "num_images: 8", True),
        ("condition: class", None, True),
        ("condition: none", None, False),
        ("channels: 8", None, False),
        (None, None, False),
        ("condition: [", None, False),  # the stage says so
        ("- attributes", None, False),
        ("condition: attributes", "attributes: {Smiling: 1}", False),
        ("condition: attributes", "conditions: other/shards", False),
        ("condition: class", "label: cat", False),
    ],
)
def test_samples_of_conditional_priors_ask_for_what_the_data_has(
    prior, samples, expected, tmp_path
):
    for name, text in (("train_prior_level0", prior), ("sample_prior", samples)):
        if text is not None:
            (tmp_path / f"{name}.yaml").write_text(text)
    plan = run_all.steps(run_all.RunAll(configs=tmp_path, out=Path("run")), tmp_path)
    (step,) = (step for step in plan if step.name == "samples")
    assert step.flags.get("conditions") == (Path("run/shards") if expected else None)


@pytest.mark.parametrize("quantizers", [["fsq", "learned"], ["simvq", "cosine"]])
def test_the_codes_of_every_quantizer_go_through_every_stage(quantizers, tmp_path):
    """ema does so in the run above."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "debug", configs)
    for path in configs.glob("train_*.yaml"):
        values = yaml.safe_load(path.read_text()) | {"total_images": 64, "save_every": 64}
        if path.stem == "train_vqvae":
            values["model"]["quantizer"] = quantizers
        path.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    for step in run_all.steps(run_all.RunAll(configs=configs, out=out), configs):
        arguments = run_all.arguments_of(step, configs / f"{step.config}.yaml")
        run_ranks(step.script, arguments, step.out)
    assert read_about(out / "vqvae")["model"]["quantizer"] == quantizers
    assert (out / "samples/samples.png").is_file() and (out / "evaluation/report.md").is_file()
    model, codes = load_model(out / "vqvae"), open_codes(out / "codes", "valid")
    images = open_images(out / "shards", "valid", 32)
    with torch.no_grad():
        encoded = model.encode_codes(to_unit(images[slice(0, 8)]))
    for level, expected in enumerate(encoded):
        stored = codes.fetch(np.arange(8))[f"level{level}"]
        assert np.array_equal(stored, expected.numpy())
