"""Sampling from a PixelCNN, front by front.

All positions with equal t = j + slope·i are conditionally independent given smaller t (see
pipeline.models.pixelcnn), so one pass of the network samples a whole front: W + slope·(H - 1)
passes instead of H·W, and exactly the same distribution.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.models.pixelcnn import PixelCNN


def gumbel_noise(
    seed: int, images: Sequence[int], level: int, codebook_size: int, grid: tuple[int, int]
) -> np.ndarray:
    """Standard Gumbel noise (B, K, H, W) float32, keyed by (seed, image, level) alone.

    An image's noise does not depend on the batch it is sampled in, nor on the other images.
    """
    noise = np.empty((len(images), codebook_size, *grid), np.float32)
    for row, image in enumerate(images):
        # Philox takes a key of 128 bits: 64 for the seed, 56 for the image, 8 for the level
        key = np.array([seed, image << 8 | level], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        noise[row] = generator.gumbel(size=(codebook_size, *grid))
    return noise


@torch.no_grad()
def sample_codes(
    model: PixelCNN,
    condition: torch.Tensor,
    noise: torch.Tensor,
    temperature: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Draws codes (B, H, W) int64 by the Gumbel-max trick: argmax(logits / temperature + noise).

    Args:
        condition: from `model.condition()`, (B, C, H, W) or (B, C, 1, 1).
        noise: standard Gumbel, (B, K, H, W).
        temperature: > 0; below 1 the samples are more probable and less varied.
        progress: called with the number of positions just sampled per image.
    """
    batch, _, height, width = noise.shape
    codes = torch.zeros(batch, height, width, dtype=torch.int64, device=noise.device)
    slope = model.slope
    for t in range(width + slope * (height - 1)):
        rows = torch.arange(max(0, -(-(t - width + 1) // slope)), min(height - 1, t // slope) + 1)
        if len(rows) == 0:
            continue
        columns = t - slope * rows
        end = int(rows[-1]) + 1  # nothing below the front matters yet
        above = condition[:, :, :end] if condition.shape[2] > 1 else condition
        logits = model.logits(codes[:, :end], above)[:, :, rows, columns].float()  # (B, K, front)
        drawn = (logits / temperature + noise[:, :, rows, columns]).argmax(1)
        codes[:, rows, columns] = drawn
        if progress is not None:
            progress(len(rows))
    return codes
