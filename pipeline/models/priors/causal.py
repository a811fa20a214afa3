"""Layers that see only what comes before a position, each written twice: over a whole grid, for
training, and for one front of positions with caches, for sampling.

A network of such layers is written once, as `body(x, condition, see)`: every layer that looks at
other positions is called through `see(layer, *inputs)`, all others act on each position alone. With
`see = whole` the inputs are grids (B, H, W, C); with `see` a FrontCaches they are the positions of
one front, (B, P, C), and the layer finds its neighbours in a cache. In the second case the front's
own codes are not known yet, and an input that depends on them is None.

Which positions come before which: t = j + slope·i for row i, column j (see fronts.py).
"""

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pipeline.models.priors.fronts import FrontCaches

Offsets = tuple[tuple[int, int], ...]


class See(Protocol):
    """How a causal layer gets at its neighbours."""

    def __call__(self, layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor: ...


def whole(layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`see` over the whole grid at once."""
    return layer(*inputs)


def above(kernel_size: int, own_row: bool = False) -> Offsets:
    """Neighbours (rows down, columns right): `kernel_size` columns of the kernel_size // 2 rows
    strictly above; with `own_row` of the own row, too, as in the classic vertical stack."""
    reach = kernel_size // 2
    rows = range(-reach, 1 if own_row else 0)
    return tuple((row, column) for row in rows for column in range(-reach, reach + 1))


def left(kernel_size: int, strict: bool) -> Offsets:
    """kernel_size // 2 positions to the left, and the own one unless `strict`."""
    return tuple((0, column) for column in range(-(kernel_size // 2), 0 if strict else 1))


class CausalConv(nn.Module):
    """A convolution over some neighbours, zeros outside the grid. Nothing checks that the
    neighbours come before: `fronts.dependency_slope` does.

    (B, H, W, channels_in) -> (B, H, W, channels_out).
    """

    def __init__(self, channels_in: int, channels_out: int, offsets: Offsets):
        super().__init__()
        self.channels_in, self.offsets = channels_in, offsets
        # as nn.Conv2d: one column per neighbour instead of a rectangle of rows and columns
        bound = 1 / math.sqrt(channels_in * len(offsets))
        weight = torch.empty(channels_out, channels_in, len(offsets))
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = zip(*self.offsets, strict=True)
        top, first = min(rows), min(columns)
        height, width = max(rows) - top + 1, max(columns) - first + 1
        if height * width == len(self.offsets):
            kernel = self.weight.unflatten(2, (height, width))
        else:
            kernel = self.weight.new_zeros(*self.weight.shape[:2], height, width)
            kernel[:, :, [row - top for row in rows], [column - first for column in columns]] = (
                self.weight
            )
        # a negative padding cuts off what no position sees
        padded = F.pad(x, (0, 0, -first, max(columns), -top, max(rows)))
        return F.conv2d(padded.permute(0, 3, 1, 2), kernel, self.bias).permute(0, 2, 3, 1)

    def step(self, front: "FrontCaches", x: torch.Tensor | None) -> torch.Tensor:
        """The same at a front: x (B, P, channels_in), or None if it is known only afterwards."""
        matrix = front.keep(self, lambda: self.weight.transpose(1, 2).flatten(1).contiguous())
        if self.offsets == ((0, 0),):
            return F.linear(x, matrix, self.bias)  # pyright: ignore[reportArgumentType]
        cache = front.cache(self, self.channels_in)
        if x is None:
            front.known_later(lambda codes: front.write(cache, codes))
        else:
            front.write(cache, x)
        taps = front.gather(cache, self.offsets)  # (B, P, T·channels_in)
        return F.linear(taps, matrix, self.bias)


class PreviousCode(nn.Module):
    """Each position gets what its predecessor in raster order has; the first gets zeros.

    (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x.flatten(1, 2), (0, 0, 1, -1)).view_as(x)

    def step(self, front: "FrontCaches", x: None) -> torch.Tensor:
        cache = front.cache(self, self.channels)
        front.known_later(lambda codes: front.write(cache, codes))
        return front.gather(cache, "previous")


def comes_before(grid: tuple[int, int], slope: int, strict: bool) -> torch.Tensor:
    """(H·W, H·W + 1) bool: which positions (columns) each position (rows) may attend to.

    t' < t (or t' <= t, if not strict) and row' <= row: earlier both in the order of the fronts and
    in raster order. The last column is a null position, which all may attend to.
    """
    i = torch.arange(grid[0]).repeat_interleave(grid[1])
    t = torch.arange(grid[1]).repeat(grid[0]) + slope * i
    earlier = t[None] < t[:, None] if strict else t[None] <= t[:, None]
    return F.pad(earlier & (i[None] <= i[:, None]), (0, 1), value=True)


class CausalAttention(nn.Module):
    """Attention to positions that come before, and to a null position whose key and value are 0.

    With `own_codes` the keys and values are computed from the features and from the code of their
    position, so that only strictly earlier ones may be seen (PixelSNAIL, Chen et al. 2018);
    without, from the features alone, which hold only what came before, and the position sees itself
    (a decoder-only transformer).

    Features (B, H, W, channels), embedded codes (B, H, W, channels) or None -> (B, H, W, width).
    """

    mask: torch.Tensor

    def __init__(
        self, channels: int, width: int, heads: int, grid: tuple[int, int], slope: int,
        own_codes: bool,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.width, self.own_codes = heads, width, own_codes
        self.grid, self.slope = grid, slope
        self.query = nn.Linear(channels, width)
        self.key_value = nn.Linear(2 * channels if own_codes else channels, 2 * width)
        mask = comes_before(grid, slope, strict=own_codes)
        self.register_buffer("mask", mask, persistent=False)

    def _keys_values(self, features: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        """(..., 2·width): keys and values side by side."""
        return self.key_value(features if codes is None else torch.cat([features, codes], -1))

    def _attend(
        self, query: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """query (B, N, width), keys_values (B, M, 2·width), mask (N, M) -> (B, N, width)."""
        heads = (self.heads, self.width // self.heads)
        keys, values = (
            each.unflatten(-1, heads).transpose(1, 2) for each in keys_values.chunk(2, -1)
        )
        seen = F.scaled_dot_product_attention(
            query.unflatten(-1, heads).transpose(1, 2), keys, values, attn_mask=mask
        )
        return seen.transpose(1, 2).flatten(2)

    def forward(self, features: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        keys_values = self._keys_values(features, codes if self.own_codes else None).flatten(1, 2)
        query = self.query(features).flatten(1, 2)
        mask, count = self.mask, query.shape[1]
        if count < len(mask):  # the upper rows only
            mask = torch.cat([mask[:count, :count], mask[:count, -1:]], 1)
        seen = self._attend(query, F.pad(keys_values, (0, 0, 0, 1)), mask)
        return seen.unflatten(1, features.shape[1:3])

    def step(self, front: "FrontCaches", features: torch.Tensor, codes: None) -> torch.Tensor:
        """The same at a front: features (B, P, channels) -> (B, P, width)."""
        cache = front.cache(self, 2 * self.width)
        if self.own_codes:  # this front's keys have to wait for its codes
            front.known_later(lambda now: front.write(cache, self._keys_values(features, now)))
        else:
            front.write(cache, self._keys_values(features, None))
        # the row after the grid's is all zeros: the null position
        keys_values = cache[:, : self.mask.shape[1]]
        mask = self.mask[front.positions.clamp(max=len(self.mask) - 1)]
        return self._attend(self.query(features), keys_values, mask)
