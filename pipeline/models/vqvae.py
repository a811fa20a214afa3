"""VQ-VAE and hierarchical VQ-VAE-2 with any number of levels.

van den Oord et al. 2017 (one level), Razavi et al. 2019 (two and three). Levels are numbered in
sampling order: level 0 is the coarsest, the last level the finest. Pixels are in [0, 1].

    images -> h_last -> ... -> h_0                     bottom-up, strided convolutions
    e_0 = quantize(h_0), e_l = quantize(h_l, decode(e_0 ... e_(l-1)))      coarse to fine
    reconstruction = decode(e_0 ... e_last)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from pipeline.models.blocks import Decoder, Encoder, halvings, true_fp32
from pipeline.models.quantizers import (
    Gradient,
    Quantized,
    QuantizerName,
    fsq_levels,
    make_quantizer,
)


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
    quantizer: tuple[QuantizerName, ...] = ("ema",)
    """Quantizer per level, coarse to fine; one value serves all levels. ema: codes follow their
    latents; learned: two-term loss; cosine: codes on the unit sphere; fsq: no codebook; simvq: a
    frozen table seen through a learned linear map."""
    gradient: Gradient = "straight_through"
    """How the decoder's gradient passes a codebook: unchanged, or turned with the rotation that
    takes the latent to its code."""
    decay: float = 0.99
    """EMA decay of codes and counts for batches of 128 images."""
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
        for name in ("codebook_size", "quantizer"):
            if len(getattr(self, name)) not in (1, len(self.ratios)):
                raise ValueError(
                    f"model.{name} needs one value, or one for each of {len(self.ratios)} levels"
                )
        if not all(1 <= size <= 65536 for size in self.codebook_size):
            raise ValueError(f"model.codebook_size must be in 1..65536, got {self.codebook_size}")
        for name in ("quantizer", "gradient"):
            known = {"quantizer": get_args(QuantizerName), "gradient": get_args(Gradient)}[name]
            values = self.quantizer if name == "quantizer" else (self.gradient,)
            if not set(values) <= set(known):
                raise ValueError(f"model.{name} must be of {', '.join(known)}, got {values}")
        if not 0 < self.decay < 1:
            raise ValueError(f"model.decay must lie between 0 and 1, got {self.decay}")
        if not 0 <= self.revival < 1:
            raise ValueError(f"model.revival must be in [0, 1), got {self.revival}")
        for name, size in zip(self.quantizers, self.codebook_sizes, strict=True):
            if name == "fsq":
                fsq_levels(size)

    @property
    def num_levels(self) -> int:
        return len(self.ratios)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level, one entry per level."""
        return self._per_level(self.codebook_size)

    @property
    def quantizers(self) -> tuple[QuantizerName, ...]:
        """Quantizers, one entry per level."""
        return self._per_level(self.quantizer)

    def _per_level(self, values: tuple) -> tuple:
        return values * self.num_levels if len(values) == 1 else values

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
    """What a forward pass returns."""

    reconstructions: torch.Tensor  # (B, C, H, W), about [0, 1], not clamped
    levels: list[Quantized]  # coarse to fine

    @property
    def codes(self) -> list[torch.Tensor]:
        """Per level (B, h, w) int64, coarse to fine."""
        return [level.codes for level in self.levels]


class VQVAE(nn.Module):
    """The model. `forward` reconstructs; `encode` and `decode` are its two halves."""

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
            make_quantizer(name, size, dim, config.decay, config.revival, config.gradient)
            for name, size in zip(config.quantizers, config.codebook_sizes, strict=True)
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

    def _quantize(self, images: torch.Tensor, kept: torch.Tensor | None = None):
        """Quantizes level by level, coarse to fine; returns the stack of all levels on the finest
        grid (B, D·levels, h, w), and what the quantizers returned."""
        stack, seen, levels = None, None, []
        for level, h in enumerate(self.encode_features(images)):
            if stack is not None:
                h = torch.cat([h, self.conditioners[level - 1](stack)], 1)
            with torch.autocast(h.device.type, enabled=False):
                # in bf16 neighbouring latents would round together and codes would be lost
                latents = self.to_latents[level](h.to(torch.promote_types(h.dtype, torch.float32)))
            levels.append(self.quantizers[level](latents))
            quantized = levels[-1].quantized
            stack = self._stack(stack, quantized, level)
            if kept is not None:  # finer latents are conditioned on all coarser levels as ever
                shown = quantized * (level < kept)[:, None, None, None]
                seen = self._stack(seen, shown, level)
        assert stack is not None  # there is at least one level
        return stack if seen is None else seen, levels

    def _stack(
        self, coarser: torch.Tensor | None, quantized: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Appends a level to the stack of coarser ones: (B, D·l, ...) -> (B, D·(l+1), h_l, w_l)."""
        if coarser is None:
            return quantized
        return torch.cat([self.upsamplers[level - 1](coarser), quantized], 1)

    def forward(self, images: torch.Tensor, kept: torch.Tensor | None = None) -> VQVAEOutput:
        """images (B, C, H, W) in [0, 1], H and W divisible by the product of the ratios; kept (B,)
        int64 in 1..levels: how many levels the decoder sees of an image, from the coarsest on."""
        stack, levels = self._quantize(images, kept)
        return VQVAEOutput(self._to_pixels(stack), levels)

    def encode(self, images: torch.Tensor) -> list[Quantized]:
        """images (B, C, H, W) in [0, 1] -> per level, coarse to fine."""
        return self._quantize(images)[1]

    @true_fp32()
    def encode_codes(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images (B, C, H, W) in [0, 1] -> codes per level (B, h, w) int64, coarse to fine."""
        return [level.codes for level in self.encode(images)]

    def decode(self, quantized: Sequence[torch.Tensor]) -> torch.Tensor:
        """Codebook vectors per level (B, D, h, w), coarse to fine -> images (B, C, H, W), about
        [0, 1], not clamped."""
        stack = None
        for level, vectors in enumerate(quantized):
            stack = self._stack(stack, vectors, level)
        assert stack is not None  # there is at least one level
        return self._to_pixels(stack)

    @true_fp32()
    def decode_codes(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """codes per level (B, h, w) -> images (B, C, H, W), about [0, 1], not clamped."""
        quantizers: Any = self.quantizers
        return self.decode(
            [quantizer.lookup(level) for quantizer, level in zip(quantizers, codes, strict=True)]
        )

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
    """The objective of a VQ-VAE, and the plain mean squared error in [0, 1].

        |x - x̂|^2 / var(x) + sum over levels of |sg[z_e] - e|^2 + β |z_e - sg[e]|^2

    all means over pixels, or vectors and dimensions (van den Oord et al. 2017, eq. 3). β stands on
    the encoder's term only; the codebook's term is 0 where an EMA moves the codes.
    """
    dtype = torch.promote_types(output.reconstructions.dtype, images.dtype)
    mse = (output.reconstructions.to(dtype) - images).square().mean()
    of_levels = [level.codebook_loss + beta * level.commitment for level in output.levels]
    return mse / data_variance + torch.stack(of_levels).sum(), mse
