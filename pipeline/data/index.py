"""`index.json`: which shards a directory of shards holds, and what their samples mean."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.failpoint import failpoint
from pipeline.stage import UserError

FORMAT = 1
SPLITS = ("train", "valid", "test")
MAX_INDEX_BYTES = 2**26  # some 200,000 shards
MAX_DESCRIPTION_BYTES = 2**20

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}\.tar")  # no folder, scheme, `::` or `${`
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNS, _NUMBERS = {bool, type(None)}, {int, float}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What the index knows of a shard; the hashes are hexadecimal SHA-256."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    table_sha256: str

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _SHARD_NAME.fullmatch(self.name)):
            raise ValueError(f"shard name {self.name!r} must be a plain file name ending in .tar")
        if any(type(n) is not int or n < 0 for n in (self.num_samples, self.bytes)):
            raise ValueError(f"num_samples and bytes of shard {self.name} must be integers >= 0")
        for digest in (self.sha256, self.table_sha256):
            if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                raise ValueError(f"shard {self.name} needs hexadecimal SHA-256 values")


@dataclass(frozen=True, kw_only=True)
class Index:
    """A directory of shards. Splits that have no samples are absent from `splits`."""

    source: str
    """celeba, folder, mnist or faces."""
    splits: dict[str, tuple[ShardInfo, ...]]
    """Shards in the order of their samples, for train, valid and test."""
    attribute_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    factor_names: tuple[str, ...] = ()
    quarantined: tuple[dict[str, str], ...] = field(default=())
    """{"path", "split", "reason"} of every image that was left out."""
    codes: dict[str, Any] | None = None
    """For shards of codes: the checkpoint, recipe, shapes and codebook sizes they belong to."""

    def num_samples(self, split: str) -> int:
        """Samples of a split; UserError where there is no such split."""
        return sum(shard.num_samples for shard in self.shards(split))

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """Shards of a split; UserError where there is no such split."""
        if split not in self.splits:
            raise UserError(f"no split {split!r} in these shards; they have {list(self.splits)}")
        return self.splits[split]

    def to_bytes(self) -> bytes:
        """The one JSON text of this index."""
        value: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(self)}
        value["splits"] = {
            split: {"num_samples": self.num_samples(split), "shards": value["splits"][split]}
            for split in self.splits
        }
        return (json.dumps(value, indent=1) + "\n").encode()

    @property
    def sha256(self) -> str:
        """SHA-256 of the index file, which links caches and codes to these very shards."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_description(data: bytes) -> dict[str, Any]:
    """The JSON member of a sample, as `Source.describe` wrote it; ValueError for anything else."""
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"more than {MAX_DESCRIPTION_BYTES} bytes")
    try:
        value = json.loads(data)
        label, attributes = value.get("label", -1), value.get("attributes", {}).values()
        factors = value.get("factors", {}).values()
    except (ValueError, AttributeError, RecursionError):
        raise ValueError("not the description of an image") from None
    if type(label) is not int or not -1 <= label < 2**31:
        raise ValueError("label must be the number of a class")
    if not _SIGNS.issuperset(map(type, attributes)):
        raise ValueError("attributes must be true, false or null")
    if not _NUMBERS.issuperset(map(type, factors)):
        raise ValueError("factors must be numbers")
    return value


def write_index(root: Path, index: Index) -> None:
    """Writes `<root>/index.json` atomically; what is in it has to be on the disk already."""
    temporary = root / f".index.json.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(index.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    failpoint("commit")
    os.replace(temporary, root / "index.json")


def read_index(root: Path) -> Index:
    """Reads and checks `<root>/index.json`; UserError where it is missing or not as it should."""
    path = root / "index.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: give a directory of finished shards, or make one "
            "(run pipeline/shard_data.py first; for codes pipeline/extract_codes.py)"
        )
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{path} has more than {MAX_INDEX_BYTES} bytes: not an index of shards")
    try:
        return _from_json(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a valid index ({reason}): make the shards again") from error


def _from_json(value: Any) -> Index:
    names = {field.name for field in dataclasses.fields(Index)} | {"format"}
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"keys must be exactly {sorted(names)}")
    if value.pop("format") != FORMAT:
        raise ValueError(f"only format {FORMAT} is known")
    if not isinstance(value["source"], str) or not isinstance(value["codes"], dict | None):
        raise ValueError("source must be a string, codes an object or null")
    for name in ("attribute_names", "class_names", "factor_names"):
        value[name] = tuple(value[name])
        if not all(isinstance(entry, str) for entry in value[name]):
            raise ValueError(f"{name} must be strings")
    value["quarantined"] = tuple(value["quarantined"])
    for entry in value["quarantined"]:
        if set(entry) != {"path", "split", "reason"}:
            raise ValueError("quarantined entries must have path, split and reason")
    value["splits"] = {name: _split(name, split) for name, split in value["splits"].items()}
    shard_names = [shard.name for shards in value["splits"].values() for shard in shards]
    if len(set(shard_names)) != len(shard_names):
        raise ValueError("a shard is named twice")
    return Index(**value)


def _split(name: str, split: dict[str, Any]) -> tuple[ShardInfo, ...]:
    if name not in SPLITS or set(split) != {"num_samples", "shards"}:
        raise ValueError(f"split {name!r} must be one of {SPLITS} with num_samples and shards")
    shards = tuple(ShardInfo(**shard) for shard in split["shards"])
    if split["num_samples"] != sum(shard.num_samples for shard in shards):
        raise ValueError(f"num_samples of split {name} is not the sum over its shards")
    return shards
