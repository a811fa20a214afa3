"""Decoder likelihoods p(x|z): what a decoder's outputs mean, as a density or a mass over images.

    log p(x|z) = sum over pixels and channels, in nats, with every constant

Images x are (..., C, H, W): 8-bit values / 255, or, dequantized, (8-bit value + u) / 256. A
decoder gives `num_outputs` channels a pixel, (..., num_outputs, H, W). Leading dimensions
broadcast: outputs of m samples (m, B, ...) take images (B, ...). The arithmetic is in float32, or
in float64 where that comes in; autocast's half precision is converted up first.
"""

import math
from typing import Literal

import torch
from torch import distributions, nn
from torch.nn import functional as F

from pipeline.models.blocks import full_precision

LikelihoodName = Literal[
    "gaussian",
    "gaussian_global",
    "gaussian_pixel",
    "laplace",
    "bernoulli",
    "categorical",
    "logistic_mixture",
]
Support = Literal["density", "8bit", "binary"]

# A standard deviation of 0.01, or 2.6 grey values. Without a floor, pixels that are the same in all
# images (the border of MNIST) raise a learned density without bound; with it by at most 3.7 nats.
VARIANCE_FLOOR = 1e-4


class Likelihood(nn.Module):
    """p(x|z) of the images, given a decoder's outputs. Pixels are independent given the outputs,
    unless a subclass says otherwise."""

    name: str
    support: Support
    """density: of continuous x; 8bit: a mass on x·255 in 0..255; binary: a mass on {0, 1}."""

    def __init__(self, channels: int, num_outputs: int):
        super().__init__()
        self.channels = channels
        self.num_outputs = num_outputs

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """log p(x|z) in nats; outputs (..., num_outputs, H, W), x (..., C, H, W) -> (...)."""
        raise NotImplementedError

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """E[x|z] in the units of x; outputs (..., num_outputs, H, W) -> (..., C, H, W)."""
        raise NotImplementedError

    def sample(self, outputs: torch.Tensor) -> torch.Tensor:
        """One draw from p(x|z) by torch's global generator; same shapes as `mean`."""
        raise NotImplementedError

    def check(self, x: torch.Tensor) -> None:
        """ValueError where images (..., C, H, W) are not what this likelihood is of."""
        if x.shape[-3] != self.channels:
            raise ValueError(f"{self.name} is set to {self.channels} channels, got {x.shape[-3]}")

    def _matched(self, outputs: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in float32 or better. Only leading dimensions may broadcast: a grey image against
        colour outputs would give a number, and a wrong one."""
        grid = outputs.shape[-2:]
        if outputs.shape[-3] != self.num_outputs or x.shape[-3:] != (self.channels, *grid):
            raise ValueError(
                f"{self.name} takes outputs (..., {self.num_outputs}, H, W) and images (..., "
                f"{self.channels}, H, W), got {tuple(outputs.shape)} and {tuple(x.shape)}"
            )
        return full_precision(outputs), full_precision(x)


class _Independent(Likelihood):
    """Every pixel and channel has a distribution of its own."""

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        """outputs (..., num_outputs, H, W) -> a distribution of shape (..., C, H, W)."""
        raise NotImplementedError

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        outputs, x = self._matched(outputs, x)
        return self.distribution(outputs).log_prob(x).sum((-3, -2, -1))

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.distribution(full_precision(outputs)).mean

    @torch.no_grad()
    def sample(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.distribution(full_precision(outputs)).sample()


def is_shared(outputs: torch.Tensor, x: torch.Tensor) -> bool:
    """True for outputs (S, 1, O, H, W) against images (B, C, H, W): all S·B pairs, of which a
    matrix product makes far less work than a tensor of all their pixels."""
    return outputs.dim() == 5 and outputs.shape[1] == 1 and x.dim() == 4


def all_pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of (S, d) and (B, d), (S, B), in full precision also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def centred(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs about [-1, 1] -> pixels about [0, 1], not clamped."""
    return (outputs + 1) / 2


class Gaussian(_Independent):
    """Fixed variance s²: log p = -SSE / (2 s²) - d/2 ln(2 pi s²), with s² = 1/2 that is
    -(SSE + d/2 ln pi)."""

    name, support = "gaussian", "density"

    def __init__(self, channels: int, variance: float):
        super().__init__(channels, num_outputs=channels)
        self.scale = math.sqrt(variance)

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        return distributions.Normal(centred(outputs), self.scale, validate_args=False)

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not is_shared(outputs, x):
            return super().log_prob(outputs, x)
        outputs, x = self._matched(outputs, x)
        centre = x.mean(0)  # the square below is expanded, so numbers should be small
        means, pixels = (centred(outputs) - centre).flatten(1), (x - centre).flatten(1)
        squares = means.square().sum(1, keepdim=True) + pixels.square().sum(1)
        squares = squares - 2 * all_pairs(means, pixels)  # (S, B)
        variance = self.scale**2
        return -0.5 * (squares / variance + pixels.shape[1] * math.log(2 * math.pi * variance))


class GlobalGaussian(_Independent):
    """One learned variance for all pixels: floor + variance · exp(parameter), parameter 0 at first.

    The σ-VAE of Rybkin et al. 2021, whose soft clip of the log variance from below this is."""

    name, support = "gaussian_global", "density"

    def __init__(self, channels: int, variance: float, floor: float):
        super().__init__(channels, num_outputs=channels)
        self.initial, self.floor = variance, floor
        self.log_variance = nn.Parameter(torch.zeros(()))

    @property
    def variance(self) -> torch.Tensor:
        """The variance as it is now, a scalar."""
        return self.floor + self.initial * self.log_variance.exp()

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        scale = self.variance.sqrt().to(outputs.dtype)
        return distributions.Normal(centred(outputs), scale, validate_args=False)


class PixelGaussian(_Independent):
    """A variance for each pixel and channel, floor + variance · exp(output): the first C outputs
    are the means, the others the variances."""

    name, support = "gaussian_pixel", "density"

    def __init__(self, channels: int, variance: float, floor: float):
        super().__init__(channels, num_outputs=2 * channels)
        self.initial, self.floor = variance, floor

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        mean, log_variance = outputs.chunk(2, dim=-3)
        scale = (self.floor + self.initial * log_variance.exp()).sqrt()
        return distributions.Normal(centred(mean), scale, validate_args=False)


class Laplace(_Independent):
    """Fixed scale b: log p = -|x - mean| / b - ln 2b, with the variance 2 b² as given."""

    name, support = "laplace", "density"

    def __init__(self, channels: int, variance: float):
        super().__init__(channels, num_outputs=channels)
        self.scale = math.sqrt(variance / 2)

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        return distributions.Laplace(centred(outputs), self.scale, validate_args=False)


class Bernoulli(_Independent):
    """log p = x ln p + (1 - x) ln(1 - p), outputs the logits of p.

    It is a mass only of x in {0, 1}. For x between, as grey MNIST, it is the customary cross
    entropy, which is no likelihood of anything: binarize first to report it."""

    name, support = "bernoulli", "binary"

    def __init__(self, channels: int):
        super().__init__(channels, num_outputs=channels)

    def distribution(self, outputs: torch.Tensor) -> distributions.Distribution:
        return distributions.Bernoulli(logits=outputs, validate_args=False)

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not is_shared(outputs, x):
            return super().log_prob(outputs, x)
        outputs, x = self._matched(outputs, x)
        logits = outputs.flatten(1)
        return all_pairs(logits, x.flatten(1)) - F.softplus(logits).sum(1, keepdim=True)

    def check(self, x: torch.Tensor) -> None:
        super().check(x)
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(
                f"bernoulli needs pixels in [0, 1], got {x.min():.3g} to {x.max():.3g}: "
                "scale them, or choose gaussian"
            )


class _EightBit(Likelihood):
    """A mass on the 256 values of each channel."""

    support = "8bit"

    def check(self, x: torch.Tensor) -> None:
        super().check(x)
        values = full_precision(x) * 255
        whole = (values - values.round()).abs() <= 1e-3
        if not (whole & (values > -0.5) & (values < 255.5)).all():
            raise ValueError(
                f"{self.name} needs 8-bit pixels, x·255 whole and in 0..255: "
                "leave out the dequantization or resizing, or choose a density as gaussian"
            )


class Categorical(_EightBit):
    """A 256-way softmax per pixel and channel; output c·256 + v is the logit of value v."""

    name = "categorical"

    def __init__(self, channels: int):
        super().__init__(channels, num_outputs=256 * channels)

    def distribution(self, outputs: torch.Tensor) -> distributions.Categorical:
        """outputs (..., 256 C, H, W) -> a distribution over 0..255 of shape (..., C, H, W)."""
        logits = outputs.unflatten(-3, (self.channels, 256)).movedim(-3, -1)
        return distributions.Categorical(logits=logits, validate_args=False)

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        outputs, x = self._matched(outputs, x)
        return self.distribution(outputs).log_prob((x * 255).round()).sum((-3, -2, -1))

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        outputs = full_precision(outputs)
        values = torch.arange(256, dtype=outputs.dtype, device=outputs.device) / 255
        return (self.distribution(outputs).probs * values).sum(-1)  # autocast would halve a matmul

    @torch.no_grad()
    def sample(self, outputs: torch.Tensor) -> torch.Tensor:
        outputs = full_precision(outputs)
        return self.distribution(outputs).sample().to(outputs.dtype) / 255


class LogisticMixture(_EightBit):
    """The discretized logistic mixture of PixelCNN++ (Salimans et al. 2017, eq. 2 and 3).

        p(x) = sum over k of pi_k · product over channels c of [F((x_c + h - m_kc) / s_kc)
                                                              - F((x_c - h - m_kc) / s_kc)]

    with F the logistic function and h half a grey value; F is 1 above 255 and 0 below 0. The mean
    m_kc is linear in the channels before c of the same pixel: green sees red, blue sees both.
    Means and scales are in pixels from -1 to 1. Outputs, K of each: weights' logits, means and log
    scales per channel, coefficients (before tanh) per pair (1,0), (2,0), (2,1), ...
    """

    name = "logistic_mixture"

    def __init__(self, channels: int, mixtures: int):
        pairs = channels * (channels - 1) // 2
        super().__init__(channels, num_outputs=mixtures * (1 + 2 * channels + pairs))
        self.kinds = (1, channels, channels, pairs)  # of outputs, K of each

    def _split(self, outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (..., 1, K, H, W), means and log scales (..., C, K, H, W), coefficients
        (..., pairs, K, H, W)."""
        grouped = full_precision(outputs).unflatten(-3, (sum(self.kinds), -1))
        logits, means, log_scales, coefficients = grouped.split(self.kinds, dim=-4)
        # from the paper's floor, a ninth of a grey value, to a scale that is flat on the pixels
        return logits, means, log_scales.clamp(-7, 7), coefficients.tanh()

    def _mean_of_channel(
        self, c: int, means: torch.Tensor, coefficients: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 3: m_kc, given the channels of x (..., C, 1 or K, H, W) before c; (..., K, H, W)."""
        first = c * (c - 1) // 2
        earlier = 2 * x[..., :c, :, :, :] - 1
        depends = coefficients[..., first : first + c, :, :, :] * earlier
        return means[..., c, :, :, :] + depends.sum(-4)

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        outputs, x = self._matched(outputs, x)
        logits, means, log_scales, coefficients = self._split(outputs)
        value = (x * 255).round().unsqueeze(-3)  # (..., C, 1, H, W)
        given = [
            self._mean_of_channel(c, means, coefficients, value / 255) for c in range(self.channels)
        ]
        distance = value / 127.5 - 1 - torch.stack(given, -4)
        inverse = torch.exp(-log_scales)
        # F(a) - F(b) = F(a) · F(-b) · (1 - e^(b - a)), with a - b of two half grey values: exact in
        # the tails too, where the difference itself is 0 in floating point
        below_top = F.logsigmoid(inverse * (distance + 1 / 255))
        above_bottom = F.logsigmoid(inverse * (1 / 255 - distance))
        between = torch.log(-torch.expm1(-2 / 255 * inverse))
        log_mass = torch.where(value < 255, below_top, 0) + torch.where(value > 0, above_bottom, 0)
        log_mass = log_mass + torch.where((value > 0) & (value < 255), between, 0)
        log_joint = logits.squeeze(-4).log_softmax(-3) + log_mass.sum(-4)  # (..., K, H, W)
        return log_joint.logsumexp(-3).sum((-2, -1))

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """Each logistic's mean clipped to the range of pixels, as an integral (within half a grey
        value of the rounded one's); the linear dependence takes the component's mean of the earlier
        channels, which is exact where those do not saturate at 0 or 255."""
        logits, means, log_scales, coefficients = self._split(outputs)
        scales = log_scales.exp()
        x = means[..., :0, :, :, :]  # (..., channels so far, K, H, W)
        for c in range(self.channels):
            m, s = self._mean_of_channel(c, means, coefficients, x), scales[..., c, :, :, :]
            # E[clip(y, -1, 1)] = -1 + integral of P(y > u) over u from -1 to 1
            clipped = s * (F.softplus((m + 1) / s) - F.softplus((m - 1) / s)) / 2
            x = torch.cat([x, clipped.unsqueeze(-4)], -4)
        return (logits.softmax(-3) * x).sum(-3)

    @torch.no_grad()
    def sample(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rounded to 8-bit values, so that the frequencies are the mass."""
        logits, means, log_scales, coefficients = self._split(outputs)
        component = distributions.Categorical(logits=logits.movedim(-3, -1), validate_args=False)
        chosen = component.sample().unsqueeze(-3)  # (..., 1, 1, H, W)
        means, log_scales, coefficients = (
            each.take_along_dim(chosen, -3) for each in (means, log_scales, coefficients)
        )
        x = means[..., :0, :, :, :]  # (..., channels so far, 1, H, W)
        for c in range(self.channels):
            m = self._mean_of_channel(c, means, coefficients, x)
            y = m + log_scales[..., c, :, :, :].exp() * torch.rand_like(m).logit()
            drawn = ((y + 1) * 127.5).round().clamp(0, 255) / 255
            x = torch.cat([x, drawn.unsqueeze(-4)], -4)
        return x.squeeze(-3)


def make_likelihood(
    name: LikelihoodName,
    channels: int,
    variance: float = 0.5,
    mixtures: int = 10,
    floor: float = VARIANCE_FLOOR,
) -> Likelihood:
    """The likelihood of that name, for images of `channels` channels.

    Args:
        variance: of gaussian and laplace, in pixels of [0, 1]; where gaussian_global and
            gaussian_pixel start.
        mixtures: components of logistic_mixture.
        floor: least variance of gaussian_global and gaussian_pixel.
    """
    for size, value in (("channels", channels), ("mixtures", mixtures)):
        if value < 1:
            raise ValueError(f"{size} must be at least 1, got {value}")
    for size, value in (("variance", variance), ("floor", floor)):
        if not 0 < value < math.inf:
            raise ValueError(f"{size} must be above 0 and finite, got {value}")
    makers = {
        "gaussian": lambda: Gaussian(channels, variance),
        "gaussian_global": lambda: GlobalGaussian(channels, variance, floor),
        "gaussian_pixel": lambda: PixelGaussian(channels, variance, floor),
        "laplace": lambda: Laplace(channels, variance),
        "bernoulli": lambda: Bernoulli(channels),
        "categorical": lambda: Categorical(channels),
        "logistic_mixture": lambda: LogisticMixture(channels, mixtures),
    }
    if name not in makers:
        raise ValueError(f"likelihood must be one of {', '.join(makers)}, got {name}")
    return makers[name]()
