"""Information of a latent: correlated Gaussians, a ring, numerical integration, and the bounds."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import MultivariateNormal, Normal

from pipeline.evaluation import information
from pipeline.evaluation.information import (
    active_units,
    aggregate_information,
    barber_agakov,
    diagonal_gaussian_log_q,
    standard_normal_entropy,
    unit_variances,
)

F64 = torch.float64


def log_standard_normal(z):
    return Normal(0, 1).log_prob(z).sum(-1)


def gaussian_channel(rho: float, num_images: int):
    """x ~ N(0, 1), z|x ~ N(rho x, 1 - rho²), so that q(z) is N(0, 1): I_q from one sample each."""
    x = torch.randn(num_images, 1, dtype=F64)
    variance = torch.full_like(x, 1 - rho**2)
    z = rho * x + variance.sqrt() * torch.randn_like(x)
    log_q = diagonal_gaussian_log_q(rho * x, variance.log())
    return aggregate_information(z, torch.arange(num_images), log_q, log_standard_normal)


def within(estimate, low: float, high: float) -> bool:
    margin = 4 * estimate.standard_error + 1e-12
    return low - margin <= estimate.value <= high + margin


def close(estimate, truth: float) -> bool:
    return within(estimate, truth, truth)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_information_of_correlated_gaussians(rho):
    found = gaussian_channel(rho, 2000)
    truth = -0.5 * math.log(1 - rho**2)
    bias = math.log1p(rho**2 / (1 - rho**2) / 2000)  # at most; chi² is rho²/(1 - rho²)
    assert within(found.information, truth - bias, truth)
    assert close(found.kl, truth)
    assert within(found.marginal_kl, 0, bias)
    # the variance of log q(z|x)/q(z) is rho²
    assert found.information.standard_error == pytest.approx(rho / 2000**0.5, rel=0.1, abs=1e-12)
    assert found.ceiling == pytest.approx(7.600902, abs=1e-6)


def test_the_bias_of_few_images_is_as_stated():
    """q(z) is the prior here, so the whole of `marginal_kl` is bias, and it has little noise."""
    excess = torch.tensor([gaussian_channel(0.6, 20).marginal_kl.value for _ in range(1000)])
    assert close(information.mean_with_error(excess), 0.36 / 0.64 / (2 * 20))
    assert excess.mean() > 0.01  # downwards for I_q; without the own posterior it is upwards


def ring_density(x, z, noise):
    """Points at a uniform angle on the unit circle plus N(0, noise² I): their density at (x, z)."""
    radius = np.hypot(x, z)
    scale = np.exp(-((radius - 1) ** 2) / (2 * noise**2)) / (2 * np.pi * noise**2)
    return scale * scipy.special.i0e(radius / noise**2)


def test_a_ring_has_no_covariance_but_information():
    noise, num_images = 0.1, 2000
    grid = np.linspace(-2.5, 2.5, 801)
    area = (grid[1] - grid[0]) ** 2
    joint = ring_density(grid[:, None], grid, noise)
    marginal = joint.sum(0) * area**0.5
    assert joint.sum() * area == pytest.approx(1, abs=1e-9)
    assert (joint * np.outer(grid, grid)).sum() * area == pytest.approx(0, abs=1e-12)  # covariance
    ratio = joint / np.outer(marginal, marginal)
    truth = (joint * np.log(ratio)).sum() * area
    bias = math.log1p(((joint * ratio).sum() * area - 1) / num_images)  # at most
    to_prior = np.log(marginal) - scipy.stats.norm.logpdf(grid)
    marginal_truth = (marginal * to_prior).sum() * area**0.5
    assert truth > 0.4

    angle = 2 * np.pi * np.random.rand(num_images)
    x = np.cos(angle) + noise * np.random.randn(num_images)
    z = np.sin(angle) + noise * np.random.randn(num_images)
    log_p_x = np.log(ring_density(x[:, None], grid, noise).sum(1) * area**0.5)

    def log_q(z):
        return torch.from_numpy(np.log(ring_density(x, z.numpy(), noise)) - log_p_x)

    found = aggregate_information(
        torch.from_numpy(z)[:, None], torch.arange(num_images), log_q, log_standard_normal
    )
    products = x * z
    assert abs(products.mean()) < 4 * products.std() / num_images**0.5
    assert found.information.standard_error < 0.02
    assert within(found.information, truth - bias, truth)
    assert within(found.marginal_kl, marginal_truth, marginal_truth + bias)
    assert close(found.kl, truth + marginal_truth)


def test_few_posteriors_agree_with_integration():
    """I_q of exactly these images, with their own posteriors in q(z), and a prior unlike q(z)."""
    mean, scale = torch.tensor([-1.0, 0.2, 0.5, 3.0]), torch.tensor([0.5, 1.0, 0.1, 0.7])
    posteriors = [scipy.stats.norm(m, s) for m, s in zip(mean, scale, strict=True)]
    grid = np.linspace(-12, 12, 100_001)
    step = grid[1] - grid[0]
    densities = np.stack([posterior.pdf(grid) for posterior in posteriors])
    mixed = densities.mean(0)
    own_log = scipy.special.xlogy(densities, densities).sum(1).mean() * step
    mixed_log = scipy.special.xlogy(mixed, mixed).sum() * step
    prior_log = (mixed * scipy.stats.norm.logpdf(grid)).sum() * step

    quantiles = torch.special.ndtri((torch.arange(4000, dtype=F64) + 0.5) / 4000)
    z = (mean + scale * quantiles[:, None]).view(-1, 1)  # 4,000 evenly spaced draws of each
    log_q = diagonal_gaussian_log_q(mean[:, None], 2 * scale[:, None].log())
    found = aggregate_information(z, torch.arange(4).repeat(4000), log_q, log_standard_normal)
    assert found.kl.value == pytest.approx(own_log - prior_log, abs=1e-3)
    assert found.information.value == pytest.approx(own_log - mixed_log, abs=1e-3)
    assert found.marginal_kl.value == pytest.approx(mixed_log - prior_log, abs=1e-3)


def test_posteriors_that_do_not_overlap_reach_the_ceiling_and_equal_ones_carry_nothing():
    mean = 1000 * torch.arange(37.0)[:, None] * torch.ones(3)
    log_variance = torch.zeros(37, 3)
    z = mean + torch.randn(37, 3)
    found = aggregate_information(
        z, torch.arange(37), diagonal_gaussian_log_q(mean, log_variance), log_standard_normal
    )
    assert found.ceiling == math.log(37)
    assert found.information.value == pytest.approx(math.log(37), abs=1e-11)
    assert found.information.standard_error < 1e-11

    same = diagonal_gaussian_log_q(torch.zeros(37, 3), log_variance)
    found = aggregate_information(torch.randn(37, 3), torch.arange(37), same, log_standard_normal)
    assert found.information.value == pytest.approx(0, abs=1e-12)
    assert found.marginal_kl.value == pytest.approx(found.kl.value, abs=1e-12)


def test_the_order_and_the_chunks_of_samples_change_nothing():
    mean, log_variance = torch.randn(11, 2, dtype=F64), torch.randn(11, 2, dtype=F64)
    images = torch.arange(11).repeat(3)
    z = mean[images] + (log_variance[images] / 2).exp() * torch.randn(33, 2, dtype=F64)
    log_q = diagonal_gaussian_log_q(mean, log_variance)
    whole = aggregate_information(z, images, log_q, log_standard_normal)
    order = torch.randperm(33)
    parts = aggregate_information(z[order], images[order], log_q, log_standard_normal, chunk=7)
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def test_each_sampled_image_counts_the_same():
    """Three samples of image 4, one of image 1, none of the others, by hand."""
    table = torch.tensor([[0.0, 0, 0, 0, 2], [0, 0, 0, 0, 3], [0, 0, 0, 0, 7], [0, 6, 0, 0, 0]])
    found = aggregate_information(
        torch.zeros(4, 1), torch.tensor([4, 4, 4, 1]), lambda z: table, lambda z: z[:, 0]
    )
    assert found.kl.value == pytest.approx((4 + 6) / 2)  # not 18 / 4
    assert found.kl.standard_error == pytest.approx(1)  # |6 - 4| / 2
    assert found.ceiling == math.log(5)


def test_wrong_shapes_are_refused():
    z, images = torch.zeros(4, 1), torch.arange(4)
    with pytest.raises(ValueError, match=r"must be \(4, N\), got \(6, 4\)"):
        aggregate_information(z, images, lambda z: torch.zeros(6, 4), log_standard_normal)
    with pytest.raises(ValueError, match="n >= 2"):
        same = torch.zeros(4, dtype=torch.int64)
        aggregate_information(z, same, lambda z: torch.zeros(4, 6), log_standard_normal)


@pytest.mark.parametrize("num_samples, num_images, num_dims", [(1, 1, 1), (7, 5, 3), (3, 8, 17)])
def test_the_matrix_form_is_the_gaussian_density(num_samples, num_images, num_dims):
    z = torch.randn(num_samples, num_dims, dtype=F64)
    mean, log_variance = torch.randn(2, num_images, num_dims, dtype=F64)
    expected = Normal(mean, (log_variance / 2).exp()).log_prob(z[:, None]).sum(-1)
    found = diagonal_gaussian_log_q(mean, log_variance)(z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_the_matrix_form_holds_for_narrow_posteriors_far_from_the_origin():
    mean = 1e6 + torch.randn(5, 50, dtype=F64)
    deviation = torch.full_like(mean, 1e-5)
    z = mean + deviation * torch.randn(5, 50, dtype=F64)
    expected = Normal(mean, deviation).log_prob(z).sum(-1)
    found = diagonal_gaussian_log_q(mean, 2 * deviation.log())(z)
    assert (found.diagonal() - expected).abs().max() < 0.001
    off_diagonal = found.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    assert off_diagonal.max() < -1e9


def linear_gaussian_pairs(count: int):
    """z ~ N(0, I), x = A z + noise, its exact posterior q(z|x), and I(x; z) in closed form."""
    A, noise = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]], dtype=F64), 0.8
    z = torch.randn(count, 2, dtype=F64)
    x = z @ A.T + noise * torch.randn(count, 3, dtype=F64)
    precision = torch.eye(2, dtype=F64) + A.T @ A / noise**2
    mean = x @ A @ torch.linalg.inv(precision) / noise**2
    return z, mean, precision, 0.5 * torch.logdet(precision).item()


def test_barber_agakov_is_the_information_for_the_exact_posterior():
    z, mean, precision, truth = linear_gaussian_pairs(20_000)
    log_q = MultivariateNormal(mean, precision_matrix=precision).log_prob(z)
    for entropy in (standard_normal_entropy(2), -log_standard_normal(z)):
        found = barber_agakov(log_q, entropy)
        assert found.standard_error < 0.01
        assert close(found, truth)


def test_barber_agakov_falls_short_by_the_divergence_of_a_wrong_posterior():
    z, mean, precision, truth = linear_gaussian_pairs(20_000)
    exact = MultivariateNormal(mean, precision_matrix=precision)
    wrong = MultivariateNormal(mean + 0.2, precision_matrix=precision / 2)
    divergence = torch.distributions.kl_divergence(exact, wrong).mean().item()
    found = barber_agakov(wrong.log_prob(z), standard_normal_entropy(2))
    assert close(found, truth - divergence)
    assert found.value < truth - 10 * found.standard_error


@pytest.mark.parametrize("num_dims", [1, 5])
def test_the_entropy_of_the_prior(num_dims):
    expected = scipy.stats.multivariate_normal(cov=np.eye(num_dims)).entropy()
    assert standard_normal_entropy(num_dims) == pytest.approx(expected, abs=1e-12)


def test_units_are_active_by_the_variance_of_their_mean():
    signs = torch.tensor([1.0, -1.0] * 50)[:, None]
    means = signs * torch.tensor([0.0, 0.09, 0.11, 1.0, 0.05]) + torch.tensor([0, 0, 0, 0, 4.0])
    expected = torch.tensor([0, 0.0081, 0.0121, 1, 0.0025], dtype=F64) * 100 / 99
    torch.testing.assert_close(unit_variances(means), expected, rtol=1e-4, atol=0)
    assert active_units(means) == 2
    assert active_units(means, threshold=0.002) == 4


def test_units_of_a_diverged_encoder_are_not_counted_as_inactive():
    means = torch.randn(5, 3)
    means[2, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        active_units(means)
    with pytest.raises(ValueError, match="N >= 2"):
        active_units(torch.randn(1, 3))
