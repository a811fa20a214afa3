"""What all priors over codes have in common: their config, what they are conditioned on, and the
contract by which they are trained and sampled.

A prior gives p(codes | coarser codes, class, attributes) as a product over positions. Codes are
(B, H, W) int64 in [0, K). Its network is `body`, written once for whole grids and for single
fronts; see causal.py and fronts.py. PRIORS in pipeline/models/priors/__init__.py names the kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.models.blocks import ResidualBlock
from pipeline.models.priors.causal import See, whole

MAX_GRID = 128  # rows and columns: what the scan for the slope takes grows with them


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Kind and sizes of a prior. The fields from `grid` on are facts of the codes it is trained on;
    train_prior.py fills them in."""

    architecture: Literal["pixelcnn", "pixelsnail", "transformer"] = "pixelcnn"
    """Gated PixelCNN, PixelSNAIL (PixelCNN with attention), or a decoder-only transformer."""
    order: Literal["wavefront", "raster"] = "wavefront"
    """What a position may depend on. wavefront: what comes before it both in raster order and on
    the diagonal fronts that are sampled together. raster: all that comes before it in raster order
    (the classic models): sampled one position at a time. A transformer is always raster."""
    channels: int = 128
    """Hidden units."""
    layers: int = 10
    """Layers after the first."""
    kernel_size: int = 5
    """Width of the masked convolutions, odd (not of a transformer)."""
    residual_channels: int | None = None
    """Hidden units inside a layer of a PixelSNAIL (None = channels) or a transformer (None = 4 x
    channels)."""
    attention_layers: int = 0
    """Attention layers of a PixelSNAIL, spread evenly among its layers."""
    attention_channels: int = 128
    """Width of keys, queries and values, over all heads (PixelSNAIL)."""
    heads: int = 8
    """Heads of the attention (PixelSNAIL, transformer)."""
    output_layers: int = 0
    """Residual layers that see their own position only, at the end (PixelSNAIL)."""
    condition_layers: int = 4
    """Residual blocks over the coarser codes (finer levels only)."""
    dropout: float = 0.1
    """Dropout inside the layers."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of this level's codes."""
    codebook_size: int = 512
    """K of this level."""
    coarser_codebook_sizes: tuple[int, ...] = ()
    """K of the coarser levels this one is conditioned on, coarse to fine; empty for level 0."""
    num_classes: int = 0
    """Classes to condition on; 0 = none."""
    num_attributes: int = 0
    """Binary attributes to condition on, each -1, +1 or 0 = unknown; 0 = none."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers", "attention_channels", "heads", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("attention_layers", "output_layers", "condition_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must be at least 0, got {getattr(self, name)}")
        if self.residual_channels is not None and self.residual_channels < 1:
            raise ValueError(f"model.residual_channels must be at least 1 or null, got "
                             f"{self.residual_channels}")  # fmt: skip
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size must be odd and >= 3, got {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}")
        if not 1 <= min(self.grid) <= max(self.grid) <= MAX_GRID:
            raise ValueError(
                f"model.grid must be 1 x 1 to {MAX_GRID} x {MAX_GRID}, got {self.grid}"
            )
        if self.architecture != "pixelsnail" and (self.attention_layers or self.output_layers):
            raise ValueError(
                "model.attention_layers and model.output_layers are of architecture pixelsnail, "
                f"not of {self.architecture}"
            )
        if self.attention_layers > self.layers:
            raise ValueError(f"model.attention_layers must be at most model.layers, {self.layers}, "
                             f"got {self.attention_layers}")  # fmt: skip
        width = {"transformer": "channels", "pixelsnail": "attention_channels"}
        name = width.get(self.architecture)
        if name and getattr(self, name) % self.heads:
            raise ValueError(f"model.{name} must be a multiple of model.heads, {self.heads}, "
                             f"got {getattr(self, name)}")  # fmt: skip


def gate(x: torch.Tensor) -> torch.Tensor:
    """tanh(a)·sigmoid(b) of the two halves of the channels (van den Oord et al. 2016, eq. 2).
    (..., 2C) -> (..., C)."""
    a, b = x.chunk(2, dim=-1)
    return torch.tanh(a) * torch.sigmoid(b)


class CoarserCodes(nn.Module):
    """Coarser codes -> a feature map on this level's grid; sees everything, masks nothing."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.grid = config.grid
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, config.channels) for size in config.coarser_codebook_sizes
        )
        blocks = [
            ResidualBlock(config.channels, max(1, config.channels // 2))
            for _ in range(config.condition_layers)
        ]
        self.body = nn.Sequential(
            nn.Conv2d(config.channels, config.channels, 3, padding=1), *blocks
        )

    def forward(self, coarser: Sequence[torch.Tensor]) -> torch.Tensor:
        """coarser codes, each (B, h_l, w_l) -> (B, H, W, C); any number of levels and ratios."""
        maps = [
            F.interpolate(rearrange(embed(codes), "b h w c -> b c h w"), self.grid, mode="nearest")
            for embed, codes in zip(self.embeddings, coarser, strict=True)
        ]
        return rearrange(self.body(torch.stack(maps).sum(0)), "b c h w -> b h w c")


class Prior(nn.Module, ABC):
    """p(codes | coarser codes, class, attributes).

    A kind of prior defines its layers and `body`. `slope` is that of the fronts it is sampled in.
    """

    def __init__(self, config: PriorConfig, slope: int):
        super().__init__()
        self.config, self.slope = config, slope
        self.checkpoint_activations = False
        """Compute each layer a second time in the backward pass instead of keeping its values."""
        width = config.channels
        self.embed = nn.Embedding(config.codebook_size, width)
        self.coarser = CoarserCodes(config) if config.coarser_codebook_sizes else None
        # one row more, for "unknown"
        self.classes = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.attributes = nn.Linear(config.num_attributes, width) if config.num_attributes else None
        if self.attributes is not None:
            # together as loud as an embedding: quieter they are not heard, louder they drown it
            nn.init.normal_(self.attributes.weight, std=config.num_attributes**-0.5)

    @abstractmethod
    def body(self, x: torch.Tensor | None, condition: torch.Tensor, see: See) -> torch.Tensor:
        """Embedded codes (..., C), None at a front, and condition (..., C) -> logits (..., K)."""

    def run_layer(self, layer: nn.Module, *inputs) -> Any:
        """`layer(*inputs)`, with its activations kept or computed anew."""
        if self.checkpoint_activations and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def condition(
        self,
        batch_size: int,
        coarser: Sequence[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        attributes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything the prior is conditioned on: a map (B, H, W, C), or the same everywhere,
        (B, 1, 1, C).

        Args:
            coarser: codes of the coarser levels, (B, h_l, w_l) int64, coarse to fine.
            labels: (B,) int64 in [0, num_classes), -1 = unknown; None = all unknown.
            attributes: (B, num_attributes) of -1, +1, or 0 = unknown; None = all unknown.
        """
        weight = self.embed.weight
        total = weight.new_zeros(batch_size, 1, 1, self.config.channels)
        if self.classes is not None:
            if labels is None:
                labels = torch.full((batch_size,), -1, device=weight.device)
            known = torch.where(labels < 0, self.config.num_classes, labels)
            total = total + self.classes(known)[:, None, None]
        if self.attributes is not None:
            if attributes is None:
                attributes = weight.new_zeros(batch_size, self.config.num_attributes)
            total = total + self.attributes(attributes.to(weight.dtype))[:, None, None]
        if self.coarser is not None:
            if coarser is None:
                raise ValueError("this prior needs the codes of the coarser levels")
            total = total + self.coarser(coarser)
        return total

    def logits(self, codes: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """codes (B, H, W) int64, condition from `condition()` -> (B, H, W, K)."""
        return self.body(self.embed(codes), condition, whole)

    def forward(
        self,
        codes: torch.Tensor,
        coarser: Sequence[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        attributes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats per code; codes (B, H, W) int64 in [0, K)."""
        logits = self.logits(codes, self.condition(len(codes), coarser, labels, attributes))
        return F.cross_entropy(logits.float().flatten(0, 2), codes.flatten())
