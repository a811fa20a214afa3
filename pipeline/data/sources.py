"""Where images come from: CelebA (and drawn faces in its layout), a folder, MNIST.

A source is a list of light items (names and annotations, no pixels) in a fixed order, and
`read_item`, which fetches the encoded bytes of one, in any process.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from PIL import Image

from pipeline.data import idx
from pipeline.data.index import SPLITS
from pipeline.stage import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_KEY_LENGTH = 64  # room for a hash and for `_flip` within the 128 of a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image: where it is and what is known of it. None and () stand for unknown."""

    key: str
    split: str
    path: str  # below the root, for people
    file: str  # the file to open: the image, or the archive that has it
    member: str | int | None = None  # name in a zip, number in an idx file
    size: int = 0  # encoded bytes, where that is known before reading
    attributes: tuple[int, ...] = ()  # -1 or 1
    label: int | None = None
    identity: int | None = None
    factors: tuple[float, ...] = ()
    problem: str = ""  # why it cannot be used, where that is known before reading


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: items sorted by split and path, and the meaning of their annotations."""

    name: str
    items: tuple[Item, ...] = field(repr=False)
    attribute_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    factor_names: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    """(width, height) that every image must have."""

    def describe(self, item: Item) -> bytes:
        """The JSON member of a sample; what is unknown is absent."""
        description: dict[str, object] = {"path": item.path}
        if item.attributes:
            yes = [value > 0 for value in item.attributes]
            description["attributes"] = dict(zip(self.attribute_names, yes, strict=True))
        if item.identity is not None:
            description["identity"] = item.identity
        if item.label is not None:
            description["label"] = item.label
            description["class_name"] = self.class_names[item.label]
        if item.factors:
            description["factors"] = dict(zip(self.factor_names, item.factors, strict=True))
        return json.dumps(description).encode()


def make_keys(paths: Sequence[str]) -> list[str]:
    """Globally unique keys from paths without their suffixes, `cat/1.jpg` -> `cat_1`.

    A hash of the path is added where the short form is not unique, too long, or ends like the key
    of a flipped view.
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", str(PurePosixPath(p).with_suffix(""))) for p in paths]
    counts = Counter(plain)
    keys = []
    for path, key in zip(paths, plain, strict=True):
        if counts[key] > 1 or len(key) > _KEY_LENGTH or key.endswith("_flip"):
            key = f"{key[:_KEY_LENGTH]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
        keys.append(key)
    if len(set(keys)) != len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise UserError(f"two images get the key {twice}: rename one of them")
    return keys


def _sorted(items: list[Item], root: Path, layout: str) -> tuple[Item, ...]:
    if not items:
        raise UserError(f"no images in {root}: expected {layout}")
    order = {split: number for number, split in enumerate(SPLITS)}
    return tuple(sorted(items, key=lambda item: (order[item.split], item.path)))


_CELEBA = (
    "img_align_celeba/ (or img_align_celeba.zip) beside list_attr_celeba.txt and "
    "list_eval_partition.txt"
)


def _read_annotations(
    path: Path, convert: Callable, width: int | None = None
) -> tuple[tuple[str, ...], dict[str, tuple]]:
    """(names, {image: values}) of a text file; `width` values a row, or None: a header says."""
    if not path.is_file():
        raise UserError(f"{path} is missing: expected {_CELEBA}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = () if width else tuple(lines[1].split()) if len(lines) > 1 else ()
    rows, start = {}, 0 if width else 2
    for number, line in enumerate(lines[start:], start + 1):
        image, *values = line.split() or [""]
        try:
            converted = tuple(convert(value) for value in values)
        except (ValueError, KeyError):
            raise UserError(f"{path}:{number}: unexpected value in {line[:60]!r}") from None
        if image:
            if len(converted) != (width or len(names)):
                raise UserError(f"{path}:{number}: {len(values)} values, not {width or len(names)}")
            rows[image] = converted
    return names, rows


def _celeba_images(root: Path) -> dict[str, tuple[str, str | None, int]]:
    """{image: (file, member of the zip, bytes)}."""
    folder, archive = root / "img_align_celeba", root / "img_align_celeba.zip"
    if folder.is_dir():
        with os.scandir(folder) as entries:
            files = [entry for entry in entries if entry.name.lower().endswith(SUFFIXES)]
            return {entry.name: (entry.path, None, entry.stat().st_size) for entry in files}
    if not archive.is_file():
        raise UserError(f"{folder} is missing: expected {_CELEBA}")
    return {
        PurePosixPath(info.filename).name: (str(archive), info.filename, info.file_size)
        for info in _open_zip(str(archive)).infolist()
        if info.filename.lower().endswith(SUFFIXES) and not info.filename.startswith("__MACOSX")
    }


def celeba(root: Path, name: str = "celeba") -> Source:
    """The official layout, with the official partition; `identity_CelebA.txt` and
    `list_factors.txt` (drawn faces) are read where they are."""
    images = _celeba_images(root)
    split_of = {"0": "train", "1": "valid", "2": "test"}.__getitem__
    tables = {"partition": _read_annotations(root / "list_eval_partition.txt", split_of, 1)[1]}
    sign = {"1": 1, "-1": -1}.__getitem__
    attribute_names, tables["attr"] = _read_annotations(root / "list_attr_celeba.txt", sign)
    factor_names: tuple[str, ...] = ()
    if (root / "identity_CelebA.txt").is_file():
        tables["identity"] = _read_annotations(root / "identity_CelebA.txt", int, 1)[1]
    if (root / "list_factors.txt").is_file():
        factor_names, tables["factors"] = _read_annotations(root / "list_factors.txt", float)
    names = sorted(images.keys() | tables["partition"].keys())
    items = []
    for image, key in zip(names, make_keys(names), strict=True):
        file, member, size = images.get(image, ("", None, 0))
        rows = {table: tables[table].get(image) for table in tables}
        lacking = [table for table, row in rows.items() if row is None]
        problem = f"no row in the {lacking[0]} file" if lacking else "" if file else "no such file"
        items.append(
            Item(
                key=key,
                split=(rows["partition"] or ("train",))[0],
                path=f"img_align_celeba/{image}",
                file=file,
                member=member,
                size=size,
                attributes=rows["attr"] or (),
                identity=(rows.get("identity") or (None,))[0],
                factors=rows.get("factors") or (),
                problem=problem,
            )
        )
    return Source(
        name=name,
        items=_sorted(items, root, _CELEBA),
        attribute_names=attribute_names,
        factor_names=factor_names,
        image_size=(178, 218) if name == "celeba" else None,
    )


_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
_FOLDER = f"images ({' '.join(SUFFIXES)}), in sub-folders by class or in train/ valid/ test/"


def _hash_split(path: str) -> str:
    """80 : 10 : 10 by the path alone, so that new images move no old one."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") % 10
    return {8: "valid", 9: "test"}.get(bucket, "train")


def _walk(root: Path) -> list[str]:
    """Sorted paths, below `root`, of all files that are named like images."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; expected {_FOLDER}")

    return sorted(
        Path(directory, name).relative_to(root).as_posix()
        for directory, _, names in os.walk(root, onerror=fail, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def folder(root: Path) -> Source:
    """All images below `root`; the first folder (inside train/, valid/, test/) is the class."""
    paths = _walk(root)
    has_splits = any((root / name).is_dir() for name in _SPLIT_FOLDERS)
    placed = []  # (split, class or None)
    for path in paths:
        *folders, _ = path.split("/")
        if has_splits and (not folders or folders[0] not in _SPLIT_FOLDERS):
            raise UserError(f"{root} has train/, valid/ or test/, but {path} is in none: move it")
        split = _SPLIT_FOLDERS[folders.pop(0)] if has_splits else _hash_split(path)
        placed.append((split, folders[0] if folders else None))
    class_names = sorted({name for _, name in placed if name is not None})
    number = {name: n for n, name in enumerate(class_names)}
    items = [
        Item(
            key=key,
            split=split,
            path=path,
            file=str(root / path),
            size=(root / path).stat().st_size if (root / path).exists() else 0,
            label=None if name is None else number[name],
        )
        for path, key, (split, name) in zip(paths, make_keys(paths), placed, strict=True)
    ]
    return Source(
        name="folder", items=_sorted(items, root, _FOLDER), class_names=tuple(class_names)
    )


def mnist(root: Path) -> Source:
    """The idx files; the last twelfth of the training file (5,000 of 60,000) is `valid`."""
    items = []
    for part in ("train", "t10k"):
        file = idx.find(root, part, "images-idx3")
        labels = idx.read_labels(str(idx.find(root, part, "labels-idx1"))).tolist()
        count = len(idx.read_images(str(file)))
        if count != len(labels):
            raise UserError(f"{file} has {count} images, its labels file {len(labels)}: fetch anew")
        for number, label in enumerate(labels):
            held_out = "valid" if number >= count - count // 12 else "train"
            items.append(
                Item(
                    key=f"mnist_{part}_{number:05d}",
                    split=held_out if part == "train" else "test",
                    path=f"{part}-images-idx3-ubyte#{number:05d}",
                    file=str(file),
                    member=number,
                    label=label,
                )
            )
    digits = tuple(str(digit) for digit in range(10))
    return Source(name="mnist", items=_sorted(items, root, "MNIST's idx files"), class_names=digits)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "celeba": celeba,
    "folder": folder,
    "mnist": mnist,
    "faces": partial(celeba, name="faces"),
}


@lru_cache(maxsize=2)
def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable zip file ({error}): fetch it anew") from None


def read_item(item: Item) -> bytes:
    """The encoded bytes of an item; MNIST's images become PNG. OSError or BadZipFile on damage."""
    if isinstance(item.member, int):
        output = io.BytesIO()
        Image.fromarray(idx.read_images(item.file)[item.member]).save(output, "PNG")
        return output.getvalue()
    if item.member is not None:
        return _open_zip(item.file).read(item.member)
    return Path(item.file).read_bytes()
