"""Reconstructs any folder of images: PNG files, a picture of pairs, PSNR and bits of every image.

    python pipeline/reconstruct.py --checkpoint runs/demo/vqvae --images photos --out runs/photos
    python pipeline/reconstruct.py ... --num_images 100        the first so many files only

Takes JPEG, PNG, WebP and BMP files of any size, in sub-folders too. An image is cut as the run's
training images were, in proportion: after CelebA at 64 px the centre square of 140/178 of its
shorter side, after a folder of images the largest centre square.

Writes <out>/images/*.png, <out>/reconstructions.png (originals above their reconstructions) and
<out>/reconstructions.json: of each image MSE in [0, 1], PSNR in dB and the bits of its codes, and
their means. Bits are h·w·log2 K summed over the levels (fixed length), and where priors of all
levels lie beside the checkpoint (prior-level0, prior-level1 ...) also -log2 of the codes'
probability, class and attributes unknown. Files that cannot be read are named and left out. One
process, on the GPU where there is one.
"""

import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from pipeline import stage
from pipeline.data.images import IMAGE_EXTENSIONS, Recipe, decode, recipe_for
from pipeline.data.inspection import Limits
from pipeline.data.sharding import Task, usable_samples
from pipeline.data.sources import SOURCES, SUFFIXES, Item, Source, make_keys
from pipeline.evaluation import lossless, pictures
from pipeline.evaluation.code_likelihood import code_nats
from pipeline.image_model import ImageModel, load_model
from pipeline.training.tracking import progress_bar

COLUMNS, SHOWN = 8, 32  # pairs in a row and in all of the picture
SHORTER_SIDE = {"celeba": 178, "mnist": 28}  # of the images that a recipe's pixels are counted in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Config of the stage."""

    checkpoint: Path
    """Run directory of train_vqvae.py, or the run tree that it is in."""
    images: Path
    """Folder with images."""
    out: Path
    """Where images/, reconstructions.png and reconstructions.json go."""
    num_images: int | None = None
    """The first so many files, in the order of their paths; None = all."""
    batch_size: int = 32
    """Images per forward pass."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def find_images(root: Path) -> list[Item]:
    """All files below `root` that are named like images, in the order of their paths."""
    if not root.is_dir():
        raise stage.UserError(f"{root} is not a folder")
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )
    if not paths:
        raise stage.UserError(f"no images in {root}: expected files named {' '.join(SUFFIXES)}")
    return [
        Item(
            key=key,
            split="",
            path=path,
            file=str(root / path),
            size=(root / path).stat().st_size if (root / path).exists() else 0,
        )
        for path, key in zip(paths, make_keys(paths), strict=True)
    ]


def find_recipe(size: int, recipe_hash: str) -> tuple[Recipe, int | None]:
    """The recipe of a run's training images, and the shorter side in pixels of the images that its
    crop is for; None where it has no crop."""
    for source in SOURCES:
        try:
            recipe = recipe_for(source, size)
        except stage.UserError:  # a size that this source does not have
            continue
        if recipe.hash == recipe_hash:
            return recipe, SHORTER_SIDE.get(source)
    raise stage.UserError(
        f"the checkpoint was trained with recipe {recipe_hash}, which this version does not know; "
        "train again, or use the version that trained it"
    )


def in_proportion(recipe: Recipe, image_side: int, side: int | None) -> Recipe:
    """`recipe` for an image whose shorter side is `image_side`, not `side` pixels."""
    if recipe.crop is None or side is None:
        return recipe
    crop, pad = (round(pixels * image_side / side) for pixels in (recipe.crop, recipe.pad))
    return dataclasses.replace(recipe, crop=max(crop, 1), pad=pad)


def read_images(
    items: Sequence[Item], recipe: Recipe, side: int | None, skipped: list[dict[str, str]]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(path, key, pixels (H, W, C) uint8) of what can be read, by the rules of shard_data.py; the
    rest goes to `skipped` with the reason."""
    folder = Source(name="folder", items=())
    task = Task(path=Path(), split="", items=tuple(items), source=folder, limits=Limits())
    for key, members in usable_samples(task, skipped):
        (data,) = (members[name] for name in IMAGE_EXTENSIONS.values() if name in members)
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_EXTENSIONS)) as image:
            fitting = in_proportion(recipe, min(image.size), side)
        yield json.loads(members["json"])["path"], key, decode(data, fitting)


@torch.no_grad()
def reconstruct(
    model: ImageModel, originals: np.ndarray
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Images (B, H, W, C) uint8 -> their reconstructions, likewise, and the figures of each."""
    batch = pictures.to_unit(originals, model.device)
    output = model.vqvae(batch)
    mse = (output.reconstructions.float().clamp(0, 1) - batch).square().mean((1, 2, 3)).double()
    columns = {"mse": mse, "psnr": -10 * mse.clamp(min=1e-10).log10()}
    if len(model.priors) == len(model.grids):
        priors = [prior.model for _, prior in sorted(model.priors.items())]
        columns["prior_bits"] = code_nats(priors, output.codes).sum(1) / math.log(2)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    figures = [dict(zip(columns, row, strict=True)) for row in rows]
    return pictures.to_uint8(output.reconstructions), figures


def main(config: Reconstruct) -> None:
    if not stage.is_rank_zero():
        return
    target, root = config.out / "images", config.images.resolve()
    if root in (target.resolve(), *target.resolve().parents):
        raise stage.UserError(f"--out {config.out} lies inside --images; choose another --out")
    if target.is_dir() and any(target.iterdir()):
        raise stage.UserError(f"{target} holds images; delete it or choose another --out")
    items = find_images(config.images)[: config.num_images]

    model = load_model(config.checkpoint)
    recipe, side = find_recipe(model.image_size, model.recipe)
    images: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    with progress_bar(len(items), "reconstruct") as bar:
        for start in range(0, len(items), config.batch_size):
            batch = items[start : start + config.batch_size]
            if found := list(read_images(batch, recipe, side, skipped)):
                originals = np.stack([pixels for _, _, pixels in found])
                decoded, figures = reconstruct(model, originals)
                for (path, key, _), pixels, row in zip(found, decoded, figures, strict=True):
                    pictures.save_png(pixels, target / f"{key}.png")
                    images.append({"path": path, "reconstruction": f"images/{key}.png", **row})
                shown += zip(originals, decoded, strict=True)
                shown = shown[:SHOWN]
            bar.update(len(batch))
    if not images:
        raise stage.UserError(
            f"none of {len(items)} files in {config.images} can be read; the first, "
            f"{skipped[0]['path']!a}: {skipped[0]['reason']}"
        )

    columns = min(COLUMNS, len(shown))
    upper, lower = zip(*shown[: len(shown) // columns * columns], strict=True)  # whole rows
    sheet = pictures.pairs(np.stack(upper), np.stack(lower), columns)
    pictures.save_png(sheet, config.out / "reconstructions.png", scale=2)
    means = {
        name: float(np.mean([image[name] for image in images]))
        for name in ("mse", "psnr", "prior_bits")
        if name in images[0]
    }
    sizes = model.vqvae.config.codebook_sizes
    means["fixed_length_bits"] = lossless.fixed_length_bits(model.grids, sizes)
    protocol = {
        "checkpoint": str(config.checkpoint),
        "checkpoint_sha256": model.sha256,
        "prior_sha256": {level: prior.sha256 for level, prior in model.priors.items()},
        "folder": str(config.images),
        "recipe": recipe.hash,
        "recipe_shorter_side": side,
        "pixels": "MSE in [0, 1] of clamped reconstructions, before rounding to uint8",
        **stage.provenance(),
    }
    report = {
        "num_images": len(images), "num_skipped": len(skipped), "means": means,
        "images": images, "protocol": protocol,
        "skipped": [{"path": bad["path"], "reason": bad["reason"]} for bad in skipped],
    }  # fmt: skip
    stage.write_json(config.out / "reconstructions.json", report)

    bits = f"{means['fixed_length_bits']:,.0f} bits per image of fixed length"
    if "prior_bits" in means:
        bits += f", {means['prior_bits']:,.0f} by the priors"
    print(f"{config.out}: {len(images):,} images, PSNR {means['psnr']:.2f} dB, {bits}")
    print(f"skipped: {len(skipped)}")
    for bad in skipped:
        print(f"  {bad['path']!a}: {bad['reason']}")


if __name__ == "__main__":
    stage.run(Reconstruct, main, __doc__)
