"""Gumbel noise keyed by what it is for: the same for any batch, order, device and sampler.

Each number is a hash of (seed, image, level, position, code) by the finaliser of SplitMix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"), computed where it is
needed.
"""

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64: a bijection of 64-bit integers (...) int64 that scrambles every
    bit; products wrap around."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def image_keys(seed: int, images: torch.Tensor, level: int, purpose: int = 0) -> torch.Tensor:
    """A key for each image number (B,) int64 at a level -> (B,) int64; `purpose` separates draws
    that must not share their noise (resampled fillings, say)."""
    key = torch.tensor(0, dtype=torch.int64, device=images.device)
    for part in (torch.tensor(seed), torch.tensor(level), torch.tensor(purpose), images):
        key = mix(key + _GOLDEN) ^ part.to(key.device)
    return mix(key + _GOLDEN)


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Standard Gumbel noise for some positions of some images.

    Args:
        keys: of the images, (B,) int64, from `image_keys`.
        positions: i·W + j, (P,) int64.

    Returns:
        (B, P, codebook_size) float32.
    """
    codes = torch.arange(codebook_size, device=keys.device)
    counters = positions[:, None] * codebook_size + codes
    bits = mix(mix(keys)[:, None, None] + (counters + 1) * _GOLDEN)
    # 52 bits, at the middle of their interval: never 0 or 1
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log().float()
