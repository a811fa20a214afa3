"""The shard format: bytes out as they went in, by every reader, and nothing hostile comes in."""

import dataclasses
import gzip
import io
import json
import os
import pickle
import resource
import tarfile
from pathlib import Path

import faults
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shards import (
    Index,
    ShardInfo,
    ShardReader,
    file_sha256,
    read_index,
    read_table,
    stream_shard,
    table_path,
    verify_shard,
    write_index,
    write_shard,
)
from pipeline.stage import UserError

SAMPLES = [
    ("000001", {"jpg": b"\xff\xd8one", "json": b"{}"}),
    ("b-_9", {"level0.npy": bytes(512), "level1.npy": b"x" * 513}),
    ("k" * 128, {"png": b"", "json": b"long name"}),
]
keys = st.text("abcXYZ019_-", min_size=1, max_size=128)
members = st.dictionaries(
    st.sampled_from(["jpg", "json", "level0.npy"]), st.binary(max_size=2000), min_size=1
)


def expected_of(path: Path, count: int) -> ShardInfo:
    """What an index would say of a tar made by hand."""
    digest = file_sha256(path)
    return ShardInfo(
        name=path.name, num_samples=count, bytes=path.stat().st_size, sha256=digest,
        table_sha256=digest,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(keys, members, max_size=6))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: dict) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.tar"
    info = write_shard(path, samples.items())
    assert verify_shard(path, info) and info.num_samples == len(samples)
    reader = ShardReader(path, info)
    assert [(key.decode(), reader.read(i)) for i, key in enumerate(reader.keys)] == list(
        samples.items()
    )
    assert list(stream_shard(path, info)) == list(samples.items())


def test_other_readers_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES)
    with tarfile.open(path, "r:") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    assert content == {f"{key}.{e}": data for key, ms in SAMPLES for e, data in ms.items()}
    read = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [key for key, _ in SAMPLES]
    assert read[1]["level1.npy"] == b"x" * 513


def test_bytes_are_reproducible_and_offsets_point_at_data(tmp_path: Path) -> None:
    one, two = write_shard(tmp_path / "a.tar", SAMPLES), write_shard(tmp_path / "b.tar", SAMPLES)
    assert dataclasses.replace(two, name="a.tar") == one
    assert sorted(os.listdir(tmp_path)) == ["a.index.npy", "a.tar", "b.index.npy", "b.tar"]
    content = (tmp_path / "a.tar").read_bytes()
    assert content[257:265] == b"ustar\x0000" and len(content) % 10240 == 0
    for row, data in zip(
        read_table(tmp_path / "a.tar"), [d for _, m in SAMPLES for d in m.values()], strict=True
    ):
        assert content[row["offset"] : row["offset"] + row["length"]] == data


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = faults.watch_disk(monkeypatch)
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES)
    kinds, (tar, table, *named, folder) = zip(*events, strict=True)
    assert kinds == ("synced", "synced", "named", "named", "synced")
    assert tar.name.startswith(".a.tar.") and table.name.startswith(".a.tar.")
    assert (named, folder) == ([table_path(path), path], tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = write_shard(path, SAMPLES)
    reader = pickle.loads(pickle.dumps(ShardReader(path, info)))
    content = bytearray(path.read_bytes())
    content[read_table(path)["offset"][0]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar: 000001\.jpg is damaged"):
        reader.read(0)
    assert reader.read_member(0, "png", "json") == b"{}"
    with pytest.raises(UserError, match="no member png"):
        reader.read_member(0, "png")
    with pytest.raises(UserError, match=r"not what index\.json says"):
        list(stream_shard(path, info))
    table_path(path).write_bytes(table_path(path).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"a\.index\.npy: not the SHA-256"):
        ShardReader(path, info).read(0)
    path.write_bytes(content[:-512])
    with pytest.raises(UserError, match="bytes of index"):
        ShardReader(path, info).read(0)


def test_a_shard_is_opened_when_it_is_first_read(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "a.tar", SAMPLES)
    reader, gone = ShardReader(tmp_path / "a.tar", info), ShardReader(tmp_path / "b.tar", info)
    assert len(gone) == 3 and len(pickle.loads(pickle.dumps(gone))) == 3
    with pytest.raises(UserError, match=r"b\.tar is missing"):
        gone.read(0)
    reader.open()
    table_path(tmp_path / "a.tar").unlink()  # is not looked at a second time
    assert reader.read(2) == SAMPLES[2][1] and reader.keys.tolist()[1] == b"b-_9"
    more = dataclasses.replace(info, num_samples=4)
    write_shard(tmp_path / "a.tar", SAMPLES)
    with pytest.raises(UserError, match=r"3 samples, index\.json says 4"):
        ShardReader(tmp_path / "a.tar", more).open()


@pytest.mark.parametrize("count", [1, 2])
def test_samples_of_as_many_members_are_numbered_like_others(tmp_path: Path, count: int) -> None:
    names = ["jpg", "json"][:count]
    samples = [(f"{n}", dict.fromkeys(names, b"%d" % n)) for n in range(5)]
    reader = ShardReader(tmp_path / "a.tar", write_shard(tmp_path / "a.tar", samples))
    assert [reader.read(n) for n in range(5)] == [members for _, members in samples]
    empty = ShardReader(tmp_path / "b.tar", write_shard(tmp_path / "b.tar", []))
    assert len(empty.keys) == 0


@pytest.mark.parametrize("keys", ["aba", "bab", "acba"])
def test_a_key_that_comes_again_is_named_at_the_first_sample(tmp_path: Path, keys: str) -> None:
    """As only another writer would write it."""
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{n}", {"json": b"{}"}) for n in range(len(keys))])
    table = np.array(read_table(path))
    table["key"] = list(keys)
    np.save(table_path(path), table)
    info = ShardInfo(
        name=path.name, num_samples=len(keys), bytes=path.stat().st_size, sha256=file_sha256(path),
        table_sha256=file_sha256(table_path(path)),
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"two samples have the key {keys[0]}: .*a\.tar"):
        ShardReader(path, info).read(0)


@pytest.mark.parametrize(
    ("field", "name"),
    [("key", b"a.b"), ("key", b"a\0b"), ("key", b""), ("key", b"\xe4"), ("key", b"a/b"),
     ("key", b"k" * 129), ("extension", b"JPG"), ("extension", b"a/b"), ("extension", b"")],
)  # fmt: skip
def test_names_in_a_table_are_those_of_the_writer(tmp_path: Path, field: str, name: bytes) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{n}", {"json": b"{}"}) for n in range(3)])
    table = read_table(path)
    wide = [(f, "S129" if f == field else table.dtype[f].str) for f in table.dtype.names or ()]
    changed = table.astype(wide)
    changed[field][1] = name
    np.save(table_path(path), changed)
    info = dataclasses.replace(expected_of(path, 3), table_sha256=file_sha256(table_path(path)))
    with pytest.raises(UserError, match=r"a\.index\.npy: no sample table"):
        ShardReader(path, info).read(0)


def test_there_may_be_more_open_shards_than_files(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "0.tar", SAMPLES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        readers = [ShardReader(tmp_path / "0.tar", first) for _ in range(100)]
        assert all(reader.read(1) == SAMPLES[1][1] for reader in readers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pickled_table_is_refused(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "a.tar", SAMPLES)
    np.save(tmp_path / "a.index.npy", np.array([{}], dtype=object), allow_pickle=True)
    info = dataclasses.replace(info, table_sha256=file_sha256(tmp_path / "a.index.npy"))
    with pytest.raises(UserError, match="no sample table"):
        ShardReader(tmp_path / "a.tar", info).read(0)


@pytest.mark.parametrize(
    "sample",
    [
        ("a.b", {"jpg": b""}),
        ("../a", {"jpg": b""}),
        ("", {"jpg": b""}),
        ("a\n", {"jpg": b""}),
        ("ä", {"jpg": b""}),
        ("k" * 129, {"jpg": b""}),
        ("a", {}),
        ("a", {"JPG": b""}),
        ("a", {"jpg/x": b""}),
        ("a", {"": b""}),
        ("000001", {"jpg": b""}),
    ],
)
def test_ambiguous_names_are_refused_and_leave_nothing(tmp_path: Path, sample: tuple) -> None:
    with pytest.raises(UserError, match="must"):
        write_shard(tmp_path / "a.tar", [*SAMPLES, sample])
    assert os.listdir(tmp_path) == []


def hostile_tar(path: Path, kind: str) -> None:
    """A tar which an ordinary reader would misread or be hurt by."""
    info = tarfile.TarInfo("../../evil.jpg" if kind == "traversal" else "a.jpg")
    if kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info)
        if kind == "duplicate":
            tar.addfile(info)
    content = buffer.getvalue()
    if kind == "sparse":  # 512 bytes that claim to be a gigabyte
        header = tarfile.TarInfo("a.jpg")
        header.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**30)}
        content = header.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    if kind == "huge":
        header = tarfile.TarInfo("a.jpg")
        header.size = 2**40
        content = header.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)
    path.write_bytes(gzip.compress(content) if kind == "gzip" else content)


@pytest.mark.parametrize("kind", ["traversal", "link", "duplicate", "sparse", "huge", "gzip"])
def test_hostile_tars_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    hostile_tar(path, kind)
    with pytest.raises(UserError, match=r"a\.tar"):
        list(stream_shard(path, expected_of(path, 1)))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    splits = {
        "train": tuple(write_shard(tmp_path / f"train-{i}.tar", SAMPLES) for i in range(2)),
        "test": (write_shard(tmp_path / "test-0.tar", SAMPLES[:1]),),
    }
    bad = {"path": "x.jpg", "split": "train", "reason": "truncated"}
    index = Index(
        source="celeba", splits=splits, attribute_names=("Male",), quarantined=(bad,),
        codes={"levels": [[8, 8]], "checkpoint": "ab"},
    )  # fmt: skip
    write_index(tmp_path, index)
    return index


def test_index_round_trip(tmp_path: Path, index: Index) -> None:
    assert read_index(tmp_path) == index
    assert index.sha256 == file_sha256(tmp_path / "index.json")
    assert index.num_samples("train") == 6
    with pytest.raises(UserError, match="no split 'valid'"):
        index.shards("valid")


def test_missing_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run pipeline/shard_data\.py first"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "../a.tar", "/a.tar", "pipe:cat a.tar", "http://x/a.tar", "a::b.tar", "${X}.tar", "a.tar\n",
        "a{0..9}.tar", "", None, 3, "train-1.tar",
    ],
)  # fmt: skip
def test_hostile_shard_names_are_refused(tmp_path: Path, index: Index, name: object) -> None:
    value = json.loads(index.to_bytes())
    value["splits"]["train"]["shards"][0]["name"] = name
    (tmp_path / "index.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"index\.json is not a valid index") as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2), (("source",), None), (("extra",), 1), (("codes",), 7),
        (("attribute_names",), [1]), (("attribute_names",), None), (("quarantined",), [{}]),
        (("splits",), []), (("splits", "other"), {"num_samples": 0, "shards": []}),
        (("splits", "train", "num_samples"), 5), (("splits", "train", "shards"), [1]),
        (("splits", "train", "shards", 0, "bytes"), -1),
        (("splits", "train", "shards", 0, "num_samples"), True),
        (("splits", "train", "shards", 0, "sha256"), "AB"),
        (("splits", "train", "shards", 0, "mode"), "w"),
    ],
)  # fmt: skip
def test_index_is_strict(tmp_path: Path, index: Index, path: tuple, value: object) -> None:
    whole = part = json.loads(index.to_bytes())
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    (tmp_path / "index.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"index\.json is not a valid index"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\xff"])
def test_garbage_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="not a valid index"):
        read_index(tmp_path)
