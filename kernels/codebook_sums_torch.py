"""Per-code sums in torch alone, in float64 inside, so that neither N nor the order matters much."""

import torch

_CHUNK = 4096  # rows in float64 at a time


def codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (..., D), codes (...) int64 in [0, K) -> counts (K,) int64, sums (K, D).

    index_add_ on a CPU adds the rows of a code one after the other whatever the number of threads;
    on CUDA it is asked for its deterministic form.
    """
    dim = latents.shape[-1]
    codes = codes.reshape(-1)
    sums = torch.zeros(num_codes, dim, dtype=torch.float64, device=latents.device)
    for rows, places in zip(
        latents.reshape(-1, dim).split(_CHUNK), codes.split(_CHUNK), strict=True
    ):
        sums.index_add_(0, places, rows.double())
    counts = torch.bincount(codes, minlength=num_codes)
    return counts, sums.to(torch.promote_types(latents.dtype, torch.float32))
