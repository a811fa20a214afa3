"""Vector quantization with an EMA codebook (van den Oord et al. 2017, appendix A.1).

Shapes: B batch, D code dimension, H, W grid, K codebook size, N = B·H·W vectors.

The forward pass never changes the codebook. In training mode it keeps the batch's latents and
codes; `commit` turns them into statistics, sums them over all ranks in one flat all-reduce for all
levels, and updates the codebooks in place. Call it once per optimizer step.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from kernels import codebook_sums, nearest_code

# A fresh code starts just above the threshold of revival: unused it is replaced again within
# log(1.1)/(1 - γ) steps, and its small count lets it follow its latents quickly.
FRESH_MARGIN = 1.1


class Quantized(NamedTuple):
    """What a quantizer returns."""

    quantized: torch.Tensor  # (B, D, H, W) codebook vectors; gradients pass straight through
    codes: torch.Tensor  # (B, H, W) int64 in [0, K)
    commitment: torch.Tensor  # scalar, |z_e - sg[e]|^2 averaged over vectors and dimensions


class Statistics(NamedTuple):
    """What a batch says about a codebook; summed over ranks."""

    counts: torch.Tensor  # (K,) vectors per code
    sums: torch.Tensor  # (K, D) sum of the vectors per code
    candidates: torch.Tensor  # (K, D) random vectors of the global batch, for dead codes


class EMAQuantizer(nn.Module):
    """Nearest code of every latent vector, and a codebook that follows its latents.

        N_i = γ N_i + (1 - γ) n_i      m_i = γ m_i + (1 - γ) sum_j z_ij      e_i = m_i / N_i

    Counts start at 1 and sums at the codes, so an unused code stays where it is (from zero counts,
    as in the public ports, it would be thrown to m/eps in the first step). The first commit sets
    the codebook to random latents of the global batch; later a code whose usage fell below
    `revival` of the uniform share starts anew from such a latent, with its statistics.
    """

    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    commits: torch.Tensor

    def __init__(self, codebook_size: int, code_dim: int, decay: float, revival: float):
        super().__init__()
        self.decay, self.revival = decay, revival
        codebook = torch.randn(codebook_size, code_dim) / math.sqrt(code_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("commits", torch.zeros((), dtype=torch.int64))
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, latents: torch.Tensor) -> Quantized:
        """latents (B, D, H, W) of any floating dtype; computed in at least fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.to(torch.promote_types(latents.dtype, self.codebook.dtype))
            vectors = latents.movedim(1, -1)  # (B, H, W, D)
            codes = nearest_code(vectors.detach(), self.codebook)
            quantized = self.lookup(codes)
            commitment = (latents - quantized).square().mean()
            if self.training:
                self.pending = (vectors.detach(), codes)
                quantized = latents + (quantized - latents).detach()  # straight-through
        return Quantized(quantized, codes, commitment)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """codes (B, H, W) -> codebook vectors (B, D, H, W)."""
        return nn.functional.embedding(codes, self.codebook).movedim(-1, 1)

    def statistics(self, rank: int, world_size: int) -> Statistics:
        """This rank's share of the last batch's statistics; empties the pending batch.

        The candidates are rows of the global batch drawn by a generator that all ranks share;
        a rank fills in the rows it holds, so their sum does not depend on the world size.
        """
        if self.pending is None:
            raise RuntimeError("statistics() needs a forward pass in training mode before it")
        vectors, codes = (part.flatten(0, 2) for part in self.pending)
        self.pending = None
        counts, sums = codebook_sums(vectors, codes, len(self.codebook))
        generator = torch.Generator().manual_seed(int(self.commits))
        rows = torch.randperm(len(vectors) * world_size, generator=generator)
        rows = rows.repeat(math.ceil(len(self.codebook) / len(rows)))[: len(self.codebook)]
        local = (rows - rank * len(vectors)).to(vectors.device)
        mine = (local >= 0) & (local < len(vectors))
        candidates = vectors[local.clamp(0, len(vectors) - 1)] * mine[:, None]
        return Statistics(counts.to(sums.dtype), sums, candidates)

    @torch.no_grad()
    def update(self, statistics: Statistics, batch_size: int) -> None:
        """One EMA step from the statistics of a global batch of `batch_size` images.

        The decay is given for batches of 128 images, and scaled so that the memory in images is
        the same for any batch size.
        """
        decay = self.decay ** (batch_size / 128)
        self.counts.lerp_(statistics.counts, 1 - decay)
        self.sums.lerp_(statistics.sums, 1 - decay)
        # Laplace smoothing for the division alone: written back it would leak into the counts.
        total, eps = self.counts.sum(), 1e-5
        smoothed = (self.counts + eps) / (total + len(self.counts) * eps) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

        uniform = statistics.counts.sum() / len(self.counts)
        dead = self.counts < self.revival * uniform
        if self.commits == 0:
            dead = torch.ones_like(dead)
        fresh = uniform * (FRESH_MARGIN * self.revival or 1.0)
        self.codebook[dead] = statistics.candidates[dead]
        self.counts[dead] = fresh
        self.sums[dead] = statistics.candidates[dead] * fresh
        self.commits += 1


def commit(
    quantizers: Iterable[EMAQuantizer],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Updates all codebooks from their last batch: one flat all-reduce for all levels.

    Args:
        batch_size: images in the global batch.
        all_reduce: sums a flat tensor over the ranks in place; None with one rank.
    """
    quantizers = list(quantizers)
    statistics = [quantizer.statistics(rank, world_size) for quantizer in quantizers]
    tensors = [tensor for level in statistics for tensor in level]
    if all_reduce is not None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        tensors = [part.view_as(like) for part, like in zip(parts, tensors, strict=True)]
    for quantizer, i in zip(quantizers, range(0, len(tensors), 3), strict=True):
        quantizer.update(Statistics(*tensors[i : i + 3]), batch_size)


def usage(counts: torch.Tensor) -> tuple[float, float, int]:
    """Perplexity (effective codes, exp of the entropy), unused fraction and codes used, from the
    number of vectors per code (K,)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum())
    used = int((counts > 0).sum())
    return float(perplexity), 1 - used / len(counts), used
