"""How probable a VQ-VAE and its priors find images: a bound on the likelihood, and a code length.

    log p(x) >= log p(x|z_q(x)) + sum over levels of log p(codes of the level | coarser levels)

for 8-bit images x: the likelihood is a sum over all codes there are, and the right side is one of
its terms, that of the image's own codes. p(x|z_q) is a discretized logistic around the
reconstruction (Salimans et al. 2017, eq. 2, one component) with one scale for all pixels and
channels, fitted to training images. The second part alone is the length of the codes; it says
nothing of the pixels, so its bits per dimension are no bits/dim.

All in nats per image, sums over pixels, channels and codes. Priors that know a class or attributes
bound log p(x) where these are hidden from them, and log p(x|y) where they are given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from pipeline.data.images import ImageSet
from pipeline.evaluation import pictures
from pipeline.evaluation.sets import batches_of
from pipeline.models.blocks import true_fp32
from pipeline.models.priors.prior import Prior
from pipeline.models.priors.sampling import log_likelihood
from pipeline.models.vae.likelihoods import LogisticMixture
from pipeline.models.vqvae import VQVAE

LOG_SCALES = (-7.0, 2.0)  # the fit's bounds: a ninth of a grey value, flatter than all pixels


def logistic_nats(means: torch.Tensor, images: torch.Tensor, log_scale: float) -> torch.Tensor:
    """-log p(x) in nats (B,) of 8-bit images under discretized logistics of one scale.

    Args:
        means: (B, C, H, W), pixels about [0, 1], not clamped.
        images: (B, C, H, W), 8-bit values / 255.
        log_scale: of pixels from -1 to 1, as in Salimans et al. 2017, eq. 2 with one component.
    """
    logistic = LogisticMixture(images.shape[1], mixtures=1)
    batch, channels, *grid = means.shape
    weight, log_scales = means.new_zeros(batch, 1, *grid), torch.full_like(means, log_scale)
    pairs = means.new_zeros(batch, channels * (channels - 1) // 2, *grid)  # channels independent
    return -logistic.log_prob(torch.cat([weight, 2 * means - 1, log_scales, pairs], 1), images)


@torch.no_grad()
def fit_log_scale(
    model: VQVAE, images: ImageSet, indices: np.ndarray, device: torch.device
) -> float:
    """The log scale under which the images at `indices` are most probable given their codes."""
    batches = [pictures.to_unit(batch, device) for batch in batches_of(images, indices)]
    pairs = [(model(batch).reconstructions.float(), batch) for batch in batches]

    def nats(log_scale: float) -> float:
        return sum(float(logistic_nats(*pair, log_scale).double().sum()) for pair in pairs)

    found: Any = minimize_scalar(nats, bounds=LOG_SCALES, method="bounded", options={"xatol": 1e-3})
    return float(found.x)


@true_fp32()
def code_nats(
    priors: Sequence[Prior],
    codes: Sequence[torch.Tensor],
    labels: torch.Tensor | None = None,
    attributes: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log p(codes of a level | coarser levels), or given y, too, of B images: (B, levels) float64
    nats.

    Args:
        priors: coarse to fine, each given the codes of all coarser levels, in eval mode; fewer
            than there are levels leave the finest out.
        codes: per level (B, h, w) int64, coarse to fine.
        labels: (B,) int64; None = hidden.
        attributes: (B, A) of -1, +1, or 0 = unknown; None = hidden.
    """
    nats = codes[0].new_zeros(len(codes[0]), len(priors), dtype=torch.float64)
    for level, prior in enumerate(priors):
        condition = prior.condition(len(nats), codes[:level], labels, attributes)
        nats[:, level] = -log_likelihood(prior, codes[level], condition).double().sum((1, 2))
    return nats


def knows_y(priors: Sequence[Prior]) -> bool:
    """True if a prior is conditioned on a class or on attributes."""
    return any(prior.config.num_classes or prior.config.num_attributes for prior in priors)


class ImageNats(NamedTuple):
    """Of N images, (N,) float64 each, on the CPU."""

    pixels: torch.Tensor
    """-log p(x|z_q(x))."""
    codes: torch.Tensor
    """-log p(codes), class and attributes hidden; 0 without priors."""
    codes_given_y: torch.Tensor
    """-log p(codes|y), y the image's own class and attributes; `codes`, if no prior knows them."""


@torch.no_grad()
def image_nats(
    model: VQVAE,
    priors: Sequence[Prior],
    log_scale: float,
    images: ImageSet,
    indices: np.ndarray,
    device: torch.device,
) -> ImageNats:
    """The parts of the bound for the images at `indices`."""
    parts, start = [], 0
    for batch in batches_of(images, indices):
        unit, chosen = pictures.to_unit(batch, device), indices[start : start + len(batch)]
        start += len(batch)
        labels, attributes = (
            torch.from_numpy(each[chosen]).to(device) for each in (images.labels, images.attributes)
        )
        output = model(unit)
        pixels = logistic_nats(output.reconstructions.float(), unit, log_scale).double()
        codes = code_nats(priors, output.codes).sum(1)
        given_y = codes
        if knows_y(priors):
            given_y = code_nats(priors, output.codes, labels, attributes).sum(1)
        parts.append((pixels, codes, given_y))
    return ImageNats(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
