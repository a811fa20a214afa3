"""Codebook operations behind one dispatch: nearest-code look-up and per-code sums.

This is the one place that decides which backend runs. Today that is PyTorch on every device.
"""

from kernels.nearest_code import codebook_sums, nearest_code

__all__ = ["codebook_sums", "nearest_code"]
