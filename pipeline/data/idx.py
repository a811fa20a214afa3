"""MNIST's idx files: a big-endian header, then bytes; plain or gzipped."""

import gzip
import math
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.stage import UserError

MAX_ITEMS = 1_000_000


def find(root: Path, part: str, kind: str) -> Path:
    """The file of a part ("train", "t10k") and kind ("images-idx3", "labels-idx1").

    The official names, and those with a dot (`train-images.idx3-ubyte`) of some mirrors.
    """
    plain = f"{part}-{kind}-ubyte"
    for name in (plain, plain.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (root / f"{name}{suffix}").is_file():
                return root / f"{name}{suffix}"
    raise UserError(f"{root / plain}[.gz] is missing: expected MNIST's four idx files")


def _read(path: str, magic: int, item_shape: tuple[int, ...]) -> np.ndarray:
    """(n, *item_shape) uint8. Never reads more than the checked header announces."""
    header = struct.Struct(f">{2 + len(item_shape)}i")
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            found, count, *shape = header.unpack(file.read(header.size))
            if (found, *shape) != (magic, *item_shape) or not 0 <= count <= MAX_ITEMS:
                raise ValueError(f"header {found}, {count}, {shape}")
            data = file.read(count * math.prod(item_shape))
        return np.frombuffer(data, np.uint8).reshape(count, *item_shape)
    except (ValueError, struct.error, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is not MNIST's file ({error}): fetch it anew") from error


@lru_cache(maxsize=2)
def read_images(path: str) -> np.ndarray:
    """(n, 28, 28) uint8; kept, because images are asked for one by one."""
    return _read(path, 2051, (28, 28))


def read_labels(path: str) -> np.ndarray:
    """(n,) uint8 in 0..9."""
    labels = _read(path, 2049, ())
    if labels.size and labels.max() > 9:
        raise UserError(f"{path}: label {labels.max()} is no digit: fetch the file anew")
    return labels
