"""What the latent of a VAE carries, in nats: aggregate posterior, active units, Barber-Agakov.

Two informations, and they differ. I_q is the encoder's: between the index of one of N images and
z ~ q(z|x), under the data. The Barber-Agakov bound is the generative model's: between z and x of
its own joint p(z) p(x|z). A model may have one without the other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.vae.densities import log_mean_exp


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    standard_error: float


def mean_with_error(values: Tensor) -> Estimate:
    """The mean of independent `values` (n,), n >= 2, with its standard error."""
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"values must be (n,) with n >= 2, got {tuple(values.shape)}")
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


class Information(NamedTuple):
    """The KL term of the ELBO in its two parts, kl = information + marginal_kl, and ln N."""

    kl: Estimate
    """Mean over images of KL(q(z|x) || p(z))."""
    information: Estimate
    """I_q = E log q(z|x) - log q(z), at most `ceiling`."""
    marginal_kl: Estimate
    """KL(q(z) || p(z)) = E log q(z) - log p(z)."""
    ceiling: float
    """ln N. `information` near it only says that the N images can be told apart."""


def diagonal_gaussian_log_q(mean: Tensor, log_variance: Tensor) -> Callable[[Tensor], Tensor]:
    """log N(z_s; mean_n, exp(log_variance_n)) of all pairs: a function (S, D) -> (S, N) float64.

    Args:
        mean, log_variance: (N, D). The result is two matrix products, without an (S, N, D) tensor.
            Its error is below 0.001 nats where no standard deviation is below 1e-5 of the distance
            between means.
    """
    centre = mean.double().mean(0)  # near the data, the square below is expanded without loss
    mean, log_variance = mean.double() - centre, log_variance.double()
    precision = (-log_variance).exp()
    scaled = mean * precision
    constant = -0.5 * (mean * scaled + log_variance + math.log(2 * math.pi)).sum(1)  # (N,)

    def log_q(z: Tensor) -> Tensor:
        z = z.double() - centre
        return constant + z @ scaled.T - 0.5 * z.square() @ precision.T

    return log_q


@torch.no_grad()
def aggregate_information(
    samples: Tensor,
    images: Tensor,
    log_q: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    chunk: int = 256,
) -> Information:
    """I_q = E KL(q(z|x) || p) - KL(q(z) || p), by Monte Carlo with q(z) = mean of all N posteriors
    (Hoffman and Johnson 2016, "ELBO surgery").

    q(z) includes the posterior that a sample came from, so I_q is that of the N images, without
    bias and never above ln N. For the distribution these images are from it is biased downwards,
    and `marginal_kl` upwards by as much (the lower bound for a tractable encoder, Poole et al.
    2019): by at most ln(1 + chi²/N), by Jensen's inequality, and by chi²/(2N) for large N, where
    chi² = E q(z|x)/q(z) - 1. Without the own posterior it would be an upper bound.

    Standard errors are for that distribution, from the spread of the images' means; the noise of
    q(z) itself, of order 1/N, is not in them.

    Args:
        samples: z (S, D), of q(z|x) of some or all of the N images.
        images: (S,) int64 in [0, N), the image each sample came from. Each image that occurs
            counts the same; at least 2 must.
        log_q: (s, D) -> (s, N), the log density of each sample under each of the N posteriors.
        log_prior: (s, D) -> (s,).
        chunk: samples per call of these functions.
    """
    own, mixed, prior, num_posteriors = [], [], [], 0
    for z, image in zip(samples.split(chunk), images.split(chunk), strict=True):
        table = log_q(z).double()
        if table.dim() != 2 or len(table) != len(z):
            raise ValueError(
                f"log_q of {len(z)} samples must be ({len(z)}, N), got {tuple(table.shape)}"
            )
        num_posteriors = table.shape[1]
        own.append(table.gather(1, image[:, None])[:, 0])
        mixed.append(log_mean_exp(table, 1))
        prior.append(log_prior(z).double())
    own, mixed, prior = torch.cat(own), torch.cat(mixed), torch.cat(prior)
    _, row, counts = images.unique(return_inverse=True, return_counts=True)

    def over_images(values: Tensor) -> Estimate:
        sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device)
        return mean_with_error(sums.index_add(0, row, values) / counts)

    return Information(
        kl=over_images(own - prior),
        information=over_images(own - mixed),
        marginal_kl=over_images(mixed - prior),
        ceiling=math.log(num_posteriors),
    )


def unit_variances(means: Tensor) -> Tensor:
    """Variance over images of E_q[z] of each unit, (D,) float64, from `means` (N, D), N >= 2.

    ValueError if it is not finite, since an encoder that diverged is not one that collapsed.
    """
    if means.dim() != 2 or len(means) < 2:
        raise ValueError(f"means must be (N, D) with N >= 2, got {tuple(means.shape)}")
    variances = means.double().var(0)
    if not variances.isfinite().all():
        raise ValueError("posterior means are not finite: the encoder has diverged")
    return variances


def active_units(means: Tensor, threshold: float = 0.01) -> int:
    """Units with Var_x E_q(z|x)[z] > threshold (Burda et al. 2016, section 5.2); means (N, D)."""
    return int((unit_variances(means) > threshold).sum())


def standard_normal_entropy(num_dims: int) -> float:
    """Differential entropy of N(0, I) in nats."""
    return 0.5 * num_dims * math.log(2 * math.pi * math.e)


def barber_agakov(log_q: Tensor, entropy: float | Tensor) -> Estimate:
    """I_p(x; z) >= H(z) + E_{p(z) p(x|z)} log q(z|x) (Barber and Agakov 2003, "The IM algorithm").

    The difference is E_p(x) KL(p(z|x) || q(z|x)), so the bound may be negative.

    Args:
        log_q: (S,) log q(z|x) of pairs from the model's own joint: z ~ p(z), then x drawn from
            p(x|z), its noise included; the decoder's mean in place of x is no sample of the joint.
        entropy: H(z) of the prior, such as `standard_normal_entropy(D)`; or, where it has no
            closed form, -log p(z) of the same z, (S,).
    """
    return mean_with_error(log_q.double() + entropy)
