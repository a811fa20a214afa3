"""A small residual classifier, whose pooled features also serve as a yardstick (the judge).

No normalisation statistics are kept (group norm), so weights can be averaged and any number of
processes train the same model. Residual blocks as in He et al. 2016, norm after convolution.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

NUM_GROUPS = 8
GRID = 4  # features are pooled to 4x4 and not to one vector: in aligned faces places mean something


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes and meaning of the outputs; the stage fills in what the data say."""

    in_channels: int = 3
    """Colour channels of the images."""
    num_outputs: int
    """Attributes or classes."""
    channels: int = 32
    """Width of the first stage, a multiple of 8; there are 4 times as many features."""
    kind: Literal["attributes", "classes"]
    """attributes: one yes or no per output; classes: one output is true."""
    names: tuple[str, ...]
    """What the outputs stand for, in order."""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"model.in_channels must be at least 1, got {self.in_channels}")
        if self.channels < NUM_GROUPS or self.channels % NUM_GROUPS:
            raise ValueError(
                f"model.channels must be a multiple of {NUM_GROUPS}, got {self.channels}"
            )
        if self.num_outputs < 1 or self.num_outputs != len(self.names):
            raise ValueError(
                f"model.num_outputs must be the number of names ({len(self.names)}, at least 1), "
                f"got {self.num_outputs}"
            )

    @property
    def num_features(self) -> int:
        return 4 * self.channels


class _Block(nn.Module):
    """Halves the grid: (B, in_channels, H, W) -> (B, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(NUM_GROUPS, out_channels),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))
        return F.relu(shortcut + self.body(x))


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1], H and W at least 28 -> logits (B, num_outputs)."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        width = config.channels
        self.stages = nn.Sequential(
            nn.Conv2d(config.in_channels, width, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            _Block(width, 2 * width),
            _Block(2 * width, 4 * width),
            _Block(4 * width, 4 * width),
        )
        self.project = nn.Linear(4 * width * GRID**2, config.num_features)
        self.head = nn.Linear(config.num_features, config.num_outputs)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, num_features), each of mean 0, variance 1.

        Normalised per image, so that distances between features have the same scale in every run.
        """
        pooled = F.adaptive_avg_pool2d(self.stages(2 * images - 1), GRID)  # (B, 4 width, 4, 4)
        features = F.relu(self.project(pooled.flatten(1)))
        return F.layer_norm(features, (self.config.num_features,))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def loss(logits: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """Cross-entropy in nats, a scalar: the mean over known targets.

    Args:
        logits: (B, A).
        targets: attributes (B, A) in {-1 no, 0 unknown, +1 yes}, or classes (B,) int64.
    """
    logits = logits.float()
    if kind == "classes":
        return F.cross_entropy(logits, targets)
    known = (targets != 0).float()
    # -log sigmoid(t·l) for a target t in {-1, +1}
    return (F.softplus(-logits * targets.float()) * known).sum() / known.sum().clamp(min=1)
