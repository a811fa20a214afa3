"""Distributions of the latent z: posteriors q(z|x) and priors p(z).

Every one has

    draw(m)        (z (m, B, D), log q(z) (m, B)), differentiable where `reparameterised`
    log_prob(z)    (..., B, D) -> (..., B), nats, summed over the latent dimensions
    kl(prior)      KL(self || prior) per dimension (B, D), or None where it has no closed form
    detach()       the same, without gradients to its parameters
    mean           (B, D), the point that stands for an image in probes and reconstructions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from pipeline.models.vae.densities import bernoulli_kl, diagonal_gaussian_kl, log_normal
from pipeline.models.vae.flows import InverseAutoregressiveFlow


class Distribution(Protocol):
    """What objectives and evaluation know of a distribution."""

    reparameterised: bool

    @property
    def mean(self) -> torch.Tensor: ...
    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]: ...
    def log_prob(self, z: torch.Tensor) -> torch.Tensor: ...
    def kl(self, prior: "Distribution") -> torch.Tensor | None: ...
    def detach(self) -> "Distribution": ...


def concatenate(parts: Sequence[Any]) -> Any:
    """One distribution over all images from those of several batches."""
    first = parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        return concatenate(values) if isinstance(values[0], DiagonalGaussian) else values[0]

    return replace(first, **{field.name: joined(field.name) for field in fields(first)})


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag exp(log_variance)), both (B, D)."""

    mean: torch.Tensor
    log_variance: torch.Tensor
    reparameterised = True

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(
            num_samples, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device
        )
        z = self.mean + (0.5 * self.log_variance).exp() * noise
        return z, self.log_prob(z)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        return log_normal(z, self.mean, self.log_variance)

    def kl(self, prior: Distribution) -> torch.Tensor | None:
        if not isinstance(prior, DiagonalGaussian):
            return None
        return diagonal_gaussian_kl(self.mean, self.log_variance, prior.mean, prior.log_variance)

    def detach(self) -> "DiagonalGaussian":
        return DiagonalGaussian(self.mean.detach(), self.log_variance.detach())


@dataclass(frozen=True)
class Delta:
    """All mass at one point (B, D): the code of an AE. It has no density and no KL."""

    mean: torch.Tensor
    reparameterised = True

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.mean.expand(num_samples, *self.mean.shape)
        return z, z.new_zeros(z.shape[:2])

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        raise ValueError("an AE's code has no density: there is no likelihood to estimate")

    def kl(self, prior: Distribution) -> torch.Tensor | None:
        return None

    def detach(self) -> "Delta":
        return Delta(self.mean.detach())


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits, z in {0, 1}^D with probabilities sigmoid(logits), (B, D)."""

    logits: torch.Tensor
    reparameterised = False

    @property
    def mean(self) -> torch.Tensor:
        return self.logits.sigmoid()

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.bernoulli(self.mean.detach().expand(num_samples, *self.logits.shape))
        return z, self.log_prob(z)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        return (z * self.logits - F.softplus(self.logits)).sum(-1)

    def kl(self, prior: Distribution) -> torch.Tensor | None:
        return bernoulli_kl(self.logits, prior.logits) if isinstance(prior, Bernoulli) else None

    def detach(self) -> "Bernoulli":
        return Bernoulli(self.logits.detach())


@dataclass(frozen=True)
class FlowPosterior:
    """A Gaussian bent by an inverse autoregressive flow (Kingma et al. 2016). `context` (B, H) is
    what the flow knows of the image."""

    base: DiagonalGaussian
    flow: InverseAutoregressiveFlow
    context: torch.Tensor
    reparameterised = True

    @property
    def mean(self) -> torch.Tensor:
        """The image of the base's mean: a point to stand for the image, not E[z]."""
        return self.flow(self.base.mean[None], self.context)[0][0]

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, log_base = self.base.draw(num_samples)
        z, log_det = self.flow(start, self.context)
        return z, log_base - log_det

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Inverts the flow, one latent dimension after the other."""
        start, log_det = self.flow.inverse(z, self.context)
        return self.base.log_prob(start) - log_det

    def kl(self, prior: Distribution) -> torch.Tensor | None:
        return None

    def detach(self) -> "FlowPosterior":
        raise ValueError("the flow's own gradient cannot be stopped: use encoder_gradient bound")


@dataclass(frozen=True)
class Chain:
    """Two layers in one vector (z1, z2): one layer is drawn from `first`, the other given it.

    Posterior: first is q(z1|x), second gives q(z2|z1). Prior (`downward`): first is p(z2), second
    gives p(z1|z2). `width` is the dimension of z1.
    """

    first: DiagonalGaussian
    second: Callable[[torch.Tensor], DiagonalGaussian]
    width: int
    downward: bool = False
    reparameterised = True

    def _join(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.cat([second, first] if self.downward else [first, second], -1)

    @property
    def mean(self) -> torch.Tensor:
        return self._join(self.first.mean, self.second(self.first.mean).mean)

    def draw(self, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, log_first = self.first.draw(num_samples)
        drawn, log_second = self.second(first).draw(1)
        return self._join(first, drawn[0]), log_first + log_second[0]

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        first, second = z[..., : self.width], z[..., self.width :]
        if self.downward:
            first, second = second, first
        return self.first.log_prob(first) + self.second(first).log_prob(second)

    def kl(self, prior: Distribution) -> torch.Tensor | None:
        return None

    def detach(self) -> "Chain":
        raise ValueError("two layers share their networks: use encoder_gradient bound")
