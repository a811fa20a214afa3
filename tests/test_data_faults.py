"""Damaged shards and images: named where they stop a run, and substituted alike by every process.

Rows D1, D2 and D3 of the fault matrix; hostile files are in test_hostile.py.
"""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, metrics
from faults import Job
from PIL import Image
from test_images import noise, png

from pipeline import extract_codes, train_vqvae
from pipeline.data.codes import npy_bytes, open_codes
from pipeline.data.corruption import CorruptConfig, stand_ins
from pipeline.data.images import decode, open_images
from pipeline.data.inspection import Limits, inspect_image
from pipeline.data.loader import training_batches
from pipeline.data.order import permute, positions_of, stream, uses
from pipeline.data.shards import (
    Index,
    read_index,
    read_table,
    stream_shard,
    table_path,
    write_index,
    write_shard,
)
from pipeline.stage import UserError, parse

COUNT, SIZE, PER_SHARD = 24, 16, 6
SUBSTITUTE = CorruptConfig(action="substitute", budget=0.5)


def sample(number: int, image: bytes | None = None, key: str | None = None):
    text = {"label": number, "attributes": {"Even": number % 2 == 0}, "factors": {"n": number}}
    encoded = png(noise(number, SIZE, SIZE)) if image is None else image
    return key or f"k{number:02}", {"png": encoded, "json": json.dumps(text).encode()}


def write(root: Path, samples: list, source: str = "folder") -> Path:
    root.mkdir(exist_ok=True)
    shards = tuple(
        write_shard(root / f"train-{start // PER_SHARD}.tar", samples[start : start + PER_SHARD])
        for start in range(0, len(samples), PER_SHARD)
    )
    index = Index(
        source=source, splits={"train": shards}, attribute_names=("Even",), factor_names=("n",)
    )
    write_index(root, index)
    return root


@pytest.fixture
def shards(tmp_path) -> Path:
    """Image n is noise of seed n, in four shards of six."""
    return write(tmp_path / "shards", [sample(n) for n in range(COUNT)])


def flip(path: Path, offset: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


def damage(root: Path, kind: str) -> set[int]:
    """Spoils the second shard (samples 6 to 11); returns the numbers that are lost."""
    path = root / "train-1.tar"
    rows, content = read_table(path).copy(), path.read_bytes()  # of images and descriptions
    start = {8: int(rows["offset"][4]), 9: int(rows["offset"][6])}
    if kind == "bit":
        flip(path, start[8] + 30)
        return {8}
    if kind == "description":
        flip(path, int(rows["offset"][5]))
        return {8}
    if kind == "zeroed block":
        path.write_bytes(content[: start[8]] + bytes(512) + content[start[8] + 512 :])
        return {8}
    if kind == "cut in data":
        path.write_bytes(content[: start[8] + 10])
        return {8, 9, 10, 11}
    if kind == "cut at member":
        path.write_bytes(content[: start[9] - 512])
        return {9, 10, 11}
    if kind == "cut in header":
        path.write_bytes(content[: start[9] - 200])
        return {9, 10, 11}
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "no table":
        table_path(path).unlink()
    elif kind == "table":
        flip(table_path(path), 200)
    elif kind == "another shard":
        shutil.copy(root / "train-2.tar", path)
    return set(range(6, 12))


KINDS = ("bit", "description", "zeroed block", "cut in data", "cut at member", "cut in header")
LOST = ("empty", "missing", "no table", "table", "another shard")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", KINDS + LOST)
def test_damage_stops_by_name_or_is_substituted_exactly(shards, kind, cache):
    lost = damage(shards, kind)

    def everything(**options):
        return open_images(shards, "train", SIZE, cache=cache, progress=False, **options)

    with pytest.raises(UserError) as caught:
        everything(corrupt=CorruptConfig())[:]
    assert "train-1" in str(caught.value) and "\n" not in str(caught.value)
    if kind in KINDS[:3]:
        assert "k08" in str(caught.value) and "--corrupt.action substitute" in str(caught.value)

    images = everything(corrupt=SUBSTITUTE, seed=3)
    assert set(images.corrupt.tolist()) == lost
    assert {fault["shard"] for fault in images.faults} == {"train-1.tar"}
    others = stand_ins(sorted(lost), COUNT, seed=3)
    shown = np.array([others.get(number, number) for number in range(COUNT)])
    assert not set(shown) & lost
    assert (images[:] == np.stack([noise(n, SIZE, SIZE) for n in shown])).all()
    assert images.labels.tolist() == shown.tolist() == images.factors[:, 0].tolist()
    assert images.attributes[:, 0].tolist() == [1 if n % 2 == 0 else -1 for n in shown]
    assert images.keys[5] == b"k05"
    again = everything(corrupt=SUBSTITUTE, seed=3)  # from the notes of the first look
    assert again.faults == images.faults and (again[:] == images[:]).all()
    # another seed, other stand-ins; a budget; and no quiet use of what was tolerated before
    assert stand_ins(sorted(lost), COUNT, seed=4) != others
    with pytest.raises(UserError, match=rf"{len(lost)} of 24 train images are corrupt.*train-1"):
        everything(corrupt=CorruptConfig(action="substitute", budget=len(lost) / COUNT - 1e-9))
    with pytest.raises(UserError, match="train-1"):
        everything()[:]
    assert (everything(corrupt=SUBSTITUTE, seed=3)[:] == images[:]).all()


def test_a_damaged_header_alone_costs_nothing_and_is_seen_by_the_stream(shards):
    before = open_images(shards, "train", SIZE, cache=False)[:]
    flip(shards / "train-1.tar", 3)
    assert (open_images(shards, "train", SIZE, cache=False)[:] == before).all()
    with pytest.raises(UserError, match=r"train-1\.tar"):
        list(stream_shard(shards / "train-1.tar", read_index(shards).shards("train")[1]))


def test_mended_shards_are_read_again(shards):
    content = (shards / "train-1.tar").read_bytes()
    damage(shards, "bit")
    assert open_images(shards, "train", SIZE, progress=False, corrupt=SUBSTITUTE).faults
    (shards / "train-1.tar").write_bytes(content)
    images = open_images(shards, "train", SIZE, progress=False)
    assert not images.faults and (images[8] == noise(8, SIZE, SIZE)).all()


@pytest.mark.parametrize("file", ["train.npy", "train.metadata.npz"])
@pytest.mark.parametrize("spoil", ["cut", "gone", "other"])
def test_a_damaged_cache_is_built_again(shards, file, spoil):
    images = open_images(shards, "train", SIZE, progress=False)
    path = shards / "cache" / images.recipe.hash / file
    expected, content = images[:], path.read_bytes()
    path.unlink()  # the open one keeps its pages
    if spoil != "gone":
        path.write_bytes(content[: len(content) // 2] if spoil == "cut" else b"nothing like it")
    assert (open_images(shards, "train", SIZE, progress=False)[:] == expected).all()


def test_keys_that_occur_twice_are_named(tmp_path):
    twice = [sample(n) for n in range(11)] + [sample(11, key="k03")]
    with pytest.raises(UserError, match="two samples have the key k03"):
        open_images(write(tmp_path / "x", twice), "train", SIZE, corrupt=SUBSTITUTE)


@pytest.mark.parametrize("absurd", [2**40 + 1, 10**15])
def test_a_stream_of_absurd_length_is_refused_at_its_first_batch(shards, absurd):
    index = read_index(shards)
    first, *rest = index.shards("train")
    huge = dataclasses.replace(first, num_samples=absurd)
    write_index(shards, dataclasses.replace(index, splits={"train": (huge, *rest)}))
    images = open_images(shards, "train", SIZE, cache=False)
    with pytest.raises(UserError, match="an order is for at most"):
        batches(images, 4, 1)
    with pytest.raises(UserError, match=r"train-0\.tar: 6 samples, index\.json says"):
        images[0]


def test_one_lost_shard_of_absurd_length_is_over_the_budget_at_once(shards):
    index = read_index(shards)
    first, *rest = index.shards("train")
    huge = dataclasses.replace(first, num_samples=10**15)
    write_index(shards, dataclasses.replace(index, splits={"train": (huge, *rest)}))
    with pytest.raises(UserError, match="more than the budget"):
        open_images(shards, "train", SIZE, corrupt=SUBSTITUTE, progress=False)


# Images that are whole in their shard, but no images (D2).


def jpeg(mode: str = "RGB", size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(0, size, size)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {"cut": jpeg()[:-40], "empty": b"", "gif": b"GIF89a" + bytes(50), "zeros": bytes(900)}


@pytest.mark.parametrize("kind", BAD)
def test_an_undecodable_image_is_named_or_substituted(tmp_path, kind):
    root = write(tmp_path / "x", [sample(n, BAD[kind] if n == 7 else None) for n in range(12)])
    with pytest.raises(UserError, match=r"train-1\.tar: image k07 cannot be read"):
        open_images(root, "train", SIZE, cache=False)[:]
    assert open_images(root, "train", SIZE, cache=False, corrupt=SUBSTITUTE).corrupt.tolist() == [7]
    assert inspect_image(BAD[kind], Limits())  # shard_data.py lets none of them in


@pytest.mark.parametrize(
    "encoded", [jpeg(), jpeg("CMYK"), jpeg("L"), jpeg(size=1), png(noise(0, 3, 1))]
)
def test_odd_images_are_read(tmp_path, encoded):
    assert inspect_image(encoded, Limits()) is None
    images = open_images(write(tmp_path / "x", [sample(0, encoded)]), "train", SIZE, cache=False)
    assert (images[0] == decode(encoded, images.recipe)).all() and not images.faults


@pytest.mark.parametrize(
    "text", ["[]", '{"label": "1"}', '{"label": 1e99}', '{"attributes": {"Even": 1}}',
             '{"factors": {"n": "x"}}', "[" * 5000, "\xff", '{"x": "' + "a" * 2**20 + '"}'],
)  # fmt: skip
def test_a_wrong_description_is_named(tmp_path, text):
    samples = [sample(0), ("k01", {"png": png(noise(1)), "json": text.encode("latin1")})]
    with pytest.raises(UserError, match=r"train-0\.tar: k01\.json: .*"):
        open_images(write(tmp_path / "x", samples), "train", SIZE)


# Batches (D3), and what is counted.


def batches(images, batch_size, steps, start=0, **options):
    world, seen = options.pop("world_size", 1), []
    for rank in range(world):
        ranked = training_batches(
            images.fetch, len(images), batch_size=batch_size, seed=7, start=start,
            rank=rank, world_size=world, **options,
        )  # fmt: skip
        seen.append([next(ranked)["images"].numpy() for _ in range(steps)])
    return np.concatenate(seen, 1)


@pytest.mark.parametrize("cache", [False, True])
def test_stand_ins_are_alike_for_any_ranks_and_workers_and_after_a_resume(shards, cache):
    damage(shards, "cut in data")
    images = open_images(
        shards, "train", SIZE, cache=cache, corrupt=SUBSTITUTE, seed=7, progress=False
    )
    whole = batches(images, 6, 10)
    assert (batches(images, 6, 10, world_size=2, workers=1) == whole).all()
    assert (batches(images, 6, 5, start=30, world_size=3, workers=3) == whole[5:]).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_larger_than_the_split_takes_epoch_after_epoch(shards, workers):
    images = open_images(shards, "train", SIZE, progress=False)
    found = batches(images, 60, 2, workers=workers)  # 2.5 epochs each
    expected = stream(7, COUNT, 0, 120).reshape(2, 60)
    assert (found == images[expected.ravel()].reshape(found.shape)).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_worker_is_the_one_line_that_it_is_without(shards, workers):
    images = open_images(shards, "train", SIZE, cache=False, corrupt=CorruptConfig())
    damage(shards, "bit")
    with pytest.raises(UserError) as caught:
        batches(images, COUNT, 1, workers=workers)
    assert str(caught.value).startswith(f"{shards / 'train-1.tar'}: k08.png is damaged")
    assert "\n" not in str(caught.value)


def test_a_process_that_fails_with_its_workers_alive_ends():
    """They ignore the SIGTERM by which Python ends its children."""
    script = """
import sys
import numpy as np
from pipeline.data.loader import training_batches
sys.batches = training_batches(lambda i: {"a": i}, 8, batch_size=8, seed=0, workers=1)
next(sys.batches)
raise SystemExit(3)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", script],
        timeout=60,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert found.returncode == 3 and found.stderr == b""


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_positions_invert_the_order_and_uses_are_counted(n):
    indices = np.arange(n)
    for seed, epoch in ((0, 0), (-5, 3)):
        assert (positions_of(permute(indices, n, seed, epoch), n, seed, epoch) == indices).all()
    some = np.unique(np.array([0, n // 2, n - 1]))
    for seen in (0, 1, n - 1, n, 3 * n + n // 3):
        assert uses(some, n, 9, seen) == np.isin(stream(9, n, 0, seen), some).sum()


def test_stand_ins_are_drawn_from_all_readable_samples():
    found = stand_ins(range(500), 1000, seed=1)
    assert set(found) == set(range(500)) and min(found.values()) >= 500
    counts = np.bincount([n // 50 for n in found.values()], minlength=20)[10:]
    assert counts.min() > 25 and counts.max() < 80  # 50 are expected in each of ten bins


# Whole stages.


def train(root: Path, out: Path, *flags: str) -> None:
    train_vqvae.main(
        parse(train_vqvae.TrainVQVAE, [
            "--config=configs/debug/train_vqvae.yaml", f"--data={root}", f"--out={out}",
            "--total_images=256", "--log_every=64", *flags,
        ])
    )  # fmt: skip


@pytest.fixture(scope="module")
def damaged_faces(face_shards, tmp_path_factory) -> Path:
    """The drawn faces without one image of the second training shard."""
    root = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(face_shards, root, ignore=shutil.ignore_patterns("cache"))
    second = root / read_index(root).shards("train")[1].name
    flip(second, int(read_table(second)["offset"][6]) + 50)
    return root


def test_a_training_counts_each_use_and_its_codes_have_every_sample(damaged_faces, tmp_path):
    tolerate = ("--corrupt.action=substitute", "--corrupt.budget=0.01")
    train(damaged_faces, tmp_path / "vqvae", *tolerate)
    (fault,) = json.loads((tmp_path / "vqvae/corrupt.json").read_text())["train"]
    assert (fault["number"], fault["shard"]) == (53, "train-00001.tar")
    count = read_index(damaged_faces).num_samples("train")
    for line in metrics(tmp_path / "vqvae"):
        if "loss/total" in line:
            order = stream(0, count, 0, line["images_seen"])
            assert line["data/substituted"] == (order == 53).sum()

    arguments = [
        f"--data={damaged_faces}", f"--checkpoint={tmp_path / 'vqvae'}",
        f"--out={tmp_path / 'codes'}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"train-00001\.tar: .* is damaged"):
        extract_codes.main(parse(extract_codes.ExtractCodes, arguments))
    shutil.rmtree(tmp_path / "codes")
    extract_codes.main(parse(extract_codes.ExtractCodes, [*arguments, *tolerate]))
    codes = open_codes(tmp_path / "codes", "train")
    (listed,) = json.loads((tmp_path / "codes/corrupt.json").read_text())["train"]
    other = listed["substitute"]
    assert len(codes) == count and codes.index.codes["substituted"]["train"] == 1
    for level in codes.levels:
        assert (level[53] == level[other]).all()
    assert (codes.attributes[53] == codes.attributes[other]).all()


def test_a_corrupt_image_that_one_rank_meets_ends_all_by_name(damaged_faces, tmp_path):
    shutil.copytree(damaged_faces, tmp_path / "shards", ignore=shutil.ignore_patterns("cache"))
    shards = tmp_path / "shards"
    job = Job(shards, tmp_path / "run", "", "--cache=false", "--workers=1")
    codes = job.wait()
    assert 2 in codes and set(codes) <= {1, 2}, job.log()
    assert "train-00001.tar" in job.status()["reason"], job.status()


# Codes.


def write_codes(root: Path, spoil: dict[str, bytes | None] | None = None) -> Path:
    """Three samples of two levels; members of the second are replaced, or left out, by `spoil`."""
    root.mkdir()
    samples = []
    for number in range(3):
        members = {
            "level0.npy": npy_bytes(np.full((2, 2), number, np.uint16)),
            "level1.npy": npy_bytes(np.full((4, 4), number, np.uint16)),
            "json": b'{"label": 1}',
        }
        if number == 1:
            changed = {**members, **(spoil or {})}
            members = {name: data for name, data in changed.items() if data is not None}
        samples.append((f"c{number}", members))
    origin = {"grids": [[2, 2], [4, 4]], "codebook_sizes": [8, 8]}
    index = Index(
        source="faces", splits={"train": (write_shard(root / "train-0.tar", samples),)},
        codes=origin,
    )  # fmt: skip
    write_index(root, index)
    return root


@pytest.mark.parametrize(
    "spoil",
    [
        {"level1.npy": None}, {"json": None}, {"json": b"[]"}, {"level0.npy": b""},
        {"level0.npy": npy_bytes(np.zeros((2, 3), np.uint16))},
        {"level0.npy": npy_bytes(np.zeros((2, 2)))},
        {"level0.npy": npy_bytes(np.full((2, 2), 8, np.uint16))},
        {"level0.npy": npy_bytes(np.full((2, 2), -1))},
        {"level0.npy": npy_bytes(np.zeros((2, 2), np.uint16))[:-1]},
    ],
)  # fmt: skip
def test_a_wrong_code_sample_is_named(tmp_path, spoil):
    assert len(open_codes(write_codes(tmp_path / "good"), "train")) == 3
    with pytest.raises(UserError, match=r"train-0\.tar: no codes in c1 \("):
        open_codes(write_codes(tmp_path / "bad", spoil), "train")


@pytest.mark.parametrize("codes", [{}, {"grids": [[2, 2]], "codebook_sizes": [8, 8]},
                                   {"grids": [], "codebook_sizes": []},
                                   {"grids": [[10**6, 10**6]], "codebook_sizes": [8]},
                                   {"grids": [["a", 2]], "codebook_sizes": [8]}])  # fmt: skip
def test_an_index_without_grids_is_named(tmp_path, codes):
    root = write_codes(tmp_path / "x")
    write_index(root, dataclasses.replace(read_index(root), codes=codes))
    with pytest.raises(UserError, match=r"index\.json does not tell the grids"):
        open_codes(root, "train")


def test_damaged_code_shards_are_named(tmp_path):
    root = write_codes(tmp_path / "x")
    flip(root / "train-0.tar", int(read_table(root / "train-0.tar")["offset"][3]) + 90)
    with pytest.raises(UserError, match=r"train-0\.tar: c1\.level0\.npy is damaged"):
        open_codes(root, "train")
    (root / "train-0.tar").unlink()
    with pytest.raises(UserError, match=r"train-0\.tar is missing"):
        open_codes(root, "train")
