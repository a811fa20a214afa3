"""Finite scalar quantization (Mentzer et al. 2023): a few numbers, each rounded to a few levels."""

import math

import torch
from torch import nn

from pipeline.models.quantizers.contract import Quantized, Quantizer


def fsq_levels(num_codes: int) -> tuple[int, ...]:
    """Levels per dimension whose product is the codebook size: as few dimensions of at most 8
    levels as possible, as even as possible, e.g. 512 = 8·8·8, 1000 = 8·5·5·5, 128 = 8·4·4.

    Raises ValueError if there is no such product, e.g. for a prime above 7. Two levels are not
    used: their threshold lies where the tanh is flat.
    """

    def factorings(rest: int, largest: int):
        if rest == 1:
            yield ()
        for factor in range(min(rest, largest), 2, -1):
            if rest % factor == 0:
                yield from ((factor, *others) for others in factorings(rest // factor, factor))

    found = list(factorings(num_codes, 8))
    if not found or num_codes < 3:
        raise ValueError(
            f"model.codebook_size {num_codes} is not a product of numbers from 3 to 8, which fsq "
            "needs; choose a power of two, or 240, 1000, 4375, 15360, 64000"
        )
    return min(found, key=lambda levels: (len(levels), -min(levels)))


class FSQQuantizer(Quantizer):
    """Each of a few dimensions d is bounded to its L_d levels by a tanh and rounded to one.

    Every code is reachable by construction, so there is no codebook, no codebook loss, and nothing
    to keep alive; two linear maps join the dimensions to the model's width. A code is a number
    with the level of dimension 0 as its lowest digit. Gradients pass straight through the rounding.
    """

    levels: torch.Tensor
    digits: torch.Tensor

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        self.num_codes, levels = num_codes, fsq_levels(num_codes)
        digits = [math.prod(levels[:dimension]) for dimension in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("digits", torch.tensor(digits), persistent=False)
        self.to_levels = nn.Linear(code_dim, len(levels))
        # louder than by default, else all latents of a fresh encoder are rounded to one code
        nn.init.normal_(self.to_levels.weight)
        self.from_levels = nn.Linear(len(levels), code_dim)

    def _bounded(self, vectors: torch.Tensor) -> torch.Tensor:
        """(..., dimensions) -> values whose rounding is one of L consecutive integers: -L/2 ...
        L/2 - 1 for even L, symmetric for odd (section 3.1; the shift makes zero map to zero)."""
        levels = self.levels.to(vectors.dtype)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = (levels + 1) % 2 / 2
        shift = (offset / half).atanh()
        return (vectors + shift).tanh() * half - offset

    def forward(self, latents: torch.Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.to(self.to_levels.weight.dtype)
            bounded = self._bounded(self.to_levels(latents.movedim(1, -1)))
            rounded = bounded.round().detach()
            codes = ((rounded + self.levels // 2).long() * self.digits).sum(-1)
            codes = codes.clamp(0, self.num_codes - 1)  # also where a latent is not a number
            error = (bounded.detach() - rounded).square().mean()
            passed = bounded + (rounded - bounded).detach() if self.training else rounded
            quantized = self._from_rounded(passed)
        zero = torch.zeros_like(error)
        return Quantized(quantized, codes, zero, zero, bounded.detach(), error)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        digits = codes[..., None] // self.digits % self.levels
        with torch.autocast(codes.device.type, enabled=False):
            return self._from_rounded((digits - self.levels // 2).to(self.to_levels.weight.dtype))

    def _from_rounded(self, rounded: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dimensions) -> (B, D, H, W), scaled to about [-1, 1] before the linear map."""
        return self.from_levels(rounded / (self.levels // 2)).movedim(-1, 1)
