"""Images by number, wherever they come from: shards, files, a sampling run, a model.

    real = ShardImages(open_images(shards, "valid", 64))
    real[np.array([3, 1])]                        # (2, 64, 64, 3) uint8
    half = Choice(real, choose(500, np.arange(len(real)), seed=0))
    open_set(Path("runs/demo/samples"), 64, 3)    # whatever lies there

An image depends on its number alone, not on the order, the batch or the process that asks for it,
so that features can be extracted in parts. `protocol` says what decides the pixels, by hashes and
seeds and never by paths: sets with equal protocols are the same images.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.data.images import IMAGE_EXTENSIONS, ImageSet, open_images
from pipeline.data.order import permute
from pipeline.evaluation import pictures
from pipeline.image_model import Asked, ImageModel, Precision, Sampling, load_model
from pipeline.models.quantizers import usage
from pipeline.models.vae.vae import VAE
from pipeline.models.vqvae import VQVAE
from pipeline.stage import UserError, num_cpus
from pipeline.training import checkpoint

BATCH_SIZE = 50
MIN_IMAGES = 16  # of a set that is scored: fewer make no subset and no neighbourhood
SUFFIXES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("L", "LA", "1")  # of Pillow
# what samples.json tells of the making, not of the images
NOT_PIXELS = ("provenance", "images_per_sec", "accepted")


class Images(Protocol):
    """A set of images by number."""

    @property
    def protocol(self) -> dict[str, Any]:
        """JSON: all that decides the pixels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: np.ndarray, /) -> np.ndarray:
        """Images (B, H, W, C) uint8 of `numbers` (B,) int64 in [0, len)."""
        ...


def choose(count: int, candidates: np.ndarray, seed: int) -> np.ndarray:
    """`count` of the candidates, drawn without replacement by the keyed permutation, sorted."""
    return np.sort(candidates[permute(np.arange(count), len(candidates), seed, 0)])


def batches_of(images: Any, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """Batches of anything that `[indices]` turns into (B, H, W, C) uint8, such as an ImageSet."""
    for start in range(0, len(indices), BATCH_SIZE):
        yield images[np.asarray(indices[start : start + BATCH_SIZE])]


def blurred(batches: Iterable[np.ndarray], sigma: float) -> Iterator[np.ndarray]:
    """The same images through a Gaussian blur of `sigma` pixels."""
    for batch in batches:
        smooth = gaussian_filter(batch.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")
        yield smooth.round().clip(0, 255).astype(np.uint8)


def _sha256(*parts: Any) -> str:
    """Of arrays, by their bytes, or of JSON."""
    digest = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        digest.update(part.tobytes() if is_array else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


# Sets made of other sets.


class Choice:
    """Some images of another set, numbered anew."""

    def __init__(self, images: Images, numbers: np.ndarray):
        """numbers: (N,) of `images`, in the order of the choice."""
        self.images, self.numbers = images, np.asarray(numbers, np.int64)
        self.protocol = {"of": images.protocol, "numbers_sha256": _sha256(self.numbers)}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.images[self.numbers[numbers]]


class Blurred:
    """Another set through a Gaussian blur of `sigma` pixels."""

    def __init__(self, images: Images, sigma: float):
        self.images, self.sigma = images, sigma
        self.protocol = {"source": "blurred", "sigma": sigma, "of": images.protocol}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return next(blurred([self.images[numbers]], self.sigma))


class Mirrored:
    """Another set with left and right exchanged."""

    def __init__(self, images: Images):
        self.images = images
        self.protocol = {"source": "mirrored", "of": images.protocol}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.images[numbers][:, :, ::-1].copy()


class Reconstructions:
    """What a VQ-VAE, or a VAE at its posterior's mean, makes of another set, as files hold it."""

    def __init__(self, model: VQVAE | VAE, sha256: str, originals: Images, device: torch.device):
        """sha256: of the model's weights."""
        self.model, self.originals, self.device = model.to(device), originals, device
        self.protocol = {
            "source": "reconstructions", "checkpoint_sha256": sha256, "of": originals.protocol,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.originals)

    @torch.no_grad()
    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        batch = pictures.to_unit(self.originals[numbers], self.device)
        if isinstance(self.model, VAE):
            found = self.model.reconstruct(batch, self.model.condition(len(batch)))
        else:
            found = self.model(batch).reconstructions
        return pictures.to_uint8(found)

    def grid(self, count: int = 16) -> np.ndarray:
        """The first images above their reconstructions, (H', W', 3) uint8."""
        columns = min(8, count, len(self))
        numbers = np.arange(min(count, len(self)) // columns * columns)  # whole rows
        return pictures.pairs(self.originals[numbers], self[numbers], columns)


def open_reconstructions(path: Path, originals: Images, device: torch.device) -> Reconstructions:
    """By the trained VQ-VAE or VAE of a run directory; UserError for a VAE of other inputs."""
    model, about = checkpoint.load_model(path), checkpoint.read_about(path)
    if about["kind"] not in ("vqvae", "vae"):
        raise UserError(f"{path} holds a {about['kind']}, expected a vqvae or vae")
    if about["kind"] == "vae" and (model.config.condition_dim or about["config"].get("binarize")):
        raise UserError(
            f"{path} was trained on conditions or binarized images; compare.py scores its "
            "reconstructions"
        )
    return Reconstructions(model, checkpoint.model_sha256(path), originals, device)


@torch.no_grad()
def code_usage(model: VQVAE, images: Images, device: torch.device) -> dict[str, float]:
    """Per level the effective codes, exp of the entropy of their use, and those used at all."""
    counts = [torch.zeros(size, dtype=torch.int64) for size in model.config.codebook_sizes]
    for batch in batches_of(images, np.arange(len(images))):
        levels = model.encode_codes(pictures.to_unit(batch, device))
        for total, codes in zip(counts, levels, strict=True):
            total += codes.flatten().cpu().bincount(minlength=len(total))
    values = {}
    for level, total in enumerate(counts):
        perplexity, _, used = usage(total)
        values |= {f"level{level}/perplexity": perplexity, f"level{level}/codes_used": used}
    return values


# Sets from the disk.


class ShardImages:
    """A split of image shards."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.protocol = {
            "source": "shards", "index_sha256": images.index.sha256, "split": images.split,
            "recipe": images.recipe.hash,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.images[numbers]


class _File(NamedTuple):
    """What is known of an image file before it is decoded."""

    name: str
    sha256: str
    format: str
    size: tuple[int, int]
    grey: bool


def _inspect(root: Path, name: str) -> _File:
    """Reads a file and its header; UserError for what is no 8-bit image."""
    try:
        data = (root / name).read_bytes()
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_EXTENSIONS)) as image:
            file_format, size, mode = str(image.format), image.size, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{root / name} cannot be read as PNG or JPEG: {error}") from error
    # Pillow cuts 16-bit colours to 8 without a word; a PNG's bit depth is its 25th byte
    if mode.startswith(("I", "F")) or (file_format == "PNG" and data[24] == 16):
        raise UserError(f"{root / name} has 16 bits per channel; save the images with 8 bits")
    return _File(name, hashlib.sha256(data).hexdigest(), file_format, size, mode in GREY_MODES)


class Folder:
    """All PNG and JPEG files of a folder and its sub-folders, in the order of their names.

    The files' own pixels: nothing is cropped, resized or compressed. Transparency is dropped, as
    torch-fidelity does.
    """

    def __init__(self, root: Path, size: int | None = None, channels: int | None = None):
        """size: side in pixels that the images must have, None = any, but all alike. channels: 1
        for grey, 3 for colours (grey is repeated); None = grey if all files are.

        Raises UserError for anything that cannot be compared as it is.
        """
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if len(names) < 2:
            raise UserError(
                f"{root} has {len(names) or 'no'} image files ({' '.join(SUFFIXES)}); at least 2 "
                "are needed"
            )
        with ThreadPoolExecutor(num_cpus()) as pool:
            files = list(pool.map(lambda name: _inspect(root, name), names))
        side = files[0].size if size is None else (size, size)
        for file in files:
            if file.size != side:
                raise UserError(
                    f"{root / file.name} has {file.size[0]}x{file.size[1]} pixels, needed "
                    f"{side[0]}x{side[1]}; shards of the folder (shard_data.py --source folder "
                    f"--root {root}) are cropped and resized when they are read"
                )
            if channels == 1 and not file.grey:
                raise UserError(f"{root / file.name} has colours; save the images as grey ones")
        self.root, self.names = root, names
        self.channels = channels or (1 if all(file.grey for file in files) else 3)
        self.protocol = {
            "source": "files",
            "files_sha256": _sha256([(file.name, file.sha256) for file in files]),
            "file_format": " and ".join(sorted({file.format for file in files})),
            "channels": self.channels,
        }

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(num_cpus()) as pool:  # decoding releases Python's lock
            return np.stack(list(pool.map(self._read, numbers)))

    def _read(self, number: int) -> np.ndarray:
        path = self.root / self.names[number]
        try:
            with Image.open(path, formats=tuple(IMAGE_EXTENSIONS)) as image:
                pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} cannot be decoded: {error}; make it again") from error
        return pixels.reshape(*pixels.shape[:2], -1)


class SampleFiles:
    """The images of a sampling run of sample_prior.py, from its files or its shards."""

    def __init__(self, path: Path, size: int, channels: int):
        self.path, self.size, self.channels = path, size, channels
        if not (path / "samples.json").is_file():
            raise UserError(
                f"{path} needs samples.json and images; sample with sample_prior.py first"
            )
        self.note: dict[str, Any] = json.loads((path / "samples.json").read_text())
        """What the run says of itself, with when and how fast."""
        self.images: ShardImages | Folder
        if self.note.get("format") == "tar":
            self.images = ShardImages(self.shards)
        else:
            self.images = Folder(path / "images", size, channels)
        expected = self.note.get("num_images", len(self))
        if len(self) != expected:
            raise UserError(
                f"{path} has {len(self)} of {expected} images; let sample_prior.py finish first"
            )
        self.protocol = {
            **{key: value for key, value in self.note.items() if key not in NOT_PIXELS},
            "images": self.images.protocol,
        }

    @cached_property
    def shards(self) -> ImageSet:
        """What was asked for, image by image: its `attributes` (N, A), `labels` (N,) and the index
        with their names. It has pixels in format tar only."""
        return open_images(self.path / "shards", "train", self.size, cache=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        # shards of a folder are read in colours, in which grey is repeated
        return self.images[numbers][..., : self.channels]


# Sets from a generator.


class Generated:
    """Images drawn on demand: image n is that of sample_prior.py and of ImageModel.sample."""

    def __init__(self, model: ImageModel, how: Sampling, count: int, asked: Asked | None = None):
        """asked: what each of `count` images is asked for; None = of all what `how` asks.

        Raises UserError for what the priors cannot do.
        """
        model.check(how)
        self.model, self.how, self.asked = model, how, asked or model.asked(how, count)
        names, attributes, classes, labels = self.asked
        if len(attributes) != count or len(labels) != count:
            raise ValueError(f"{len(labels)} images are asked for something, expected {count}")
        priors = [model.prior(level) for level in range(len(model.grids))]
        options = {k: v for k, v in dataclasses.asdict(how).items() if k != "method"}
        asked_for = (*names, *classes), attributes.astype(np.int8), labels.astype(np.int64)
        self.protocol = {
            "source": "generated",
            **options,
            "attributes": how.wanted or None,
            "asked_sha256": _sha256(*asked_for),
            "vqvae_sha256": model.sha256,
            "prior_sha256": [prior.sha256 for prior in priors],
            "precision": str(next(priors[0].model.parameters()).dtype),
        }

    def __len__(self) -> int:
        return len(self.asked.labels)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        where = torch.as_tensor(numbers)
        codes = self.model.draw_codes(where, self.how, asked=self.asked.of(numbers))
        return pictures.to_uint8(self.model.decode(codes))


def open_set(
    path: Path,
    size: int,
    channels: int,
    *,
    split: str = "test",
    count: int | None = None,
    how: Sampling | None = None,
    precision: Precision = "fp32",
    device: torch.device | None = None,
) -> Images:
    """The images at `path`, by what lies there.

        index.json                image shards: their `split`
        samples.json              a sampling run, png or tar
        vqvae/ or final/          a trained VQ-VAE with its priors, which draws `count` images
        else                      a folder of PNG or JPEG files

    Args:
        size, channels: of the images to be compared with.
        how: of a generator's images; None = Sampling().
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give images, shards, samples or a run tree")
    if (path / "index.json").is_file():
        return ShardImages(open_images(path, split, size))
    if (path / "samples.json").is_file():
        return SampleFiles(path, size, channels)
    if not (path / "vqvae").is_dir() and not (path / "final").is_dir():
        return Folder(path, size, channels)
    if count is None:
        raise UserError(f"{path} is a generator, whose images never end; say how many")
    model = load_model(path, device=device, precision=precision)
    if model.image_size != size:
        raise UserError(f"{path} draws images of {model.image_size} pixels, needed {size}")
    return Generated(model, how or Sampling(), count)
