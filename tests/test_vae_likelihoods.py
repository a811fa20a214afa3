"""Decoder likelihoods against scipy, sums over all images, integrals, and their own draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pipeline.models.vae.autoregressive import AutoregressiveConfig, AutoregressiveLikelihood
from pipeline.models.vae.likelihoods import LogisticMixture, make_likelihood

NAMES = (
    "gaussian",
    "gaussian_global",
    "gaussian_pixel",
    "laplace",
    "bernoulli",
    "categorical",
    "logistic_mixture",
)
MASSES = ("categorical", "logistic_mixture")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def grey_values(*shape: int) -> torch.Tensor:
    """Images of random 8-bit values, black and white among them."""
    values = torch.randint(256, shape)
    values.view(-1)[:2] = torch.tensor([0, 255])
    return values.double() / 255


def logistic_mass(outputs: np.ndarray, x: np.ndarray, mixtures: int) -> float:
    """PixelCNN++'s mass of one pixel, outputs (O,), x (C,), written out with scipy's logistic."""
    channels = len(x)
    parts = outputs.reshape(-1, mixtures)  # logits, means, log scales, coefficients
    weights = np.exp(parts[0]) / np.exp(parts[0]).sum()
    means, log_scales = parts[1 : 1 + channels], parts[1 + channels : 1 + 2 * channels]
    coefficients = np.tanh(parts[1 + 2 * channels :])
    pixels = 2 * x - 1
    total = 0.0
    for k in range(mixtures):
        product = weights[k]
        for c in range(channels):
            mean = means[c, k]
            if c == 1:
                mean += coefficients[0, k] * pixels[0]
            if c == 2:
                mean += coefficients[1, k] * pixels[0] + coefficients[2, k] * pixels[1]
            logistic = stats.logistic(mean, math.exp(max(log_scales[c, k], -7)))
            top = 1.0 if x[c] == 1 else logistic.cdf(pixels[c] + 1 / 255)
            bottom = 0.0 if x[c] == 0 else logistic.cdf(pixels[c] - 1 / 255)
            product *= top - bottom
        total += product
    return total


def by_hand(name: str, outputs: np.ndarray, x: np.ndarray) -> float:
    """log p of one image with the settings of the test below; outputs (O, H, W), x (C, H, W)."""
    channels = len(x)
    mean = (outputs[:channels] + 1) / 2
    if name == "gaussian":
        return stats.norm(mean, math.sqrt(0.135)).logpdf(x).sum()
    if name == "gaussian_global":
        return stats.norm(mean, math.sqrt(0.01 + 0.135 * math.exp(-0.7))).logpdf(x).sum()
    if name == "gaussian_pixel":
        variance = 0.01 + 0.135 * np.exp(outputs[channels:])
        return stats.norm(mean, np.sqrt(variance)).logpdf(x).sum()
    if name == "laplace":
        return stats.laplace(mean, math.sqrt(0.135 / 2)).logpdf(x).sum()
    total = 0.0
    for i, j in np.ndindex(x.shape[1:]):
        pixel, logits = x[:, i, j], outputs[:, i, j]
        if name == "logistic_mixture":
            total += math.log(logistic_mass(logits, pixel, 3))
        for c in range(channels):
            if name == "bernoulli":
                p = 1 / (1 + math.exp(-logits[c]))
                total += stats.bernoulli(p).logpmf(int(pixel[c]))
            if name == "categorical":
                of_channel = logits[256 * c : 256 * (c + 1)]
                value = round(pixel[c] * 255)
                total += of_channel[value] - math.log(np.exp(of_channel).sum())
    return total


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_log_prob_is_scipys_sum_over_pixels_and_channels(name, channels):
    likelihood = make_likelihood(name, channels, variance=0.135, mixtures=3, floor=0.01).double()
    if name == "gaussian_global":
        torch.nn.init.constant_(likelihood.log_variance, -0.7)
    x = grey_values(2, channels, 3, 2)
    if name == "bernoulli":
        x = x.round()
    outputs = randn(4, 2, likelihood.num_outputs, 3, 2)  # four samples of z for each image
    log_prob = likelihood.log_prob(outputs, x)
    assert log_prob.shape == (4, 2)
    for m, b in itertools.product(range(4), range(2)):
        expected = by_hand(name, outputs[m, b].numpy(), x[b].numpy())
        assert log_prob[m, b].item() == pytest.approx(expected, rel=1e-11)


def test_variance_one_half_is_the_sum_of_squared_errors_and_its_constant():
    outputs, x = randn(5, 3, 4, 7), grey_values(5, 3, 4, 7)
    squares = ((outputs + 1) / 2 - x).square().sum((1, 2, 3))
    expected = -(squares + 3 * 4 * 7 / 2 * math.log(math.pi))
    torch.testing.assert_close(make_likelihood("gaussian", 3).log_prob(outputs, x), expected)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_global", "gaussian_pixel", "laplace"])
def test_densities_integrate_to_one_and_have_the_variance_asked_for(name):
    likelihood = make_likelihood(name, 1, variance=0.02, floor=1e-9).double()
    outputs = torch.zeros(likelihood.num_outputs, 1, 1, dtype=torch.float64)

    def density(value: float) -> float:
        x = torch.full((1, 1, 1), value, dtype=torch.float64)
        return likelihood.log_prob(outputs, x).exp().item()

    def second_moment(value: float) -> float:
        return (value - 0.5) ** 2 * density(value)

    inside = {"points": [0.5], "epsabs": 1e-9}  # the kink of Laplace
    assert integrate.quad(density, -3, 4, **inside)[0] == pytest.approx(1, abs=1e-8)
    assert integrate.quad(second_moment, -3, 4, **inside)[0] == pytest.approx(0.02, abs=1e-7)


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("spread", [0.1, 1, 30])
def test_masses_of_the_256_values_sum_to_one(name, spread):
    """Also with means far outside the pixels, and scales beyond both clamps."""
    likelihood = make_likelihood(name, 1, mixtures=4)
    values = torch.arange(256, dtype=torch.float64).view(256, 1, 1, 1) / 255
    outputs = spread * randn(6, 1, likelihood.num_outputs, 1, 1)
    total = likelihood.log_prob(outputs, values).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(6, dtype=torch.float64))


def colour_outputs(centre: list[int], scale: float) -> torch.Tensor:
    """Outputs (20, 1, 1) of two components, whose channels depend on each other. The first has its
    peak at these grey values, the second two values above; `scale` in grey values too."""
    grey = torch.tensor([centre, centre], dtype=torch.float64).T + torch.tensor([0, 2])
    peaks = grey / 127.5 - 1  # (3, K)
    coefficients = torch.tensor([[0.5, -0.5], [0.8, 0.1], [-0.6, 0.4]], dtype=torch.float64)
    red, green, blue = peaks
    of_green, of_blue = coefficients[0] * red, coefficients[1] * red + coefficients[2] * green
    means = torch.stack([red, green - of_green, blue - of_blue])
    log_scales = torch.full((3, 2), math.log(scale / 127.5), dtype=torch.float64)
    logits = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    return torch.cat([logits, means, log_scales, coefficients.atanh()]).view(20, 1, 1)


def colours_about(centre: list[int]) -> torch.Tensor:
    """Pixels (N, 3, 1, 1): all red, green, blue within 18, 24, 30 grey values of the centre."""
    ranges = [
        torch.arange(max(0, c - d), min(c + d, 255) + 1)
        for c, d in zip(centre, (18, 24, 30), strict=True)
    ]
    return torch.cartesian_prod(*ranges)[..., None, None].double() / 255


@pytest.mark.parametrize("centre", [[127, 60, 180], [0, 128, 254], [253, 1, 2]])
def test_masses_of_all_colours_sum_to_one(centre):
    """Also where black and white have a good part of the mass; none is left 18 scales away."""
    likelihood = LogisticMixture(3, 2)
    mass = likelihood.log_prob(colour_outputs(centre, 0.5), colours_about(centre)).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_have_the_mean(name, channels):
    likelihood = make_likelihood(name, channels, variance=0.02, mixtures=3).double()
    outputs = 0.3 * randn(likelihood.num_outputs, 2, 1)
    if name == "logistic_mixture":
        outputs[3 * (1 + channels) : 3 * (1 + 2 * channels)] -= 4  # clear of 0 and 255
    mean = likelihood.mean(outputs)
    draws = likelihood.sample(outputs.expand(4000, -1, -1, -1))
    assert mean.shape == draws.shape[1:] == (channels, 2, 1)
    error = (draws.mean(0) - mean) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 5
    likelihood.check(draws)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_global", "gaussian_pixel", "laplace"])
def test_draws_of_a_density_follow_it(name):
    likelihood = make_likelihood(name, 1, variance=0.3)
    outputs = torch.full((likelihood.num_outputs, 1, 1), -0.4)
    variance = 0.3 + 1e-4 if "_" in name else 0.3
    if name == "gaussian_pixel":
        variance = 0.3 * math.exp(-0.4) + 1e-4
    draws = likelihood.sample(outputs.expand(5000, -1, -1, -1)).flatten().numpy()
    exact = stats.norm(0.3, math.sqrt(variance))
    if name == "laplace":
        exact = stats.laplace(0.3, math.sqrt(variance / 2))
    assert stats.kstest(draws, exact.cdf).pvalue > 1e-3


def goodness_of_fit(drawn: torch.Tensor, mass: torch.Tensor) -> float:
    """p value of draws (N,) against the mass of their cells; cells under 5 expected are pooled."""
    expected = mass * len(drawn)
    pool = torch.where(expected < 5, 0, torch.arange(1, len(mass) + 1))
    counts = torch.zeros(len(mass) + 1, dtype=torch.float64)
    pooled = torch.zeros_like(counts).index_add(0, pool, expected)
    counts = counts.index_add(0, pool, drawn.bincount(minlength=len(mass)).double())
    used = pooled > 0
    return stats.chisquare(counts[used].numpy(), pooled[used].numpy()).pvalue


@pytest.mark.parametrize("name", MASSES)
def test_draws_of_a_mass_follow_it(name):
    """Frequencies of the 256 values of one pixel, a good part of the mass in 0 and 255."""
    likelihood = make_likelihood(name, 1, mixtures=2).double()
    outputs = randn(likelihood.num_outputs, 1, 1)
    values = torch.arange(256, dtype=torch.float64).view(256, 1, 1, 1) / 255
    mass = likelihood.log_prob(outputs, values).exp()
    draws = likelihood.sample(outputs.expand(10000, -1, -1, -1))
    assert goodness_of_fit((draws.flatten() * 255).round().long(), mass) > 1e-3


def test_draws_of_colours_follow_their_joint_mass():
    likelihood, centre = LogisticMixture(3, 2), [1, 180, 60]
    outputs, x = colour_outputs(centre, 0.5), colours_about(centre)
    mass = likelihood.log_prob(outputs, x).exp()
    draws = likelihood.sample(outputs.expand(20000, -1, -1, -1))
    base = torch.tensor([1, 256, 256**2])  # a colour as one number
    number, drawn = (((each.flatten(1) * 255).round().long() * base).sum(1) for each in (x, draws))
    number, order = number.sort()
    cells = torch.searchsorted(number, drawn)
    assert torch.equal(number[cells], drawn)  # nothing outside the window
    assert goodness_of_fit(cells, mass[order]) > 1e-3


@pytest.mark.parametrize(("name", "within"), [("categorical", 1e-12), ("logistic_mixture", 0.5)])
@torch.no_grad()
def test_the_mean_of_a_mass_is_its_sum_over_the_values(name, within):
    """In grey values: exact, or for logistics half of one, at any scale."""
    likelihood = make_likelihood(name, 1, mixtures=2)
    outputs = 2 * randn(50, likelihood.num_outputs, 1, 1)
    values = torch.arange(256, dtype=torch.float64).view(256, 1, 1, 1, 1) / 255
    exact = (likelihood.log_prob(outputs, values).exp()[..., None, None, None] * values).sum(0)
    assert (likelihood.mean(outputs) - exact).abs().max() < within / 255


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_outputs_are_computed_in_single(name):
    likelihood = make_likelihood(name, 3)
    outputs = torch.randn(2, likelihood.num_outputs, 4, 3).bfloat16()
    x = grey_values(2, 3, 4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = likelihood.log_prob(outputs, x), likelihood.mean(outputs)
    exact = likelihood.log_prob(outputs.double(), x.double()), likelihood.mean(outputs.double())
    for single, double in zip(found, exact, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert likelihood.sample(outputs).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "size"),
    [*itertools.product(["bernoulli", "categorical", "logistic_mixture"], [30, -30, 1000, -1000])]
    + [("gaussian_pixel", size) for size in (60, -60, -1000)],  # e^100 is beyond float32
)
def test_extreme_outputs_leave_value_and_gradient_finite(name, size):
    likelihood = make_likelihood(name, 3, mixtures=2)
    outputs = torch.full((1, likelihood.num_outputs, 1, 3), float(size), requires_grad=True)
    x = torch.tensor([0.0, 1.0, 77 / 255]).expand(1, 3, 1, 3)
    log_prob = likelihood.log_prob(outputs, x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and outputs.grad.isfinite().all()


@pytest.mark.parametrize("name", ["gaussian_global", "gaussian_pixel"])
def test_a_learned_variance_stops_at_its_floor(name):
    likelihood = make_likelihood(name, 1, floor=1e-4).double()
    outputs = torch.full((likelihood.num_outputs, 1, 1), -200.0, dtype=torch.float64)
    outputs[0] = 0
    if name == "gaussian_global":
        torch.nn.init.constant_(likelihood.log_variance, -200)
    best = likelihood.log_prob(outputs, torch.full((1, 1, 1), 0.5, dtype=torch.float64))
    assert best.item() == pytest.approx(-0.5 * math.log(2 * math.pi * 1e-4))


def test_a_global_variance_is_best_at_the_mean_squared_error():
    likelihood = make_likelihood("gaussian_global", 1, floor=1e-4).double()
    outputs, x = randn(1, 1, 9, 9), grey_values(1, 1, 9, 9)
    mse = ((outputs + 1) / 2 - x).square().mean().item()
    for variance, sign in ((mse / 2, 1), (mse, 0), (2 * mse, -1)):
        torch.nn.init.constant_(likelihood.log_variance, math.log((variance - 1e-4) / 0.5))
        assert likelihood.variance.item() == pytest.approx(variance)
        log_prob = likelihood.log_prob(outputs, x).sum()
        (gradient,) = torch.autograd.grad(log_prob, likelihood.log_variance)
        assert np.sign(round(gradient.item(), 9)) == sign


@pytest.mark.parametrize("name", NAMES)
def test_check_takes_the_images_it_is_of_and_refuses_others(name):
    likelihood = make_likelihood(name, 3)
    x = grey_values(2, 3, 5, 4).float()
    likelihood.check(x)
    with pytest.raises(ValueError, match=f"{name} .* 3 channels, got 1"):
        likelihood.check(x[:, :1])
    for wrong in (2 * x, -x, x + math.nan):
        if likelihood.support != "density":
            with pytest.raises(ValueError, match=f"{name} needs .*choose"):
                likelihood.check(wrong)
    dequantized = (x * 255 + 0.3) / 256
    if likelihood.support == "8bit":
        with pytest.raises(ValueError, match="8-bit"):
            likelihood.check(dequantized)
    else:
        likelihood.check(dequantized)


def test_a_grey_image_is_not_broadcast_over_colour_outputs():
    for name in NAMES:
        likelihood = make_likelihood(name, 3)
        outputs = torch.zeros(2, likelihood.num_outputs, 4, 4)
        for x in (torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 1, 4)):
            with pytest.raises(ValueError, match=f"{name} takes outputs"):
                likelihood.log_prob(outputs, x)
        with pytest.raises(ValueError, match=f"{name} takes outputs"):
            likelihood.log_prob(outputs[:, :-1], torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "poisson"}, "likelihood must be one of gaussian, .*got poisson"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"mixtures": 0}, "mixtures must be at least 1"),
        ({"variance": 0.0}, "variance must be above 0"),
        ({"variance": math.nan}, "variance must be above 0"),
        ({"floor": -1.0}, "floor must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_likelihood(**{"name": "gaussian", "channels": 3, **settings})


# Autoregressive


def autoregressive(base: str, channels: int, **settings) -> AutoregressiveLikelihood:
    """In float64 and evaluation mode, with weights so large that pixels depend on each other."""
    settings = {"channels": 6, "layers": 1, **settings}
    likelihood = AutoregressiveLikelihood(
        make_likelihood(base, channels, variance=0.05, mixtures=2),
        AutoregressiveConfig(**settings),
    )
    for parameter in likelihood.parameters():
        parameter.data.mul_(2)
    return likelihood.double().eval()


@pytest.mark.parametrize(("layers", "kernel_size"), [(1, 3), (2, 3), (1, 5)])
def test_context_is_what_is_before_and_within_the_receptive_field(layers, kernel_size):
    """By gradients: p of each pixel, its target held fixed, as a function of the image."""
    likelihood = autoregressive("gaussian_pixel", 2, layers=layers, kernel_size=kernel_size)
    height, width = 7, 13
    features = randn(4, 6, height, width).requires_grad_()  # four, as at one a ReLU may be off
    x = grey_values(4, 2, height, width).requires_grad_()
    base_outputs = likelihood.base_outputs(features, x, torch.ones_like(x[:, :1]))
    rows, columns = likelihood.config.receptive_field
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    widest = torch.zeros(2, dtype=torch.int64)
    for row, column in itertools.product(range(height), range(width)):
        output = (base_outputs[:, :, row, column] @ randn(4)).sum()
        gradient, of_z = torch.autograd.grad(output, (x, features), retain_graph=True)
        assert of_z[:, :, row, column].any()
        seen = gradient.abs().sum((0, 1)) > 0
        before = i * width + j < row * width + column
        near = (row - i < rows) & ((j - column).abs() <= columns // 2)
        assert not (seen & ~(before & near)).any()
        neighbours = ((i == row) & (j == column - 1)) | ((i == row - 1) & (j - column).abs().le(1))
        assert seen[neighbours].all()
        if seen.any():
            reach = torch.stack([(row - i)[seen].max() + 1, 2 * (j - column)[seen].abs().max() + 1])
            widest = torch.maximum(widest, reach)
    assert widest.tolist() == [rows, columns]  # no larger than the formula, and no smaller


def binary_images(height: int, width: int) -> torch.Tensor:
    pixels = itertools.product((0.0, 1.0), repeat=height * width)
    return torch.tensor(list(pixels), dtype=torch.float64).view(-1, 1, height, width)


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (2, 5), (1, 4)])
@torch.no_grad()
def test_masses_of_all_binary_images_sum_to_one(grid):
    likelihood = autoregressive("bernoulli", 1)
    log_prob = likelihood.log_prob(randn(3, 1, 6, *grid), binary_images(*grid))
    assert log_prob.shape == (3, 2 ** math.prod(grid))
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(3, dtype=torch.float64))


@torch.no_grad()
def test_sampled_binary_images_have_the_frequencies_of_the_mass():
    likelihood = autoregressive("bernoulli", 1)
    features = 2 * randn(6, 2, 2)
    images = binary_images(2, 2)
    mass = likelihood.log_prob(features, images).exp()
    independent = torch.stack(
        [(mass[images.flatten(1)[:, p] == 1]).sum() for p in range(4)]
    )  # of each pixel; their product is another mass, or the test would say nothing
    product = torch.where(images.flatten(1) == 1, independent, 1 - independent).prod(1)
    assert (product - mass).abs().max() > 0.01
    draws = likelihood.sample(features.expand(20000, -1, -1, -1))
    cells = (draws.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1).long()
    assert goodness_of_fit(cells, mass) > 1e-3


@pytest.mark.parametrize("base", ["logistic_mixture", "categorical", "laplace"])
@torch.no_grad()
def test_the_likelihood_of_a_draw_is_the_product_of_its_conditionals(base):
    """Each conditional from an image that is noise from its pixel on."""
    likelihood = autoregressive(base, 3)
    features = randn(2, 6, 3, 4)
    x = likelihood.sample(features)
    total = torch.zeros(2, dtype=torch.float64)
    for i, j in itertools.product(range(3), range(4)):
        partial = torch.rand_like(x)
        partial[:, :, :i], partial[:, :, i, :j] = x[:, :, :i], x[:, :, i, :j]
        outputs = likelihood.base_outputs(features, partial, torch.ones_like(x[:, :1]))
        pixel = slice(i, i + 1), slice(j, j + 1)
        total += likelihood.base.log_prob(outputs[:, :, *pixel], x[:, :, *pixel])
    torch.testing.assert_close(likelihood.log_prob(features, x), total)
    if likelihood.support == "8bit":
        likelihood.check(x)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (7, 1), (9, 7)])
@torch.no_grad()
def test_decoding_by_fronts_equals_raster_order(kernel_size, grid):
    likelihood = autoregressive("logistic_mixture", 3, kernel_size=kernel_size)
    features = randn(2, 2, 6, *grid)
    x = torch.zeros(4, 3, *grid, dtype=torch.float64)
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        outputs = likelihood.base_outputs(features.flatten(0, 1), x, torch.ones_like(x[:, :1]))
        x[:, :, i, j] = likelihood.base.mean(outputs)[:, :, i, j]
    torch.testing.assert_close(likelihood.mean(features), x.view(2, 2, 3, *grid))


@torch.no_grad()
def test_samples_of_z_broadcast_over_images():
    likelihood = autoregressive("laplace", 1)
    features, x = randn(3, 2, 6, 4, 5), grey_values(2, 1, 4, 5)
    found = likelihood.log_prob(features, x)
    assert found.shape == (3, 2)
    for m, b in itertools.product(range(3), range(2)):
        torch.testing.assert_close(found[m, b], likelihood.log_prob(features[m, b], x[b]))
    shared = likelihood.log_prob(features[:, :1], x)  # one z for all images
    torch.testing.assert_close(shared[:, 1], likelihood.log_prob(features[:, 0], x[1]))


@torch.no_grad()
def test_dropout_hides_pixels_from_the_context_in_training_only():
    likelihood = autoregressive("gaussian", 1, dropout=0.99)
    features, x = randn(2, 6, 5, 5), grey_values(2, 1, 5, 5)
    visible = likelihood.log_prob(features, x)
    blind = likelihood.base_outputs(features, x, torch.zeros_like(x))
    hidden = likelihood.base.log_prob(blind, x)
    assert (visible - hidden).abs().min() > 1e-3
    other = likelihood.base_outputs(features, 1 - x, torch.zeros_like(x))
    assert torch.equal(other, blind)  # a hidden pixel says nothing
    likelihood.train()
    found = torch.stack([likelihood.log_prob(features, x) for _ in range(20)])
    # 25 pixels are all hidden with probability 0.99^25 = 0.78
    share = torch.isclose(found, hidden).double().mean().item()
    assert abs(share - 0.99**25) < 5 * math.sqrt(0.78 * 0.22 / 40)
    assert torch.equal(likelihood.mean(features), likelihood.eval().mean(features))


@torch.no_grad()
def test_autoregressive_outputs_of_half_precision():
    likelihood = autoregressive("logistic_mixture", 3).float()
    features, x = torch.randn(2, 6, 4, 4).bfloat16(), grey_values(2, 3, 4, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert likelihood.log_prob(features, x).dtype == torch.float32
        assert likelihood.sample(features).dtype == torch.float32
    single = likelihood.log_prob(features, x)
    double = likelihood.double().log_prob(features.double(), x.double())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-3)


def test_autoregressive_input_that_does_not_fit_is_refused():
    likelihood = autoregressive("categorical", 3)
    with pytest.raises(ValueError, match="categorical needs 8-bit"):
        likelihood.check(torch.full((1, 3, 2, 2), 0.5))
    with pytest.raises(ValueError, match="autoregressive categorical takes outputs"):
        likelihood.log_prob(randn(2, 6, 4, 4), grey_values(2, 1, 4, 4))
    for field, value in (("channels", 0), ("layers", 0), ("kernel_size", 4), ("kernel_size", 1),
                         ("dropout", 1.0), ("dropout", -0.1)):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field} must"):
            AutoregressiveConfig(**{field: value})


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_shared_by_all_images_give_what_each_pair_gives(name, dtype):
    """By a matrix product, also under autocast and with one image."""
    likelihood = make_likelihood(name, 3, variance=0.1)
    outputs = torch.randn(6, 1, 3, 8, 8, dtype=dtype)
    images = torch.rand(4, 3, 8, 8, dtype=dtype).round()
    pairs = outputs.expand(-1, 4, -1, -1, -1)
    expected = likelihood.log_prob(pairs.double(), images.double())
    tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 0}
    with torch.autocast("cpu", torch.bfloat16):
        found = likelihood.log_prob(outputs, images)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **tolerance)
    one = likelihood.log_prob(outputs, images[:1])
    torch.testing.assert_close(one.double(), expected[:, :1], **tolerance)
