"""Sources and the shard stage: small data sets made here, and a few real images where there are."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_sources import encoded, huge_png

from pipeline import shard_data
from pipeline.data.shards import Index, ShardReader, read_index
from pipeline.data.sources import Item, Source
from pipeline.shard_data import ShardData, plan_tasks
from pipeline.stage import UserError

SCRIPT = Path(shard_data.__file__)


def write_celeba(root: Path, count: int = 20, zipped: bool = False) -> Path:
    """CelebA's layout: images 1 .. count, the last five of them valid (2) and test (3)."""
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        (root / "img_align_celeba" / name).write_bytes(encoded(seed=i))
    rows = [f"{name} {'-1' if i % 2 else ' 1'} -1" for i, name in enumerate(names)]
    (root / "list_attr_celeba.txt").write_text("\n".join([str(count), "Male Smiling ", *rows]))
    splits = [0 if i < count - 5 else 1 if i < count - 3 else 2 for i in range(count)]
    partition = [f"{name} {split}\n" for name, split in zip(names, splits, strict=True)]
    (root / "list_eval_partition.txt").write_text("".join(partition))
    (root / "identity_CelebA.txt").write_text(
        "".join(f"{name} {i}\n" for i, name in enumerate(names))
    )
    if zipped:
        with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
            for name in names:
                archive.write(root / "img_align_celeba" / name, f"img_align_celeba/{name}")
                (root / "img_align_celeba" / name).unlink()
        (root / "img_align_celeba").rmdir()
    return root


def make(root: Path | None, out: Path, source: str = "celeba", **options: object) -> Index:
    """Runs the stage in this process and returns its index."""
    shard_data.main(ShardData(source=source, root=root, out=out, **{"workers": 1, **options}))
    return read_index(out)


def samples(out: Path, split: str) -> list[tuple[str, bytes, dict]]:
    """(key, image, JSON) of a split."""
    found = []
    for shard in read_index(out).shards(split):
        reader = ShardReader(out / shard.name, shard)
        for i, key in enumerate(reader.keys):
            text = json.loads(reader.read_member(i, "json"))
            found.append((key.decode(), reader.read_member(i, "jpg", "png"), text))
    return found


def contents(out: Path) -> dict[str, bytes]:
    """Everything that has to be the same from run to run."""
    files = [*out.glob("*.tar"), *out.glob("*.npy"), out / "index.json"]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("zipped", [False, True])
def test_celeba(tmp_path: Path, zipped: bool) -> None:
    root = write_celeba(tmp_path / "celeba", zipped=zipped)
    index = make(root, tmp_path / "out", shard_size=7)
    assert {split: index.num_samples(split) for split in index.splits} == {
        "train": 15, "valid": 2, "test": 3
    }  # fmt: skip
    assert [shard.num_samples for shard in index.shards("train")] == [7, 7, 1]
    assert index.attribute_names == ("Male", "Smiling") and index.quarantined == ()
    key, image, text = samples(tmp_path / "out", "train")[1]
    assert key == "000002" and image == encoded(seed=1)
    assert text == {
        "path": "img_align_celeba/000002.jpg",
        "attributes": {"Male": False, "Smiling": False},
        "identity": 1,
    }


def test_folder_with_classes(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("cat", "dog/puppies", ".hidden"):
        (root / name).mkdir(parents=True)
    for i in range(60):
        name = ("cat", "dog/puppies")[i % 2]
        (root / name / f"{i}.v2.PNG").write_bytes(encoded((9, 7), i, "PNG"))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "last.webp").write_bytes(encoded((9, 7), 0, "WEBP"))
    index = make(root, tmp_path / "out", "folder")
    counts = {split: index.num_samples(split) for split in index.splits}
    assert sum(counts.values()) == 61 and counts["train"] > 40 and len(counts) == 3
    assert index.class_names == ("cat", "dog")
    found = {text["path"]: (key, text) for split in counts for key, _, text in samples(
        tmp_path / "out", split)}  # fmt: skip
    assert found["dog/puppies/1.v2.PNG"][0] == "dog_puppies_1_v2"
    assert found["dog/puppies/1.v2.PNG"][1]["label"] == 1
    assert found["cat/last.webp"][1] == {"path": "cat/last.webp", "label": 0, "class_name": "cat"}
    (root / "cat" / "new.png").write_bytes(encoded((9, 7), 5, "PNG"))
    make(root, tmp_path / "more", "folder")  # a new image moves no other one between the splits
    for split in counts:
        old = {key for key, _, _ in samples(tmp_path / "out", split)}
        assert old <= {key for key, _, _ in samples(tmp_path / "more", split)}


def test_folder_with_split_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("train/a", "train/b", "val/a", "test/b")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(encoded((9, 7), number))
    index = make(tmp_path / "in", tmp_path / "out", "folder")
    assert {s: index.num_samples(s) for s in index.splits} == {"train": 2, "valid": 1, "test": 1}
    assert samples(tmp_path / "out", "test")[0][2]["class_name"] == "b"
    (tmp_path / "in" / "stray.jpg").write_bytes(encoded())
    with pytest.raises(UserError, match=r"stray\.jpg is in none"):
        make(tmp_path / "in", tmp_path / "other", "folder")


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.jpg").write_bytes(encoded((9, 7)))
    index = make(tmp_path / "in", tmp_path / "out", "folder")
    (split,) = index.splits
    assert samples(tmp_path / "out", split)[0][::2] == ("a_b", {"path": "a b.jpg"})
    assert index.class_names == ()


def test_faces_are_drawn_beside_the_shards(tmp_path: Path) -> None:
    options = {"num_faces": 12, "face_size": 64, "seed": 3}
    index = make(None, tmp_path / "run" / "shards", "faces", **options)
    assert (tmp_path / "run" / "faces" / "list_factors.txt").is_file()
    assert index.source == "faces" and index.factor_names and index.attribute_names
    text = samples(tmp_path / "run" / "shards", "train")[0][2]
    assert set(text["factors"]) == set(index.factor_names)
    make(None, tmp_path / "run" / "shards", "faces", **options)
    with pytest.raises(UserError):
        make(None, tmp_path / "run" / "shards", "faces", **{**options, "seed": 4})


def spoil(root: Path) -> dict[str, str]:
    """Makes six images unusable; {image: what the reason must say}."""
    images = root / "img_align_celeba"
    (images / "000002.jpg").write_bytes(encoded(seed=1)[:-900])
    (images / "000004.jpg").write_bytes(encoded((64, 64)))
    (images / "000006.jpg").write_bytes(huge_png(20_000, 20_000))
    (images / "000008.jpg").unlink()
    (images / "000010.jpg").write_text("<html>not found</html>")
    attributes = (root / "list_attr_celeba.txt").read_text().splitlines()
    lines = [line for line in attributes if not line.startswith("000012")]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines))
    return {
        "000002": "cannot be decoded",
        "000004": "64x64 pixels, not 178x218",
        "000006": "decompression bomb",
        "000008": "no such file",
        "000010": "not a JPEG",
        "000012": "no row in the attr file",
    }


def test_unusable_images_are_quarantined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_celeba(tmp_path / "celeba")
    expected = spoil(root)
    index = make(root, tmp_path / "out", max_quarantined=0.5)
    found = {Path(bad["path"]).stem: bad["reason"] for bad in index.quarantined}
    assert found.keys() == expected.keys() and index.num_samples("train") == 9
    assert all(part in found[image] for image, part in expected.items())
    printed = capsys.readouterr().out
    assert "quarantined: 6" in printed and "000002.jpg' (train): cannot be decoded" in printed


def test_too_many_unusable_images_stop_it(tmp_path: Path) -> None:
    root = write_celeba(tmp_path / "celeba")
    spoil(root)
    with pytest.raises(UserError, match=r"of 20 images cannot be used .*--max_quarantined"):
        make(root, tmp_path / "out", max_quarantined=0.2)
    assert not (tmp_path / "out" / "index.json").exists()
    index = make(root, tmp_path / "out", max_quarantined=0.3)  # what was done is taken over
    assert len(index.quarantined) == 6


def test_workers_change_no_byte_and_repairs_are_exact(tmp_path: Path) -> None:
    root, out = write_celeba(tmp_path / "celeba"), tmp_path / "one"
    make(root, out, shard_size=4)
    make(root, tmp_path / "two", shard_size=4, workers=2)
    whole = contents(out)
    assert contents(tmp_path / "two") == whole
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    make(root, out, shard_size=4)  # nothing to do
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")} == times
    (out / "index.json").unlink()  # as if killed: no index, a shard lost, one torn, a leftover
    (out / "train-00001.tar").unlink()
    (out / "train-00002.tar").write_bytes(whole["train-00002.tar"][:-5])
    (out / ".train-00003.tar.123").write_bytes(b"half")
    make(root, out, shard_size=4)
    assert contents(out) == whole and not list(out.glob(".*.tar*"))
    changed = [n for n in times if (out / n).stat().st_mtime_ns != times[n]]
    assert sorted(changed) == ["train-00001.tar", "train-00002.tar"]


def test_another_plan_is_refused(tmp_path: Path) -> None:
    root, out = write_celeba(tmp_path / "celeba"), tmp_path / "out"
    make(root, out)
    with pytest.raises(
        UserError, match=r"another shard_size \(1000, now 5\): choose another --out"
    ):
        make(root, out, shard_size=5)
    with pytest.raises(UserError, match="another limit"):
        make(root, out, limit=3)
    (root / "img_align_celeba" / "000001.jpg").write_bytes(encoded(seed=99, size=(178, 219)))
    with pytest.raises(UserError, match="another images"):
        make(root, out)


def test_limit_takes_the_first_of_each_split(tmp_path: Path) -> None:
    index = make(write_celeba(tmp_path / "celeba"), tmp_path / "out", limit=2)
    assert [index.num_samples(split) for split in ("train", "valid", "test")] == [2, 2, 2]


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    root, out = write_celeba(tmp_path / "celeba"), tmp_path / "out"
    with pytest.raises(UserError, match=r"list_attr|img_align_celeba/? is missing"):
        make(tmp_path, out)
    (root / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(UserError, match=r"partition\.txt:1: unexpected value"):
        make(root, out)
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(UserError, match=r"list_eval_partition\.txt is missing"):
        make(root, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [{"shard_size": 0}, {"workers": -1}, {"limit": 0}, {"max_pixels": 10**9}, {"root": None}],
)
def test_config_is_validated(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ShardData(**{"source": "celeba", "root": tmp_path, "out": tmp_path, **options})


def test_a_key_of_two_images_is_refused_in_all_splits(tmp_path: Path) -> None:
    items = [Item(key=k, split=s, path="", file="") for k, s in (("a", "train"), ("a", "valid"))]
    config = ShardData(source="folder", root=tmp_path, out=tmp_path / "out")
    with pytest.raises(UserError, match="two samples have the key a: each image"):
        plan_tasks(config, Source(name="folder", items=tuple(items)))


def test_command_line(tmp_path: Path) -> None:
    root = write_celeba(tmp_path / "celeba")
    flags = ["--source", "celeba", "--root", root, "--out", tmp_path / "out", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "20 images of celeba" in done.stdout, done.stderr
    again = subprocess.run(
        [sys.executable, SCRIPT, *flags, "--shard_size", "5"], capture_output=True, text=True
    )
    assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr


@pytest.mark.skipif("CELEBA_ROOT" not in os.environ, reason="CELEBA_ROOT is not set")
def test_real_celeba(tmp_path: Path) -> None:
    root = Path(os.environ["CELEBA_ROOT"])
    index = make(root, tmp_path / "out", limit=20)
    assert len(index.attribute_names) == 40 and index.quarantined == ()
    for _, image, text in samples(tmp_path / "out", "test"):
        assert image == (root / text["path"]).read_bytes() and text["identity"] > 0


@pytest.mark.skipif("MNIST_ROOT" not in os.environ, reason="MNIST_ROOT is not set")
def test_real_mnist(tmp_path: Path) -> None:
    make(Path(os.environ["MNIST_ROOT"]), tmp_path / "out", "mnist", limit=20)
    assert [t["label"] for _, _, t in samples(tmp_path / "out", "train")[:5]] == [5, 0, 4, 1, 9]
    assert [t["label"] for _, _, t in samples(tmp_path / "out", "test")[:5]] == [7, 2, 1, 0, 4]
    assert samples(tmp_path / "out", "valid")[0][0] == "mnist_train_55000"
