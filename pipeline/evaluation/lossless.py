"""Arithmetic coding of codes under their priors: the proof that causality, likelihood and sampler
belong together.

    data = lossless.encode(priors, codes)       # bytes: the codes' negative log-likelihood
    codes = lossless.decode(priors, data)       # the same codes, from the bytes alone

The decoder does what the sampler does, with the file in the place of the noise: front by front,
coarse to fine, it asks the priors for probabilities and tells them the codes that it has read. It
never knows a later code. So a file as short as the parallel forward pass says means that this pass
does not see later codes either, and that the engine's probabilities are its own.

The encoder asks the same engine in the same batches, because the coder needs probabilities that
are equal bit for bit; so both have to run on the same machine, device and number of threads. A
checksum of the codes tells where they did not.

A file: magic and version, number of images, images per batch, CRC-32 of the codes, the first four
bytes of a SHA-256 of those two numbers and the priors (20 bytes so far), then the words of a range
coder (Martin 1979), all little-endian. Within a batch the levels follow each other, within a level
the fronts, within a front the images, within an image the positions.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence

import constriction
import numpy as np
import torch
from torch.nn import functional as F

from pipeline.models.blocks import true_fp32
from pipeline.models.priors.fronts import fronts
from pipeline.models.priors.prior import Prior
from pipeline.models.priors.sampling import FrontNetwork

MAGIC = b"VQC\x01"
HEADER = struct.Struct("<4sIII4s")
STREAM = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
MODEL = STREAM.model.Categorical(perfect=False)  # leaves every code at least 2^-24

Codes = Sequence[torch.Tensor]  # per level (N, h, w) int64, coarse to fine
Coder = Callable[[np.ndarray, int, slice, torch.Tensor], np.ndarray]


def fixed_length_bits(grids: Sequence[tuple[int, int]], codebook_sizes: Sequence[int]) -> float:
    """Bits of an image's codes when all are equally likely: the sum of h·w·log2 K."""
    return sum(
        height * width * math.log2(size)
        for (height, width), size in zip(grids, codebook_sizes, strict=True)
    )


def encode(
    priors: Sequence[Prior],
    codes: Codes,
    labels: torch.Tensor | None = None,
    attributes: torch.Tensor | None = None,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> bytes:
    """Codes as a file under the priors.

    Args:
        priors, codes, labels, attributes: as `code_likelihood.code_nats` takes them.
        batch_size: images that are coded side by side; the decoder does likewise.
        progress: called with the number of codes just coded.

    Raises:
        ValueError: codes of another shape or range than the priors', or a prior that cannot be
            evaluated front by front or is in training mode.
    """
    for level, (prior, grid) in enumerate(zip(priors, codes, strict=True)):
        size, shape = prior.config.codebook_size, (len(codes[0]), *prior.config.grid)
        if grid.shape != shape:
            raise ValueError(f"codes of level {level} are {tuple(grid.shape)}, expected {shape}")
        if grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < size:
            raise ValueError(f"codes of level {level} must be in 0..{size - 1}")
    encoder = STREAM.queue.RangeEncoder()

    def write(probabilities: np.ndarray, level: int, images: slice, positions: torch.Tensor):
        symbols = codes[level][images].flatten(1)[:, positions].flatten().cpu().numpy()
        symbols = symbols.astype(np.int32)
        encoder.encode(symbols, MODEL, probabilities)
        return symbols

    _code_fronts(priors, len(codes[0]), batch_size, (labels, attributes), write, progress)
    count = len(codes[0])
    fingerprint = _fingerprint(priors, count, batch_size)
    header = HEADER.pack(MAGIC, count, batch_size, _checksum(codes), fingerprint)
    return header + encoder.get_compressed().astype("<u4").tobytes()


def decode(
    priors: Sequence[Prior],
    data: bytes,
    labels: torch.Tensor | None = None,
    attributes: torch.Tensor | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> list[torch.Tensor]:
    """The codes of a file, per level (N, h, w) int64; labels and attributes as in `encode`.

    Raises:
        ValueError: not such a file, damaged, of other priors or conditions, or made on a machine
            whose arithmetic differs.
    """
    if len(data) < HEADER.size or len(data) % 4 or not data.startswith(MAGIC):
        raise ValueError("not a file of arithmetic-coded codes")
    _, count, batch_size, checksum, fingerprint = HEADER.unpack(data[: HEADER.size])
    if fingerprint != _fingerprint(priors, count, batch_size):
        raise ValueError("coded under other priors than these, or damaged")
    words = np.frombuffer(data, "<u4", offset=HEADER.size).astype(np.uint32)
    decoder = STREAM.queue.RangeDecoder(words)

    def read(probabilities: np.ndarray, *_: object) -> np.ndarray:
        return decoder.decode(MODEL, probabilities)

    try:
        codes = _code_fronts(priors, count, batch_size, (labels, attributes), read, progress)
    except AssertionError:  # words that no codes lead to
        codes = []
    if _checksum(codes) != checksum:
        raise ValueError(
            "the decoded codes do not have the file's checksum: it is damaged, or was coded under "
            "other classes or attributes, or on another machine, device or number of threads"
        )
    return codes


@torch.no_grad()
@true_fp32()
def _code_fronts(
    priors: Sequence[Prior],
    count: int,
    batch_size: int,
    conditions: tuple[torch.Tensor | None, torch.Tensor | None],
    code: Coder,
    progress: Callable[[int], object] | None,
) -> list[torch.Tensor]:
    """Goes through `count` images as both sides have to, and returns their codes.

    Args:
        code: writes or reads the codes of one front: probabilities (B·P, K), level, images of the
            batch and positions (P,) -> codes (B·P,) int32.
    """
    if any(prior.training for prior in priors):
        raise ValueError("the priors must be in eval mode: dropout cannot be repeated")
    device = priors[0].embed.weight.device
    codes = [
        torch.zeros(count, *prior.config.grid, dtype=torch.int64, device=device) for prior in priors
    ]
    for start in range(0, count, batch_size):
        images = slice(start, min(start + batch_size, count))
        size = images.stop - images.start
        labels, attributes = (None if each is None else each[images] for each in conditions)
        for level, prior in enumerate(priors):
            coarser = [grid[images] for grid in codes[:level]]
            condition = prior.condition(size, coarser, labels, attributes)
            network = FrontNetwork(prior, condition, prior.slope)
            grid = codes[level][images].view(size, -1)
            for positions in fronts(prior.config.grid, prior.slope):
                positions = positions.to(device)
                probabilities = _probabilities(network.logits(positions))
                symbols = code(probabilities, level, images, positions)
                found = torch.from_numpy(symbols).to(grid).view(size, -1)
                grid[:, positions] = found
                network.tell(positions, found)
                if progress is not None:
                    progress(found.numel())
    return codes


def _probabilities(logits: torch.Tensor) -> np.ndarray:
    """Logits (B, P, K) -> (B·P, K) float64; of a single code 2, since the coder wants a choice."""
    probabilities = logits.double().softmax(-1).flatten(0, 1)
    if probabilities.shape[1] == 1:
        probabilities = F.pad(probabilities, (0, 1))
    return probabilities.cpu().numpy()


def _checksum(codes: Codes) -> int:
    checksum = 0
    for grid in codes:
        checksum = zlib.crc32(grid.cpu().numpy().astype("<i4").tobytes(), checksum)
    return checksum


def _fingerprint(priors: Sequence[Prior], count: int, batch_size: int) -> bytes:
    """The first bytes of the SHA-256 of the header's numbers and of all priors' configs and
    weights."""
    sha256 = hashlib.sha256(f"{count} {batch_size}".encode())
    for prior in priors:
        sha256.update(repr(prior.config).encode())
        for name, weight in sorted(prior.state_dict().items()):
            sha256.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            sha256.update(weight.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.digest()[:4]
