"""SimVQ: a frozen table seen through one learned linear map (Zhu et al. 2024, section 4)."""

import math

import torch
from torch import nn

from pipeline.models.quantizers.contract import Gradient, NearestCode


class SimVQQuantizer(NearestCode):
    """Codes are the rows of C W with C frozen and random: a gradient for one code moves all of
    them, so none is left behind, and there is nothing to start by k-means or to revive."""

    learns_codes = True
    basis: torch.Tensor

    def __init__(self, num_codes: int, code_dim: int, gradient: Gradient = "straight_through"):
        super().__init__()
        self.num_codes, self.gradient = num_codes, gradient
        self.register_buffer("basis", torch.randn(num_codes, code_dim) / math.sqrt(code_dim))
        self.linear = nn.Linear(code_dim, code_dim, bias=False)

    def vectors_of_codes(self) -> torch.Tensor:
        return self.linear(self.basis)
