"""Quantizers, one per file, behind the contract of contract.py."""

from typing import Literal, get_args

from pipeline.models.quantizers.contract import (
    Gradient,
    PlacedCodes,
    Quantized,
    Quantizer,
    Statistics,
    usage,
)
from pipeline.models.quantizers.cosine import CosineQuantizer
from pipeline.models.quantizers.ema import EMAQuantizer
from pipeline.models.quantizers.fsq import FSQQuantizer, fsq_levels
from pipeline.models.quantizers.learned import LearnedQuantizer
from pipeline.models.quantizers.simvq import SimVQQuantizer

QuantizerName = Literal["ema", "learned", "cosine", "fsq", "simvq"]


def make_quantizer(
    name: QuantizerName,
    num_codes: int,
    code_dim: int,
    decay: float,
    revival: float,
    gradient: Gradient,
) -> Quantizer:
    """The quantizer of that name; `decay` and `revival` are for those whose codes are placed."""
    placed = {"ema": EMAQuantizer, "cosine": CosineQuantizer, "learned": LearnedQuantizer}
    if name in placed:
        return placed[name](num_codes, code_dim, decay, revival, gradient)
    if name == "simvq":
        return SimVQQuantizer(num_codes, code_dim, gradient)
    assert name == "fsq", f"unknown quantizer {name}, known are {get_args(QuantizerName)}"
    return FSQQuantizer(num_codes, code_dim)


__all__ = [
    "CosineQuantizer",
    "EMAQuantizer",
    "FSQQuantizer",
    "Gradient",
    "LearnedQuantizer",
    "PlacedCodes",
    "Quantized",
    "Quantizer",
    "QuantizerName",
    "SimVQQuantizer",
    "Statistics",
    "fsq_levels",
    "make_quantizer",
    "usage",
]
