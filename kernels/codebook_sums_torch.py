"""Per-code sums in torch alone, in float64 inside, so that neither N nor the order matters much."""

import contextlib
from collections.abc import Iterator

import torch

_CHUNK = 4096  # rows in float64 at a time


def codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (..., D), codes (...) int64 in [0, K) -> counts (K,) int64, sums (K, D)."""
    dim = latents.shape[-1]
    rows, codes = latents.reshape(-1, dim), codes.reshape(-1)
    if not codes.is_cuda and len(codes):
        least, largest = (int(code) for code in codes.aminmax())
        if least < 0 or largest >= num_codes:
            raise ValueError(
                f"codes {tuple(codes.shape)} must lie in [0, {num_codes}), not [{least}, {largest}]"
            )
    sums = torch.zeros(num_codes, dim, dtype=torch.float64, device=latents.device)
    with _deterministic() if codes.is_cuda else contextlib.nullcontext():
        for part, places in zip(rows.split(_CHUNK), codes.split(_CHUNK), strict=True):
            sums.index_add_(0, places, part.double())
    counts = torch.bincount(codes, minlength=num_codes)
    return counts, sums.to(torch.promote_types(latents.dtype, torch.float32))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """index_add_ without atomics; on a CPU it adds the rows of a code in order anyway."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
