"""Pieces that several models share, above all those of the VQ-VAE-2 encoder and decoder (Razavi et
al. 2019, appendix A)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn


@contextmanager
def true_fp32() -> Iterator[None]:
    """Convolutions on CUDA in float32, not in TF32, which is off by about 1e-3: samples, codes,
    likelihoods and features are to be the same by every method and on every device. Also a
    decorator."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ResidualBlock(nn.Module):
    """ReLU, 3x3 to the residual width, ReLU, 1x1 back, plus the input. (B, C, H, W) -> same."""

    def __init__(self, channels: int, residual_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(residual_channels, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def residual_stack(channels: int, residual_channels: int, num_layers: int) -> list[nn.Module]:
    """`num_layers` residual blocks and the ReLU after them."""
    blocks = [ResidualBlock(channels, residual_channels) for _ in range(num_layers)]
    return [*blocks, nn.ReLU(inplace=True)]


def halvings(ratio: int) -> int:
    """log2 of a power of two: how many stride-2 convolutions make the ratio."""
    count = ratio.bit_length() - 1
    if ratio < 1 or 1 << count != ratio:
        raise ValueError(f"a down-sampling ratio must be a power of two, got {ratio}")
    return count


class Encoder(nn.Sequential):
    """(B, in_channels, H, W) -> (B, channels, H/ratio, W/ratio): strided 4x4 convolutions, then
    one 3x3 and the residual stack. All but the last strided convolution have half the width."""

    def __init__(
        self, in_channels: int, channels: int, residual_channels: int, num_layers: int, ratio: int
    ):
        widths = [in_channels, *[channels // 2] * (halvings(ratio) - 1), channels]
        if ratio == 2:  # the coarser levels: as the published ports, half the width before the 3x3
            widths = [in_channels, channels // 2]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, 4, stride=2, padding=1), nn.ReLU(True)]
        layers += [nn.Conv2d(widths[-1], channels, 3, padding=1)]
        super().__init__(*layers, *residual_stack(channels, residual_channels, num_layers))


class Decoder(nn.Sequential):
    """(B, in_channels, H, W) -> (B, out_channels, H*ratio, W*ratio): the encoder mirrored, with
    transposed 4x4 convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        residual_channels: int,
        num_layers: int,
        ratio: int,
    ):
        widths = [channels, *[channels // 2] * (halvings(ratio) - 1), out_channels]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 3, padding=1),
            *residual_stack(channels, residual_channels, num_layers),
        ]
        for width_in, width_out in pairwise(widths):
            layers += [nn.ConvTranspose2d(width_in, width_out, 4, stride=2, padding=1)]
            layers += [nn.ReLU(True)]
        super().__init__(*layers[:-1])  # no ReLU after the last
