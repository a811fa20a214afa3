"""The sets of images that are compared, each an iterable of uint8 batches (B, H, W, C)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.data.images import ImageSet
from pipeline.data.order import permute
from pipeline.evaluation import pictures
from pipeline.models.quantizers import usage
from pipeline.models.vqvae import VQVAE
from pipeline.stage import UserError

BATCH_SIZE = 50


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


class SampleFiles:
    """The PNG files of a sampling run as an array of images; `protocol` is its samples.json."""

    def __init__(self, path: Path, size: int, channels: int):
        self.files = sorted((path / "images").glob("*.png"))
        self.size, self.mode = size, "L" if channels == 1 else "RGB"
        if not self.files or not (path / "samples.json").is_file():
            raise UserError(
                f"{path} needs images/*.png and samples.json; sample with sample_prior.py first"
            )
        self.protocol: dict[str, Any] = json.loads((path / "samples.json").read_text())
        if self.protocol.get("num_images", len(self.files)) != len(self.files):
            raise UserError(
                f"{path} has {len(self.files)} of {self.protocol['num_images']} images; let "
                "sample_prior.py finish first"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Images (B, H, W, C) uint8 at `indices` (B,)."""
        return np.stack([self._read(self.files[index]) for index in indices])

    def _read(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file, formats=("PNG",)) as image:
                if image.size != (self.size, self.size):
                    raise ValueError(f"{image.size} pixels, expected {self.size}x{self.size}")
                pixels = np.asarray(image.convert(self.mode))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be scored: {error}; sample again") from error
        return pixels.reshape(self.size, self.size, -1)


class Reconstructions:
    """Iterates over a model's reconstructions as files would hold them, (B, H, W, C) uint8, and
    keeps sums for `figures`."""

    def __init__(self, model: VQVAE, images: ImageSet, indices: np.ndarray, device: torch.device):
        self.model, self.images, self.indices, self.device = model, images, indices, device

    def __iter__(self) -> Iterator[np.ndarray]:
        sizes = self.model.config.codebook_sizes
        self.errors, self.counts = [], [torch.zeros(size, dtype=torch.int64) for size in sizes]
        for originals in batches_of(self.images, self.indices):
            batch = pictures.to_unit(originals, self.device)
            with torch.no_grad():
                output = self.model(batch)
            error = (output.reconstructions.float().clamp(0, 1) - batch).square().mean((1, 2, 3))
            self.errors.append(error.double().cpu())
            for counts, codes in zip(self.counts, output.codes, strict=True):
                counts += codes.flatten().cpu().bincount(minlength=len(counts))
            yield pictures.to_uint8(output.reconstructions)

    @torch.no_grad()
    def grid(self, count: int = 16) -> np.ndarray:
        """The first images above their reconstructions, (H', W', 3) uint8."""
        originals = self.images[self.indices[:count]]
        output = self.model(pictures.to_unit(originals, self.device))
        return pictures.pairs(originals, pictures.to_uint8(output.reconstructions), columns=8)

    def figures(self) -> dict[str, float]:
        """MSE in [0, 1] and PSNR (means over images, before rounding), perplexity, codes used."""
        errors = torch.cat(self.errors)
        psnr = -10 * errors.clamp(min=1e-10).log10()
        values = {"mse": float(errors.mean()), "psnr": float(psnr.mean())}
        for level, counts in enumerate(self.counts):
            perplexity, _, used = usage(counts)
            values |= {f"level{level}/perplexity": perplexity, f"level{level}/codes_used": used}
        return values
