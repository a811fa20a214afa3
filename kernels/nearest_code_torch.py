"""Nearest-code look-up in torch alone: one matrix product per chunk of rows, certified.

The proof of the bound is in kernels/README.md. Shapes: N rows, D dimensions, K codes; the codes lie
in M·G ≥ K places, code k in group k % G, so that the maximum of every group is one vectorised pass.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch

from kernels.reference import score64

_SCORES = 2**21  # scores of a chunk: 8 MiB of fp32, which stays in the cache
_PAIRS = 2**23  # numbers of a batch of candidates that score64 decides: 64 MiB
_SWITCH = threading.RLock()  # see _ieee_products; reentrant, as repeated codes start again


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor, exact: bool) -> torch.Tensor:
    """latents (..., D) and codebook (K, D), floating point -> (...) int64 in [0, K)."""
    dtype = torch.promote_types(latents.dtype, codebook.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    size, dim = codebook.shape
    groups = max(32, 2 ** math.ceil(math.log2(size) / 2))  # below 32 the reduction is slow
    members = math.ceil(size / groups)
    mean, scale, centred, bias, longest = _prepare(codebook.to(dtype), groups * members)
    error_bound = _error_bound(dim, dtype, longest)

    chunk = max(256, _SCORES // (groups * members))
    chunk = min(chunk, max(1, latents.numel() // dim))
    device = latents.device
    rows_buffer = torch.empty(chunk, dim, dtype=dtype, device=device)
    scores_buffer = torch.empty(chunk, groups * members, dtype=dtype, device=device)
    codes = torch.empty(latents.shape[:-1], dtype=torch.int64, device=device)
    flat_codes = codes.view(-1)
    undecided = _Undecided(codebook, flat_codes)
    seek_duplicates = exact and size > 1
    start = 0
    with _ieee_products():
        for block in _blocks(latents, chunk):
            count = block.numel() // dim
            rows, scores = rows_buffer[:count], scores_buffer[:count]
            torch.sub(block, mean, out=rows.view(block.shape))
            if scale != 1:
                rows *= scale
            lengths = torch.linalg.vector_norm(rows, dim=1)
            torch.addmm(bias, rows, centred.T, out=scores)

            by_group = scores.view(count, members, groups)
            group_best = by_group.amax(1)
            best, group = group_best.max(1)
            inside = by_group.gather(2, group[:, None, None].expand(-1, members, 1)).squeeze(2)
            member = inside.argmax(1)
            found = flat_codes[start : start + count]
            torch.add(group, member, alpha=groups, out=found)
            if exact:
                least = best - 2 * error_bound(lengths)
                rivals = _count(group_best >= least[:, None]) + _count(inside >= least[:, None])
                open_rows = (rivals != 2).nonzero()[:, 0]  # the best itself was counted twice
                if seek_duplicates and len(open_rows) > count // 8:
                    seek_duplicates = False
                    distinct = _first_occurrences(codebook)
                    if len(distinct) < size:
                        return distinct[nearest_code(latents, codebook[distinct], exact)]
                undecided.add(block, scores[:, :size], least, open_rows, start)
            else:
                found.masked_fill_(~lengths.isfinite(), 0)
            start += count
    undecided.decide()
    return codes


def _prepare(codebook: torch.Tensor, places: int):
    """Mean (D,), scale (a power of two), centred and scaled codes (places, D), bias (places,), and
    the length of the longest code.

    A code that is not finite, and a place without a code, has a bias of -inf.
    """
    finite = codebook.abs().amax(1) < torch.inf  # False as well where it is not a number
    if not finite.all():
        codebook = torch.where(finite[:, None], codebook, 0)
    mean = codebook.mean(0)  # any centre would do
    centred = codebook - mean
    _, exponent = math.frexp(float(centred.abs().max()))
    scale = 1.0  # float64 is not scaled: it leaves its range together with score64
    if codebook.dtype == torch.float32 and not -40 <= exponent <= 40:
        scale = math.ldexp(1.0, -max(-120, min(exponent, 120)))
    centred = torch.nn.functional.pad(centred * scale, (0, 0, 0, places - len(codebook)))
    lengths = torch.linalg.vector_norm(centred, dim=1, dtype=torch.float64)
    bias = (lengths.square() * -0.5).to(codebook.dtype)
    bias[len(codebook) :] = -torch.inf
    bias[: len(codebook)].masked_fill_(~finite, -torch.inf)
    return mean, scale, centred, bias, float(lengths.max())


def _error_bound(dim: int, dtype: torch.dtype, longest: float):
    """A function of the lengths (N,) of centred rows: how far a score x·c - |c|²/2 of such a row
    may be from its real value, score64's own rounding included.

    With IEEE arithmetic in any order, fused or not (Higham 2002, section 3.1), u the unit roundoff:
    D + 1 roundings in the sum, 2 for the centring, 3 for the bias (2D + 8 in all for the bias in
    float64, which is summed in no higher precision); the rest is slack.
    """
    info = torch.finfo(dtype)
    slack = 1 + 2.0**-8  # for the rounding of the bound itself
    rounding = slack * (dim + 8) * info.eps / 2
    rounding64 = slack * (dim + 3) * 2.0**-53
    of_bias = rounding if dtype == torch.float32 else 2 * rounding
    constant = of_bias * longest * longest / 2 + (dim + 2) * info.tiny

    def bound(lengths: torch.Tensor) -> torch.Tensor:
        error = torch.add(lengths, longest).square_().mul_(rounding64).add_(constant)
        return error.add_(lengths, alpha=rounding * longest)

    return bound


def _count(mask: torch.Tensor) -> torch.Tensor:
    """(N, P) bool -> (N,): how many are set, in the narrowest type that cannot wrap round."""
    return mask.sum(1, dtype=torch.uint8 if mask.shape[1] < 128 else torch.int32)


class _Undecided:
    """Rows with several codes within the bound: the candidates go to score64, in batches."""

    def __init__(self, codebook: torch.Tensor, codes: torch.Tensor):
        self.codebook, self.codes = codebook, codes
        self.parts: list[tuple[torch.Tensor, ...]] = []
        self.pairs = 0

    def add(self, block, scores, least, open_rows, start: int) -> None:
        size, dim = self.codebook.shape
        if len(open_rows) == 0:
            return
        for rows in open_rows.split(max(1, _PAIRS // (size * dim))):
            # not below, rather than above: where a score or the bound is not a number, all stand
            row, code = (~(scores[rows] < least[rows, None])).nonzero().unbind(1)
            place = rows if block.dim() == 2 else torch.unravel_index(rows, block.shape[:-1])
            latents = block[place]
            self.parts.append((rows + start, latents, row, code))
            self.pairs += len(row)
            if self.pairs * dim >= _PAIRS:
                self.decide()

    def decide(self) -> None:
        """Sets the codes of all rows added so far: the least score64, of those the lowest code."""
        if not self.parts:
            return
        rows, latents, owners, candidates = zip(*self.parts, strict=True)
        offsets = [0]
        for part in rows:
            offsets.append(offsets[-1] + len(part))
        owner = torch.cat([o + offset for o, offset in zip(owners, offsets, strict=False)])
        candidate = torch.cat(candidates)
        score = score64(torch.cat(latents)[owner], self.codebook[candidate])
        least = score.new_full((offsets[-1],), torch.inf)
        least.scatter_reduce_(0, owner, score, "amin")
        wins = score == least[owner]
        lowest = candidate.new_full((offsets[-1],), len(self.codebook))
        lowest.scatter_reduce_(0, owner[wins], candidate[wins], "amin")
        self.codes[torch.cat(rows)] = lowest
        self.parts, self.pairs = [], 0


def _first_occurrences(codebook: torch.Tensor) -> torch.Tensor:
    """Indices (K',), ascending, of the codes that equal no code before them."""
    distinct, place = torch.unique(codebook, dim=0, return_inverse=True)
    first = place.new_full((len(distinct),), len(codebook))
    indices = torch.arange(len(codebook), device=codebook.device)
    return first.scatter_reduce_(0, place, indices, "amin").sort().values


def _blocks(latents: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Views (..., D) of at most `chunk` rows each, in row-major order, without a copy."""
    if latents.dim() == 1:
        yield latents[None]
    elif latents.dim() == 2:
        yield from latents.split(chunk)
    else:
        inner = math.prod(latents.shape[1:-1])
        if inner <= chunk:
            yield from latents.split(max(1, chunk // max(1, inner)))
        else:
            for part in latents:
                yield from _blocks(part, chunk)


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """fp32 products in fp32, whatever the process allows elsewhere: the bound rests on it.

    The switch is the process's, so threads take turns.
    """
    cpu = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backends = (cpu, torch.backends.cuda.matmul)
    with _SWITCH:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
