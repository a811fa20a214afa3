"""VQ-VAE-2 as PyTorch code usually has it: what the benchmarks compare this repository with.

The operations, in their order, of vqvae.py and train_vqvae.py in

    https://github.com/rosinality/vq-vae-2-pytorch    commit ef5f67c

written anew: eager, float32, contiguous NCHW, distances to all codes, one-hot matrix and codebook
update inside `forward`, Adam as it comes. Nothing is mended: the counts start at zero, and no code
is ever revived. One process, so its all-reduces are left out; so are the text on its progress bar
and a picture every 100 steps. Images are in [-1, 1].

Shapes: B batch, H, W grid, K codes, D code dimension; "top" is the coarse level.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import peer
from torch import nn
from torch.nn import functional as F

LEARNING_RATE = 3e-4
BETA = 0.25
DECAY = 0.99


class OneHotQuantizer(nn.Module):
    """latents (B, H, W, D) -> codebook vectors (B, H, W, D), commitment, codes (B, H, W)."""

    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.size, self.dim, self.eps = size, dim, 1e-5
        codebook = torch.randn(dim, size)
        self.register_buffer("codebook", codebook)  # (D, K)
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", codebook.clone())

    def forward(self, latents: torch.Tensor):
        # Not detached, as published: autograd keeps the distances and the one-hot matrix for a
        # while, and that is a part of the time and of the memory.
        rows = latents.reshape(-1, self.dim)
        distances = rows.pow(2).sum(1, keepdim=True) - 2 * rows @ self.codebook
        distances = distances + self.codebook.pow(2).sum(0, keepdim=True)
        codes = (-distances).max(1)[1]
        chosen = F.one_hot(codes, self.size).type(rows.dtype)
        codes = codes.view(*latents.shape[:-1])
        quantized = F.embedding(codes, self.codebook.transpose(0, 1))
        if self.training:
            self._update(chosen.sum(0), rows.transpose(0, 1) @ chosen)
        commitment = (quantized.detach() - latents).pow(2).mean()
        return latents + (quantized - latents).detach(), commitment, codes

    def _update(self, counts: torch.Tensor, sums: torch.Tensor) -> None:
        self.counts.data.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.sums.data.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + self.size * self.eps) * total
        self.codebook.data.copy_(self.sums / smoothed.unsqueeze(0))


class VectorQuantizePytorch(nn.Module):
    """The quantizer of vector-quantize-pytorch in the same place, with what it offers against dead
    codes; its other options as they come, but for the decay."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.quantizer = peer("vector_quantize_pytorch").VectorQuantize(
            dim, size, decay=DECAY, kmeans_init=True, threshold_ema_dead_code=2
        )

    def forward(self, latents: torch.Tensor):
        quantized, codes, commitment = self.quantizer(latents.flatten(1, 2))
        codes = codes.view(latents.shape[:-1])
        return quantized.view_as(latents), commitment.mean(), codes


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        y += x
        return y


def encoder(channels_in: int, width: int, blocks: int, hidden: int, ratio: int) -> nn.Sequential:
    """(B, channels_in, H, W) -> (B, width, H/ratio, W/ratio), ratio 2 or 4."""
    half = width // 2
    layers = [nn.Conv2d(channels_in, half, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    if ratio == 4:
        layers += [nn.Conv2d(half, width, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(width if ratio == 4 else half, width, 3, padding=1)]
    layers += [ResidualBlock(width, hidden) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def decoder(
    channels_in: int, channels_out: int, width: int, blocks: int, hidden: int, ratio: int
) -> nn.Sequential:
    """(B, channels_in, H, W) -> (B, channels_out, H*ratio, W*ratio), ratio 2 or 4."""
    layers: list[nn.Module] = [nn.Conv2d(channels_in, width, 3, padding=1)]
    layers += [ResidualBlock(width, hidden) for _ in range(blocks)]
    layers += [nn.ReLU(inplace=True)]
    if ratio == 4:
        layers += [nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1)]
        layers += [nn.ReLU(inplace=True)]
        width = width // 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels_out, 4, stride=2, padding=1))


class UsualVQVAE(nn.Module):
    """Two levels, of 1/8 and 1/4 of the image; the sizes are the published defaults.

    Args:
        quantizer: (K, D) -> a module with the interface of OneHotQuantizer.
    """

    def __init__(
        self,
        quantizer: Callable[[int, int], nn.Module] = OneHotQuantizer,
        channels: int = 3,
        width: int = 128,
        blocks: int = 2,
        hidden: int = 32,
        dim: int = 64,
        size: int = 512,
    ):
        super().__init__()
        body = (width, blocks, hidden)
        self.encoder_bottom = encoder(channels, *body, ratio=4)
        self.encoder_top = encoder(width, *body, ratio=2)
        self.to_latents_top = nn.Conv2d(width, dim, 1)
        self.quantizer_top = quantizer(size, dim)
        self.decoder_top = decoder(dim, dim, *body, ratio=2)
        self.to_latents_bottom = nn.Conv2d(dim + width, dim, 1)
        self.quantizer_bottom = quantizer(size, dim)
        self.upsample_top = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)
        self.decoder = decoder(2 * dim, channels, *body, ratio=4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images (B, C, H, W) in [-1, 1] -> reconstructions, sum of the commitments (1,)."""
        top, bottom, commitment, _, _ = self.encode(images)
        return self.decode(top, bottom), commitment

    def encode(self, images: torch.Tensor):
        """Codebook vectors top and bottom (B, D, h, w), commitment (1,), codes top and bottom."""
        features_bottom = self.encoder_bottom(images)
        features_top = self.encoder_top(features_bottom)

        top = self.to_latents_top(features_top).permute(0, 2, 3, 1)
        top, commitment_top, codes_top = self.quantizer_top(top)
        top = top.permute(0, 3, 1, 2)

        features_bottom = torch.cat([self.decoder_top(top), features_bottom], 1)
        bottom = self.to_latents_bottom(features_bottom).permute(0, 2, 3, 1)
        bottom, commitment_bottom, codes_bottom = self.quantizer_bottom(bottom)
        bottom = bottom.permute(0, 3, 1, 2)

        commitment = commitment_top.unsqueeze(0) + commitment_bottom.unsqueeze(0)
        return top, bottom, commitment, codes_top, codes_bottom

    def decode(self, top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.cat([self.upsample_top(top), bottom], 1))


class UsualStep:
    """One pass through the published training loop, for UsualVQVAE or the published network."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.mse_sum, self.images_seen = 0.0, 0

    def __call__(self, images: torch.Tensor) -> float:
        """images (B, C, H, W) in [-1, 1] -> the mean squared error in [-1, 1]."""
        self.model.zero_grad()
        reconstructions, commitment = self.model(images)
        mse = self.criterion(reconstructions, images)
        commitment = commitment.mean()
        loss = mse + BETA * commitment
        loss.backward()
        self.optimizer.step()
        # what it reads for its progress bar, in every step
        self.mse_sum += mse.item() * len(images)
        self.images_seen += len(images)
        self.latest = mse.item(), commitment.item(), self.mse_sum / self.images_seen
        return self.latest[0]


def to_usual(images: torch.Tensor) -> torch.Tensor:
    """Images (B, H, W, C) uint8 -> (B, C, H, W) float32 in [-1, 1], contiguous."""
    return images.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5).contiguous()


def published_network(repository: Path) -> nn.Module:
    """The published VQVAE() itself, from a checkout of its repository."""
    spec: Any = importlib.util.spec_from_file_location("published_vqvae", repository / "vqvae.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(repository))  # it imports its own `distributed`
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(repository))
    return module.VQVAE()
