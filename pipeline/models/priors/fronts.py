"""Fronts of positions that can be sampled together, and the caches with which a network is
evaluated at one front after another.

Position (i, j) of an (H, W) grid belongs to front t = j + slope·i. Where a prediction depends only
on positions of smaller t, all of one front can be sampled at once: (W-1) + slope·(H-1) + 1 steps.
Raster order is slope = W, one position per front. `dependency_slope` finds the smallest slope.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from pipeline.models.priors.causal import Offsets


def fronts(grid: tuple[int, int], slope: int) -> Iterator[torch.Tensor]:
    """Positions i·W + j of each front (P,) int64, in the order of t; empty fronts are left out."""
    height, width = grid
    for t in range(width + slope * (height - 1)):
        rows = torch.arange(max(0, -(-(t - width + 1) // slope)), min(height - 1, t // slope) + 1)
        if len(rows):
            yield rows * width + (t - slope * rows)


def dependency_slope(network: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> int:
    """The smallest slope whose fronts a network may be sampled in, found by its gradients.

    Three outputs are followed: at the left and the right end of the last row, and in the middle.
    That is all there is to know of convolutions; a mask that differs from place to place needs the
    full scan of tests/test_priors.py.

    Args:
        network: inputs -> outputs (N, H, W, K), differentiable.
        inputs: (N, H, W, C) float64, random; several samples, lest a gradient be 0 by chance.

    Returns:
        1 <= slope <= W, which is raster order.

    Raises:
        ValueError: an output depends on its own position or on one after it in raster order, or it
            does not depend on its left neighbour: the gradients say nothing.
    """
    inputs = inputs.requires_grad_()
    outputs = network(inputs)
    height, width = inputs.shape[1:3]
    slope = 1
    for i, j in {(height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)}:
        # weights without a pattern, so that nothing cancels
        weights = torch.linspace(1, 2, outputs.shape[-1], dtype=outputs.dtype).sin()
        (gradient,) = torch.autograd.grad(
            (outputs[:, i, j] @ weights).sum(), inputs, retain_graph=True
        )
        seen = (gradient != 0).any(-1).any(0)
        if j > 0 and not seen[i, j - 1]:
            raise ValueError(f"the output at {(i, j)} does not depend on {(i, j - 1)}")
        seen_rows, seen_columns = torch.where(seen)
        for row, column in zip(seen_rows.tolist(), seen_columns.tolist(), strict=True):
            if row * width + column >= i * width + j:
                raise ValueError(f"the output at {(i, j)} depends on {(row, column)}")
            if row < i:
                slope = max(slope, (column - j) // (i - row) + 1)
    return slope


class FrontCaches:
    """`see` at one front of positions after another; see causal.py.

        see = FrontCaches(grid, slope, batch_size, like)
        for positions in fronts(grid, slope):
            see.begin(positions)
            outputs = model.body(None, condition at these positions, see)   # (B, P, K)
            see.end(embedded codes at these positions)                       # (B, P, C)

    Every cache has two rows more than the grid has positions: one of zeros, which stands for all
    that is outside the grid, and one that may hold anything, for positions that pad a front to a
    fixed size (`scratch`).
    """

    def __init__(self, grid: tuple[int, int], slope: int, batch_size: int, like: torch.Tensor):
        """`like` has the dtype and the device of the network's weights."""
        self.grid, self.slope, self.batch_size, self._like = grid, slope, batch_size, like.detach()
        self.outside = grid[0] * grid[1]
        self.scratch = self.outside + 1
        self.positions = torch.empty(0, dtype=torch.int64)
        self._caches: dict[nn.Module, torch.Tensor] = {}
        self._kept: dict[nn.Module, torch.Tensor] = {}
        self._tables: dict[Hashable, torch.Tensor] = {}  # neighbours of every position
        self._taps: dict[Hashable, torch.Tensor] = {}  # and of this front
        self._later: list[Callable[[torch.Tensor], Any]] = []

    def __call__(self, layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        return layer.step(self, *inputs)  # pyright: ignore[reportCallIssue]

    def begin(self, positions: torch.Tensor) -> None:
        """Goes to the front of these positions (P,) int64."""
        self.positions = positions
        self._taps, self._later = {}, []

    def end(self, embedded: torch.Tensor) -> None:
        """Tells what the front's codes turned out to be, embedded: (B, P, C)."""
        for act in self._later:
            act(embedded)
        self._later = []  # they refer to the caches

    def known_later(self, act: Callable[[torch.Tensor], Any]) -> None:
        """Has `act(embedded)` called when the front's codes are known."""
        self._later.append(act)

    def cache(self, layer: nn.Module, channels: int) -> torch.Tensor:
        """What the layer's inputs were at all earlier positions, (B, H·W + 2, channels)."""
        if layer not in self._caches:
            shape = (self.batch_size, self.outside + 2, channels)
            self._caches[layer] = self._like.new_zeros(shape)
        return self._caches[layer]

    def keep(self, layer: nn.Module, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor made from the layer's weights, once."""
        if layer not in self._kept:
            self._kept[layer] = make()
        return self._kept[layer]

    def write(self, cache: torch.Tensor, x: torch.Tensor) -> None:
        """Puts x (B, P, C) into a cache at this front."""
        cache.index_copy_(1, self.positions, x.to(cache.dtype).expand(self.batch_size, -1, -1))

    def gather(self, cache: torch.Tensor, neighbours: Offsets | str) -> torch.Tensor:
        """What a cache holds at T neighbours of this front's positions, (B, P, T·C); `neighbours`
        are offsets, or "previous" for the one before in raster order."""
        if neighbours not in self._taps:
            if neighbours not in self._tables:
                self._tables[neighbours] = self._table(neighbours).to(self._like.device)
            self._taps[neighbours] = self._tables[neighbours][self.positions].flatten()
        taps = cache.index_select(1, self._taps[neighbours])
        return taps.view(len(cache), len(self.positions), -1)

    def _table(self, neighbours: Offsets | str) -> torch.Tensor:
        """(H·W + 2, T): the neighbours' places in the caches."""
        height, width = self.grid
        place = torch.arange(height * width)
        if neighbours == "previous":
            table = torch.where(place > 0, place - 1, self.outside)[:, None]
        else:
            down, right = torch.tensor(neighbours).unbind(1)
            i, j = (place // width)[:, None] + down, (place % width)[:, None] + right
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            if (inside & (right + self.slope * down > 0)).any():
                raise ValueError(
                    "a layer looks at features of later fronts, as the classic gated PixelCNN does "
                    "to the right in its own row; sample with method rows-above"
                )
            table = torch.where(inside, i * width + j, self.outside)
        return torch.cat([table, table.new_full((2, table.shape[1]), self.outside)])
