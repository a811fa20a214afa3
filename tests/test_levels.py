"""What a level carries: on models whose answer is known, codes of known entropy, and the stage."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, metrics, run_stage

from pipeline import evaluate, report_levels, stage
from pipeline.data.images import open_images
from pipeline.evaluation import levels, pictures
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.priors.prior import PriorConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.report_levels import ReportLevels
from pipeline.stage import UserError
from pipeline.train_vqvae import TrainVQVAE
from pipeline.train_vqvae import main as train_vqvae
from pipeline.training.checkpoint import load_model, model_sha256, read_about, save_model

CPU = torch.device("cpu")
SIZE, DIM, K = 8, 3, 5  # pixels, code dimension, codes of the hand-made models
TINY = levels.SmallPriors(
    model=PriorConfig(channels=16, layers=2, kernel_size=3, condition_layers=1, dropout=0.0),
    total_images=5_000, batch_size=32, learning_rate=5e-3, warmup_images=320,
    average_halflife=320, validate_every=2_500,
)  # fmt: skip


class HandMade:
    """Grids 2x2, 4x4 (and 8x8); an image is a weighted sum of the levels' vectors, enlarged."""

    def __init__(self, weights):
        self.weights = weights
        self.codebooks = [torch.randn(K, DIM) for _ in weights]
        self.quantizers = [
            SimpleNamespace(lookup=lambda codes, table=table: table[codes].movedim(-1, 1))
            for table in self.codebooks
        ]

    def decode(self, quantized):
        maps = [
            weight * torch.nn.functional.interpolate(vectors, (SIZE, SIZE))
            for weight, vectors in zip(self.weights, quantized, strict=True)
        ]
        return 0.5 + torch.stack(maps).sum(0)


def random_codes(count, num_levels, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, K, (count, 2 * 2**level, 2 * 2**level)).astype(np.uint16)
        for level in range(num_levels)
    ]


def errors(model, row, count=60, seed=0):
    """MSE per image of a row, and what it was computed from."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, SIZE, SIZE, DIM)).astype(np.uint8)
    codes = random_codes(count, len(row))
    means = levels.mean_quantized(model, random_codes(130, len(row), seed=7), CPU)
    ablated = levels.Ablated(
        model, images, np.arange(count), codes, levels.partners(count, seed), means, row, CPU
    )
    shown = np.concatenate(list(ablated))
    assert shown.shape == images.shape and shown.dtype == np.uint8
    assert ablated.mse() == pytest.approx(float(torch.cat(ablated.errors).mean()), rel=1e-12)
    return torch.cat(ablated.errors), images, codes, shown


def test_a_level_that_the_decoder_ignores_changes_nothing_and_the_other_does():
    model = HandMade([0.3, 0.0])
    found = {name: errors(model, row)[0] for name, row in levels.treatments(2).items()}
    assert list(found) == [
        "intact", "level0/shuffled", "level1/shuffled", "level0/mean", "level1/mean"
    ]  # fmt: skip
    for name in ("level1/shuffled", "level1/mean"):
        assert torch.equal(found[name], found["intact"])
    for name in ("level0/shuffled", "level0/mean"):
        assert (found[name] != found["intact"]).all()


def test_errors_against_brute_force_in_float64():
    """Also that the mean is that of the training codes, and that errors are of clamped pixels."""
    model, sources = HandMade([0.5, 0.4]), levels.partners(60, seed=0)
    learned = random_codes(130, 2, seed=7)
    for name, row in levels.treatments(2).items():
        found, images, codes, shown = errors(model, row)
        outside = 0
        for image in range(0, 60, 7):
            pixels = np.full((SIZE, SIZE, DIM), 0.5)
            for level, treatment in enumerate(row):
                table = model.codebooks[level].double().numpy()
                if treatment == "mean":
                    vectors = table[learned[level]].mean(0)
                else:
                    source = sources[image] if treatment == "shuffled" else image
                    vectors = table[codes[level][source]]
                zoom = SIZE // len(vectors)
                pixels += model.weights[level] * vectors.repeat(zoom, 0).repeat(zoom, 1)
            clamped = pixels.clip(0, 1)
            outside += (pixels != clamped).sum()
            expected = ((clamped - images[image] / 255) ** 2).mean()
            assert float(found[image]) == pytest.approx(expected, rel=1e-5), name
            assert np.abs(shown[image] - 255 * clamped).max() < 0.51
        assert outside > 0, "nothing was clamped, so the test says less than it should"


def test_rows_for_one_and_three_levels():
    assert list(levels.treatments(1)) == ["intact", "level0/shuffled", "level0/mean"]
    three = levels.treatments(3)
    assert three["level1/only"] == ("mean", "own", "mean")
    assert three["level2/mean"] == ("own", "own", "mean")
    # each level that is not its own adds its variance, so `only` is worse than one `mean`
    model = HandMade([0.1, 0.1, 0.1])
    codes = random_codes(60, 3)
    means = levels.mean_quantized(model, codes, CPU)
    images = pictures.to_uint8(model.decode([
        quantizer.lookup(torch.from_numpy(level.astype(np.int64)))
        for quantizer, level in zip(model.quantizers, codes, strict=True)
    ]))  # fmt: skip
    found = {}
    for name, row in three.items():
        ablated = levels.Ablated(
            model, images, np.arange(60), codes, levels.partners(60, 0), means, row, CPU
        )
        list(ablated)
        found[name] = ablated.mse()
    assert found["intact"] < 1e-5 < found["level0/mean"]
    for level in range(3):  # a swap of independent codes costs the variance twice
        ratio = found[f"level{level}/shuffled"] / found[f"level{level}/mean"]
        assert ratio == pytest.approx(2, abs=0.2)
    variances = {level: found[f"level{level}/mean"] for level in range(3)}
    assert found["level1/only"] == pytest.approx(variances[0] + variances[2], rel=0.1)


@pytest.mark.parametrize("count", [2, 3, 16, 17, 1000])
def test_no_image_is_its_own_partner(count):
    found = levels.partners(count, seed=0)
    assert np.array_equal(np.sort(found), np.arange(count))
    assert (found != np.arange(count)).all()
    assert np.array_equal(found, levels.partners(count, seed=0))
    if count > 3:
        assert not np.array_equal(found, levels.partners(count, seed=1))


def test_nothing_depends_on_the_batch_size(monkeypatch):
    model = HandMade([0.3, 0.2])
    before = {name: errors(model, row) for name, row in levels.treatments(2).items()}
    monkeypatch.setattr(levels, "BATCH_SIZE", 7)
    for name, row in levels.treatments(2).items():
        after = errors(model, row)
        torch.testing.assert_close(after[0], before[name][0], rtol=1e-6, atol=0)
        assert np.array_equal(after[3], before[name][3])


def coded(count, seed, make):
    rng = np.random.default_rng(seed)
    return [level.astype(np.uint16) for level in make(rng, count)]


def test_nats_of_a_level_that_follows_from_the_coarser_one():
    """Level 1 says of every position of level 0 whether its code is 3: H(1 | 0) = 0."""

    def make(rng, count):
        coarse = rng.integers(0, 4, (count, 4, 4))
        return coarse, coarse == 3

    train, valid = coded(3000, 0, make), coded(520, 1, make)  # no multiple of a batch
    zero, one = levels.code_lengths(TINY, (4, 2), train, valid, 0, CPU)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert zero["given_coarser"] is None and zero["shared"] is None
    assert zero["alone"]["nats_per_code"] == pytest.approx(math.log(4), abs=0.02)
    assert one["given_coarser"]["nats_per_code"] < 0.01
    assert one["alone"]["nats_per_code"] == pytest.approx(entropy, abs=0.02)
    assert one["shared"]["nats_per_code"] == pytest.approx(entropy, abs=0.03)
    assert one["shared"]["nats_per_image"] == pytest.approx(
        one["alone"]["nats_per_image"] - one["given_coarser"]["nats_per_image"]
    )
    # units: a uniform code of 4 is 2 bits, on a grid of 16
    assert zero["uniform"]["bits_per_image"] == pytest.approx(32)
    assert zero["uniform"]["nats_per_image"] == pytest.approx(16 * math.log(4))
    assert (one["codebook_size"], one["grid"]) == (2, [4, 4])


def test_nats_of_independent_uniform_codes_are_log_k_and_nothing_is_shared():
    def make(rng, count):
        return rng.integers(0, 8, (count, 2, 2)), rng.integers(0, 6, (count, 4, 4))

    train, valid = coded(5000, 0, make), coded(520, 1, make)  # no multiple of a batch
    config = dataclasses.replace(TINY, total_images=3_000)
    zero, one = levels.code_lengths(config, (8, 6), train, valid, 0, CPU)
    assert zero["alone"]["nats_per_code"] == pytest.approx(math.log(8), abs=0.02)
    for what in ("alone", "given_coarser"):
        assert one[what]["nats_per_code"] == pytest.approx(math.log(6), abs=0.02)
    assert one["shared"]["nats_per_code"] == pytest.approx(0, abs=0.02)


def test_a_prior_is_seeded_and_reported_at_its_best():
    """16 images of noise, so that all it can learn is by heart."""
    train, valid = random_codes(16, 2), random_codes(32, 2, seed=1)
    config = dataclasses.replace(TINY, total_images=1280, validate_every=128)
    train_one = lambda seed: levels.train_prior(  # noqa: E731
        config, (K, K), 1, True, train, valid, seed, CPU
    )
    first = train_one(0)
    torch.rand(7)  # whatever else used the generator
    assert train_one(0) == first != train_one(1)
    assert first["nats_per_code"] < first["last_nats_per_code"]
    assert first["best_at_images"] in range(128, 1280, 128)
    wild = dataclasses.replace(config, learning_rate=1e9)
    with pytest.raises(UserError, match=r"prior 1 given coarser diverged; lower --prior\.learning"):
        levels.train_prior(wild, (K, K), 1, True, train, valid, 0, CPU)


# The stage.


@pytest.fixture(scope="module")
def run(face_shards, tmp_path_factory):
    """A VQ-VAE of configs/debug on drawn faces, and an untrained judge."""
    root = tmp_path_factory.mktemp("run")
    train_vqvae(stage.parse(TrainVQVAE, [
        f"--config={ROOT}/configs/debug/train_vqvae.yaml", f"--data={face_shards}",
        f"--out={root}/vqvae", "--total_images=512",
    ]))  # fmt: skip
    recipe = open_images(face_shards, "train", 32).recipe.hash
    torch.manual_seed(0)
    names = ("a", "b")
    judge = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    save_model(root / "judge", "classifier", judge,
               {"config": {}, "images_seen": 0, "recipe": recipe, "half": 1})  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def no_weights_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def config(run, shards, out, *flags):
    arguments = [f"--config={ROOT}/configs/debug/report_levels.yaml", f"--data={shards}",
                 f"--checkpoint={run}/vqvae", f"--out={out}", *flags]  # fmt: skip
    return stage.parse(ReportLevels, arguments)


@pytest.fixture(scope="module")
def report(run, face_shards, tmp_path_factory):
    """The stage's output, as a user runs it."""
    out = tmp_path_factory.mktemp("report")
    result = run_stage("report_levels.py", f"--config={ROOT}/configs/debug/report_levels.yaml",
                       f"--data={face_shards}", f"--checkpoint={run}/vqvae",
                       f"--judge={run}/judge", f"--out={out}", TORCH_HOME=str(out))  # fmt: skip
    assert "MSE only" not in result.stdout
    return out


def test_the_report_is_complete(report, run, face_shards):
    document = json.loads((report / "levels.json").read_text())
    protocol = document["protocol"]
    assert protocol["checkpoint"]["sha256"] == model_sha256(run / "vqvae")
    assert protocol["recipe"] == read_about(run / "vqvae")["recipe"]
    assert protocol["data_index_sha256"] == open_images(face_shards, "valid", 32).index.sha256
    assert (protocol["num_images"], protocol["train_images"]) == (16, 100)
    assert protocol["prior"]["model"]["channels"] == 16
    assert {"commit", "versions", "hardware", "date"} < set(protocol)
    assert [row["row"] for row in document["ablations"]] == list(levels.treatments(2))
    assert [figures["grid"] for figures in document["code_lengths"]] == [[4, 4], [8, 8]]
    assert document["code_lengths"][0]["codebook_size"] == 32
    text = (report / "levels.md").read_text()
    assert text == levels.markdown(document)
    for row in document["ablations"]:
        assert f"| {row['row'].replace('/', ' ')} | {row['mse']:.4g} | " in text
    assert f"{document['code_lengths'][1]['shared']['nats_per_code']:.4f}" in text
    (line,) = metrics(report)
    assert line["evaluation/levels/level1/mean/mse"] == document["ablations"][4]["mse"]
    for tag in ("intact/frechet/judge", "level0/alone/nats_per_code",
                "level1/shared/nats_per_code", "level1/given_coarser/nats_per_code"):  # fmt: skip
        assert math.isfinite(line[f"evaluation/levels/{tag}"])
    assert "evaluation/levels/level0/shared/nats_per_code" not in line
    assert not any("fid" in tag for tag in line)
    picture = pictures.Image.open(report / "levels.png")  # 8 images in 6 rows, gaps of 2, doubled
    assert picture.size == (2 * (8 * 34 + 2), 2 * (6 * 34 + 2))
    assert list((report / "tensorboard").iterdir())
    assert yaml.safe_load((report / "status.json").read_text())["images_seen"] == 512


def test_the_intact_row_is_what_evaluate_and_training_say(report, run, face_shards, tmp_path):
    intact = json.loads((report / "levels.json").read_text())["ablations"][0]
    about = read_about(run / "vqvae")
    assert intact["mse"] == pytest.approx(about["validation"]["validation/mse"], rel=1e-5)
    evaluate.main(evaluate.Evaluate(
        data=face_shards, checkpoint=run / "vqvae", judge=run / "judge", out=tmp_path
    ))  # fmt: skip
    (line,) = metrics(tmp_path)
    expected = line["evaluation/reconstructions/frechet/judge"]
    assert intact["frechet"]["judge"]["value"] == pytest.approx(expected, rel=1e-4)


def test_codes_and_means_are_those_of_the_model(run, face_shards):
    model = load_model(run / "vqvae", "vqvae")
    images = open_images(face_shards, "train", 32)
    indices = np.array([70, 3, 3, 100, 5])
    codes = levels.encode(model, images, indices, CPU, "test")
    with torch.no_grad():
        expected = model.encode_codes(pictures.to_unit(images[indices]))
    means = levels.mean_quantized(model, codes, CPU)
    for level in range(2):
        assert codes[level].dtype == np.uint16
        assert np.array_equal(codes[level], expected[level].numpy())
        vectors = model.quantizers[level].lookup(expected[level])
        torch.testing.assert_close(means[level], vectors.mean(0))


def test_one_level_and_no_judge(face_shards, run, tmp_path, capsys):
    about = read_about(run / "vqvae")
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(channels=8, residual_channels=8, ratios=(8,), codebook_size=(7,),
                              code_dim=4))  # fmt: skip
    save_model(tmp_path / "vqvae", "vqvae", model, {
        key: about[key] for key in ("config", "recipe", "images_seen")})  # fmt: skip
    report_levels.main(config(tmp_path, face_shards, tmp_path / "out"))
    assert "MSE only: for Fréchet distances give --judge PATH" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "levels.json").read_text())
    assert [row["row"] for row in document["ablations"]] == list(levels.treatments(1))
    assert all(row["frechet"] == {} for row in document["ablations"])
    (only,) = document["code_lengths"]
    assert only["given_coarser"] is None and only["grid"] == [4, 4]
    assert only["uniform"]["nats_per_code"] == pytest.approx(math.log(7))
    assert "Fréchet" not in (tmp_path / "out" / "levels.md").read_text()


def test_what_a_user_gets_wrong_is_one_line(face_shards, run, tmp_path):
    out = tmp_path / "out"
    wrong = {
        "num_images 40 does not fit: .* has 16 images in valid": ["--num_images=40"],
        "num_images must be at least 16": ["--num_images=8"],
        "prior.batch_size must be positive": ["--prior.batch_size=0"],
        "holds no trained model": [f"--checkpoint={tmp_path}/absent"],
        "holds a classifier, expected a vqvae": [f"--checkpoint={run}/judge"],
        "the published Inception file": [f"--inception_weights={ROOT}/README.md"],
    }
    save_model(tmp_path / "other", "vqvae", load_model(run / "vqvae"),
               read_about(run / "vqvae") | {"recipe": "0" * 16})  # fmt: skip
    wrong["was trained on recipe 0000000000000000"] = [f"--checkpoint={tmp_path}/other"]
    save_model(tmp_path / "judge", "classifier", load_model(run / "judge"),
               read_about(run / "judge") | {"recipe": "0" * 16})  # fmt: skip
    wrong["images of another recipe"] = [f"--judge={tmp_path}/judge"]
    for message, flags in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            report_levels.main(config(run, face_shards, out, *flags))
        assert "\n" not in str(caught.value)
    assert not out.exists()
