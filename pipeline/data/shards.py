"""The shard format: WebDataset tars with a table of members beside each, and one index.

    <root>/index.json               the shards of every split, names of attributes, hashes
    <root>/train-00000.tar          members <key>.<extension> in the order given
    <root>/train-00000.index.npy    one row per member: key, extension, offset, length, CRC32

The tars are ordinary (tar, tarfile and webdataset read them) and byte for byte reproducible. Code
shards are the same with other members (`<key>.level0.npy` ...). Nothing here knows about images.
"""

import hashlib
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.index import SPLITS, Index, ShardInfo, read_index, write_index
from pipeline.failpoint import failpoint
from pipeline.stage import UserError

__all__ = [
    "AGAIN",
    "HEADER_LOCK",
    "SPLITS",
    "Index",
    "ShardInfo",
    "ShardReader",
    "check_unique",
    "file_sha256",
    "read_index",
    "read_table",
    "stream_shard",
    "sync",
    "valid_key",
    "verify_shard",
    "write_index",
    "write_shard",
]

MAX_MEMBER_BYTES = 2**26  # also the most that a reader allocates on a table's or a header's word
MAX_MEMBERS = 64  # of a sample, when streamed

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")  # no dot: webdataset splits names at the first one
_EXTENSION = re.compile(r"[a-z0-9]{1,16}(\.[a-z0-9]{1,16}){0,2}")
_KEY_BYTES = np.array([_KEY.fullmatch(chr(byte)) is not None for byte in range(256)])
_BLOCK, _RECORD = 512, 10240  # tar's units: headers and data, the whole file
AGAIN = "run the stage that made these shards again"
HEADER_LOCK = threading.Lock()  # numpy parses headers with ast, which fails in threads (3.11.7)


def valid_key(key: str) -> bool:
    """True for keys which every tool and file system takes as they are."""
    return _KEY.fullmatch(key) is not None


def table_path(path: Path) -> Path:
    """`train-00000.tar` -> `train-00000.index.npy`."""
    return path.with_name(f"{path.stem}.index.npy")


def _header(name: str, length: int) -> bytes:
    """A USTAR header with mtime 0 and owner 0; names over 100 bytes get a PAX record before it."""
    info = tarfile.TarInfo(name)
    info.size = length
    return info.tobuf(tarfile.PAX_FORMAT, "ascii", "strict")


class _HashingFile:
    """Passes bytes on and keeps their number and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.hash = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data


def _write_members(
    file: _HashingFile, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> tuple[int, list[tuple[str, str, int, int, int]]]:
    """Number of samples, and the rows of the table."""
    rows, keys = [], set()
    for key, members in samples:
        if not valid_key(key) or key in keys or not members:
            raise UserError(f"sample {key!r}: keys must be unique and match {_KEY.pattern}")
        keys.add(key)
        for extension, data in members.items():
            if not _EXTENSION.fullmatch(extension) or len(data) > MAX_MEMBER_BYTES:
                raise UserError(
                    f"sample {key}, member {extension!r}: extensions must match "
                    f"{_EXTENSION.pattern}, data be at most {MAX_MEMBER_BYTES} bytes"
                )
            file.write(_header(f"{key}.{extension}", len(data)))
            rows.append((key, extension, file.bytes, len(data), zlib.crc32(data)))
            file.write(data + bytes(-len(data) % _BLOCK))
    end = 2 * _BLOCK
    file.write(bytes(end + -(file.bytes + end) % _RECORD))
    return len(keys), rows


def _make_table(rows: list[tuple[str, str, int, int, int]]) -> np.ndarray:
    """(members,) structured, sample after sample; strings as wide as the longest."""
    key_width = max((len(row[0]) for row in rows), default=1)
    extension_width = max((len(row[1]) for row in rows), default=1)
    fields = [("key", f"S{key_width}"), ("extension", f"S{extension_width}")]
    return np.array(rows, [*fields, ("offset", "<u8"), ("length", "<u8"), ("crc32", "<u4")])


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> ShardInfo:
    """Writes `(key, {extension: bytes})` samples as a tar and its table, both atomically.

    Raises UserError for keys and extensions that could be misread; then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary_table = path.with_name(f".{path.name}.{os.getpid()}.index.npy")
    try:
        with open(temporary, "wb") as file:
            tar = _HashingFile(file)
            num_samples, rows = _write_members(tar, samples)
            _sync(file)
        with open(temporary_table, "wb") as file:
            table = _HashingFile(file)
            np.lib.format.write_array(table, _make_table(rows), allow_pickle=False)
            _sync(file)
        failpoint("commit")
        os.replace(temporary_table, table_path(path))  # first, so that a tar never lacks its table
        failpoint("commit")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_table.unlink(missing_ok=True)
    sync(path.parent)
    return ShardInfo(
        name=path.name,
        num_samples=num_samples,
        bytes=tar.bytes,
        sha256=tar.hash.hexdigest(),
        table_sha256=table.hash.hexdigest(),
    )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Makes a file, or the renames in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shard(path: Path, info: ShardInfo) -> bool:
    """True where tar and table are there with the sizes and hashes of `info` (reads all bytes)."""
    table = table_path(path)
    return (
        path.is_file()
        and table.is_file()
        and path.stat().st_size == info.bytes
        and file_sha256(path) == info.sha256
        and file_sha256(table) == info.table_sha256
    )


def read_table(path: Path) -> np.ndarray:
    """The table beside a shard: (members,) of key, extension, offset, length, crc32 (mapped)."""
    file = table_path(path)
    try:
        with HEADER_LOCK, open(file, "rb") as opened:
            np.lib.format.read_magic(opened)
            (count,), _, dtype = np.lib.format.read_array_header_1_0(opened)
            offset = opened.tell()
            if os.fstat(opened.fileno()).st_size != offset + count * dtype.itemsize:
                raise ValueError(f"not the bytes of {count} members")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: no sample table ({error}): {AGAIN}") from error
    kinds = {name: kind.kind for name, (kind, *_) in (dtype.fields or {}).items()}
    expected = {"key": "S", "extension": "S", "offset": "u", "length": "u", "crc32": "u"}
    if kinds != expected:
        raise UserError(f"{file}: no sample table: {AGAIN}")
    return _mapped(file)[offset:].view(dtype)


def _mapped(file: Path) -> np.ndarray:
    """The bytes of a file as uint8, read where they are touched."""
    import torch  # late: who only writes shards goes without

    # numpy's memmap keeps a descriptor open, and there may be more shards than those
    size = file.stat().st_size
    array = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
    array.flags.writeable = False
    return array


def _plain(keys: np.ndarray, extensions: np.ndarray) -> bool:
    """True where all names are such as `write_shard` takes."""
    width = keys.dtype.itemsize
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), width)
    good, end = _KEY_BYTES[letters], letters == 0  # all keys at once: there are many
    return (
        1 <= width <= 128
        and bool(good[:, 0].all() and (good | end).all() and not (end[:, :-1] & good[:, 1:]).any())
        and all(_EXTENSION.fullmatch(name.decode("latin1")) for name in np.unique(extensions))
    )


def check_unique(keys: Sequence[bytes] | np.ndarray, way_out: str = AGAIN) -> None:
    """UserError where two samples have the same key."""
    keys = np.asarray(keys)
    if (keys[1:] > keys[:-1]).all():  # in order, as usual: found without sorting
        return
    ordered = np.sort(keys)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if twice.size:
        raise UserError(f"two samples have the key {bytes(ordered[twice[0]]).decode()}: {way_out}")


class ShardReader:
    """Reads members of a local shard by offset, and checks their CRC32.

    Samples are numbered 0 .. len - 1. Sizes, the table and its hash are checked when the first of
    them is read, so that a start does not take longer with more shards. No file stays open, so that
    readers can be shared by threads, pickled into worker processes, and be as many as there are
    shards. Raises UserError where sizes, hashes or checksums do not match, or where a key occurs
    twice in the shard.

    Args:
        whole: refuse a tar of another size; else its members are read as far as they are whole.
    """

    def __init__(self, path: Path | str, info: ShardInfo, whole: bool = True) -> None:
        self._path, self.info, self.whole = path, info, whole

    @cached_property
    def path(self) -> Path:
        return Path(self._path)

    def __len__(self) -> int:
        return self.info.num_samples

    def __reduce__(self) -> tuple[type, tuple[Path, ShardInfo, bool]]:
        return ShardReader, (self.path, self.info, self.whole)

    def open(self) -> None:
        """Does now what the first sample would wait for; a second call costs nothing."""
        _ = self._table

    @cached_property
    def _table(self) -> tuple[np.ndarray, range | np.ndarray]:
        """(members,) as `read_table`, and the first row of each sample and of the end."""
        for file in (self.path, table_path(self.path)):
            if not file.is_file():
                raise UserError(f"{file} is missing: {AGAIN}")
        if self.whole and self.path.stat().st_size != self.info.bytes:
            raise UserError(f"{self.path}: not the {self.info.bytes} bytes of index.json: {AGAIN}")
        if file_sha256(table_path(self.path)) != self.info.table_sha256:
            raise UserError(f"{table_path(self.path)}: not the SHA-256 of index.json: {AGAIN}")
        rows = read_table(self.path)
        new = np.ones(len(rows), bool)
        new[1:] = rows["key"][1:] != rows["key"][:-1]
        starts = np.append(np.flatnonzero(new), len(rows))
        if len(starts) - 1 != len(self):
            raise UserError(f"{self.path}: {len(starts) - 1} samples, index.json says {len(self)}")
        keys = rows["key"][starts[:-1]]
        if not _plain(keys, rows["extension"]):
            raise UserError(f"{table_path(self.path)}: no sample table: {AGAIN}")
        check_unique(keys, f"{self.path}: {AGAIN}")
        steps = np.unique(np.diff(starts)).tolist()
        if len(steps) == 1:  # as usual; it takes no memory
            return rows, range(0, len(rows) + 1, steps[0])
        return rows, starts

    @property
    def keys(self) -> np.ndarray:
        """(samples,) of numpy bytes."""
        rows, starts = self._table
        return rows["key"][starts[:-1]]

    def read(self, sample: int) -> dict[str, bytes]:
        """{extension: bytes} of a sample, in the tar's order."""
        rows = self._rows(sample)
        names = [extension.decode() for _, extension, *_ in rows]
        return dict(zip(names, self._read(rows), strict=True))

    def read_member(self, sample: int, *extensions: str) -> bytes:
        """The first member of a sample that has one of the `extensions`."""
        for row in self._rows(sample):
            if row[1].decode() in extensions:
                return self._read([row])[0]
        key = self.keys[sample].decode()
        raise UserError(f"{self.path}: sample {key} has no member {' or '.join(extensions)}")

    def _rows(self, sample: int) -> list[tuple[bytes, bytes, int, int, int]]:
        rows, starts = self._table
        return rows[starts[sample] : starts[sample + 1]].tolist()

    def _read(self, rows: list[tuple[bytes, bytes, int, int, int]]) -> list[bytes]:
        found = []
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                for key, extension, offset, length, crc32 in rows:
                    data = b""
                    if length <= MAX_MEMBER_BYTES and offset + length <= self.info.bytes:
                        data = os.pread(file, length, offset)
                    if len(data) != length or zlib.crc32(data) != crc32:
                        name = f"{key.decode()}.{extension.decode()}"
                        raise UserError(f"{self.path}: {name} is damaged (CRC32): {AGAIN}")
                    found.append(data)
            finally:
                os.close(file)
        except OSError as error:
            key = rows[0][0].decode()
            raise UserError(f"{self.path}: {key} cannot be read ({error}): {AGAIN}") from error
        return found


def _tar_members(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Members of an uncompressed tar stream in the form webdataset groups into samples."""
    # "r|" and not webdataset's own "r|*", which also opens gzip: 10 KB could become gigabytes
    with tarfile.open(fileobj=file, mode="r|") as tar:
        last, members, size = "", 0, 0  # of a sample, which webdataset collects in memory
        for info in tar:
            key, _, extension = info.name.partition(".")
            members, size = (members + 1, size + info.size) if key == last else (1, info.size)
            last = key
            if info.type != tarfile.REGTYPE or info.issparse() or info.size > MAX_MEMBER_BYTES:
                raise UserError(f"{path}: {info.name[:150]!r} is no plain member of a sane size")
            if members > MAX_MEMBERS or size > MAX_MEMBER_BYTES:
                raise UserError(f"{path}: sample {key[:130]!r} has too many members, or too large")
            if not valid_key(key) or not _EXTENSION.fullmatch(extension):
                raise UserError(f"{path}: {info.name[:150]!r} is no name for a member of a sample")
            data = tar.extractfile(info).read()  # pyright: ignore[reportOptionalMemberAccess]
            yield {"fname": info.name, "data": data, "__url__": str(path)}
            tar.members.clear()  # pyright: ignore  (tarfile keeps every header otherwise)


def stream_shard(path: Path, expected: ShardInfo) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields `(key, {extension: bytes})` from front to back without the table, by webdataset.

    Nothing is decoded. For tests and for shards that cannot be read by offset. Raises UserError
    for hostile members and for too many samples at once, for a wrong count, size or SHA-256 at the
    end.
    """
    os.environ["WDS_SECURE"] = "1"  # for processes that import webdataset after this
    import webdataset.utils  # late: it is slow to import and only this function needs it

    webdataset.utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]
    count = 0
    with open(path, "rb") as file:
        tar = _HashingFile(file)
        try:
            for sample in webdataset.tariterators.group_by_keys(_tar_members(tar, path)):
                key = sample["__key__"]
                yield key, {name: data for name, data in sample.items() if name[:2] != "__"}
                count += 1
                if count > expected.num_samples:
                    raise UserError(f"{path}: more samples than index.json says")
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path}: not an uncompressed WebDataset tar ({error})") from error
        while tar.read(_RECORD):
            pass
    actual = (count, tar.bytes, tar.hash.hexdigest())
    if actual != (expected.num_samples, expected.bytes, expected.sha256):
        raise UserError(f"{path}: {count} samples, {tar.bytes} bytes: not what index.json says")
