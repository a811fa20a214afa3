"""A codebook on the unit sphere (Yu et al. 2022, ViT-VQGAN, section 3.2), here with an EMA."""

import torch
from torch.nn import functional as F

from pipeline.models.quantizers.ema import EMAQuantizer


class CosineQuantizer(EMAQuantizer):
    """Latents and codes are scaled to length 1, so the nearest code has the largest cosine.

    A code is the direction of the sum of its latents (spherical k-means). The quantized latents
    have length 1 as well.
    """

    def project(self, vectors: torch.Tensor, dim: int) -> torch.Tensor:
        return F.normalize(vectors, dim=dim)

    def vectors_of_codes(self) -> torch.Tensor:
        # at every use: means over a cluster, and averages of weights, are shorter than 1
        return self.project(self.codebook, 1)
