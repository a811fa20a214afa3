"""The variational autoencoder and its relatives: one model, put together from small parts.

    q(z|x, y)   posterior.   gaussian (Kingma & Welling 2014), delta (an AE), iaf (Kingma et al.
                2016), bernoulli bits; with a second layer q(z2|z1) where `top_dim` > 0
    p(z|y)      prior.       N(0, I); a learned Gaussian of y; Bernoulli(beta_k) bits; p(z1|z2)
    p(x|z, y)   likelihood.  see likelihoods.py; `context_layers` > 0 makes it autoregressive

What is done with them (ELBO, IWAE, ...) is in objectives.py. Images are 8-bit values / 255 in
[0, 1], (B, C, S, S); z is (m, B, D): m samples for each of B images. All densities are in nats per
image, sums over pixels and latent dimensions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from pipeline.models.vae.autoregressive import AutoregressiveConfig, AutoregressiveLikelihood
from pipeline.models.vae.dequantization import Dequantization, Dequantizer
from pipeline.models.vae.distributions import (
    Bernoulli,
    Chain,
    Delta,
    DiagonalGaussian,
    Distribution,
    FlowPosterior,
)
from pipeline.models.vae.flows import InverseAutoregressiveFlow
from pipeline.models.vae.likelihoods import LikelihoodName, make_likelihood
from pipeline.models.vae.networks import DECODERS, ENCODERS, GRID
from pipeline.models.vae.objectives import Objective, evaluate

PosteriorName = Literal["gaussian", "delta", "iaf", "bernoulli"]
FLOW_HIDDEN = 320  # units of the flow's masked networks, as Kingma et al. 2016 on MNIST


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes and parts of the model. The fields from `image_size` on are facts of the data;
    train_vae.py fills them in."""

    network: Literal["conv", "mlp"] = "conv"
    """conv: strided convolutions; mlp: two layers of tanh."""
    channels: int = 32
    """Width of the first convolution (later ones up to 8 times that), or of the tanh layers."""
    latent_dim: int = 64
    """D, dimensions of z."""
    top_dim: int = 0
    """Dimensions of a second stochastic layer z2 above z; 0 = one layer."""
    posterior: PosteriorName = "gaussian"
    """q(z|x): gaussian; delta: one point, which makes an AE; iaf: a Gaussian bent by an inverse
    autoregressive flow; bernoulli: bits."""
    flow_steps: int = 2
    """Steps of the flow (iaf)."""
    prior: Literal["standard", "learned"] = "standard"
    """p(z): N(0, I), or a Gaussian learned for each condition, p(z|y)."""
    likelihood: LikelihoodName = "gaussian"
    """p(x|z). gaussian: fixed variance; gaussian_global, gaussian_pixel: learned variance, one for
    all or one per pixel; laplace; bernoulli; categorical: 256-way; logistic_mixture: discretized.
    """
    variance: float = 0.5
    """Variance of the Gaussian and Laplace likelihoods, pixels in [0, 1]; where it is learned, the
    one it starts from."""
    dequantization: Dequantization = "none"
    """u in y = (8-bit value + u) / 256: none, uniform, or variational (drawn by a flow)."""
    context_layers: int = 0
    """Gated layers of a PixelCNN over the pixels before; 0 = pixels independent given z."""
    context_channels: int = 32
    """Its width."""
    context_kernel: int = 3
    """Width of its masked convolutions, odd: small, so that the latent stays in use."""
    context_dropout: float = 0.0
    """Share of the pixels hidden from it in training."""
    image_size: int = 64
    """Side of the square images in pixels, 4 times a power of two (any for mlp)."""
    in_channels: int = 3
    """Colour channels of the images."""
    num_classes: int = 0
    """Classes y to condition on; 0 = none."""
    num_attributes: int = 0
    """Binary attributes y to condition on, each -1, +1 or 0 = unknown; 0 = none."""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "latent_dim", "flow_steps", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("top_dim", "context_layers", "num_classes", "num_attributes"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must not be negative, got {getattr(self, name)}")
        for name, known in (("posterior", PosteriorName), ("likelihood", LikelihoodName)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"model.{name} must be of {', '.join(get_args(known))}")
        grids, rest = divmod(self.image_size, GRID)
        if self.network == "conv" and (rest or grids < 2 or grids & (grids - 1)):
            raise ValueError(
                f"model.image_size must be {GRID} times a power of two, at least {2 * GRID}, got "
                f"{self.image_size}"
            )
        if self.variance <= 0:
            raise ValueError(f"model.variance must be positive, got {self.variance}")
        if self.posterior == "iaf" and self.latent_dim < 2:
            raise ValueError(f"model.latent_dim must be at least 2 for iaf, got {self.latent_dim}")
        if self.top_dim and self.posterior != "gaussian":
            raise ValueError("model.top_dim needs posterior gaussian: two layers are Gaussian")
        if self.prior == "learned" and (self.posterior not in ("gaussian", "iaf") or self.top_dim):
            raise ValueError(
                "model.prior learned is one Gaussian p(z|y): posterior gaussian or iaf"
            )
        if not 0 <= self.context_dropout < 1:
            raise ValueError(f"model.context_dropout must be in [0, 1), got {self.context_dropout}")
        if self.context_dropout and not self.context_layers:
            raise ValueError("model.context_dropout needs model.context_layers of at least 1")
        if self.context_channels < 1 or self.context_kernel < 3 or self.context_kernel % 2 == 0:
            raise ValueError(
                "model.context_channels must be at least 1 and model.context_kernel odd, at least "
                f"3, got {self.context_channels} and {self.context_kernel}"
            )
        support = make_likelihood(self.likelihood, self.in_channels).support
        if self.dequantization != "none" and support != "density":
            raise ValueError(
                f"model.dequantization {self.dequantization} is for densities; {self.likelihood} "
                "is a mass on 8-bit or binary values already: none"
            )

    @property
    def condition_dim(self) -> int:
        """E, dimensions of y."""
        return self.num_classes + self.num_attributes

    @property
    def vector_dim(self) -> int:
        """Dimensions of z with all its layers."""
        return self.latent_dim + self.top_dim

    @property
    def has_plane(self) -> bool:
        """True where z is two continuous numbers, which can be drawn on paper."""
        return self.vector_dim == self.latent_dim == 2 and self.posterior != "bernoulli"

    @property
    def has_density(self) -> bool:
        """False for an AE, whose z has no distribution: it has no likelihood either."""
        return self.posterior != "delta"


class VAE(nn.Module):
    """The model. `forward` computes an objective; the other methods are its parts."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        if config.prior == "learned" and not config.condition_dim:
            raise ValueError("model.prior learned is p(z|y): it needs a condition y")
        self.config = config
        size, width, condition = config.image_size, config.channels, config.condition_dim
        self.encoder = ENCODERS[config.network](config.in_channels, size, width, condition)
        features = self.encoder.num_features
        per_dimension = 2 if config.posterior in ("gaussian", "iaf") else 1
        self.to_posterior = nn.Linear(features, per_dimension * config.latent_dim)
        self.flow = (
            InverseAutoregressiveFlow(
                config.latent_dim, context=features, hidden=FLOW_HIDDEN, steps=config.flow_steps
            )
            if config.posterior == "iaf"
            else None
        )
        if config.top_dim:
            self.up = _gaussian_network(config.latent_dim, features, config.top_dim)
            self.down = _gaussian_network(config.top_dim, features, config.latent_dim)
        if config.prior == "learned":
            self.to_prior = _gaussian_network(condition, features, config.latent_dim)
        if config.posterior == "bernoulli":
            self.prior_logits = nn.Parameter(torch.zeros(config.latent_dim))
        likelihood = make_likelihood(config.likelihood, config.in_channels, config.variance)
        if config.context_layers:
            context = AutoregressiveConfig(
                channels=config.context_channels,
                layers=config.context_layers,
                kernel_size=config.context_kernel,
                dropout=config.context_dropout,
            )
            likelihood = AutoregressiveLikelihood(likelihood, context)
        self.likelihood = likelihood
        self.decoder = DECODERS[config.network](
            config.latent_dim + condition, likelihood.num_outputs, size, width
        )
        self.dequantizer = Dequantizer(config.dequantization, config.in_channels)

    def condition(
        self,
        batch_size: int,
        labels: torch.Tensor | None = None,
        attributes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y (B, E): the class as one-hot, attributes as they are; what is unknown is 0.

        Args:
            labels: (B,) int64, -1 = unknown; attributes: (B, A) of -1, 0, +1; None = all unknown.
        """
        weight, parts = self.to_posterior.weight, []
        if classes := self.config.num_classes:
            one_hot = weight.new_zeros(batch_size, classes + 1)
            if labels is not None:
                one_hot[torch.arange(batch_size), labels] = 1  # -1 is the last, which is cut off
            parts.append(one_hot[:, :classes])
        if self.config.num_attributes:
            if attributes is None:
                attributes = weight.new_zeros(batch_size, self.config.num_attributes)
            parts.append(attributes.to(weight))
        return torch.cat(parts, 1) if parts else weight.new_zeros(batch_size, 0)

    def posterior(self, images: torch.Tensor, y: torch.Tensor) -> Distribution:
        """q(z|x, y) of images (B, C, S, S) in [0, 1] and y (B, E)."""
        features = self.encoder(images, y)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(features.device.type, enabled=False):
            found = self.to_posterior(features)
        if self.config.posterior == "delta":
            return Delta(found)
        if self.config.posterior == "bernoulli":
            return Bernoulli(found)
        gaussian = DiagonalGaussian(*found.chunk(2, -1))
        if self.flow is not None:
            return FlowPosterior(gaussian, self.flow, features)
        if self.config.top_dim:
            return Chain(gaussian, lambda z1: _gaussian(self.up, z1), self.config.latent_dim)
        return gaussian

    def prior(self, y: torch.Tensor) -> Distribution:
        """p(z|y) for each row of y (B, E)."""
        config = self.config
        if config.posterior == "bernoulli":
            return Bernoulli(self.prior_logits.expand(len(y), -1))
        if config.prior == "learned":
            return _gaussian(self.to_prior, y)
        zeros = y.new_zeros(len(y), config.top_dim or config.latent_dim)
        standard = DiagonalGaussian(zeros, zeros)
        if config.top_dim:
            below = config.latent_dim
            return Chain(standard, lambda z2: _gaussian(self.down, z2), below, downward=True)
        return standard

    def decode(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the likelihood is made of: z (..., B, D), y (B, E) -> outputs (..., B, O, S, S)."""
        z = z[..., : self.config.latent_dim]  # the image sees only the lowest layer
        vectors = torch.cat([z, y.expand(*z.shape[:-1], -1)], -1)
        return self.decoder(vectors.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def log_likelihood(self, images: torch.Tensor, z: torch.Tensor, y: torch.Tensor):
        """log p(x|z, y) in nats: z (m, B, D), or (m, 1, D) to be shared by all images -> (m, B).

        `images` (B, C, S, S) as the likelihood wants them, dequantized where it is a density of
        dequantized images.
        """
        return self.likelihood.log_prob(self.decode(z, y[: z.shape[1]]), images)

    def reconstruct(self, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The mean of p(x|z) at the posterior's mean, (B, C, S, S)."""
        return self.decode_mean(self.posterior(images, y).mean, y)

    def decode_mean(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """E[x|z], z (B, D) -> (B, C, S, S) in the units of the likelihood's x."""
        return self.likelihood.mean(self.decode(z, y))

    def decode_draw(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A draw from p(x|z) as an image, z (B, D) -> (B, C, S, S)."""
        drawn = self.likelihood.sample(self.decode(z, y))
        if self.config.dequantization != "none":  # of y = (v + u) / 256 back to x = v / 255
            drawn = (256 * drawn).floor() / 255
        return drawn

    def encoder_and_decoder_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """phi, the parameters of q(z|x) and q(u|x), and theta, all others."""
        phi, theta = [], []
        for name, parameter in self.named_parameters():
            of_q = name.split(".")[0] in ("encoder", "to_posterior", "flow", "up", "dequantizer")
            (phi if of_q else theta).append(parameter)
        return phi, theta

    def forward(
        self, images: torch.Tensor, y: torch.Tensor, objective: Objective, warmup: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch, a scalar to minimise, and what it is made of (objectives.py)."""
        return evaluate(self, images, y, objective, warmup)


def _gaussian_network(in_features: int, hidden: int, dim: int) -> nn.Sequential:
    """Vector -> mean and log variance of a Gaussian, side by side."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * dim))


def _gaussian(network: nn.Module, vector: torch.Tensor) -> DiagonalGaussian:
    with torch.autocast(vector.device.type, enabled=False):
        return DiagonalGaussian(*network(vector).chunk(2, -1))
