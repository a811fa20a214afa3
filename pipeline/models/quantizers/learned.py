"""A codebook moved by gradients (van den Oord et al. 2017, eq. 3)."""

import math

import torch
from torch import nn

from pipeline.models.quantizers.contract import Gradient, PlacedCodes


class LearnedQuantizer(PlacedCodes):
    """Nearest code of every latent vector; |sg[z_e] - e|^2 moves the codes.

    A code is where it was put last (`anchors`, a buffer) plus how far the optimizer has moved it
    (`moves`, a parameter). So a dead code starts anew without touching what an optimizer holds:
    ZeRO keeps its own copy of every parameter and would undo a change to one. Adam's moments of a
    code that nothing has fallen to for a while are next to nothing, and need no reset.
    """

    learns_codes = True
    anchors: torch.Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        decay: float,
        revival: float,
        gradient: Gradient = "straight_through",
    ):
        super().__init__(num_codes, decay, revival, gradient)
        self.register_buffer("anchors", torch.randn(num_codes, code_dim) / math.sqrt(code_dim))
        self.moves = nn.Parameter(torch.zeros(num_codes, code_dim))

    def vectors_of_codes(self) -> torch.Tensor:
        return self.anchors + self.moves

    @torch.no_grad()
    def place(self, which: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor) -> None:
        self.anchors.copy_(torch.where(which[:, None], vectors - self.moves, self.anchors))
        self.counts.copy_(torch.where(which, counts, self.counts))
