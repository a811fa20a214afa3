"""What a VAE is trained by: the exact likelihood, estimates of it, and bounds on it.

With weights w_i = p(x|z_i) p(z_i) / q(z_i|x) and z_1 ... z_k drawn from q(z|x),

    exact         log p(x) = log sum over z of p(x|z) p(z)          all of at most 2^12 bit vectors
    prior-mc      log mean p(x|z_i), z_i from the prior             no encoder in it
    importance    L_k = log mean w_i, the z_i being fixed           q follows the posterior instead
    elbo          E log p(x|z) - beta KL(q(z|x) || p(z))            Kingma & Welling 2014, eq. 3
    iwae          L_k = log mean w_i, also through the z_i          Burda et al. 2016, eq. 8
    wake-sleep    p by z from q, q by dreams (x, z) from p          Hinton et al. 1995

All in nats per image, sums over pixels and latent dimensions, means over images only. The decoder
and the prior (theta) follow the objective; so does the encoder (phi) in `elbo` and `iwae`. In the
others phi has a loss of its own, which leaves theta alone: cross-entropy to the exact posterior
(exact), to its importance-weighted estimate (importance: Bornschein & Bengio 2015, eq. 9), or to
dreams, z and x both from the model (prior-mc, wake-sleep). So every model can be evaluated by
importance sampling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.models.vae.densities import log_mean_exp
from pipeline.models.vae.mmd import mmd

if TYPE_CHECKING:
    from pipeline.models.vae.vae import VAE

ObjectiveName = Literal["exact", "prior-mc", "importance", "elbo", "iwae", "wake-sleep"]
EncoderGradient = Literal["bound", "elbo", "dreg"]
MAX_BITS = 12  # of z, for the exact likelihood: 4,096 decodings per step


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which objective, and its settings."""

    name: ObjectiveName = "elbo"
    """exact: all bit vectors, each decoded in each step, so memory grows as 2^D; prior-mc: z from
    the prior; importance: weighted z from q; elbo;
    iwae: the k-sample bound; wake-sleep."""
    num_samples: int = 1
    """m or k: samples of z for each image (shared by all images in prior-mc)."""
    beta: float = 1.0
    """Weight of the KL (elbo only); 1 = the bound itself."""
    kl: Literal["closed", "sampled"] = "closed"
    """KL in closed form where there is one, or from the same samples (elbo only)."""
    encoder_gradient: EncoderGradient = "bound"
    """iwae: the encoder follows the k-sample bound, KL(q || p(z|x)) (elbo), or the k-sample bound
    doubly reparameterised (Tucker et al. 2019)."""
    free_bits: float = 0.0
    """Nats of KL per latent dimension, mean over a process's part of the batch, that cost nothing
    (elbo only); where the KL has no closed form, so many times the dimensions for all together."""
    mmd_weight: float = 0.0
    """Weight of MMD(q(z), p(z)) over a process's part of the batch: with posterior delta a WAE."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"objective.num_samples must be at least 1, got {self.num_samples}")
        for name in ("beta", "free_bits", "mmd_weight"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"objective.{name} must not be negative, got {getattr(self, name)}"
                )
        if self.name != "elbo" and (self.beta != 1 or self.free_bits or self.mmd_weight):
            raise ValueError("objective.beta, free_bits and mmd_weight belong to elbo alone")
        if self.name != "elbo" and self.kl != "closed":
            raise ValueError("objective.kl belongs to elbo alone")
        if self.name != "iwae" and self.encoder_gradient != "bound":
            raise ValueError("objective.encoder_gradient belongs to iwae alone")


Values = dict[str, torch.Tensor]


def check_objective(config, objective: Objective) -> None:
    """ValueError, one line, where the model's parts do not allow the objective."""
    if objective.name == "exact" and config.posterior != "bernoulli":
        raise ValueError("objective.name exact needs model.posterior bernoulli, bits to enumerate")
    if objective.name == "exact" and config.latent_dim > MAX_BITS:
        raise ValueError(
            f"objective.name exact needs model.latent_dim of at most {MAX_BITS} bits, got "
            f"{config.latent_dim}"
        )
    if objective.name == "iwae" and config.posterior == "bernoulli":
        raise ValueError("objective.name iwae needs gradients through z: use importance for bits")
    if config.posterior == "delta":
        if objective.name != "elbo":
            raise ValueError(
                f"an AE (posterior delta) has no {objective.name}: objective.name elbo"
            )
        if objective.num_samples > 1 or objective.beta != 1 or objective.free_bits:
            raise ValueError("an AE (posterior delta) has no samples, beta and free_bits to set")
    if config.posterior == "bernoulli" and objective.mmd_weight:
        raise ValueError("objective.mmd_weight needs gradients through z, which bits do not have")
    if objective.name == "exact" and objective.num_samples > 1:
        raise ValueError("objective.name exact takes all bits, so num_samples is 1")
    if objective.encoder_gradient != "bound" and (config.posterior != "gaussian" or config.top_dim):
        raise ValueError("objective.encoder_gradient needs model.posterior gaussian, one layer")
    if objective.name in ("prior-mc", "exact") and config.condition_dim:
        raise ValueError(f"objective.name {objective.name} shares z over images: no condition")


def evaluate(
    model: "VAE", images: torch.Tensor, y: torch.Tensor, objective: Objective, warmup: torch.Tensor
) -> Values:
    """`loss`, a scalar to minimise, and what is reported beside it, scalars in nats per image.

    Args:
        images: (B, C, S, S) 8-bit values / 255; y: (B, E).
        warmup: scalar in [0, 1], which multiplies objective.beta at this moment of the run.
    """
    targets, log_u = model.dequantizer(images)  # log q(u|x) (B,), 0 without a flow
    functions = {
        "exact": exact, "prior-mc": prior_monte_carlo, "importance": importance, "elbo": elbo,
        "iwae": iwae, "wake-sleep": wake_sleep,
    }  # fmt: skip
    return functions[objective.name](model, images, targets, log_u, y, objective, warmup)


def elbo(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """Reconstruction + beta KL, m samples per image. With a delta posterior reconstruction alone,
    and MMD where it has a weight."""
    q, prior = model.posterior(images, y), model.prior(y)
    z, log_q = q.draw(objective.num_samples)
    log_likelihood = model.log_likelihood(targets, z, y) - log_u
    reconstruction = -log_likelihood.mean()
    values = {"reconstruction": reconstruction}
    loss = reconstruction
    if model.config.has_density:
        kl = q.kl(prior) if objective.kl == "closed" else None  # (B, D)
        if kl is None:
            log_ratio = log_q - prior.log_prob(z)  # (m, B)
            per_group = log_ratio.mean()[None]
            floor = objective.free_bits * model.config.vector_dim
        else:
            per_group, floor = kl.mean(0), objective.free_bits
        total = per_group.sum()
        # Kingma et al. 2016, eq. 15: below the floor there is nothing to gain
        charged = per_group.clamp(min=floor).sum() if floor else total
        beta = objective.beta * warmup
        loss = loss + beta * charged
        values |= {"kl": total, "negative_elbo": reconstruction + total}
        if not q.reparameterised:
            costs = -log_likelihood if kl is not None else -log_likelihood + beta * log_ratio
            loss = loss + _score_function(costs.detach(), log_q)
    if objective.mmd_weight:
        distance = mmd(z[0], prior.draw(1)[0][0])
        loss = loss + objective.mmd_weight * distance
        values["mmd"] = distance
    return values | {"loss": loss}


def _score_function(costs: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """0, with the gradient of E_q[cost] by (cost - baseline) ∇ log q, (m, B) each.

    Each sample's baseline is the mean cost of the image's other samples (Kool et al. 2019), or of
    the other images where there is one sample.
    """
    dim = 0 if len(costs) > 1 else 1
    others = costs.shape[dim] - 1
    baseline = (costs.sum(dim, keepdim=True) - costs) / others if others else 0
    surrogate = ((costs - baseline) * log_q).mean()
    return surrogate - surrogate.detach()


def iwae(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """-L_k. What the encoder follows is `encoder_gradient`; decoder and prior follow L_k."""
    q, prior = model.posterior(images, y), model.prior(y)
    z, log_q = q.draw(objective.num_samples)
    if objective.encoder_gradient == "bound":
        log_w = model.log_likelihood(targets, z, y) - log_u + prior.log_prob(z) - log_q
        return _bound_values(log_w, -log_mean_exp(log_w).mean())

    # The gradient at z is taken apart from the rest, so that theta and phi can differ.
    leaf = z.detach().requires_grad_()
    log_joint = model.log_likelihood(targets, leaf, y) - log_u + prior.log_prob(leaf)
    log_w = log_joint - q.detach().log_prob(leaf)
    weights = log_w.detach().softmax(0)
    (slope,) = torch.autograd.grad(log_w.sum(), leaf, retain_graph=True)  # ∂ log w_i / ∂ z_i
    if objective.encoder_gradient == "dreg":  # Tucker et al. 2019, eq. 8
        share = weights.square()
    else:  # the ELBO's gradient through the samples alone (Roeder et al. 2017, eq. 8)
        share = torch.full_like(weights, 1 / objective.num_samples)
    theta = -(weights * log_joint).sum(0).mean()
    phi = -((share[..., None] * slope).detach() * z).sum((0, 2)).mean()
    surrogate = theta + phi
    bound = -log_mean_exp(log_w.detach()).mean()
    return _bound_values(log_w, surrogate - surrogate.detach() + bound)


def importance(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """-L_k for theta, with the samples as they are; for phi the cross-entropy from the weighted
    samples to q: the inclusive KL(p(z|x) || q), so that q covers what the weights need."""
    q = model.posterior(images, y)
    z, log_q = _fixed_draw(q, objective.num_samples)
    log_joint = model.log_likelihood(targets, z, y) - log_u + model.prior(y).log_prob(z)
    log_w = log_joint - log_q.detach()
    weights = log_w.detach().softmax(0)
    phi = -(weights * log_q).sum(0).mean()
    return _bound_values(log_w, _add_silently(-log_mean_exp(log_w).mean(), phi))


def exact(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """-log p(x) by enumeration of z; phi by the cross-entropy from the exact posterior."""
    z = all_bits(model.config.latent_dim).to(targets)[:, None]  # (2^D, 1, D)
    log_joint = model.log_likelihood(targets, z, y) + model.prior(y[:1]).log_prob(z)
    log_px = log_joint.logsumexp(0) - log_u
    posterior = log_joint.detach().softmax(0)
    phi = -(posterior * model.posterior(images, y).log_prob(z)).sum(0).mean()
    return {"loss": _add_silently(-log_px.mean(), phi), "nll": -log_px.mean()}


def prior_monte_carlo(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """-log mean p(x|z_i), z_i from the prior and shared by the batch; phi by dreams."""
    z, log_pz = _fixed_draw(model.prior(y[:1]), objective.num_samples)  # (k, 1, D), (k, 1)
    log_w = model.log_likelihood(targets, z, y) + log_pz - log_pz.detach()  # p(z) learns, too
    log_px = log_mean_exp(log_w) - log_u
    return {"loss": _add_silently(-log_px.mean(), _dream(model, y)), "nll": -log_px.mean()}


def wake_sleep(model, images, targets, log_u, y, objective: Objective, warmup) -> Values:
    """Wake: -E_q log p(x, z) for theta. Sleep: -log q(z|x) of dreams for phi."""
    q = model.posterior(images, y)
    z, log_q = _fixed_draw(q, objective.num_samples)
    log_joint = model.log_likelihood(targets, z, y) - log_u + model.prior(y).log_prob(z)
    log_w = log_joint - log_q.detach()
    return _bound_values(log_w, _add_silently(-log_joint.mean(), _dream(model, y)))


def _fixed_draw(q, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples (m, B, D) without gradients, and log q(z) (m, B) with those of q's parameters."""
    with torch.no_grad():
        z = q.draw(num_samples)[0]
    return z, q.log_prob(z)


def _dream(model, y: torch.Tensor) -> torch.Tensor:
    """-log q(z|x), mean over x and z drawn from the model, one for each row of y."""
    with torch.no_grad():
        z = model.prior(y).draw(1)[0]
        dreams = model.decode_draw(z[0], y)  # as the model says, also outside of [0, 1]
    return -model.posterior(dreams, y).log_prob(z).mean()


def _add_silently(loss: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The loss, with the gradient of both: what is reported stays the objective."""
    return loss + other - other.detach()


def _bound_values(log_w: torch.Tensor, loss: torch.Tensor) -> Values:
    """L_k and the ELBO of the same weights (k, B), beside the loss."""
    return {
        "loss": loss,
        "negative_bound": -log_mean_exp(log_w.detach()).mean(),
        "negative_elbo": -log_w.detach().mean(),
    }


def all_bits(num_bits: int) -> torch.Tensor:
    """All vectors of {0, 1}^D, (2^D, D) float32."""
    numbers = torch.arange(2**num_bits)
    return (numbers[:, None] >> torch.arange(num_bits) & 1).float()
