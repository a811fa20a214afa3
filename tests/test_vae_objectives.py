"""The parts of benchmarks/vae_objectives.py against closed forms, and that all of it runs.

The objectives themselves are tested in test_vae.py.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn
from torch.distributions import MultivariateNormal

sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import each other by bare names

import vae_objectives as script

from pipeline.models.vae.likelihoods import centred
from pipeline.models.vae.objectives import Objective
from pipeline.models.vae.vae import VAEConfig


def linear_gaussian(fault: float = 0.0) -> tuple[script.LinearGaussian, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.tensor([2.0, 0.5, 1.0]) * torch.linalg.qr(torch.randn(5, 5)).Q[:, :3]
    return script.LinearGaussian(weight, 0.7, fault), torch.randn(4, 5)


def test_linear_gaussian_has_one_weight_for_all_z_which_is_its_evidence():
    """p(x|z) p(z) / p(z|x) = p(x), for z of each point's own and z that all points share."""
    model, x = linear_gaussian()
    y = script.nothing(4)
    q, prior = model.posterior(x, y), model.prior(y)
    for z in (q.draw(6)[0], torch.randn(6, 1, 3)):
        log_w = model.log_likelihood(x, z, y) + prior.log_prob(z) - q.log_prob(z)
        torch.testing.assert_close(log_w, model.log_evidence(x).expand(6, 4), rtol=0, atol=1e-4)


def test_a_faulty_encoder_is_off_by_so_many_standard_deviations():
    y = script.nothing(4000)
    model, x = linear_gaussian(fault=0.5)
    x = x[:1].expand(4000, -1)
    exact = linear_gaussian()[0].posterior(x, y)
    shift = (model.posterior(x, y).mean - exact.mean) / (exact.log_variance / 2).exp()
    torch.testing.assert_close(shift.std(0), torch.full((3,), 0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(model.posterior(x, y).log_variance, exact.log_variance)


def test_best_multiple_of_importance_with_the_exact_posterior_maximises_the_likelihood():
    weight = linear_gaussian()[0].weight.detach()
    torch.manual_seed(1)
    x = 1.3 * torch.randn(300, 3) @ weight.T + torch.randn(300, 5)
    found = script.best_multiple(weight, x, Objective(name="importance"), 0.0, seed=0)
    multiples = np.linspace(0.02, 1.48, 147)
    evidence = [script.LinearGaussian(c * weight, 1.0).log_evidence(x).mean() for c in multiples]
    assert found == pytest.approx(multiples[int(torch.stack(evidence).argmax())], abs=0.03)


@pytest.mark.parametrize("k", [100, 10_000])
def test_predicted_multiple_has_the_expected_maximum_of_k_normals(k):
    def density(m: float) -> float:
        return m * k * math.exp(norm.logpdf(m) + (k - 1) * norm.logcdf(m))

    largest = quad(density, -2, 9, points=[2, 3, 4, 5])[0]
    expected = largest * math.sqrt((script.SIGNAL**2 + 1) / script.SIGNAL**2 / 64)
    assert script.predicted_multiple(k, 64) == pytest.approx(expected, rel=0.005)


def test_gradients_are_compared_by_error_norm_and_cosine():
    target = torch.tensor([[3.0, 4.0]])
    assert script.against(-2 * target, target) == pytest.approx((3, 2, -1))
    assert script.against(torch.tensor([[-4.0, 3.0]]), target) == pytest.approx((2**0.5, 1, 0))


@pytest.mark.parametrize("latents", [1, 2])
def test_evidence_of_a_linear_decoder_by_quadrature_and_by_importance(latents):
    torch.manual_seed(0)
    model = script.plane_model(latent_dim=latents, variance=0.5)
    linear = nn.Linear(latents, 2)
    model.decoder = nn.Sequential(linear, nn.Unflatten(1, (2, 1, 1)))
    x = torch.rand(3, 2, 1, 1)
    with torch.no_grad():
        root = linear.weight / 2  # of centred(W z + b)
        covariance = root @ root.T + model.likelihood.variance * torch.eye(2)
        expected = MultivariateNormal(centred(linear.bias), covariance).log_prob(x[..., 0, 0])
        found = script.by_quadrature(model, x, 401)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)
        estimate = script.by_importance(model, x, 20_000)
    error = (1 / estimate.effective_sample_size - 1 / 20_000).sqrt()
    assert ((estimate.log_likelihood - expected).abs() < 4.5 * error).all()
    assert error.max() < 0.05


def test_evidence_of_bits_by_enumeration_integrates_to_one():
    torch.manual_seed(0)
    model = script.plane_model(posterior="bernoulli", latent_dim=3, variance=0.02)
    line = torch.linspace(-1, 2, 151)
    x = torch.cartesian_prod(line, line)[..., None, None]
    with torch.no_grad():
        total = script.by_enumeration(model, x).exp().sum() * (line[1] - line[0]) ** 2
    assert float(total) == pytest.approx(1, abs=1e-3)


def test_score_functions_have_the_reparameterised_gradient_in_the_mean():
    torch.manual_seed(0)
    config = VAEConfig(network="mlp", channels=3, latent_dim=2, image_size=1, in_channels=2)
    model, twin = script.VAE(config), script.ScoreVAE(config)
    twin.load_state_dict(model.state_dict())
    x = torch.rand(2, 2, 1, 1)
    draws = {
        name: script.encoder_gradients(
            twin if "score" in name else model, lambda loss=loss: loss(model, twin, x, 5000), 30
        )
        for name, (_, loss) in script.ESTIMATORS.items()
        if name.startswith("ELBO")
    }
    exact = draws.pop("ELBO, reparameterised")
    assert len(draws) == 2
    for found in draws.values():
        variance = (found.var(0) + exact.var(0)) / 30
        assert ((found.mean(0) - exact.mean(0)).abs() <= 4.5 * variance.sqrt() + 1e-9).all()
        assert variance.sum() < 0.01 * exact.mean(0).square().sum()  # a wrong factor would show


def test_training_weighs_the_kl_by_beta_once():
    seen = []

    def loss(values: dict) -> torch.Tensor:
        seen.append({name: float(value.detach()) for name, value in values.items()})
        return values["loss"]

    batches = script.batches_of(torch.rand(9, 2, 1, 1), 4)
    history = script.fit(script.plane_model(), batches, Objective(beta=3.0), 2, 1e-2, loss)
    assert history == seen and seen[0] != seen[1]
    for values in seen:
        assert values["loss"] == pytest.approx(values["reconstruction"] + 3 * values["kl"])


def test_total_variance_is_the_trace_of_the_covariance():
    draws = torch.randn(50, 4, dtype=torch.float64)
    assert script.total_variance(draws) == pytest.approx(np.trace(np.cov(draws.numpy().T)))


def test_kl_of_the_linear_vae_from_the_eigenvalues_of_the_covariance():
    images = torch.randn(40, 3, 2, 2)
    expected = np.linalg.eigvalsh(np.cov(images.flatten(1).numpy().T))[::-1].copy()
    found = script.eigenvalues_of(images)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    kl = script.linear_kl(torch.tensor([8.0, 2.0, 0.5, 0.1]), variance=1.0, latents=3)
    assert kl == pytest.approx(0.5 * math.log(8) + 0.5 * math.log(2))  # and 0 of the third


def test_the_nearest_gaussian_of_a_gaussian_is_itself_and_of_two_peaks_one_of_them():
    z = np.linspace(-5, 5, 2001)
    mean, sd, kl = script.best_gaussian(z, norm.logpdf(z, 0.7, 0.2))
    assert (mean, sd) == pytest.approx((0.7, 0.2), abs=1e-3)
    assert kl == pytest.approx(0, abs=1e-6)
    two = np.log(0.7 * norm.pdf(z, 2, 0.2) + 0.3 * norm.pdf(z, -2, 0.3))
    mean, sd, kl = script.best_gaussian(z, two)
    assert (mean, sd) == pytest.approx((2, 0.2), abs=1e-3)
    assert kl == pytest.approx(-math.log(0.7), abs=1e-4)


def test_the_nearest_gaussian_of_a_skew_density_is_nearer_than_others_by_integration():
    z = np.linspace(-5, 5, 2001)
    log_p = norm.logpdf(z) + norm.logcdf(4 * z) + math.log(2)  # skew normal

    def kl_by_integration(mean: float, sd: float) -> float:
        def integrand(at: float) -> float:
            log_q, log_target = norm.logpdf(at, mean, sd), norm.logpdf(at) + norm.logcdf(4 * at)
            return math.exp(log_q) * (log_q - log_target - math.log(2))

        return quad(integrand, mean - 8 * sd, mean + 8 * sd)[0]

    mean, sd, kl = script.best_gaussian(z, log_p)
    assert kl == pytest.approx(kl_by_integration(mean, sd), abs=1e-4)
    others = [(mean + 0.05, sd), (mean - 0.05, sd), (mean, 1.1 * sd), (mean, 0.9 * sd)]
    assert min(kl_by_integration(*other) for other in others) > kl


def test_information_of_a_linear_gaussian_is_its_closed_form():
    torch.manual_seed(0)
    x = torch.randn(1000, 1)
    model = script.LinearGaussian(torch.tensor([[0.8]]), 1 - 0.8**2)
    found = script.measured_information(model.posterior(x, script.nothing(1000)))
    error = found.information.standard_error
    assert abs(found.information.value + 0.5 * math.log(1 - 0.8**2)) < 4.5 * error
    assert error < 0.05 and found.ceiling == pytest.approx(math.log(1000))


def test_every_experiment_runs_and_keeps_the_rows_of_the_others(tmp_path, capsys):
    path, experiments = tmp_path / "figures.json", set(script.EXPERIMENTS)
    kept, old = {"case": "another", "contender": "x"}, {"case": "mixture", "contender": "old"}
    path.write_text(json.dumps({"rows": [kept, old]}))
    script.main(["--json", str(path), "--pictures", str(tmp_path), "--quick"])
    rows = json.loads(path.read_text())["rows"]
    assert kept in rows and old not in rows
    assert {row["case"] for row in rows} == experiments | {"another"}
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    for name in experiments:
        assert min(Image.open(tmp_path / f"vae_{name}.png").size) > 300
    table = capsys.readouterr().out
    assert "| contender | k | stage | variance | mean_norm | snr | agreement |" in table
