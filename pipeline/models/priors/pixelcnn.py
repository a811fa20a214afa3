"""Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders"),
with one change in order wavefront: every convolution of the vertical stack reaches strictly upward.

In the classic stack (order raster) the deeper layers also look to the right within their own row,
and that reach adds up over the layers. With the change every step to the right is paid for by going
up a row, so whole diagonal fronts are sampled together; `benchmarks/prior_studies.py --study order`
measures what that costs in nats.
"""

import torch
from torch import nn

from pipeline.models.priors.causal import CausalConv, See, above, left
from pipeline.models.priors.prior import Prior, PriorConfig, gate


class GatedLayer(nn.Module):
    """One layer of both stacks: vertical v, horizontal h, and a condition map or bias (eq. 3, 4).

    The vertical features of the same position feed the horizontal stack; both are residual.
    """

    def __init__(self, channels: int, kernel_size: int, dropout: float, own_row: bool = False):
        super().__init__()
        self.up = CausalConv(channels, 2 * channels, above(kernel_size, own_row))
        self.left = CausalConv(channels, 2 * channels, left(kernel_size, strict=False))
        self.across = nn.Linear(channels, 2 * channels)
        self.condition = nn.Linear(channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.out_v = nn.Linear(channels, channels)
        self.out_h = nn.Linear(channels, channels)

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, condition: torch.Tensor, see: See
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """v, h (..., C); condition (..., C)."""
        condition_v, condition_h = self.condition(condition).chunk(2, dim=-1)
        v = v + self.out_v(self.dropout(gate(see(self.up, v) + condition_v)))
        h_in = see(self.left, h) + self.across(v) + condition_h
        return v, h + self.out_h(self.dropout(gate(h_in)))


class PixelCNN(Prior):
    """The gated PixelCNN of `config.layers` layers after the first."""

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__(config, slope)
        width, kernel = config.channels, config.kernel_size
        self.first_up = CausalConv(width, width, above(kernel))
        self.first_left = CausalConv(width, width, left(kernel, strict=True))
        self.layers = nn.ModuleList(
            GatedLayer(width, kernel, config.dropout, own_row=config.order == "raster")
            for _ in range(config.layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.codebook_size)
        )

    def body(self, x: torch.Tensor | None, condition: torch.Tensor, see: See) -> torch.Tensor:
        v = see(self.first_up, x)
        h = v + see(self.first_left, x)
        for layer in self.layers:
            v, h = self.run_layer(layer, v, h, condition, see)
        return self.head(h)
