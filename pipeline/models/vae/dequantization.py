"""Dequantization: a density of continuous y as a likelihood of 8-bit images x.

With d = C·H·W values v = 255 x in {0 ... 255} and y = (v + u)/256 for u in [0, 1)^d, a density p(y)
gives P(x), the integral of p over the bin of x. By Jensen, for any q(u|x) on [0, 1)^d,

    log P(x) >= E_q[log p(y) - d ln 256 - log q(u|x)]    (nats per image).

`uniform` is q = 1. `variational` learns q by a flow that starts at uniform (Ho et al. 2019,
"Flow++", section 3.1); the bound is tight where q(u|x) is proportional to p(y) in the bin. `none`
leaves x as it is, and its density has no bits/dim.
"""

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

Dequantization = Literal["none", "uniform", "variational"]

LOG_SCALE_LIMIT = 3.0  # of one coupling layer: no step of training can overflow exp


def log_sigmoid_slope(v: torch.Tensor) -> torch.Tensor:
    """log of sigmoid'(v), which is also the log-density of the standard logistic distribution."""
    return F.logsigmoid(v) + F.logsigmoid(-v)


def checkerboard(x: torch.Tensor) -> torch.Tensor:
    """(C, H, W) bool for x (B, C, H, W): neighbours in channels, rows and columns differ."""
    c, h, w = (torch.arange(size, device=x.device) for size in x.shape[1:])
    return (c[:, None, None] + h[:, None] + w) % 2 == 1


class Coupling(nn.Module):
    """Log scale and shift of one colour of the checkerboard, given the other colour and the image
    (Dinh et al. 2017, "Real NVP", eq. 9). Starts at zero, so the layer is the identity."""

    def __init__(self, channels: int, hidden_channels: int, colour: bool):
        super().__init__()
        self.colour = colour
        last = nn.Conv2d(hidden_channels, 2 * channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.body = nn.Sequential(
            nn.Conv2d(2 * channels, hidden_channels, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(hidden_channels, hidden_channels, 1),
            nn.ELU(),
            last,
        )

    def forward(self, v: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v, x (B, C, H, W) -> log scale and shift, the same shape, zero on the colour kept."""
        moved = checkerboard(x) == self.colour
        kept = torch.tanh(v / 2) * ~moved  # (-1, 1), as 2u - 1
        with torch.autocast(x.device.type, enabled=False):
            raw, shift = self.body(torch.cat([kept, 2 * x - 1], 1)).chunk(2, dim=1)
        return LOG_SCALE_LIMIT * torch.tanh(raw / LOG_SCALE_LIMIT) * moved, shift * moved


class DequantizationFlow(nn.Module):
    """q(u|x) on (0, 1)^d: logistic noise through coupling layers, then the sigmoid.

    A standard logistic variable is the logit of a uniform one, so without couplings u is uniform.
    Images x are (B, C, H, W) in [0, 1], fp32 or fp64, and so is everything computed.
    """

    def __init__(self, channels: int, hidden_channels: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            Coupling(channels, hidden_channels, colour=i % 2 == 1) for i in range(num_layers)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A draw u (B, C, H, W) in [0, 1) and log q(u|x) (B,), with gradients."""
        # torch.rand has the values 0, eps/2, ... 1 - eps/2; the middle of the first cell
        # stands for 0, whose logit is infinite
        epsilon = torch.finfo(x.dtype).eps
        v = torch.logit(torch.rand_like(x).clamp(min=epsilon / 4))
        log_q = log_sigmoid_slope(v)
        for layer in self.layers:
            log_scale, shift = layer(v, x)
            v = v * log_scale.exp() + shift
            log_q = log_q - log_scale
        log_q = log_q - log_sigmoid_slope(v)
        # log q is of v before rounding: u itself may round to 1, which is outside
        return torch.sigmoid(v).clamp(max=1 - epsilon / 2), log_q.flatten(1).sum(1)

    def log_prob(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """log q(u|x) (B,) at given u (B, C, H, W) in [0, 1); u is clamped to where its logit is
        finite."""
        epsilon = torch.finfo(u.dtype).eps
        v = torch.logit(u.clamp(epsilon / 4, 1 - epsilon / 2))
        log_q = -log_sigmoid_slope(v)
        for layer in reversed(self.layers):
            log_scale, shift = layer(v, x)
            v = (v - shift) * (-log_scale).exp()
            log_q = log_q - log_scale
        return (log_q + log_sigmoid_slope(v)).flatten(1).sum(1)


class Dequantizer(nn.Module):
    """x -> y and log q(u|x), by one of the three ways; see the bound above.

    Args:
        channels: C of the images.
        hidden_channels, num_layers: of the flow; used by `variational` alone.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        kind: Dequantization,
        channels: int,
        hidden_channels: int = 32,
        num_layers: int = 4,
    ):
        super().__init__()
        if kind not in get_args(Dequantization):
            raise ValueError(
                f"dequantization must be one of {get_args(Dequantization)}, got {kind}"
            )
        self.kind = kind
        variational = kind == "variational"
        self.flow = (
            DequantizationFlow(channels, hidden_channels, num_layers) if variational else None
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """8-bit values / 255, x (B, C, H, W) in [0, 1] -> y (B, C, H, W), log q(u|x) (B,).

        y is x itself (`none`) or a draw from [v/256, (v + 1)/256]. At least fp32.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "none":
            return x, x.new_zeros(len(x))
        if self.flow is None:
            u, log_q = torch.rand_like(x), x.new_zeros(len(x))
        else:
            u, log_q = self.flow(x)
        # a product such as k·(1/255) misses k/255 by a rounding
        return (torch.round(255 * x) + u) / 256, log_q
