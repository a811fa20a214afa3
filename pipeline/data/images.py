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
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.corruption import (
    CorruptConfig,
    Fault,
    LostShard,
    check_budget,
    open_readers,
    stand_ins,
)
from pipeline.data.index import Index, parse_description, read_index
from pipeline.data.shards import AGAIN, ShardReader, check_unique
from pipeline.stage import UserError, num_cpus, write_json

RECIPE_VERSION = 1  # to be raised with every change that alters a pixel
IMAGE_EXTENSIONS = {"JPEG": "jpg", "PNG": "png"}  # what shards hold
MAX_PIXELS = 64_000_000  # of an encoded image: Pillow takes four bytes for each
METADATA = ("keys", "attributes", "labels", "factors")
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
        if size not in (16, 32):
            raise UserError(f"MNIST's images are padded to 32 pixels, or 16; not {size}")
        return Recipe(size, crop=28, pad=2, channels=1)
    if source in ("faces", "folder"):
        return Recipe(size, crop=None)
    raise UserError(f"no images in shards of source {source!r}: give a directory of image shards")


def decode(image_bytes: bytes, recipe: Recipe) -> np.ndarray:
    """Encoded JPEG or PNG -> (H, W, C) uint8, read-only. ValueError or OSError where that is
    impossible."""
    image = _decoded(image_bytes, recipe.crop)
    mode = "RGB" if recipe.channels == 3 else "L"
    if image.mode != mode:  # else it would be a copy, and an image may have 64 million pixels
        image = image.convert(mode)
    (width, height), pad = image.size, recipe.pad
    crop = recipe.crop or min(width, height)
    left, top = (width - crop) // 2, (height - crop) // 2
    # PIL's crop fills with zeros what lies outside of the image, so cropping is padding too
    if (width, height) != (crop, crop):
        image = image.crop((left, top, left + crop, top + crop))
    if pad:
        image = image.crop((-pad, -pad, crop + pad, crop + pad))
    if image.size != (recipe.size, recipe.size):
        image = image.resize((recipe.size, recipe.size), Image.Resampling.BILINEAR)
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    return pixels.reshape(recipe.size, recipe.size, recipe.channels)


def _decoded(data: bytes, crop: int | None) -> Image.Image:
    """The whole image, in whatever mode it has. A JPEG goes to PIL's decoder at once, since
    `Image.open` takes longer to look at all its segments; the decoder is the same."""

    def check(width: int, height: int) -> None:
        if width * height > MAX_PIXELS or min(width, height) < (crop or 1):
            raise ValueError(f"{width}x{height} pixels: too many, or less than the crop of {crop}")

    if frame := _jpeg_frame(data):
        mode, size = frame
        check(*size)
        try:
            return Image.frombytes(mode, size, data, "jpeg", mode, "")
        except ValueError:
            pass  # damaged: what follows says how
    with Image.open(io.BytesIO(data), formats=tuple(IMAGE_EXTENSIONS)) as image:
        check(*image.size)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.load()
        return image


def _jpeg_frame(data: bytes) -> tuple[str, tuple[int, int]] | None:
    """("RGB" or "L", (width, height)) by the segments before the frame of a JPEG of 8 bits,
    baseline or progressive; None for anything else."""
    place = 2
    try:
        while data[:2] == b"\xff\xd8" and data[place] == 0xFF:
            marker, length = struct.unpack_from(">BH", data, place + 1)
            if marker in (0xC0, 0xC1, 0xC2):
                bits, height, width, layers = struct.unpack_from(">BHHB", data, place + 4)
                mode = {1: "L", 3: "RGB"}.get(layers)
                return (mode, (width, height)) if mode and bits == 8 else None
            if not (0xE0 <= marker <= 0xEF or marker in (0xC4, 0xDB, 0xDD, 0xFE)):
                return None  # not one of tables, restart interval, application's or comment
            place += 2 + length
    except (IndexError, struct.error):
        pass
    return None


class StreamedPixels:
    """Decodes on the fly, by offset reads. UserError names the shard and the sample.

    Attributes:
        way_out: what an error about a sample ends with.
        stand_ins: {number of a corrupt sample: of the one that is read in its place}.
    """

    def __init__(
        self, readers: Sequence[ShardReader | LostShard], recipe: Recipe, way_out: str = ""
    ) -> None:
        self.readers, self.recipe, self.way_out = readers, recipe, way_out
        self.stand_ins: Mapping[int, int] = {}
        self.ends = np.cumsum([len(reader) for reader in readers])

    def place(self, number: int) -> tuple[ShardReader | LostShard, int]:
        """The shard of a sample, and its number there."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        reader = self.readers[shard]
        return reader, int(number - self.ends[shard]) + len(reader)

    def description(self, number: int) -> dict[str, Any]:
        """The JSON member of a sample, or of its stand-in."""
        reader, sample = self.place(self.stand_ins.get(number, number))
        return _description(reader, sample, reader.read_member(sample, "json"))

    def one(self, number: int) -> np.ndarray:
        """The pixels (H, W, C) of a sample, or of its stand-in."""
        reader, sample = self.place(self.stand_ins.get(number, number))
        return self._decode(reader, sample, self._read(reader, sample))

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), *_shape(self.recipe)), np.uint8)
        for row, number in enumerate(indices.tolist()):
            pixels[row] = self.one(number)
        return pixels

    def with_descriptions(self, indices: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The pixels (B, H, W, C) of samples and their JSON members, each read once."""
        pixels, samples = np.empty((len(indices), *_shape(self.recipe)), np.uint8), []
        for row, number in enumerate(indices.tolist()):
            reader, sample = self.place(self.stand_ins.get(number, number))
            members = self._read(reader, sample)
            pixels[row] = self._decode(reader, sample, members)
            samples.append(_description(reader, sample, members.get("json", b"")))
        return pixels, samples

    def _read(self, reader: ShardReader | LostShard, sample: int) -> dict[str, bytes]:
        """All members, so that damage to any of them is seen with the image."""
        try:
            return reader.read(sample)
        except UserError as error:
            raise UserError(f"{error}{self.way_out}") from error

    def _decode(
        self, reader: ShardReader | LostShard, sample: int, members: Mapping[str, bytes]
    ) -> np.ndarray:
        data = members.get("jpg", members.get("png"))
        if data is not None:
            try:
                return decode(data, self.recipe)
            except MemoryError:
                raise  # no fault of the image
            except Exception as error:  # decoders raise almost anything on damaged bytes
                reason = " ".join(str(error).split()) or type(error).__name__
        else:
            reason = "it has no member jpg or png"
        key = reader.keys[sample].decode()
        raise UserError(f"{reader.path}: image {key} cannot be read: {reason}{self.way_out}")


class _CachedPixels:
    """Rows of a memory-mapped array, which is opened again where it is unpickled. What is read is
    compared with its CRC32: microseconds an image."""

    def __init__(
        self, path: Path, crc32: np.ndarray, stand_ins: Mapping[int, int] | None = None
    ) -> None:
        self.path, self.crc32, self.stand_ins = path, crc32, stand_ins or {}
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray, Mapping[int, int]]]:
        return _CachedPixels, (self.path, self.crc32, self.stand_ins)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        if self.stand_ins:
            indices = np.array([self.stand_ins.get(i, i) for i in indices.tolist()], np.int64)
        pixels = np.asarray(self.array[indices])
        for number, crc32, image in zip(indices, self.crc32[indices].tolist(), pixels, strict=True):
            if zlib.crc32(image.data) != crc32:
                raise UserError(
                    f"{self.path}: image {number} is damaged (CRC32): delete this file, and it is "
                    "made again"
                )
        return pixels


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.size, recipe.size, recipe.channels


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """A split's images and what is known about them; can be pickled into worker processes."""

    index: Index
    split: str
    recipe: Recipe
    metadata: Mapping[str, np.ndarray]
    """keys, attributes, labels and factors, which are properties of this class."""
    pixels: Callable[[np.ndarray], np.ndarray]
    """Indices (B,) int64 -> (B, H, W, C) uint8: `images[...]` is more convenient."""
    faults: tuple[Fault, ...] = ()
    """The corrupt samples. Pixels, attributes, labels and factors are those of their stand-ins."""

    @cached_property
    def _count(self) -> int:
        return self.index.num_samples(self.split)

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> np.ndarray:
        """(N,) bytes, the samples' keys: no two are equal."""
        return self.metadata["keys"]

    @property
    def attributes(self) -> np.ndarray:
        """(N, A) int8: -1 no, +1 yes, 0 unknown."""
        return self.metadata["attributes"]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: the class, -1 where there is none."""
        return self.metadata["labels"]

    @property
    def factors(self) -> np.ndarray:
        """(N, F) float32: true generating factors, NaN where unknown."""
        return self.metadata["factors"]

    @property
    def corrupt(self) -> np.ndarray:
        """Numbers of the corrupt samples (F,) int64, ascending."""
        return np.array([fault["number"] for fault in self.faults], np.int64)

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

    def describe(self, number: int) -> dict[str, Any]:
        """The JSON member of a sample, or of its stand-in; not of a cache, which has none."""
        assert isinstance(self.pixels, StreamedPixels)
        return self.pixels.description(number)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch for the loader: images (B, H, W, C) uint8, attributes (B, A), labels (B,)."""
        if isinstance(self.metadata, StreamedMetadata):
            return self.metadata.fetch(indices)
        attributes, labels = self.attributes[indices], self.labels[indices]
        return {"images": self[indices], "attributes": attributes, "labels": labels}


class StreamedMetadata(Mapping[str, np.ndarray]):
    """What is known of all samples, read when it is first asked for: keys from the tables, all else
    from the JSON members. A batch asks for its own samples only."""

    def __init__(self, streamed: StreamedPixels, index: Index, workers: int) -> None:
        self.streamed, self.index, self.workers = streamed, index, workers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._keys if name == "keys" else self._described[name]

    def __iter__(self) -> Iterator[str]:
        return iter(METADATA)

    def __len__(self) -> int:
        return len(METADATA)

    @cached_property
    def _keys(self) -> np.ndarray:
        return _unique_keys(self.streamed)

    @cached_property
    def _described(self) -> dict[str, np.ndarray]:
        samples, _ = _descriptions(self.streamed, self.workers, tolerant=False)
        return _as_arrays(samples, self.index)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `ImageSet.fetch`."""
        pixels, samples = self.streamed.with_descriptions(indices)
        known = _as_arrays(samples, self.index)
        return {"images": pixels, "attributes": known["attributes"], "labels": known["labels"]}


def _description(reader: ShardReader | LostShard, sample: int, data: bytes) -> dict[str, Any]:
    """The JSON member of a sample."""
    try:
        return parse_description(data)
    except ValueError as error:
        key = reader.keys[sample].decode()
        raise UserError(f"{reader.path}: {key}.json: {error}: {AGAIN}") from error


def _unique_keys(streamed: StreamedPixels) -> np.ndarray:
    """(N,) bytes."""
    keys = np.array([key for reader in streamed.readers for key in reader.keys], "S")
    check_unique(keys)
    return keys


def _descriptions(
    streamed: StreamedPixels, workers: int, tolerant: bool
) -> tuple[list[dict], dict[int, str]]:
    """The JSON members of all samples; and, where that is tolerated, {number: reason} of those that
    have none."""

    def parse(reader: ShardReader | LostShard) -> list[dict | str]:
        found = []
        for sample in range(len(reader)):
            try:
                found.append(_description(reader, sample, reader.read_member(sample, "json")))
            except UserError as error:
                if not tolerant:
                    raise UserError(f"{error}{streamed.way_out}") from error
                found.append(str(error))
        return found

    with ThreadPoolExecutor(workers) as pool:
        parsed = [sample for shard in pool.map(parse, streamed.readers) for sample in shard]
    faults = {number: text for number, text in enumerate(parsed) if isinstance(text, str)}
    return [{} if isinstance(sample, str) else sample for sample in parsed], faults


def _as_arrays(samples: Sequence[dict], index: Index) -> dict[str, np.ndarray]:
    """attributes, labels and factors of described samples."""
    count, sign = len(samples), {True: 1, False: -1, None: 0}
    signs, factors = [], []
    for sample in samples:
        known, values = sample.get("attributes", {}), sample.get("factors", {})
        signs.append([sign[known.get(name)] for name in index.attribute_names])
        factors.append([values.get(name, np.nan) for name in index.factor_names])
    return {
        "attributes": np.array(signs, np.int8).reshape(count, len(index.attribute_names)),
        "labels": np.array([sample.get("label", -1) for sample in samples], np.int64),
        "factors": np.array(factors, np.float32).reshape(count, len(index.factor_names)),
    }


def _metadata(
    streamed: StreamedPixels, index: Index, workers: int, tolerant: bool
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Everything in METADATA, and the faults of `_descriptions`."""
    samples, faults = _descriptions(streamed, workers, tolerant)
    return {"keys": _unique_keys(streamed), **_as_arrays(samples, index)}, faults


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


def _look_at_all(
    streamed: StreamedPixels,
    known: Mapping[int, str],
    name: str,
    workers: int,
    progress: bool,
    tolerant: bool,
    keep: Callable[[int, np.ndarray], None] = lambda number, pixels: None,
) -> list[Fault]:
    """Decodes all samples but those `known` as corrupt, and hands them to `keep`. Returns the
    corrupt ones, or raises UserError for the first. Threads: decoding releases Python's lock."""
    count = int(streamed.ends[-1]) if len(streamed.ends) else 0

    def look(start: int) -> tuple[int, dict[int, str]]:
        found = {}
        numbers = range(start, min(start + _CHUNK, count))
        for number in numbers:
            if number in known:
                continue
            try:
                pixels = streamed.one(number)
            except UserError as error:
                if not tolerant:
                    raise
                found[number] = str(error)
            else:
                keep(number, pixels)
        return len(numbers), found

    reasons = dict(known)
    bar = tqdm(total=count, unit="image", desc=f"cache {name}", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:
        for done, found in pool.map(look, range(0, count, _CHUNK)):
            bar.update(done)
            reasons |= found
    faults = []
    for number, reason in sorted(reasons.items()):
        reader, sample = streamed.place(number)
        key = reader.keys[sample].decode()
        faults.append({"number": number, "shard": reader.path.name, "key": key, "reason": reason})
    return faults


def _build_cache(
    directory: Path,
    streamed: StreamedPixels,
    index: Index,
    name: str,
    workers: int,
    progress: bool,
    tolerant: bool,
) -> list[Fault]:
    """Writes `<name>.npy` and `<name>.metadata.npz`; returns the corrupt samples."""
    metadata, known = _metadata(streamed, index, workers, tolerant)
    pixels, arrays = directory / f".{name}.npy", directory / f".{name}.npz"
    try:
        shape = (len(metadata["keys"]), *_shape(streamed.recipe))
        array = np.lib.format.open_memmap(pixels, "w+", np.uint8, shape)
        crc32 = np.zeros(len(array), np.uint32)

        def keep(number: int, image: np.ndarray) -> None:
            array[number], crc32[number] = image, zlib.crc32(image.data)

        faults = _look_at_all(streamed, known, name, workers, progress, tolerant, keep)
        array.flush()
        with open(arrays, "wb") as file:
            np.savez(file, **metadata, crc32=crc32)  # pyright: ignore[reportArgumentType]
        (directory / f"{name}.json").unlink(missing_ok=True)  # of the old cache
        os.replace(arrays, directory / f"{name}.metadata.npz")
        os.replace(pixels, directory / f"{name}.npy")
    finally:
        pixels.unlink(missing_ok=True)
        arrays.unlink(missing_ok=True)
    return faults


def _faults_noted(note: Path, expected: dict, tolerant: bool) -> list[Fault] | None:
    """The corrupt samples that a note tells of; None where it is not of these images, or where
    there must be none: they may be mended by now."""
    try:
        noted = json.loads(note.read_text())
        faults = noted.pop("corrupt", [])
        return faults if noted == expected and (tolerant or not faults) else None
    except (OSError, ValueError, AttributeError):
        return None


def _load_cache(
    directory: Path, name: str, recipe: Recipe, count: int
) -> tuple[_CachedPixels, dict[str, np.ndarray]] | None:
    """None where a file is missing or damaged."""
    arrays = directory / f"{name}.metadata.npz"
    try:
        with zipfile.ZipFile(arrays) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return None  # not written here, and may unfold to any size
        with np.load(arrays, allow_pickle=False) as file:
            metadata = {key: file[key] for key in METADATA}
            pixels = _CachedPixels(directory / f"{name}.npy", file["crc32"])
        shape = (count, *_shape(recipe))
        fits = (
            pixels.array.shape == shape
            and pixels.array.dtype == np.uint8
            and all(len(array) == count for array in (*metadata.values(), pixels.crc32))
        )
        return (pixels, metadata) if fits else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def open_images(
    root: Path,
    split: str,
    size: int,
    *,
    cache: bool = True,
    corrupt: CorruptConfig | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> ImageSet:
    """The images of a split at `size` pixels.

    Args:
        cache: keep pixels in `<root>/cache/<recipe hash>/`, built at the first call and again when
            the index has changed; otherwise each access reads and decodes.
        corrupt: what to do about corrupt images, in a stage that has this config; None: stop.
        seed: decides which images stand in for corrupt ones.
        workers: threads that build the cache and read the metadata, 0 for one per CPU.

    Without a cache, and where a corrupt image stops the stage, a shard is opened when one of its
    samples is first read. Raises UserError for missing or damaged shards.
    """
    index = read_index(root)
    recipe = recipe_for(index.source, size)
    shards, workers = index.shards(split), workers or num_cpus()
    config = corrupt or CorruptConfig()
    tolerant = config.substitutes
    way_out = "" if corrupt is None or tolerant else "; or --corrupt.action substitute"
    directory = root / "cache" / recipe.hash
    note = directory / (f"{split}.json" if cache else f"{split}.corrupt.json")

    def expected() -> dict[str, Any]:
        return {"index_sha256": index.sha256, "recipe": dataclasses.asdict(recipe)}

    def streamed() -> StreamedPixels:
        return StreamedPixels(open_readers(root, shards, config, split), recipe, way_out=way_out)

    def noted() -> list[Fault] | None:
        return _faults_noted(note, expected(), tolerant)

    def write_note(faults: list[Fault]) -> None:
        write_json(note, {**expected(), **({"corrupt": faults} if faults else {})})

    def load() -> tuple[_CachedPixels, dict[str, np.ndarray]] | None:
        return _load_cache(directory, split, recipe, index.num_samples(split))

    metadata: Mapping[str, np.ndarray]
    if cache:
        loaded = load() if noted() is not None else None
        if loaded is None:
            with _locked(directory):
                # another process may just have built it
                loaded = load() if noted() is not None else None
                if loaded is None:
                    write_note(_build_cache(
                        directory, streamed(), index, split, workers, progress, tolerant
                    ))  # fmt: skip
                    loaded = load()
        if loaded is None:
            raise UserError(f"{directory} cannot be read again after writing: look at the disk")
        pixels, metadata = loaded
        faults = noted() or []
    elif tolerant:
        pixels = streamed()
        metadata, known = _metadata(pixels, index, workers, tolerant)
        with _locked(directory):
            faults = noted()
            if faults is None:
                faults = _look_at_all(pixels, known, split, workers, progress, tolerant)
                write_note(faults)
    else:
        pixels, faults = streamed(), []
        metadata = StreamedMetadata(pixels, index, workers)
    if faults:
        first = f"first: {faults[0]['reason']}; all: {note}"
        check_budget(config, len(faults), len(metadata["keys"]), split, first)
        others = stand_ins([fault["number"] for fault in faults], len(metadata["keys"]), seed)
        pixels.stand_ins = others
        for name in ("attributes", "labels", "factors"):  # arrays of this process: writable
            metadata[name][list(others)] = metadata[name][list(others.values())]
        faults = [{**fault, "substitute": others[fault["number"]]} for fault in faults]
    return ImageSet(
        index=index, split=split, recipe=recipe, metadata=metadata, pixels=pixels,
        faults=tuple(faults),
    )  # fmt: skip


def open_for_training(config: Any) -> tuple[ImageSet, ImageSet]:
    """The training and the validation split of a stage whose config has data, image_size, cache,
    corrupt and seed."""
    train, valid = (
        open_images(
            config.data, split, config.image_size,
            cache=config.cache, corrupt=config.corrupt, seed=config.seed,
        )
        for split in ("train", "valid")
    )  # fmt: skip
    return train, valid


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
