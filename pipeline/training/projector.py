"""The codebooks for TensorBoard's projector: each code with a picture of what it draws."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.data.images import ImageSet
from pipeline.evaluation import pictures
from pipeline.models.vqvae import VQVAE
from pipeline.training.tracking import Tracker

NUM_IMAGES = 500
MAX_CODES = 1_024  # of a level, those used most
MIN_SIDE = 32  # pixels to which small pictures are enlarged
UNUSED = 128  # grey


@torch.no_grad()
def code_pictures(
    reconstructions: torch.Tensor, codes: torch.Tensor, shown: torch.Tensor
) -> np.ndarray:
    """What the decoder draws where a code is set: the mean over all places where it is, of the
    reconstruction there and one code's width around. Grey for a code that is nowhere.

    A code says little alone: the same on the whole grid, or once in a neutral image, it gives a
    flat colour or a dot. Among the codes it goes with, edges and eyes appear.

    Args:
        reconstructions: (B, C, S, S) in [0, 1].
        codes: of one level, (B, h, w) int64.
        shown: codes to draw, (N,) int64.

    Returns:
        (N, side, side, C) uint8, side a multiple of 3 S/h.
    """
    cell = reconstructions.shape[-1] // codes.shape[-1]
    patches = F.unfold(F.pad(reconstructions, [cell] * 4, mode="replicate"), 3 * cell, stride=cell)
    patches, flat = patches.movedim(1, -1).flatten(0, 1), codes.flatten()  # (B h w, C 3cell 3cell)
    rows = torch.full((int(max(flat.max(), shown.max())) + 1,), len(shown), device=flat.device)
    rows[shown] = torch.arange(len(shown), device=flat.device)
    rows = rows[flat]  # a row for each code that is shown, and one for all others
    sums = patches.new_zeros(len(shown) + 1, patches.shape[1]).index_add_(0, rows, patches)
    counts = rows.bincount(minlength=len(shown) + 1)[:-1, None]
    means = torch.where(counts > 0, sums[:-1] / counts, UNUSED / 255)
    drawn = pictures.to_uint8(means.unflatten(1, (reconstructions.shape[1], 3 * cell, 3 * cell)))
    scale = -(-MIN_SIDE // (3 * cell))
    return drawn.repeat(scale, 1).repeat(scale, 2)


@torch.no_grad()
def write_codebooks(tracker: Tracker, images_seen: int, model: VQVAE, images: ImageSet) -> None:
    """An embedding per level: the codes' vectors, numbers, how often they are used in the first
    NUM_IMAGES of `images`, and their pictures; of a large codebook the MAX_CODES used most."""
    if not tracker.enabled:
        return
    device = next(model.parameters()).device
    originals = images[slice(0, NUM_IMAGES)]
    outputs = [model(pictures.to_unit(batch, device)) for batch in _batches(originals)]
    reconstructions = torch.cat([output.reconstructions for output in outputs]).clamp(0, 1)
    quantizers: Any = model.quantizers
    for level, quantizer in enumerate(quantizers):
        codes = torch.cat([output.codes[level] for output in outputs])
        counts = codes.flatten().bincount(minlength=quantizer.num_codes)
        shown = counts.argsort(descending=True, stable=True)[:MAX_CODES].sort().values
        vectors = quantizer.lookup(shown[:, None, None])[:, :, 0, 0]  # (N, D)
        columns = {"code": shown.tolist(), "uses": counts[shown].tolist()}
        drawn = code_pictures(reconstructions, codes, shown)
        tracker.embedding(images_seen, f"codebook-level{level}", vectors, columns, drawn)


def _batches(originals: np.ndarray, size: int = 50) -> list[np.ndarray]:
    return np.split(originals, range(size, len(originals), size))
