"""Dynamic binarization: a grey image as probabilities of black and white (Salakhutdinov & Murray
2008), drawn anew each time an image is seen, as Burda et al. 2016 do on MNIST."""

from collections.abc import Iterable

import numpy as np
import torch


def binarize(images: torch.Tensor, positions: Iterable[int], seed: int) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] -> the same shape in {0, 1}, each pixel 1 with its value.

    Args:
        positions: one integer >= 0 per image, such as its place in the stream of training images.
            An image's draw is keyed by (seed, position) alone, not by the batch or the process.
    """
    uniform = np.stack(
        [
            np.random.Generator(np.random.Philox(key=[seed, position])).random(
                images.shape[1:], np.float32
            )
            for position in positions
        ]
    )
    return (torch.from_numpy(uniform).to(images.device) < images).to(images.dtype)
