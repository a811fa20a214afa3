"""Gated PixelCNN over codes, conditioned on coarser levels and on a class or attributes.

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", with one change:
every convolution of the vertical stack reaches strictly upward. In the classic stack the deeper
layers also look to the right within their own row, and that reach adds up over the layers. Here
every step to the right is paid for by going up a row, so the prediction at (i, j) depends only on
positions with t' < t, where t = j + slope·i: all positions of one t can be sampled together.

Codes are (B, H, W) int64; K is the codebook size of the level.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from pipeline.models.blocks import ResidualBlock


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig:
    """Sizes of a prior. The fields from `codebook_size` on are facts of the codes it is trained
    on; train_prior.py fills them in."""

    channels: int = 128
    """Hidden units of both stacks."""
    layers: int = 10
    """Gated layers after the first."""
    kernel_size: int = 5
    """Width of the masked convolutions, odd; the sampling front has slope kernel_size // 2 + 1."""
    condition_layers: int = 4
    """Residual blocks over the coarser codes (finer levels only)."""
    dropout: float = 0.1
    """Dropout inside the gated layers."""
    codebook_size: int = 512
    """K of this level."""
    coarser_codebook_sizes: tuple[int, ...] = ()
    """K of the coarser levels this one is conditioned on, coarse to fine; empty for level 0."""
    num_classes: int = 0
    """Classes to condition on; 0 = none."""
    num_attributes: int = 0
    """Binary attributes to condition on, each -1, +1 or 0 = unknown; 0 = none."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size must be odd and >= 3, got {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")

    @property
    def slope(self) -> int:
        """s of t = j + s·i: positions of equal t do not depend on each other."""
        return self.kernel_size // 2 + 1


class UpwardConv(nn.Conv2d):
    """Sees the `rows` rows strictly above and `kernel_size` columns about its own.

    (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int):
        self.rows, self.reach = kernel_size // 2, kernel_size // 2
        super().__init__(channels_in, channels_out, (self.rows, kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # rows i-rows ... i-1 predict row i: pad above, and drop what the last row would see
        padded = F.pad(x, (self.reach, self.reach, self.rows, 0))[:, :, :-1]
        return super().forward(padded)


class LeftwardConv(nn.Conv2d):
    """Sees `kernel_size // 2` columns to the left, and its own unless `strict`.

    (B, C, H, W) -> (B, C', H, W). Mask A of the paper is strict, mask B is not."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, strict: bool):
        self.reach, self.strict = kernel_size // 2, strict
        super().__init__(channels_in, channels_out, (1, self.reach + (not strict)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (self.reach, 0, 0, 0))
        return super().forward(padded[..., :-1] if self.strict else padded)


def gate(x: torch.Tensor) -> torch.Tensor:
    """tanh(a)·sigmoid(b) of the two halves of the channels (eq. 2). (B, 2C, ...) -> (B, C, ...)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks: vertical v, horizontal h, and a condition map or bias (eq. 3, 4).

    The vertical features of the same position feed the horizontal stack; both are residual.
    """

    def __init__(self, channels: int, kernel_size: int, dropout: float):
        super().__init__()
        self.up = UpwardConv(channels, 2 * channels, kernel_size)
        self.left = LeftwardConv(channels, 2 * channels, kernel_size, strict=False)
        self.across = nn.Conv2d(channels, 2 * channels, 1)
        self.condition = nn.Conv2d(channels, 4 * channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.out_v = nn.Conv2d(channels, channels, 1)
        self.out_h = nn.Conv2d(channels, channels, 1)

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """v, h (B, C, H, W); condition (B, C, H, W) or (B, C, 1, 1)."""
        condition_v, condition_h = self.condition(condition).chunk(2, dim=1)
        v = v + self.out_v(self.dropout(gate(self.up(v) + condition_v)))
        h_in = self.left(h) + self.across(v) + condition_h
        return v, h + self.out_h(self.dropout(gate(h_in)))


class ConditionNetwork(nn.Module):
    """Coarser codes -> a feature map on this level's grid; sees everything, masks nothing."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, config.channels) for size in config.coarser_codebook_sizes
        )
        blocks = [
            ResidualBlock(config.channels, config.channels // 2)
            for _ in range(config.condition_layers)
        ]
        self.body = nn.Sequential(
            nn.Conv2d(config.channels, config.channels, 3, padding=1), *blocks
        )

    def forward(self, coarser: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """coarser codes, each (B, h_l, w_l) -> (B, C, *grid); any number of levels and ratios."""
        maps = [
            F.interpolate(rearrange(embed(codes), "b h w c -> b c h w"), grid, mode="nearest")
            for embed, codes in zip(self.embeddings, coarser, strict=True)
        ]
        return self.body(torch.stack(maps).sum(0))


class PixelCNN(nn.Module):
    """p(codes | coarser codes, class, attributes) as a product over positions in raster order."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        self.config = config
        width, kernel = config.channels, config.kernel_size
        self.embed = nn.Embedding(config.codebook_size, width)
        self.first_up = UpwardConv(width, width, kernel)
        self.first_left = LeftwardConv(width, width, kernel, strict=True)
        self.layers = nn.ModuleList(
            GatedLayer(width, kernel, config.dropout) for _ in range(config.layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, config.codebook_size, 1),
        )
        self.coarser = ConditionNetwork(config) if config.coarser_codebook_sizes else None
        self.classes = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.attributes = nn.Linear(config.num_attributes, width) if config.num_attributes else None
        if self.attributes is not None:
            nn.init.normal_(self.attributes.weight)  # as loud as an embedding, or it learns slowly

    @property
    def slope(self) -> int:
        return self.config.slope

    def condition(
        self,
        batch_size: int,
        grid: tuple[int, int],
        coarser: list[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        attributes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything the prior is conditioned on, as one map (B, C, *grid) or bias (B, C, 1, 1).

        Args:
            coarser: codes of the coarser levels, (B, h_l, w_l) int64, coarse to fine.
            labels: (B,) int64 in [0, num_classes), -1 = unknown; None = all unknown.
            attributes: (B, num_attributes) of -1, +1, or 0 = unknown; None = all unknown.
        """
        weight = self.embed.weight
        total = weight.new_zeros(batch_size, self.config.channels, 1, 1)
        if self.classes is not None:
            if labels is None:
                labels = torch.full((batch_size,), -1, device=weight.device)
            # the last row stands for "unknown"
            known = torch.where(labels < 0, self.config.num_classes, labels)
            total = total + self.classes(known)[:, :, None, None]
        if self.attributes is not None:
            if attributes is None:
                attributes = weight.new_zeros(batch_size, self.config.num_attributes)
            total = total + self.attributes(attributes.to(weight.dtype))[:, :, None, None]
        if self.coarser is not None:
            if coarser is None:
                raise ValueError("this prior needs the codes of the coarser levels")
            total = total + self.coarser(coarser, grid)
        return total

    def logits(self, codes: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """codes (B, H, W) int64, condition from `condition()` -> (B, K, H, W)."""
        return self.logits_from_embedding(self.embed(codes), condition)

    def logits_from_embedding(self, embedded: torch.Tensor, condition: torch.Tensor):
        """Embedded codes (B, H, W, C) -> logits (B, K, H, W); differentiable, for the tests."""
        x = rearrange(embedded, "b h w c -> b c h w")
        v = self.first_up(x)
        h = v + self.first_left(x)
        for layer in self.layers:
            v, h = layer(v, h, condition)
        return self.head(h)

    def forward(
        self,
        codes: torch.Tensor,
        coarser: list[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        attributes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats per code; codes (B, H, W) int64 in [0, K)."""
        grid = (codes.shape[1], codes.shape[2])
        condition = self.condition(len(codes), grid, coarser, labels, attributes)
        return F.cross_entropy(self.logits(codes, condition).float(), codes)
