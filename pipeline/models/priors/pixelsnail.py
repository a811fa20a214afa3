"""PixelSNAIL (Chen et al. 2018): causal convolutions with attention in between, as in VQ-VAE-2
(Razavi et al. 2019, appendix A.2).

Every convolution reaches strictly upward or strictly along its own row to the left; the attention
sees t' < t and row' <= row (order wavefront), or all that comes before in raster order. The paper's
code was not published: which of its sizes stands where is our reading, and the attention of order
wavefront is not the paper's. `benchmarks/prior_studies.py --study order` compares the masks.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.priors.causal import CausalAttention, CausalConv, See, above, left
from pipeline.models.priors.prior import Prior, PriorConfig


class ResidualLayer(nn.Module):
    """x + GLU(1x1(dropout(ELU(conv(ELU(x)) + condition)))): a causal convolution, or with
    kernel_size 1 a network of each position on its own. (..., C), (..., C) -> (..., C)."""

    def __init__(self, channels: int, residual_channels: int, kernel_size: int, dropout: float):
        super().__init__()
        seen = above(kernel_size) + left(kernel_size, strict=False)
        self.conv = CausalConv(channels, residual_channels, seen)
        self.condition = nn.Linear(channels, residual_channels)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(residual_channels, 2 * channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, see: See) -> torch.Tensor:
        inner = F.elu(see(self.conv, F.elu(x)) + self.condition(condition))
        return x + F.glu(self.out(self.dropout(inner)))


class AttentionLayer(nn.Module):
    """x + GLU(1x1(attention)): keys and values from features and codes, queries from features."""

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__()
        self.attention = CausalAttention(
            config.channels, config.attention_channels, config.heads, config.grid, slope,
            own_codes=True,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.attention_channels, 2 * config.channels)

    def forward(self, x: torch.Tensor, codes: torch.Tensor | None, see: See) -> torch.Tensor:
        seen = see(self.attention, F.elu(x), codes)
        return x + F.glu(self.out(self.dropout(seen)))


class PixelSNAIL(Prior):
    """`config.layers` convolutional layers with `config.attention_layers` spread among them, then
    `config.output_layers` of 1x1."""

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__(config, slope)
        width, kernel, dropout = config.channels, config.kernel_size, config.dropout
        inner = config.residual_channels or width
        self.first = CausalConv(width, width, above(kernel) + left(kernel, strict=True))
        self.row = nn.Parameter(0.02 * torch.randn(config.grid[0], 1, width))  # where a position is
        self.column = nn.Parameter(0.02 * torch.randn(1, config.grid[1], width))
        self.layers = nn.ModuleList()
        for number in range(1, config.layers + 1):
            self.layers.append(ResidualLayer(width, inner, kernel, dropout))
            if number * config.attention_layers % config.layers < config.attention_layers:
                self.layers.append(AttentionLayer(config, slope))
        for _ in range(config.output_layers):
            self.layers.append(ResidualLayer(width, inner, 1, dropout))
        self.head = nn.Linear(width, config.codebook_size)

    def condition(self, *args, **kwargs) -> torch.Tensor:
        return super().condition(*args, **kwargs) + self.row + self.column

    def body(self, x: torch.Tensor | None, condition: torch.Tensor, see: See) -> torch.Tensor:
        h = see(self.first, x)
        for layer in self.layers:
            other = x if isinstance(layer, AttentionLayer) else condition
            h = self.run_layer(layer, h, other, see)
        return self.head(F.elu(h))
