"""Images that are damaged or cannot be decoded: a stage stops at the first, or others stand in.

The stand-in depends on the seed and on the sample's number alone, so it is the same for any number
of processes and workers and after a resume. Which samples are corrupt is known before the first
step: building the cache, or without one a look at every image, finds them all.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.index import ShardInfo
from pipeline.data.order import permute, uses
from pipeline.data.shards import AGAIN, ShardReader
from pipeline.stage import UserError, is_rank_zero, write_json

Fault = dict[str, Any]
"""{"number", "shard", "key", "reason"} of a corrupt sample, "substitute": its stand-in's number."""


@dataclass(frozen=True, kw_only=True)
class CorruptConfig:
    """What to do about corrupt images."""

    action: Literal["stop", "substitute"] = "stop"
    """stop: end at the first one; substitute: another image, always the same, stands in for it, and
    corrupt.json lists them all."""
    budget: float = 0.001
    """substitute: the share of a split's images beyond which it stops all the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget must be a fraction in [0, 1), got {self.budget}")

    @property
    def substitutes(self) -> bool:
        return self.action == "substitute"


class LostShard:
    """In the place of a reader that cannot be opened: each of its samples is corrupt."""

    def __init__(self, path: Path, info: ShardInfo, reason: str) -> None:
        self.path, self.info, self.reason = path, info, reason

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def keys(self) -> np.ndarray:
        return np.array([f"lost-{self.path.stem}-{i}" for i in range(len(self))], "S")

    def read(self, sample: int) -> dict[str, bytes]:
        raise UserError(self.reason)

    def read_member(self, sample: int, *extensions: str) -> bytes:
        raise UserError(self.reason)


def check_budget(config: CorruptConfig, faults: int, count: int, split: str, first: str) -> None:
    """UserError where more of a split's `count` images are corrupt than the budget allows."""
    if faults > config.budget * count:
        raise UserError(
            f"{faults:,} of {count:,} {split} images are corrupt, more than the budget of "
            f"{config.budget:g} ({first}); mend the shards or raise --corrupt.budget"
        )


def open_readers(
    root: Path, shards: Sequence[ShardInfo], config: CorruptConfig, split: str
) -> list[ShardReader | LostShard]:
    """Readers of a split. Where that is tolerated a damaged tar is read as far as it goes, and a
    shard without tar or table is lost. Else a missing file is named here, and what is wrong inside
    of one when it is needed."""
    if not config.substitutes:
        present = set(os.listdir(root))  # one look: there may be 10,000 shards
        for shard in shards:
            for name in (shard.name, shard.name.removesuffix(".tar") + ".index.npy"):
                if name not in present:
                    raise UserError(f"{root / name} is missing: {AGAIN}")
        return [ShardReader(f"{root}/{shard.name}", shard) for shard in shards]  # Paths are slow
    readers, lost, total = [], 0, sum(shard.num_samples for shard in shards)
    for shard in shards:
        reader = ShardReader(root / shard.name, shard, whole=False)
        try:
            reader.open()
        except UserError as error:
            lost += shard.num_samples
            # before anything of that length is made: num_samples is only the index's word
            check_budget(config, lost, total, split, str(error))
            reader = LostShard(reader.path, shard, str(error))
        readers.append(reader)
    return readers


def stand_ins(corrupt: Sequence[int], count: int, seed: int) -> dict[int, int]:
    """{corrupt number: number of the readable sample in its place}, not all of `count` corrupt."""
    bad, found = set(corrupt), {}
    for number in corrupt:
        # a bijection per sample: every other one is tried once
        tried = (int(permute(place, count, seed, epoch=number)) for place in range(count))
        found[number] = next(other for other in tried if other not in bad)
    return found


def write_list(config: Any, **faults: Sequence[Fault]) -> None:
    """Writes `<out>/corrupt.json`, the corrupt samples by split, where a stage substitutes them.

    Args:
        config: of the stage, with out and corrupt.
    """
    if config.corrupt.substitutes and is_rank_zero():
        lists = {split: list(found) for split, found in faults.items()}
        write_json(config.out / "corrupt.json", lists)


def figures(config: Any, corrupt: np.ndarray, count: int, images_seen: int) -> dict[str, float]:
    """How many of the first `images_seen` images of the stream had a stand-in.

    Args:
        config: of the stage, with corrupt and seed.
        corrupt: numbers of the corrupt samples among the `count` in an epoch.
    """
    if not config.corrupt.substitutes:
        return {}
    return {"data/substituted": uses(corrupt, count, config.seed, images_seen)}
