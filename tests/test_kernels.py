"""The codebook operations against the float64 truth, on hostile data, on every backend.

Without a GPU the Triton kernels run under Triton's interpreter; `make test-gpu` runs them on one.
"""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import codebook_sums, nearest_code, nearest_code_triton, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
# numbers that overflow 16 bits, and those that are none, are meant; numpy speaks of each
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN and the largest integers, so that an output not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def look_up(latents, codebook, backend, precision="exact"):
    codes = nearest_code(latents.to(DEVICE), codebook.to(DEVICE), backend, precision)
    assert codes.dtype == torch.int64 and codes.shape == latents.shape[:-1]
    return codes.cpu()


def check(latents, codebook, backend):
    found = look_up(latents, codebook, backend)
    expected = reference.nearest_code(latents.reshape(-1, latents.shape[-1]), codebook)
    assert torch.equal(found.flatten(), expected)


def integers(low, high, *shape):
    return torch.randint(low, high + 1, shape).float()


def pairs_of(codebook, count):
    return codebook[torch.randint(0, len(codebook), (2, count))]


def large_integers_on_bisectors():
    codebook = 2 * integers(-(2**19), 2**19, 50, 9)
    return pairs_of(codebook, 130).mean(0), codebook


def one_ulp_apart():
    codebook = torch.randn(12).repeat(40, 1)
    for i in range(1, len(codebook)):
        codebook[i] = codebook[i - 1]
        codebook[i, i % 12] = torch.nextafter(codebook[i, i % 12], torch.tensor(9.0))
    return torch.cat([codebook[::3], torch.randn(90, 12)]), codebook


def duplicates():
    codebook = torch.randn(30, 20)[torch.randint(0, 30, (200,))]
    return torch.randn(150, 20), codebook


def duplicates_128_apart():
    """Few rows are open, so repeats are not dropped, and score64 meets both codes in one lane."""
    codebook = torch.cat([torch.randn(130, 20) * 9, torch.randn(128, 20).repeat(2, 1)])
    return torch.cat([codebook[:130].repeat(3, 1), codebook[140:150]]), codebook


def fp16_ties():
    """Codes that 16 bits cannot tell apart."""
    codebook = torch.randn(1, 16) + 1e-5 * torch.randn(70, 16)
    return codebook[::2] + 1e-6 * torch.randn(35, 16), codebook


def rows_of_all_sizes():
    return torch.randn(140, 6) * torch.logspace(-44, 36, 140)[:, None], torch.randn(33, 6)


HOSTILE = {
    "small integers": lambda: (integers(-3, 3, 300, 3), integers(-3, 3, 40, 3)),
    "integers to 2^20": lambda: integers(-(2**20), 2**20, 170, 5).split((100, 70)),
    "large integers on bisectors": large_integers_on_bisectors,
    "bisectors": lambda: (pairs_of(c := torch.randn(60, 17), 200).mean(0), c),
    "duplicated codes": duplicates,
    "duplicated codes, few rows": duplicates_128_apart,
    "all codes equal": lambda: (torch.randn(200, 20), torch.full((90, 20), 3.3)),
    "one ulp apart": one_ulp_apart,
    "apart by less than 16 bits": fp16_ties,
    "offset of 1e4": lambda: (torch.randn(200, 20) + 1e4, torch.randn(90, 20) + 1e4),
    "offset of the codes alone": lambda: (torch.randn(99, 20), torch.randn(90, 20) + 1e4),
    "1e-30": lambda: (torch.randn(99, 20) * 1e-30, torch.randn(90, 20) * 1e-30),
    "1e30": lambda: (torch.randn(99, 20) * 1e30, torch.randn(90, 20) * 1e30),
    "latents of 1e6, codes of 1e-6": lambda: (torch.randn(99, 9) * 1e6, torch.randn(70, 9) * 1e-6),
    "latents of 1e-6, codes of 1e6": lambda: (torch.randn(99, 9) * 1e-6, torch.randn(70, 9) * 1e6),
    "rows of all sizes": rows_of_all_sizes,
    "zero latents": lambda: (torch.zeros(70, 8), torch.eye(8).repeat(9, 1)),
    "zero codes": lambda: (torch.randn(70, 8), torch.zeros(66, 8)),
    "denormals": lambda: (torch.randn(40, 8) * 1e-40, torch.randn(30, 8) * 1e-40),
    "largest floats": lambda: (torch.randn(40, 8).sign() * 3e38, torch.randn(30, 8).sign() * 3e38),
    "overflow in the centring": lambda: (
        torch.tensor([[0.7e38], [-3e38]]),
        torch.tensor([[3.4e38], [-3e38], [-2.9e38]]),
    ),
    "one code": lambda: (torch.randn(70, 8), torch.randn(1, 8)),
    "one dimension": lambda: (torch.randn(300, 1), torch.randn(129, 1)),
    "100 dimensions": lambda: (torch.randn(65, 100), torch.randn(65, 100)),
    "512 dimensions": lambda: (torch.randn(33, 512), torch.randn(70, 512)),
    "one row": lambda: (torch.randn(1, 64), torch.randn(512, 64)),
    "4000 codes": lambda: (torch.randn(70, 20), torch.randn(4000, 20)),
}  # fmt: skip


@backends
@pytest.mark.parametrize("name", HOSTILE)
def test_the_lowest_index_of_the_least_score64(name, backend):
    check(*HOSTILE[name](), backend)


@backends
def test_more_than_65536_codes(backend):
    codebook = torch.randn(66_001, 12)
    near = codebook[torch.randint(0, 66_001, (70,))] + 1e-3 * torch.randn(70, 12)
    check(torch.cat([near, torch.randn(5, 12)]), codebook, backend)


@backends
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(backend, data):
    rows, dim, size = (data.draw(st.integers(1, largest)) for largest in (140, 70, 200))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    latents, codebook = (
        torch.randint(-levels, levels + 1, (n, dim)) / levels for n in (rows, size)
    )
    check(latents.to(data.draw(dtypes)), codebook.to(data.draw(dtypes)), backend)


@backends
def test_against_exact_rational_arithmetic(backend):
    latents = torch.cat([torch.randn(20, 3), integers(-2, 2, 20, 3)])
    codebook = torch.cat([torch.randn(9, 3), integers(-2, 2, 9, 3)])
    expected = []
    for row in latents.tolist():
        exact = [
            sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(row, code, strict=True))
            for code in codebook.tolist()
        ]
        expected.append(exact.index(min(exact)))
    assert look_up(latents, codebook, backend).tolist() == expected


def test_score64_rounds_every_operation_on_its_own():
    latents, codebook = torch.randn(50, 7), torch.randn(20, 7)
    expected = np.zeros((50, 20))
    for d in range(7):
        t = latents.double().numpy()[:, None, d] - codebook.double().numpy()[None, :, d]
        square = t * t
        expected = expected + square
    assert np.array_equal(reference.score64(latents[:, None], codebook).numpy(), expected)


@backends
def test_any_strides(backend):
    x = torch.randn(3, 20, 9, 14)
    codebook = torch.randn(20, 90).T
    strided = {
        "NCHW": x.movedim(1, -1),
        "sliced": x[:, :, ::2, 1::3].movedim(1, -1),
        "sliced dimensions": x.movedim(1, -1)[..., 1::2],
        "channels last": x.contiguous(memory_format=torch.channels_last).movedim(1, -1),
        "permuted": x.permute(3, 0, 2, 1),
        "expanded": x[:1, :, :1].expand(4, 20, 5, 14).movedim(1, -1),
        "flat": x.movedim(1, -1).reshape(-1, 20),
        "one latent": x[0, :, 0, 0],
        "five dimensions": torch.randn(2, 20, 2, 3, 5)[..., ::2].movedim(1, -1),
        "six dimensions": torch.randn(2, 3, 2, 3, 4, 20)[:, ::2, :, ::2, ::3],
    }
    for latents in strided.values():
        check(latents, codebook[:, : latents.shape[-1]], backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_offsets_beyond_two_to_the_31(backend, dtype):
    """A view over memory that is never touched but for its rows."""
    far = 2**31 + 7
    memory = torch.empty(far + 100, dtype=dtype, device="meta").untyped_storage().nbytes()
    storage = torch.UntypedStorage(memory, device=DEVICE)  # not filled, so not resident
    whole = torch.empty(0, dtype=dtype, device=DEVICE).set_(storage)
    rows = whole.as_strided((2, 8), (far, 1))
    columns = whole.as_strided((3, 2), (1, far))
    codebook = torch.randn(30, 8)
    for latents in (rows, columns):
        latents.copy_(torch.randn(latents.shape))
        narrow = codebook[:, : latents.shape[1]].contiguous()
        expected = reference.nearest_code(latents.cpu().contiguous(), narrow)
        found = nearest_code(latents, narrow.to(DEVICE), backend)
        assert torch.equal(found.cpu(), expected)


@backends
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_not_finite(backend, precision):
    latents, codebook = torch.randn(200, 12), torch.randn(90, 12)
    latents[5, 3] = torch.nan
    latents[7, 1] = torch.inf
    latents[9] = -torch.inf
    found = look_up(latents, codebook, backend, precision)
    assert found[[5, 7, 9]].tolist() == [0, 0, 0]
    if precision == "exact":
        check(latents, codebook, backend)
    codebook[3, 3], codebook[4], codebook[0, 2] = torch.nan, torch.inf, torch.nan
    found = look_up(latents, codebook, backend, precision)
    assert found[[5, 7, 9]].tolist() == [0, 0, 0]
    finite = latents.isfinite().all(1)
    assert not set(found[finite].tolist()) & {0, 3, 4}
    if precision == "exact":
        check(latents, codebook, backend)
    codebook[:] = torch.nan
    assert look_up(latents, codebook, backend, precision).max() == 0


@backends
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8)])
def test_no_latents(backend, shape):
    assert look_up(torch.empty(shape), torch.randn(5, 8), backend).shape == shape[:-1]
    counts, sums = codebook_sums(torch.empty(shape), torch.empty(shape[:-1], dtype=torch.long), 5)
    assert counts.tolist() == [0] * 5 and sums.tolist() == [[0.0] * 8] * 5


def test_float64_latents_are_looked_up_in_float64():
    codebook = torch.randn(60, 9, dtype=torch.float64)
    latents = pairs_of(codebook, 300).mean(0) + 1e-12 * torch.randn(300, 9, dtype=torch.float64)
    for exponent in (0, 100, 153, 154, 155, 160, 200, -100, -155, -160, -161, -162, -165, -200):
        scale = 10.0**exponent
        check(latents * scale, codebook * scale, "torch")
    check(latents.to(torch.float32), codebook, "torch")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_process_may_allow_less_precise_products(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(torch.randn(3000, 64), torch.randn(512, 64), "torch")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@backends
def test_fast_is_within_its_bound(backend):
    latents, codebook = torch.randn(1500, 48) + 3, torch.randn(300, 48) + 3
    codes = look_up(latents, codebook, backend, "fast")
    scores = reference.score64(latents[:, None], codebook)
    excess = scores.gather(1, codes[:, None])[:, 0] - scores.amin(1)
    mean = codebook.mean(0)
    lengths, longest = (latents - mean).norm(dim=1), (codebook - mean).norm(dim=1).max()
    # kernels/README.md with both rounding residuals at their worst, 2^-11 of the operand
    error = 2 * 2**-11 * lengths * longest
    error += (48 + 48 / 8 + 6) * 2**-22 * (lengths * longest + longest**2 / 2)
    assert (excess <= 4 * 1.01 * error).all()
    assert (codes != scores.argmin(1)).float().mean() < 0.02


# ------------------------------------------------------------------ the certificate


def pattern(*signs, dim=64):
    return torch.tensor(signs, dtype=torch.float32).repeat(dim // len(signs))


def residuals_of_the_latent():
    """A latent whose rounding residual points from code 0 straight to code 1.

    x = ±1 + r rounds to ±1 in 16 bits, so that x·(c1 - c0) with c1 = -c0 = (v, …, v) loses 2·D·r·v,
    all that the bound allows for the residual of x. Code 1 is lengthened at right angles to all
    else until, rounded, it trails by 3/4 of that: half a bound would call code 0 certain. The other
    codes make the mean zero and lose clearly.
    """
    r, v = 0.9 * 2.0**-12, 0.5
    longer = 37 * 2.0**-11 * pattern(1, 1, -1, -1)
    balance = 0.52 * pattern(1, 1, 1, 1, -1, -1, -1, -1)
    balance = balance.half().float()
    ones = torch.ones(64)
    codebook = torch.stack([-v * ones, v * ones + longer, balance - longer, -balance])
    return (pattern(1, -1) + r)[None], codebook


def residuals_of_the_codes():
    """The same with codes whose rounding residuals lie along the latent, one each way."""
    r = 0.9 * 2.0**-13
    zero, one = 0.5 * pattern(1, -1), 0.5 * pattern(1, 1, -1, -1)
    one = one + 37 * 2.0**-11 * pattern(1, -1, -1, 1)
    balance = 0.25 * pattern(1, 1, 1, 1, -1, -1, -1, -1)
    codebook = torch.stack([zero - r, one + r, -zero - balance, -one + balance])
    return torch.ones(1, 64), codebook


def number_of_the_tile():
    """Code 0 beats one of the last tile by less than what the numbers of the tiles replace."""
    latent = torch.zeros(1, 16)
    latent[0, 0] = 128
    codebook = torch.zeros(16_384, 16)
    codebook[:, 1:] = torch.randint(-9, 10, (16_384, 15)) / 64
    codebook[8192:] = -codebook[:8192].flip(0)  # the mean stays zero
    codebook[[0, -1]] = 0
    codebook[[0, -1], 0], codebook[[0, -1], 1] = 1, 0.0390625  # in the middle of the replaced bits
    codebook[-1, 2] = 0.017578125  # 20 last places of the score
    codebook[[1, -2]] = -codebook[[0, -1]]
    return torch.cat([latent, codebook[100:115]]), codebook


@pytest.mark.parametrize(
    "trap, right",
    [(residuals_of_the_latent, 1), (residuals_of_the_codes, 1), (number_of_the_tile, 0)],
)
def test_half_a_bound_would_certify_a_wrong_code(trap, right):
    latents, codebook = trap()
    assert codebook.mean(0).abs().max() == 0
    assert reference.nearest_code(latents, codebook)[0] == right
    assert look_up(latents, codebook, "triton")[0] == right
    assert look_up(latents, codebook, "triton", "fast")[0] != right, "the trap has to be one"


@triton.jit
def _bound(values, state, out, D: tl.constexpr):
    length, residual, factor = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    scale, accumulation, rounding = tl.load(values + 3), tl.load(values + 4), tl.load(values + 5)
    bound = nearest_code_triton._error_bound(
        length, residual, factor, scale, state, nearest_code_triton._RESIDUAL,
        accumulation, rounding, D,
    )  # fmt: skip
    tl.store(out, bound)


@pytest.mark.parametrize(
    "values",
    [
        # length, residual, factor, scale, accumulation, rounding; longest, residual, bias
        (8.0, 1e-3, 1.0, 1.0, 1e-5, 1e-6, 4.0, 5e-4, 8.0),
        (8.0, 0.0, 1.0, 1.0, 0.0, 0.0, 4.0, 0.0, 8.0),  # centring and the bias alone
        (1e6, 0.0, 2.0**-20, 1.0, 0.0, 0.0, 1e-6, 0.0, 1e-12),  # score64 alone
        (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1e-6, 0.0, 1.0),  # the bias alone
        (1.0, 0.0, 0.5, 2.0**110, 0.0, 0.0, 1.0, 0.0, 1.0),  # flushed subnormal numbers
    ],
)
def test_the_bound_is_the_documented_one(values, dim=64):
    length, residual, factor, scale, accumulation, rounding, *of_codes = values
    longest, code_residual, bias = of_codes
    bias *= factor
    flushed = scale * 2**-124 * dim**0.5
    row = residual + 2**-24 * length + factor * flushed
    code = code_residual + 2**-24 * longest + flushed
    expected = row * (longest + code_residual) + (length + row) * code
    expected += (accumulation + rounding) * (length * longest + bias) + 2**-22 * bias
    expected += (dim + 3) * 2**-53 * (length + factor * longest) ** 2 / factor
    state = torch.zeros(8, device=DEVICE)
    state[[1, 2, 4]] = torch.tensor(of_codes, device=DEVICE)
    out = torch.empty(1, device=DEVICE)
    _bound[(1,)](torch.tensor(values[:6], device=DEVICE), state.view(torch.int32), out, D=dim)
    assert expected < out.item() < 1.02 * expected


def truncated(value):
    """A float64 cut to the 24 bits of fp32, towards zero."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.trunc(np.ldexp(mantissa, 24)), exponent - 24)


def accumulate_like_tensor_cores(start, products, block):
    """The assumed model (kernels/README.md): per step, `block` exact products and the sum so far
    are aligned with the largest of them, cut to 24 bits, added, and the result is cut as well."""
    for step in np.split(products, len(products) // block):
        addends = np.concatenate([[start], step])
        _, exponent = np.frexp(np.abs(addends).max())
        start = truncated(np.trunc(np.ldexp(addends, 24 - exponent)).sum() * 2.0 ** (exponent - 24))
    return start


def worst_sums(dim):
    """Rows, codes (fp16 values) and biases that lose as much as truncation can lose."""
    yield np.full(dim, 1 + 2.0**-10), np.full(dim, 1 + 2.0**-10), 64.0 * dim
    yield np.full(dim, 1 - 2.0**-11), np.full(dim, 1 - 2.0**-11), 1.0
    # every product is a little less than the last place of the bias, and vanishes
    yield np.full(dim, 2.0**-11 * (1 - 2.0**-11)), np.full(dim, 2.0**-12 * (1 - 2.0**-11)), 1.0
    yield np.full(dim, 1 - 2.0**-11), np.full(dim, 2.0**-12 * (1 - 2.0**-11)), 1 - 2.0**-24
    yield np.full(dim, -1 + 2.0**-11), np.full(dim, 1 - 2.0**-11), float(dim)
    x = np.full(dim, 1 - 2.0**-11)
    x[0] = 2.0**10
    yield x, np.full(dim, 1 - 2.0**-11), 0.0


def accumulation_bound(x, c, bias):
    dim = len(x)
    magnitude = np.linalg.norm(x) * np.linalg.norm(c) + abs(bias)
    return (dim + dim / 8 + 4) * 2.0**-22 * magnitude


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("dim", [16, 64, 512])
def test_truncating_accumulation_stays_within_half_the_bound(dim, block):
    largest = 0.0
    for x, c, bias in worst_sums(dim):
        found = accumulate_like_tensor_cores(bias, x * c, block)
        error = abs(found - (bias + float(np.sum(x * c))))
        assert error <= accumulation_bound(x, c, bias) / 2
        largest = max(largest, error / accumulation_bound(x, c, bias))
    assert largest > 0.3  # the sums are hostile indeed


def lost_products():
    """Code 0 is nearer, but every product that says so is too small to survive truncation."""
    dim = 512
    latent, codebook = torch.zeros(1, dim), torch.zeros(4, dim)
    latent[0, 1:] = 2.0**-12 * (1 - 2.0**-11)
    codebook[:2, 0] = 1
    codebook[0, 1:] = codebook[1, 1:256] = 2.0**-12 * (1 - 2.0**-11)
    codebook[2:] = -codebook[:2].mean(0)  # the mean is zero
    return latent, codebook


@pytest.mark.skipif(DEVICE == "cuda", reason="patches the interpreter")
def test_exact_on_tensor_cores_that_truncate(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, *_):
        total = d.data.astype(np.float64)
        a, b = a.data.astype(np.float64), b.data.astype(np.float64)
        for i in range(0, a.shape[1], 16):
            addends = a[:, i : i + 16, None] * b[None, i : i + 16]
            addends = np.concatenate([total[:, None], addends], axis=1)
            _, exponent = np.frexp(np.abs(addends).max(1, keepdims=True))
            unit = 2.0 ** (exponent - 24)
            total = truncated((np.trunc(addends / unit) * unit).sum(1))
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    latents, codebook = lost_products()
    assert look_up(latents, codebook, "triton", "fast").tolist() == [1], "the trap has to be one"
    check(latents, codebook, "triton")
    check(torch.randn(70, 24), torch.randn(90, 24), "triton")


@triton.jit
def _one_product(x, c, bias, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """out (BLOCK, BLOCK): x·c + bias of equal rows and codes, as the first pass computes it."""
    n, d = tl.arange(0, BLOCK), tl.arange(0, D)
    rows = tl.load(x + d)[None, :] + tl.zeros((BLOCK, 1), tl.float16)
    codes = tl.load(c + d)[:, None] + tl.zeros((1, BLOCK), tl.float16)
    start = tl.load(bias) + tl.zeros((BLOCK, BLOCK), tl.float32)
    tl.store(out + n[:, None] * BLOCK + n[None, :], tl.dot(rows, codes, acc=start))


@pytest.mark.parametrize("block", [16, 64])  # mma.sync and, on Hopper, wgmma, as in the kernels
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_the_accumulator_stays_within_half_the_bound(dim, block):
    """On a GPU the assumption about its tensor cores; elsewhere the interpreter's arithmetic."""
    for x, c, bias in worst_sums(dim):
        x16, c16 = (torch.tensor(a, dtype=torch.float16, device=DEVICE) for a in (x, c))
        assert x16.double().tolist() == x.tolist() and c16.double().tolist() == c.tolist()
        start = torch.tensor([bias], dtype=torch.float32, device=DEVICE)
        out = torch.empty(block, block, device=DEVICE)
        _one_product[(1,)](x16, c16, start, out, D=dim, BLOCK=block)
        error = (out.double().cpu() - (start.item() + float(np.sum(x * c)))).abs().max()
        assert error <= accumulation_bound(x, c, bias) / 2


@backends
def test_most_rows_need_no_second_look(backend, monkeypatch):
    """A bound that certified nothing would be right and useless."""
    latents, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    if backend == "triton":
        first, second = nearest_code_triton.open_rows(latents.to(DEVICE), codebook.to(DEVICE))
        assert first < 0.06 * 4096 and second < 0.003 * 4096
    else:
        decided = []
        original = reference.score64
        monkeypatch.setattr(
            "kernels.nearest_code_torch.score64",
            lambda x, c: decided.append(len(x)) or original(x, c),
        )
        nearest_code(latents, codebook, "torch")
        assert sum(decided) < 0.01 * 4096


# ------------------------------------------------------------------ sums


@backends
@pytest.mark.parametrize(
    "rows, dim, size", [(1, 1, 1), (50, 3, 9), (700, 70, 40), (300, 5, 40_000), (2000, 4, 3)]
)
def test_sums_against_float64(backend, rows, dim, size):
    latents, codes = torch.randn(rows, dim) + 1, torch.randint(0, size, (rows,))
    counts, sums = codebook_sums(latents.to(DEVICE), codes.to(DEVICE), size, backend)
    assert counts.dtype == torch.int64 and sums.dtype == torch.float32
    assert torch.equal(counts.cpu(), torch.bincount(codes, minlength=size))
    expected = torch.zeros(size, dim, dtype=torch.float64)
    for row, code in zip(latents.double(), codes.tolist(), strict=True):
        expected[code] += row
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-6, atol=1e-5)


@backends
def test_sums_of_integers_are_exact_with_hot_and_empty_codes(backend):
    latents = integers(-9, 9, 1500, 6)
    for codes in (torch.full((1500,), 7), torch.arange(1500) // 128, torch.arange(1500) % 2 * 11):
        counts, sums = codebook_sums(latents.to(DEVICE), codes.to(DEVICE), 12, backend)
        expected = torch.zeros(12, 6).index_add_(0, codes, latents)
        assert torch.equal(sums.cpu(), expected)
        assert counts.tolist() == torch.bincount(codes, minlength=12).tolist()


@backends
def test_sums_are_the_same_every_time_and_for_any_number_of_threads(backend):
    torch.use_deterministic_algorithms(False)  # a user has not asked for it either
    latents = torch.randn(9000, 33).to(DEVICE)
    codes = (torch.randint(0, 40, (9000,)) * torch.randint(0, 2, (9000,))).to(DEVICE)
    results = []
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        results.append(codebook_sums(latents, codes, 50, backend)[1])
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("latents", [torch.randn(2000, 600), torch.randn(2000, 3).double()])
def test_sums_beyond_the_kernels_are_deterministic_as_well(latents):
    torch.use_deterministic_algorithms(False)
    latents, codes = latents.to(DEVICE), torch.randint(0, 3, (2000,)).to(DEVICE)
    results = [codebook_sums(latents, codes, 3)[1] for _ in range(4)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@backends
@pytest.mark.parametrize("shape", [(5,), (2, 600, 4), (1, 520, 3, 2)])
def test_sums_take_any_leading_shape(backend, shape):
    latents, codes = integers(-9, 9, *shape), torch.randint(0, 4, shape[:-1])
    counts, sums = codebook_sums(latents.to(DEVICE), codes.to(DEVICE), 4, backend)
    flat = latents.reshape(-1, shape[-1])
    assert torch.equal(sums.cpu(), torch.zeros(4, shape[-1]).index_add_(0, codes.flatten(), flat))
    assert counts.sum() == len(flat)


def test_codes_out_of_range():
    latents, codes = integers(-9, 9, 300, 4), torch.randint(-2, 7, (300,))
    with pytest.raises(ValueError, match=r"codes \(300,\) must lie in \[0, 5\), not \[-2, 6\]"):
        codebook_sums(latents, codes, 5, "torch")
    counts, sums = codebook_sums(latents.to(DEVICE), codes.to(DEVICE), 5, "triton")
    inside = (codes >= 0) & (codes < 5)
    expected = torch.zeros(5, 4).index_add_(0, codes[inside], latents[inside])
    assert torch.equal(sums.cpu(), expected) and counts.sum() == inside.sum()


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_take_any_strides_and_dtype(backend, dtype):
    latents = integers(-9, 9, 2, 6, 5, 7).to(dtype).movedim(1, -1)
    codes = torch.randint(0, 8, (2, 7, 5)).transpose(1, 2)
    counts, sums = codebook_sums(latents.to(DEVICE), codes.to(DEVICE), 8, backend)
    flat = latents.reshape(-1, 6).float()
    assert torch.equal(sums.cpu(), torch.zeros(8, 6).index_add_(0, codes.reshape(-1), flat))
    assert counts.sum() == 70


def test_a_million_equal_rows_lose_nothing():
    """fp32 added row by row stops at 2^24: the sum of 0.1 over many rows is then too small."""
    latents = torch.full((1_000_000, 1), 0.1)
    _, sums = codebook_sums(latents, torch.zeros(1_000_000, dtype=torch.long), 1)
    assert sums.item() == pytest.approx(1e6 * float(latents[0, 0]), rel=1e-7)


# ------------------------------------------------------------------ interface


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(()), torch.zeros(2, 3)), r"latents must be \(\.\.\., D\).*not \(\)"),
        ((torch.zeros(4, 0), torch.zeros(2, 0)), r"latents must be .*D >= 1, not \(4, 0\)"),
        ((torch.zeros(4, 3), torch.zeros(3)), r"codebook must be \(K, D\).*not \(3,\)"),
        ((torch.zeros(4, 3), torch.zeros(0, 3)), r"codebook .*K >= 1, not \(0, 3\)"),
        ((torch.zeros(1, 4), torch.zeros(2, 3)), r"latents \(1, 4\) have 4 .*\(2, 3\) has 3"),
        ((torch.zeros(1, 3).int(), torch.zeros(2, 3)), r"latents \(1, 3\) must be floating point"),
        ((torch.zeros(1, 3), torch.zeros(2, 3).int()), r"codebook \(2, 3\) must be floating point"),
        ((torch.zeros(1, 3), torch.zeros(2, 3, device="meta")), r"latents \(1, 3\) are on .*meta"),
        ((torch.zeros(1, 3), torch.zeros(2, 3), "cuda"), r"backend must be .* not 'cuda'"),
        ((torch.zeros(1, 3), torch.zeros(2, 3), "auto", "fp16"), r"precision must be .*'fp16'"),
        ((torch.zeros(1, 3).double(), torch.zeros(2, 3), "triton"), r"fp32, bf16 and fp16"),
        ((torch.zeros(1, 513), torch.zeros(2, 513), "triton"), r"D <= 512, not latents \(1, 513\)"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        nearest_code(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "latents, codes, size, message",
    [
        (torch.zeros(4, 3), torch.zeros(5).long(), 2, r"codes must be int64 \(4,\).*\(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4), 2, r"codes must be int64 .*float32"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), 2, r"latents \(4, 3\) must be floating"),
        (torch.zeros(4, 3), torch.zeros(4).long(), 0, r"num_codes must be at least 1, not 0"),
        (torch.zeros(4, 3), torch.zeros(4, device="meta").long(), 2, r"codes \(4,\) are on meta"),
    ],
)
def test_bad_input_of_the_sums_is_named_in_one_line(latents, codes, size, message):
    with pytest.raises(ValueError, match=message):
        codebook_sums(latents, codes, size)


def test_triton_on_a_cpu_without_the_interpreter_is_an_error():
    code = (
        "import torch; from kernels import nearest_code\n"
        "try: nearest_code(torch.zeros(1, 3), torch.zeros(2, 3), 'triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {"PATH": "", "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "needs latents on a CUDA device, not cpu" in result.stdout, result.stderr


@backends
def test_custom_operators_are_well_formed(backend):
    latents, codebook = torch.randn(2, 5, 3, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    codes = nearest_code(latents, codebook)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.vqvae2.nearest_code, (latents, codebook, backend, "exact"), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.vqvae2.codebook_sums, (latents, codes, 9, backend), test_utils=checks
    )


@backends
def test_compiled_without_a_graph_break(backend):
    latents, codebook = torch.randn(6, 4, 5, device=DEVICE), torch.randn(9, 5, device=DEVICE)

    def step(latents, codebook):
        codes = nearest_code(latents, codebook, backend)
        counts, sums = codebook_sums(latents, codes, len(codebook), backend)
        return codes, sums / counts.clamp(min=1)[:, None]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(latents, codebook), step(latents, codebook), strict=True):
        assert torch.equal(found, expected)


def test_the_kernels_compile_for_gpus_without_spills():
    """The interpreter takes what the compiler refuses; compiling needs no GPU."""
    command = [sys.executable, "benchmarks/tune_nearest_code.py", "--check", "--dims", "64"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_90" in result.stdout and "score64_pass" in result.stdout


# ------------------------------------------------------------------ on a GPU alone


@pytest.mark.gpu
def test_no_host_synchronisation_and_little_memory():
    rows, size, dim = 1 << 20, 1024, 64
    latents = torch.randn(rows, dim, device="cuda")
    codebook = torch.randn(size, dim, device="cuda")
    expected = nearest_code(latents, codebook)  # compiles the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes = nearest_code(latents, codebook)
        codebook_sums(latents, codes, size)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(codes, expected)
    torch.cuda.reset_peak_memory_stats()
    nearest_code(latents, codebook)
    extra = torch.cuda.max_memory_allocated() - before - 2 * 8 * rows
    assert extra <= 16 * rows + 16 * size * dim


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_data():
    latents, codebook = torch.randn(5000, 32, device="cuda"), torch.randn(300, 32, device="cuda")
    nearest_code(latents, codebook)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = nearest_code(latents, codebook)
    for _ in range(3):
        latents.normal_()
        codebook.normal_()
        graph.replay()
        assert torch.equal(codes, reference.nearest_code(latents, codebook))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [torch.randn, torch.zeros])
def test_large_batches_agree_with_the_reference(make):
    latents = make(100_003, 64, device="cuda")
    codebook = torch.randn(512, 64, device="cuda")
    assert torch.equal(nearest_code(latents, codebook), reference.nearest_code(latents, codebook))
