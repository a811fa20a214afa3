"""The life of the codebooks in training, the same on every rank and for any number of ranks.

k-means over the first batches starts them. In every step the levels' statistics are summed over
the global batch by one flat all-reduce, which goes on beside the backward pass, and committed
after the optimizer's step. Dead codes start anew from vectors of the global batch that do not
depend on who holds them. Now and then the ranks compare hashes of their codebooks.

Shapes: D code dimension, K codebook size.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from kernels import codebook_sums, nearest_code
from pipeline.models.quantizers import PlacedCodes, Quantized, Statistics, usage
from pipeline.models.quantizers.contract import FRESH_MARGIN
from pipeline.training.collectives import all_reduce_sum, alone

KMEANS_ITERATIONS = 10
VECTORS_PER_CODE = 40  # for k-means; with fewer the means are noise


class Codebooks:
    """The codebooks of a model in training. Quantizers without placed codes are passed over.

    for every optimizer step:
        observe(output.levels, first_image, images_seen)     after each micro-batch's forward
        start_reduction()                                    before the last backward
        commit()                                             after the optimizer's step
        or discard()                                         where the step is skipped

    Args:
        quantizers: a Quantizer per level.
        batch_size: images in the global batch.
        overlap: whether the all-reduce goes on beside the backward pass; not where gradients are
            reduced by other communicators (DeepSpeed's), which NCCL wants kept apart.
    """

    def __init__(self, quantizers: Iterable[nn.Module], batch_size: int, overlap: bool = True):
        self.quantizers = list(quantizers)
        self.levels = [(n, q) for n, q in enumerate(self.quantizers) if isinstance(q, PlacedCodes)]
        self.batch_size, self.overlap = batch_size, overlap
        self.device = next(self.quantizers[0].buffers()).device
        self.reduction: dist.Work | None = None
        self.discard()

    def discard(self) -> None:
        """Forgets what was observed since the last commit."""
        if self.reduction is not None:
            self.reduction.wait()  # the other ranks are in it as well
        self.statistics: list[Statistics] = []
        self.flat: torch.Tensor | None = None
        self.reduction = None

    @torch.no_grad()
    def observe(self, outputs: Sequence[Quantized], first_image: int, images_seen: int) -> None:
        """Adds a micro-batch: the outputs of all levels for images `first_image` ... of the global
        batch that begins at `images_seen`."""
        assert self.reduction is None, "observe() after start_reduction()"
        found = []
        for level, quantizer in self.levels:
            vectors, codes = outputs[level].vectors, outputs[level].codes
            counts, sums = codebook_sums(vectors, codes, quantizer.num_codes)
            rows = draw_rows(
                quantizer.num_codes, self.batch_size * codes[0].numel(), images_seen + level
            )
            candidates = pick(vectors.flatten(0, 2), rows, first_image * codes[0].numel())
            found.append(Statistics(counts.to(sums.dtype), sums, candidates))
        if self.statistics:
            pairs = zip(self.statistics, found, strict=True)
            found = [Statistics(*map(torch.add, old, new)) for old, new in pairs]
        self.statistics = found

    def start_reduction(self) -> None:
        """Starts summing over the ranks; every rank has to call it at the same place."""
        assert self.reduction is None, "start_reduction() twice in a step"
        if alone() or not self.levels:
            return
        self.flat = torch.cat([part.flatten() for level in self.statistics for part in level])
        self.reduction = dist.all_reduce(self.flat, async_op=True)
        if not self.overlap:
            self.reduction.wait()

    def commit(self, revive: bool = True) -> torch.Tensor:
        """Updates the codebooks; returns how many codes of each level started anew (levels,)."""
        statistics = self.statistics
        assert alone() or not self.levels or self.reduction, "commit() before start_reduction()"
        if self.reduction is not None and self.flat is not None:
            self.reduction.wait()
            parts = iter(self.flat.split([p.numel() for level in statistics for p in level]))
            statistics = [
                Statistics(*[next(parts).view_as(part) for part in level]) for level in statistics
            ]
        revived = [torch.zeros((), dtype=torch.int64, device=self.device)] * len(self.quantizers)
        for (level, quantizer), found in zip(self.levels, statistics, strict=True):
            revived[level] = quantizer.update(found, self.batch_size, revive)
        self.discard()
        return torch.stack(revived)

    @torch.no_grad()
    def check_equal(self) -> None:
        """Raises RuntimeError on every rank, naming level and ranks, where the quantizers differ
        in anything they hold."""
        if alone():
            return
        hashes = [_hash(quantizer) for quantizer in self.quantizers]
        own = torch.tensor(hashes, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        table = torch.stack(everyone).cpu()  # (ranks, levels)
        usual = table.mode(0).values
        for level in range(len(self.quantizers)):
            ranks = torch.nonzero(table[:, level] != usual[level]).flatten().tolist()
            if ranks:
                # of two ranks nobody can tell which one is wrong
                where = ", ".join(map(str, ranks)) if len(table) > 2 else "0 or 1"
                raise RuntimeError(
                    f"the codebook of level {level} on rank {where} differs from that of the "
                    "others; start again, in the newest checkpoint they are the same"
                )


class CodebookUse:
    """How the codes were used since the last report, for the metrics."""

    def __init__(self, num_codes: Sequence[int], device: torch.device):
        self.counts = [torch.zeros(count, dtype=torch.int64, device=device) for count in num_codes]
        self.revived = torch.zeros(len(num_codes), device=device)

    def add(self, codes: Sequence[torch.Tensor], revived: torch.Tensor) -> None:
        """This rank's codes of a step, per level, and how many started anew (levels,)."""
        for counts, level in zip(self.counts, codes, strict=True):
            # not bincount, which reads the largest code back from the device
            counts.scatter_add_(0, level.flatten(), torch.ones_like(level.flatten()))
        self.revived += revived

    def values(self) -> dict[str, float]:
        """The figures; collective, and starts a new window."""
        values = {}
        for level, counts in enumerate(self.counts):
            all_reduce_sum(counts)
            perplexity, unused, _ = usage(counts.cpu())
            values[f"codebook/level{level}/perplexity"] = perplexity
            values[f"codebook/level{level}/unused_fraction"] = unused
            values[f"codebook/level{level}/revived"] = float(self.revived[level])
            counts.zero_()
        self.revived.zero_()
        return values


class Part(NamedTuple):
    """This rank's images of a global batch, or of one of several."""

    images: torch.Tensor  # (b, C, H, W) as the encoder takes them
    first_image: int  # place of the first one in the global batch, or among all the batches


@torch.no_grad()
def start_codebooks(model, parts: Sequence[Part], batch_size: int) -> None:
    """Places the codes of every level by k-means over the first batches of all ranks.

    Level by level, coarse to fine, because finer latents depend on the coarser codes. A level takes
    no more batches than its codes need.

    Args:
        model: a VQVAE, or anything with its `quantizers` and `encode`.
        parts: what this rank has of the first global batches, a part of each.
        batch_size: images of a global batch.
    """
    for level, quantizer in enumerate(model.quantizers):
        if not isinstance(quantizer, PlacedCodes):
            continue
        vectors, total, num_batches = [], 0, 0
        for part in parts:
            grid = model.encode(part.images)[level].vectors  # (b, h, w, D)
            per_image = grid[0, ..., 0].numel()
            vectors.append((grid.flatten(0, 2), part.first_image * per_image))
            total, num_batches = total + batch_size * per_image, num_batches + 1
            if total >= VECTORS_PER_CODE * quantizer.num_codes:
                break
        centres = kmeans(vectors, total, quantizer, seed=level)
        # As fresh ones, not with the counts of k-means: the latents of an encoder that begins to
        # learn move away, and codes of a small count follow them, or are soon found dead.
        share = total / num_batches / quantizer.num_codes
        fresh = torch.full_like(centres[:, 0], share * (FRESH_MARGIN * quantizer.revival or 1.0))
        quantizer.place(torch.ones_like(fresh, dtype=torch.bool), centres, fresh)


def kmeans(
    vectors: Sequence[tuple[torch.Tensor, int]], total: int, quantizer: PlacedCodes, seed: int
) -> torch.Tensor:
    """Lloyd's algorithm over the vectors of all ranks, from random ones; an empty cluster starts
    anew from another.

    Args:
        vectors: pieces (n, D) of this rank, each with the place of its first row among all
            `total` rows.

    Returns:
        centres (K, D), projected to where the quantizer's codes live.
    """
    size = quantizer.num_codes

    def random_rows(iteration: int) -> torch.Tensor:
        rows = draw_rows(size, total, seed * (KMEANS_ITERATIONS + 1) + iteration)
        return sum(pick(piece, rows, first) for piece, first in vectors)  # pyright: ignore

    centres = random_rows(0)
    all_reduce_sum(centres)
    for iteration in range(KMEANS_ITERATIONS):
        counts, sums = torch.zeros_like(centres[:, 0]), torch.zeros_like(centres)
        for piece, _ in vectors:
            piece_counts, piece_sums = codebook_sums(piece, nearest_code(piece, centres), size)
            counts, sums = counts + piece_counts, sums + piece_sums
        flat = torch.cat([counts, sums.flatten(), random_rows(iteration + 1).flatten()])
        all_reduce_sum(flat)
        counts, sums, fresh = flat.split([size, sums.numel(), sums.numel()])
        means = sums.view_as(centres) / counts.clamp(min=1)[:, None]
        means = torch.where(counts[:, None] > 0, means, fresh.view_as(centres))
        centres = quantizer.project(means, 1)
    return centres


def num_start_images(quantizers: Iterable[nn.Module], vectors_per_image: Sequence[int]) -> int:
    """Images that k-means needs for the codes of every level; 0 where no codes are placed."""
    images = [0]
    for quantizer, vectors in zip(quantizers, vectors_per_image, strict=True):
        if isinstance(quantizer, PlacedCodes):
            images.append(-(-VECTORS_PER_CODE * quantizer.num_codes // vectors))
    return max(images)


def draw_rows(count: int, total: int, seed: int) -> torch.Tensor:
    """One random row of each of `count` equal parts of `total` rows: (count,) int64, the same on
    every rank. They are distinct where there are as many rows."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.arange(count + 1) * total // count
    sizes = bounds.diff()
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    return bounds[:-1] + (places * sizes).long()


def pick(vectors: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """The rows that lie in `vectors` (n, D), which is rows `first` ... of all; zeros for the
    others. Summed over all pieces it is the rows themselves, whoever holds them."""
    local = (rows - first).to(vectors.device, non_blocking=True)
    mine = (local >= 0) & (local < len(vectors))
    return torch.where(mine[:, None], vectors[local.clamp(0, len(vectors) - 1)], 0)


def _hash(quantizer: nn.Module) -> int:
    """63 bits of the SHA-256 of everything a quantizer holds."""
    digest = hashlib.sha256()
    for tensor in quantizer.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
