"""Code shards as arrays: what a prior is trained on.

codes = open_codes(Path("runs/demo/codes"), "train")
codes.levels[0]        # (N, 8, 8) uint16, the coarsest level
"""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.index import Index, read_index
from pipeline.data.shards import ShardReader
from pipeline.stage import UserError


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
    """Reads a split's codes into memory (two bytes a code), each member checked by its CRC32."""
    index = read_index(root)
    if index.codes is None:
        raise UserError(f"{root} holds images, not codes; run pipeline/extract_codes.py first")
    readers = [ShardReader(root / shard.name, shard) for shard in index.shards(split)]
    num_levels = len(index.codes["codebook_sizes"])

    def load(reader: ShardReader) -> list[tuple[list[np.ndarray], dict]]:
        samples = []
        for members in map(reader.read, range(len(reader))):
            grids = [_from_npy(members[f"level{level}.npy"]) for level in range(num_levels)]
            samples.append((grids, json.loads(members["json"])))
        return samples

    with ThreadPoolExecutor() as pool:
        samples = [sample for shard in pool.map(load, readers) for sample in shard]
    sign = {True: 1, False: -1, None: 0}
    names = index.attribute_names
    attributes = [[sign[s.get("attributes", {}).get(n)] for n in names] for _, s in samples]
    levels = []
    for level, (grid, size) in enumerate(
        zip(index.codes["grids"], index.codes["codebook_sizes"], strict=True)
    ):
        codes = np.array([grids[level] for grids, _ in samples]).reshape(-1, *grid)
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise UserError(f"{root}: level {level} has codes outside 0..{size - 1}; extract again")
        levels.append(codes)
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


def _from_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
