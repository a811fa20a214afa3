"""The figures of a trained VAE: likelihood, information in the latent, what can be read from it.

All likelihoods and informations are in nats per image. With variational dequantization u takes
part in the importance weights as z does: log P(x) >= log mean p(y|z) p(z) / q(z|x) q(u|x).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.binarize import binarize
from pipeline.data.faces import SOMETIMES_HIDDEN
from pipeline.data.images import ImageSet
from pipeline.evaluation import information, latents, pictures
from pipeline.evaluation.information import Estimate, mean_with_error
from pipeline.evaluation.likelihood import (
    Kind,
    bits_per_dim,
    chunk_size,
    importance_log_likelihood,
)
from pipeline.models.vae.distributions import DiagonalGaussian, concatenate
from pipeline.models.vae.objectives import MAX_BITS, all_bits
from pipeline.models.vae.vae import VAE
from pipeline.training.tracking import progress_bar

BATCH_SIZE = 50
SOME = 64  # images that an autoregressive decoder, which goes pixel by pixel, reconstructs
COSTLY_SAMPLES = 200  # z scored under all N posteriors where that takes an inversion of the flow


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings:
    """How the likelihood is estimated."""

    num_samples: int = 5_000
    """Samples per image, of importance sampling with the encoder and of prior Monte Carlo."""
    num_images: int = 100
    """Images whose likelihood is estimated, the first of the split."""
    memory_limit_mib: float = 1_024.0
    """Memory for the samples decoded at once."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_images", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"likelihood.{name} must be at least {least}")
        if self.memory_limit_mib <= 0:
            raise ValueError("likelihood.memory_limit_mib must be positive")


class Split(NamedTuple):
    """A split as the model sees it."""

    model: VAE
    images: ImageSet
    binarized: bool
    device: torch.device

    def batch(self, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, S, S) and conditions y (B, E); binarized alike at every call."""
        batch = pictures.to_unit(self.images[where], self.device)
        if self.binarized:
            batch = binarize(batch, range(where.start, where.stop), seed=0)
        return batch, conditions(self.model, self.images, where)

    def batches(self, count: int, size: int = BATCH_SIZE) -> Iterator[tuple]:
        """The first `count` images in batches."""
        for start in range(0, count, size):
            yield self.batch(slice(start, min(start + size, count)))


def conditions(model: VAE, images: ImageSet, where: slice | np.ndarray) -> torch.Tensor:
    """y (N, E) of the images at these places; E = 0 without a condition."""
    device, labels = model.to_posterior.weight.device, images.labels[where]
    return model.condition(
        len(labels),
        torch.from_numpy(labels).to(device),
        torch.from_numpy(images.attributes[where]).to(device),
    )


Figures = dict[str, dict[str, Any]]


def figure(estimate: Estimate | float, count: int) -> dict[str, Any]:
    """An entry of the report."""
    if isinstance(estimate, Estimate):
        return {"value": estimate.value, "standard_error": estimate.standard_error, "count": count}
    return {"value": float(estimate), "standard_error": None, "count": count}


@torch.no_grad()
def posterior_means(split: Split, count: int) -> np.ndarray:
    """Means of q(z|x) of the first images, (count, D)."""
    means = [split.model.posterior(*batch).mean for batch in split.batches(count)]
    return torch.cat(means).float().cpu().numpy()


@torch.no_grad()
def reconstruction_figures(split: Split, seed: int) -> Figures:
    """-log p(x|z) of one z per image; squared error in [0, 1] of the mean reconstruction, and PSNR;
    over the whole split."""
    torch.manual_seed(seed)
    model, errors, nats = split.model, [], []
    for number, (images, y) in enumerate(split.batches(len(split.images))):
        posterior = model.posterior(images, y)
        log_likelihood = _log_likelihood(model, images, posterior.draw(1)[0], y)[0]
        nats.append(-log_likelihood.double().cpu())
        if model.config.context_layers and number * BATCH_SIZE >= SOME:
            continue
        reconstructions = model.decode_mean(posterior.mean, y).clamp(0, 1)
        errors.append((reconstructions - images).square().mean((1, 2, 3)).double().cpu())
    mse = torch.cat(errors)
    psnr = -10 * mse.clamp(min=1e-10).log10()
    return {
        "reconstruction": figure(mean_with_error(torch.cat(nats)), len(split.images)),
        "mse": figure(mean_with_error(mse), len(mse)),
        "psnr": figure(mean_with_error(psnr), len(mse)),
    }


def likelihood_figures(
    split: Split, settings: LikelihoodSettings, seed: int
) -> tuple[Figures, dict[str, list[float]]]:
    """-log p(x) by importance sampling and by prior Monte Carlo, -ELBO, and the gap between; beside
    the figures both bounds of each image, in order and to six digits, by which two models can be
    compared on the same images. ValueError where the model has no likelihood."""
    kind = density_kind(split)
    model, count = split.model, min(settings.num_images, len(split.images))
    chunk = chunk_size(settings.num_samples, 1, bytes_per_sample(model), settings.memory_limit_mib)
    found: list[dict[str, torch.Tensor]] = []  # of each image
    countable = model.config.posterior == "bernoulli" and model.config.latent_dim <= MAX_BITS
    torch.manual_seed(seed)
    bar = progress_bar(count, f"likelihood, {settings.num_samples} samples")
    for images, y in split.batches(count, size=1):
        estimate = importance_log_likelihood(
            _encoder_weights(model, images, y), settings.num_samples, chunk
        )
        from_prior = importance_log_likelihood(
            _prior_weights(model, images, y), settings.num_samples, chunk
        )
        values = {
            "negative_elbo": -estimate.elbo,
            "nll_importance": -estimate.log_likelihood,
            "nll_prior": -from_prior.log_likelihood,
            "inference_gap": estimate.inference_gap,
            "effective_sample_size": estimate.effective_sample_size,
        }
        if countable:
            values["nll_exact"] = -_log_sum_over_bits(model, images, y, chunk)
        found.append(values)
        bar.update(1)
    bar.close()
    joined = {name: torch.cat([values[name] for values in found]).cpu() for name in found[0]}
    per_image = {
        name: [float(f"{nats:.6g}") for nats in joined[name].tolist()]
        for name in ("negative_elbo", "nll_importance")
    }
    sizes = joined.pop("effective_sample_size")
    means = {name: mean_with_error(nats) for name, nats in joined.items()}
    if kind != "density":
        dims = model.config.in_channels * model.config.image_size**2
        for prefix, bound in (("elbo_", "negative_elbo"), ("", "nll_importance")):
            nats, error = means[bound]
            bits = Estimate(bits_per_dim(nats, dims, kind), error / (dims * math.log(2)))
            means[f"{prefix}bits_per_dim"] = bits
    figures = {name: figure(mean, count) for name, mean in means.items()}
    figures["effective_sample_size"] = figure(float(np.median(sizes)), count)
    return figures, per_image


def bytes_per_sample(model: VAE) -> int:
    """What decoding and scoring one sample of one image takes, about (measured at 64 px)."""
    likelihood, config = model.likelihood, model.config
    base = getattr(likelihood, "base", likelihood)
    channels = 8 * likelihood.num_outputs + 4 * base.num_outputs + config.channels
    if config.dequantization == "variational":
        channels += 256
    return 4 * channels * config.image_size**2


def density_kind(split: Split) -> Kind:
    """What the model's likelihood is of: see `bits_per_dim`. ValueError where it is none."""
    support = split.model.likelihood.support
    if support == "binary":
        if not split.binarized:
            raise ValueError(
                "a Bernoulli of grey values is a cross-entropy, not a likelihood: train with "
                "--binarize"
            )
        return "binary"
    if support == "density" and split.model.config.dequantization != "none":
        return "dequantized"
    return "8bit" if support == "8bit" else "density"


def _encoder_weights(model: VAE, images: torch.Tensor, y: torch.Tensor) -> Callable:
    """k -> log p(x|z) p(z) / q(z|x) (k, B), u of the dequantization drawn along with z."""
    posterior, prior = model.posterior(images, y), model.prior(y)

    def log_weights(k: int) -> torch.Tensor:
        z, log_q = posterior.draw(k)
        return _log_likelihood(model, images, z, y) + prior.log_prob(z) - log_q

    return log_weights


def _prior_weights(model: VAE, images: torch.Tensor, y: torch.Tensor) -> Callable:
    """k -> log p(x|z) (k, B), z from the prior."""
    prior = model.prior(y)
    return lambda k: _log_likelihood(model, images, prior.draw(k)[0], y)


@torch.no_grad()
def _log_sum_over_bits(model: VAE, images: torch.Tensor, y: torch.Tensor, chunk: int):
    """log p(x) (B,) by enumeration of all bit vectors."""
    prior = model.prior(y)
    parts = []
    for bits in all_bits(model.config.latent_dim).split(chunk):
        z = bits.to(images)[:, None].expand(-1, len(images), -1)
        log_joint = _log_likelihood(model, images, z, y) + prior.log_prob(z)
        parts.append(log_joint.double().logsumexp(0))
    return torch.stack(parts).logsumexp(0)


def _log_likelihood(model: VAE, images: torch.Tensor, z: torch.Tensor, y: torch.Tensor):
    """log p(y|z) - log q(u|x), each sample with a u of its own, (k, B)."""
    if model.config.dequantization == "none":
        return model.log_likelihood(images, z, y)
    repeated = images.expand(len(z), *images.shape).flatten(0, 1)
    targets, log_u = model.dequantizer(repeated)
    targets = targets.unflatten(0, z.shape[:2])
    return model.log_likelihood(targets, z, y) - log_u.unflatten(0, z.shape[:2])


@torch.no_grad()
def information_figures(split: Split, seed: int) -> Figures:
    """KL, I_q and KL(q(z)||p(z)) with q(z) from all posteriors of the split; the Barber-Agakov
    bound of the model's own joint, as many draws. With a condition p(z) is the mean of p(z|y)."""
    model, count = split.model, len(split.images)
    torch.manual_seed(seed)
    posterior = posterior_of(split)
    y = conditions(model, split.images, slice(0, count))
    prior = model.prior(y)
    z = posterior.draw(1)[0][0]  # (N, D)
    chosen = torch.arange(count, device=z.device)
    if isinstance(posterior, DiagonalGaussian):
        log_q = information.diagonal_gaussian_log_q(posterior.mean, posterior.log_variance)
    else:
        if model.flow is not None:
            chosen = chosen[:COSTLY_SAMPLES]
        log_q = lambda z: posterior.log_prob(z[:, None].expand(-1, count, -1))  # noqa: E731
    if model.config.prior == "learned":  # p(z) is the mean of p(z|y) over the conditions
        log_prior = lambda z: prior.log_prob(z[:, None]).logsumexp(1) - math.log(count)  # noqa: E731
    else:
        log_prior = lambda z: prior.log_prob(z[:, None])[:, 0]  # noqa: E731
    found = information.aggregate_information(z[chosen], chosen, log_q, log_prior, chunk=16)

    z, log_prior_z = prior.draw(1)
    log_posterior = []
    for part in chosen.split(BATCH_SIZE):
        drawn = model.decode_draw(z[0][part], y[part])
        log_posterior.append(model.posterior(drawn, y[part]).log_prob(z[:, part])[0])
    bound = information.barber_agakov(torch.cat(log_posterior), -log_prior_z[0][chosen])
    means = posterior.mean
    return {
        "kl": figure(found.kl, len(chosen)),
        "information": figure(found.information, len(chosen)),
        "information_ceiling": figure(found.ceiling, count),
        "marginal_kl": figure(found.marginal_kl, len(chosen)),
        "barber_agakov": figure(bound, len(chosen)),
        "active_units": figure(information.active_units(means), count),
    }


@torch.no_grad()
def posterior_of(split: Split) -> Any:
    """q(z|x) of the whole split, as one distribution."""
    batches = split.batches(len(split.images))
    return concatenate([split.model.posterior(*batch) for batch in batches])


def latent_figures(train: Split, valid: Split, train_count: int, seed: int) -> Figures:
    """What a linear probe reads of the attributes (or classes), what MIG and DCI say where the true
    factors are known, and how far the latents are from N(0, I).

    MIG and DCI are over the factors that every image shows: without SOMETIMES_HIDDEN of the drawn
    faces, since what is not in an image cannot be in its latent, whatever the model.
    """
    count = len(valid.images)
    learned, held_out = posterior_means(train, train_count), posterior_means(valid, count)
    attributes = [targets_of(train.images)[:train_count], targets_of(valid.images)]
    shown = [name not in SOMETIMES_HIDDEN for name in train.images.index.factor_names]
    factors = [train.images.factors[:train_count, shown], valid.images.factors[:, shown]]
    figures: Figures = {}
    try:
        if attributes[0].shape[1]:
            probe = latents.linear_probe(learned, attributes[0], held_out, attributes[1])
            figures["probe_average_precision"] = figure(probe.mean_average_precision, count)
            figures["probe_balanced_accuracy"] = figure(probe.mean_balanced_accuracy, count)
    except ValueError as error:
        print(f"no probe: {error}")
    if factors[0].shape[1] and learned.shape[1] > 1:  # a gap is between two latents
        gap = latents.mutual_information_gap(learned, factors[0])
        figures["mig"] = figure(gap.mean, train_count)
        found = latents.dci(learned, factors[0], held_out, factors[1], seed)
        figures["dci_disentanglement"] = figure(found.disentanglement, count)
        figures["dci_completeness"] = figure(found.completeness, count)
        figures["dci_informativeness"] = figure(found.informativeness, count)
    config = train.model.config
    if config.posterior != "bernoulli" and config.prior == "standard":
        torch.manual_seed(seed)
        with torch.no_grad():  # one z of each image: draws of q(z), not its means
            z = posterior_of(valid).draw(1)[0][0].float().cpu().numpy()
        floor = np.random.default_rng(seed).standard_normal(z.shape)
        for name, points in (("wasserstein", z), ("wasserstein_floor", floor)):
            distance = latents.wasserstein_to_prior(points, seed=seed)
            figures[f"{name}_gaussian"] = figure(distance.gaussian, count)
            figures[f"{name}_sliced"] = figure(distance.sliced, count)
    return figures


def targets_of(images: ImageSet) -> np.ndarray:
    """What a probe predicts, (N, A) in {-1, 0, +1}: the attributes, or each class against the
    others."""
    if images.attributes.shape[1] or not images.index.class_names:
        return images.attributes
    classes = np.arange(len(images.index.class_names))
    return np.where(images.labels[:, None] == classes, 1, -1).astype(np.int8)
