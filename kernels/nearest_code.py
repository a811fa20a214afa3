"""Nearest-code look-up and per-code sums in PyTorch, without an N x K matrix or a one-hot.

|x - c|^2 = |x|^2 - 2 x·c + |c|^2, and |x|^2 is the same for every code, so the nearest code
maximises x·c - |c|^2 / 2: one matrix product with a bias per chunk of rows.
"""

import torch

_CHUNK = 4096  # rows per product: at K = 512 a chunk of fp32 scores (8 MiB) stays in cache


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code under the Euclidean distance.

    Args:
        latents: (..., D) floating point.
        codebook: (K, D) floating point.

    Returns:
        (...) int64 in [0, K). Computed in the wider of the two dtypes, at least fp32: codes whose
        distances agree to rounding may be exchanged (`kernels.reference` never does).
    """
    if latents.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"latents have {latents.shape[-1]} dimensions, the codebook {codebook.shape[-1]}"
        )
    dtype = torch.promote_types(torch.promote_types(latents.dtype, codebook.dtype), torch.float32)
    rows, codebook = latents.reshape(-1, latents.shape[-1]).to(dtype), codebook.to(dtype)
    bias = codebook.square().sum(1).mul(-0.5)
    codes = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), _CHUNK):
        scores = torch.addmm(bias, rows[start : start + _CHUNK], codebook.T)
        torch.argmax(scores, 1, out=codes[start : start + _CHUNK])
    return codes.view(latents.shape[:-1])


def codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each code was used, and the sum of the latents that used it.

    Args:
        latents: (..., D) floating point.
        codes: (...) int64 in [0, num_codes).

    Returns:
        counts (K,) int64 and sums (K, D) in the latents' dtype, at least fp32.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    rows, codes = latents.reshape(-1, latents.shape[-1]).to(dtype), codes.reshape(-1)
    sums = torch.zeros(num_codes, rows.shape[1], dtype=dtype, device=rows.device)
    return torch.bincount(codes, minlength=num_codes), sums.index_add_(0, codes, rows)
