"""The truth that every other path is compared with: slow, plain, in float64."""

import torch

_CHUNK = 2**22  # differences held at a time


def score64(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances in float64, the same bit for bit on every machine.

    s = 0; for d ascending: t = f64(x_d) - f64(c_d); s = s + t·t, each operation rounded on its
    own: no fused multiply-add, no other order.

    Args:
        latents: (..., D), any floating dtype.
        codebook: (..., D), any floating dtype; the leading dimensions are broadcast: (N, 1, D)
            against (K, D) gives all pairs, (P, D) against (P, D) gives P of them.

    Returns:
        (...) float64. A score that is not a number counts as infinite.
    """
    difference = latents.double() - codebook.double()
    score = difference.new_zeros(difference.shape[:-1])
    for square in (difference * difference).movedim(-1, 0).contiguous():
        score += square
    return torch.where(score.isnan(), torch.inf, score)


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The lowest index that minimises score64: latents (N, D), codebook (K, D) -> (N,) int64."""
    indices = torch.arange(len(codebook), device=latents.device)
    codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    chunk = max(1, _CHUNK // codebook.numel())
    for rows, found in zip(latents.split(chunk), codes.split(chunk), strict=True):
        scores = score64(rows[:, None], codebook)
        ties = scores == scores.amin(1, keepdim=True)
        torch.amin(torch.where(ties, indices, len(codebook)), 1, out=found)
    return codes
