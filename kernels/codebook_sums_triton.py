"""Per-code sums on a GPU: sort the codes, sum the sorted rows in fixed blocks, join the blocks.

No atomics, so the result does not depend on the order of execution; no one-hot; a code that has
all rows is spread over all blocks like any other. Shapes: N rows, D dimensions, K codes.

    _block_sums  a program per block of BLOCK_N sorted rows: a code that begins and ends inside is
                 done; a run that goes on into a neighbour is left as a part
    _join_parts  a program per block again: the parts of the code that begins in it and goes on
"""

import torch
import triton
import triton.language as tl

_BLOCK_N = 128
_BLOCK_D = 64


def codebook_sums(
    latents: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (..., D), codes (...) int64 in [0, K) -> counts (K,) int64, sums (K, D) fp32."""
    dim = latents.shape[-1]
    # rows are gathered by code, so a row has to lie together: channels-last latents need no copy
    rows, codes = latents.reshape(-1, dim), codes.reshape(-1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    narrow = torch.int16 if num_codes < 2**15 - 1 else torch.int32  # fewer passes of the radix sort
    # codes outside become one of their own, K, and its sum is left out
    codes = torch.where((codes >= 0) & (codes < num_codes), codes, num_codes)
    ordered, order = codes.to(narrow).sort(stable=True)
    edges = torch.arange(num_codes + 2, dtype=narrow, device=codes.device)
    bounds = torch.searchsorted(ordered, edges)  # code k has the sorted rows [k], [k + 1]

    num_blocks = triton.cdiv(len(codes), _BLOCK_N)
    sums = torch.zeros(num_codes + 1, dim, dtype=torch.float32, device=codes.device)
    parts = torch.empty(num_blocks, 2, dim, dtype=torch.float32, device=codes.device)
    grid_d = triton.cdiv(dim, _BLOCK_D)
    shape = {"D": dim, "BLOCK_N": _BLOCK_N, "BLOCK_D": _BLOCK_D}
    _block_sums[(num_blocks, grid_d)](
        rows, rows.stride(0), ordered, order, bounds, sums, parts, len(codes), **shape
    )
    _join_parts[(num_blocks, grid_d)](ordered, bounds, sums, parts, len(codes), **shape)
    return bounds[:-1].diff(), sums[:-1].contiguous()


@triton.jit
def _block_sums(
    rows, stride_n, ordered, order, bounds, sums, parts, N, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, N)
    place = begin + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(order + place, mask=place < N, other=0)
    mask = (place < N)[:, None] & (d < D)[None, :]
    x = tl.load(rows + row[:, None] * stride_n + d[None, :], mask=mask, other=0.0).to(tl.float32)
    at = begin
    while at < end:
        code = tl.load(ordered + at).to(tl.int64)
        first, last = tl.load(bounds + code), tl.load(bounds + code + 1)
        stop = tl.minimum(last, end)
        run = (place >= at) & (place < stop)
        total = tl.sum(tl.where(run[:, None], x, 0.0), 0)
        if (first >= begin) & (last <= end):
            tl.store(sums + code * D + d, total, mask=d < D)
        else:  # part 0 begins with the block, part 1 later and goes on beyond it
            which = (at > begin).to(tl.int64)
            tl.store(parts + (block * 2 + which) * D + d, total, mask=d < D)
        at = stop


@triton.jit
def _join_parts(
    ordered, bounds, sums, parts, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    code = tl.load(ordered + end - 1).to(tl.int64)  # the one that may go on beyond this block
    first, last = tl.load(bounds + code), tl.load(bounds + code + 1)
    if (first >= begin) & (last > end):
        which = (first > begin).to(tl.int64)
        total = tl.zeros((32, BLOCK_D), tl.float32)
        head = tl.load(parts + (block * 2 + which) * D + d, mask=d < D, other=0.0)
        total += tl.where(tl.arange(0, 32)[:, None] == 0, head[None, :], 0.0)
        num_blocks = (last + BLOCK_N - 1) // BLOCK_N
        for start in range(block + 1, num_blocks, 32):
            others = start + tl.arange(0, 32)
            mask = (others < num_blocks)[:, None] & (d < D)[None, :]
            total += tl.load(parts + others[:, None] * 2 * D + d[None, :], mask=mask, other=0.0)
        tl.store(sums + code * D + d, tl.sum(total, 0), mask=d < D)
