"""Flows against Jacobians, quadrature and enumeration: the IAF posterior and dequantization."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pipeline.models.vae.dequantization import DequantizationFlow, Dequantizer
from pipeline.models.vae.flows import MADE, InverseAutoregressiveFlow


def bent(module: torch.nn.Module, size: float = 0.5) -> torch.nn.Module:
    """The module in float64 with random weights everywhere, far from its start."""
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=size)
    return module


def flow(latent_dim: int, steps: int, context: int = 3) -> InverseAutoregressiveFlow:
    return bent(InverseAutoregressiveFlow(latent_dim, context, hidden=2 * latent_dim, steps=steps))


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def jacobian_log_det(function, point: torch.Tensor) -> torch.Tensor:
    """log|det| of the Jacobian of a map of (d,) by brute force."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(function, point)).logabsdet


# Inverse autoregressive flow.


@pytest.mark.parametrize(("latent_dim", "steps"), [(2, 1), (3, 2), (5, 3), (4, 4)])
def test_log_det_is_that_of_the_jacobian_there_and_back(latent_dim, steps):
    model, z0, context = flow(latent_dim, steps), draws(2, 3, latent_dim), draws(3, 3)
    z, log_det = model(z0, context)
    back, log_det_back = model.inverse(z, context)
    torch.testing.assert_close(back, z0, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_back, log_det, rtol=0, atol=1e-9)
    for i, b in itertools.product(range(2), range(3)):
        one = context[b : b + 1]
        forward = jacobian_log_det(lambda v, one=one: model(v[None, None], one)[0][0, 0], z0[i, b])
        inverse = jacobian_log_det(
            lambda v, one=one: model.inverse(v[None, None], one)[0][0, 0], z[i, b]
        )
        assert log_det[i, b].item() == pytest.approx(forward.item(), abs=1e-9)
        assert log_det[i, b].item() == pytest.approx(-inverse.item(), abs=1e-8)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("latent_dim", "hidden"), [(2, 2), (5, 5), (5, 13), (7, 3)])
def test_a_masked_network_sees_only_the_dimensions_before(latent_dim, hidden, reverse):
    network = bent(MADE(latent_dim, 2, hidden, reverse))
    z, context = draws(1, 1, latent_dim), draws(1, 2)
    before = torch.ones(latent_dim, latent_dim).tril(-1).bool()
    before = before.flip(0, 1) if reverse else before
    of_z = torch.autograd.functional.jacobian(lambda z: network(z, context), z)
    of_context = torch.autograd.functional.jacobian(lambda h: network(z, h), context)
    for output in range(2):  # m, s
        seen = of_z[output].reshape(latent_dim, latent_dim) != 0
        assert not (seen & ~before).any()
        if hidden >= latent_dim:
            assert torch.equal(seen, before)
        assert (of_context[output] != 0).all()  # the first dimension too


def test_density_of_the_posterior_integrates_to_one():
    model, context = flow(2, 3), draws(1, 3)
    mean, scale = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.6]).double()
    axis, step = torch.linspace(-16, 16, 801, dtype=torch.float64), 32 / 800
    z = torch.cartesian_prod(axis, axis)[:, None]
    with torch.no_grad():
        z0, log_det = model.inverse(z, context)
        log_q = Normal(mean, scale).log_prob(z0).sum(-1) - log_det
        assert log_q.exp().sum().item() * step**2 == pytest.approx(1, abs=1e-6)
        # and it is the density of what `forward` draws: the mean of z by both
        drawn, _ = model(mean + scale * draws(20_000, 1, 2), context)
    expected = (log_q.exp()[..., None] * z).sum(0)[0] * step**2
    assert ((drawn.mean(0)[0] - expected).abs() < 5 * drawn.std(0)[0] / 20_000**0.5).all()


def test_every_image_has_a_map_of_its_own():
    model, z0, context = flow(4, 2), draws(3, 1, 4), draws(5, 3)
    z, log_det = model(z0.expand(3, 5, 4), context)
    for b in range(5):
        alone = model(z0, context[b : b + 1])
        torch.testing.assert_close((z[:, b : b + 1], log_det[:, b : b + 1]), alone)
    assert z.std(1).min() > 1e-3 and log_det.std(1).min() > 1e-3
    # one z under the context of every image, as an aggregate posterior asks for
    back, _ = model.inverse(z[:, :1], context)
    assert back.shape == (3, 5, 4)
    torch.testing.assert_close(back[:, :1], z0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_fresh_flow_is_one_small_shrinkage(steps):
    model = InverseAutoregressiveFlow(6, 3, hidden=16, steps=steps)
    z0 = torch.randn(2, 5, 6)
    z, log_det = model(z0, 10 * torch.randn(5, 3))
    factor = (1 + math.exp(-2)) ** -steps
    torch.testing.assert_close(z, factor * z0)
    torch.testing.assert_close(log_det, torch.full((2, 5), 6 * math.log(factor)))


def test_the_flow_stays_in_full_precision_under_autocast():
    model, z0, context = flow(4, 2), draws(2, 3, 4).float(), draws(3, 3).bfloat16()
    expected = model.double()(z0.double(), context.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.float()(z0, context)
        back, _ = model.inverse(found[0], context)
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back, z0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("latent_dim", [1, 0])
def test_a_latent_too_small_for_a_flow_is_refused(latent_dim):
    with pytest.raises(ValueError, match=rf"latent_dim must be at least 2 .* got {latent_dim}"):
        InverseAutoregressiveFlow(latent_dim, 3, hidden=4, steps=1)


# Dequantization.


def bent_flow(channels: int = 1) -> DequantizationFlow:
    """Far from uniform, but not so far that u rounds to 0 or 1, where no u tells its logit."""
    return bent(DequantizationFlow(channels, hidden_channels=6, num_layers=4), 0.2)


def test_none_leaves_images_as_they_are():
    x = torch.rand(2, 3, 5, 4)
    y, log_q = Dequantizer("none", 3)(x)
    assert torch.equal(y, x) and torch.equal(log_q, torch.zeros(2))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"dequantization must be one of .*, got varational"):
        Dequantizer("varational", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 3, 5, 7), (1, 1, 64, 65)])
@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_y_stays_in_the_bin_of_its_value(kind, shape, dtype):
    dequantizer = Dequantizer(kind, shape[1])
    if kind == "variational":
        bent(dequantizer, 1.0)  # wild: many u are pressed against 0 or 1
    dequantizer.to(dtype)
    values = torch.randint(256, shape)
    values.flatten()[:3] = torch.tensor([0, 255, 128])
    y, log_q = dequantizer(values.to(dtype) * (1 / 255))  # off k/255 by a rounding
    assert y.dtype == log_q.dtype == dtype and log_q.shape == (shape[0],)
    assert (values / 256 <= y).all() and (y <= (values + 1) / 256).all()
    assert log_q.isfinite().all()
    if kind == "uniform":
        assert torch.equal(log_q, torch.zeros(shape[0], dtype=dtype))
        u = 256 * y.double() - values
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("kind", ["none", "uniform", "variational"])
def test_half_precision_and_autocast_are_dequantized_in_fp32(kind):
    dequantizer = bent(Dequantizer(kind, 1), 0.2).float()
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # these are exact in bfloat16
    torch.manual_seed(0)
    expected = dequantizer(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dequantizer(x.bfloat16())
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, exact)


def test_the_variational_flow_starts_at_uniform():
    dequantizer = Dequantizer("variational", 3)
    x = torch.randint(256, (4, 3, 9, 11)) / 255
    u, log_q = dequantizer.flow(x)
    assert log_q.abs().max() < 1e-6
    assert stats.kstest(u.detach().flatten().numpy(), "uniform").pvalue > 0.001
    assert dequantizer.flow.log_prob(u, x).abs().max() < 1e-6
    edges = torch.zeros_like(x)
    edges[..., ::2] = 1
    assert dequantizer.flow.log_prob(edges, x).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_and_the_greatest_noise_stay_inside(dtype, monkeypatch):
    extremes = torch.tensor([0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype).view(2, 1, 1, 1)
    monkeypatch.setattr(torch, "rand_like", lambda x: extremes)
    for model in (DequantizationFlow(1, 6, 4), bent(DequantizationFlow(1, 6, 4), 1.0)):
        u, log_q = model.to(dtype)(torch.ones(2, 1, 1, 1, dtype=dtype))
        assert (u >= 0).all() and (u < 1).all()
        assert log_q.isfinite().all() and model.log_prob(u, torch.ones_like(u)).isfinite().all()


def test_the_drawn_density_is_the_evaluated_one():
    for shape in [(5, 1, 1, 1), (2, 1, 1, 2), (3, 3, 4, 5)]:
        model, x = bent_flow(shape[1]), torch.randint(256, shape) / 255.0
        u, log_q = model(x.double())
        assert (u > 0).all() and (u < 1).all() and log_q.abs().max() > 0.1
        # where u is near 1 its rounding is large in its logit
        torch.testing.assert_close(model.log_prob(u, x.double()), log_q, rtol=1e-5, atol=1e-5)


def logit_grid(d: int, limit: float = 36.0, points: int = 241):
    """u on a product grid uniform in logits (points^d, d), and the weights of the integral du: the
    ends of [0, 1], where a density may be steep, are resolved."""
    v = torch.linspace(-limit, limit, points, dtype=torch.float64)
    weight = v.sigmoid() * (-v).sigmoid() * (2 * limit / (points - 1))
    u, weights = (torch.cartesian_prod(*[t] * d).view(-1, d) for t in (v.sigmoid(), weight))
    return u, weights.prod(1)


@pytest.mark.parametrize("d", [1, 2])
def test_variational_density_integrates_to_one_for_every_image(d):
    model = bent_flow()
    u, weight = logit_grid(d)
    densities = []
    for value in (0, 255):
        x = torch.full((len(u), 1, 1, d), value / 255, dtype=torch.float64)
        with torch.no_grad():
            densities.append(model.log_prob(u.view(-1, 1, 1, d), x).exp())
        assert (densities[-1] * weight).sum().item() == pytest.approx(1, abs=1e-5)
    # and it depends on the image
    assert ((densities[0] - densities[1]).abs() * weight).sum() > 1e-3


def test_draws_follow_the_evaluated_density():
    model = bent_flow()
    x = torch.full((4000, 1, 1, 1), 200 / 255, dtype=torch.float64)
    with torch.no_grad():
        drawn, _ = model(x)
        u, weight = logit_grid(1, points=4001)
        log_q = model.log_prob(u.view(-1, 1, 1, 1), x[:1].expand(4001, 1, 1, 1))
        cdf = (log_q.exp() * weight).cumsum(0)
    ranks = torch.searchsorted(u.flatten(), drawn.flatten()).clamp(max=4000)
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue < 1e-6
    assert stats.kstest(cdf[ranks].numpy(), "uniform").pvalue > 0.001


# The bounds on an enumerable toy: images of two pixels with values 100 ... 103, and a density that
# has two narrow modes in every bin.

VALUES = torch.arange(100, 104, dtype=torch.float64)
MODES = (VALUES[:, None] + torch.tensor([0.2, 0.6], dtype=torch.float64)).flatten()
TOY = MixtureSameFamily(
    Categorical(torch.tensor([3.0, 1.0], dtype=torch.float64).repeat(4)),
    Normal(MODES / 256, torch.tensor(0.1 / 256, dtype=torch.float64)),
)  # of each pixel of y


def toy_images() -> torch.Tensor:
    """All images (16, 1, 1, 2)."""
    return torch.cartesian_prod(VALUES, VALUES).view(16, 1, 1, 2) / 255


def exact_log_p() -> torch.Tensor:
    """log P(x) (16,) of all images."""
    lower = torch.cartesian_prod(VALUES, VALUES) / 256
    return (TOY.cdf(lower + 1 / 256) - TOY.cdf(lower)).log().sum(1)


def log_weights(dequantizer: Dequantizer, draws_each: int) -> torch.Tensor:
    """log p(y) - d ln 256 - log q(u|x) of draws for every image, (draws_each, 16)."""
    y, log_q = dequantizer(toy_images().repeat(draws_each, 1, 1, 1))
    log_p = TOY.log_prob(y).flatten(1).sum(1)
    return (log_p - 2 * math.log(256) - log_q).view(draws_each, 16)


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_importance_weights_of_any_flow_average_to_the_probability(kind):
    """Exact on average: E_q[p(y) 256^-d / q(u|x)] = P(x), whatever q is."""
    dequantizer = Dequantizer(kind, 1, hidden_channels=6).double()
    if dequantizer.flow is not None:
        bent(dequantizer.flow, 0.2)
    with torch.no_grad():
        weights = (log_weights(dequantizer, 4000) - exact_log_p()).exp()
    error = weights.std(0) / 4000**0.5
    assert error.max() < 0.1
    assert ((weights.mean(0) - 1).abs() < 5 * error).all()


def test_uniform_bound_below_trained_bound_below_exact_likelihood():
    dequantizer = Dequantizer("variational", 1, hidden_channels=8, num_layers=2).double()
    optimizer = torch.optim.Adam(dequantizer.parameters(), lr=0.02)
    with torch.no_grad():
        at_start = log_weights(dequantizer, 1000)
        uniform = log_weights(Dequantizer("uniform", 1), 1000)
    for _ in range(150):
        optimizer.zero_grad()
        (-log_weights(dequantizer, 8).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        trained = log_weights(dequantizer, 1000)

    def mean_and_error(values):
        return values.mean().item(), values.std().item() / values.numel() ** 0.5

    (first, first_error), (low, low_error) = mean_and_error(at_start), mean_and_error(uniform)
    (bound, error), exact = mean_and_error(trained), exact_log_p().mean().item()
    assert abs(first - low) < 4 * math.hypot(first_error, low_error)
    assert bound > low + 10 * math.hypot(error, low_error)
    assert bound < exact - 10 * error  # two modes are more than this flow can follow
