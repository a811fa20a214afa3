"""Pixels: recipes against plain numpy, and a cache that never differs from decoding."""

import dataclasses
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import images as images_module
from pipeline.data.images import Recipe, decode, open_images, pixel_variance, recipe_for
from pipeline.data.shards import Index, read_table, write_index, write_shard
from pipeline.stage import UserError

GOLDEN_HASH = "c34000f840377be1"  # a change makes every cache and every link to a recipe stale


def png(pixels: np.ndarray) -> bytes:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "PNG")
    return output.getvalue()


def noise(seed: int, height: int = 218, width: int = 178) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_images(root: Path, count: int = 11, seed: int = 0) -> None:
    """Two shards of images with every kind of annotation, each missing somewhere."""
    samples = []
    for i in range(count):
        text: dict = {"path": f"{i}.png", "label": i % 3, "attributes": {"Male": i % 2 == 0}}
        text["factors"] = {"angle": i / 4}
        if i == 3:
            text = {"path": "3.png"}
        samples.append((f"k{i}", {"png": png(noise(seed + i)), "json": json.dumps(text).encode()}))
    root.mkdir(exist_ok=True)
    shards = (write_shard(root / "train-0.tar", samples[:6]),
              write_shard(root / "train-1.tar", samples[6:]))  # fmt: skip
    write_index(
        root,
        Index(
            source="celeba", splits={"train": shards}, attribute_names=("Male", "Smiling"),
            factor_names=("angle",),
        ),
    )  # fmt: skip


def test_decode_crops_as_numpy_does() -> None:
    pixels = noise(1)
    assert (decode(png(pixels), Recipe(140, crop=140)) == pixels[39:179, 19:159]).all()
    assert (decode(png(pixels), Recipe(178, crop=178)) == pixels[20:198]).all()
    assert (decode(png(pixels), Recipe(178, crop=None)) == pixels[20:198]).all()
    assert (decode(png(pixels[:51]), Recipe(51, crop=None)) == pixels[:51, 63:114]).all()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_decode_resizes_as_torch_does(size: int) -> None:
    """Torch's antialiased bilinear filter is the same one, up to roundings of 8-bit steps."""
    pixels, crop = noise(2), 140 if size == 64 else 178
    top, left = (218 - crop) // 2, (178 - crop) // 2
    square = torch.from_numpy(pixels[top : top + crop, left : left + crop]).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(
        square[None].double(), size=size, mode="bilinear", antialias=True, align_corners=False
    )[0].permute(1, 2, 0)
    actual = decode(png(pixels), recipe_for("celeba", size))
    assert actual.shape == (size, size, 3) and actual.dtype == np.uint8
    assert np.abs(actual - expected.numpy()).max() <= 1.5


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    output = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(output, "JPEG", **options)
    return output.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # "turn by 90 degrees", which nobody does
USUAL = {
    "4:4:4": {"subsampling": "4:4:4"}, "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"}, "grey": {"mode": "L"}, "progressive": {"progressive": True},
    "progressive-grey": {"progressive": True, "mode": "L"}, "quality": {"quality": 100},
    "optimized": {"optimize": True}, "restarts": {"restart_marker_rows": 1},
    "segments": {"exif": EXIF, "comment": b"\xff\xd8", "icc_profile": bytes(100_000)},
    "kept-rgb": {"keep_rgb": True},
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [*USUAL, "cmyk"])
def test_every_jpeg_has_the_pixels_that_pil_gives_it(kind: str, channels: int) -> None:
    options = USUAL.get(kind, {"mode": "CMYK"})
    for number, (height, width) in enumerate([(218, 178), (17, 31), (1, 1), (64, 9)]):
        data = jpeg(noise(number, height, width), **options)
        assert (images_module._jpeg_frame(data) is not None) == (kind in USUAL)
        with Image.open(io.BytesIO(data)) as image:
            usual = image.convert("RGB" if channels == 3 else "L")
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        usual = usual.crop((left, top, left + side, top + side))
        for size in (side, 24):
            expected = np.asarray(usual.resize((size, size), Image.Resampling.BILINEAR))
            recipe = Recipe(size, crop=None, channels=channels)
            assert (decode(data, recipe) == expected.reshape(size, size, channels)).all()


@pytest.mark.parametrize("spoil", ["cut", "cut in the header", "zeros", "no height"])
def test_a_damaged_jpeg_is_what_it_is_to_pil(spoil: str) -> None:
    data = bytearray(jpeg(noise(0), progressive=True))
    frame = data.index(b"\xff\xc2")
    if spoil == "cut":
        del data[-500:]
    if spoil == "cut in the header":
        del data[frame + 6 :]
    if spoil == "zeros":
        data[frame:] = bytes(len(data) - frame)
    if spoil == "no height":
        data[frame + 5 : frame + 7] = bytes(2)

    def error_of(call: Callable[[], object]) -> str:
        with pytest.raises((OSError, ValueError, SyntaxError)) as caught:
            call()
        return re.sub("0x[0-9a-f]+", "", str(caught.value))

    with_pil = error_of(lambda: Image.open(io.BytesIO(data), formats=("JPEG", "PNG")).load())
    if spoil != "no height":  # the sizes are looked at before
        assert error_of(lambda: decode(bytes(data), Recipe(64, crop=None))) == with_pil
    else:
        assert "178x0" in error_of(lambda: decode(bytes(data), Recipe(64, crop=None)))


def test_mnist_is_padded_with_zeros() -> None:
    digit = noise(3, 28, 28)[:, :, 0]
    padded = decode(png(digit), recipe_for("mnist", 32))
    assert padded.shape == (32, 32, 1)
    assert (padded[:, :, 0] == np.pad(digit, 2)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_modes_become_rgb(mode: str) -> None:
    output = io.BytesIO()
    Image.fromarray(noise(4)).convert(mode).save(output, "PNG")
    assert decode(output.getvalue(), Recipe(64, crop=None)).shape == (64, 64, 3)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode(png(ramp), Recipe(64, crop=None))
    assert (pixels == (ramp // 256)[:, :, None]).all()


def test_recipes_have_stable_distinct_hashes() -> None:
    recipes = [
        recipe_for("celeba", 64), recipe_for("celeba", 128), recipe_for("faces", 64),
        recipe_for("mnist", 32), Recipe(64, crop=178),
    ]  # fmt: skip
    assert len({recipe.hash for recipe in recipes}) == len(recipes)
    assert recipe_for("folder", 64).hash == recipe_for("faces", 64).hash
    assert recipe_for("celeba", 64).hash == GOLDEN_HASH
    with pytest.raises(UserError, match="padded to 32 pixels, or 16; not 28"):
        recipe_for("mnist", 28)
    with pytest.raises(UserError, match="codes"):
        recipe_for("codes", 64)


def test_cache_and_streaming_are_the_same(tmp_path: Path) -> None:
    write_images(tmp_path)
    cached = open_images(tmp_path, "train", 64, progress=False)
    streamed = open_images(tmp_path, "train", 64, cache=False)
    assert len(cached) == len(streamed) == 11
    assert (cached[:] == streamed[:]).all() and cached[:].shape == (11, 64, 64, 3)
    for name in ("keys", "attributes", "labels", "factors"):
        one, two = getattr(cached, name), getattr(streamed, name)
        assert one.dtype == two.dtype and np.array_equal(one, two, equal_nan=name == "factors")
    expected = np.stack([decode(png(noise(i)), cached.recipe) for i in range(11)])
    for images in (cached, streamed, pickle.loads(pickle.dumps(cached))):
        assert (images[np.array([7, 0, 7])] == expected[[7, 0, 7]]).all()
        assert (images[-1] == expected[-1]).all() and images[3].shape == (64, 64, 3)
        assert (images[2:9:3] == expected[2:9:3]).all() and (images[[5]] == expected[[5]]).all()
        assert images[np.arange(11) > 8].shape == (2, 64, 64, 3)
        assert images[[]].shape == (0, 64, 64, 3)
        for index in (11, -12, [0, 11]):
            with pytest.raises(IndexError):
                images[index]
    assert len(pickle.dumps(cached)) < 10_000


def test_streaming_opens_a_shard_when_one_of_its_images_is_read(tmp_path: Path) -> None:
    write_images(tmp_path)
    expected = open_images(tmp_path, "train", 64, progress=False).fetch(np.arange(11))
    images = open_images(tmp_path, "train", 64, cache=False)
    table = tmp_path / "train-1.index.npy"
    content = table.read_bytes()
    table.write_bytes(content[:-1] + b"x")
    found = images.fetch(np.array([5, 3]))  # of the first shard
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and (array == expected[name][[5, 3]]).all()
    with pytest.raises(UserError, match=r"train-1\.index\.npy: not the SHA-256"):
        images.fetch(np.array([0, 7]))
    table.write_bytes(content)
    for images_of in (images, pickle.loads(pickle.dumps(images))):
        again = images_of.fetch(np.arange(11))
        assert all((array == expected[name]).all() for name, array in again.items())
    table.unlink()
    with pytest.raises(UserError, match=r"train-1\.index\.npy is missing"):
        open_images(tmp_path, "train", 64, cache=False)


def test_streamed_keys_are_unique_or_refused_when_they_are_used(tmp_path: Path) -> None:
    samples = [(key, {"png": png(noise(0, 8, 8)), "json": b"{}"}) for key in ("a", "b")]
    shards = tuple(write_shard(tmp_path / f"{n}.tar", samples[:2]) for n in range(2))
    write_index(tmp_path, Index(source="folder", splits={"train": shards}))
    images = open_images(tmp_path, "train", 8, cache=False)
    assert len(images) == 4 and images[:].shape == (4, 8, 8, 3)
    with pytest.raises(UserError, match="two samples have the key a"):
        images.keys  # noqa: B018
    with pytest.raises(UserError, match="two samples have the key a"):
        open_images(tmp_path, "train", 8, progress=False)


def test_a_flipped_bit_in_the_cache_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_images(tmp_path, "train", 64, progress=False)
    expected, file = images[:], tmp_path / "cache" / images.recipe.hash / "train.npy"
    whole = file.read_bytes()
    start = len(whole) - expected.nbytes
    each = expected[0].nbytes
    for number, place in ((0, 0), (7, 1234), (10, each - 1)):
        content = bytearray(whole)
        content[start + number * each + place] ^= 1 << (number % 8)
        file.write_bytes(content)
        spoiled = open_images(tmp_path, "train", 64, progress=False)
        others = np.delete(np.arange(11), number)
        for images in (spoiled, pickle.loads(pickle.dumps(spoiled))):
            assert (images[others] == expected[others]).all()
            for _ in range(2):  # it does not become right by being read
                with pytest.raises(UserError, match=rf"train\.npy: image {number} is damaged"):
                    images[[others[0], number]]
    file.unlink()  # as the error says
    assert (open_images(tmp_path, "train", 64, progress=False)[:] == expected).all()


def test_a_cache_without_checksums_is_built_again(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_images(tmp_path, "train", 64, progress=False)
    file = tmp_path / "cache" / images.recipe.hash / "train.metadata.npz"
    np.savez(file, **images.metadata)  # as an older version left it
    assert (open_images(tmp_path, "train", 64, progress=False)[:] == images[:]).all()
    with np.load(file) as arrays:
        assert arrays["crc32"].tolist() == [zlib.crc32(image.tobytes()) for image in images[:]]


def test_annotations(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_images(tmp_path, "train", 64, progress=False)
    assert images.keys.tolist() == [b"k%d" % i for i in range(11)]
    assert images.attributes.dtype == np.int8
    assert images.attributes[:4].tolist() == [[1, 0], [-1, 0], [1, 0], [0, 0]]
    assert images.labels.dtype == np.int64 and images.labels[:5].tolist() == [0, 1, 2, -1, 1]
    assert images.factors.dtype == np.float32 and images.factors[4].item() == 1
    assert np.isnan(images.factors[3]).all()


def test_cache_is_kept_and_follows_the_index(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_images(tmp_path, "train", 64, progress=False)
    file = tmp_path / "cache" / images.recipe.hash / "train.npy"
    before, old = file.stat().st_mtime_ns, images[:]
    (tmp_path / "train-0.tar").rename(tmp_path / "away")  # the cache alone is enough
    open_images(tmp_path, "train", 64, progress=False)
    assert file.stat().st_mtime_ns == before
    write_images(tmp_path, count=8, seed=100)
    new = open_images(tmp_path, "train", 64, progress=False)
    assert len(new) == 8 and (new[:] == open_images(tmp_path, "train", 64, cache=False)[:]).all()
    assert (images[:] == old).all()  # who has the old one open goes on reading it
    assert not [f for f in file.parent.iterdir() if f.name.startswith(".") and f.name != ".lock"]


@pytest.mark.parametrize("cache", [False, True])
def test_damage_is_named(tmp_path: Path, cache: bool) -> None:
    write_images(tmp_path)
    path = tmp_path / "train-1.tar"
    content = bytearray(path.read_bytes())
    content[read_table(path)["offset"][2] + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-1\.tar: k7\.png is damaged"):
        open_images(tmp_path, "train", 64, cache=cache, progress=False)[7]
    assert not list(tmp_path.glob("cache/*/train.json"))


def test_missing_split_and_unreadable_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(UserError, match="no split 'valid'"):
        open_images(tmp_path, "valid", 64)
    bad = write_shard(tmp_path / "train-2.tar", [("bad", {"jpg": b"GIF89a", "json": b"{}"})])
    write_index(tmp_path, Index(source="folder", splits={"train": (bad,)}))
    with pytest.raises(UserError, match=r"train-2\.tar: image bad cannot be read"):
        open_images(tmp_path, "train", 64, progress=False)


def test_pixel_variance(tmp_path: Path) -> None:
    write_images(tmp_path)
    images = open_images(tmp_path, "train", 64, progress=False)
    assert pixel_variance(images) == pytest.approx(np.var(images[:] / 255.0), rel=1e-12)
    long = dataclasses.replace(images.index.shards("train")[0], num_samples=10_000)
    large = dataclasses.replace(  # only 4,096 evenly spaced images of many are looked at
        images,
        index=dataclasses.replace(images.index, splits={"train": (long,)}),
        pixels=lambda i: np.repeat(i[:, None, None, None] % 256, 3, 3).astype(np.uint8),
    )
    assert pixel_variance(large) == pytest.approx(np.var(np.arange(256) / 255), rel=0.01)
