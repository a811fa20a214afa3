"""Encoders and decoders of the variational autoencoders, for images and for vectors.

A condition y (B, E), E = 0 for none, is appended where an image has become a vector; in front of a
decoder it is part of the vector (N, D + E).
"""

from itertools import pairwise

import torch
from torch import nn

from pipeline.models.blocks import halvings

GRID = 4  # side of the coarsest feature map
MAX_WIDTH = 8  # in units of the first convolution's


def _widths(channels: int, image_size: int) -> list[int]:
    """Channels after each strided convolution, doubling up to 8 times the first."""
    return [channels * min(2**i, MAX_WIDTH) for i in range(halvings(image_size // GRID))]


def _norm(channels: int) -> nn.GroupNorm:
    """Over all channels of an image: no statistics to keep, so any number of processes agree."""
    return nn.GroupNorm(1, channels)


class ConvEncoder(nn.Module):
    """Images (B, C, S, S) in [0, 1] and y (B, E) -> features (B, F): strided 4x4 convolutions down
    to 4x4, then one linear layer, where y comes in."""

    def __init__(self, in_channels: int, image_size: int, channels: int, condition: int):
        super().__init__()
        widths = _widths(channels, image_size)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.SiLU()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, 4, 2, 1), _norm(width_out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.num_features = widths[-1]
        self.head = nn.Linear(widths[-1] * GRID**2 + condition, self.num_features)

    def forward(self, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        vector = torch.cat([self.body(2 * images - 1).flatten(1), y], 1)
        return nn.functional.silu(self.head(vector))


class ConvDecoder(nn.Module):
    """Vectors (N, D) -> outputs (N, O, S, S): the encoder mirrored."""

    def __init__(self, in_features: int, num_outputs: int, image_size: int, channels: int):
        super().__init__()
        widths = _widths(channels, image_size)[::-1]
        self.start = nn.Linear(in_features, widths[0] * GRID**2)
        layers: list[nn.Module] = [_norm(widths[0]), nn.SiLU()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.ConvTranspose2d(width_in, width_out, 4, 2, 1), _norm(width_out)]
            layers += [nn.SiLU()]
        layers += [nn.ConvTranspose2d(widths[-1], num_outputs, 4, 2, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.body(self.start(z).unflatten(1, (-1, GRID, GRID)))


class MLPEncoder(nn.Module):
    """The same by two layers of tanh, as Burda et al. 2016 on MNIST."""

    def __init__(self, in_channels: int, image_size: int, channels: int, condition: int):
        super().__init__()
        self.body = _two_layers(in_channels * image_size**2 + condition, channels)
        self.num_features = channels

    def forward(self, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([images.flatten(1), y], 1))


class MLPDecoder(nn.Module):
    """Vectors (N, D) -> outputs (N, O, S, S) by two layers of tanh."""

    def __init__(self, in_features: int, num_outputs: int, image_size: int, channels: int):
        super().__init__()
        self.body = _two_layers(in_features, channels)
        self.head = nn.Linear(channels, num_outputs * image_size**2)
        self.shape = (num_outputs, image_size, image_size)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(z)).unflatten(1, self.shape)


def _two_layers(in_features: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    )


ENCODERS = {"conv": ConvEncoder, "mlp": MLPEncoder}
DECODERS = {"conv": ConvDecoder, "mlp": MLPDecoder}
