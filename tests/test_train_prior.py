"""Training of priors: when it stops, what it hides, which views it sees, what it reports."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import metrics
from faults import run_ranks
from safetensors.torch import load_file

from pipeline import stage, train_prior
from pipeline.data.codes import open_codes
from pipeline.data.images import open_images
from pipeline.data.shards import ShardReader, read_index
from pipeline.evaluation.pictures import to_unit
from pipeline.extract_codes import ExtractCodes
from pipeline.extract_codes import main as extract_codes
from pipeline.models.priors import prior as prior_module
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.train_prior import TrainPrior, hide_some_conditions
from pipeline.training.checkpoint import load_model, read_about, save_model
from pipeline.training.codebooks import Part, start_codebooks
from pipeline.training.collectives import rank_slice
from pipeline.training.tracking import Tracker


def encoded(shards, root, flip, channels=3):
    """Codes of two levels, 2 x 2 and 4 x 4, of a random encoder whose codebooks fit its latents."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "residual_channels": 8, "residual_layers": 0, "code_dim": 4}
    model = VQVAE(VQVAEConfig(in_channels=channels, ratios=(2, 8), codebook_size=(5,), **sizes))
    images = open_images(shards, "train", 32, progress=False)
    with torch.no_grad():
        start_codebooks(model, [Part(to_unit(images[:50]), 0)], batch_size=50)
    about = {"config": {"image_size": 32}, "recipe": images.recipe.hash}
    save_model(root / "vqvae", "vqvae", model, about)
    extract_codes(
        ExtractCodes(data=shards, checkpoint=root / "vqvae", out=root / "codes", flip=flip)
    )
    return root / "codes"


@pytest.fixture(scope="module")
def codes(face_shards, tmp_path_factory):
    return encoded(face_shards, tmp_path_factory.mktemp("prior"), flip=True)


@pytest.fixture(scope="module")
def digit_codes(digit_shards, tmp_path_factory):
    return encoded(digit_shards, tmp_path_factory.mktemp("digits"), flip=False, channels=1)


def tiny(codes, out, *flags) -> TrainPrior:
    words = [f"--codes={codes}", f"--out={out}", "--model.channels=4", "--model.layers=1",
             "--model.kernel_size=3", "--batch_size=16", "--total_images=64", "--warmup_images=0",
             "--log_every=32", "--validate_every=32", "--save_every=32"]  # fmt: skip
    return stage.parse(TrainPrior, [*words, *flags])


# The end of a run.


@pytest.fixture
def scripted(monkeypatch):
    """Has the validations find these nats, one after another; any training nats are 1."""

    def script(*validations):
        left = iter(validations)
        monkeypatch.setattr(
            train_prior, "nats_per_code",
            lambda model, codes, *_: next(left) if codes.split == "valid" else 1.0,
        )  # fmt: skip

    return script


NATS = (3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 9.0, 1.7, 0.0)  # at 32, 64 ...; the best at 128


def test_a_run_stops_when_its_patience_is_over_and_keeps_the_best(
    codes, tmp_path, scripted, capsys
):
    config = tiny(codes, tmp_path, "--total_images=640", "--patience=96", "--save_every=64")
    scripted(*NATS)
    assert train_prior.main(config) == 224
    said = capsys.readouterr().out
    assert said.count("stopped at 224 of 640 images: no new best in 96 (--patience)\n") == 1
    assert "best validation 1.5000 nats per code, at 128 images" in said
    assert read_about(tmp_path)["images_seen"] == 128
    best = load_file(tmp_path / "checkpoints/images-000000128/average.safetensors")
    last = load_file(tmp_path / "checkpoints/images-000000224/average.safetensors")
    final = load_file(tmp_path / "final/model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert any(not torch.equal(final[name], last[name]) for name in last)

    # started again it sees that it had stopped
    scripted()
    assert train_prior.main(config) == 224
    assert "stopped at 224" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [160, 176])  # at a validation, and between two
def test_a_resumed_run_goes_on_counting(cut, codes, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr("pipeline.training.checkpoint.KEEP", 20)
    flags = ["--patience=96", "--save_every=16", "--total_images=640"]
    scripted(*NATS)
    train_prior.main(tiny(codes, tmp_path, *flags))
    for path in (tmp_path / "checkpoints").glob("images-*"):
        if int(path.name[7:]) > cut:
            for file in path.iterdir():
                file.unlink()
    scripted(*NATS[cut // 32 :])
    assert train_prior.main(tiny(codes, tmp_path, *flags)) == 224


def test_a_run_stops_at_a_validation_only(codes, tmp_path, scripted):
    """At 80 images the best is 48 ago, but nobody has looked since 64, and 96 is better."""
    flags = ["--patience=48", "--save_every=16"]
    scripted(3.0, 3.0)
    assert train_prior.main(tiny(codes, tmp_path, *flags, "--total_images=64")) == 64
    scripted(2.0, 2.0, 2.0, 2.0)
    assert train_prior.main(tiny(codes, tmp_path, *flags, "--total_images=112")) == 112


@pytest.mark.parametrize(
    ("patience", "nats"), [(0, (1.0, 2.0, 2.0, 2.0, 2.0)), (64, (3.0, 3.0, 2.0, 2.0, 1.0))]
)
def test_without_patience_or_while_it_gets_better_a_run_goes_to_its_end(
    patience, nats, codes, tmp_path, scripted, capsys
):
    scripted(*nats)
    config = tiny(codes, tmp_path, f"--patience={patience}", "--total_images=160")
    assert train_prior.main(config) == 160
    assert "stopped" not in capsys.readouterr().out


def test_the_end_is_validated_whatever_the_cadence(codes, tmp_path):
    train_prior.main(tiny(codes, tmp_path, "--total_images=48", "--validate_every=40"))
    found = [line["images_seen"] for line in metrics(tmp_path) if "prior/gap_nats_per_code" in line]
    assert found == [48]
    train_prior.main(tiny(codes, tmp_path / "odd", "--total_images=50", "--validate_every=0"))
    assert read_about(tmp_path / "odd")["images_seen"] == 64


# What is hidden.


def hidden(seed=0, batch_size=4000, dropout=0.3, attributes=4, part=slice(None), images_seen=640):
    count = len(range(batch_size)[part])
    inputs = {"attributes": torch.ones(count, attributes), "labels": torch.full((count,), 7)}
    config = TrainPrior(
        codes="c", out="o", seed=seed, batch_size=batch_size, condition_dropout=dropout
    )
    found = hide_some_conditions(inputs, config, images_seen, part)
    return found["attributes"] == 0, found["labels"] == -1


def test_conditions_are_hidden_as_often_as_they_say():
    """Of A attributes a uniform share S: E[S] = 1/2 of them, all with E[S^A] = 1/(A+1)."""
    attributes, everything = hidden(batch_size=40_000)
    assert float(everything.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert attributes[everything].all()
    others = attributes[~everything]
    assert float(others.float().mean()) == pytest.approx(1 / 2, abs=0.01)
    assert float(others.all(1).float().mean()) == pytest.approx(1 / 5, abs=0.01)
    attributes, everything = hidden(dropout=0.0)
    assert not everything.any() and not attributes.all()


def test_what_is_hidden_depends_on_the_place_in_the_stream_alone():
    whole = hidden()
    for world in (2, 5):
        parts = [hidden(part=rank_slice(4000, rank, world)) for rank in range(world)]
        for ours, theirs in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(ours, theirs)
    for other in (hidden(seed=1), hidden(images_seen=656)):
        assert not torch.equal(whole[0], other[0]) and not torch.equal(whole[1], other[1])


@pytest.mark.parametrize(
    ("shards", "condition"), [("digit_codes", "attributes"), ("codes", "class")]
)
def test_a_condition_that_the_codes_lack_is_refused(shards, condition, request, tmp_path):
    config = tiny(request.getfixturevalue(shards), tmp_path / "out", f"--condition={condition}")
    with pytest.raises(stage.UserError, match=f"has no {condition} to condition on"):
        train_prior.main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shards", "condition"), [("codes", "attributes"), ("digit_codes", "class")]
)
def test_a_condition_that_the_codes_have_is_learned(shards, condition, request, tmp_path):
    train_prior.main(
        tiny(request.getfixturevalue(shards), tmp_path, f"--condition={condition}", "--level=top")
    )
    sizes = load_model(tmp_path, "prior").config
    assert (sizes.num_classes > 0, sizes.num_attributes > 0) == (
        condition == "class", condition == "attributes"
    )  # fmt: skip


# Views.


def keys_of(root, split):
    index = read_index(root)
    readers = [ShardReader(root / shard.name, shard) for shard in index.shards(split)]
    return [key.decode() for reader in readers for key in reader.keys]


def test_no_view_of_a_validation_image_is_trained_on(codes):
    train, valid = keys_of(codes, "train"), keys_of(codes, "valid")
    assert not any(key.endswith("_flip") for key in valid)
    assert not set(valid) & {key.removesuffix("_flip") for key in train}
    assert len(train) == 2 * len({key.removesuffix("_flip") for key in train})


@pytest.mark.parametrize("flips", [True, False])
def test_training_takes_both_views_or_the_original_alone(
    flips, codes, face_shards, tmp_path, monkeypatch, capsys
):
    """What the loader is given, against codes computed from the images and their mirror images."""
    given, make = {}, train_prior.training_batches

    def training_batches(fetch, count, **options):
        given.update(fetch(np.arange(count)))
        return make(fetch, count, **options)

    monkeypatch.setattr(train_prior, "training_batches", training_batches)
    train_prior.main(tiny(codes, tmp_path, f"--flips={flips}".lower()))
    images = open_images(face_shards, "train", 32, progress=False)
    model, pixels = load_model(codes.parent / "vqvae"), to_unit(images[:])
    with torch.no_grad():
        views = [model.encode_codes(pixels)]
        if flips:
            views.append(model.encode_codes(pixels.flip(3)))
    for level in range(2):
        assert len(views[0][level].unique()) == 5
        expected = torch.cat([view[level] for view in views]).flatten(1).tolist()
        assert sorted(given[f"level{level}"].reshape(len(expected), -1).tolist()) == sorted(
            expected
        )
    count = len(images)
    said = f"{2 * count} training samples: {count} images in 2 views"
    if not flips:
        said = f"{count} training samples: {count} images in 1 view\n"
    assert f"level 0, {said}" in capsys.readouterr().out


def test_codes_without_flips_have_one_view(digit_codes):
    digits = open_codes(digit_codes, "train")
    assert np.array_equal(np.flatnonzero(~digits.flipped), np.arange(len(digits)))


# What is reported.


def brute_force_nats(out, codes, indices):
    """Mean nats per code of samples, one by one in float64, conditioned on all attributes."""
    model, total = load_model(out, "prior").double(), 0.0
    for index in indices:
        batch = {
            name: torch.from_numpy(each) for name, each in codes.fetch(np.array([index])).items()
        }
        condition = model.condition(1, [batch["level0"]], None, batch["attributes"].double())
        with torch.no_grad():
            p = model.logits(batch["level1"], condition)[0].softmax(-1).numpy()
        rows, columns = np.indices(p.shape[:2])
        total -= np.log(p[rows, columns, batch["level1"][0]]).mean()
    return total / len(indices)


def test_nats_gap_speed_and_memory_are_reported(codes, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "images_per_sec", lambda *_: 100.0)
    train_prior.main(
        tiny(codes, tmp_path, "--condition=attributes", "--level=bottom", "--learning_rate=0.02")
    )
    lines, about = metrics(tmp_path), read_about(tmp_path)
    logged = [line for line in lines if "throughput/codes_per_sec" in line]
    assert [line["throughput/codes_per_sec"] for line in logged] == [1600.0, 1600.0]  # 4 x 4 codes
    assert all(0.05 < line["memory/peak_gib"] < 64 for line in logged)
    validated = [line for line in lines if "prior/validation_nats_per_code" in line]
    assert [line["images_seen"] for line in validated] == [32, 64]
    best = min(validated, key=lambda line: line["prior/validation_nats_per_code"])
    assert best["images_seen"] == about["images_seen"]
    train, valid = open_codes(codes, "train"), open_codes(codes, "valid")
    # every twelfth image or so, none of them mirrored
    originals = [i for i, key in enumerate(keys_of(codes, "train")) if not key.endswith("_flip")]
    sample = [originals[len(originals) * i // len(valid)] for i in range(len(valid))]
    expected = {
        "validation_nats_per_code": brute_force_nats(tmp_path, valid, range(len(valid))),
        "train_sample_nats_per_code": brute_force_nats(tmp_path, train, sample),
    }
    for name, value in expected.items():
        assert about[name] == best[f"prior/{name}"] == pytest.approx(value, rel=1e-5)
    gap = expected["validation_nats_per_code"] - expected["train_sample_nats_per_code"]
    assert about["gap_nats_per_code"] == best["prior/gap_nats_per_code"]
    assert about["gap_nats_per_code"] == pytest.approx(gap, abs=1e-5)


def test_codes_without_a_pattern_are_learned_by_heart_and_the_run_stops(
    codes, tmp_path, monkeypatch
):
    """Random codes: whatever the training codes gain, the others cannot."""

    def random_codes(root, split):
        found, rng = open_codes(root, split), np.random.default_rng(ord(split[0]))
        levels = [rng.integers(0, 5, level.shape) for level in found.levels]
        return dataclasses.replace(found, levels=levels)

    monkeypatch.setattr(train_prior, "open_codes", random_codes)
    flags = ["--model.channels=32", "--model.dropout=0", "--learning_rate=0.01", "--flips=false",
             "--average_halflife=0", "--total_images=64000", "--validate_every=320",
             "--patience=960", "--save_every=0", "--log_every=0"]  # fmt: skip
    seen = train_prior.main(tiny(codes, tmp_path, *flags, "--level=1"))
    best = read_about(tmp_path)
    assert seen == best["images_seen"] + 960 < 3200
    last = metrics(tmp_path)[-1]
    assert best["validation_nats_per_code"] == pytest.approx(np.log(5), abs=0.05)
    assert last["prior/validation_nats_per_code"] > np.log(5) + 0.05
    assert last["prior/train_sample_nats_per_code"] < np.log(5) - 0.05
    assert last["prior/gap_nats_per_code"] > best["gap_nats_per_code"] + 0.1


# Memory, and several processes.


def test_checkpointed_activations_change_nothing(codes, tmp_path, monkeypatch):
    """With dropout, whose masks have to be drawn alike the second time."""
    calls, checkpoint = [], prior_module.checkpoint
    monkeypatch.setattr(
        prior_module, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k)
    )
    flags = ["--model.architecture=pixelsnail", "--model.layers=2", "--model.attention_layers=1",
             "--model.attention_channels=8", "--model.heads=2", "--model.dropout=0.3"]  # fmt: skip
    train_prior.main(tiny(codes, tmp_path / "kept", *flags))
    assert not calls
    train_prior.main(tiny(codes, tmp_path / "anew", *flags, "--checkpoint_activations=true"))
    assert len(calls) == 4 * 3  # steps, layers
    kept, anew = (
        load_file(tmp_path / run / "checkpoints/images-000000064/model.safetensors")
        for run in ("kept", "anew")
    )
    for name in kept:
        torch.testing.assert_close(anew[name], kept[name], rtol=1e-5, atol=1e-7)


def test_zero_trains_a_checkpointed_pixelsnail_as_ddp_does(codes, tmp_path):
    """Two ranks; with dropout, coarser codes and attributes."""
    flags = [f"--codes={codes}", "--level=1", "--condition=attributes", "--total_images=48",
             "--batch_size=16", "--log_every=16", "--model.architecture=pixelsnail",
             "--model.channels=8", "--model.layers=2", "--model.attention_layers=1",
             "--model.attention_channels=8", "--model.heads=2", "--model.output_layers=1",
             "--checkpoint_activations=true", "--warmup_images=0"]  # fmt: skip
    run_ranks("train_prior", flags, tmp_path / "ddp", world=2)
    run_ranks("train_prior", flags, tmp_path / "zero", world=2, engine="zero2")
    ddp, zero = metrics(tmp_path / "ddp"), metrics(tmp_path / "zero")
    tags = ("prior/train_nats_per_code", "gradient/norm", "prior/validation_nats_per_code")
    assert set(tags) < {tag for line in ddp for tag in line}
    for ours, theirs in zip(zero, ddp, strict=True):
        for tag in tags:
            assert ours.get(tag, 0) == pytest.approx(theirs.get(tag, 0), rel=1e-5)
    start, end = (
        load_file(tmp_path / "ddp/checkpoints" / f"images-0000000{n}/model.safetensors")
        for n in ("00", "48")
    )
    ours = load_file(tmp_path / "zero/checkpoints/images-000000048/model.safetensors")
    for name, tensor in end.items():
        assert not torch.equal(tensor, start[name]), name
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--patience=-1", "patience must be at least 0, got -1"),
        ("--condition_dropout=-0.1", r"condition_dropout must be in \[0, 1\), got -0.1"),
        ("--condition_dropout=1", r"condition_dropout must be in \[0, 1\), got 1"),
        ("--model.attention_layers=1", "are of architecture pixelsnail, not of pixelcnn"),
        ("--condition_dropout=0 --condition=class", "must be above 0 with condition class"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flag, message, tmp_path):
    with pytest.raises(stage.UserError, match=message) as error:
        tiny("codes", tmp_path, *flag.split())
    assert "\n" not in str(error.value)
