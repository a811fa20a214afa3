"""An autoregressive decoder: a small PixelCNN over the pixels, conditioned on a decoder's outputs.

    p(x|z) = product over pixels i in raster order of p(x_i | the pixels before i and near it, z)

PixelVAE (Gulrajani et al. 2017) and the variational lossy autoencoder (Chen et al. 2017). With few
layers and small kernels the context is local: what a pixel has in common with distant ones can
only come through z, so the latent stays in use. The masked layers, and the fronts of positions that
are drawn together, are those of the priors (pipeline/models/priors).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

from pipeline.models.blocks import full_precision
from pipeline.models.priors.causal import CausalConv, See, above, left, whole
from pipeline.models.priors.fronts import FrontCaches, fronts
from pipeline.models.priors.pixelcnn import GatedLayer
from pipeline.models.vae.likelihoods import Likelihood


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes of the network over the pixels."""

    channels: int = 32
    """Hidden units, and the channels of the decoder's feature map."""
    layers: int = 2
    """Gated layers after the first masked convolution; each widens the context."""
    kernel_size: int = 3
    """Width of the masked convolutions, odd."""
    dropout: float = 0.0
    """Share of the pixels hidden from the context in training, which leaves them to z (the word
    dropout of Bowman et al. 2016)."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def slope(self) -> int:
        """s of t = j + s·i: positions of equal t do not depend on each other."""
        return self.kernel_size // 2 + 1

    @property
    def reach(self) -> int:
        """How many rows up, and how many columns to either side, the context goes."""
        return (self.layers + 1) * (self.kernel_size // 2)

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Rows, a pixel's own being the lowest, and columns, its own in the middle, of the box that
        holds its context."""
        return self.reach + 1, 2 * self.reach + 1


class AutoregressiveLikelihood(Likelihood):
    """`base` made autoregressive: its outputs at a pixel come from the decoder's feature map
    (..., config.channels, H, W) and from the pixels before.

    The colours of one pixel are predicted together, by `base`: a logistic mixture has them depend
    on each other, all others take them as independent given the context.
    """

    def __init__(self, base: Likelihood, config: AutoregressiveConfig):
        super().__init__(base.channels, num_outputs=config.channels)
        self.base, self.config = base, config
        self.name, self.support = f"autoregressive {base.name}", base.support
        width, kernel = config.channels, config.kernel_size
        # one channel more, 1 where a pixel is known: hidden or outside the image is not grey
        self.first_up = CausalConv(base.channels + 1, width, above(kernel))
        self.first_left = CausalConv(base.channels + 1, width, left(kernel, strict=True))
        self.layers = nn.ModuleList(
            GatedLayer(width, kernel, dropout=0.0) for _ in range(config.layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, base.num_outputs)
        )

    def base_outputs(
        self, features: torch.Tensor, x: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """What `base` takes, (N, base.num_outputs, H, W): at each pixel from the pixels before.

        Args:
            features: of the decoder, (N, config.channels, H, W).
            x: (N, C, H, W) in [0, 1].
            known: (N, 1, H, W) of 0 and 1; where it is 0, x is hidden from the context.
        """
        dtype = self.first_up.weight.dtype
        pixels = rearrange(self._pixels(x, known), "n c h w -> n h w c").to(dtype)
        features = rearrange(features, "n c h w -> n h w c").to(dtype)
        return rearrange(self._body(pixels, features, whole), "n h w c -> n c h w")

    @staticmethod
    def _pixels(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """What the masked layers see of pixels (N, C, ...): (N, C + 1, ...)."""
        return torch.cat([(2 * x - 1) * known, known], 1)

    def _body(self, pixels: torch.Tensor | None, features: torch.Tensor, see: See) -> torch.Tensor:
        """(..., C + 1), None at a front, and (..., config.channels) -> (..., base.num_outputs)."""
        v = see(self.first_up, pixels)
        h = v + see(self.first_left, pixels)
        for layer in self.layers:
            v, h = layer(v, h, features, see)
        return self.head(h)

    def log_prob(self, outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        outputs, x = self._matched(outputs, x)
        leading = torch.broadcast_shapes(outputs.shape[:-3], x.shape[:-3])
        features, pixels = (
            each.expand(*leading, *each.shape[-3:]).reshape(-1, *each.shape[-3:])
            for each in (outputs, x)
        )
        known = torch.ones_like(pixels[:, :1])
        if self.training:
            known = (torch.rand_like(known) >= self.config.dropout).to(known.dtype)
        log_prob = self.base.log_prob(self.base_outputs(features, pixels, known), pixels)
        return log_prob.reshape(leading)

    def mean(self, outputs: torch.Tensor) -> torch.Tensor:
        """Each pixel at its mean given the means before it: a picture of z, but not E[x|z], which
        has no closed form. Carries no gradient."""
        return self._decode(outputs, self.base.mean)

    def sample(self, outputs: torch.Tensor) -> torch.Tensor:
        return self._decode(outputs, self.base.sample)

    def check(self, x: torch.Tensor) -> None:
        self.base.check(x)

    @torch.no_grad()
    def _decode(
        self, outputs: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Front by front, each pixel drawn from `base` given those before; nothing is hidden."""
        *leading, _, height, width = outputs.shape
        features = full_precision(outputs).reshape(-1, *outputs.shape[-3:])
        features = rearrange(features, "n c h w -> n (h w) c")
        x = features.new_zeros(len(features), self.channels, height * width)
        see = FrontCaches((height, width), self.config.slope, len(features), features)
        for positions in fronts((height, width), self.config.slope):
            see.begin(positions.to(x.device))
            front = rearrange(self._body(None, features[:, positions], see), "n p c -> n c p")
            x[:, :, positions] = draw(front.unsqueeze(-1)).squeeze(-1).to(x.dtype)
            pixels = self._pixels(x[:, :, positions], torch.ones_like(x[:, :1, positions]))
            see.end(rearrange(pixels, "n c p -> n p c"))
        return x.reshape(*leading, self.channels, height, width)
