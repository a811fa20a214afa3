"""Nearest-code look-up on a GPU: a 16-bit pass over all rows, and certified passes over the rest.

Never an N x K matrix: a program keeps the running best of its rows in registers. The host never
waits: the number of rows that a pass leaves open stays on the device, in `state`. The proof of the
bounds is in kernels/README.md.

    _centre        largest |c - mean|, which gives the scale, a power of two
    _prepare       centred and scaled codes as fp16 high + low parts, biases -|c|²/2, their maxima
    _first_pass    all rows, one fp16 product per code; appends rows it cannot certify to a list
    _drop_repeats  codes that equal an earlier code; only where the list is long
    _second_pass   the list, three fp16 products per code; appends what stays open to a second list
    _score64_pass  the second list, score64 over all codes, which are split over idle programs
    _join_splits   the best of the splits

Shapes: N rows, D dimensions (D_PAD a power of two), K codes (K_PAD a multiple of BLOCK_K).
"""

import json
import math
from pathlib import Path

import torch
import triton
import triton.language as tl

# Places in `state` (int32): maxima of non-negative floats as bit patterns, then list lengths.
_LARGEST: tl.constexpr = tl.constexpr(0)  # |c - mean|, largest entry
_LENGTH: tl.constexpr = tl.constexpr(1)  # longest scaled code
_RESIDUAL: tl.constexpr = tl.constexpr(2)  # longest rounding residual of the high part
_RESIDUAL2: tl.constexpr = tl.constexpr(3)  # the same of the high and low parts together
_BIAS: tl.constexpr = tl.constexpr(4)  # largest |bias|
_OPEN: tl.constexpr = tl.constexpr(5)  # rows that the first pass left open
_OPEN2: tl.constexpr = tl.constexpr(6)  # rows that the second pass left open
_NOWHERE: tl.constexpr = tl.constexpr(-1e30)  # bias of a place without a code
_ROUNDING: tl.constexpr = tl.constexpr(2.0**-24)  # of fp32
_ROUNDING64: tl.constexpr = tl.constexpr(2.0**-53)
_TENSOR_CORES: tl.constexpr = tl.constexpr(2.0**-22)  # twice what one truncated addition loses
_FLUSHED: tl.constexpr = tl.constexpr(2.0**-124)  # where subnormal numbers count as zero
_VANISHED: tl.constexpr = tl.constexpr(2.0**-58)  # squares of less may vanish from a norm
_SLACK: tl.constexpr = tl.constexpr(1 + 2.0**-7)  # for the rounding of the bound itself
_CHUNK_D: tl.constexpr = tl.constexpr(16)  # dimensions accumulated at a time in the second pass
_MAX_DIM = 512

# (D_PAD): rows and codes of a tile, warps and stages; renewed by benchmarks/tune_nearest_code.py
_BLOCKS = json.loads(Path(__file__).with_name("nearest_code_blocks.json").read_text())


def supports(latents: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether these kernels take the dtypes and the dimension."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return latents.dtype in types and codebook.dtype in types and codebook.shape[-1] <= _MAX_DIM


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor, exact: bool) -> torch.Tensor:
    """latents (..., D) and codebook (K, D), fp32, bf16 or fp16 -> (...) int64 in [0, K)."""
    return _look_up(latents, codebook, exact)[0]


def open_rows(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[int, int]:
    """How many rows the first pass and the second pass could not certify; for benchmarks."""
    _, state = _look_up(latents, codebook, exact=True)
    first, second = state[_OPEN.value : _OPEN2.value + 1].tolist()
    return first, second


def _look_up(latents, codebook, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    size, dim = codebook.shape
    codes = torch.empty(latents.shape[:-1], dtype=torch.int64, device=latents.device)
    count = codes.numel()
    if count >= 2**31 - 2**16:
        raise ValueError(f"latents {tuple(latents.shape)} have about 2^31 rows or more: split them")
    dim_pad = max(16, triton.next_power_of_2(dim))
    first, second = (_BLOCKS[str(dim_pad)][name] for name in ("first", "second"))
    size_pad = math.lcm(first["codes"], second["codes"], 64)
    size_pad *= triton.cdiv(size, size_pad)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=latents.device)

    state = torch.zeros(8, dtype=torch.int32, device=latents.device)
    mean = codebook.mean(0, dtype=torch.float32)
    high, low = (empty(size_pad, dim_pad, dtype=torch.float16) for _ in range(2))
    bias = empty(size_pad, dtype=torch.float32)
    codebook_args = (codebook, codebook.stride(0), codebook.stride(1), mean)
    shape = {"D": dim, "D_PAD": dim_pad}
    block = min(64, 4096 // dim_pad)  # codes of a program
    _centre[(triton.cdiv(size, block),)](*codebook_args, state, size, **shape, BLOCK_K=block)
    prepared = (state, high, low, bias)
    _prepare[(size_pad // block,)](*codebook_args, *prepared, size, **shape, BLOCK_K=block)

    latents, layout = _layout(latents)
    open_rows = empty(count if exact else 0, dtype=torch.int32)
    num_tiles = size_pad // first["codes"]
    _first_pass[(triton.cdiv(count, first["rows"]),)](
        latents, *layout, mean, high, bias, state, codes, open_rows, count,
        num_tiles, triton.next_power_of_2(num_tiles) - 1, **shape, EXACT=exact,
        PTX=latents.is_cuda and torch.version.cuda is not None, BLOCK_N=first["rows"],
        BLOCK_K=first["codes"], num_warps=first["warps"], num_stages=first["stages"],
    )  # fmt: skip
    if not exact:
        return codes, state

    open_rows2 = empty(count, dtype=torch.int32)
    _drop_repeats[(triton.cdiv(size, 64),)](
        *codebook_args[:3], bias, state, count, size, D=dim, BLOCK_K=64
    )
    programs = _programs(latents.device)
    _second_pass[(min(programs, triton.cdiv(count, second["rows"])),)](
        latents, *layout, mean, high, low, bias, state, codes, open_rows, open_rows2,
        size_pad // second["codes"], **shape, BLOCK_N=second["rows"], BLOCK_K=second["codes"],
        num_warps=second["warps"], num_stages=second["stages"],
    )  # fmt: skip
    split_score = empty(programs, dtype=torch.float64)
    split_code = empty(programs, dtype=torch.int64)
    splits = (state, codes, open_rows2, split_score, split_code, size)
    _score64_pass[(programs,)](
        latents, *layout, *codebook_args[:3], *splits, D=dim, BLOCK_K=128, enable_fp_fusion=False
    )
    _join_splits[(programs,)](*splits, BLOCK_K=128, PROGRAMS=programs)
    return codes, state


def _programs(device: torch.device) -> int:
    """Programs of the passes whose work is known on the device alone; a power of two."""
    if device.type != "cuda":
        return 4  # the interpreter
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return triton.next_power_of_2(4 * processors)


def _layout(latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The latents, and how a row number turns into an offset.

    Leading dimensions that lie in memory like one are merged; up to three may remain. Row n is
    (i, j, k) with n = (i·size1 + j)·size2 + k, at i·stride0 + j·stride1 + k·stride2.

    Returns:
        latents (copied where more than three dimensions remain) and
        (stride0, size1, stride1, size2, stride2, stride of the last dimension).
    """
    merged: list[tuple[int, int]] = []  # (size, stride)
    for size, stride in zip(latents.shape[:-1], latents.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 3:
        return _layout(latents.contiguous())
    (_, stride0), (size1, stride1), (size2, stride2) = [*merged, *[(1, 0)] * (3 - len(merged))]
    return latents, (stride0, size1, stride1, size2, stride2, latents.stride(-1))


@triton.jit
def _row_offsets(rows, stride0, size1, stride1, size2, stride2):
    """(BLOCK,) int64 offsets of the rows (BLOCK,) int64; see _layout."""
    k = rows % size2
    rest = rows // size2
    return (rest // size1) * stride0 + (rest % size1) * stride1 + k * stride2


@triton.jit
def _finite_mean(mean, d, D: tl.constexpr):
    """(BLOCK_D,): the codebook's mean; 0 where a code's entry is not finite, any centre is valid"""
    mu = tl.load(mean + d, mask=d < D, other=0.0)
    return tl.where(tl.abs(mu) < float("inf"), mu, 0.0)


@triton.jit
def _power_of_two(exponent):
    """2^exponent in fp32 for an integer exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(value):
    """The e of 2^e <= value < 2^(e+1) for a normal fp32 value; -127 for 0, 128 for infinity."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _code_scale(state):
    """The power of two that brings the largest centred entry of the codebook into [1/2, 1)."""
    largest = tl.load(state + _LARGEST).to(tl.float32, bitcast=True)
    exponent = tl.maximum(tl.minimum(-1 - _exponent(largest), 126), -126)
    return _power_of_two(tl.where(largest == 0.0, 0, exponent))


@triton.jit
def _norm(x):
    """(BLOCK,): Euclidean norms of the rows of x (BLOCK, D_PAD), from above."""
    return tl.sqrt(tl.sum(x * x, 1)) + _VANISHED


@triton.jit
def _centred_rows(latents, offsets, valid, stride_d, mean, d, D: tl.constexpr):
    """(BLOCK, BLOCK_D) fp32: entries d (BLOCK_D,) of rows at offsets (BLOCK,), less the mean."""
    place = latents + offsets[:, None] + d.to(tl.int64)[None, :] * stride_d
    x = tl.load(place, mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    return x - _finite_mean(mean, d, D)[None, :]


@triton.jit
def _row_factor(largest, scale):
    """(BLOCK,): a power of two, 1 for most, from the largest entries of centred rows (BLOCK,).

    The scale of the codes serves for the rows as well, but a row that would leave the range of
    fp16 is scaled down further, by its factor; its biases then have the factor too. The factor is
    at least 2^-40: beyond, fp16 overflows and the row stays open.
    """
    return _power_of_two(-tl.maximum(tl.minimum(_exponent(largest * scale) - 10, 40), 0))


@triton.jit
def _append(flags, rows, counter, rows_list):
    """Appends the flagged rows (BLOCK,) to a list; its order does not matter to any result."""
    ones = flags.to(tl.int32)
    start = tl.atomic_add(counter, tl.sum(ones, 0))
    tl.store(rows_list + start + tl.cumsum(ones, 0) - ones, rows.to(tl.int32), mask=flags)


@triton.jit
def _centre(
    codebook, stride_k, stride_c, mean, state, K, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, D_PAD)
    place = codebook + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_c
    c = tl.load(place, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    size = tl.abs(c - _finite_mean(mean, d, D)[None, :])
    size = tl.where((k < K)[:, None] & (size < float("inf")), size, 0.0)
    largest = tl.max(tl.max(size, 1), 0)
    tl.atomic_max(state + _LARGEST, largest.to(tl.int32, bitcast=True))


@triton.jit
def _prepare(
    codebook, stride_k, stride_c, mean, state, high, low, bias, K, D: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, D_PAD)
    place = codebook + k.to(tl.int64)[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_c
    c = tl.load(place, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    stands = (k < K) & (tl.max((tl.abs(c) < float("inf")).to(tl.int32) ^ 1, 1) == 0)
    # infinite where the difference overflows: then the bound is, and all rows go to score64
    c = (c - _finite_mean(mean, d, D)[None, :]) * _code_scale(state)
    c = tl.where(stands[:, None], c, 0.0)
    top = c.to(tl.float16)
    rest = c - top.to(tl.float32)
    bottom = rest.to(tl.float16)
    half = 0.5 * tl.sum(c.to(tl.float64) * c.to(tl.float64), 1)
    half = half.to(tl.float32)
    out = k.to(tl.int64)[:, None] * D_PAD + d[None, :]
    tl.store(high + out, top)
    tl.store(low + out, bottom)
    tl.store(bias + k, tl.where(stands, -half, _NOWHERE))
    # rounding of the norms themselves is covered by the slack of the bound
    tl.atomic_max(state + _LENGTH, tl.max(_norm(c), 0).to(tl.int32, bitcast=True))
    tl.atomic_max(state + _RESIDUAL, tl.max(_norm(rest), 0).to(tl.int32, bitcast=True))
    rest -= bottom.to(tl.float32)
    tl.atomic_max(state + _RESIDUAL2, tl.max(_norm(rest), 0).to(tl.int32, bitcast=True))
    tl.atomic_max(state + _BIAS, tl.max(half, 0).to(tl.int32, bitcast=True))


@triton.jit
def _error_bound(
    length, residual, factor, scale, state, RESIDUAL: tl.constexpr, accumulation, rounding,
    D: tl.constexpr,
):  # fmt: skip
    """(BLOCK,): how far a row's score a·(x·c - |c|²/2), a its factor, may be from its real value,
    score64's rounding included (kernels/README.md).

    Args:
        length, residual: norms of the scaled rows and of what rounding them to 16 bits left.
        RESIDUAL: where in `state` the same of the codes is.
        accumulation: relative error of the sum of products inside the tensor cores, which the bias
            enters as well.
        rounding: further errors relative to the magnitude of the scores.
    """
    longest = tl.load(state + _LENGTH).to(tl.float32, bitcast=True)
    code_residual = tl.load(state + RESIDUAL).to(tl.float32, bitcast=True)
    largest_bias = tl.load(state + _BIAS).to(tl.float32, bitcast=True) * factor
    flushed = (scale * _FLUSHED) * tl.sqrt(float(D))
    # what 16 bits leave of an operand, what centring it in fp32 rounds away, and what is flushed
    row_error = residual + length * _ROUNDING + factor * flushed
    code_error = code_residual + longest * _ROUNDING + flushed
    error = row_error * (longest + code_residual) + (length + row_error) * code_error
    error += (accumulation + rounding) * (length * longest + largest_bias)
    error += 4 * _ROUNDING * largest_bias  # the bias was rounded as well
    farthest = length + factor * longest
    error += ((D + 3) * _ROUNDING64) * farthest * (farthest / factor)
    return error * _SLACK


@triton.jit
def _number(score, tile, keep, PTX: tl.constexpr):
    """Scores (fp32) whose lowest bits, those not in `keep`, are the number of their tile."""
    bits = score.to(tl.int32, bitcast=True)
    if PTX:  # one instruction, where the compiler makes two of the line below
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [bits, keep, tile], tl.int32, True, 1
        )
    else:
        bits = (bits & keep) | tile
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _first_pass(
    latents, stride0, size1, stride1, size2, stride2, stride_d, mean, high, bias, state, codes,
    open_rows, N, num_tiles, tile_bits, D: tl.constexpr, D_PAD: tl.constexpr,
    EXACT: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < N
    offsets = _row_offsets(rows, stride0, size1, stride1, size2, stride2)
    scale = _code_scale(state)
    x = _centred_rows(latents, offsets, valid, stride_d, mean, tl.arange(0, D_PAD), D)
    factor = _row_factor(tl.max(tl.abs(x), 1), scale)
    x *= (scale * factor)[:, None]
    x16 = x.to(tl.float16)
    length, residual = _norm(x), _norm(x - x16.to(tl.float32))

    # The number of the tile replaces the lowest bits of a score, by one instruction, so that the
    # running best and second best cost three more, two maxima and a minimum, and no register more.
    k = tl.arange(0, BLOCK_K)
    place = high + k[None, :] * D_PAD + tl.arange(0, D_PAD)[:, None]
    best = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    for tile in range(0, num_tiles):
        c = tl.load(place)
        start = factor[:, None] * tl.load(bias + tile * BLOCK_K + k)[None, :]
        score = tl.dot(x16, c, acc=start)
        place += BLOCK_K * D_PAD
        score = _number(score, tile, ~tile_bits, PTX)
        if EXACT:
            second = tl.maximum(second, tl.minimum(best, score))
        best = tl.maximum(best, score)
    highest = tl.max(best, 1)
    place_of_best = tl.argmax(best, 1)
    rest = tl.where(k[None, :] == place_of_best[:, None], float("-inf"), best)
    runner_up = tl.maximum(tl.max(rest, 1), tl.max(second, 1))
    code = (highest.to(tl.int32, bitcast=True) & tile_bits) * BLOCK_K + place_of_best

    # The sum inside the tensor cores, and the bits that the number of the tile replaced.
    error = _error_bound(
        length, residual, factor, scale, state, _RESIDUAL,
        (D + D / 8 + 4) * _TENSOR_CORES, (tile_bits + 1) * (2 * _ROUNDING), D,
    )  # fmt: skip
    if EXACT:
        certain = highest - runner_up > 2 * error  # not where anything is not a number
        _append(valid & (certain == 0), rows, state + _OPEN, open_rows)
    code = tl.where(error < float("inf"), code, 0)
    tl.store(codes + rows, code.to(tl.int64), mask=valid)


@triton.jit
def _drop_repeats(
    codebook, stride_k, stride_c, bias, state, N, K, D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Sets the bias of a code that equals an earlier one to -inf: ties go to the lowest code.

    Worth its time only where many rows are open, as with a collapsed codebook. A code is compared
    with the first one of equal bias; a repeat that this misses costs time and nothing else.
    """
    if tl.load(state + _OPEN) > N // 8:
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        valid = k < K
        mine = tl.load(bias + k, mask=valid, other=0.0)
        first = k
        for start in range(0, (tl.program_id(0) + 1) * BLOCK_K, BLOCK_K):
            others = start + tl.arange(0, BLOCK_K)
            # others that were dropped meanwhile are repeats themselves, never the first
            theirs = tl.load(bias + others, mask=others < K, other=1.0)
            same = mine[:, None] == theirs[None, :]
            first = tl.minimum(first, tl.min(tl.where(same, others[None, :], K), 1))
        equal = valid & (first < k)
        place = codebook + k.to(tl.int64) * stride_k
        place_of_first = codebook + first.to(tl.int64) * stride_k
        for _ in range(0, D):
            a = tl.load(place, mask=valid, other=0.0)
            equal = equal & (a == tl.load(place_of_first, mask=valid, other=0.0))
            place += stride_c
            place_of_first += stride_c
        tl.store(bias + k, tl.where(equal, float("-inf"), mine), mask=valid)


@triton.jit
def _second_pass(
    latents, stride0, size1, stride1, size2, stride2, stride_d, mean, high, low, bias, state, codes,
    open_rows, open_rows2, num_tiles, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = tl.load(state + _OPEN)
    scale = _code_scale(state)
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, _CHUNK_D)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = slot < count
        rows = tl.load(open_rows + slot, mask=valid, other=0).to(tl.int64)
        offsets = _row_offsets(rows, stride0, size1, stride1, size2, stride2)
        largest = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, D_PAD, _CHUNK_D):
            x = _centred_rows(latents, offsets, valid, stride_d, mean, start + d, D)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        factor = _row_factor(largest, scale)
        length = tl.zeros((BLOCK_N,), tl.float32)
        residual = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, D_PAD, _CHUNK_D):
            x = _centred_rows(latents, offsets, valid, stride_d, mean, start + d, D)
            x *= (scale * factor)[:, None]
            rest = x - x.to(tl.float16).to(tl.float32)
            rest -= rest.to(tl.float16).to(tl.float32)
            length += tl.sum(x * x, 1)
            residual += tl.sum(rest * rest, 1)
        length, residual = tl.sqrt(length) + _VANISHED, tl.sqrt(residual) + _VANISHED

        best = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
        second = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
        best_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        for tile in range(0, num_tiles):
            score = factor[:, None] * tl.load(bias + tile * BLOCK_K + k)[None, :]
            for start in range(0, D_PAD, _CHUNK_D):
                # a short sum inside the tensor cores, the sum of these in IEEE fp32
                x = _centred_rows(latents, offsets, valid, stride_d, mean, start + d, D)
                x *= (scale * factor)[:, None]
                x_high = x.to(tl.float16)
                x_low = (x - x_high.to(tl.float32)).to(tl.float16)
                place_c = (tile * BLOCK_K + k).to(tl.int64)[None, :] * D_PAD + (start + d)[:, None]
                c_high, c_low = tl.load(high + place_c), tl.load(low + place_c)
                product = tl.dot(x_low, c_high)
                product = tl.dot(x_high, c_low, acc=product)
                score += tl.dot(x_high, c_high, acc=product)
            best_tile = tl.where(score > best, tile, best_tile)
            second = tl.maximum(second, tl.minimum(best, score))
            best = tl.maximum(best, score)
        highest = tl.max(best, 1)
        place_of_best = tl.argmax(best, 1)
        is_best = k[None, :] == place_of_best[:, None]
        runner_up = tl.max(tl.where(is_best, float("-inf"), best), 1)
        runner_up = tl.maximum(runner_up, tl.max(second, 1))
        code = tl.sum(tl.where(is_best, best_tile, 0), 1) * BLOCK_K + place_of_best

        # The sums inside the tensor cores (those of the low parts are 2^-10 of it: one more), the
        # sum over the chunks and the bias, and the product of the low parts, left out: 4.
        error = _error_bound(
            length, residual, factor, scale, state, _RESIDUAL2,
            (_CHUNK_D + _CHUNK_D / 8 + 5) * _TENSOR_CORES,
            (D_PAD / _CHUNK_D + 1 + 4) * _ROUNDING, D,
        )  # fmt: skip
        certain = highest - runner_up > 2 * error
        _append(valid & (certain == 0), rows, state + _OPEN2, open_rows2)
        tl.store(codes + rows, code.to(tl.int64), mask=valid & certain)


@triton.jit
def _splits(state, K, BLOCK_K: tl.constexpr, programs):
    """Rows of the second list, and how many programs share a row."""
    count = tl.load(state + _OPEN2)
    return count, tl.maximum(tl.minimum(programs // tl.maximum(count, 1), tl.cdiv(K, BLOCK_K)), 1)


@triton.jit
def _score64_pass(
    latents, stride0, size1, stride1, size2, stride2, stride_d, codebook, stride_k, stride_c, state,
    codes, open_rows2, split_score, split_code, K, D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compiled without fused multiply-adds: score64 rounds each operation on its own."""
    count, splits = _splits(state, K, BLOCK_K, tl.num_programs(0))
    for item in range(tl.program_id(0), count * splits, tl.num_programs(0)):
        row = tl.load(open_rows2 + item // splits).to(tl.int64)
        x = latents + _row_offsets(row, stride0, size1, stride1, size2, stride2)
        best = tl.full((BLOCK_K,), float("inf"), tl.float64)
        code = tl.zeros((BLOCK_K,), tl.int64)
        for start in range((item % splits) * BLOCK_K, K, splits * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            score = tl.zeros((BLOCK_K,), tl.float64)
            place, place_c = x, codebook + k * stride_k
            for _ in range(0, D):
                c_d = tl.load(place_c, mask=k < K, other=0.0).to(tl.float64)
                difference = tl.load(place).to(tl.float64) - c_d
                score = score + difference * difference
                place += stride_d
                place_c += stride_c
            better = (k < K) & (score < best)  # not where it is not a number; the lowest k of ties
            best = tl.where(better, score, best)
            code = tl.where(better, k, code)
        least = tl.min(best, 0)
        lowest = tl.min(tl.where(best == least, code, K), 0)
        if splits == 1:
            tl.store(codes + row, lowest)
        else:
            tl.store(split_score + item, least)
            tl.store(split_code + item, lowest)


@triton.jit
def _join_splits(
    state, codes, open_rows2, split_score, split_code, K, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    count, splits = _splits(state, K, BLOCK_K, PROGRAMS)
    if (splits > 1) & (tl.program_id(0) < count):
        part = tl.arange(0, PROGRAMS)
        place = tl.program_id(0) * splits + part
        score = tl.load(split_score + place, mask=part < splits, other=float("inf"))
        code = tl.load(split_code + place, mask=part < splits, other=K)
        lowest = tl.min(tl.where(score == tl.min(score, 0), code, K), 0)
        tl.store(codes + tl.load(open_rows2 + tl.program_id(0)), lowest)
