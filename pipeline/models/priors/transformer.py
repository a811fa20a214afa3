"""A decoder-only transformer over the codes in raster order, one token per position: the second
family of priors, as in VQGAN (Esser et al. 2021) with the architecture of GPT-2 (Radford et al.
2019): normalisation before each part, learned positions.

Class, attributes and coarser codes are added to the tokens: the coarser codes by a network over
the whole grid, as with the other priors, so a token has them at its own place.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.priors.causal import CausalAttention, PreviousCode, See
from pipeline.models.priors.prior import Prior, PriorConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). (..., C) -> (..., C)."""

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__()
        width, inner = config.channels, config.residual_channels or 4 * config.channels
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(
            width, width, config.heads, config.grid, slope, own_codes=False
        )
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, inner), nn.Linear(inner, width)
        # values of size 1; what is added to the residual stream, by the length of the stream
        last = (2 * config.layers) ** -0.5
        for layer, size in (
            (self.attention.query, 1), (self.attention.key_value, 1), (self.out, last),
            (self.mlp_in, 1), (self.mlp_out, last),
        ):  # fmt: skip
            nn.init.normal_(layer.weight, std=size * layer.in_features**-0.5)

    def forward(self, x: torch.Tensor, see: See) -> torch.Tensor:
        x = x + self.dropout(self.out(see(self.attention, self.norm_attention(x), None)))
        inner = F.gelu(self.mlp_in(self.norm_mlp(x)))
        return x + self.dropout(self.mlp_out(inner))


class Transformer(Prior):
    """`config.layers` blocks."""

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__(config, slope)
        self.previous = PreviousCode(config.channels)
        self.positions = nn.Parameter(torch.randn(*config.grid, config.channels))
        self.layers = nn.ModuleList(Block(config, slope) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels)
        self.head = nn.Linear(config.channels, config.codebook_size)

    def condition(self, *args, **kwargs) -> torch.Tensor:
        return super().condition(*args, **kwargs) + self.positions

    def body(self, x: torch.Tensor | None, condition: torch.Tensor, see: See) -> torch.Tensor:
        h = see(self.previous, x) + condition
        for layer in self.layers:
            h = self.run_layer(layer, h, see)
        return self.head(self.norm(h))
