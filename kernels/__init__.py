"""Codebook operations: nearest-code look-up and per-code sums, exact on every device.

This file is the one place that decides which backend runs; README.md has the mathematics.

    reference.py              the truth, in float64
    nearest_code_torch.py     look-up in torch alone        codebook_sums_torch.py     sums likewise
    nearest_code_triton.py    look-up on a GPU              codebook_sums_triton.py    sums likewise
"""

import os
from typing import Literal

import torch

__all__ = ["Backend", "Precision", "codebook_sums", "nearest_code"]

Backend = Literal["auto", "torch", "triton"]
Precision = Literal["exact", "fast"]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def nearest_code(
    latents: torch.Tensor,
    codebook: torch.Tensor,
    backend: Backend = "auto",
    precision: Precision = "exact",
) -> torch.Tensor:
    """Index of the nearest code under the Euclidean distance; the N x K distances are never stored.

    Args:
        latents: (..., D) float64, fp32, bf16 or fp16, any strides, on the codebook's device.
        codebook: (K, D) of the same kinds, K and D at least 1.
        backend: "auto" is Triton on CUDA (float64 and D > 512 excepted, which take the torch path
            and make the host wait), torch elsewhere; "triton" also runs on a CPU under
            TRITON_INTERPRET=1.
        precision: "exact" is the lowest index that minimises `reference.score64`, the same on every
            backend bit for bit. "fast" leaves out the passes that certify it: a code whose squared
            distance is within 4 error bounds (kernels/README.md) of the least.

    Returns:
        (...) int64 in [0, K). A latent with an entry that is not finite gets code 0; a code with
        such an entry is chosen only where there is no other, and then it is code 0 as well.

    Raises:
        ValueError: in one line, naming the argument, for what does not fit the above.
    """
    _check_latents(latents)
    if codebook.dim() != 2 or codebook.shape[0] == 0:
        raise ValueError(f"codebook must be (K, D) with K >= 1, not {tuple(codebook.shape)}")
    if codebook.dtype not in _FLOATS:
        raise ValueError(
            f"codebook {tuple(codebook.shape)} must be floating point, not {codebook.dtype}"
        )
    if latents.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"latents {tuple(latents.shape)} have {latents.shape[-1]} dimensions, "
            f"the codebook {tuple(codebook.shape)} has {codebook.shape[1]}"
        )
    if latents.device != codebook.device:
        raise ValueError(
            f"latents {tuple(latents.shape)} are on {latents.device}, "
            f"the codebook {tuple(codebook.shape)} is on {codebook.device}"
        )
    if precision not in ("exact", "fast"):
        raise ValueError(f'precision must be "exact" or "fast", not {precision!r}')
    _check_backend(backend, latents)
    return torch.ops.vqvae2.nearest_code(latents.detach(), codebook.detach(), backend, precision)


def codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each code was used, and the sum of the latents that used it.

    Bitwise the same from run to run and for any number of threads, without a one-hot matrix.

    Args:
        latents: (..., D) float64, fp32, bf16 or fp16, any strides.
        codes: (...) int64 in [0, num_codes), on the same device. Another code is a ValueError on a
            CPU; on a GPU, where to look would be to wait, its row is left out.
        backend: as for `nearest_code`.

    Returns:
        counts (K,) int64 and sums (K, D) float32 (float64 for float64 latents).

    Raises:
        ValueError: in one line, naming the argument, for what does not fit the above.
    """
    _check_latents(latents)
    if codes.shape != latents.shape[:-1] or codes.dtype != torch.int64:
        raise ValueError(
            f"codes must be int64 {tuple(latents.shape[:-1])} for latents {tuple(latents.shape)}, "
            f"not {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.device != latents.device:
        raise ValueError(
            f"codes {tuple(codes.shape)} are on {codes.device}, "
            f"latents {tuple(latents.shape)} are on {latents.device}"
        )
    if num_codes < 1:
        raise ValueError(f"num_codes must be at least 1, not {num_codes}")
    _check_backend(backend, latents)
    return torch.ops.vqvae2.codebook_sums(latents.detach(), codes, num_codes, backend)


def _use_triton(backend: str, latents: torch.Tensor, codebook: torch.Tensor | None = None) -> bool:
    """The dispatch decision."""
    if backend == "torch" or (backend == "auto" and not latents.is_cuda):
        return False
    from kernels.nearest_code_triton import supports

    supported = supports(latents, latents if codebook is None else codebook)
    if backend == "triton" and not supported:
        raise ValueError(
            f'backend="triton" takes fp32, bf16 and fp16 with D <= 512, not latents '
            f"{tuple(latents.shape)} {latents.dtype}"
        )
    return supported


@torch.library.custom_op("vqvae2::nearest_code", mutates_args=())
def _nearest_code(
    latents: torch.Tensor, codebook: torch.Tensor, backend: str, precision: str
) -> torch.Tensor:
    if latents.numel() == 0:
        return torch.empty(latents.shape[:-1], dtype=torch.int64, device=latents.device)
    if _use_triton(backend, latents, codebook):
        from kernels import nearest_code_triton as implementation
    else:
        from kernels import nearest_code_torch as implementation
    with torch.cuda.device_of(latents):  # Triton launches on the current device
        return implementation.nearest_code(latents, codebook, exact=precision == "exact")


@_nearest_code.register_fake
def _(latents, codebook, backend, precision):
    return latents.new_empty(latents.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("vqvae2::codebook_sums", mutates_args=())
def _codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if latents.numel() > 0 and _use_triton(backend, latents):
        from kernels import codebook_sums_triton as implementation
    else:
        from kernels import codebook_sums_torch as implementation
    with torch.cuda.device_of(latents):
        return implementation.codebook_sums(latents, codes, num_codes)


@_codebook_sums.register_fake
def _(latents, codes, num_codes, backend):
    dtype = torch.promote_types(latents.dtype, torch.float32)
    counts = latents.new_empty((num_codes,), dtype=torch.int64)
    return counts, latents.new_empty((num_codes, latents.shape[-1]), dtype=dtype)


def _check_latents(latents: torch.Tensor) -> None:
    if latents.dim() == 0 or latents.shape[-1] == 0:
        raise ValueError(f"latents must be (..., D) with D >= 1, not {tuple(latents.shape)}")
    if latents.dtype not in _FLOATS:
        raise ValueError(
            f"latents {tuple(latents.shape)} must be floating point, not {latents.dtype}"
        )


def _check_backend(backend: str, latents: torch.Tensor) -> None:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", not {backend!r}')
    if backend == "triton" and not latents.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend="triton" needs latents on a CUDA device, not {latents.device} (or '
            "TRITON_INTERPRET=1 in the environment before Python starts)"
        )
