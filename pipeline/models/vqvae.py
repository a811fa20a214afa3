"""VQ-VAE and hierarchical VQ-VAE-2 with any number of levels.

van den Oord et al. 2017 (one level), Razavi et al. 2019 (two and three). Levels are numbered in
sampling order: level 0 is the coarsest, the last level the finest. Pixels are in [0, 1].

    images -> h_last -> ... -> h_0                     bottom-up, strided convolutions
    e_0 = quantize(h_0), e_l = quantize(h_l, decode(e_0 ... e_(l-1)))      coarse to fine
    reconstruction = decode(e_0 ... e_last)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.models.blocks import Decoder, Encoder, halvings
from pipeline.models.quantizer import EMAQuantizer


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Sizes of the model; the defaults are the paper's (two levels)."""

    in_channels: int = 3
    """Colour channels of the images."""
    channels: int = 128
    """Hidden units of encoder and decoder."""
    residual_channels: int = 64
    """Hidden units inside a residual block."""
    residual_layers: int = 2
    """Residual blocks per encoder and decoder."""
    ratios: tuple[int, ...] = (2, 4)
    """How much smaller each level is than the next finer one, coarse to fine; the last is against
    the image. One entry per level, powers of two: (2, 4) makes 64 px into 8x8 and 16x16 codes."""
    codebook_size: tuple[int, ...] = (512,)
    """Codes per level, coarse to fine; one value serves all levels."""
    code_dim: int = 64
    """Dimension of a code."""
    decay: float = 0.99
    """EMA decay of the codebook for batches of 128 images."""
    revival: float = 0.1
    """A code used less than this fraction of the uniform share starts anew; 0 = never."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "channels", "residual_channels", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if not self.ratios:
            raise ValueError("model.ratios needs one entry per level, at least one")
        if any(ratio < 2 for ratio in self.ratios):
            raise ValueError(f"model.ratios must be 2 or more, got {self.ratios}")
        for ratio in self.ratios:
            halvings(ratio)
        if len(self.codebook_size) not in (1, len(self.ratios)):
            raise ValueError(
                f"model.codebook_size needs one value, or one for each of {len(self.ratios)} levels"
            )
        if not all(1 <= size <= 65536 for size in self.codebook_size):
            raise ValueError(f"model.codebook_size must be in 1..65536, got {self.codebook_size}")
        if not 0 < self.decay < 1:
            raise ValueError(f"model.decay must lie between 0 and 1, got {self.decay}")
        if not 0 <= self.revival < 1:
            raise ValueError(f"model.revival must be in [0, 1), got {self.revival}")

    @property
    def num_levels(self) -> int:
        return len(self.ratios)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level, one entry per level."""
        if len(self.codebook_size) == 1:
            return self.codebook_size * self.num_levels
        return self.codebook_size

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Code grids (h, w) per level, coarse to fine, for images of this size."""
        grids = []
        for ratio in reversed(self.ratios):
            if height % ratio or width % ratio:
                raise ValueError(f"image_size must be divisible by the product of {self.ratios}")
            height, width = height // ratio, width // ratio
            grids.append((height, width))
        return grids[::-1]


class VQVAEOutput(NamedTuple):
    """What a forward pass returns; lists are coarse to fine."""

    reconstructions: torch.Tensor  # (B, C, H, W), about [0, 1], not clamped
    codes: list[torch.Tensor]  # per level (B, h, w) int64
    commitments: list[torch.Tensor]  # per level, scalar


class VQVAE(nn.Module):
    """The model. `forward` reconstructs; `encode_codes` and `decode_codes` are its two halves."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        width, dim, levels = config.channels, config.code_dim, config.num_levels
        body = (config.channels, config.residual_channels, config.residual_layers)
        self.encoders = nn.ModuleList(
            Encoder(config.in_channels if level == levels - 1 else width, *body, ratio)
            for level, ratio in enumerate(config.ratios)
        )
        # Level l > 0 sees its own features and a decoding of all coarser levels.
        self.to_latents = nn.ModuleList(
            nn.Conv2d(width + (dim if level else 0), dim, 1) for level in range(levels)
        )
        self.quantizers = nn.ModuleList(
            EMAQuantizer(size, dim, config.decay, config.revival) for size in config.codebook_sizes
        )
        self.conditioners = nn.ModuleList(
            Decoder(dim * (level + 1), dim, *body, config.ratios[level])
            for level in range(levels - 1)
        )
        # Learned upsampling of all coarser levels onto the next finer grid.
        self.upsamplers = nn.ModuleList(
            _Upsampler(dim * (level + 1), config.ratios[level]) for level in range(levels - 1)
        )
        self.decoder = Decoder(dim * levels, config.in_channels, *body, config.ratios[-1])

    def encode_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Bottom-up features, coarse to fine: images (B, C, H, W) in [0, 1] -> (B, width, h, w)."""
        features, x = [], 2 * images - 1
        for encoder in reversed(self.encoders):
            x = encoder(x)
            features.append(x)
        return features[::-1]

    def _quantize(self, features: list[torch.Tensor]):
        """Quantizes level by level, coarse to fine; returns the stack of all levels on the finest
        grid (B, D·levels, h, w), and codes and commitments per level."""
        stack, codes, commitments = None, [], []
        for level, h in enumerate(features):
            if stack is not None:
                h = torch.cat([h, self.conditioners[level - 1](stack)], 1)
            with torch.autocast(h.device.type, enabled=False):
                # in bf16 neighbouring latents would round together and codes would be lost
                latents = self.to_latents[level](h.to(torch.promote_types(h.dtype, torch.float32)))
            quantized, level_codes, commitment = self.quantizers[level](latents)
            stack = self._stack(stack, quantized, level)
            codes.append(level_codes)
            commitments.append(commitment)
        assert stack is not None  # there is at least one level
        return stack, codes, commitments

    def _stack(
        self, coarser: torch.Tensor | None, quantized: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Appends a level to the stack of coarser ones: (B, D·l, ...) -> (B, D·(l+1), h_l, w_l)."""
        if coarser is None:
            return quantized
        return torch.cat([self.upsamplers[level - 1](coarser), quantized], 1)

    def forward(self, images: torch.Tensor) -> VQVAEOutput:
        """images (B, C, H, W) in [0, 1], H and W divisible by the product of the ratios."""
        stack, codes, commitments = self._quantize(self.encode_features(images))
        return VQVAEOutput(self._to_pixels(stack), codes, commitments)

    def encode_codes(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images (B, C, H, W) in [0, 1] -> codes per level (B, h, w) int64, coarse to fine."""
        return self._quantize(self.encode_features(images))[1]

    def decode_codes(self, codes: list[torch.Tensor]) -> torch.Tensor:
        """codes per level (B, h, w) -> images (B, C, H, W), about [0, 1], not clamped."""
        stack = None
        for level, level_codes in enumerate(codes):
            quantizer: Any = self.quantizers[level]
            stack = self._stack(stack, quantizer.lookup(level_codes), level)
        assert stack is not None  # there is at least one level
        return self._to_pixels(stack)

    def _to_pixels(self, stack: torch.Tensor) -> torch.Tensor:
        return (self.decoder(stack) + 1) / 2


class _Upsampler(nn.Sequential):
    """Transposed convolutions that enlarge (B, C, h, w) by a power of two, C unchanged."""

    def __init__(self, channels: int, ratio: int):
        super().__init__(
            *[
                nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
                for _ in range(halvings(ratio))
            ]
        )


def loss(
    output: VQVAEOutput, images: torch.Tensor, data_variance: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of an EMA VQ-VAE, and the plain mean squared error in [0, 1].

        |x - x̂|^2 / var(x) + β sum over levels of |z_e - sg[e]|^2

    all means over pixels, or vectors and dimensions. β stands on the encoder's term only; the
    codebook's term is replaced by its EMA (van den Oord et al. 2017, eq. 3 and appendix A.1).
    """
    mse = (output.reconstructions.float() - images).square().mean()
    return mse / data_variance + beta * torch.stack(output.commitments).sum(), mse
