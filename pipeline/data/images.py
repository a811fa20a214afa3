"""From shards to pixels: the recipe, the uint8 cache, and reading without a cache.

    images = open_images(Path("runs/demo/shards"), "train", 64)
    images[np.array([3, 1, 4])]      # (3, 64, 64, 3) uint8
    images.attributes                # (N, A) int8

Cache and streaming give identical pixels, because both call `decode`.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.index import Index, read_index
from pipeline.data.shards import ShardReader
from pipeline.stage import UserError, num_cpus, write_json

RECIPE_VERSION = 1  # to be raised with every change that alters a pixel
IMAGE_EXTENSIONS = {"JPEG": "jpg", "PNG": "png"}  # what shards hold
MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it only warns
_CHUNK = 256  # images per task of the cache


@dataclass(frozen=True)
class Recipe:
    """How encoded bytes become pixels: decode, centre crop, zeros around, bilinear resize."""

    size: int
    """Height and width of the result."""
    crop: int | None
    """Side of the centre square; None: the shorter side."""
    pad: int = 0
    """Zeros added on each side after the crop."""
    channels: int = 3
    """3 (RGB) or 1 (grey)."""

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with anything that changes the pixels."""
        text = json.dumps({"version": RECIPE_VERSION, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_for(source: str, size: int) -> Recipe:
    """The recipe of a source at `size` pixels; UserError where there is none."""
    if size < 1:
        raise UserError(f"image size must be at least 1, not {size}")
    if source == "celeba":  # the centre 140 as in the WAE and RAE papers
        return Recipe(size, crop=140 if size == 64 else 178)
    if source == "mnist":
        if size != 32:
            raise UserError(f"MNIST's images are padded to size 32; {size} is not possible")
        return Recipe(size, crop=28, pad=2, channels=1)
    if source in ("faces", "folder"):
        return Recipe(size, crop=None)
    raise UserError(f"no images in shards of source {source!r}: give a directory of image shards")


def decode(image_bytes: bytes, recipe: Recipe) -> np.ndarray:
    """Encoded JPEG or PNG -> (H, W, C) uint8. ValueError or OSError where that is impossible."""
    with Image.open(io.BytesIO(image_bytes), formats=tuple(IMAGE_EXTENSIONS)) as image:
        width, height = image.size
        crop = recipe.crop or min(width, height)
        if width * height > MAX_PIXELS or min(width, height) < crop:
            raise ValueError(f"{width}x{height} pixels: too many, or less than the crop of {crop}")
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB" if recipe.channels == 3 else "L")
    left, top, pad = (width - crop) // 2, (height - crop) // 2, recipe.pad
    # PIL's crop fills with zeros what lies outside of the image, so cropping is padding too
    image = image.crop((left, top, left + crop, top + crop))
    image = image.crop((-pad, -pad, crop + pad, crop + pad))
    if image.size != (recipe.size, recipe.size):
        image = image.resize((recipe.size, recipe.size), Image.Resampling.BILINEAR)
    return np.array(image).reshape(recipe.size, recipe.size, recipe.channels)


class _StreamedPixels:
    """Decodes on the fly, by offset reads."""

    def __init__(self, readers: Sequence[ShardReader], recipe: Recipe) -> None:
        self.readers, self.recipe = readers, recipe
        self.ends = np.cumsum([len(reader) for reader in readers])

    def _one(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        reader = self.readers[shard]
        sample = int(index - self.ends[shard]) + len(reader)
        data = reader.read_member(sample, *IMAGE_EXTENSIONS.values())
        try:
            return decode(data, self.recipe)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            key = reader.keys[sample].decode()
            raise UserError(f"{reader.path}: image {key} cannot be read: {error}") from error

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), *_shape(self.recipe)), np.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self._one(int(index))
        return pixels


class _CachedPixels:
    """Rows of a memory-mapped array, which is opened again where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, np.load(path, mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return _CachedPixels, (self.path,)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[indices])


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.size, recipe.size, recipe.channels


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """A split's images and what is known about them; can be pickled into worker processes."""

    index: Index
    split: str
    recipe: Recipe
    keys: np.ndarray
    """(N,) bytes, the samples' keys."""
    attributes: np.ndarray
    """(N, A) int8: -1 no, +1 yes, 0 unknown."""
    labels: np.ndarray
    """(N,) int64: the class, -1 where there is none."""
    factors: np.ndarray
    """(N, F) float32: true generating factors, NaN where unknown."""
    pixels: Callable[[np.ndarray], np.ndarray]
    """Indices (B,) int64 -> (B, H, W, C) uint8: `images[...]` is more convenient."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, indices: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Images as uint8: (B, H, W, C), or (H, W, C) for an integer, as numpy does."""
        count = len(self)
        chosen = np.arange(count)[indices] if isinstance(indices, slice) else np.asarray(indices)
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        if chosen.size and not -count <= chosen.min() <= chosen.max() < count:
            raise IndexError(f"image {chosen.max()} of {count}")
        images = self.pixels(chosen.reshape(-1).astype(np.int64) % max(count, 1))
        return images[0] if chosen.ndim == 0 else images

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch for the loader: images (B, H, W, C) uint8, attributes (B, A), labels (B,)."""
        attributes, labels = self.attributes[indices], self.labels[indices]
        return {"images": self[indices], "attributes": attributes, "labels": labels}


def _metadata(readers: Sequence[ShardReader], index: Index, workers: int) -> dict[str, np.ndarray]:
    """keys, attributes, labels and factors from the samples' JSON members."""

    def parse(reader: ShardReader) -> list[dict]:
        return [json.loads(reader.read_member(i, "json")) for i in range(len(reader))]

    with ThreadPoolExecutor(workers) as pool:
        samples = [sample for shard in pool.map(parse, readers) for sample in shard]
    sign = {True: 1, False: -1, None: 0}
    attributes = [
        [sign[sample.get("attributes", {}).get(name)] for name in index.attribute_names]
        for sample in samples
    ]
    factors = [
        [sample.get("factors", {}).get(name, np.nan) for name in index.factor_names]
        for sample in samples
    ]
    count = len(samples)
    return {
        "keys": np.array([key for reader in readers for key in reader.keys], "S"),
        "attributes": np.array(attributes, np.int8).reshape(count, len(index.attribute_names)),
        "labels": np.array([sample.get("label", -1) for sample in samples], np.int64),
        "factors": np.array(factors, np.float32).reshape(count, len(index.factor_names)),
    }


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time builds a cache; the lock goes with its holder, however that ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{directory}: the cache cannot be written: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_cache(
    directory: Path,
    streamed: _StreamedPixels,
    metadata: dict[str, np.ndarray],
    name: str,
    workers: int,
    progress: bool,
) -> None:
    """Writes `<name>.npy` and `<name>.metadata.npz`. Threads: decoding releases Python's lock."""
    count = len(metadata["keys"])
    temporary = directory / f".{name}.npy"
    array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, *_shape(streamed.recipe)))

    def fill(start: int) -> int:
        indices = np.arange(start, min(start + _CHUNK, count))
        array[indices] = streamed(indices)
        return len(indices)

    bar = tqdm(total=count, unit="image", desc=f"cache {name}", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:
        for done in pool.map(fill, range(0, count, _CHUNK)):
            bar.update(done)
    array.flush()
    with open(directory / f".{name}.npz", "wb") as file:
        np.savez(file, **metadata)  # pyright: ignore[reportArgumentType]
    os.replace(directory / f".{name}.npz", directory / f"{name}.metadata.npz")
    os.replace(temporary, directory / f"{name}.npy")


def _same_cache(note: Path, expected: dict) -> bool:
    try:
        return json.loads(note.read_text()) == expected
    except (OSError, ValueError):
        return False


def open_images(
    root: Path,
    split: str,
    size: int,
    *,
    cache: bool = True,
    workers: int = 0,
    progress: bool = True,
) -> ImageSet:
    """The images of a split at `size` pixels.

    cache: keep pixels in `<root>/cache/<recipe hash>/`, built at the first call and again when the
    index has changed; otherwise each access reads and decodes. workers: threads that build the
    cache and read the metadata, 0 for one per CPU. UserError for missing or damaged shards.
    """
    index = read_index(root)
    recipe = recipe_for(index.source, size)
    shards = index.shards(split)
    workers = workers or num_cpus()

    def streamed() -> tuple[_StreamedPixels, dict[str, np.ndarray]]:
        readers = [ShardReader(root / shard.name, shard) for shard in shards]
        return _StreamedPixels(readers, recipe), _metadata(readers, index, workers)

    if not cache:
        pixels, metadata = streamed()
        return ImageSet(index=index, split=split, recipe=recipe, pixels=pixels, **metadata)

    directory = root / "cache" / recipe.hash
    note = directory / f"{split}.json"
    expected = {"index_sha256": index.sha256, "recipe": dataclasses.asdict(recipe)}
    if not _same_cache(note, expected):
        with _locked(directory):
            if not _same_cache(note, expected):  # another process may just have built it
                note.unlink(missing_ok=True)
                _build_cache(directory, *streamed(), split, workers, progress)
                write_json(note, expected)
    with np.load(directory / f"{split}.metadata.npz", allow_pickle=False) as file:
        metadata = dict(file)
    pixels = _CachedPixels(directory / f"{split}.npy")
    return ImageSet(index=index, split=split, recipe=recipe, pixels=pixels, **metadata)


def pixel_variance(images: ImageSet) -> float:
    """Variance of the pixels in [0, 1] about their one mean, all channels together.

    Over at most 4,096 evenly spaced images; the divisor of the reconstruction error in van den
    Oord et al.'s code. Exact sums: the histogram of 8-bit values is all that is needed.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), 4096)).astype(np.int64))
    counts = np.zeros(256, np.int64)
    for start in range(0, len(chosen), _CHUNK):
        counts += np.bincount(images[chosen[start : start + _CHUNK]].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum()
    return float(counts @ (values - mean) ** 2 / counts.sum())
