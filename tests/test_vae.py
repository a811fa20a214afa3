"""The VAE's parts and objectives against closed forms, enumeration and numerical integration."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pipeline.models.vae.densities import (
    bernoulli_kl,
    diagonal_gaussian_kl,
    gaussian_kl,
    log_mean_exp,
    log_normal,
)
from pipeline.models.vae.mmd import SCALES, mmd
from pipeline.models.vae.objectives import Objective, all_bits, check_objective
from pipeline.models.vae.vae import VAE, VAEConfig

ONE = torch.ones((), dtype=torch.float64)


def small(seed: int = 0, **changes) -> VAE:
    """A model of points x in R^2, seen as images of one pixel with two channels, in float64."""
    torch.manual_seed(seed)
    values = {"network": "mlp", "channels": 8, "latent_dim": 1, "image_size": 1, "in_channels": 2,
              "variance": 0.1}  # fmt: skip
    model = VAE(VAEConfig(**values | changes)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # livelier than a fresh network
            scale = (0.3 if name.startswith("flow") else 1) / math.sqrt(10 + parameter.shape[-1])
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def points(count: int = 5, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 1, 1, dtype=torch.float64, generator=generator)


def nothing(count: int) -> torch.Tensor:
    """y without a condition."""
    return torch.zeros(count, 0, dtype=torch.float64)


def log_px_by_quadrature(model: VAE, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log p(x) (B,) by the trapezoidal rule over z in [-8, 8]^D, D the dimensions of z."""
    line = torch.linspace(-8, 8, 801 if model.config.vector_dim == 1 else 161, dtype=torch.float64)
    grids = torch.meshgrid(*[line] * model.config.vector_dim, indexing="ij")
    z = torch.stack([grid.flatten() for grid in grids], -1)[:, None]  # (S, 1, D)
    log_joint = model.log_likelihood(x, z, y) + model.prior(y[:1]).log_prob(z)
    return log_joint.logsumexp(0) + model.config.vector_dim * math.log(line[1] - line[0])


def gradients(model: VAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By parameter; zeros where the loss does not depend on it."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def is_phi(name: str) -> bool:
    return name.startswith(("encoder", "to_posterior"))


# Closed forms.


def random_covariance(size: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_kl_of_full_gaussians_agrees_with_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5):
        means = torch.randn(2, size, dtype=torch.float64, generator=generator)
        covariances = [random_covariance(size, generator) for _ in range(2)]
        expected = kl_divergence(
            MultivariateNormal(means[0], covariances[0]),
            MultivariateNormal(means[1], covariances[1]),
        )
        found = gaussian_kl(means[0], covariances[0], means[1], covariances[1])
        torch.testing.assert_close(found, expected)


def test_kl_of_full_gaussians_agrees_with_an_integral():
    covariance0 = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    covariance1 = torch.tensor([[1.0, -0.4], [-0.4, 0.8]], dtype=torch.float64)
    mean0, mean1 = torch.tensor([[0.3, -0.2], [-0.5, 0.4]], dtype=torch.float64)
    line = torch.linspace(-7, 7, 701, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_p0 = MultivariateNormal(mean0, covariance0).log_prob(z)
    log_p1 = MultivariateNormal(mean1, covariance1).log_prob(z)
    integral = (log_p0.exp() * (log_p0 - log_p1)).sum() * (line[1] - line[0]) ** 2
    torch.testing.assert_close(gaussian_kl(mean0, covariance0, mean1, covariance1), integral)


def test_the_diagonal_kl_is_the_full_one_with_diagonal_covariances():
    generator = torch.Generator().manual_seed(3)
    mean0, log0, mean1, log1 = torch.randn(4, 6, 3, dtype=torch.float64, generator=generator)
    full = gaussian_kl(mean0, torch.diag_embed(log0.exp()), mean1, torch.diag_embed(log1.exp()))
    torch.testing.assert_close(diagonal_gaussian_kl(mean0, log0, mean1, log1).sum(-1), full)
    standard = kl_divergence(Normal(mean0, (log0 / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(diagonal_gaussian_kl(mean0, log0), standard.double())


def test_bernoulli_kl_agrees_with_torch_distributions_and_is_finite_far_out():
    logits = torch.tensor([[-3.0, 0.1, 2.0], [0.5, -0.2, 2.0]], dtype=torch.float64)
    expected = kl_divergence(TorchBernoulli(logits=logits[0]), TorchBernoulli(logits=logits[1]))
    torch.testing.assert_close(bernoulli_kl(logits[0], logits[1]), expected)
    assert bernoulli_kl(torch.tensor(80.0), torch.tensor(-80.0)) == 80


def test_log_mean_exp_survives_what_exp_does_not():
    values = torch.tensor([[-2000.0, 3000.0], [-2000.0, 3000.0]])
    torch.testing.assert_close(log_mean_exp(values, 0), torch.tensor([-2000.0, 3000.0]))
    torch.testing.assert_close(
        log_mean_exp(torch.tensor([0.0, math.log(3)]), 0), torch.tensor(math.log(2.0))
    )


def test_mmd_is_the_double_sum_over_pairs():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (4, 5))

    def k(a, b):
        return sum(6 * s / (6 * s + float((a - b).square().sum())) for s in SCALES)

    def within(a):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
        return sum(k(a[i], a[j]) for i, j in pairs) / len(pairs)

    across = sum(k(a, b) for a in x for b in y) / 20
    assert mmd(x, y).item() == pytest.approx(within(x) + within(y) - 2 * across)


# The ELBO.


def test_negative_elbo_is_squared_error_plus_constant_plus_kl_by_hand():
    model, x = small(latent_dim=3, variance=0.5), points()
    torch.manual_seed(5)
    found = model(x, nothing(5), Objective(num_samples=4), ONE)
    torch.manual_seed(5)
    noise = torch.randn(4, 5, 3, dtype=torch.float64)
    mean, log_variance = model.to_posterior(model.encoder(x, nothing(5))).chunk(2, -1)
    z = mean + (log_variance / 2).exp() * noise
    means = torch.stack([model.decode_mean(one, nothing(5)) for one in z])
    squares = (means - x).square().sum((2, 3, 4)).mean(0)  # over m samples, (B,)
    reconstruction = (squares + math.log(math.pi)).mean()  # d = 2: (d/2) ln pi
    kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    torch.testing.assert_close(found["reconstruction"], reconstruction)
    torch.testing.assert_close(found["kl"], kl)
    torch.testing.assert_close(found["loss"], reconstruction + kl)
    torch.testing.assert_close(found["negative_elbo"], reconstruction + kl)


def test_elbo_at_variance_s_with_beta_is_beta_times_elbo_at_variance_beta_s():
    """L_beta(s²) = beta L_1(beta s²) + const, in values and gradients."""
    beta, variance, x = 0.3, 0.4, points()
    one = small(latent_dim=3, variance=variance)
    other = small(latent_dim=3, variance=beta * variance)
    other.load_state_dict(one.state_dict())
    losses = []
    for model, weight in ((one, beta), (other, 1.0)):
        torch.manual_seed(7)
        losses.append(model(x, nothing(5), Objective(num_samples=2), weight * ONE)["loss"])
    half = 2 / 2  # d / 2
    constant = half * math.log(2 * math.pi * variance)
    constant -= beta * half * math.log(2 * math.pi * beta * variance)
    torch.testing.assert_close(losses[0], beta * losses[1] + constant)
    first, second = gradients(one, losses[0]), gradients(other, losses[1])
    for name in first:
        torch.testing.assert_close(first[name], beta * second[name])


def test_means_in_place_of_sums_are_a_beta_of_pixels_over_latents_and_shrink_the_kl():
    """What many codes do: a mean over pixels, and one over latent dimensions."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(64, 2, generator=generator, dtype=torch.float64)
    x = factors @ torch.rand(2, 32, generator=generator, dtype=torch.float64) / 2
    x, y, kls = x.reshape(64, 2, 4, 4), nothing(64), {}
    for reduction in ("sum", "mean"):
        model = small(latent_dim=2, image_size=4, variance=0.05)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(0)
        for _ in range(100):
            if reduction == "sum":
                values = model(x, y, Objective(), ONE)
                loss, kl = values["loss"], values["kl"]
            else:
                q = model.posterior(x, y)
                z, _ = q.draw(1)
                nats = 0.5 * (model.decode_mean(z[0], y) - x).square() / 0.05
                loss, kl = nats.mean() + q.kl(model.prior(y)).mean(), q.kl(model.prior(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kls[reduction] = kl.detach().sum() / (64 if reduction == "mean" else 1)
    assert kls["mean"] < 0.5 * kls["sum"]
    # and the two losses are one: d = 32, D = 2
    torch.manual_seed(3)
    values = model(x, y, Objective(beta=32 / 2), ONE)
    torch.manual_seed(3)
    q = model.posterior(x, y)
    nats = 0.5 * (model.decode_mean(q.draw(1)[0][0], y) - x).square() / 0.05
    means = nats.mean() + q.kl(model.prior(y)).mean()
    constant = 16 * math.log(2 * math.pi * 0.05)
    torch.testing.assert_close(values["loss"] - constant, 32 * means)


def test_free_bits_charge_each_dimension_at_least_its_floor():
    model, x = small(latent_dim=3), points()
    torch.manual_seed(2)
    plain = model(x, nothing(5), Objective(), ONE)
    per_dimension = model.posterior(x, nothing(5)).kl(model.prior(nothing(5))).mean(0)
    floor = per_dimension.sort().values[1].item() + 1e-6  # two dimensions lie below it
    torch.manual_seed(2)
    charged = model(x, nothing(5), Objective(free_bits=floor), ONE)
    expected = plain["reconstruction"] + per_dimension.clamp(min=floor).sum()
    torch.testing.assert_close(charged["loss"], expected)
    torch.testing.assert_close(charged["negative_elbo"], plain["negative_elbo"])


# Bounds and estimates against the likelihood itself.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_dim": 1},
        {"posterior": "iaf", "latent_dim": 2, "variance": 0.5},
        {"likelihood": "laplace"},
    ],
    ids=["gaussian", "two layers", "flow", "laplace"],
)
def test_importance_weights_average_to_the_likelihood(changes):
    """E w = p(x): by far more samples than needed, against an integral."""
    model, x, y = small(**changes), points(), nothing(5)
    with torch.no_grad():
        model.to_posterior.bias[model.config.latent_dim :] += 1  # wide enough for the weights
        exact = log_px_by_quadrature(model, x, y)
        torch.manual_seed(0)
        z, log_q = model.posterior(x, y).draw(10_000)
        log_w = model.log_likelihood(x, z, y) + model.prior(y).log_prob(z) - log_q
    ratio = (log_w - exact).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert error.max() < 0.05
    assert ((ratio.mean(0) - 1).abs() < 4.5 * error).all()
    # and the posterior's own density agrees with the one it gave when it drew
    torch.testing.assert_close(model.posterior(x, y).log_prob(z[:50]), log_q[:50])


def test_bounds_rise_with_k_and_stay_below_the_likelihood():
    model, x, y = small(), points(), nothing(5)
    with torch.no_grad():
        log_px = log_px_by_quadrature(model, x, y).mean()
        torch.manual_seed(0)
        bounds = []
        for k in (1, 2, 5, 50):
            draws = torch.stack(
                [-model(x, y, Objective(name="iwae", num_samples=k), ONE)["loss"]
                 for _ in range(300)]
            )  # fmt: skip
            bounds.append((draws.mean(), draws.std() / math.sqrt(len(draws))))
    for (low, low_error), (high, high_error) in itertools.pairwise(bounds):
        assert high > low - 3 * (low_error + high_error)
    assert bounds[-1][0] > bounds[0][0] + 5 * bounds[0][1]  # and not by chance
    assert bounds[-1][0] < log_px + 3 * bounds[-1][1]


def test_iwae_with_one_sample_is_the_elbo_with_sampled_kl_under_the_same_noise():
    model, x, y = small(latent_dim=3), points(), nothing(5)
    found = []
    for objective in (Objective(name="iwae"), Objective(kl="sampled")):
        torch.manual_seed(3)
        loss = model(x, y, objective, ONE)["loss"]
        found.append((loss, gradients(model, loss)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("encoder_gradient", ["dreg", "elbo"])
def test_other_gradients_of_the_encoder_have_the_right_mean(encoder_gradient):
    """Doubly reparameterised: that of L_k. KL(q || p(z|x)): that of the ELBO. Theta's is L_k's,
    for every noise."""
    model, x, y, k = small(latent_dim=2), points(3), nothing(3), 3
    target = {"dreg": Objective(name="iwae", num_samples=k),
              "elbo": Objective(num_samples=k)}[encoder_gradient]  # fmt: skip
    mine = Objective(name="iwae", num_samples=k, encoder_gradient=encoder_gradient)
    differences = []
    for seed in range(250):
        found = []
        for objective in (mine, target, Objective(name="iwae", num_samples=k)):
            torch.manual_seed(seed)
            found.append(gradients(model, model(x, y, objective, ONE)["loss"]))
        for name in found[0]:
            if not is_phi(name):
                torch.testing.assert_close(found[0][name], found[2][name])
        flat = [torch.cat([g[n].flatten() for n in g if is_phi(n)]) for g in found]
        differences.append(flat[0] - flat[1])
    differences = torch.stack(differences)
    error = differences.std(0) / math.sqrt(len(differences))
    assert ((differences.mean(0)).abs() <= 4.5 * error + 1e-12).all()
    assert error.max() < 0.3  # the test would see a wrong factor


def test_the_value_of_the_loss_is_the_bound_whatever_the_encoder_follows():
    model, x, y = small(latent_dim=2), points(), nothing(5)
    values = []
    for encoder_gradient in ("bound", "dreg", "elbo"):
        torch.manual_seed(1)
        objective = Objective(name="iwae", num_samples=4, encoder_gradient=encoder_gradient)
        found = model(x, y, objective, ONE)
        torch.testing.assert_close(found["loss"], found["negative_bound"])
        values.append(found["loss"].detach())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


# Bits, where everything can be counted.


def bits(seed: int = 0, **changes) -> VAE:
    return small(seed, posterior="bernoulli", likelihood="bernoulli", latent_dim=4, **changes)


def binary_points() -> torch.Tensor:
    return (points(6) > 0.5).double()


def test_exact_likelihood_of_bits_sums_over_all_of_them_and_over_all_images_to_one():
    model = bits()
    images = all_bits(2).double()[:, :, None, None]  # every binary image of two channels
    y = nothing(4)
    by_hand = []
    for x in images:
        total = 0.0
        for z in all_bits(4).double():
            log_pz = TorchBernoulli(logits=model.prior_logits).log_prob(z).sum()
            logits = model.decode(z[None, None], y[:1])[0, 0]
            log_px = TorchBernoulli(logits=logits).log_prob(x).sum()
            total += (log_pz + log_px).exp().item()
        by_hand.append(math.log(total))
    nll = [model(x[None], y[:1], Objective(name="exact"), ONE)["nll"].item() for x in images]
    assert nll == pytest.approx([-value for value in by_hand])
    assert sum(math.exp(-value) for value in nll) == pytest.approx(1)


def test_estimates_of_bits_agree_with_enumeration():
    model, x, y = bits(), binary_points(), nothing(6)
    with torch.no_grad():
        z = all_bits(4).double()[:, None]
        log_joint = model.log_likelihood(x, z, y) + model.prior(y[:1]).log_prob(z)
        exact = log_joint.logsumexp(0)
        torch.manual_seed(0)
        z, log_q = model.posterior(x, y).draw(20_000)
        log_w = model.log_likelihood(x, z, y) + model.prior(y).log_prob(z) - log_q
        prior_z = model.prior(y[:1]).draw(20_000)[0]
        from_prior = model.log_likelihood(x, prior_z, y)
    for log_weights in (log_w, from_prior):
        ratio = (log_weights - exact).exp()
        error = ratio.std(0) / math.sqrt(len(ratio))
        assert ((ratio.mean(0) - 1).abs() < 4.5 * error).all()
        assert error.max() < 0.02
    elbo = log_w.mean(0)
    assert (elbo < exact).all()


@pytest.mark.parametrize("name", ["exact", "importance", "prior-mc", "wake-sleep"])
def test_objectives_without_reparameterisation_have_the_right_gradient_in_the_mean(name):
    """Theta of exact, importance (many samples) and prior-mc follows log p(x); that of wake-sleep
    follows the ELBO. The encoder follows the cross-entropy from the true posterior, or to dreams.
    """
    model, x, y = bits(), binary_points(), nothing(6)
    z = all_bits(4).double()[:, None]

    log_joint = model.log_likelihood(x, z, y) + model.prior(y[:1]).log_prob(z)
    log_q = model.posterior(x, y).log_prob(z)
    if name == "wake-sleep":
        theta = -(log_q.exp().detach() * log_joint).sum(0).mean()
        images = all_bits(2).double()[:, :, None, None]
        joint = model.log_likelihood(images, z, nothing(4)) + model.prior(y[:1]).log_prob(z)
        phi = -(joint.detach().exp() * model.posterior(images, nothing(4)).log_prob(z)).sum()
    else:
        theta = -log_joint.logsumexp(0).mean()
        phi = -(log_joint.detach().softmax(0) * log_q).sum(0).mean()
        if name == "prior-mc":
            images = all_bits(2).double()[:, :, None, None]
            joint = model.log_likelihood(images, z, nothing(4)) + model.prior(y[:1]).log_prob(z)
            phi = -(joint.detach().exp() * model.posterior(images, nothing(4)).log_prob(z)).sum()
    expected = gradients(model, theta + phi)

    samples = {"exact": 1, "importance": 500, "prior-mc": 500, "wake-sleep": 50}[name]
    repeats = 1 if name == "exact" else 200
    torch.manual_seed(0)
    found = []
    for _ in range(repeats):
        values = model(x, y, Objective(name=name, num_samples=samples), ONE)
        found.append(gradients(model, values["loss"]))
    for parameter, value in expected.items():
        draws = torch.stack([one[parameter] for one in found])
        if name == "exact":
            torch.testing.assert_close(draws[0], value)
            continue
        error = draws.std(0) / math.sqrt(repeats)
        bias = 0.01 if name in ("importance", "prior-mc") else 0.0  # the log of a mean: 1/k
        assert ((draws.mean(0) - value).abs() <= 4.7 * error + bias).all(), parameter


def test_score_function_gradient_of_the_elbo_has_the_right_mean():
    model, x, y = bits(), binary_points(), nothing(6)
    z = all_bits(4).double()[:, None]
    q, prior = model.posterior(x, y), model.prior(y)
    reconstruction = -(q.log_prob(z).exp() * model.log_likelihood(x, z, y)).sum(0).mean()
    expected = gradients(model, reconstruction + q.kl(prior).sum(-1).mean())
    for samples, kl in ((1, "closed"), (4, "closed"), (4, "sampled")):
        torch.manual_seed(samples)
        objective = Objective(num_samples=samples, kl=kl)
        found = [gradients(model, model(x, y, objective, ONE)["loss"]) for _ in range(300)]
        for name, value in expected.items():
            draws = torch.stack([one[name] for one in found])
            error = draws.std(0) / math.sqrt(len(draws))
            assert ((draws.mean(0) - value).abs() <= 4.7 * error + 1e-9).all(), name


# The model.


def test_a_hidden_label_and_a_hidden_attribute_are_zeros():
    model = small(num_classes=3, num_attributes=2)
    attributes = torch.tensor([[1, -1], [0, 1]], dtype=torch.int8)
    y = model.condition(2, torch.tensor([2, -1]), attributes)
    expected = [[0, 0, 1, 1, -1], [0, 0, 0, 0, 1]]
    assert y.tolist() == expected
    assert model.condition(2).tolist() == [[0.0] * 5] * 2


def test_a_learned_prior_depends_on_the_condition_and_enters_the_kl():
    model = small(num_classes=2, prior="learned", latent_dim=3)
    x, y = points(2), model.condition(2, torch.tensor([0, 1]))
    prior = model.prior(y)
    assert not torch.allclose(prior.mean[0], prior.mean[1])
    q = model.posterior(x, y)
    expected = kl_divergence(
        Normal(q.mean, (q.log_variance / 2).exp()),
        Normal(prior.mean, (prior.log_variance / 2).exp()),
    )
    found = model(x, y, Objective(), ONE)["kl"]
    torch.testing.assert_close(found, expected.sum(1).mean())


@pytest.mark.parametrize("network", ["conv", "mlp"])
@pytest.mark.parametrize("size", [8, 16])
def test_images_of_any_allowed_size_go_through(network, size):
    config = VAEConfig(network=network, image_size=size, channels=4, latent_dim=3, in_channels=1)
    model = VAE(config)
    images, y = torch.rand(3, 1, size, size), torch.zeros(3, 0)
    assert model.reconstruct(images, y).shape == images.shape
    z = torch.randn(2, 3, 3)
    assert model.decode(z, y).shape[:2] == (2, 3)
    assert model.log_likelihood(images, z, y).shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 12}, "image_size"),
        ({"image_size": 4}, "image_size"),
        ({"variance": 0.0}, "variance"),
        ({"posterior": "iaf", "latent_dim": 1}, "latent_dim"),
        ({"posterior": "delta", "top_dim": 2}, "top_dim"),
        ({"prior": "learned", "top_dim": 2}, "prior learned"),
        ({"likelihood": "categorical", "dequantization": "uniform"}, "dequantization"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"context_dropout": 1.0}, "context_dropout"),
        ({"context_dropout": 0.1}, "context_layers"),
        ({"context_layers": 1, "context_kernel": 4}, "context_kernel"),
        ({"prior": "learned", "posterior": "delta"}, "prior learned"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        VAEConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"beta": -1.0}, "beta"),
        ({"name": "iwae", "beta": 2.0}, "beta"),
        ({"name": "iwae", "kl": "sampled"}, "objective.kl"),
        ({"encoder_gradient": "dreg"}, "encoder_gradient"),
    ],
)
def test_an_objective_that_means_nothing_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        Objective(**changes)


@pytest.mark.parametrize(
    ("model", "objective", "named"),
    [
        ({}, {"name": "exact"}, "bernoulli"),
        ({"posterior": "bernoulli", "latent_dim": 13}, {"name": "exact"}, "12 bits"),
        ({"posterior": "bernoulli"}, {"name": "iwae"}, "importance"),
        ({"posterior": "delta"}, {"name": "iwae"}, "delta"),
        ({"posterior": "iaf"}, {"name": "iwae", "encoder_gradient": "dreg"}, "gaussian"),
        ({"num_classes": 3}, {"name": "prior-mc"}, "condition"),
        ({"posterior": "delta"}, {"num_samples": 2}, "no samples"),
        ({"posterior": "bernoulli"}, {"mmd_weight": 1.0}, "mmd_weight"),
        (
            {"posterior": "bernoulli", "latent_dim": 4},
            {"name": "exact", "num_samples": 2},
            "num_samples",
        ),
    ],
)
def test_objectives_that_do_not_fit_the_model_are_refused(model, objective, named):
    with pytest.raises(ValueError, match=named):
        check_objective(VAEConfig(**model), Objective(**objective))


def test_an_ae_is_its_reconstruction_and_with_mmd_a_wae():
    model, x, y = small(posterior="delta", latent_dim=3), points(), nothing(5)
    z = model.posterior(x, y).mean
    expected = -Normal(model.decode_mean(z, y), math.sqrt(0.1)).log_prob(x).sum((1, 2, 3)).mean()
    found = model(x, y, Objective(), ONE)
    torch.testing.assert_close(found["loss"], expected)
    assert set(found) == {"loss", "reconstruction"}
    torch.manual_seed(4)
    found = model(x, y, Objective(mmd_weight=2.0), ONE)
    torch.manual_seed(4)
    prior = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(found["loss"], expected + 2 * mmd(z, prior))


def test_configs_of_models_are_plain_values():
    values = dataclasses.asdict(VAEConfig(likelihood="laplace"))
    assert VAEConfig(**values) == VAEConfig(likelihood="laplace")


def test_log_normal_is_scipys():
    from scipy.stats import norm

    z = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    expected = norm.logpdf([0.3, -1.0], [0.1, 0.2], [math.exp(0.25), math.exp(-0.5)]).sum()
    log_variance = torch.tensor([0.5, -1.0], dtype=torch.float64)
    mean = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert log_normal(z, mean, log_variance).item() == pytest.approx(expected)
