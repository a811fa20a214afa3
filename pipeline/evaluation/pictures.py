"""Pixels as people see them: uint8 conversion, grids, PNG files."""

import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from pipeline.failpoint import failpoint


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [0, 1], clamped and rounded -> (B, H, W, C) uint8."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()


def to_unit(images: torch.Tensor | np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Images (B, H, W, C) uint8 -> (B, C, H, W) in [0, 1], of the default dtype, channels last."""
    pixels = torch.as_tensor(images).to(device, non_blocking=True)
    return rearrange(pixels, "b h w c -> b c h w").to(torch.get_default_dtype()).div(255)


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Images (N, H, W, C) uint8 in rows of `columns` on white -> one (H', W', 3) uint8."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        rgb = image if channels == 3 else np.repeat(image, 3, axis=2)
        sheet[top : top + height, left : left + width] = rgb
    return sheet


def pairs(originals: np.ndarray, reconstructions: np.ndarray, columns: int) -> np.ndarray:
    """Originals above their reconstructions, (N, H, W, C) uint8 each, as one grid."""
    rows = []
    for start in range(0, len(originals), columns):
        rows += [originals[start : start + columns], reconstructions[start : start + columns]]
    return grid(np.concatenate(rows), columns)


def save_png(image: np.ndarray, path: Path, scale: int = 1) -> None:
    """Writes (H, W, C) uint8 as PNG, atomically; `scale` repeats pixels for small pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image[:, :, 0] if image.shape[2] == 1 else image
    picture = Image.fromarray(image)
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(temporary, format="PNG")
    failpoint("commit")
    os.replace(temporary, path)
