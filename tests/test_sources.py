"""Sources without the stage: encoded images, their inspection, keys, MNIST's files."""

import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.inspection import Limits, encode, inspect_image
from pipeline.data.shards import valid_key
from pipeline.data.sources import SOURCES, make_keys, read_item
from pipeline.stage import UserError


def encoded(size: tuple[int, int] = (178, 218), seed: int = 0, kind: str = "JPEG") -> bytes:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    output = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(output, kind)
    return output.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A valid header that promises a lot."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


def test_inspection() -> None:
    assert inspect_image(encoded(), Limits()) is None
    assert "more than max_pixels" in inspect_image(huge_png(9000, 9000), Limits())
    assert "cannot be decoded" in inspect_image(huge_png(20_000, 20_000), Limits())
    assert "encoded bytes" in inspect_image(encoded(), Limits(max_bytes=10))
    assert "not a JPEG" in inspect_image(b"%!PS-Adobe", Limits())
    assert "not a JPEG" in inspect_image(b"", Limits())
    assert encode(encoded(kind="BMP"))[0] == "png"


def test_keys_are_unique_and_plain() -> None:
    paths = ["a/b.jpg", "a_b.jpg", "a_b.png", "x_flip.jpg", "é.jpg", "..", "d/" * 200 + "e.jpg"]
    keys = make_keys(paths)
    assert len(set(keys)) == len(keys) and all(valid_key(f"{key}_flip") for key in keys)
    assert not any(key.endswith("_flip") for key in keys)
    assert keys == make_keys(paths) and make_keys(["a/b.jpg"]) == ["a_b"]


def write_mnist(root: Path, dotted: bool, zipped: bool) -> None:
    root.mkdir()
    for part, count in (("train", 36), ("t10k", 5)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            data = struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()
            name = f"{part}-{kind}-ubyte".replace("-idx", ".idx" if dotted else "-idx")
            (root / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize(("dotted", "zipped"), [(False, True), (True, False)])
def test_mnist(tmp_path: Path, dotted: bool, zipped: bool) -> None:
    write_mnist(tmp_path / "in", dotted, zipped)
    source = SOURCES["mnist"](tmp_path / "in")
    splits = [item.split for item in source.items]
    assert splits == ["train"] * 33 + ["valid"] * 3 + ["test"] * 5
    last = source.items[35]
    assert (last.key, last.split, last.label) == ("mnist_train_00035", "valid", 5)
    assert json.loads(source.describe(last))["class_name"] == "5"
    expected = np.random.default_rng(36).integers(0, 256, (36, 28, 28), np.uint8)[35]
    assert (np.asarray(Image.open(io.BytesIO(read_item(last)))) == expected).all()


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03", struct.pack(">4i", 2051, 9, 28, 28)])
def test_broken_mnist_files_are_named(tmp_path: Path, content: bytes) -> None:
    write_mnist(tmp_path / "in", dotted=False, zipped=False)
    (tmp_path / "in" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is not MNIST's file"):
        SOURCES["mnist"](tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "message"),
    [("mnist", "four idx files"), ("folder", "No such file"), ("celeba", "img_align_celeba")],
)
def test_missing_data_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SOURCES[name](tmp_path / "nowhere")
