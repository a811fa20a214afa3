"""The comparison: sets of models whose answer is known, figures recomputed otherwise, the stage."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import compare, stage
from pipeline.compare import Compare
from pipeline.data.images import open_images
from pipeline.evaluation import comparison, extractors, fidelity, pictures
from pipeline.evaluation.comparison import Data
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.models.vqvae import VQVAE, VQVAEConfig
from pipeline.stage import UserError
from pipeline.training.checkpoint import load_model, model_sha256, save_model

CPU, SIZE, DIMS = torch.device("cpu"), 32, 3 * 32 * 32


def vae(seed=0, **changes):
    torch.manual_seed(seed)
    values = {"channels": 4, "latent_dim": 3, "image_size": SIZE}
    return VAE(VAEConfig(**values | changes)).eval()


def vqvae(ratios=(2, 4), seed=0, **changes):
    torch.manual_seed(seed)
    values = {"channels": 8, "residual_channels": 8, "codebook_size": (8,), "code_dim": 4}
    return VQVAE(VQVAEConfig(ratios=ratios, **values | changes)).eval()


@pytest.fixture(scope="module")
def images(face_shards):
    return [open_images(face_shards, split, SIZE, progress=False) for split in ("train", "valid")]


@pytest.fixture(scope="module")
def data(images):
    train, real = images
    return Data(train, 100, real, np.arange(16)[::-1].copy(), 0, CPU)


def about(images, **changes):
    """What a training stage says of its model, as far as it is read."""
    config = {"image_size": SIZE, "binarize": False}
    return {"config": config, "images_seen": 640, "recipe": images[0].recipe.hash, **changes}


def write_samples(tree, count, **changes):
    note = {"vqvae_sha256": model_sha256(tree / "vqvae"), "num_images": count, **changes}
    shutil.rmtree(tree / "samples", ignore_errors=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        pictures.save_png(pixels, tree / f"samples/images/{number:06d}.png")
    stage.write_json(tree / "samples/samples.json", note)


@pytest.fixture(scope="module")
def tree(images, tmp_path_factory):
    """Untrained runs: an AE, two seeds of a VAE, a VQ-VAE and images said to be its, a judge."""
    root = tmp_path_factory.mktemp("tree")
    save_model(root / "ae", "vae", vae(posterior="delta"), about(images))
    for seed in range(2):
        save_model(root / f"vae-seed{seed}", "vae", vae(seed), about(images))
    save_model(root / "vqvae", "vqvae", vqvae(), about(images))
    write_samples(root, 20)
    torch.manual_seed(0)
    names = ("a", "b")
    judge = Classifier(ClassifierConfig(num_outputs=2, channels=8, kind="attributes", names=names))
    save_model(root / "judge", "classifier", judge, about(images, half=1))
    (root / "vae-seed0" / "metrics.jsonl").write_text(
        "".join(json.dumps({"images_seen": n, "throughput/images_per_sec": speed}) + "\n"
                for n, speed in enumerate((10.0, 300.0, 20.0)))
        + json.dumps({"images_seen": 3, "validation/kl": 1.0}) + "\n"
    )  # fmt: skip
    return root


RUNS = ("ae", "vae-seed0", "vae-seed1", "vqvae")


def config(tree, shards, out, **changes):
    values = {"runs": [tree / name for name in RUNS], "judge": tree / "judge"}
    return Compare(**{"data": shards, "out": out, "train_images": 100, **values, **changes})


@pytest.fixture(scope="module", autouse=True)
def no_weights_in_the_users_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path_factory.getbasetemp()))
        yield


@pytest.fixture(scope="module")
def compared(tree, face_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    compare.main(config(tree, face_shards, out))
    return out


def read(out):
    return json.loads((out / "comparison.json").read_text())


# Sets of images.


def watched(model, monkeypatch):
    """Decodes as ever, and keeps the z and y of each batch."""
    seen, decode = [], model.decode_mean
    monkeypatch.setattr(model, "decode_mean", lambda z, y: seen.append((z, y)) or decode(z, y))
    return seen


def test_the_density_follows_the_latents_of_an_autoencoder_and_the_prior_does_not(
    data, monkeypatch
):
    model = vae(posterior="delta")
    with torch.no_grad():
        model.to_posterior.weight.mul_(30)
        model.to_posterior.bias.copy_(torch.tensor([100.0, -50.0, 0.0]))
    seen, found = watched(model, monkeypatch), comparison.vae_material(model, False, data)
    assert tuple(found.sets) == comparison.SETS
    made = {name: np.concatenate(list(batches)) for name, batches in found.sets.items()}
    z = {name: z for name, (z, _) in zip(made, seen, strict=True)}
    ((name, learned, means),) = found.probed
    assert name == "latent" and learned.shape == (100, 3) and means.shape == (16, 3)
    assert np.array_equal(z["reconstructions"], means)
    low, high = learned.min(0), learned.max(0)
    width = high - low
    for name in ("gaussian", "mixture"):
        inside = (z[name].numpy() > low - width) & (z[name].numpy() < high + width)
        assert inside.all(), name
    assert np.abs(z["samples"].numpy()).max() < 6 < np.abs(z["mixture"][:, 0].numpy()).min()
    with torch.no_grad():
        batch = pictures.to_unit(data.real[data.chosen])
        expected = pictures.to_uint8(model.reconstruct(batch, torch.zeros(16, 0)))
    difference = made["reconstructions"].astype(int) - expected
    assert np.abs(difference).max() <= 1  # a rounding between batch sizes


def test_interpolations_lie_half_way_between_two_different_images(data, monkeypatch):
    model = vae()
    seen, found = watched(model, monkeypatch), comparison.vae_material(model, False, data)
    list(found.sets["interpolations"])
    ((_, _, means),) = found.probed
    halves = (means[:, None] + means) / 2
    distances = np.abs(seen[0][0].numpy()[:, None, None] - halves).max(-1)  # (16, 16, 16)
    for row, distance in enumerate(distances):
        others = np.delete(distance[row], row)
        assert others.min() < 1e-5 and distance[row, row] > 1e-4


def test_conditions_are_those_of_real_images_and_of_training_images(data, monkeypatch):
    count = len(data.train.index.attribute_names)
    model = vae(num_attributes=count, prior="learned")
    seen, found = watched(model, monkeypatch), comparison.vae_material(model, False, data)
    for name in ("reconstructions", "samples", "mixture"):
        list(found.sets[name])
    real = data.real.attributes[data.chosen]
    assert np.array_equal(seen[0][1], real) and np.array_equal(seen[1][1], real)
    learned = {tuple(row) for row in data.train.attributes[:100].tolist()}
    assert {tuple(row) for row in seen[2][1].int().tolist()} <= learned
    assert not np.array_equal(seen[2][1], real)


def test_a_latent_with_too_many_dimensions_for_the_mixture_has_no_samples_of_it(data, capsys):
    found = comparison.vae_material(vae(latent_dim=20), False, data)
    assert "mixture" not in found.sets and "gaussian" in found.sets
    assert "no samples of a mixture: 10 Gaussians in 20 dimensions" in capsys.readouterr().out


def test_bits_stay_within_their_range(data, monkeypatch):
    model = vae(posterior="bernoulli")
    seen, found = watched(model, monkeypatch), comparison.vae_material(model, False, data)
    for name in ("gaussian", "samples"):
        list(found.sets[name])
    assert all(z.min() >= 0 and z.max() <= 1 for z, _ in seen)
    assert set(seen[1][0].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("quantizer", ["ema", "fsq"])
def test_between_an_image_and_itself_is_its_reconstruction(data, quantizer):
    model = vqvae(quantizer=(quantizer,))
    same = data._replace(chosen=np.full(16, 5))
    between = np.concatenate(list(comparison.between(model, same)))
    with torch.no_grad():
        batch = pictures.to_unit(data.real[same.chosen])
        expected = pictures.to_uint8(model(batch).reconstructions)
    assert np.array_equal(between, expected)


def test_between_two_images_against_a_search_by_hand(data):
    model, pair = vqvae(ratios=(8,), codebook_size=(64,)), np.array([3, 9])
    with torch.no_grad():
        batch = pictures.to_unit(data.real[pair])
        latents = model.to_latents[0](model.encode_features(batch)[0]).movedim(1, -1)
        middle = latents.mean(0)  # (4, 4, D)
        table = model.quantizers[0].vectors_of_codes()
        noise = 0.1 * latents.std() * torch.randn_like(table)
        table.copy_(torch.cat([*latents, middle, middle]).flatten(0, 1) + noise)
    between = np.concatenate(list(comparison.between(model, data._replace(chosen=pair))))
    with torch.no_grad():
        codes = (middle[..., None, :] - table).square().sum(-1).argmin(-1)
        expected = pictures.to_uint8(model.decode_codes([codes[None]]))
        ends = [model.encode_codes(batch)[0][row] for row in range(2)]
    assert np.array_equal(between[0], expected[0]) and np.array_equal(between[1], expected[0])
    assert not any(torch.equal(codes, end) for end in ends)


def test_vectors_of_codes_are_what_the_model_quantizes_to(data):
    model = vqvae()
    found = comparison.vqvae_material(model, None, data)
    assert set(found.sets) == {"reconstructions", "interpolations"}
    with torch.no_grad():
        expected = model.encode(pictures.to_unit(data.real[data.chosen]))
    for level, (name, learned, features) in enumerate(found.probed):
        assert name == f"level{level}" and len(learned) == 100
        assert np.array_equal(features, expected[level].quantized.flatten(1))


# The stage.


def test_the_table_has_a_row_per_run_and_one_for_the_seeds(compared, tree):
    report = read(compared)
    assert list(report["rows"]) == ["ae", "vae-seed0", "vae-seed1", "vae, 2 seeds", "vqvae"]
    assert report["runs"]["vqvae"]["sha256"] == model_sha256(tree / "vqvae")
    assert (report["protocol"]["num_images"], report["protocol"]["train_images"]) == (16, 100)
    assert {"commit", "versions", "hardware", "date"} < set(report["protocol"])
    tags = [f"evaluation/{images}/{metric}/judge" for metric in ("frechet", "kid")
            for images in ("reconstructions", "gaussian", "mixture", "interpolations")]  # fmt: skip
    tags += ["frechet/judge", "kid/judge", "parameters", "sampling_images_per_sec"]
    tags += ["probe/latent/average_precision", "probe/latent/balanced_accuracy"]
    for name in ("ae", "vae-seed0", "vae-seed1", "vae, 2 seeds"):
        row = report["rows"][name]
        assert set(tags) < set(row) and all(math.isfinite(row[tag]["value"]) for tag in tags)
    row = report["rows"]["vqvae"]
    assert {"mse", "frechet/judge", "evaluation/interpolations/kid/judge"} < set(row)
    assert {f"probe/level{level}/average_precision" for level in range(2)} < set(row)
    assert not {"evaluation/mixture/frechet/judge", "bound", "sampling_images_per_sec"} & set(row)
    assert report["rows"]["ae"]["parameters"]["value"] == sum(
        each.numel() for each in vae(posterior="delta").parameters()
    )
    assert report["rows"]["vae-seed0"]["training_images_per_sec"]["value"] == 20
    assert "training_images_per_sec" not in report["rows"]["ae"]


def test_the_markdown_says_what_the_json_says_and_dashes_for_the_rest(compared):
    report, text = read(compared), (compared / "comparison.md").read_text()
    assert text == comparison.markdown(report)
    lines = text.splitlines()
    frechet = lines.index(
        "| Fréchet | reconstructions | samples | gaussian | mixture of 10 | interpolations |"
    )
    titles = [line.split(" | ")[0] for line in lines[frechet + 2 : frechet + 9]]
    assert titles == [
        "| real against real (floor)", "| blurred real (ceiling)", "| ae", "| vae-seed0",
        "| vae-seed1", "| vae, 2 seeds", "| vqvae",
    ]  # fmt: skip
    floor = report["references"]["evaluation/floor/frechet/judge"]["value"]
    assert lines[frechet + 2].count(f"{floor:.4g} [") == 5
    assert lines[frechet + 8].split(" | ")[3:5] == ["-", "-"]
    for row in report["rows"].values():
        assert f"{row['evaluation/reconstructions/frechet/judge']['value']:.4g}" in text
    assert "FID" not in text and "fid" not in json.dumps(report["rows"])
    for name, path in report["pictures"].items():
        picture = pictures.Image.open(compared / path)
        rows = 4 if name == "vqvae" else 6
        assert picture.size == (16 * 34 + 2, rows * 34 + 2) and f"({path})" in text


def test_a_distance_against_one_computed_from_the_model_itself(compared, tree, data):
    judge = extractors.judge_extractor(tree / "judge", CPU)
    model = load_model(tree / "vqvae")
    batch = data.real[np.arange(16)]
    with torch.no_grad():
        shown = pictures.to_uint8(model(pictures.to_unit(batch)).reconstructions)
    features = [
        judge.module(torch.from_numpy(each).permute(0, 3, 1, 2))[0].detach().double().numpy()
        for each in (shown, batch)
    ]
    figure = read(compared)["rows"]["vqvae"]["evaluation/reconstructions/frechet/judge"]
    assert figure["value"] == pytest.approx(fidelity.frechet_distance(*features), rel=1e-3)


def test_unchanged_runs_are_not_measured_again(
    compared, tree, face_shards, images, tmp_path, monkeypatch, capsys
):
    shutil.copytree(tree, tmp_path / "tree")
    tree, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(compared, out)
    before, measured = read(out), []

    def measure(run, *_):
        measured.append(run.name)
        return {"pixel_nats": compare.figure(7.0)}

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(fidelity, "extract", None)  # not even the real images
    compare.main(config(tree, face_shards, out))
    assert not measured and read(out)["rows"] == before["rows"]
    said = capsys.readouterr().out
    assert (
        "vae-seed0: no likelihood and information of this checkpoint: python pipeline/repo" in said
    )
    assert "vqvae: no code length: " in said and "no samples" not in said

    save_model(tree / "vae-seed1", "vae", vae(seed=9), about(images))
    compare.main(config(tree, face_shards, out))
    assert measured == ["vae-seed1"]
    compare.main(config(tree, face_shards, out))
    assert measured == ["vae-seed1"]
    write_samples(tree, 20, seed=1)
    compare.main(config(tree, face_shards, out))
    assert measured == ["vae-seed1", "vqvae"]


def test_samples_count_where_they_are_the_checkpoints_own(tree, tmp_path, capsys):
    shutil.copytree(tree / "vqvae", tmp_path / "vqvae")
    find = lambda: compare.find_samples(  # noqa: E731
        "vqvae", tmp_path / "vqvae", model_sha256(tmp_path / "vqvae"), SIZE, 3, 16
    )
    assert find() is None
    for changes, message in (
        ({"vqvae_sha256": "0" * 64}, "was not decoded by"),
        ({"attributes": "Smiling=1"}, "was asked for attributes"),
    ):
        write_samples(tmp_path, 16, **changes)
        assert find() is None and message in capsys.readouterr().out
    write_samples(tmp_path, 15)
    assert find() is None and "15 images, fewer than 16; python" in capsys.readouterr().out
    write_samples(tmp_path, 17)
    assert len(find()) == 17


def test_a_report_is_read_if_it_is_of_this_checkpoint_and_split(tree, face_shards, tmp_path):
    run = tmp_path / "vae"
    shutil.copytree(tree / "vae-seed0", run)
    sha256, given = model_sha256(run), config(tree, face_shards, tmp_path)
    protocol = {"split": "valid", "checkpoint": {"sha256": sha256}, "binarized": False}
    protocol["likelihood"] = {"num_samples": 500}
    figures = {
        "mse": {"value": 0.1, "standard_error": None, "count": 50},
        "nll_importance": {"value": -100.0, "standard_error": 2.0, "count": 50},
        "active_units": {"value": 3.0, "standard_error": None, "count": 50},
        "mig": {"value": 0.5, "standard_error": None, "count": 50},
    }
    stage.write_json(run / "report/report.json", {"protocol": protocol, "figures": figures})
    found = compare.from_report("vae", run, sha256, given)
    assert set(found) == {
        "mse", "bound", "likelihood_images", "likelihood_samples", "active_units"
    }  # fmt: skip
    assert found["likelihood_samples"]["value"] == 500
    assert found["bound"]["interval"] == pytest.approx((-103.92, -96.08))
    assert compare.from_report("vae", run, "0" * 64, given) == {}
    report = {"protocol": protocol | {"binarized": True}, "figures": figures}
    stage.write_json(run / "report/report.json", report)
    assert "mse" not in compare.from_report("vae", run, sha256, given)  # of other pixels
    given = config(tree, face_shards, tmp_path, split="test")
    assert compare.from_report("vae", run, sha256, given) == {}


def test_seeds_are_averaged_over_what_all_of_them_have():
    values = {"a": (1.0, 2.0, 6.0), "b": (0.5, 0.25, 0.75)}
    rows = {
        f"x-seed{seed}": {tag: compare.figure(values[tag][seed]) for tag in values}
        for seed in range(3)
    }
    rows["x-seed1"]["only"] = compare.figure(1.0)
    found = comparison.with_seeds({**rows, "y-seed0": rows["x-seed0"]})
    assert list(found) == [*rows, "x, 3 seeds", "y-seed0"]
    assert set(found["x, 3 seeds"]) == {"a", "b"}
    for tag, numbers in values.items():
        figure = found["x, 3 seeds"][tag]
        assert figure["value"] == pytest.approx(np.mean(numbers))
        assert figure["spread"] == pytest.approx(np.std(numbers, ddof=1))
        assert figure["interval"] is None


@pytest.mark.parametrize("samples", [(500, 5000), (500, 500)])
def test_likelihoods_that_were_estimated_otherwise_have_no_mean(samples):
    rows = {
        f"x-seed{seed}": {
            "likelihood_samples": {"value": count}, "bound": {"value": 1.0}, "mse": {"value": 2.0}
        }
        for seed, count in enumerate(samples)
    }  # fmt: skip
    alike = {"likelihood_samples", "bound"} if samples[0] == samples[1] else set()
    assert set(comparison.with_seeds(rows)["x, 2 seeds"]) == {"mse"} | alike


def test_runs_of_one_name_are_told_apart_by_their_trees(tree, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tree / "ae", tmp_path / name / "vae")
    shutil.copytree(tree / "ae", tmp_path / "status")  # status.json is another file
    paths = [tmp_path / "one/vae", tmp_path / "two/vae/final", tree / "ae", tmp_path / "status"]
    found = compare.named(paths)
    assert list(found) == ["one-vae", "two-vae", "ae", f"{tmp_path.name}-status"]
    assert found["two-vae"] == (tmp_path / "two/vae").resolve()
    with pytest.raises(UserError, match=r"-ae twice; name every run once"):
        compare.named([tree / "ae", tree / "ae/final"])


def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_written(
    tree, face_shards, images, tmp_path
):
    save_model(tmp_path / "other", "vae", vae(), about(images, recipe="other"))
    small = about(images, config={"image_size": 16, "binarize": False})
    save_model(tmp_path / "small", "vae", vae(image_size=16), small)
    out = tmp_path / "out"
    cases = [
        ("holds no trained model", {"runs": [tree / "ae", tree / "absent"]}),
        ("holds a classifier, expected vae or vqvae", {"runs": [tree / "judge"]}),
        ("was trained on recipe other", {"runs": [tree / "ae", tmp_path / "other"]}),
        (r"images of \[16, 32\] pixels", {"runs": [tree / "ae", tmp_path / "small"]}),
        ("does not fit", {"num_images": 17}),
        ("give --judge PATH", {"judge": None}),
    ]
    for message, changes in cases:
        with pytest.raises(UserError, match=message) as refusal:
            compare.main(config(tree, face_shards, out, **changes))
        assert "\n" not in str(refusal.value)
    assert not out.exists()
    for message, changes in (
        ("runs needs at least one", {"runs": []}),
        ("train_images must be at least 16, got 3", {"train_images": 3}),
        ("num_images must be at least 16, got 0", {"num_images": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            config(tree, face_shards, out, **changes)


def test_both_ways_to_name_runs():
    words = ["--data=d", "--out=o"]
    listed = stage.parse(Compare, [*words, "--runs", "[a/x, b]"])
    assert stage.parse(Compare, [*words, "--runs+=a/x", "--runs+=b"]) == listed
    assert [str(path) for path in listed.runs] == ["a/x", "b"]


def test_runs_in_the_plane_are_drawn_beside_each_other(images, tree, face_shards, tmp_path):
    root = tmp_path / "planes"
    save_model(root / "ae", "vae", vae(posterior="delta", latent_dim=2), about(images))
    save_model(root / "vae", "vae", vae(latent_dim=2), about(images))
    shutil.copytree(tree / "judge", root / "judge")
    runs = [root / "ae", root / "vae"]
    compare.main(config(root, face_shards, tmp_path / "out", runs=runs))
    assert read(tmp_path / "out")["pictures"]["scatter"] == "scatter.png"
    width, height = Image.open(tmp_path / "out/scatter.png").size
    assert width > 1.5 * height  # two panels
