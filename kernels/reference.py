"""The truth that every other path is compared with: slow, plain, in float64."""

import torch


def score64(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances of latents (N, D) to the codebook (K, D): (N, K) float64.

    s = 0; for d ascending: t = f64(x_d) - f64(c_d); s = s + t·t, each operation rounded on its
    own, so that the result is the same bit for bit on every machine.
    """
    scores = torch.zeros(len(latents), len(codebook), dtype=torch.float64, device=latents.device)
    for x_d, c_d in zip(latents.double().unbind(1), codebook.double().unbind(1), strict=True):
        difference = x_d[:, None] - c_d[None, :]
        scores = scores + difference * difference
    return scores


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
    """The lowest index that minimises score64: latents (N, D), codebook (K, D) -> (N,) int64."""
    parts = [score64(rows, codebook).argmin(1) for rows in latents.split(chunk)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=latents.device)
