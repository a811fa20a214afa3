"""Training runs and reports of the VAE family, with the real stages."""

import dataclasses
import json

import pytest
import torch
from conftest import ROOT, metrics
from faults import run_ranks
from safetensors import safe_open
from test_training import assert_same_tensors

from pipeline import stage
from pipeline.data.binarize import binarize
from pipeline.data.faces import SOMETIMES_HIDDEN
from pipeline.data.images import open_images
from pipeline.evaluation import latents
from pipeline.evaluation.vae_figures import (
    LikelihoodSettings,
    Split,
    latent_figures,
    likelihood_figures,
)
from pipeline.models.vae.vae import VAE, VAEConfig
from pipeline.report_vae import ReportVAE
from pipeline.report_vae import main as report_vae
from pipeline.train_vae import TrainVAE, warmup_at
from pipeline.train_vae import main as train_vae
from pipeline.training.checkpoint import load_model, read_about

CONFIGS = sorted(ROOT.glob("configs/*/train_vae_*.yaml"))
SHORT = ["--total_images=64", "--validate_every=0", "--save_every=0", "--log_every=32"]


def tiny(data, out, *flags) -> TrainVAE:
    """The debug config at its smallest."""
    path = ROOT / "configs/debug/train_vae.yaml"
    words = [f"--config={path}", f"--data={data}", f"--out={out}", *SHORT, "--model.channels=4"]
    return stage.parse(TrainVAE, [*words, *flags])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem[10:]}")
def test_every_config_trains_and_can_be_loaded(path, face_shards, digit_shards, tmp_path):
    """At the size of the tests: two steps, a validation, pictures, a saved model."""
    data = {"celeba64": face_shards, "mnist": digit_shards}[path.parent.name]
    words = [f"--config={path}", f"--data={data}", f"--out={tmp_path}", "--image_size=32",
             "--model.channels=4", "--model.context_channels=4", "--total_images=8",
             "--batch_size=4"]  # fmt: skip
    config = stage.parse(TrainVAE, words)
    if config.objective.num_samples > 2:
        config = dataclasses.replace(
            config, objective=dataclasses.replace(config.objective, num_samples=2)
        )
    if config.model.posterior == "bernoulli":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_dim=3))
    train_vae(config)
    last = metrics(tmp_path)[-1]
    assert last["images_seen"] == 8
    assert ("validation/mse" in last) == (config.model.context_layers == 0)
    with safe_open(tmp_path / "checkpoints/images-000000008/optimizer.safetensors", "np") as file:
        trained = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    model = load_model(tmp_path, "vae")
    # a parameter without a gradient would stop DDP at its second step
    assert trained == {name for name, _ in model.named_parameters()}
    if config.model.posterior != "delta":
        parts = last["validation/reconstruction"] + last["validation/kl"]
        assert last["validation/negative_elbo"] == pytest.approx(parts)
    assert {"samples.png", "reconstructions.png"} <= {file.name for file in tmp_path.iterdir()}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_resumed_run_equals_an_uninterrupted_one(face_shards, tmp_path):
    """With everything that has a clock or noise: warm-up, encoder steps, flow, dequantization."""
    flags = ["--encoder_steps=2", "--aggressive_images=48",
             "--model.dequantization=variational", "--save_every=32",
             "--objective.name=iwae", "--objective.num_samples=2"]  # fmt: skip
    for run in ("whole", "part"):
        train_vae(tiny(face_shards, tmp_path / run, *flags))
    for file in (tmp_path / "part/checkpoints/images-000000064").iterdir():
        file.unlink()
    assert train_vae(tiny(face_shards, tmp_path / "part", *flags)) == 64
    for name in ("final", "checkpoints/images-000000064"):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "part" / name)


def test_two_ranks_equal_one_where_there_is_no_noise(digit_shards, tmp_path):
    """An AE of binarized images: batches, their pixels and gradients do not depend on the ranks."""
    flags = [f"--config={ROOT}/configs/debug/train_vae.yaml", f"--data={digit_shards}", *SHORT,
             "--binarize", "true", "--model.posterior", "delta", "--model.channels=4",
             "--log_every=16"]  # fmt: skip
    for name, world in (("one", 1), ("two", 2)):
        run_ranks("train_vae", flags, tmp_path / name, world)
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        for tag in ("vae/reconstruction", "validation/mse", "validation/active_units"):
            assert one.get(tag, 0) == pytest.approx(two.get(tag, 0), rel=1e-4)
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status == {"state": "done", "exit_code": 0, "reason": "", "images_seen": 64}


def test_zero_trains_an_iwae_as_ddp_does(face_shards, tmp_path):
    """Two ranks, the doubly reparameterised gradient: it takes a gradient within the forward."""
    flags = [f"--config={ROOT}/configs/debug/train_vae.yaml", f"--data={face_shards}", *SHORT,
             "--objective.name=iwae", "--objective.num_samples=3", "--model.channels=4",
             "--objective.encoder_gradient=dreg", "--log_every=16"]  # fmt: skip
    run_ranks("train_vae", flags, tmp_path / "ddp", world=2)
    run_ranks("train_vae", flags, tmp_path / "zero", world=2, engine="zero2")
    for one, two in zip(metrics(tmp_path / "ddp"), metrics(tmp_path / "zero"), strict=True):
        for tag in ("vae/loss", "vae/negative_elbo", "gradient/norm", "validation/negative_elbo"):
            assert one.get(tag, 0) == pytest.approx(two.get(tag, 0), rel=1e-5)


def test_only_the_encoder_moves_in_its_own_steps(face_shards, tmp_path):
    flags = ["--encoder_steps=4", "--aggressive_images=1024", "--average_halflife=0"]
    train_vae(tiny(face_shards, tmp_path, *flags, "--total_images=16"))  # step 0 moves both
    both = load_model(tmp_path)
    train_vae(tiny(face_shards, tmp_path, *flags, "--total_images=64"))  # steps 1, 2 and 3 do not
    later = load_model(tmp_path)
    phi, theta = later.encoder_and_decoder_parameters()
    old_phi, old_theta = both.encoder_and_decoder_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theta, old_theta, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(phi, old_phi, strict=True))


def test_losses_that_are_not_finite_end_the_run_after_saving(face_shards, tmp_path, monkeypatch):
    forward = VAE.forward
    monkeypatch.setattr(
        VAE, "forward", lambda *a: {k: v * torch.nan for k, v in forward(*a).items()}
    )
    config = tiny(face_shards, tmp_path, "--total_images=1024")
    with pytest.raises(stage.UserError, match="not finite in 10 steps"):
        train_vae(config)
    assert (tmp_path / "checkpoints/images-000000160").is_dir()


def test_the_weight_of_the_kl_grows_linearly_to_beta(face_shards):
    config = tiny(face_shards, "o", "--kl_warmup_images=100")
    assert [warmup_at(config, seen) for seen in (0, 25, 100, 1000)] == [0, 0.25, 1, 1]
    assert warmup_at(tiny(face_shards, "o"), 0) == 1


def test_binarized_pixels_follow_their_grey_values_and_their_position_alone():
    images = torch.tensor([0.0, 0.3, 1.0]).expand(4000, 1, 1, 3)
    drawn = binarize(images, range(4000), seed=1)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    mean = drawn.mean((0, 1, 2))
    assert mean[0] == 0 and mean[2] == 1 and mean[1] == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(binarize(images[:5], range(10, 15), seed=1), drawn[10:15])
    assert not torch.equal(binarize(images, range(4000), seed=2), drawn)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--condition=class"], "no class to condition on"),
        (["--binarize=true"], "binarize is for grey"),
        (["--model.posterior=bernoulli", "--objective.name=prior-mc", "--condition=attributes"],
         "no condition"),
    ],
)  # fmt: skip
def test_what_the_data_cannot_give_is_refused_at_start(flags, named, face_shards, tmp_path):
    with pytest.raises(stage.UserError, match=named):
        train_vae(tiny(face_shards, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--objective.num_samples=0"], "num_samples must be at least 1"),
        (["--model.prior=learned"], "set condition"),
        (["--encoder_steps=3"], "aggressive_images"),
        (["--model.posterior=iaf", "--model.latent_dim=1"], "latent_dim must be at least 2"),
        (["--model.likelihood=categorical", "--model.dequantization=uniform"], "dequantization"),
        (["--objective.name=exact"], "bernoulli"),
        (["--objective.name=iwae", "--kl_warmup_images=9"], "kl_warmup_images"),
        (["--seed=-1"], "seed"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused_in_one_line(flags, named):
    with pytest.raises(stage.UserError, match=named) as error:
        tiny("d", "o", *flags)
    assert "\n" not in str(error.value)


def report(data, run, **changes) -> dict:
    words = [f"--data={data}", f"--checkpoint={run}", f"--out={run}/report",
             "--likelihood.num_samples=20", "--likelihood.num_images=3"]  # fmt: skip
    report_vae(dataclasses.replace(stage.parse(ReportVAE, words), **changes))
    return json.loads((run / "report/report.json").read_text())


def test_the_report_of_a_conditional_vae_in_the_plane(digit_shards, tmp_path):
    flags = ["--model.latent_dim=2", "--model.network=mlp", "--model.likelihood=bernoulli",
             "--binarize=true", "--condition=class", "--model.prior=learned"]  # fmt: skip
    train_vae(tiny(digit_shards, tmp_path, *flags))
    found = report(digit_shards, tmp_path)
    figures = found["figures"]
    assert found["protocol"]["likelihood_of"] == "binary"
    bits = figures["nll_importance"]["value"] / (1024 * 0.6931471805599453)
    assert figures["bits_per_dim"]["value"] == pytest.approx(bits)
    gap = figures["negative_elbo"]["value"] - figures["nll_importance"]["value"]
    assert figures["inference_gap"]["value"] == pytest.approx(gap, rel=1e-6)
    for bound, values in found["per_image"].items():
        assert len(values) == 3
        assert sum(values) / 3 == pytest.approx(figures[bound]["value"], rel=1e-5)
    elbo = figures["negative_elbo"]["value"] / (1024 * 0.6931471805599453)
    assert figures["elbo_bits_per_dim"]["value"] == pytest.approx(elbo)
    assert 1 <= figures["effective_sample_size"]["value"] <= 20
    kl = figures["information"]["value"] + figures["marginal_kl"]["value"]
    assert figures["kl"]["value"] == pytest.approx(kl)
    assert figures["information_ceiling"]["value"] == pytest.approx(2.302585, rel=1e-5)  # 10 images
    wanted = {"manifold", "scatter", "generation", "manipulation", "attributes", "traversal"}
    wanted |= {"interpolation", "samples", "samples-gaussian", "samples-mixture", "curves"}
    assert wanted <= found["pictures"].keys()
    for picture in found["pictures"].values():
        assert (tmp_path / "report" / picture).is_file()
    text = (tmp_path / "report/report.md").read_text()
    assert "inference_gap" in text and "per_image" not in text


def test_the_report_of_an_ae_speaks_of_no_likelihood(face_shards, tmp_path):
    train_vae(tiny(face_shards, tmp_path, "--model.posterior=delta", "--model.latent_dim=2"))
    found = report(face_shards, tmp_path)
    figures = found["figures"]
    assert {"mse", "probe_average_precision", "mig", "wasserstein_sliced"} <= figures.keys()
    assert not {"nll_importance", "kl", "information"} & figures.keys()
    assert found["per_image"] == {} and {"manifold", "scatter"} <= found["pictures"].keys()


def test_weights_that_are_all_alike_count_in_full_and_give_each_image_its_likelihood(face_shards):
    """q(z|x) = p(z), and a decoder that does not look at z: p(x) is the likelihood itself."""
    model = VAE(VAEConfig(network="mlp", channels=8, latent_dim=3, image_size=32))
    for part in (model.to_posterior, model.decoder):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    split = Split(model, open_images(face_shards, "valid", 32), False, torch.device("cpu"))
    settings = LikelihoodSettings(num_samples=7, num_images=3)
    figures, per_image = likelihood_figures(split, settings, seed=0)
    assert figures["effective_sample_size"]["value"] == pytest.approx(7)
    images, y = split.batch(slice(0, 3))
    mean = model.decode_mean(torch.zeros(3, 3), y).double()
    nats = -torch.distributions.Normal(mean, 0.5**0.5).log_prob(images.double()).sum((1, 2, 3))
    assert len(set(per_image["nll_importance"])) == 3
    for values in per_image.values():
        assert values == pytest.approx(nats.tolist(), rel=1e-5)


def test_mig_and_dci_are_of_factors_that_every_image_shows(face_shards, monkeypatch):
    monkeypatch.setattr(latents, "TREES", 2)
    model = VAE(VAEConfig(network="mlp", channels=8, latent_dim=3, image_size=32))
    sets = [open_images(face_shards, split, 32) for split in ("train", "valid")]

    def scores(*shuffled: str) -> dict:
        splits = []
        for images in sets:
            factors = images.factors.copy()
            for name in shuffled:
                column = images.index.factor_names.index(name)
                factors[:, column] = factors[::-1, column]
            metadata = {**images.metadata, "factors": factors}
            changed = dataclasses.replace(images, metadata=metadata)
            splits.append(Split(model, changed, False, torch.device("cpu")))
        figures = latent_figures(*splits, train_count=100, seed=0)
        return {name: found for name, found in figures.items() if name[:3] in ("mig", "dci")}

    assert len(scores()) == 4 and scores(*SOMETIMES_HIDDEN) == scores() != scores("skin_tone")


@pytest.mark.parametrize(
    ("flags", "kind", "bits"),
    [
        ([], "density", False),  # not dequantized: no bits/dim
        (["--model.dequantization=variational"], "dequantized", True),
        (["--model.likelihood=logistic_mixture"], "8bit", True),
        (["--model.likelihood=bernoulli"], None, False),  # of grey values: a cross-entropy
        (["--model.posterior=iaf"], "density", False),
        (["--model.top_dim=2"], "density", False),
        (["--model.posterior=bernoulli"], "density", False),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) and value else None,
)
def test_bits_per_dimension_only_where_they_have_a_meaning(
    flags, kind, bits, digit_shards, tmp_path
):
    config = tiny(digit_shards, tmp_path, *flags, "--total_images=16", "--model.latent_dim=3")
    train_vae(config)
    found = report(digit_shards, tmp_path)
    assert found["protocol"]["likelihood_of"] == kind
    assert ("bits_per_dim" in found["figures"]) == bits
    assert ("nll_importance" in found["figures"]) == (kind is not None)
    if config.model.posterior == "bernoulli":  # by all 8 vectors, and by 20 samples
        exact, estimate = (found["figures"][n]["value"] for n in ("nll_exact", "nll_importance"))
        assert exact == pytest.approx(estimate, abs=0.5)
    assert read_about(tmp_path)["model"]["posterior"] == config.model.posterior
