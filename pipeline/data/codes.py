"""Code shards as arrays: what a prior is trained on.

codes = open_codes(Path("runs/demo/codes"), "train")
codes.levels[0]        # (N, 8, 8) uint16, the coarsest level
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.index import Index, parse_description, read_index
from pipeline.data.shards import AGAIN, HEADER_LOCK, ShardReader, check_unique
from pipeline.stage import UserError

_MAX_GRID = 2**20  # codes of a level


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeSet:
    """All codes of a split and what is known about their images; views are samples."""

    index: Index
    split: str
    levels: list[np.ndarray]
    """Per level (N, h, w) integers, coarse to fine."""
    attributes: np.ndarray
    """(N, A) int8: -1 no, +1 yes, 0 unknown."""
    labels: np.ndarray
    """(N,) int64: the class, -1 where there is none."""
    flipped: np.ndarray
    """(N,) bool: the codes of a mirror image."""

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch for the loader: level0 ... (b, h, w) int64, attributes (b, A), labels (b,)."""
        levels = {
            f"level{i}": codes[indices].astype(np.int64) for i, codes in enumerate(self.levels)
        }
        attributes = self.attributes[indices].astype(np.float32)
        return {**levels, "attributes": attributes, "labels": self.labels[indices]}


def open_codes(root: Path, split: str) -> CodeSet:
    """Reads a split's codes into memory (two bytes a code), each member checked by its CRC32.

    Raises UserError for the first shard, sample or level that is missing or damaged, by name.
    """
    index = read_index(root)
    if index.codes is None:
        raise UserError(f"{root} holds images, not codes; run pipeline/extract_codes.py first")
    layout = _layout(root, index.codes)
    readers = [ShardReader(root / shard.name, shard) for shard in index.shards(split)]

    def load(reader: ShardReader) -> list[tuple[list[np.ndarray], dict]]:
        return [_read_sample(reader, sample, layout) for sample in range(len(reader))]

    with ThreadPoolExecutor() as pool:
        samples = [sample for shard in pool.map(load, readers) for sample in shard]
    check_unique([key for reader in readers for key in reader.keys])
    sign = {True: 1, False: -1, None: 0}
    names = index.attribute_names
    attributes = [[sign[s.get("attributes", {}).get(n)] for n in names] for _, s in samples]
    levels = [
        np.array([grids[level] for grids, _ in samples]).reshape(-1, *grid)
        for level, (grid, _) in enumerate(layout)
    ]
    return CodeSet(
        index=index,
        split=split,
        levels=levels,
        attributes=np.array(attributes, np.int8).reshape(len(samples), len(names)),
        labels=np.array([sample.get("label", -1) for _, sample in samples], np.int64),
        flipped=np.array([sample.get("view") == "flip" for _, sample in samples], bool),
    )


def npy_bytes(codes: np.ndarray) -> bytes:
    """An (h, w) integer grid as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=False)
    return buffer.getvalue()


def _layout(root: Path, codes: dict[str, Any]) -> list[tuple[tuple[int, int], int]]:
    """((h, w), codebook size) of each level, as the index has it."""
    try:
        layout = [
            ((int(h), int(w)), int(size))
            for (h, w), size in zip(codes["grids"], codes["codebook_sizes"], strict=True)
        ]
        if layout and all(1 <= h * w <= _MAX_GRID and size >= 1 for (h, w), size in layout):
            return layout
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{root / 'index.json'} does not tell the grids of its codes: {AGAIN}")


def _read_sample(
    reader: ShardReader, sample: int, layout: list[tuple[tuple[int, int], int]]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The grids of a sample, and what is known about its image."""
    members = reader.read(sample)
    try:
        grids = [
            _from_npy(members[f"level{level}.npy"], grid, size)
            for level, (grid, size) in enumerate(layout)
        ]
        return grids, parse_description(members["json"])
    except (KeyError, ValueError) as error:
        key, reason = reader.keys[sample].decode(), " ".join(str(error).split())
        raise UserError(f"{reader.path}: no codes in {key} ({reason}): {AGAIN}") from error


def _from_npy(data: bytes, grid: tuple[int, int], size: int) -> np.ndarray:
    """Codes (h, w); ValueError for anything else, before memory is taken for it."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a grid of codes")
    with HEADER_LOCK:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if shape != grid or dtype.kind not in "iu":
        raise ValueError(f"{dtype} of shape {shape}, expected integers of {grid}")
    codes = np.frombuffer(file.read(), dtype).reshape(grid, order="F" if fortran else "C")
    if not 0 <= codes.min() <= codes.max() < size:
        raise ValueError(f"codes outside 0..{size - 1}")
    return codes
