"""log p(x) by sampling against closed forms and enumeration; bits per dimension."""

import itertools
import math

import pytest
import scipy.stats
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from pipeline.evaluation.likelihood import (
    bits_per_dim,
    chunk_size,
    importance_log_likelihood,
)
from pipeline.models.vae.densities import log_mean_exp

F64 = torch.float64
NUM_SAMPLES = 5000


def standard_error(found):
    return (1 / found.effective_sample_size - 1 / NUM_SAMPLES).sqrt()


def assert_close(found, truth):
    """Within four standard errors, where these are small enough to mean something."""
    error = standard_error(found)
    assert error.max() < 0.1
    assert ((found.log_likelihood - truth).abs() <= 4 * error + 1e-10).all()


class LinearGaussian:
    """z ~ N(0, I), x|z ~ N(A z + b, noise² I), at four x: p(x) and p(z|x) in closed form."""

    A = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]], dtype=F64)
    b, noise = torch.tensor([0.3, -1.0, 2.0], dtype=F64), 0.8

    def __init__(self):
        self.x = torch.randn(4, 3, dtype=F64) * 2
        covariance = self.A @ self.A.T + self.noise**2 * torch.eye(3, dtype=F64)
        self.log_p_x = torch.from_numpy(
            scipy.stats.multivariate_normal(self.b, covariance).logpdf(self.x)
        )
        precision = torch.eye(2, dtype=F64) + self.A.T @ self.A / self.noise**2
        self.covariance = torch.linalg.inv(precision)
        self.mean = (self.x - self.b) @ self.A @ self.covariance / self.noise**2

    def log_weights(self, count, widening):
        """Under the exact posterior with its deviation times `widening`."""
        q = MultivariateNormal(self.mean, widening**2 * self.covariance)
        z = q.sample((count,))
        log_p_x_given_z = Normal(z @ self.A.T + self.b, self.noise).log_prob(self.x).sum(-1)
        return log_p_x_given_z + Normal(0, 1).log_prob(z).sum(-1) - q.log_prob(z)


def test_the_exact_posterior_has_equal_weights_and_no_gap():
    model = LinearGaussian()
    found = importance_log_likelihood(lambda count: model.log_weights(count, 1), 50, 7)
    torch.testing.assert_close(found.log_likelihood, model.log_p_x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.elbo, model.log_p_x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.effective_sample_size, torch.full((4,), 50.0, dtype=F64))
    assert found.inference_gap.abs().max() < 1e-10


def test_a_wider_posterior_converges_and_the_gap_is_its_divergence():
    model, widening = LinearGaussian(), 1.5
    found = importance_log_likelihood(
        lambda count: model.log_weights(count, widening), NUM_SAMPLES, 999
    )
    assert_close(found, model.log_p_x)
    # per dimension: E w² / (E w)² = c² / sqrt(2 c² - 1), KL(q || p(z|x)) = (c² - 1)/2 - ln c,
    # and the log weight is (c² - 1)/2 · N(0, 1)² plus a constant
    spread = (widening**2 / (2 * widening**2 - 1) ** 0.5) ** 2
    torch.testing.assert_close(
        found.effective_sample_size,
        torch.full((4,), NUM_SAMPLES / spread, dtype=F64),
        rtol=0.05,
        atol=0,
    )
    divergence = 2 * ((widening**2 - 1) / 2 - math.log(widening))
    elbo_error = (widening**2 - 1) / NUM_SAMPLES**0.5
    assert ((model.log_p_x - found.elbo) - divergence).abs().max() < 4 * elbo_error
    assert (found.inference_gap > divergence / 2).all()


def test_prior_monte_carlo_and_importance_sampling_of_a_mixture_of_three_gaussians():
    """z ~ mixture of N(mu_c, 0.3² I), x|z ~ N(z, 0.4² I), so x ~ mixture of N(mu_c, 0.5² I)."""
    components = Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=F64))
    centres = torch.tensor([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]], dtype=F64)

    def mixture(scale):
        return MixtureSameFamily(components, Independent(Normal(centres, scale), 1))

    prior = mixture(0.3)
    x = torch.tensor([[0.1, -0.2], [1.7, 1.2], [0.4, 0.9], [-1.5, 2.5], [1.0, 0.4]], dtype=F64)
    truth = mixture(0.5).log_prob(x)

    def log_p_x_given_z(z):
        return Normal(z, 0.4).log_prob(x).sum(-1)

    def with_prior(count):
        return log_p_x_given_z(prior.sample((count, 1)).expand(-1, len(x), -1))

    def with_encoder(count):
        q = Independent(Normal(x, 0.5), 1)  # one Gaussian for a posterior of up to three
        z = q.sample((count,))
        return log_p_x_given_z(z) + prior.log_prob(z) - q.log_prob(z)

    from_prior = importance_log_likelihood(with_prior, NUM_SAMPLES, 1200)
    from_encoder = importance_log_likelihood(with_encoder, NUM_SAMPLES, 1200)
    assert_close(from_prior, truth)
    assert_close(from_encoder, truth)
    assert standard_error(from_encoder).max() < standard_error(from_prior).max()
    assert (from_encoder.inference_gap > 0).all()


def test_importance_sampling_of_a_bernoulli_model_against_its_4096_states():
    prior = Bernoulli(torch.linspace(0.2, 0.7, 12, dtype=F64))
    weight, bias = torch.randn(9, 12, dtype=F64), torch.randn(9, dtype=F64)
    x = torch.bernoulli(torch.full((3, 9), 0.5, dtype=F64))

    def log_joint(z):  # (k, B or 1, 12) -> (k, B)
        log_p_x_given_z = Bernoulli(logits=z @ weight.T + bias).log_prob(x).sum(-1)
        return log_p_x_given_z + prior.log_prob(z).sum(-1)

    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=F64)[:, None]
    log_states = log_joint(states)  # (4096, B)
    truth = log_states.logsumexp(0)
    posterior_mean = ((log_states - truth).exp()[..., None] * states).sum(0)  # (B, 12)
    q = Bernoulli(0.8 * posterior_mean + 0.1)

    def with_encoder(count):
        z = q.sample((count,))
        return log_joint(z) - q.log_prob(z).sum(-1)

    found = importance_log_likelihood(with_encoder, NUM_SAMPLES, 2048)
    assert_close(found, truth)
    assert (found.elbo < truth - 0.1).all()


@pytest.mark.parametrize("chunk", [1, 7, 30, 31, 1000])
def test_chunks_equal_all_at_once(chunk):
    """Log weights far below where exp underflows, float32 as models make them."""
    weights = 5 * torch.randn(31, 3) - 1e5
    asked = []

    def next_rows(count):
        asked.append(count)
        return weights[sum(asked) - count : sum(asked)]

    found = importance_log_likelihood(next_rows, 31, chunk)
    assert sum(asked) == 31 and max(asked) <= chunk
    exact = weights.double()
    shifted = (exact + 1e5).exp()
    expected = shifted.mean(0).log() - 1e5
    torch.testing.assert_close(found.log_likelihood, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_mean_exp(exact, 0), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.elbo, exact.mean(0), rtol=0, atol=1e-9)
    sizes = shifted.sum(0).square() / shifted.square().sum(0)
    torch.testing.assert_close(found.effective_sample_size, sizes, rtol=1e-8, atol=0)


def test_log_mean_exp_takes_the_mean_along_its_dimension_and_weights_of_zero():
    weights = torch.tensor([[0.2, 0.0, 1.0], [0.0, 0.0, 3.0]], dtype=F64)
    expected = torch.tensor([0.1, 0.0, 2.0], dtype=F64)
    torch.testing.assert_close(log_mean_exp(weights.log(), 0).exp(), expected)
    torch.testing.assert_close(log_mean_exp(weights.T.log(), 1).exp(), expected)
    found = importance_log_likelihood(lambda count: weights[:count].log(), 2, 2)
    assert found.log_likelihood[1] == -torch.inf
    assert found.effective_sample_size[0] == 1


def test_weights_of_the_wrong_number_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"log_weights\(3\) must be \(3, B\), got \(4, 3\)"):
        importance_log_likelihood(lambda count: torch.zeros(4, count), 3, 3)
    for num_samples, chunk in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            importance_log_likelihood(lambda count: torch.zeros(count, 2), num_samples, chunk)


def test_chunks_fill_the_memory_limit_and_no_more():
    limit = 3  # MiB
    chunk = chunk_size(5000, 20, 1000, limit)
    assert chunk * 20 * 1000 <= limit * 2**20 < (chunk + 1) * 20 * 1000
    assert chunk_size(100, 20, 1000, limit) == 100
    with pytest.raises(ValueError, match="smaller batches"):
        chunk_size(5000, 20, 10**6, limit)


def test_bits_per_dim_of_uniform_data_are_known():
    assert bits_per_dim(12 * math.log(256), 12, "8bit") == pytest.approx(8)
    assert bits_per_dim(12 * math.log(2), 12, "binary") == pytest.approx(1)
    assert bits_per_dim(0.0, 12, "dequantized") == pytest.approx(8)


def test_bits_per_dim_of_a_histogram_do_not_depend_on_dequantization():
    """A density constant in each of 256 bins is exact for its probabilities."""
    log_p = torch.randn(256, dtype=F64).log_softmax(0)
    x = torch.randint(256, (5,))
    discrete = -log_p[x].sum().item()
    y = (x + torch.rand(5)) / 256
    continuous = -(log_p[(y * 256).long()] + math.log(256)).sum().item()
    expected = pytest.approx(bits_per_dim(discrete, 5, "8bit"))
    assert bits_per_dim(continuous, 5, "dequantized") == expected


def test_bits_per_dim_of_an_undequantized_density_are_refused():
    with pytest.raises(ValueError, match=r"undequantized density.*dequantize the data"):
        bits_per_dim(-300.0, 12, "density")
    with pytest.raises(ValueError, match="num_dims"):
        bits_per_dim(1.0, 0, "8bit")
