"""A codebook that follows its latents (van den Oord et al. 2017, appendix A.1)."""

import math

import torch

from pipeline.models.quantizers.contract import Gradient, PlacedCodes, Statistics


class EMAQuantizer(PlacedCodes):
    """Nearest code of every latent vector; an exponential moving average moves the codes.

        N_i = γ N_i + (1 - γ) n_i      m_i = γ m_i + (1 - γ) sum_j z_ij      e_i = m_i / N_i

    Until codes are placed, counts are 1 and sums the codes, so an unused code stays where it is
    (from zero counts, as in the public ports, it would be thrown to m/eps in the first step).
    """

    codebook: torch.Tensor
    sums: torch.Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        decay: float,
        revival: float,
        gradient: Gradient = "straight_through",
    ):
        super().__init__(num_codes, decay, revival, gradient)
        codebook = torch.randn(num_codes, code_dim) / math.sqrt(code_dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("sums", codebook.clone())

    def vectors_of_codes(self) -> torch.Tensor:
        return self.codebook

    def follow(self, statistics: Statistics, decay: float) -> None:
        self.sums.lerp_(statistics.sums, 1 - decay)
        # An unused code's count and sum shrink alike, but for their rounding: it stays where it is.
        used = statistics.counts[:, None] > 0
        means = self.sums / self.counts[:, None]
        self.codebook.copy_(torch.where(used, means, self.codebook))

    def place(self, which: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor) -> None:
        # in place, and without reading from the device which codes they are
        self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))
        self.counts.copy_(torch.where(which, counts, self.counts))
        self.sums.copy_(torch.where(which[:, None], vectors * counts[:, None], self.sums))
