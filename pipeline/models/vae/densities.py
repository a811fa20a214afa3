"""Closed forms of the variational autoencoder: Gaussian densities and divergences, in nats."""

import math

import torch


def log_mean_exp(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """log of the mean of exp(values) over a dimension, without overflow."""
    return values.logsumexp(dim) - math.log(values.shape[dim])


def log_normal(
    z: torch.Tensor, mean: torch.Tensor | float, log_variance: torch.Tensor | float
) -> torch.Tensor:
    """log N(z; mean, exp(log_variance)), summed over the last dimension: (..., D) -> (...)."""
    log_variance = torch.as_tensor(log_variance, dtype=z.dtype, device=z.device)
    squares = (z - mean).square() * (-log_variance).exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)


def gaussian_kl(
    mean0: torch.Tensor, covariance0: torch.Tensor, mean1: torch.Tensor, covariance1: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean0, S0) || N(mean1, S1)) of any two Gaussians, (..., D) and (..., D, D) -> (...).

    1/2 [tr(S1^-1 S0) + Δ' S1^-1 Δ - D + ln det S1 / det S0], Δ = mean1 - mean0.
    """
    root0 = torch.linalg.cholesky(covariance0)
    root1 = torch.linalg.cholesky(covariance1)
    # with L1 L1' = S1: tr(S1^-1 S0) = |L1^-1 L0|^2, Δ' S1^-1 Δ = |L1^-1 Δ|^2
    trace = torch.linalg.solve_triangular(root1, root0, upper=False).square().sum((-2, -1))
    shift = (mean1 - mean0).unsqueeze(-1)
    distance = torch.linalg.solve_triangular(root1, shift, upper=False).square().sum((-2, -1))
    log_ratio = 2 * (_log_diagonal(root1) - _log_diagonal(root0))
    return 0.5 * (trace + distance - mean0.shape[-1] + log_ratio)


def _log_diagonal(root: torch.Tensor) -> torch.Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def diagonal_gaussian_kl(
    mean0: torch.Tensor,
    log_variance0: torch.Tensor,
    mean1: torch.Tensor | float = 0.0,
    log_variance1: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """The same for diagonal covariances, per dimension: (..., D) -> (..., D); the sum is the KL.

    Against N(0, I) this is -1/2 (1 + ln σ² - μ² - σ²) (Kingma & Welling 2014, appendix B).
    """
    log_variance1 = torch.as_tensor(log_variance1, dtype=mean0.dtype, device=mean0.device)
    distance = (mean1 - mean0).square() * (-log_variance1).exp()
    log_ratio = log_variance1 - log_variance0
    return 0.5 * ((-log_ratio).exp() + distance - 1 + log_ratio)


def bernoulli_kl(logits0: torch.Tensor, logits1: torch.Tensor) -> torch.Tensor:
    """KL between Bernoulli variables, elementwise: (...) -> (...)."""
    softplus = torch.nn.functional.softplus
    p = logits0.sigmoid()
    # p (ln p0 - ln p1) + (1 - p)(ln(1 - p0) - ln(1 - p1)), with ln p = l - softplus(l)
    return p * (logits0 - logits1) - softplus(logits0) + softplus(logits1)
