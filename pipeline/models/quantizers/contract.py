"""What every quantizer is: latents in, quantized latents, codes and losses out.

Shapes: B batch, D code dimension, H, W grid, K codebook size.

A forward pass changes nothing: the training loop hands its output to `training.codebooks`, which
sums statistics over all ranks and calls `update`. So a pass that is repeated (activation
checkpointing), compiled, or made in eval mode cannot move a codebook.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kernels import nearest_code

Gradient = Literal["straight_through", "rotation"]

# A fresh code starts just above the threshold of revival: unused it is replaced again within
# log(1.1)/(1 - γ) steps, and its small count lets it follow its latents quickly.
FRESH_MARGIN = 1.1


class Quantized(NamedTuple):
    """What a quantizer returns; all in at least fp32."""

    quantized: torch.Tensor  # (B, D, H, W) gradients pass on to the latents
    codes: torch.Tensor  # (B, H, W) int64 in [0, K)
    commitment: torch.Tensor  # scalar, |z_e - sg[e]|^2 averaged over vectors and dimensions
    codebook_loss: torch.Tensor  # scalar, |sg[z_e] - e|^2 likewise; 0 where no gradient moves e
    vectors: torch.Tensor  # (B, H, W, D') what was compared with the codes, detached
    error: torch.Tensor  # scalar, mean square of vectors minus their codes, detached


class Statistics(NamedTuple):
    """What a global batch says about a codebook."""

    counts: torch.Tensor  # (K,) vectors per code
    sums: torch.Tensor  # (K, D) sum of the vectors per code
    candidates: torch.Tensor  # (K, D) random vectors of the batch, for dead codes


class Quantizer(nn.Module, ABC):
    """The contract."""

    num_codes: int

    @abstractmethod
    def forward(self, latents: torch.Tensor) -> Quantized:
        """latents (B, D, H, W) of any floating dtype; computed in at least fp32."""

    @abstractmethod
    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """codes (B, H, W) int64 in [0, K) -> codebook vectors (B, D, H, W)."""


class NearestCode(Quantizer):
    """A quantizer that takes the nearest row of a table, `vectors_of_codes`."""

    gradient: Gradient = "straight_through"
    learns_codes = False  # whether a gradient moves the table

    @abstractmethod
    def vectors_of_codes(self) -> torch.Tensor:
        """The table (K, D)."""

    def project(self, vectors: torch.Tensor, dim: int) -> torch.Tensor:
        """Puts vectors where the codes live; `dim` is the dimension of size D."""
        return vectors

    def forward(self, latents: torch.Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            table = self.vectors_of_codes()
            latents = self.project(latents.to(torch.promote_types(latents.dtype, table.dtype)), 1)
            vectors = latents.detach().movedim(1, -1)
            codes = nearest_code(vectors, table.detach())
            quantized = F.embedding(codes, table).movedim(-1, 1)
            commitment = (latents - quantized.detach()).square().mean()
            if self.learns_codes:
                codebook_loss = (latents.detach() - quantized).square().mean()
            else:
                codebook_loss = torch.zeros_like(commitment)
            error, quantized = commitment.detach(), quantized.detach()
            if self.training:
                step = {"straight_through": straight_through, "rotation": rotation}
                quantized = step[self.gradient](latents, quantized)
        return Quantized(quantized, codes, commitment, codebook_loss, vectors, error)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return F.embedding(codes, self.vectors_of_codes()).movedim(-1, 1)


class PlacedCodes(NearestCode):
    """A quantizer whose codes can be put anywhere: k-means starts them, dead ones start anew.

    `counts` is the EMA of the vectors per code and global batch, by which dead codes are found.
    """

    counts: torch.Tensor

    def __init__(
        self, num_codes: int, decay: float, revival: float, gradient: Gradient = "straight_through"
    ):
        super().__init__()
        self.num_codes, self.gradient = num_codes, gradient
        self.decay, self.revival = decay, revival
        self.register_buffer("counts", torch.ones(num_codes))

    @abstractmethod
    def place(self, which: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor) -> None:
        """Puts the codes of the mask `which` (K,) at `vectors` (K, D), with all their statistics
        as after `counts` (K,) vectors per global batch."""

    def follow(self, statistics: Statistics, decay: float) -> None:
        """Moves the codes towards their vectors, where the optimizer does not."""

    @torch.no_grad()
    def update(self, statistics: Statistics, batch_size: int, revive: bool = True) -> torch.Tensor:
        """One step from the statistics of a global batch of `batch_size` images, after the
        optimizer's; returns how many codes started anew.

        The decay is given for batches of 128 images, and scaled so that the memory in images is
        the same for any batch size. A code is dead when its count fell below `revival` of the
        uniform share.
        """
        decay = self.decay ** (batch_size / 128)
        self.counts.lerp_(statistics.counts, 1 - decay)
        self.follow(statistics, decay)
        threshold = self.revival * statistics.counts.sum() / self.num_codes
        dead = (self.counts < threshold) & revive
        self.place(dead, statistics.candidates, (FRESH_MARGIN * threshold).expand_as(self.counts))
        return dead.sum()


def straight_through(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` with the gradient of `latents` (van den Oord et al. 2017, section 3.2)."""
    return quantized + (latents - latents.detach())  # the very code, as `lookup` gives it


def rotation(latents: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized` as the latents rotated and scaled by constants (Fifty et al. 2024, eq. 4).

    Both (B, D, ...). The gradient turns with the rotation R that takes z to e:
    q = (|e|/|z|) R z with R = I - 2 r r' + 2 ê ẑ', r = (ẑ + ê)/|ẑ + ê|.
    """
    info = torch.finfo(latents.dtype)
    with torch.no_grad():
        new_norm = quantized.norm(dim=1, keepdim=True)
        # a latent near zero has no direction, and would scale its gradient beyond all bounds
        old_norm = latents.norm(dim=1, keepdim=True)
        old_norm = torch.maximum(old_norm, info.eps * new_norm).clamp(min=info.tiny)
        old, new = latents / old_norm, quantized / new_norm.clamp(min=info.tiny)
        middle = old + new
        length = middle.norm(dim=1, keepdim=True)
        # of opposite directions only rounding is left; without it R is the reflection of z to e
        middle = torch.where(length > info.eps**0.5, middle / length, 0)
        scale = new_norm / old_norm
    along_middle = (middle * latents).sum(1, keepdim=True)
    along_old = (old * latents).sum(1, keepdim=True)
    turned = scale * (latents - 2 * middle * along_middle + 2 * new * along_old)
    return quantized + (turned - turned.detach())  # the very code, as `lookup` gives it


def usage(counts: torch.Tensor) -> tuple[float, float, int]:
    """Perplexity (effective codes, exp of the entropy), unused fraction and codes used, from the
    number of vectors per code (K,)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum())
    used = int((counts > 0).sum())
    return float(perplexity), 1 - used / len(counts), used
